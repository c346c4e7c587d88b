"""A few connections through a tunnel for practice, before the first worker is forked.

Run by the fork server, as ``rehearsal``, where the configuration has a tunnel. A child process
plays the parent, the clients and the server. The server's certificate is made here and forgotten;
its key is nobody's.
"""

import socket
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL, crypto

from titus_py.between.hand_over import give
from titus_py.between.messages import Tunnel
from titus_py.fork_server.rehearsal import MESSAGE_OCTETS, for_practice, practise
from titus_py.worker.certificate_facts import public_key_id
from titus_py.worker.client_context import make_client_context
from titus_py.worker.life import Terms
from titus_py.worker.server_certificate import ServerVerifier
from titus_py.worker.tunnel import Conduit

__all__ = ["rehearse_tunnel"]

_SERVER_NAME = "localhost"


def rehearse_tunnel(terms: Terms, connections: int) -> None:
    """Carry connections through a tunnel. Raises as ``practise`` does."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _self_signed(key)
    server = SSL.Context(SSL.TLS_SERVER_METHOD)
    server.use_certificate(crypto.X509.from_cryptography(certificate))
    server.use_privatekey(crypto.PKey.from_cryptography_key(key))
    context = make_client_context("TLSv1.3", None)
    pin = public_key_id(certificate).hex()
    # A virtual host's context would ask keyd.
    carried = for_practice(terms)._replace(sites=())

    def with_a_conduit() -> Terms:
        # As in a worker, whose first connection is its only one.
        verifier = ServerVerifier("", (pin,), _SERVER_NAME)
        return carried._replace(conduits=[Conduit(context, _SERVER_NAME, verifier)])

    practise(connections, with_a_conduit, lambda worker: _connect_once(worker, server))


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _SERVER_NAME)])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )


def _connect_once(worker: socket.socket, context: SSL.Context) -> None:
    client, to_client = socket.socketpair()
    server, to_server = socket.socketpair()
    for side in (to_client, to_server):
        side.setblocking(False)
    give(worker, Tunnel(0, keyed=False).encode(), [to_client, to_server])
    tls = SSL.Connection(context, server)
    tls.set_accept_state()
    tls.do_handshake()
    worker.recv(MESSAGE_OCTETS)
    client.send(b"request")
    tls.send(tls.recv(MESSAGE_OCTETS))
    client.recv(MESSAGE_OCTETS)
    # An end of file, as TCP has it: these sockets, closed, would say that they have hung up.
    client.shutdown(socket.SHUT_WR)
    with suppress(SSL.ZeroReturnError):
        while tls.recv(MESSAGE_OCTETS):
            pass
    tls.shutdown()
    client.recv(MESSAGE_OCTETS)
    client.close()
    server.close()
