"""A worker's life: wait, shake hands, pump, leave.

Forked by the fork server, one for each connection. A worker starts as root, with what
the fork server holds. It is confined before it runs any of this. Then it hears one
client and one backend, both hostile. It trusts the parent and keyd. Whatever a worker
does to itself, only its own connection is affected.
"""

import os
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from socket import SocketType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from OpenSSL import SSL
from OpenSSL._util import lib

from keyd.linux.process import make
from titus_py.between import messages
from titus_py.between.hand_over import KEYD_FD, PARENT_FD, take
from titus_py.between.messages import Client, Dial, Proxied, Ready, TlsFacts, Tunnel
from titus_py.between.report import End, ReportWriter, State
from titus_py.between.virtual_host import select as select_virtual_host
from titus_py.worker import transcript
from titus_py.worker.client_hello import (
    Alert,
    ClientHello,
    ClientHelloReader,
    InvalidClientHello,
    fatal_alert,
    offered_protocols,
)
from titus_py.worker.ends import describe
from titus_py.worker.farewell import part
from titus_py.worker.pump import Pump
from titus_py.worker.tls import group_name, reseed

if TYPE_CHECKING:
    from titus_py.between.certificate_index import CertificateIndex
    from titus_py.worker.client_certificate import Verifier
    from titus_py.worker.proxy_header import ProxyHeaderReader
    from titus_py.worker.tunnel import Conduit

__all__ = ["Site", "Terms", "live", "serve_next", "touch"]

#: After how many ms of waiting a spare is expected to wait for longer.
_IDLE_MS = 250
#: How many octets of a load balancer's header are looked at, at once: most have no more.
_HEADER_OCTETS = 536
#: How many octets of a ClientHello are read at once.
_PIECE_OCTETS = 64 * 1024
#: A tunnel's client and server.
_SOCKETS_OF_A_TUNNEL = 2
_HTTP_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"This port speaks HTTPS, not HTTP.\r\n"
)


class Site(NamedTuple):
    """A virtual host, as far as a worker knows it."""

    server_names: tuple[str, ...] | None
    context: SSL.Context
    #: Whether a TLS stream that ends without close_notify is a reset to the backend.
    truncated_is_reset: bool
    #: Whether the backend is told the TLS version, the cipher suite and the server name.
    passes_tls_facts: bool = False
    #: Application protocols, best first, and whether a client has to negotiate one.
    alpn: tuple[bytes, ...] = ()
    alpn_required: bool = False
    #: What is asked of client certificates; None: they are not asked for.
    verifier: "Verifier | None" = None
    #: Its certificates and their names, instead of ``server_names``; the context then has none.
    certificate_index: "CertificateIndex | None" = None

    def names_for(self, server_name: str | None) -> tuple[str, ...] | None:
        """The patterns to match a client's server name with."""
        if self.certificate_index is None:
            return self.server_names
        if server_name is None or self.certificate_index.find(server_name) is None:
            return ()
        return (server_name.removesuffix("."),)


class Terms(NamedTuple):
    """What all workers inherit. Times are in seconds."""

    handshake_timeout: float
    idle_timeout: float | None
    half_closed_timeout: float
    sites: Sequence[Site]
    #: System calls (``confinement.parting_calls``), encoded.
    parting: bytes
    report: ReportWriter
    #: A ClientHello, for touching the memory that a handshake will write to.
    hello: bytes
    #: A context for the same purpose; None: that of the first virtual host.
    practice: SSL.Context | None = None
    #: Where load balancers connect.
    proxy_header_reader: "Callable[[], ProxyHeaderReader] | None" = None
    #: One for each tunnel.
    conduits: "Sequence[Conduit]" = ()


class _Over(Exception):
    """The connection ends here, for this reason.

    ``farewell`` is what to send before a clean close, in addition to an alert that OpenSSL
    may have sent. If it is None, the connection is reset.
    """

    def __init__(self, end: End, detail: str = "", farewell: bytes | None = None) -> None:
        super().__init__(end, detail)
        self.end = end
        self.detail = detail
        self.farewell = farewell


def live(terms: Terms, failed: str) -> NoReturn:
    """Everything a worker does once it is confined; ends the process, whatever happens.

    ``failed`` is why it could not be confined; empty if it is.
    """
    code = 70  # EX_SOFTWARE (sysexits.h), unless it comes to a good end
    report = terms.report
    try:
        if failed:
            raise OSError(f"not confined: {failed}")
        reseed()
        parent = SocketType(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, PARENT_FD)
        report.set(state=State.WAITING)
        if _wanted(parent):
            # Made before a client waits for it, and kept: to unmap its memory would take longer
            # than to end with it.
            pump = Pump(terms.idle_timeout, terms.half_closed_timeout)
            serve_next(terms, parent, pump)
        code = 0
    finally:
        try:
            error = sys.exception()
            if error is not None:
                report.set(state=State.ENDED, end=End.WORKER_FAILED, detail=_where(error))
        finally:
            # Also without memory to say why: an interpreter that shuts down makes calls for which
            # the filter would kill this process.
            os._exit(code)


