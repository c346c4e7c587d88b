"""Which public keys there are in a file, or which ones a TLS server shows: reads them.

Run by ``titus-py keys``, as root or as anybody: a process of its own, for one answer. What it
reads may be a stranger's. So it first gives up everything but two descriptors, to read from and to
answer on:

    python -m titus_py.commands.pin_reader SERVER CHROOT ANSWER SOURCE

SERVER is "no" for a file. For a server it is "tls", or "postgresql" if it is first asked for TLS in
the clear, then a colon and the name to ask it for. The answer is JSON, one packet: ``keys``, a list
of [SHA-256 of the SubjectPublicKeyInfo, whose it is, until when it is valid]; ``left_out``, how
many there are beyond MOST_KEYS; ``problem``.
"""

import base64
import hashlib
import json
import os
import re
import resource
import signal
import socket
import sys
from contextlib import suppress

import prctl
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)
from OpenSSL import SSL

from keyd.chain import UNREADABLE as OF_CERTIFICATES
from keyd.linux import landlock, seccomp
from keyd.linux.credentials import (
    become,
    enter_empty_root,
    forbid_core_dumps,
    forbid_regaining,
    hide_memory,
    keep_capabilities,
    limit,
)
from keyd.linux.namespaces import leave_namespaces
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWUTS
from keyd.making import self_signed
from keyd.pem import Damaged, blocks
from keyd.system_calls import MEMORY
from keyd.words import end_at_the_unforeseen
from titus_py.between.postgresql import NO, SSL_REQUEST, YES
from titus_py.commands.pins import MOST_KEYS
from titus_py.worker.certificate_facts import public_key_id

__all__ = ["UNREADABLE", "CannotRead", "keys_of_file", "main"]

_MAX_FILE_OCTETS = 1024 * 1024
_MAX_TEXT = 200
#: nobody's (Debian Policy §9.2.2): no file needs to belong to this process.
_NOBODY = 65534
_LIMITS = {
    resource.RLIMIT_AS: 1 << 30,
    resource.RLIMIT_NPROC: 0,
    resource.RLIMIT_NOFILE: 16,
    resource.RLIMIT_FSIZE: 0,
}
_CERTIFICATES = ("CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE")
_PUBLIC_KEYS = ("PUBLIC KEY", "RSA PUBLIC KEY")
#: What the library raises for what it cannot read: keys as well as certificates.
UNREADABLE = (*OF_CERTIFICATES, TypeError)
_PRIVATE = (
    "has a private key in it, which is not read: name the file of its certificate, or take that "
    "out of it (openssl x509 -in FILE -out CERTIFICATE)"
)
_ANYHOW: tuple[tuple[seccomp.Only, ...], ...] = ((),)
_ALLOWED: seccomp.Rules = {
    # The file or the server; the answer; a last word on standard error.
    "read": _ANYHOW,
    "write": _ANYHOW,
    "sendto": _ANYHOW,
    "close": _ANYHOW,
    **MEMORY,
    # OpenSSL: to see whether it was forked, for entropy, and for a client's random.
    "getpid": _ANYHOW,
    "getrandom": _ANYHOW,
    "clock_gettime": _ANYHOW,
    # Locks, and the end.
    "futex": _ANYHOW,
    "rt_sigreturn": _ANYHOW,
    "rt_sigprocmask": _ANYHOW,
    "exit_group": _ANYHOW,
}

#: A public key, whose it is, and until when that is certified.
_Key = tuple[str, str, str]


class CannotRead(Exception):
    """The text says what it is instead, and what to do."""


def main() -> None:
    """Confine this process, read, answer, and end it."""
    server, chroot, answer_fd, source_fd = sys.argv[1:]
    protocol, _, name = server.partition(":")
    answers, source = socket.socket(fileno=int(answer_fd)), int(source_fd)
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    peer = SSL.Connection(context, socket.socket(fileno=source)) if protocol != "no" else None
    _rehearse(context)
    _confine(chroot)
    keys: list[_Key] = []
    problem = ""
    try:
        if protocol == "postgresql":
            _ask_for_tls(source)
        keys = keys_of_file(source) if peer is None else _of_server(peer, name)
    except (CannotRead, OSError) as error:
        problem = str(error)
    except UNREADABLE as error:
        problem = f"a certificate or a key in it cannot be read: {error}"
    shown = [[key, whose[:_MAX_TEXT], until] for key, whose, until in keys[:MOST_KEYS]]
    answer = {"keys": shown, "left_out": len(keys) - len(shown), "problem": problem[:_MAX_TEXT]}
    answers.send(json.dumps(answer).encode())
    # The filter does not allow the calls that shut an interpreter down.
    os._exit(0)


def keys_of_file(descriptor: int) -> list[_Key]:
    """The certificates and public keys of a file, in its order. Raises CannotRead and others."""
    content = bytearray()
    while piece := os.read(descriptor, 65536):
        content += piece
        if len(content) > _MAX_FILE_OCTETS:
            raise CannotRead("is no file of certificates: it has more than a MiB")
    if b"PRIVATE KEY-----" in content:
        raise CannotRead(_PRIVATE)
    if b"-----BEGIN " in content:
        return _of_pem(bytes(content))
    return [_of_der(bytes(content))]


