"""Starting the process that connects to upstreams, and what keyd then knows of them.

Run by keyd before it reads a key and before it gives anything up. What is started has its own
memory (execve(2)), and of keyd's descriptors the one end of a socket.
"""

import json
import os
import socket
import subprocess
import sys
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from keyd.linux.process import signals_held_back
from keyd.linux.sealed import sealed_file
from keyd.powers import rehearse
from keyd.upstream.broker import Broker

__all__ = ["start_told"]


def start_told(told: dict[str, Any]) -> Broker:
    """Start what titus-py tells of: ``references`` of the keys, and ``paths`` of the upstreams.

    ``user`` and ``filter`` are the process's. Raises OSError.
    """
    # What judging requests takes is loaded now: in keyd's empty root, there is nothing to load.
    rehearse(ec.derive_private_key(1, ec.SECP256R1()))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = sealed_file("upstream-settings", json.dumps(told).encode())
    options = [f"--settings-fd={descriptor}", f"--keyd-fd={theirs.fileno()}"]
    try:
        with theirs, signals_held_back():
            # Not waited for: it ends with keyd.
            process = subprocess.Popen(
                [sys.executable, "-I", "-m", "keyd", "connect", *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                pass_fds=(descriptor, theirs.fileno()),
                start_new_session=True,
            )
    finally:
        os.close(descriptor)
    # Nobody waits for it, and Popen is not to say so.
    process.returncode = 0
    return Broker(ours, told["paths"], told["references"])
