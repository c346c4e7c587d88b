"""A few connections through a tunnel for practice, before the first worker is forked.

Run by the fork server, as ``rehearsal``, where the configuration has a tunnel. A child process
plays the parent, the clients and the server. The server's certificate is made here and forgotten;
its key is nobody's.
"""

import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import NoReturn

import prctl
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL, crypto

from titus_py.between.hand_over import give
from titus_py.between.messages import Tunnel
from titus_py.between.report import End, ReportWriter
from titus_py.fork_server.rehearsal import CONNECTIONS, MESSAGE_OCTETS, PATIENCE_SECONDS
from titus_py.worker.certificate_facts import public_key_id
from titus_py.worker.client_context import make_client_context
from titus_py.worker.life import Terms, serve_next
from titus_py.worker.server_certificate import ServerVerifier
from titus_py.worker.tls import note_close_notify, reseed
from titus_py.worker.tunnel import Conduit

__all__ = ["rehearse_tunnel"]

_SERVER_NAME = "localhost"


def rehearse_tunnel(terms: Terms) -> None:
    """Carry the connections. Raises RuntimeError if one does not end cleanly, and OSError."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _self_signed(key)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PATIENCE_SECONDS, 0))
    child = os.fork()
    if not child:
        # Close our end, so that the child sees end-of-file when this process dies.
        ours.close()
        _play_everybody_else(theirs, certificate, key)
    theirs.close()
    context = make_client_context("TLSv1.3", None)
    pin = public_key_id(certificate).hex()
    for_practice = terms._replace(
        handshake_timeout=PATIENCE_SECONDS,
        idle_timeout=PATIENCE_SECONDS,
        half_closed_timeout=PATIENCE_SECONDS,
        report=ReportWriter(),
        practice=None,
    )
    # Of the same type as a worker's.
    parent = socket.SocketType(fileno=ours.detach())
    try:
        for _ in range(CONNECTIONS):
            reseed()
            # As in a worker, whose first connection is its only one.
            verifier = ServerVerifier("", (pin,), _SERVER_NAME)
            conduit = Conduit(context, _SERVER_NAME, verifier)
            end = serve_next(for_practice._replace(conduits=[conduit]), parent)
            if end != (End.CLEAN, ""):
                raise RuntimeError(f"a tunnel's connection for practice ended with {end}")
    finally:
        parent.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


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


def _play_everybody_else(
    worker: socket.socket, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> NoReturn:
    """Play the parent, the clients and the server; ends the process."""
    try:
        prctl.set_pdeathsig(signal.SIGKILL)
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.use_certificate(crypto.X509.from_cryptography(certificate))
        context.use_privatekey(crypto.PKey.from_cryptography_key(key))
        note_close_notify(context)
        for _ in range(CONNECTIONS):
            _connect_once(worker, context)
    finally:
        error = sys.exception()
        if error is not None:
            sys.excepthook(type(error), error, error.__traceback__)
        os._exit(0)


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
    client.close()
    with suppress(SSL.ZeroReturnError):
        while tls.recv(MESSAGE_OCTETS):
            pass
    tls.shutdown()
    server.close()