def _of_pem(content: bytes) -> list[_Key]:
    keys, labels = [], []
    try:
        for block in blocks(content):
            labels.append(block.label)
            if block.label in _CERTIFICATES:
                keys.append(_certified(x509.load_pem_x509_certificate(_plain(block.text))))
            elif block.label in _PUBLIC_KEYS:
                body = b"".join(block.text.split(b"\n")[1:-2])
                keys.append(_of_key(base64.b64decode(body)))
    except Damaged as error:
        raise CannotRead(f"is damaged in line {error.line}: {error.reason}") from None
    if not keys:
        raise CannotRead(f"has no certificate and no public key in it, but {', '.join(labels)}")
    return keys


def _plain(text: bytes) -> bytes:
    """The library knows these blocks by one name."""
    for label in _CERTIFICATES[1:]:
        text = text.replace(b" %s-----" % label.encode(), b" CERTIFICATE-----")
    return text


def _of_der(content: bytes) -> _Key:
    with suppress(*UNREADABLE):
        return _certified(x509.load_der_x509_certificate(content))
    with suppress(*UNREADABLE):
        return _of_key(content)
    if re.match(rb"\x30(?:[\0-\x7f]|\x81.|\x82..)\x02\x01", content, re.DOTALL):
        # Each form of a private key begins with the number of its version, of one octet.
        raise CannotRead(_PRIVATE)
    raise CannotRead("is neither a certificate nor a public key, in PEM or in DER")


def _ask_for_tls(source: int) -> None:
    """As PostgreSQL's clients do: one octet comes, in the clear. Raises CannotRead, OSError."""
    os.write(source, SSL_REQUEST)
    octet = os.read(source, 1)
    if octet == NO:
        raise CannotRead("no certificate was shown: the server has no TLS")
    if octet != YES:
        said = f"it says {octet!r}" if octet else "it has closed the connection"
        raise CannotRead(f"no certificate was shown: no server of PostgreSQL: {said}")


def _of_server(peer: SSL.Connection, name: str) -> list[_Key]:
    """The certificates that it shows. Raises CannotRead, and others for unreadable ones."""
    if name:
        peer.set_tlsext_host_name(name.encode())
    peer.set_connect_state()
    reason = ""
    try:
        peer.do_handshake()
    except SSL.Error as error:
        reason = _words(error)
    # One that asks for a client's certificate breaks a handshake of TLS 1.2 off, after its own.
    chain = peer.get_peer_cert_chain() or []
    if not chain:
        raise CannotRead(f"no certificate was shown: {reason or 'the server has none'}")
    return [_certified(one.to_cryptography()) for one in chain]


def _words(error: SSL.Error) -> str:
    """OpenSSL's own for what went wrong."""
    if isinstance(error, SSL.SysCallError):
        return "the server has closed the connection"
    if error.args and isinstance(error.args[0], list) and error.args[0]:
        return str(error.args[0][-1][-1])
    return "the server has ended the connection"


def _certified(certificate: x509.Certificate) -> _Key:
    until = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
    return public_key_id(certificate).hex(), certificate.subject.rfc4514_string(), until


def _of_key(der: bytes) -> _Key:
    """A SubjectPublicKeyInfo, which is taken as it is; or an RSA key of PKCS #1 (RFC 8017)."""
    key = load_der_public_key(der)
    if isinstance(key, rsa.RSAPublicKey) and der == key.public_bytes(
        Encoding.DER, PublicFormat.PKCS1
    ):
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest(), "", ""


def _rehearse(context: SSL.Context) -> None:
    """Load what is loaded late, from files that are out of reach by then."""
    first = SSL.Connection(context, None)
    first.set_connect_state()
    with suppress(SSL.WantReadError):
        first.do_handshake()
    certificate = self_signed("host.invalid", ec.generate_private_key(ec.SECP256R1()), 0)
    _of_pem(certificate)
    for unreadable in (b"", b"\x30\0"):
        with suppress(CannotRead):
            _of_der(unreadable)


def _confine(chroot: str) -> None:
    """Give up everything but what is open. Raises OSError."""
    program = seccomp.Program(seccomp.build(_ALLOWED))
    ruleset = landlock.make_ruleset() if landlock.version() else None
    forbid_core_dumps()
    if os.geteuid() == 0:
        leave_namespaces(CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
        last_needed = {prctl.CAP_SYS_CHROOT, prctl.CAP_SETUID, prctl.CAP_SETGID, prctl.CAP_SETPCAP}
        keep_capabilities(last_needed)
        enter_empty_root(chroot)
        forbid_regaining(last_needed)
        become(_NOBODY, _NOBODY)
    prctl.set_no_new_privs(1)
    # After become(): a change of uid resets both.
    hide_memory()
    prctl.set_pdeathsig(signal.SIGKILL)
    limit(_LIMITS)
    if ruleset is not None:
        landlock.restrict_self(ruleset)
        os.close(ruleset)
    end_at_the_unforeseen("titus-py")
    seccomp.install(program)


if __name__ == "__main__":
    main()
