"""Client certificates: asking for them, judging them, saying whose they are.

The fork server puts what a virtual host asks for into its context (``Verifier``); workers inherit
it. OpenSSL verifies in the worker, which opens no file for it and makes no other system call.
Imported only where a virtual host asks for client certificates. The certificate is the client's,
and hostile.
"""

from contextlib import suppress
from functools import cache
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from OpenSSL import SSL, crypto
from OpenSSL._util import ffi, lib

from titus_py.between.client_allow import Facts, allows
from titus_py.between.client_identity import ClientTerms, Identity, Link
from titus_py.between.report import ReportWriter
from titus_py.worker import verification
from titus_py.worker.certificate_facts import facts_of, name_id, public_key_id
from titus_py.worker.tls import as_path

__all__ = ["Verifier"]

#: How many certificates there may be between the client's own and a trusted one.
_MAX_BETWEEN = 4
_CALLBACK = ffi.cast("int (*)(int, X509_STORE_CTX *)", verification.CALLBACK)
_STORE_CONTEXT = ffi.typeof("X509_STORE_CTX *")
#: What the library raises for a certificate that it cannot read.
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)

#: Why a certificate was refused, and what the alert to the client is chosen by instead of
#: OpenSSL's own finding (RFC 8446 §6.2), where that would be another alert.
_BAD_CERTIFICATE = lib.X509_V_ERR_CERT_REJECTED
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
    lib.X509_V_ERR_CERT_SIGNATURE_FAILURE: ("bad_signature", _BAD_CERTIFICATE),
    # The list of revoked certificates is ours: the client's certificate may be good.
    lib.X509_V_ERR_UNABLE_TO_GET_CRL: ("no_crl", _CERTIFICATE_UNKNOWN),
    lib.X509_V_ERR_CRL_HAS_EXPIRED: ("crl_expired", _CERTIFICATE_UNKNOWN),
    lib.X509_V_ERR_CRL_NOT_YET_VALID: ("crl_not_yet_valid", _CERTIFICATE_UNKNOWN),
    lib.X509_V_ERR_CRL_SIGNATURE_FAILURE: ("bad_crl", _CERTIFICATE_UNKNOWN),
}
#: How OpenSSL names what goes wrong before there is a certificate to verify.
_WITHOUT_VERDICT = {
    "peer did not return a certificate": "no_certificate",
    "excessive message size": "too_long",
    # Something that OpenSSL cannot get over, without asking us.
    "certificate verify failed": "rejected",
}


class _Shown(NamedTuple):
    """The client's own certificate, read."""

    facts: Facts
    subject: str
    issuer: str
    serial: str


