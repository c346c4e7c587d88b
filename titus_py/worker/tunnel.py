"""A tunnel's connection: plaintext from the client, TLS to the server.

Run by the worker. The parent has connected to the server before it gave both sockets away. What
differs from a virtual host's connection is this file: the worker is TLS's client, and judges the
server. The pump is the same, with its sides changed round: its TLS side is the server, and the side
without TLS is the client. Loaded only where the configuration has a tunnel.
"""

import os
import select
import time
from contextlib import suppress
from socket import SHUT_RD, SocketType

from OpenSSL import SSL

from keyd.linux.process import make
from titus_py.between.hand_over import take
from titus_py.between.messages import CHANNEL, MAX_BACKEND_OCTETS, Established
from titus_py.between.report import End, State
from titus_py.between.tunnel_terms import TunnelTerms
from titus_py.worker.client_context import make_client_context
from titus_py.worker.ends import describe
from titus_py.worker.farewell import part
from titus_py.worker.life import Terms
from titus_py.worker.pump import Pump
from titus_py.worker.server_certificate import ServerVerifier, packed_address
from titus_py.worker.tls import Credentials, group_name

__all__ = ["Conduit", "conduit"]

#: What the pump calls an end, with its sides changed round.
_CHANGED_ROUND = {
    End.CLIENT_RESET: End.SERVER_RESET,
    End.CLIENT_TRUNCATED: End.SERVER_TRUNCATED,
    End.CLIENT_PROTOCOL_ERROR: End.SERVER_PROTOCOL_ERROR,
    End.BACKEND_RESET: End.CLIENT_RESET,
}


class Conduit:
    """One tunnel, as far as a worker knows it."""

    def __init__(
        self,
        context: SSL.Context,
        server_name: str | None,
        verifier: ServerVerifier,
        starttls: bool = False,
    ) -> None:
        self._context = context
        if starttls:
            # Others do not need it in their memory.
            from titus_py.worker import starttls as before_tls

            self._ask, self._decline = before_tls.ask, before_tls.decline
        self._starttls = starttls
        self._server_name = server_name
        self._verifier = verifier
        verifier.demand(context)

    def touch(self) -> None:
        """Write, while no client waits, to the pages that a handshake will write to."""
        with suppress(SSL.WantReadError):
            self._begin(None).do_handshake()

    def serve(
        self,
        terms: Terms,
        pump: Pump,
        parent: SocketType,
        keyed: bool,
        client: SocketType,
        server: SocketType,
    ) -> tuple[End, str]:
        """Serve one connection; returns how it ended and a detail for the record.

        Neither socket blocks. ``keyed``: there is a channel to keyd.
        """
        report = terms.report
        deadline = time.monotonic() + terms.handshake_timeout
        report.set(state=State.HANDSHAKE, server_name=self._server_name or "")
        self._verifier.begin(report)
        connection = self._begin(server)
        failure = self._ask_for_tls(server, deadline) if self._starttls else None
        failure = failure or self._shake_hands(connection, server, deadline)
        if failure is not None:
            # The client learns of it at once, by a reset; the server has an alert to read.
            client.close()
            part(server)
            return failure
        if not self._verifier.is_satisfied(connection):
            raise PermissionError("a handshake with a server that was not verified")
        report.set(
            state=State.ESTABLISHED,
            tls_version=connection.get_protocol_version_name(),
            cipher_suite=connection.get_cipher_name() or "",
            group=group_name(connection) or "",
        )
        parent.send(Established().encode())
        if keyed:
            make(terms.parting)
            _hear_no_more(parent)
        try:
            early = self._decline(client, connection, deadline) if self._starttls else 0
        except SSL.SysCallError:
            return End.SERVER_RESET, ""
        except SSL.Error as error:
            return End.SERVER_PROTOCOL_ERROR, describe(error)
        report.from_client[0] = early
        counts = report.to_client, report.from_client
        pump.begin(connection, server, counts, truncated_is_reset=True)
        end, detail = pump.run(client)
        return _CHANGED_ROUND.get(end, end), detail

    def _ask_for_tls(self, server: SocketType, deadline: float) -> tuple[End, str] | None:
        """Returns why there is none; None if TLS may begin."""
        try:
            reason = self._ask(server, deadline)
        except TimeoutError:
            return End.HANDSHAKE_TIMEOUT, "asked for TLS"
        except OSError as error:
            return End.SERVER_LEFT, f"asked for TLS: {error.strerror}"
        return (End.STARTTLS_REFUSED, reason) if reason else None

    def _begin(self, server: SocketType | None) -> SSL.Connection:
        # pyOpenSSL asks the socket for its descriptor, and for nothing else.
        connection = SSL.Connection(self._context, server)  # type: ignore[arg-type]
        connection.set_connect_state()
        # An address is no name (RFC 6066 §3).
        if self._server_name is not None and packed_address(self._server_name) is None:
            connection.set_tlsext_host_name(self._server_name.encode())
        return connection

    def _shake_hands(
        self, connection: SSL.Connection, server: SocketType, deadline: float
    ) -> tuple[End, str] | None:
        """Returns why it failed; None if it did not."""
        while True:
            try:
                connection.do_handshake()
                return None
            except SSL.WantReadError:
                events = select.POLLIN
            except SSL.WantWriteError:
                events = select.POLLOUT
            except SSL.ZeroReturnError:
                return End.SERVER_LEFT, "within the handshake"
            except SSL.SysCallError as error:
                reason = "" if error.args[0] == -1 else str(error.args[1])
                return End.SERVER_LEFT, f"within the handshake {reason}".strip()
            except SSL.Error as error:
                if self._verifier.refused:
                    return End.SERVER_CERTIFICATE, self._verifier.refused
                return End.HANDSHAKE_FAILED, describe(error)
            poll = select.poll()
            poll.register(server, events)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return End.HANDSHAKE_TIMEOUT, ""


def _hear_no_more(parent: SocketType) -> None:
    """The parent may have sent another channel to keyd, and the handshake did without it."""
    parent.shutdown(SHUT_RD)
    message = CHANNEL
    while message:
        message, descriptors = take(parent, MAX_BACKEND_OCTETS, 1)
        for descriptor in descriptors:
            os.close(descriptor)


def conduit(terms: TunnelTerms) -> Conduit:
    """What workers inherit of a tunnel. Raises SSL.Error."""
    own = terms.certificate
    credentials = Credentials(own.chain, own.key_reference) if own is not None else None
    context = make_client_context(terms.min_version, terms.alpn, credentials)
    verifier = ServerVerifier(terms.authorities, terms.pins, terms.server_name)
    return Conduit(context, terms.server_name, verifier, terms.starttls)
