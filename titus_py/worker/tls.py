"""TLS settings: one OpenSSL context for each virtual host.

Run by the fork server before it forks (workers inherit the contexts), and by
``handshake_check``. The private key in a context is a reference: its operations go to keyd
through the provider. OPENSSL_CONF has to name a configuration that loads the provider
before this module is imported. Workers run ``reseed``.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

from _cffi_backend import load_library
from OpenSSL import SSL
from OpenSSL._util import ffi, lib

from keyd.linux.sealed import sealed_file
from keyd.provider import provider_path
from titus_py.between.virtual_host import TlsSettings
from titus_py.worker import transcript

with warnings.catch_warnings():
    # It is deprecated for making random numbers. Here it is only used for reseeding.
    warnings.simplefilter("ignore", DeprecationWarning)
    from OpenSSL import rand

# pyOpenSSL has the first function, but no method for it. cryptography has its older name.
if hasattr(lib, "SSL_CTX_set1_curves_list"):
    set_groups_list = lib.SSL_CTX_set1_curves_list
    set_msg_callback = lib.SSL_CTX_set_msg_callback
    group_name: Callable[[SSL.Connection], str | None] = SSL.Connection.get_group_name
else:
    from titus_py.worker.older_bindings import group_name, set_groups_list, set_msg_callback

__all__ = [
    "BUILT_IN_LEVEL",
    "VERSIONS",
    "Credentials",
    "as_path",
    "client_hello",
    "group_name",
    "make_context",
    "negotiate_protocol",
    "offered_suites",
    "reseed",
    "security_level",
    "selected_suites",
    "set_ciphersuites",
    "set_groups",
    "set_signature_schemes",
    "use_credentials",
]

VERSIONS = {"TLSv1.2": SSL.TLS1_2_VERSION, "TLSv1.3": SSL.TLS1_3_VERSION}

#: Forward-secret AEAD suites for TLS 1.2 (RFC 9325 §4.2).
_TLS12_SUITES = "ECDHE+AESGCM:ECDHE+CHACHA20"
#: Without forward secrecy: only where the RSA key exchange is turned on.
_TLS12_RSA_SUITES = "kRSA+AESGCM"

#: Suites that a TLS 1.2 handshake can be completed with: keyd signs the parameters of ECDHE and
#: no others, and decrypts for the RSA key exchange. (OpenSSL finds the tags of CCM8 too short.)
_ECDHE = "kECDHE+aRSA:kECDHE+aECDSA:!eNULL:!AESCCM8"
_RSA_KEY_EXCHANGE = "kRSA:!eNULL:!AESCCM8"

#: OpenSSL's security level (SSL_CTX_set_security_level(3)). A setting can only raise it.
BUILT_IN_LEVEL = 2

#: The schemes that keyd signs with (``keyd.protocol``), in OpenSSL's order. OpenSSL's own list has
#: others, which a client could ask for.
_POST_QUANTUM_SCHEMES = "mldsa44:mldsa65:mldsa87:"
_SIGNATURE_SCHEMES = (
    "ecdsa_secp256r1_sha256:ecdsa_secp384r1_sha384:ecdsa_secp521r1_sha512:ed25519:"
    "rsa_pss_rsae_sha256:rsa_pss_rsae_sha384:rsa_pss_rsae_sha512:"
    "rsa_pss_pss_sha256:rsa_pss_pss_sha384:rsa_pss_pss_sha512:"
    "rsa_pkcs1_sha256:rsa_pkcs1_sha384:rsa_pkcs1_sha512"
)

#: OpenSSL's default groups, without those whose parameters keyd does not sign: those of finite
#: fields, SM2's, and X448, which keyd signs where a virtual host names it.
_GROUPS = ("X25519MLKEM768", "SecP256r1MLKEM768", "X25519", "P-256", "P-384", "P-521")

_TAKES_MESSAGES = "unsigned char *(*)(size_t *)"
_HEARS_MESSAGE = "void (*)(int, int, int, const void *, size_t, SSL *, void *)"
_CHOOSES_PROTOCOL = (
    "int (*)(SSL *, const unsigned char **, unsigned char *, const unsigned char *, unsigned int,"
    " void *)"
)

#: SSL_OP_PRIORITIZE_CHACHA, for which pyOpenSSL has no name.
_PRIORITIZE_CHACHA = 1 << 21


class Credentials(NamedTuple):
    """A certificate that a context presents, and its key: PEM text, both."""

    certificate_chain: str
    key_reference: str


def make_context(credentials: Sequence[Credentials], settings: TlsSettings) -> SSL.Context:
    """A server's context; raises SSL.Error if OpenSSL rejects what it is given.

    The credentials are each for another kind of key: OpenSSL shows a client what it can verify.
    """
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(VERSIONS[settings.min_version])
    context.set_max_proto_version(VERSIONS[settings.max_version])
    suites: Sequence[str] = ["DEFAULT"]  # for TLS 1.3 alone, which does not use them
    if settings.min_version == "TLSv1.2":
        suites = offered_suites(settings.ciphers, settings.rsa_key_exchange)
    level = f"@SECLEVEL={security_level(settings.ciphers)}"
    context.set_cipher_list(":".join([*suites, level]).encode())
    if settings.ciphersuites is not None:
        set_ciphersuites(context, settings.ciphersuites)
    set_groups(context, settings.groups)
    set_signature_schemes(context)
    # Resumption would need a secret, or a store, that all workers share.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    # The server's order holds (RFC 9325 §4.1), with one exception: a client that prefers ChaCha20
    # has no AES in its hardware, and gets ChaCha20.
    context.set_options(SSL.OP_CIPHER_SERVER_PREFERENCE | _PRIORITIZE_CHACHA)
    # A client that leaves within the handshake hears no alert about that.
    context.set_options(SSL.OP_IGNORE_UNEXPECTED_EOF)
    if settings.max_version == "TLSv1.3":
        hand_over_messages(context)
    if settings.alpn is not None:
        negotiate_protocol(context, [name.encode() for name in settings.alpn])
    for one in credentials:
        use_credentials(context, one)
    return context


def use_credentials(context: SSL.Context, credentials: Credentials) -> None:
    """Have a context present these, instead of others for this kind of key. Raises SSL.Error."""
    with as_path(credentials.certificate_chain) as path:
        context.use_certificate_chain_file(path)
    with as_path(credentials.key_reference) as path:
        context.use_privatekey_file(path)
    context.check_privatekey()


def hand_over_messages(context: SSL.Context) -> None:
    """Have ``transcript`` keep the messages of a handshake, and the provider take them."""
    set_msg_callback(context._context, ffi.cast(_HEARS_MESSAGE, transcript.CALLBACK))
    told = ffi.typeof(f"void (*)({_TAKES_MESSAGES})")
    take_from = _provider().load_function(told, "keyd_take_messages_from")
    take_from(ffi.cast(_TAKES_MESSAGES, transcript.TAKE))


@cache
def _provider() -> Any:
    """The library that OpenSSL has loaded as well."""
    return load_library(provider_path(), os.RTLD_NOW)


def negotiate_protocol(context: SSL.Context, protocols: Sequence[bytes]) -> None:
    """Have ``alpn`` choose one of these protocols, best first, if the client offers any."""
    # Only here: what no virtual host uses, no worker has.
    from titus_py.worker import alpn

    callback = ffi.cast(_CHOOSES_PROTOCOL, alpn.CALLBACK)
    lib.SSL_CTX_set_alpn_select_cb(context._context, callback, _protocol_list(tuple(protocols)))


@cache
def _protocol_list(protocols: tuple[bytes, ...]) -> Any:
    """The list as ``alpn`` takes it. OpenSSL reads it as long as there are contexts."""
    names = (bytes((len(name),)) + name for name in (*protocols, b""))
    return ffi.new("unsigned char[]", b"".join(names))


@cache
def offered_suites(ciphers: str | None, rsa_key_exchange: bool) -> tuple[str, ...]:
    """The TLS 1.2 suites of a setting that a handshake can be completed with, best first.

    First come the ECDHE suites of the setting, or of the default, in that order. If the RSA key
    exchange is turned on, its suites follow: those that the setting names, or the default ones.
    """
    selected = selected_suites(ciphers or _TLS12_SUITES)
    possible = set(selected_suites(_ECDHE))
    offered = [suite for suite in selected if suite in possible]
    if rsa_key_exchange:
        possible = set(selected_suites(_RSA_KEY_EXCHANGE))
        named = [suite for suite in selected if suite in possible]
        offered += named or selected_suites(_TLS12_RSA_SUITES)
    return tuple(offered)


@cache
def selected_suites(ciphers: str) -> tuple[str, ...]:
    """The TLS 1.2 suites that OpenSSL makes of a cipher list (ciphers(1)); possibly none."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    set_ciphersuites(context, "")
    try:
        context.set_cipher_list(ciphers.encode())
    except SSL.Error:
        return ()
    return tuple(SSL.Connection(context).get_cipher_list())


