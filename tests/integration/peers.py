"""Both sides of the proxy: a TLS client that shows every octet, and plaintext backends."""

import asyncio
import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from OpenSSL import SSL

from titus_py.worker.tls import set_groups

TIMEOUT = 60.0
RESET = struct.pack("ii", 1, 0)


class Truncated(Exception):
    """The connection ended (FIN) where TLS had not: no close_notify."""


class TlsClient:
    """A TLS client on a plain socket, with nothing hidden between the two.

    ``received`` is what came over the wire until the handshake ended, in one way or the
    other; ``octets_sent`` is how many went the other way. Without an ``authority`` the
    server may show any certificate. ``certificate`` is its own, with its key.
    """

    def __init__(
        self,
        port: int,
        server_name: str | None = "localhost",
        authority: Path | None = None,
        versions: tuple[int, int] = (SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION),
        ciphers: str | None = None,
        host: str = "127.0.0.1",
        source: socket.socket | None = None,
        receive_buffer: int | None = None,
        groups: Sequence[str] | None = None,
        protocols: Sequence[str] = (),
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(versions[0])
        context.set_max_proto_version(versions[1])
        if authority is not None:
            context.load_verify_locations(str(authority))
            context.set_verify(SSL.VERIFY_PEER)
        if ciphers is not None:
            context.set_cipher_list(ciphers.encode())
        if groups is not None:
            set_groups(context, groups)
        if protocols:
            context.set_alpn_protos([protocol.encode() for protocol in protocols])
        if certificate is not None:
            context.use_certificate_chain_file(str(certificate[0]))
            context.use_privatekey_file(str(certificate[1]))
        self.tls = SSL.Connection(context, None)
        self.tls.set_connect_state()
        if server_name is not None:
            self.tls.set_tlsext_host_name(server_name.encode())
        self.socket = source or connect(port, host, receive_buffer)
        name = self.socket.getsockname()
        #: As the log has an IPv4 client, also once its socket is closed.
        self.name = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else ""
        self.received = b""
        self.octets_sent = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()

    def first_flight(self) -> bytes:
        """The ClientHello, in its record, taken out: the caller is to send it."""
        with contextlib.suppress(SSL.WantReadError):
            self.tls.do_handshake()
        return self.tls.bio_read(65536)

    def handshake(self) -> Self:
        """To its end; raises SSL.Error, Truncated, ConnectionResetError."""
        while True:
            try:
                self.tls.do_handshake()
            except SSL.WantReadError:
                self._flush()
                self.received += self._take_in()
            else:
                self._flush()
                return self

    def send(self, octets: bytes) -> None:
        view = memoryview(octets)
        while view:
            sent = self.tls.send(view[:16384])
            view = view[sent:]
            self._flush()

    def receive(self, length: int = 65536) -> bytes:
        """What there is, after waiting for some; nothing means a close_notify came."""
        while True:
            try:
                return self.tls.recv(length)
            except SSL.WantReadError:
                self._flush()
                self._take_in()
            except SSL.ZeroReturnError:
                return b""

    def receive_exactly(self, length: int) -> bytes:
        octets = bytearray()
        while len(octets) < length:
            piece = self.receive(length - len(octets))
            assert piece, f"a close_notify after {len(octets)} of {length} octets"
            octets += piece
        return bytes(octets)

    def receive_all(self) -> bytes:
        """Everything up to the close_notify."""
        octets = bytearray()
        while piece := self.receive():
            octets += piece
        return bytes(octets)

    def close_notify(self) -> None:
        """Say that no more will be sent; what comes can still be read."""
        self.tls.shutdown()
        self._flush()

    def reset(self) -> None:
        reset(self.socket)

    def _flush(self) -> None:
        with contextlib.suppress(SSL.WantReadError):
            while True:
                octets = self.tls.bio_read(65536)
                self.socket.sendall(octets)
                self.octets_sent += len(octets)

    def _take_in(self) -> bytes:
        octets = self.socket.recv(65536)
        if not octets:
            raise Truncated
        self.tls.bio_write(octets)
        return octets


#: When the last client with this name in the log connected to this port, as ``time.time()`` has it:
#: ports come round again, and what the log has of the one before is not about this one. To another
#: port, a client may have the same name at the same time.
connected_at: dict[tuple[str, int], float] = {}


def connect(
    port: int, host: str = "127.0.0.1", receive_buffer: int | None = None, source: str = ""
) -> socket.socket:
    """``source``: from this address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(TIMEOUT)
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    if source:
        client.bind((source, 0))
    now = time.time()
    client.connect((host, port))
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    here, number = client.getsockname()[:2]
    name = f"[{here}]:{number}" if ":" in here else f"{here}:{number}"
    connected_at[name, port] = now
    return client


def unaccepted(port: int) -> int:
    """How many who have connected to this port of IPv4 wait for an accept(2) (proc_net(5))."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues, *_ = line.split()
        if state == "0A" and int(local.rpartition(":")[2], 16) == port:
            return int(queues.partition(":")[2], 16)
    raise AssertionError(f"nobody listens on port {port}")


def reset(side: socket.socket) -> None:
    """Close with an RST."""
    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    side.close()


def lingering() -> tuple[socket.socket, socket.socket]:
    """A TCP socket whose last holder waits for ten minutes in closing it, and its peer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        side = socket.create_connection(listener.getsockname())
        peer = listener.accept()[0]
    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 600))
    side.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            side.send(bytes(1 << 20))
    return side, peer


def end_the_wait(peer: socket.socket) -> None:
    """Of whoever closes it: by a reset."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()


@contextlib.contextmanager
def nobody_waits_for(peer: socket.socket) -> Iterator[None]:
    """Fail if somebody here waits meanwhile in closing the other end, which is a lingering one."""
    done, waited = threading.Event(), threading.Event()

    def wait_no_longer() -> None:
        if not done.wait(TIMEOUT / 2):
            waited.set()
            end_the_wait(peer)

    guard = threading.Thread(target=wait_no_longer)
    guard.start()
    try:
        yield
    finally:
        done.set()
        guard.join()
    assert not waited.is_set(), "whoever closed it waited"


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """The address of a port that nothing listens on, and that nobody else gets meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def receive_all(side: socket.socket) -> bytes:
    """Everything up to the FIN; raises ConnectionResetError at an RST."""
    octets = bytearray()
    while piece := side.recv(65536):
        octets += piece
    return bytes(octets)


def receive_exactly(side: socket.socket, length: int) -> bytes:
    octets = bytearray()
    while len(octets) < length:
        piece = side.recv(length - len(octets))
        assert piece, f"a FIN after {len(octets)} of {length} octets"
        octets += piece
    return bytes(octets)


def was_reset(side: socket.socket) -> bool:
    """Whether the other side ends this with an RST, and not with a FIN."""
    try:
        receive_all(side)
    except ConnectionResetError:
        return True
    return False


def resets(port: int, octets: bytes = b"") -> bool:
    """Whether a connection to this port ends with an RST, though nobody reads what it says.

    The RST may come before connect(2) has returned.
    """
    try:
        with connect(port) as client:
            client.sendall(octets)
            return was_reset(client)
    except (ConnectionResetError, BrokenPipeError):
        return True


def alert_in(octets: bytes) -> int | None:
    """The description in the fatal alert (RFC 8446 §6) that these plain records hold."""
    while len(octets) >= 5:
        length = int.from_bytes(octets[3:5], "big")
        if octets[0] == 21 and length == 2 and octets[5:6] == b"\2":
            return octets[6]
        octets = octets[5 + length :]
    return None


class Listener:
    """A backend in the test's own hands: it accepts when the test says so."""

    def __init__(self, listener: socket.socket, address: str) -> None:
        self.socket = listener
        self.address = address
        self.socket.settimeout(TIMEOUT)

    @classmethod
    def tcp(cls, host: str = "127.0.0.1", backlog: int = 128, port: int = 0) -> "Listener":
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=backlog)
        port = listener.getsockname()[1]
        return cls(listener, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    @classmethod
    def unix(cls, path: Path, backlog: int = 128) -> "Listener":
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(backlog)
        return cls(listener, f"unix:{path}")

    @property
    def port(self) -> int:
        port: int = self.socket.getsockname()[1]
        return port

    def accept(self) -> socket.socket:
        connection, _ = self.socket.accept()
        connection.settimeout(TIMEOUT)
        return connection

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()


@contextlib.contextmanager
def served_by(listener: Listener, handle: Callable[[socket.socket], None]) -> Iterator[Listener]:
    """Let a function have each connection that comes to this backend, in threads."""

    def serve_one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            handle(connection)

    def serve() -> None:
        while True:
            try:
                connection = listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL):
                    return
                raise
            threading.Thread(target=serve_one, args=[connection], daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener
    finally:
        # Wakes the accept, which close() would not.
        with contextlib.suppress(OSError):
            listener.socket.shutdown(socket.SHUT_RDWR)
        thread.join(TIMEOUT)


def echo(connection: socket.socket) -> None:
    """However long its client is silent: between two words, a test may wait for a busy machine."""
    connection.settimeout(None)
    while octets := connection.recv(65536):
        connection.sendall(octets)


@contextlib.contextmanager
def echo_for_many() -> Iterator[str]:
    """An echo for hundreds of connections at once, in one thread; yields its address."""
    loop = asyncio.new_event_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while octets := await reader.read(65536):
                writer.write(octets)
                await writer.drain()
        writer.close()

    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server = loop.run_until_complete(asyncio.start_server(serve, sock=listener))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:

        def stop() -> None:
            server.close()
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.call_soon(loop.stop)

        loop.call_soon_threadsafe(stop)
        thread.join(TIMEOUT)
        loop.close()
