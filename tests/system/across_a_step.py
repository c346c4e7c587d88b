"""Clients of titus-py while the clock is stepped: run on the machine, as root.

``across_a_step.py OFFSET_FILE SECONDS TIMEOUT``: the clock's new distance from the real one, and
what the configuration has for ``worker.handshake_timeout`` and ``limits.idle_timeout``.
"""

import socket
import ssl
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path


class Client:
    """``handshakes`` when told to, then sends a request when told to."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.socket = socket.create_connection(("127.0.0.1", 443), 60)

    def handshakes(self) -> "Client":
        context = ssl.create_default_context(cafile="/etc/titus-py/www.crt")
        self.socket = context.wrap_socket(self.socket, server_hostname="www.example.org")
        return self

    def requests(self) -> None:
        self.socket.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: self.socket.recv(65536), b""))
        assert answer.endswith(b"It works.\n"), answer

    def is_ended_after(self) -> float:
        """How long it lived, which does nothing."""
        with suppress(ConnectionResetError, ssl.SSLError):
            assert not self.socket.recv(1)
        return time.monotonic() - self.begun


def main(offset: Path, seconds: int, timeout: float) -> None:
    quiet, idle = Client(), Client().handshakes()
    slow, late = Client(), Client().handshakes()
    time.sleep(timeout / 8)
    before = time.time()
    with offset.open("r+b") as file:
        file.write(struct.pack("=q", seconds))
    print(f"the clock went from {before:.0f} to {time.time():.0f}")
    time.sleep(timeout / 8)
    slow.handshakes().requests()
    late.requests()
    Client().handshakes().requests()
    for client, what in ((quiet, "handshake"), (idle, "octets")):
        lived = client.is_ended_after()
        print(f"who sent no {what} was ended after {lived:.1f} s")
        # Not a day later; on a busy machine, this is looked at a little later.
        assert timeout - 0.5 < lived < timeout + 60


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