def _wanted(parent: SocketType) -> bool:
    """Tell the parent that this worker can take a client; returns whether it heard that.

    It may have ended, or have hung up on a worker that it cannot watch.
    """
    try:
        parent.send(Ready().encode())
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def serve_next(terms: Terms, parent: SocketType, pump: Pump) -> tuple[End, str] | None:
    """Wait for a client and serve it; returns how it ended, None if there was none."""
    assigned = _wait_for_client(terms, parent, pump)
    if assigned is None:
        return None
    message, sockets = assigned
    if message[:1] == messages.TUNNEL:
        tunnel = Tunnel.decode(message)
        conduit = terms.conduits[tunnel.number]
        end, detail = conduit.serve(terms, pump, parent, tunnel.keyed, *sockets)
    else:
        end, detail = _serve(terms, pump, parent, Client.decode(message), *sockets)
    terms.report.set(state=State.ENDED, end=end, detail=detail)
    return end, detail


def touch(terms: Terms, parent: SocketType, pump: Pump) -> None:
    """Write, while no client waits, to the pages that a handshake will write to.

    A page is copied when this process first writes to it, and one of a program's is mapped when it
    is first run. No client has to wait for that now.
    """
    if not terms.sites:
        terms.conduits[0].touch()
        return
    # What comes before a handshake and after it, as far as it needs nobody else.
    _stream(parent.fileno()).detach()
    with suppress(BlockingIOError):
        parent.recv(_PIECE_OCTETS, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    terms.report.set(server_name="")
    hello = ClientHelloReader().feed(terms.hello)
    if hello is not None:
        with suppress(_Over):
            _choose_site(terms, Client.decode(Client((0,)).encode()), hello)
    index = terms.sites[0].certificate_index
    if terms.practice is not None and index is not None and index.count:
        from titus_py.worker.indexed import show

        show(terms.practice, index, 0)
    connection = SSL.Connection(terms.practice or terms.sites[0].context)
    connection.set_accept_state()
    connection.bio_write(terms.hello)
    # The handshake fails at the signature: this worker has no channel to keyd yet.
    with suppress(SSL.Error):
        connection.do_handshake()
    connection.get_protocol_version_name()
    connection.get_cipher_name()
    group_name(connection)
    Dial(0, None).encode()
    pump.begin(connection, parent, (terms.report.from_client, terms.report.to_client), False)
    pump.touch(parent)


def _wait_for_client(
    terms: Terms, parent: SocketType, pump: Pump
) -> tuple[bytes, list[SocketType]] | None:
    """Be a spare until a client comes; returns the message, and the sockets that are to be served.

    Returns None if the parent hangs up instead.
    """
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    # A spare that is needed at once has no time for this, and others need the processor more.
    if not poll.poll(_IDLE_MS):
        touch(terms, parent, pump)
    message, descriptors = take(parent, messages.MAX_CLIENT_OCTETS, _SOCKETS_OF_A_TUNNEL)
    if not message:
        return None
    count = _SOCKETS_OF_A_TUNNEL if message[:1] == messages.TUNNEL else 1
    # The provider looks for keyd at a fixed descriptor number.
    if len(descriptors) > count:
        if descriptors[0] != KEYD_FD:
            raise RuntimeError(f"keyd's channel came as descriptor {descriptors[0]}")
        transcript.begin()
    return message, [_stream(one) for one in descriptors[-count:]]


def _stream(descriptor: int) -> SocketType:
    """A stream socket, by IP or not: what is left unsaid, the kernel is asked for."""
    return SocketType(type=socket.SOCK_STREAM, proto=0, fileno=descriptor)


def _serve(
    terms: Terms, pump: Pump, parent: SocketType, client: Client, peer: SocketType
) -> tuple[End, str]:
    """Serve one connection; returns how it ended and a detail for the record.

    ``peer`` does not block: the parent has made it so.
    """
    deadline = time.monotonic() + terms.handshake_timeout
    report = terms.report
    report.set(state=State.HANDSHAKE)
    try:
        if client.proxy_timeout and terms.proxy_header_reader is not None:
            reader = terms.proxy_header_reader()
            _read_proxy_header(peer, reader, client.proxy_timeout / 1000)
            # Said before anything is read that the client sent, and so could have forged.
            parent.send(Proxied(reader.ends).encode())
        hello, taken = _read_client_hello(peer, deadline)
        server_name = hello.server_name or ""
        report.set(server_name=server_name)
        vhost = _choose_site(terms, client, hello)
        site = terms.sites[vhost]
        if site.alpn:
            _require_protocol(site, hello)
        if site.certificate_index is not None:
            _show(site.context, site.certificate_index, hello.server_name)
        del hello  # its memory is the handshake's
        if site.verifier is not None:
            site.verifier.begin(report)
        connection = _begin(site.context, peer, taken)
        _shake_hands(connection, peer, deadline, site.verifier)
        _acknowledge(peer)
        version = connection.get_protocol_version_name()
        cipher_suite = connection.get_cipher_name() or ""
        report.set(
            state=State.ESTABLISHED,
            tls_version=version,
            cipher_suite=cipher_suite,
            group=group_name(connection) or "",
        )
        protocol = connection.get_alpn_proto_negotiated() if site.alpn else b""
        if site.alpn_required and not protocol:
            # It offered one in its first ClientHello, and none after a HelloRetryRequest.
            reason = "the client offers none in its second ClientHello"
            raise _Over(End.NO_APPLICATION_PROTOCOL, reason, b"")
        identity = site.verifier.identity(connection) if site.verifier is not None else None
        if identity is not None:
            parent.send(identity.encode())
        # The parent connects to the backend. Meanwhile, end the channel to keyd, and prepare.
        facts = None
        if site.passes_tls_facts:
            facts = TlsFacts(version, cipher_suite, server_name)
        number = site.alpn.index(protocol) if protocol else None
        parent.send(Dial(vhost, number, facts).encode())
        make(terms.parting)
        counts = report.from_client, report.to_client
        pump.begin(connection, peer, counts, site.truncated_is_reset)
        backend = _take_backend(parent)
    except _Over as over:
        if over.farewell is not None:
            part(peer, over.farewell)
        return over.end, over.detail
    return pump.run(backend)


def _read_proxy_header(peer: SocketType, reader: "ProxyHeaderReader", seconds: float) -> None:
    """A load balancer's header, taken out of the socket to its last octet and no further."""
    deadline = time.monotonic() + seconds
    try:
        while not reader.done:
            _await(peer, select.POLLIN, deadline, End.PROXY_TIMEOUT)
            with suppress(BlockingIOError):
                piece = peer.recv(_HEADER_OCTETS, socket.MSG_PEEK)
                if not piece:
                    raise _Over(End.CLIENT_LEFT, "before the PROXY header")
                peer.recv(reader.feed(piece))
    except OSError as error:
        raise _Over(End.CLIENT_LEFT, error.strerror or "") from None
    except ValueError as error:
        raise _Over(End.BAD_PROXY_HEADER, str(error)) from None


def _read_client_hello(peer: SocketType, deadline: float) -> tuple[ClientHello, bytes]:
    """The client's first message, and the octets of it that are no longer in the socket.

    Most messages come in one piece, which is left in the socket. If there are several, each
    but the last is taken out: the message may be longer than the receive buffer.
    """
    reader = ClientHelloReader()
    taken = bytearray()
    while True:
        try:
            piece = peer.recv(_PIECE_OCTETS, socket.MSG_PEEK)
            if not piece:
                raise _Over(End.CLIENT_LEFT, f"after {len(taken)} octets")
            hello = reader.feed(piece)
            if hello is not None:
                return hello, bytes(taken)
            taken += peer.recv(len(piece))
        except BlockingIOError:
            pass
        except OSError as error:
            raise _Over(End.CLIENT_LEFT, error.strerror or "") from None
        except InvalidClientHello as error:
            if error.http:
                raise _Over(End.PLAIN_HTTP, str(error), _HTTP_ANSWER) from None
            end = End.NOT_TLS if error.alert == Alert.UNEXPECTED_MESSAGE else End.BAD_CLIENT_HELLO
            raise _Over(end, str(error), fatal_alert(error.alert)) from None
        _await(peer, select.POLLIN, deadline)


def _choose_site(terms: Terms, client: Client, hello: ClientHello) -> int:
    """The virtual host's number, by the name in the client's first message."""
    allowed = [terms.sites[vhost].names_for(hello.server_name) for vhost in client.vhosts]
    chosen = select_virtual_host(allowed, hello.server_name)
    if chosen is not None:
        return client.vhosts[chosen]
    if hello.server_name is None:
        # RFC 8446 §9.2
        raise _Over(End.NO_VIRTUAL_HOST, "no name", fatal_alert(Alert.MISSING_EXTENSION))
    # RFC 6066 §3
    raise _Over(End.NO_VIRTUAL_HOST, hello.server_name, fatal_alert(Alert.UNRECOGNIZED_NAME))


def _require_protocol(site: Site, hello: ClientHello) -> None:
    """End it here if the client offers only protocols that the virtual host does not have.

    Also if it offers none at all, where one is required.
    """
    try:
        offered = offered_protocols(hello)
    except InvalidClientHello as error:
        raise _Over(End.BAD_CLIENT_HELLO, str(error), fatal_alert(error.alert)) from None
    if offered is None and not site.alpn_required:
        return
    if offered is None or set(site.alpn).isdisjoint(offered):
        names = [name.decode("ascii", "backslashreplace") for name in offered or ()]
        raise _Over(
            End.NO_APPLICATION_PROTOCOL,
            f"the client offers {', '.join(names) or 'none'}",
            fatal_alert(Alert.NO_APPLICATION_PROTOCOL),
        )


def _show(context: SSL.Context, index: "CertificateIndex", server_name: str | None) -> None:
    """Give the context the certificate for this name, for this one connection."""
    # The fork server has imported it.
    from titus_py.worker.indexed import show

    number = index.find(server_name)
    if number is not None:
        show(context, index, number)


def _begin(context: SSL.Context, peer: SocketType, taken: bytes) -> SSL.Connection:
    """Start OpenSSL's side. It reads the octets in ``taken`` first, and then the socket."""
    if not taken:
        # pyOpenSSL asks the socket for its descriptor, and for nothing else.
        connection = SSL.Connection(context, peer)  # type: ignore[arg-type]
        connection.set_accept_state()
        return connection
    connection = SSL.Connection(context)
    connection.set_accept_state()
    connection.bio_write(taken)
    try:
        connection.do_handshake()
    except SSL.WantReadError:
        # OpenSSL has read all of ``taken``: go on with the socket. pyOpenSSL has no method for it.
        lib.SSL_set_fd(connection._ssl, peer.fileno())
    except SSL.Error as error:
        raise _Over(End.HANDSHAKE_FAILED, describe(error)) from None
    return connection


def _shake_hands(
    connection: SSL.Connection,
    peer: SocketType,
    deadline: float,
    verifier: "Verifier | None",
) -> None:
    while True:
        try:
            connection.do_handshake()
            return
        except SSL.WantReadError:
            _await(peer, select.POLLIN, deadline)
        except SSL.WantWriteError:
            _await(peer, select.POLLOUT, deadline)
        except SSL.ZeroReturnError:
            raise _Over(End.CLIENT_LEFT, "within the handshake") from None
        except SSL.SysCallError as error:
            reason = "" if error.args[0] == -1 else str(error.args[1])
            raise _Over(End.CLIENT_LEFT, f"within the handshake {reason}".strip()) from None
        except SSL.Error as error:
            reason = describe(error)
            refusal = verifier.refusal(reason) if verifier is not None else None
            if refusal is not None:
                raise _Over(End.CLIENT_CERTIFICATE, refusal, b"") from None
            raise _Over(End.HANDSHAKE_FAILED, reason, b"") from None


def _acknowledge(peer: SocketType) -> None:
    """Acknowledge at once what the client sent, not along with what is sent to it next.

    The next octets to the client may be the answer to a request. A client whose TCP holds small
    segments back until others are acknowledged (RFC 9293 §3.7.4) would hold back that request,
    for the 40 ms by which our kernel delays the acknowledgement.
    """
    # The rehearsal's sockets are not TCP.
    with suppress(OSError):
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _await(
    peer: SocketType, events: int, deadline: float, end: End = End.HANDSHAKE_TIMEOUT
) -> None:
    poll = select.poll()
    poll.register(peer, events)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise _Over(end)


def _take_backend(parent: SocketType) -> SocketType:
    """The backend's socket, which the parent has connected."""
    answer, descriptors = take(parent, messages.MAX_BACKEND_OCTETS, 1)
    while answer[:1] == messages.CHANNEL:
        # Nobody waited for it. The handshake is done, and there is to be no way to keyd.
        for descriptor in descriptors:
            os.close(descriptor)
        answer, descriptors = take(parent, messages.MAX_BACKEND_OCTETS, 1)
    if answer[:1] != messages.BACKEND:
        raise _Over(End.BACKEND_UNAVAILABLE, answer[1:].decode(errors="replace"))
    return _stream(descriptors[0])


def _where(error: BaseException) -> str:
    """An unforeseen exception and its innermost frame: a worker cannot print a traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else "?"
    return f"{type(error).__name__}: {error} at {place}"
