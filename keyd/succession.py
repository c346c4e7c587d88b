"""Keys that a keyd hands to its successor: those of certificates whose new files are bad.

Run by both, for a supervisor that keeps serving the old version of such a certificate. The
supervisor makes the socket between the two and reads nothing from it. It is trusted: it may read
the files of all keys.
"""

import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from keyd.keys import as_bound
from keyd.powers import Key, KeyElsewhere, PrivateKey
from keyd.protocol import MAX_HANDED
from keyd.reference import key_id

__all__ = ["MAX_ORDER_OCTETS", "hand_over", "inherited", "receive"]

MAX_ORDER_OCTETS = 4096
#: How long a predecessor may take: it only has to send what it has.
_PATIENCE_SECONDS = 5.0
#: More than the longest key, RSA with 8192 bits, takes in PKCS #8.
_MAX_KEY_OCTETS = 16 * 1024


def hand_over(keys: Mapping[bytes, Key], ids: Iterable[str], descriptor: int) -> None:
    """Send the keys with these ids, in hexadecimal, on this socket, and close it.

    A key that there is not, or for which there is no room, is left out.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=descriptor) as successor:
        for wanted in ids:
            key = keys.get(bytes.fromhex(wanted))
            if key is not None and not isinstance(key, KeyElsewhere):
                octets = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
                with suppress(OSError):
                    successor.send(octets, socket.MSG_DONTWAIT)


def receive(descriptor: int) -> list[bytes]:
    """What the predecessor sends, unread: at most MAX_HANDED messages, in a bounded time.

    The predecessor may have been taken over, and this process is root's as yet.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    received: list[bytes] = []
    with socket.socket(fileno=descriptor) as predecessor, suppress(OSError):
        while len(received) < MAX_HANDED and (left := deadline - time.monotonic()) > 0:
            predecessor.settimeout(left)
            octets = predecessor.recv(_MAX_KEY_OCTETS)
            if not octets:
                break
            received.append(octets)
    return received


def inherited(received: Iterable[bytes], wanted: Collection[str]) -> Iterator[PrivateKey]:
    """Of what was received, the keys with these ids, in hexadecimal. To be called confined.

    What is no key is left out: then a key is missing, which the supervisor sees.
    """
    for octets in received:
        with suppress(ValueError, TypeError, UnsupportedAlgorithm):
            loaded = load_der_private_key(octets, None, unsafe_skip_rsa_key_validation=True)
            key = as_bound(loaded, octets)
            if key_id(key.public_key()).hex() in wanted:
                yield key
