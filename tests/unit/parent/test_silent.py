"""When a client has said enough, however its octets come; and who has left."""

import fcntl
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from integration.hellos import client_hello, records
from integration.namespaces import ip, new_namespace, within
from integration.watches import without_watches

from titus_py.between.event_loop import EventLoop
from titus_py.between.postgresql import SSL_REQUEST
from titus_py.parent import first_flight, silent
from titus_py.parent.arrival import Arrival
from titus_py.parent.first_flight import FirstFlight
from titus_py.parent.silent import Silent
from titus_py.parent.starttls import look_before_tls

#: In TCP's header.
SYN = 0x02
SYN_RECEIVED = 3


class Heard:
    """What ``Silent`` finds out about one client."""

    def __init__(
        self,
        accepted: socket.socket,
        proxy_timeout: int = 0,
        starttls: bool = False,
        loop: EventLoop | None = None,
    ) -> None:
        self.found: list[str] = []
        self.client_hello = b""
        self._loop = loop or EventLoop()
        self._silent = Silent(
            self._loop,
            60,
            self._spoke,
            lambda _, end: self.found.append(end),
            look_before_tls if starttls else None,
        )
        accepted.setblocking(False)
        arrival = Arrival(accepted, "192.0.2.9", 1, "192.0.2.1", 2, time.monotonic(), proxy_timeout)
        self._silent.add(arrival._replace(starttls=starttls))

    def _spoke(self, arrival: Arrival) -> None:
        self.found.append("spoke")
        self.client_hello = arrival.client_hello

    @property
    def waits(self) -> bool:
        """Whether the client is still waited for, after a turn of the loop."""
        self.turn(0.02)
        return bool(len(self._silent))

    def turn(self, seconds: float = 0.0) -> None:
        self._loop.after(seconds, lambda: None)
        self._loop.run_once()

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


@contextmanager
def on_unix() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The same on a unix socket."""
    client, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with client, server:
        yield client, server


@pytest.mark.parametrize("urgent", [b"a", b"ab"])
def test_urgent_octets_are_octets(urgent: bytes) -> None:
    with connection() as (client, server):
        heard = Heard(server)
        client.send(urgent, socket.MSG_OOB)
        client.send(b"and more")
        assert heard.wait() == ["spoke"]


HELLO = client_hello()
LINE = b"PROXY TCP4 192.0.2.1 203.0.113.2 56324 443\r\n"
Connection = Callable[[], AbstractContextManager[tuple[socket.socket, socket.socket]]]


@pytest.mark.parametrize("pieces", [1, 2, 7, len(HELLO) + 5])
@pytest.mark.parametrize("size", [16384, 40])
def test_a_whole_client_hello_is_waited_for(pieces: int, size: int) -> None:
    octets = records(HELLO, size)
    step = -(-len(octets) // pieces)
    with connection() as (client, server):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        heard = Heard(server)
        for at in range(0, len(octets), step):
            assert heard.waits
            client.sendall(octets[at : at + step])
        assert heard.wait() == ["spoke"]
        assert heard.client_hello == HELLO
        # It is all still there, and whoever reads it is woken for each octet.
        assert server.recv(1000) == octets
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1


@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_one_on_a_unix_socket_is_looked_at_for_each_piece(pieces: int) -> None:
    """A load balancer's header may be there long before its client says something."""
    octets = LINE + records(HELLO)
    step = -(-len(octets) // pieces)
    with on_unix() as (client, server):
        heard = Heard(server, proxy_timeout=60_000)
        for at in range(0, len(octets), step):
            for _ in range(20):
                heard.turn()
            assert not heard.found
            client.sendall(octets[at : at + step])
        # At once, and not after a pause for one that has woken the loop too often.
        heard.turn()
        assert heard.found == ["spoke"]
        assert heard.client_hello == HELLO
        assert server.recv(1000) == octets


@pytest.mark.parametrize("connection", [connection, on_unix])
def test_one_that_is_larger_than_a_receive_buffer(connection: Connection) -> None:
    message = b"\1" + (131_396).to_bytes(3, "big") + bytes(131_396)
    header = b"\r\n\r\n\0\r\nQUIT\n\x20\0" + (65_535).to_bytes(2, "big") + bytes(65_535)
    with connection() as (client, server):
        heard = Heard(server, proxy_timeout=60_000)
        octets = header + records(message)
        sender = threading.Thread(target=client.sendall, args=(octets,))
        sender.start()
        assert heard.wait(30) == ["spoke"]
        sender.join()
        assert heard.client_hello == message


def test_who_leaves_within_it_is_for_a_worker_and_has_said_nothing() -> None:
    with connection() as (client, server):
        heard = Heard(server)
        client.sendall(records(HELLO)[:-1])
        assert heard.waits
        client.shutdown(socket.SHUT_WR)
        assert heard.wait() == ["spoke"]
        assert not heard.client_hello


def test_one_in_hundreds_of_records_wakes_nobody_hundreds_of_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is looked at from its beginning each time."""
    looks: list[int] = []

    def counted(octets: bytes, header: bool) -> FirstFlight:
        looks.append(len(octets))
        return first_flight.look(octets, header)

    monkeypatch.setattr(silent, "look", counted)
    message = client_hello(more=[(1000, bytes(400))])
    with connection() as (client, server):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        heard = Heard(server)
        for octet in message:
            client.sendall(records(bytes((octet,))))
            heard.turn()
        assert heard.wait() == ["spoke"]
        assert heard.client_hello == message
    assert len(looks) < 30


def test_one_that_cannot_be_watched_is_looked_at_again() -> None:
    """For want of a watch: that is no reason for the parent to end."""
    with connection() as (client, accepted):
        loop = EventLoop()
        heard = without_watches(lambda: Heard(accepted, loop=loop), loop._epoll)
        assert heard.waits
        client.sendall(records(HELLO))
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
                unread = fcntl.ioctl(accepted, termios.FIONREAD, bytes(4))
                assert not any(unread), "the kernel does not count them yet"
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


def test_nothing_is_taken_out_of_a_unix_socket() -> None:
    """What may come with it could make the parent wait, whatever the configuration says."""
    with on_unix() as (client, server):
        client.sendall(SSL_REQUEST)
        assert Heard(server, starttls=True).wait() == ["spoke"]
        assert server.recv(100) == SSL_REQUEST
    with connection() as (client, server):
        client.sendall(SSL_REQUEST)
        assert Heard(server, starttls=True).waits
        assert client.recv(100) == b"S"
