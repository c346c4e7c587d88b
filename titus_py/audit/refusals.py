"""Asking keyd for what it must refuse, and for the one signature that it must make.

Run by ``titus-py audit``, as root. It borrows the parent's socket to keyd
(pidfd_getfd(2)) to open channels of its own, each for one signature with one key. On them
it asks as a worker could that an attacker controls. Each refusal is in the instance's log,
under a number that no client's connection ever has (``announcement``).
"""

import base64
import ctypes
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509 import Certificate, PublicKeyAlgorithmOID

from keyd.protocol import (
    ANY_NAME,
    MAX_REPLY_OCTETS,
    Grant,
    Grants,
    GrantSet,
    Malformed,
    Open,
    Operation,
    Power,
    Reply,
    Request,
    SignatureScheme,
    Status,
)
from keyd.reference import key_id
from titus_py.audit.announcement import OF_ANOTHER_VERSION, UNANNOUNCED
from titus_py.audit.finding import Finding, Seen, Subject, Verdict, broken, holds, not_available
from titus_py.audit.instance import Role
from titus_py.audit.observation import Observation, Scene

__all__ = ["ask_keyd"]

_LIFETIME_MS = 10_000
_TIMEOUT = 5.0
_SIGN = frozenset({Power.SIGN_TLS12, Power.SIGN_TLS13})
_SYS_PIDFD_GETFD = 438
#: What the client asks for that the audit makes up.
_NAME = "audit.invalid"

_Key = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


class _Keyd:
    """The parent's socket to keyd, borrowed."""

    def __init__(self, control: socket.socket, connection: int) -> None:
        self._control = control
        self._connection = connection

    def open(
        self,
        grants: Grants | tuple[Grant, ...],
        lifetime_ms: int = _LIFETIME_MS,
        client_hello: bytes | None = None,
    ) -> socket.socket:
        """Open a channel with these grants: for any name, if they are for none.

        It is for a client that has sent this message, by default one that is made up.
        """
        if not isinstance(grants, tuple):
            grants = tuple(Grant(0, ANY_NAME, key, powers) for key, powers in grants.items())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_TIMEOUT)
        # The parent numbers its own sets from 0. Each audit uses the same number for the same set.
        (octets,) = GrantSet(0, grants).encode()
        number = int.from_bytes(hashlib.sha256(octets).digest()[:4]) | 1 << 31
        (octets,) = GrantSet(number, grants).encode()
        if client_hello is None:
            client_hello = _client_hello()
        terms = Open(self._connection, lifetime_ms, 1, number, client_hello)
        with theirs:
            self._control.send(octets)
            socket.send_fds(self._control, [terms.encode()], [theirs.fileno()])
        return ours


def ask_keyd(scene: Scene, certificate: Certificate | None, connection: int) -> Iterator[Finding]:
    """Findings about keyd's answers, for the key of this certificate; None: it is not known.

    ``connection`` is the number that keyd's refusals are logged under.
    """
    keyd = scene.newest(Role.KEYD)
    if keyd is None:
        return
    if connection == OF_ANOTHER_VERSION:
        reason = "it is of another version than this audit: restart titus-py, if it was upgraded"
        yield from _not_asked(keyd, reason)
        return
    if certificate is None:
        yield from _not_asked(keyd, "the certificate in the file is not the one that is served")
        return
    if certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        yield from _not_asked(keyd, "the certificate's key is bound to PSS, which is not asked for")
        return
    key = certificate.public_key()
    if not isinstance(key, _Key):
        return
    borrowed = _borrow_control(scene, keyd)
    if borrowed is None:
        yield from _not_asked(keyd, "the parent's socket to keyd was not to be had")
        return
    yield _announced(keyd, connection)
    with closing(borrowed):
        way = _Keyd(borrowed, connection)
        yield from _sign_once(way, keyd, key)
        for name, promised, operation, payload in _REFUSALS:
            request = Request(operation, _parameter(operation, key), key_id(key), payload())
            yield _finding(name, promised, keyd, _refused(way, key, request, Status.NOT_TLS))
        yield from _other_terms(way, keyd, key)


def _not_asked(keyd: Observation, reason: str) -> Iterator[Finding]:
    for name, promised, *_ in _REFUSALS:
        yield _finding(name, promised, keyd, not_available(reason))


