"""Showing a client a certificate of an index: only the one that it asked for is made.

Run by a worker, and by the fork server for practice. A context for each of 10,000 certificates
would take 26 KB and more of memory each, and every fork would copy its page tables; OpenSSL reads
one certificate and one reference in 0.1 ms. Only configurations with a ``certificate_dir`` import
this.
"""

from collections.abc import Callable
from typing import Any

from OpenSSL import SSL
from OpenSSL._util import ffi, lib

from titus_py.between.certificate_index import CertificateIndex
from titus_py.between.virtual_host import TlsSettings
from titus_py.worker.tls import make_context

__all__ = ["practise", "show"]

#: Python begins to adapt a function after eight runs.
_RUNS = 12


def show(context: SSL.Context, index: CertificateIndex, number: int) -> None:
    """Have a context that has no certificate yet present this one. Raises RuntimeError."""
    (leaf, *issuers), reference = index.certificate(number)
    own = context._context
    certificate = _read(leaf, lambda bio: lib.d2i_X509_bio(bio, ffi.NULL))
    _check(lib.SSL_CTX_use_certificate(own, certificate))
    lib.X509_free(certificate)
    for issuer in issuers:
        # The context takes it over.
        taken = _read(issuer, lambda bio: lib.d2i_X509_bio(bio, ffi.NULL))
        _check(lib.SSL_CTX_add_extra_chain_cert(own, taken))
    key = _read(
        reference, lambda bio: lib.PEM_read_bio_PrivateKey(bio, ffi.NULL, ffi.NULL, ffi.NULL)
    )
    _check(lib.SSL_CTX_use_PrivateKey(own, key))
    lib.EVP_PKEY_free(key)


def practise(index: CertificateIndex, settings: TlsSettings) -> SSL.Context:
    """A context with the first certificate, made several times before any worker makes one.

    What Python and OpenSSL learn and fetch on the way, every worker inherits.
    """
    for _ in range(_RUNS):
        context = make_context([], settings)
        index.find("localhost.localdomain")
        if index.count:
            show(context, index, 0)
    return context


def _read(octets: bytes, read: Callable[[Any], Any]) -> Any:
    bio = lib.BIO_new_mem_buf(octets, len(octets))
    found = read(bio)
    lib.BIO_free(bio)
    _check(found != ffi.NULL)
    return found


def _check(done: int | bool) -> None:
    if done != 1:
        # All of them have been tried before (``handshake_check``).
        raise RuntimeError("OpenSSL does not take a certificate of the index")
