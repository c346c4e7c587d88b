"""A few connections for practice, before the first worker is forked.

Run by the fork server, as root, before it confines itself. Python adapts its code as it runs
(PEP 659), and caches what it looks up. OpenSSL fetches algorithms when they are first used.
Every worker inherits what has been done before the fork. The rest each worker would do for
itself, in copies of the pages. A child process plays everything outside of the worker. Nothing
here is secret: the cipher suite needs no certificate.
"""

import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from OpenSSL import SSL

from keyd.linux import prctl
from keyd.linux.calls import call, memory
from keyd.linux.memory import map_private
from titus_py.between import messages
from titus_py.between.hand_over import give
from titus_py.between.messages import Client
from titus_py.between.report import End, ReportWriter
from titus_py.worker.life import Site, Terms, serve_next, touch
from titus_py.worker.pump import ROOM_OCTETS, Pump
from titus_py.worker.tls import negotiate_protocol, reseed

__all__ = ["CONNECTIONS", "FEW", "MESSAGE_OCTETS", "for_practice", "practise", "rehearse"]

#: Python begins to adapt a function after eight runs.
CONNECTIONS = 12
#: So many are enough to see which functions they call.
FEW = 4
_SERVER_NAME = "localhost"
MESSAGE_OCTETS = 1024
#: How long a step may take. All of practice takes milliseconds.
_PATIENCE_SECONDS = 10


def rehearse(terms: Terms, connections: int = CONNECTIONS) -> None:
    """Serve clients of a virtual host. Raises as ``practise`` does."""
    # As every host that has protocols: others have nothing to practise.
    protocols = next((site.alpn for site in terms.sites if site.alpn), ())
    context = _anonymous_context(SSL.TLS_SERVER_METHOD)
    to_it = _anonymous_context(SSL.TLS_CLIENT_METHOD)
    if protocols:
        negotiate_protocol(context, protocols)
        to_it.set_alpn_protos(list(protocols))
    site = Site((_SERVER_NAME,), context, True, alpn=protocols)
    served = for_practice(terms)._replace(sites=[site])
    practise(connections, lambda: served, lambda worker: _connect_once(worker, to_it))


def for_practice(terms: Terms) -> Terms:
    """The same without what is not there in practice: a report that is read, and keyd."""
    return terms._replace(
        handshake_timeout=_PATIENCE_SECONDS,
        idle_timeout=_PATIENCE_SECONDS,
        half_closed_timeout=_PATIENCE_SECONDS,
        parting=b"",
        report=ReportWriter(),
        # A virtual host's own would ask keyd, on a descriptor that is something else here.
        practice=None,
    )


def practise(
    connections: int, terms: Callable[[], Terms], connect_once: Callable[[socket.socket], None]
) -> None:
    """Serve so many connections, on the ``terms`` of each, to which a child plays everybody else.

    ``connect_once`` is called with what the parent has of a worker, for each connection. Raises
    RuntimeError if one does not end cleanly, and OSError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _PATIENCE_SECONDS, 0))
    child = os.fork()
    if not child:
        # Close our end, so that the child sees end-of-file when this process dies.
        ours.close()
        _play_everybody_else(connections, theirs, connect_once)
    theirs.close()
    # Of the same type as a worker's.
    parent = socket.SocketType(fileno=ours.detach())
    place = map_private(ROOM_OCTETS)
    try:
        for _ in range(connections):
            reseed()
            now = terms()
            room = memory(place, ROOM_OCTETS)
            pump = Pump(now.idle_timeout, now.half_closed_timeout, room)
            touch(now, parent, pump)
            end = serve_next(now, parent, pump)
            if end != (End.CLEAN, ""):
                raise RuntimeError(f"a connection for practice ended with {end}")
    except BlockingIOError:
        raise RuntimeError(
            f"practice, which takes milliseconds, stood still for {_PATIENCE_SECONDS} s:"
            " unless this machine was overloaded, please report it"
        ) from None
    finally:
        call("munmap", place, ROOM_OCTETS)
        parent.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _anonymous_context(method: int) -> SSL.Context:
    """A context for either side, without a certificate."""
    context = SSL.Context(method)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    context.set_cipher_list(b"AECDH-AES128-SHA:@SECLEVEL=0")
    return context


def _play_everybody_else(
    connections: int, worker: socket.socket, connect_once: Callable[[socket.socket], None]
) -> NoReturn:
    """Play the parent, the clients and the servers; ends the process."""
    try:
        prctl.set_pdeathsig(signal.SIGKILL)
        for _ in range(connections):
            connect_once(worker)
    finally:
        error = sys.exception()
        if error is not None:
            sys.excepthook(type(error), error, error.__traceback__)
        os._exit(0)


def _connect_once(worker: socket.socket, context: SSL.Context) -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    give(worker, Client((0,)).encode(), [theirs])
    client = SSL.Connection(context, ours)
    client.set_connect_state()
    client.set_tlsext_host_name(_SERVER_NAME.encode())
    client.do_handshake()
    worker.recv(MESSAGE_OCTETS)
    backend, theirs = socket.socketpair()
    theirs.setblocking(False)
    give(worker, messages.BACKEND, [theirs])
    client.send(b"request")
    backend.send(backend.recv(MESSAGE_OCTETS))
    # An end of file, as TCP has it: these sockets, closed, would say that they have hung up.
    backend.shutdown(socket.SHUT_WR)
    with suppress(SSL.ZeroReturnError):
        while client.recv(MESSAGE_OCTETS):
            pass
    client.shutdown()
    backend.recv(MESSAGE_OCTETS)
    backend.close()
    ours.close()
