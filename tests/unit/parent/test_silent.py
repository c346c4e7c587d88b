"""Clients whose first octets the kernel does not count as such: they have not left."""

import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from integration.namespaces import ip, new_namespace, within

from titus_py.between.event_loop import EventLoop
from titus_py.parent.arrival import Arrival
from titus_py.parent.silent import Silent, has_spoken

#: In TCP's header.
SYN = 0x02
SYN_RECEIVED = 3


class Heard:
    """What ``Silent`` finds out about one client."""

    def __init__(self, accepted: socket.socket) -> None:
        self.found: list[str] = []
        self._loop = EventLoop()
        silent = Silent(
            self._loop,
            60,
            lambda _: self.found.append("spoke"),
            lambda _, end: self.found.append(end),
        )
        silent.add(Arrival(accepted, "192.0.2.9", 1, "192.0.2.1", 2, time.monotonic()))

    def wait(self, seconds: float = 10.0) -> list[str]:
        deadline = time.monotonic() + seconds
        while not self.found and time.monotonic() < deadline:
            self._loop.after(0.05, lambda: None)
            self._loop.run_once()
        return self.found


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's end and the server's."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as server,
    ):
        yield client, server


@pytest.mark.parametrize("urgent", [b"a", b"ab"])
def test_urgent_octets_are_octets(urgent: bytes) -> None:
    with connection() as (client, server):
        heard = Heard(server)
        client.send(urgent, socket.MSG_OOB)
        client.send(b"and more")
        assert heard.wait() == ["spoke"]


def test_who_has_really_left_has_left() -> None:
    for end in (lambda one: one.shutdown(socket.SHUT_WR), reset):
        with connection() as (client, server):
            heard = Heard(server)
            assert not heard.wait(0.1)
            end(client)
            assert heard.wait() == ["client_left"]


def reset(side: socket.socket) -> None:
    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    side.close()


def test_octets_within_the_syn_are_octets() -> None:
    """TCP Fast Open where sysctl turns it on for all: accepted before the handshake is done."""

    def there() -> list[str]:
        ip("link", "set", "lo", "up")
        # Where the client would be, nobody answers.
        ip("link", "add", "server", "type", "veth", "peer", "name", "client")
        ip("address", "add", "192.0.2.1/24", "dev", "server")
        for name in ("server", "client"):
            ip("link", "set", name, "up")
        subprocess.run(["sysctl", "--quiet", "net.ipv4.tcp_fastopen=0x602"], check=True)
        with (
            socket.create_server(("192.0.2.1", 4433)) as listener,
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as wire,
        ):
            listener.settimeout(10)
            wire.sendto(syn("192.0.2.9", "192.0.2.1", 4433, b"hello"), ("192.0.2.1", 0))
            accepted, _ = listener.accept()
            with accepted:
                state = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
                assert state[0] == SYN_RECEIVED
                arrival = Arrival(accepted, "192.0.2.9", 1, "192.0.2.1", 2, 0.0)
                assert not has_spoken(arrival), "the kernel does not count them yet"
                return Heard(accepted).wait()

    assert within(new_namespace(), there) == ["spoke"]


def syn(source: str, destination: str, port: int, octets: bytes) -> bytes:
    """An IPv4 packet (RFC 9293, RFC 7413) that opens a connection and has its first octets."""
    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    # A request for a cookie, and padding.
    options = bytes((34, 2, 1, 1))
    words = 5 + len(options) // 4
    header = struct.pack("!HHIIBBHHH", 50000, port, 7, 0, words << 4, SYN, 65535, 0, 0)
    segment = header + options + octets
    pseudo = ends + struct.pack("!xBH", socket.IPPROTO_TCP, len(segment))
    segment = segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]
    length = 20 + len(segment)
    # The kernel fills in its own checksum.
    return (
        struct.pack("!BBHHHBBH", 0x45, 0, length, 1, 0, 64, socket.IPPROTO_TCP, 0) + ends + segment
    )


def checksum(octets: bytes) -> int:
    octets += b"\0" * (len(octets) % 2)
    total = sum(struct.unpack(f"!{len(octets) // 2}H", octets))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
