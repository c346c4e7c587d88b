"""TLS settings: one OpenSSL context for each virtual host.

Run by the fork server, before it forks; workers inherit the contexts. The private key
in each is a reference: its operations go to keyd through the provider, which
OPENSSL_CONF has to have loaded before this module is imported.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from OpenSSL import SSL

from keyd.linux.sealed import sealed_file

with warnings.catch_warnings():
    # Deprecated for making random numbers, which is not what it is used for here.
    warnings.simplefilter("ignore", DeprecationWarning)
    from OpenSSL import rand

__all__ = ["Credentials", "client_hello", "make_context", "reseed"]

_VERSIONS = {"TLSv1.2": SSL.TLS1_2_VERSION, "TLSv1.3": SSL.TLS1_3_VERSION}

#: Forward-secret AEAD suites for TLS 1.2 (RFC 9325 §4.2).
_TLS12_SUITES = "ECDHE+AESGCM:ECDHE+CHACHA20"
#: Without forward secrecy: only where the RSA key exchange is turned on.
_TLS12_RSA_SUITES = "kRSA+AESGCM"


class Credentials(NamedTuple):
    """What a context presents: PEM text, both."""

    certificate_chain: str
    key_reference: str


def make_context(
    credentials: Credentials,
    min_version: str,
    max_version: str,
    ciphers: str | None,
    ciphersuites: str | None,
    rsa_key_exchange: bool,
) -> SSL.Context:
    """A server's context; raises SSL.Error where OpenSSL does not take a setting."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(_VERSIONS[min_version])
    context.set_max_proto_version(_VERSIONS[max_version])
    suites = ciphers or _TLS12_SUITES
    if rsa_key_exchange:
        suites += ":" + _TLS12_RSA_SUITES
    context.set_cipher_list(suites.encode())
    if ciphersuites is not None:
        context.set_tls13_ciphersuites(ciphersuites.encode())
    # Resumption would need a secret that every worker shares, or a store that does.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    with _as_path(credentials.certificate_chain) as path:
        context.use_certificate_chain_file(path)
    with _as_path(credentials.key_reference) as path:
        context.use_privatekey_file(path)
    context.check_privatekey()
    return context


def client_hello() -> bytes:
    """A ClientHello, as this library's clients send it."""
    client = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD))
    client.set_connect_state()
    client.set_tlsext_host_name(b"localhost")
    with suppress(SSL.WantReadError):
        client.do_handshake()
    return client.bio_read(1 << 14)


def reseed() -> None:
    """Make this process's random numbers its own: every child's first act.

    OpenSSL knows a fork by a changed process id. A worker is process 1 of its namespace, and
    its fork server is not; but that is chance, and two workers' generators in the same
    state would be a catastrophe. RAND_add(3) makes them take in fresh entropy.
    """
    rand.add(os.urandom(48), 48)


@contextmanager
def _as_path(text: str) -> Iterator[str]:
    """A path by which OpenSSL can read this text: it takes files only."""
    descriptor = sealed_file("pem", text.encode())
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