class Verifier:
    """What one virtual host asks of client certificates; in a worker, of the one that was shown."""

    def __init__(self, terms: ClientTerms) -> None:
        self._terms = terms
        self._allow = terms.allowed
        #: Without authorities, the keys that are listed are all that counts.
        self._keys_only = not terms.authorities
        self._report: ReportWriter | None = None
        self._shown: _Shown | None = None
        self._refused = ""
        self._accepted = False

    def demand(self, context: SSL.Context) -> None:
        """Have a context ask its clients for certificates. Raises SSL.Error."""
        mode = SSL.VERIFY_PEER
        if self._terms.required:
            mode |= SSL.VERIFY_FAIL_IF_NO_PEER_CERT
        # pyOpenSSL's method would make a callback of its own.
        lib.SSL_CTX_set_verify(context._context, mode, _CALLBACK)
        if self._keys_only:
            return
        store = _store(self._terms.authorities, self._terms.revocations)
        lib.X509_STORE_up_ref(store._store)
        # The context takes it over.
        lib.SSL_CTX_set_cert_store(context._context, store._store)
        with as_path(self._terms.authorities) as path:
            # Named to the client, which may have certificates of several authorities.
            context.load_client_ca(path.encode())
        context.set_verify_depth(_MAX_BETWEEN)

    def begin(self, report: ReportWriter) -> None:
        """Judge the certificate of this process's connection, whose handshake is about to begin."""
        self._report = report
        verification.ask(self._judge)

    def refusal(self, error: str) -> str | None:
        """Why a handshake has failed with this error, in our words; None: not by a certificate."""
        if self._refused:
            return self._refused
        for sign, reason in _WITHOUT_VERDICT.items():
            if sign in error:
                return f"{reason}: {error}"
        return None

    def identity(self, connection: SSL.Connection) -> Identity | None:
        """Who the client is, after its handshake; None if it has shown no certificate.

        Raises PermissionError for a certificate that was not judged to be good.
        """
        chain = connection.get_verified_chain() or []
        if not chain:
            if self._terms.required or self._shown is not None:
                raise PermissionError("a handshake without the certificate that is required")
            return None
        if not self._accepted or self._shown is None:
            raise PermissionError("a certificate that was not verified")
        links = []
        # Where keys are all that counts, the client has made the others up.
        for one in chain[:1] if self._keys_only else chain:
            with suppress(*_UNREADABLE):
                read = one.to_cryptography()
                links.append(Link(name_id(read.issuer), read.serial_number, public_key_id(read)))
        complete = self._keys_only or len(links) == len(chain)
        own = crypto.dump_certificate(crypto.FILETYPE_ASN1, chain[0])
        return Identity(self._shown.facts, tuple(links), own, complete)

    def _judge(self, good: int, address: int) -> bool:
        """Whether to go on: called by OpenSSL for each certificate, and for each fault."""
        store_context = ffi.cast(_STORE_CONTEXT, address)
        finding = lib.X509_STORE_CTX_get_error(store_context)
        depth = lib.X509_STORE_CTX_get_error_depth(store_context)
        if self._shown is None and not self._read_own(store_context):
            return self._refuse(store_context, "malformed", _BAD_CERTIFICATE)
        assert self._shown is not None
        facts = self._shown.facts
        if self._keys_only:
            if not allows(self._allow, facts):
                return self._refuse(store_context, "unknown_key", _BAD_CERTIFICATE)
            lib.X509_STORE_CTX_set_error(store_context, lib.X509_V_OK)
            self._accepted = True
            return True
        if not good:
            words = ffi.string(lib.X509_verify_cert_error_string(finding)).decode()
            reason, alert = _FINDINGS.get(finding, ("rejected", None))
            where = f" (certificate {depth + 1} of its chain)" if depth else ""
            return self._refuse(store_context, f"{reason}: {words}{where}", alert)
        # OpenSSL goes from the authority to the client's own certificate, which comes last.
        if not depth:
            if not allows(self._allow, facts):
                return self._refuse(store_context, "not_allowed", _BAD_CERTIFICATE)
            self._accepted = True
        return True

    def _refuse(self, store_context: object, reason: str, alert: int | None) -> bool:
        self._refused = self._refused or reason
        self._accepted = False
        if alert is not None:
            lib.X509_STORE_CTX_set_error(store_context, alert)
        return False

    def _read_own(self, store_context: object) -> bool:
        """Read the client's own certificate, for the record too; returns whether that can be."""
        own = lib.X509_STORE_CTX_get0_cert(store_context)
        lib.X509_up_ref(own)
        try:
            self._shown = shown = _read(crypto.X509._from_raw_x509_ptr(own))
        except _UNREADABLE:
            return False
        if self._report is not None:
            self._report.set(
                certificate_subject=shown.subject,
                certificate_issuer=shown.issuer,
                certificate_serial=shown.serial,
                certificate_spki=f"sha256:{shown.facts.spki}",
            )
        return True


@cache
def _store(authorities: str, revocations: str) -> crypto.X509Store:
    """What certificates are verified with: one for all virtual hosts with the same files."""
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
        with suppress(*_UNREADABLE):
            _read(own)
    return store


def _read(own: crypto.X509) -> _Shown:
    """Raises one of _UNREADABLE."""
    certificate = own.to_cryptography()
    return _Shown(
        facts_of(certificate),
        certificate.subject.rfc4514_string(),
        certificate.issuer.rfc4514_string(),
        f"{certificate.serial_number:x}",
    )
