"""Backends: one says much and hears nothing; one says nothing, and hears all."""

import queue
import random
import socket

from integration.peers import receive_all

__all__ = ["FLOOD", "HEARD", "end_first", "flood"]

#: Twice what a socket holds that has not been told otherwise (tcp(7), tcp_wmem).
FLOOD = random.Random(1).randbytes(8 << 20)
#: What each client said to ``end_first``.
HEARD: queue.SimpleQueue[bytes] = queue.SimpleQueue()


def flood(connection: socket.socket) -> None:
    connection.sendall(FLOOD)
    while connection.recv(65536):
        pass


def end_first(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)
    HEARD.put(receive_all(connection))
