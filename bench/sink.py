"""A backend for uploads: reads a request's body to its end, and answers how long it was.

    python -m bench.sink PORT

nginx answers an upload before it has all of it; what is measured has to have arrived. A thread
for each connection, large reads: as cheap as receiving is.
"""

import socket
import sys
import threading

__all__ = ["COMMAND"]

COMMAND = (sys.executable, "-m", "bench.sink")
_PIECE_OCTETS = 1 << 18


def _swallow(connection: socket.socket) -> None:
    with connection:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(_PIECE_OCTETS)
            if not piece:
                return
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        received = len(body)
        buffer = bytearray(_PIECE_OCTETS)
        while received < length:
            count = connection.recv_into(buffer)
            if not count:
                return
            received += count
        answer = str(received).encode()
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
            % (len(answer), answer)
        )


def main() -> None:
    with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_swallow, args=[connection], daemon=True).start()


if __name__ == "__main__":
    main()