def _announced(keyd: Observation, connection: int) -> Finding:
    if connection == UNANNOUNCED:
        text = "its supervisor could not be told: they are alarms, keyd_refused of connection 0"
        seen = not_available(text)
    else:
        seen = holds(f"they are in the log as audit_refused of connection {connection}")
    return Finding(
        "announced",
        Subject.of(keyd.process),
        "what keyd refuses to this audit rings no alarm",
        "announced to the supervisor, by its control socket",
        seen.text,
        seen.verdict,
    )


def _borrow_control(scene: Scene, keyd: Observation) -> socket.socket | None:
    """The parent's socket to keyd: the one whose other end keyd holds."""
    held = set(keyd.sockets.values())
    for parent in scene.of(Role.PARENT):
        for number, inode in parent.sockets.items():
            unix = scene.unix(inode)
            # A channel that was on its way to a worker passes here, but is closed by now.
            if unix is None or unix.kind != socket.SOCK_SEQPACKET or unix.peer not in held:
                continue
            descriptor = _get_descriptor(parent.pid, number)
            if descriptor is None:
                continue
            borrowed = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=descriptor)
            if os.fstat(descriptor).st_ino == inode:
                return borrowed
            borrowed.close()
    return None


def _get_descriptor(pid: int, number: int) -> int | None:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        descriptor: int = libc.syscall(_SYS_PIDFD_GETFD, process, number, 0)
    finally:
        os.close(process)
    return descriptor if descriptor >= 0 else None


# --- what it must sign ----------------------------------------------------------


def _client_hello() -> bytes:
    """The message of a client of TLS 1.3 that asks for ``_NAME`` (RFC 8446 §4.1.2)."""
    name = b"\x00" + len(_NAME).to_bytes(2, "big") + _NAME.encode()
    server_name = len(name).to_bytes(2, "big") + name
    extensions = b"\x00\x00" + len(server_name).to_bytes(2, "big") + server_name
    extensions += b"\x00\x2b\x00\x03\x02\x03\x04"  # supported_versions
    body = b"\x03\x03" + secrets.token_bytes(32) + b"\x00\x00\x02\x13\x01\x01\x00"
    body += len(extensions).to_bytes(2, "big") + extensions
    return b"\x01" + len(body).to_bytes(3, "big") + body


def _flight() -> bytes:
    """A server's messages up to its Certificate, which nobody looks into (RFC 8446 §4)."""
    server_hello = b"\x03\x03" + secrets.token_bytes(32) + b"\x00\x13\x01\x00"
    messages = (2, server_hello), (8, b"\x00\x00"), (11, secrets.token_bytes(4))
    return b"".join(bytes((kind,)) + len(body).to_bytes(3, "big") + body for kind, body in messages)


def _certificate_verify(transcript: bytes = b"") -> bytes:
    """What a TLS 1.3 server signs (RFC 8446 §4.4.3) after these messages, or after any others."""
    transcript_hash = hashlib.sha256(transcript).digest() if transcript else secrets.token_bytes(32)
    return b"\x20" * 64 + b"TLS 1.3, server CertificateVerify\x00" + transcript_hash


def _server_key_exchange() -> bytes:
    """What a TLS 1.2 server signs (RFC 8422 §5.4), for X25519, and likewise.

    It lacks the mark with which a server that speaks TLS 1.3, too, ends its random (RFC 8446
    §4.1.3).
    """
    return secrets.token_bytes(64) + b"\x03\x00\x1d\x20" + secrets.token_bytes(32)


def _sign_once(way: _Keyd, keyd: Observation, key: _Key) -> Iterator[Finding]:
    """The control: one signature; then a second request on the same channel."""
    hello, flight = _client_hello(), _flight()
    with closing(way.open(_sign_only(key), client_hello=hello)) as channel:
        octets = _certificate_verify(hello + flight)
        request = Request(Operation.SIGN, _scheme(key), key_id(key), octets, flight)
        reply = _ask(channel, request.encode())
        done = isinstance(reply, Reply) and reply.status is Status.DONE
        if isinstance(reply, Reply) and done and _verifies(key, reply.payload, octets):
            signed = holds(
                f"signed ({_scheme(key).name}), and the certificate's key says so: an attacker in "
                "a worker has as much, once, for the ClientHello that its client has sent"
            )
        else:
            signed = broken(f"no signature that verifies: {_words(reply)}")
        yield _finding("signs", "signs a TLS 1.3 CertificateVerify (the control)", keyd, signed)
        second = not_available("there was no first one")
        if done:
            reply = _ask(channel, request.encode())
            second = _judge(reply, Status.EXHAUSTED)
        yield _finding("refuses_second", "one operation for a connection, no more", keyd, second)


