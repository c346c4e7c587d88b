"""A backend that says much and hears nothing."""

import random
import socket

__all__ = ["FLOOD", "flood"]

#: Twice what a socket holds that has not been told otherwise (tcp(7), tcp_wmem).
FLOOD = random.Random(1).randbytes(8 << 20)


def flood(connection: socket.socket) -> None:
    connection.sendall(FLOOD)
    while connection.recv(65536):
        pass
