"""Client certificates: asking for them, judging them, saying whose they are.

The fork server puts what a virtual host asks for into its context (``Verifier``); workers inherit
it. OpenSSL verifies in the worker, which opens no file for it and makes no other system call.
Imported only where a virtual host asks for client certificates. The certificate is the client's,
and hostile.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from OpenSSL import SSL, crypto
from OpenSSL._util import ffi, lib

from titus_py.between.client_allow import Facts, allows
from titus_py.between.client_identity import ClientTerms, Identity, Link
from titus_py.between.report import ReportWriter
from titus_py.worker import verification
from titus_py.worker.certificate_facts import name_id, public_key_id
from titus_py.worker.peer_certificate import (
    BAD_CERTIFICATE,
    CALLBACK,
    STORE_CONTEXT,
    UNREADABLE,
    Shown,
    finding_of,
    own_of,
    read_own,
    trust,
)
from titus_py.worker.tls import as_path

__all__ = ["Verifier"]

#: How OpenSSL names what goes wrong before there is a certificate to verify.
_WITHOUT_VERDICT = {
    "peer did not return a certificate": "no_certificate",
    "excessive message size": "too_long",
    # Something that OpenSSL cannot get over, without asking us.
    "certificate verify failed": "rejected",
}


#: The parent could not pass it on. That is for the client to mend, and no fault of a backend.
_TOO_LONG = "too_long: the certificate, or its names, cannot be passed on to the backend"


class Verifier:
    """What one virtual host asks of client certificates; in a worker, of the one that was shown.

    ``passed_on``: the backend is told which certificate it was.
    """

    def __init__(self, terms: ClientTerms, passed_on: bool = False) -> None:
        self._terms = terms
        self._passed_on = passed_on
        self._allow = terms.allowed
        #: Without authorities, the keys that are listed are all that counts.
        self._keys_only = not terms.authorities
        self._known: Callable[[Facts], int | None] = lambda _: None
        if terms.known:
            # Others do not need it in their memory.
            from titus_py.between.known_client import which

            self._known = partial(which, terms.known)
        self._report: ReportWriter | None = None
        self._shown: Shown | None = None
        self._refused = ""
        self._accepted = False

    def demand(self, context: SSL.Context) -> None:
        """Have a context ask its clients for certificates. Raises SSL.Error."""
        mode = SSL.VERIFY_PEER
        if self._terms.required:
            mode |= SSL.VERIFY_FAIL_IF_NO_PEER_CERT
        # pyOpenSSL's method would make a callback of its own.
        lib.SSL_CTX_set_verify(context._context, mode, CALLBACK)
        if self._keys_only:
            return
        trust(context, self._terms.authorities, self._terms.revocations)
        with as_path(self._terms.authorities) as path:
            # Named to the client, which may have certificates of several authorities.
            context.load_client_ca(path.encode())

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
            with suppress(*UNREADABLE):
                read = one.to_cryptography()
                links.append(Link(name_id(read.issuer), read.serial_number, public_key_id(read)))
        complete = self._keys_only or len(links) == len(chain)
        own = crypto.dump_certificate(crypto.FILETYPE_ASN1, chain[0])
        known = self._known(self._shown.facts)
        return Identity(self._shown.facts, tuple(links), own, complete, known)

    def _judge(self, good: int, address: int) -> bool:
        """Whether to go on: called by OpenSSL for each certificate, and for each fault."""
        store_context = ffi.cast(STORE_CONTEXT, address)
        depth = lib.X509_STORE_CTX_get_error_depth(store_context)
        if self._shown is None and not self._read_own(store_context):
            return self._refuse(store_context, "malformed", BAD_CERTIFICATE)
        assert self._shown is not None
        facts = self._shown.facts
        if self._keys_only:
            if not allows(self._allow, facts):
                return self._refuse(store_context, "unknown_key", BAD_CERTIFICATE)
            if not self._can_be_passed_on(store_context, facts):
                return self._refuse(store_context, _TOO_LONG, BAD_CERTIFICATE)
            lib.X509_STORE_CTX_set_error(store_context, lib.X509_V_OK)
            self._accepted = True
            return True
        if not good:
            return self._refuse(store_context, *finding_of(store_context))
        # OpenSSL goes from the authority to the client's own certificate, which comes last.
        if not depth:
            if not allows(self._allow, facts):
                return self._refuse(store_context, "not_allowed", BAD_CERTIFICATE)
            if not self._can_be_passed_on(store_context, facts):
                return self._refuse(store_context, _TOO_LONG, BAD_CERTIFICATE)
            self._accepted = True
        return True

    def _can_be_passed_on(self, store_context: object, facts: Facts) -> bool:
        """Whether it is short enough, if that is to be. Few links there are in any case."""
        if not self._passed_on:
            return True
        certificate = crypto.dump_certificate(crypto.FILETYPE_ASN1, own_of(store_context))
        return Identity(facts, (), certificate).fits

    def _refuse(self, store_context: object, reason: str, alert: int | None) -> bool:
        self._refused = self._refused or reason
        self._accepted = False
        if alert is not None:
            lib.X509_STORE_CTX_set_error(store_context, alert)
        return False

    def _read_own(self, store_context: object) -> bool:
        """Read the client's own certificate, for the record too; returns whether that can be."""
        try:
            self._shown = read_own(store_context)
        except UNREADABLE:
            return False
        if self._report is not None:
            self._shown.record(self._report)
        return True
