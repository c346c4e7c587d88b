"""A tunnel's server: whether it is whom it should be, by its certificate.

The fork server puts what a tunnel asks for into its context; workers inherit it. OpenSSL verifies
in the worker, which opens no file for it and makes no other system call. There is no way to leave
it out: without an authority, or a key that is known, no context is made. Imported only for tunnels.
The certificate is the server's, and hostile until it was judged.
"""

import socket
from collections.abc import Collection
from contextlib import suppress

from OpenSSL import SSL
from OpenSSL._util import ffi, lib

from titus_py.between.report import ReportWriter
from titus_py.worker import verification
from titus_py.worker.peer_certificate import (
    BAD_CERTIFICATE,
    CALLBACK,
    STORE_CONTEXT,
    UNREADABLE,
    Shown,
    finding_of,
    read_own,
    trust,
)

__all__ = ["ServerVerifier", "packed_address"]

_OTHER_NAME = (lib.X509_V_ERR_HOSTNAME_MISMATCH, lib.X509_V_ERR_IP_ADDRESS_MISMATCH)


class ServerVerifier:
    """What one tunnel asks of its server; in a worker, of the certificate that was shown.

    With ``authorities``, OpenSSL verifies the chain and the name. With ``pins``, the server's own
    key is one of these. With both, both hold. With pins alone, nothing else in the certificate
    counts: whoever has the key could write it anew.
    """

    def __init__(self, authorities: str, pins: Collection[str], server_name: str | None) -> None:
        if not (authorities or pins) or (authorities and server_name is None):
            raise ValueError("a tunnel to a server that nothing is known of")
        self._authorities = authorities
        self._pins = frozenset(pins)
        self._server_name = server_name
        self._report: ReportWriter | None = None
        self._shown: Shown | None = None
        self._accepted = False
        #: Why the certificate was refused.
        self.refused = ""

    def demand(self, context: SSL.Context) -> None:
        """Have a context verify its servers. Raises SSL.Error."""
        # pyOpenSSL's method would make a callback of its own.
        lib.SSL_CTX_set_verify(context._context, SSL.VERIFY_PEER, CALLBACK)
        if not self._authorities or self._server_name is None:
            return
        trust(context, self._authorities)
        parameters = lib.SSL_CTX_get0_param(context._context)
        address = packed_address(self._server_name)
        if address is not None:
            set_it = lib.X509_VERIFY_PARAM_set1_ip(parameters, address, len(address))
        else:
            name = self._server_name.encode()
            # A wildcard is a whole label, and a common name is no name (RFC 9525 §6.3, §6.4.4).
            flags = lib.X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS
            flags |= lib.X509_CHECK_FLAG_NEVER_CHECK_SUBJECT
            lib.X509_VERIFY_PARAM_set_hostflags(parameters, flags)
            set_it = lib.X509_VERIFY_PARAM_set1_host(parameters, name, len(name))
        SSL._openssl_assert(set_it == 1)

    def begin(self, report: ReportWriter) -> None:
        """Judge the certificate of this process's connection, whose handshake is about to begin."""
        self._report = report
        verification.ask(self._judge)

    def is_satisfied(self, connection: SSL.Connection) -> bool:
        """Whether the server has shown a certificate that was accepted, once the handshake is done.

        Asked again of what OpenSSL has kept: no octet may pass because a callback was not called.
        """
        return (
            self._accepted
            and not self.refused
            and lib.SSL_get_verify_result(connection._ssl) == lib.X509_V_OK
            and connection.get_peer_certificate() is not None
        )

    def _judge(self, good: int, address: int) -> bool:
        """Whether to go on: called by OpenSSL for each certificate, and for each fault."""
        store_context = ffi.cast(STORE_CONTEXT, address)
        if self._shown is None:
            try:
                self._shown = read_own(store_context)
            except UNREADABLE:
                return self._refuse(store_context, "malformed", BAD_CERTIFICATE)
            if self._report is not None:
                self._shown.record(self._report)
        if self._authorities and not good:
            if lib.X509_STORE_CTX_get_error(store_context) in _OTHER_NAME:
                reason = f"name_mismatch: it is not for {self._server_name}"
                return self._refuse(store_context, reason, None)
            return self._refuse(store_context, *finding_of(store_context))
        # OpenSSL goes from the authority to the server's own certificate, which comes last.
        if self._authorities and lib.X509_STORE_CTX_get_error_depth(store_context):
            return True
        if self._pins and self._shown.facts.spki not in self._pins:
            reason = "pin_mismatch: its key is none of those in pins"
            return self._refuse(store_context, reason, BAD_CERTIFICATE)
        if not self._authorities:
            lib.X509_STORE_CTX_set_error(store_context, lib.X509_V_OK)
        self._accepted = True
        return True

    def _refuse(self, store_context: object, reason: str, alert: int | None) -> bool:
        self.refused = self.refused or reason
        self._accepted = False
        if alert is not None:
            lib.X509_STORE_CTX_set_error(store_context, alert)
        return False


def packed_address(name: str) -> bytes | None:
    """A numeric address, 4 or 16 octets; None for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            return socket.inet_pton(family, name)
    return None