def set_ciphersuites(context: SSL.Context, names: str) -> None:
    """The suites of TLS 1.3 (SSL_CTX_set_ciphersuites(3)). Raises SSL.Error."""
    # Debian 13's pyOpenSSL has no method for it.
    SSL._openssl_assert(lib.SSL_CTX_set_ciphersuites(context._context, names.encode()) == 1)


def security_level(ciphers: str | None) -> int:
    """The level that a cipher list asks for with ``@SECLEVEL=``, or else the built-in one."""
    asked = re.findall("@SECLEVEL=([0-9])", ciphers or "")
    return max(BUILT_IN_LEVEL, int(asked[-1]) if asked else 0)


def set_groups(context: SSL.Context, groups: Sequence[str] | None) -> None:
    """The groups for the key exchange, best first; raises ValueError for one that is unknown.

    A client that has guessed another group than the best one keeps its guess, which saves a round
    trip. The exception: the best one is post-quantum, and the guess is not.
    """
    kinds = groupby(groups or _GROUPS, lambda group: "MLKEM" in group)
    names = " / ".join(":".join(kind) for _, kind in kinds)
    if set_groups_list(context._context, names.encode()) != 1:
        raise ValueError(f"OpenSSL does not know each of these groups: {names}")


def set_signature_schemes(context: SSL.Context) -> None:
    """Allow the schemes that keyd signs with, and no others (SSL_CTX_set1_sigalgs_list(3))."""
    # Post-quantum ones first: whoever has such a certificate wants it to be used. OpenSSL before
    # 3.5 does not know them.
    for schemes in (_POST_QUANTUM_SCHEMES + _SIGNATURE_SCHEMES, _SIGNATURE_SCHEMES):
        if lib.SSL_CTX_set1_sigalgs_list(context._context, schemes.encode()) == 1:
            return
        lib.ERR_clear_error()
    raise ValueError("OpenSSL does not know each scheme that keyd signs with")


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

    OpenSSL notices a fork by a changed process id. A worker is process 1 of its namespace, and
    the fork server is not, so OpenSSL does notice; but that is chance. Two workers whose
    generators are in the same state would be a catastrophe. RAND_add(3) makes the generators
    take in fresh entropy.
    """
    rand.add(os.urandom(48), 48)


@contextmanager
def as_path(text: str) -> Iterator[str]:
    """A path at which OpenSSL can read this text: it takes only files."""
    descriptor = sealed_file("pem", text.encode())
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