def _scheme(key: _Key) -> SignatureScheme:
    match key:
        case rsa.RSAPublicKey():
            return SignatureScheme.rsa_pss_rsae_sha256
        case ec.EllipticCurvePublicKey():
            return {
                "secp256r1": SignatureScheme.ecdsa_secp256r1_sha256,
                "secp384r1": SignatureScheme.ecdsa_secp384r1_sha384,
                "secp521r1": SignatureScheme.ecdsa_secp521r1_sha512,
            }[key.curve.name]
        case ed25519.Ed25519PublicKey():
            return SignatureScheme.ed25519


def _verifies(key: _Key, signature: bytes, octets: bytes) -> bool:
    try:
        match key:
            case rsa.RSAPublicKey():
                digest = hashes.SHA256()
                form = padding.PSS(padding.MGF1(digest), digest.digest_size)
                key.verify(signature, octets, form, digest)
            case ec.EllipticCurvePublicKey():
                algorithms = {
                    "secp256r1": hashes.SHA256(),
                    "secp384r1": hashes.SHA384(),
                    "secp521r1": hashes.SHA512(),
                }
                key.verify(signature, octets, ec.ECDSA(algorithms[key.curve.name]))
            case ed25519.Ed25519PublicKey():
                key.verify(signature, octets)
    except InvalidSignature:
        return False
    return True


# --- what it must refuse --------------------------------------------------------


def _to_be_signed_certificate() -> bytes:
    """The beginning of a TBSCertificate (RFC 5280 §4.1), in DER: version 3, a serial number."""
    content = bytes.fromhex("a003020102") + b"\x02\x10\x01" + secrets.token_bytes(15)
    content += bytes.fromhex("300a06082a8648ce3d040302") + b"\x30\x00" * 20
    return b"\x30\x82" + len(content).to_bytes(2, "big") + content


def _token() -> bytes:
    """The part of a JSON Web Token that is signed (RFC 7515 §5.1)."""
    parts = {"alg": "ES256", "typ": "JWT"}, {"sub": "administrator", "exp": 4_102_444_800}
    texts = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
    return b".".join(texts)


def _ssh_exchange_hash() -> bytes:
    """What an SSH server's key signs (RFC 4253 §8)."""
    return hashlib.sha256(b"SSH-2.0-audit").digest()


def _ciphertext() -> bytes:
    return b"\x01" * 256


#: Requests that a channel's terms allow: only their octets are wrong.
_REFUSALS: tuple[tuple[str, str, Operation, Callable[[], bytes]], ...] = (
    ("refuses_certificate", "does not sign a certificate", Operation.SIGN,
     _to_be_signed_certificate),
    ("refuses_token", "does not sign a JSON Web Token", Operation.SIGN, _token),
    ("refuses_ssh", "does not sign an SSH exchange hash", Operation.SIGN, _ssh_exchange_hash),
)  # fmt: skip


