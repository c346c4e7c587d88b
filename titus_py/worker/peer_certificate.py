"""What judging a peer's certificate takes, on either side of a handshake.

Workers inherit what is made here before the fork: OpenSSL verifies without opening a file. Imported
only where a virtual host asks for client certificates, or for a tunnel. The certificate is the
peer's, and hostile.
"""

from contextlib import suppress
from functools import cache
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from OpenSSL import SSL, crypto
from OpenSSL._util import ffi, lib

from titus_py.between.client_allow import Facts
from titus_py.between.report import ReportWriter
from titus_py.worker import verification
from titus_py.worker.certificate_facts import facts_of
from titus_py.worker.tls import as_path

__all__ = [
    "BAD_CERTIFICATE",
    "CALLBACK",
    "STORE_CONTEXT",
    "UNREADABLE",
    "Shown",
    "finding_of",
    "own_of",
    "read_own",
    "trust",
]

#: How many certificates there may be between the peer's own and a trusted one.
_MAX_BETWEEN = 4
CALLBACK = ffi.cast("int (*)(int, X509_STORE_CTX *)", verification.CALLBACK)
STORE_CONTEXT = ffi.typeof("X509_STORE_CTX *")
#: What the library raises for a certificate that it cannot read.
UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)

#: Why a certificate was refused, and what the alert to the peer is chosen by instead of OpenSSL's
#: own finding (RFC 8446 §6.2), where that would be another alert.
BAD_CERTIFICATE = lib.X509_V_ERR_CERT_REJECTED
_EXPIRED = lib.X509_V_ERR_CERT_HAS_EXPIRED
#: OpenSSL has certificate_unknown for whatever its table does not name.
_CERTIFICATE_UNKNOWN = lib.X509_V_ERR_KEYUSAGE_NO_CRL_SIGN
_FINDINGS = {
    lib.X509_V_ERR_CERT_HAS_EXPIRED: ("expired", None),
    # certificate_expired: "has expired or is not currently valid".
    lib.X509_V_ERR_CERT_NOT_YET_VALID: ("not_yet_valid", _EXPIRED),
    lib.X509_V_ERR_CERT_REVOKED: ("revoked", None),
    lib.X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT: ("unknown_ca", None),
    lib.X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY: ("unknown_ca", None),
    lib.X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE: ("unknown_ca", None),
    lib.X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT: ("unknown_ca", None),
    lib.X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN: ("unknown_ca", None),
    lib.X509_V_ERR_INVALID_CA: ("unknown_ca", None),
    lib.X509_V_ERR_INVALID_PURPOSE: ("wrong_usage", None),
    lib.X509_V_ERR_CERT_CHAIN_TOO_LONG: ("chain_too_long", None),
    lib.X509_V_ERR_PATH_LENGTH_EXCEEDED: ("chain_too_long", None),
    # bad_certificate: "contained signatures that did not verify correctly".
    lib.X509_V_ERR_CERT_SIGNATURE_FAILURE: ("bad_signature", BAD_CERTIFICATE),
    # The list of revoked certificates is ours: the client's certificate may be good.
    lib.X509_V_ERR_UNABLE_TO_GET_CRL: ("no_crl", _CERTIFICATE_UNKNOWN),
    lib.X509_V_ERR_CRL_HAS_EXPIRED: ("crl_expired", _CERTIFICATE_UNKNOWN),
    lib.X509_V_ERR_CRL_NOT_YET_VALID: ("crl_not_yet_valid", _CERTIFICATE_UNKNOWN),
    lib.X509_V_ERR_CRL_SIGNATURE_FAILURE: ("bad_crl", _CERTIFICATE_UNKNOWN),
}


class Shown(NamedTuple):
    """The peer's own certificate, read."""

    facts: Facts
    subject: str
    issuer: str
    serial: str

    def record(self, report: ReportWriter) -> None:
        report.set(
            certificate_subject=self.subject,
            certificate_issuer=self.issuer,
            certificate_serial=self.serial,
            certificate_spki=f"sha256:{self.facts.spki}",
        )


def trust(context: SSL.Context, authorities: str, revocations: str = "") -> None:
    """Have a context verify its peers' certificates with these: PEM. Raises SSL.Error."""
    store = _store(authorities, revocations)
    lib.X509_STORE_up_ref(store._store)
    # The context takes it over.
    lib.SSL_CTX_set_cert_store(context._context, store._store)
    context.set_verify_depth(_MAX_BETWEEN)


def finding_of(store_context: object) -> tuple[str, int | None]:
    """What OpenSSL finds wrong, in our words, and its number for another alert, if there is one."""
    finding = lib.X509_STORE_CTX_get_error(store_context)
    depth = lib.X509_STORE_CTX_get_error_depth(store_context)
    words = ffi.string(lib.X509_verify_cert_error_string(finding)).decode()
    reason, alert = _FINDINGS.get(finding, ("rejected", None))
    where = f" (certificate {depth + 1} of its chain)" if depth else ""
    return f"{reason}: {words}{where}", alert


def read_own(store_context: object) -> Shown:
    """The peer's own certificate. Raises one of UNREADABLE."""
    return _read(own_of(store_context))


def own_of(store_context: object) -> crypto.X509:
    """The peer's own certificate, unread."""
    own = lib.X509_STORE_CTX_get0_cert(store_context)
    lib.X509_up_ref(own)
    return crypto.X509._from_raw_x509_ptr(own)


@cache
def _store(authorities: str, revocations: str) -> crypto.X509Store:
    """What certificates are verified with: one for all contexts with the same files."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    with as_path(authorities + revocations) as path:
        context.load_verify_locations(path)
    store = context.get_cert_store()
    assert store is not None
    # It is the context's, and outlives it.
    lib.X509_STORE_up_ref(store._store)
    # Each certificate of the file is trusted, and not only those that end a chain.
    flags = crypto.X509StoreFlags.PARTIAL_CHAIN
    if revocations:
        flags |= crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL
    store.set_flags(flags)
    # What OpenSSL and Python fetch to verify one, no worker has to fetch. And a list is sorted when
    # it is first looked into, which takes time if it is long.
    for authority in x509.load_pem_x509_certificates(authorities.encode()):
        own = crypto.X509.from_cryptography(authority)
        with suppress(crypto.X509StoreContextError):
            crypto.X509StoreContext(store, own).verify_certificate()
        with suppress(*UNREADABLE):
            _read(own)
    return store


def _read(own: crypto.X509) -> Shown:
    """Raises one of UNREADABLE."""
    certificate = own.to_cryptography()
    return Shown(
        facts_of(certificate),
        certificate.subject.rfc4514_string(),
        certificate.issuer.rfc4514_string(),
        f"{certificate.serial_number:x}",
    )
