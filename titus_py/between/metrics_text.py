"""The messages between the supervisor and the metrics server: the text is wanted, it comes.

One message is one SOCK_SEQPACKET packet. The supervisor trusts the metrics server with nothing: it
may say two words, and want one text at a time.

===============  ===============================================
metrics: ready   'R'                 confined; serves
metrics: alive   'A'
metrics: wanted  'W'                 the last text is too old
supervisor       'T', a descriptor   the text, in a sealed file
===============  ===============================================
"""

import os
import socket

from keyd.linux.descriptors import receive_descriptors

__all__ = ["MAX_OCTETS", "TEXT", "WANTED", "receive_text"]

WANTED, TEXT = b"W", b"T"
#: One more than each message has, so that a longer one is noticed.
MAX_OCTETS = 2
_PIECE_OCTETS = 64 * 1024


def receive_text(supervisor: socket.socket) -> bytes | None:
    """For the metrics server: the text; None if the supervisor has gone. Raises OSError."""
    message, descriptors = receive_descriptors(supervisor, len(TEXT), 1)
    if not message:
        return None
    pieces = []
    for descriptor in descriptors:
        while piece := os.read(descriptor, _PIECE_OCTETS):
            pieces.append(piece)
        os.close(descriptor)
    return b"".join(pieces)
