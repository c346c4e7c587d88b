"""The attempts, unconfined: run as a program by the tests, it prints the outcomes."""

import ctypes
import json
import mmap
import os
import socket
import sys

from .attacks import ATTEMPTS, Attempt, Place, outcome

__all__ = ["main"]


def main(resetting: int) -> None:
    """Parameters for each come as JSON, outcomes leave as JSON."""
    parameters = json.load(sys.stdin)
    outcomes = [
        _unconfined(attempt, resetting, numbers)
        for attempt, numbers in zip(ATTEMPTS, parameters, strict=True)
    ]
    print(json.dumps(outcomes))


def _unconfined(attempt: Attempt, resetting: int, parameters: list[int]) -> str:
    """In a child of its own, which may end as another program."""
    output, its_output = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(its_output, 1)
        os.close(output)
        os.close(its_output)
        os.write(1, outcome(attempt.code, _place(resetting), parameters).encode())
        os._exit(0)
    os.close(its_output)
    with open(output) as said:
        text = said.read()
    os.waitpid(pid, 0)
    return text


def _place(resetting: int) -> Place:
    """What a worker holds is stood in for: pairs of sockets, a client, a backend."""
    parent, keyd = (socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    client.setblocking(False)
    # As by a non-blocking connect(2) that nobody asked about again.
    backend = socket.socket()
    backend.setblocking(False)
    backend.connect_ex(("127.0.0.1", resetting))
    # As the parent sends a backend.
    socket.send_fds(parent[1], [b"B"], [backend.fileno()])
    # Of which there is more than is mapped, and which nothing keeps from growing.
    file = os.memfd_create("report")
    os.ftruncate(file, 2 * mmap.PAGESIZE)
    report = mmap.mmap(file, mmap.PAGESIZE)
    kept.extend([*parent, *keyd, server, client, backend, report])
    return Place(
        parent[0].fileno(),
        keyd[0].fileno(),
        client.fileno(),
        backend.fileno(),
        ctypes.addressof(ctypes.c_char.from_buffer(report)),
    )


kept: list[object] = []