def _other_terms(way: _Keyd, keyd: Observation, key: _Key) -> Iterator[Finding]:
    """Requests that a channel's terms do not allow, and a message that is no request."""
    sign = Request(Operation.SIGN, _scheme(key), key_id(key), _certificate_verify())
    decrypt = Request(Operation.DECRYPT, 0x0303, key_id(key), _ciphertext())
    yield _finding(
        "refuses_decrypt",
        "does not decrypt for a connection that may only have something signed",
        keyd,
        _refused(way, key, decrypt, Status.NOT_GRANTED),
    )
    yield _finding(
        "refuses_version",
        "signs for the TLS versions of the connection's virtual hosts, and no other; for both of "
        "them with the mark of a downgrade",
        keyd,
        _other_versions(way, key),
    )
    with closing(way.open({secrets.token_bytes(32): _SIGN})) as channel:
        seen = _judge(_ask(channel, sign.encode()), Status.NOT_GRANTED)
    yield _finding("refuses_other_key", "does not sign with a key of another listener", keyd, seen)
    others = Grant(0, _NAME, secrets.token_bytes(32), _SIGN), Grant(1, ANY_NAME, key_id(key), _SIGN)
    with closing(way.open(others)) as channel:
        seen = _judge(_ask(channel, sign.encode()), Status.NOT_GRANTED)
    promised = "does not sign with the key of a virtual host that the client has not asked for"
    yield _finding("refuses_other_site", promised, keyd, seen)
    with closing(way.open(_sign_only(key), client_hello=b"")) as channel:
        seen = _judge(_ask(channel, sign.encode()), Status.UNWITNESSED)
    promised = "does not sign for a client whose ClientHello the parent has not seen"
    yield _finding("refuses_unseen", promised, keyd, seen)
    with closing(way.open(_sign_only(key))) as channel:
        another = sign._replace(messages=_flight())
        seen = _judge(_ask(channel, another.encode()), Status.NOT_TLS)
    promised = "does not sign for another handshake than the one whose messages it has had"
    yield _finding("refuses_other_handshake", promised, keyd, seen)
    with closing(way.open(_sign_only(key))) as channel:
        message = bytes([99]) + sign.encode()[1:]
        seen = _judge(_ask(channel, message), Status.MALFORMED)
    yield _finding("refuses_malformed", "answers nothing but requests", keyd, seen)
    with closing(way.open(_sign_only(key), lifetime_ms=1)) as channel:
        time.sleep(0.05)
        seen = _judge(_ask(channel, sign.encode()), Status.EXPIRED)
    yield _finding("refuses_late", "does nothing after the handshake's time is up", keyd, seen)


#: What virtual hosts of one version, or of both, have signed; and what is none of that.
_OTHER_VERSIONS: tuple[tuple[frozenset[Power], str, Callable[[], bytes]], ...] = (
    (frozenset({Power.SIGN_TLS13}), "TLS 1.2", _server_key_exchange),
    (frozenset({Power.SIGN_TLS13, Power.SIGN_TLS12_MARKED}), "TLS 1.2, unmarked",
     _server_key_exchange),
    (frozenset({Power.SIGN_TLS12}), "TLS 1.3", _certificate_verify),
)  # fmt: skip


def _other_versions(way: _Keyd, key: _Key) -> Seen:
    """Requests of TLS versions that the channel is not for."""
    for powers, name, payload in _OTHER_VERSIONS:
        request = Request(Operation.SIGN, _scheme(key), key_id(key), payload())
        with closing(way.open({key_id(key): powers})) as channel:
            seen = _judge(_ask(channel, request.encode()), Status.NOT_GRANTED)
        if seen.verdict is not Verdict.HOLDS:
            return broken(f"{name}: {seen.text}")
    return seen


def _parameter(operation: Operation, key: _Key) -> int:
    del operation
    return _scheme(key)


def _sign_only(key: PublicKeyTypes) -> dict[bytes, frozenset[Power]]:
    return {key_id(key): _SIGN}


def _refused(way: _Keyd, key: _Key, request: Request, status: Status) -> Seen:
    with closing(way.open(_sign_only(key))) as channel:
        return _judge(_ask(channel, request.encode()), status)


def _ask(channel: socket.socket, message: bytes) -> Reply | str:
    """keyd's reply, or what happened in its place, in words."""
    try:
        channel.send(message)
        answer = channel.recv(MAX_REPLY_OCTETS + 1)
    except TimeoutError:
        return "no answer"
    except OSError as error:
        # keyd hung up before we were done.
        return error.strerror or "hung up"
    if not answer:
        return "hung up"
    try:
        return Reply.decode(answer)
    except Malformed as error:
        return str(error)


def _judge(reply: Reply | str, status: Status) -> Seen:
    if isinstance(reply, Reply):
        refused = reply.status is status and not reply.payload
        return holds(f"refused: {_words(reply)}") if refused else broken(_words(reply))
    # keyd may hang up on an expired channel before it gets the request.
    return holds(reply) if status is Status.EXPIRED and reply != "no answer" else broken(reply)


def _words(reply: Reply | str) -> str:
    if isinstance(reply, str):
        return reply
    if reply.status is Status.DONE:
        return f"done: {len(reply.payload)} octets came back"
    return reply.status.name.lower().replace("_", " ")


def _finding(name: str, promised: str, keyd: Observation, seen: Seen) -> Finding:
    how = "asked, on a channel of our own that may sign once with one key"
    return Finding(name, Subject.of(keyd.process), promised, how, seen.text, seen.verdict)
