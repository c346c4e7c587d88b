"""keyd's side of a token: questions to its process, and what comes of them.

Run by keyd's threads, and by ``keyd check``. What is asked has passed keyd's grammar. The process
has the vendor's module in it and is trusted with nothing but its own keys: its messages are
decoded strictly, and a signature is given to nobody before it has been verified. Nothing here
waits: an answer is an event of its own, and a question without one has a deadline.
"""

import itertools
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keyd.linux.descriptors import if_any
from keyd.linux.unix_socket import has_ended
from keyd.powers import KeyElsewhere, Told
from keyd.protocol import SignatureScheme
from keyd.reference import UnsupportedKey, key_id, kind_of_key, reference_pem
from keyd.token.messages import (
    MAX_MESSAGE_OCTETS,
    ORPHANED,
    UNUSABLE,
    Answer,
    Down,
    Nonsense,
    Question,
    Ready,
    decode,
)

__all__ = ["PublicKey", "States", "Token", "TokenKey", "hear_first", "rehearse_verifying"]

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
#: How long a question may wait for its answer. A client's handshake may take longer.
_DEADLINE_SECONDS = 5.0
#: How long a key's proof may take, and how many keys of a token are proved at once.
_PROOF_SECONDS, _MOST_PROVED = 30.0, 32
#: How long a start waits for tokens. One that takes longer is used once it is there.
_FIRST_SECONDS = 10.0
#: How many questions may wait in one token: more would not be answered in time by a slow one.
_MOST_WAITING = 64
#: How many messages a process may send unasked, a second and in a row: what it says when it begins
#: and when it fails, late answers, nonsense. One that takes the place of another, a second later,
#: finds the questions that the other one has left, and whose answers are for nobody now.
_UNASKED_PER_SECOND, _MOST_UNASKED = _MOST_WAITING, 4 * _MOST_WAITING
#: How much of a state is told to the supervisor: all tokens' go into one message.
_TOLD_CHARACTERS = 300
_PROOF = b"keyd asks whether this key is the one of its certificate"
_DIGESTS: dict[str, hashes.HashAlgorithm] = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}


class _Waiting(NamedTuple):
    deadline: float
    told: Told


class TokenKey(KeyElsewhere):
    """A key in a token: its public part, and the way to ask for a signature.

    ``public`` is None until the token has said it. ``unusable`` says why it is not used; the token
    may be down besides.
    """

    def __init__(self, token: "Token", number: int, name: str, public: PublicKey | None) -> None:
        self._token = token
        self._number = number
        self.name = name
        self.public = public
        self.unusable = ""

    @property
    def full_name(self) -> str:
        """With its token's: no path of a file, which begins with ``/``."""
        return f"{self._token.name}: {self.name}"

    def public_key(self) -> PublicKey:
        if self.public is None:
            raise LookupError(f"the public key of {self.name} is not known yet")
        return self.public

    def ask(self, scheme: SignatureScheme, octets: bytes, told: Told) -> None:
        told = self._token.counting(told)
        if self.unusable:
            told(f"{self.full_name} {self.unusable}")
        elif why := self._ask(scheme, octets, told, _DEADLINE_SECONDS, _MOST_WAITING):
            told(f"{self._token.name} {why}")

    def prove(self, told: Told) -> bool:
        """Have a signature made that no client asked for; returns whether that can be asked now."""
        scheme = _scheme_for(self.public_key())
        # Beside all that clients can ask: else they could keep keys from being proved.
        most = _MOST_WAITING + _MOST_PROVED
        return not self._ask(scheme, _PROOF, told, _PROOF_SECONDS, most)

    def _ask(
        self, scheme: SignatureScheme, octets: bytes, told: Told, seconds: float, most: int
    ) -> str:
        """Returns why that cannot be asked."""
        digest = hashes.Hash(_digest(scheme))
        digest.update(octets)
        checked = partial(self._verify, scheme, octets, told)
        return self._token.ask(self._number, scheme, digest.finalize(), checked, seconds, most)

    def _verify(
        self, scheme: SignatureScheme, octets: bytes, told: Told, said: bytes | str
    ) -> None:
        if isinstance(said, bytes) and not _verifies(self.public_key(), scheme, octets, said):
            said = f"{self._token.name}: a signature that does not verify"
        told(said)


class Token:
    """One token's process, as keyd sees it.

    ``names`` are its keys, in the order that the process knows. ``public_keys`` are their public
    parts, where certificates tell them. ``say`` is told each change of its state, for the log;
    ``found`` gets each key that can be used from now on.
    """

    def __init__(
        self,
        name: str,
        process: socket.socket,
        names: Sequence[str],
        public_keys: Sequence[PublicKey | None],
        say: Callable[[str], None],
        found: Callable[[TokenKey], None],
    ) -> None:
        self.name = f"token {name}"
        self.socket = process
        self.keys = [
            TokenKey(self, number, key, public)
            for number, (key, public) in enumerate(zip(names, public_keys, strict=True))
        ]
        #: Why it cannot be used; empty while it can.
        self.down = "is starting"
        #: Whether it will not be tried again.
        self.lasting = False
        self.starting = True
        #: How many signatures clients got and did not get; and how often it was logged in to.
        self.signed = self.failed = self.logins = 0
        self._say = say
        self._found = found
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        #: Keys that are to be proved, and how many are being.
        self._unproved: deque[TokenKey] = deque()
        self._proofs = 0
        #: Messages that came unasked, less those that each second has; and when that was counted.
        self._unasked, self._counted = 0.0, time.monotonic()

    def counting(self, told: Told) -> Told:
        """``told``, and the answer is counted."""

        def count(said: bytes | str) -> None:
            with self._lock:
                if isinstance(said, bytes):
                    self.signed += 1
                else:
                    self.failed += 1
            told(said)

        return count

    def ask(
        self, key: int, scheme: int, digest: bytes, told: Told, seconds: float, most: int
    ) -> str:
        """Have a digest signed; ``told`` is called once, by this thread or by another.

        Returns why that cannot be asked now, ``most`` questions waiting, perhaps; then it is not
        called.
        """
        deadline = time.monotonic() + seconds
        with self._lock:
            why = self.down
            if not why and len(self._waiting) >= most:
                why = f"has {most} questions to answer already"
            if not why:
                number = next(self._numbers)
                question = Question(number, key, scheme, int(deadline * 1000), digest)
                try:
                    self.socket.send(question.encode(), socket.MSG_DONTWAIT)
                    self._waiting[number] = _Waiting(deadline, told)
                except OSError as error:
                    why = f"cannot be asked: {error.strerror}"
        return why

    def hear(self) -> bool:
        """Take one message of the process, if there is one.

        Returns whether that was the last: it has ended, or is heard no more.
        """
        if self._unasked > _MOST_UNASKED:
            return True
        message = if_any(lambda: self.socket.recv(MAX_MESSAGE_OCTETS + 1, socket.MSG_DONTWAIT), b"")
        if message is None:
            return False
        if not message and has_ended(self.socket):
            if not self.lasting:
                # Otherwise a PIN that was not taken would be tried again.
                self._take_down(Down(True, ORPHANED.removeprefix(UNUSABLE)))
            return True
        try:
            said = decode(message)
        except Nonsense as error:
            self._say(f"{self.name}: {error}")
            return self._says_too_much()
        if isinstance(said, Down):
            self._take_down(said)
        elif isinstance(said, Ready):
            self._take_up(said)
        elif told := self._taken(said.number):
            told(said.signature if isinstance(said, Answer) else f"{self.name}: {said.why}")
            return False
        # Reading keys takes time, too: it comes once a second, where processes replace one another.
        keys = len(said.keys) if isinstance(said, Ready) else 0
        return self._says_too_much(max(1, min(keys, _UNASKED_PER_SECOND)))

    def _says_too_much(self, count: int = 1) -> bool:
        """Count a message that was not asked for; one that floods keyd takes time from all keys."""
        now = time.monotonic()
        left = max(0.0, self._unasked - _UNASKED_PER_SECOND * (now - self._counted))
        self._unasked = left + count
        self._counted = now
        if self._unasked <= _MOST_UNASKED:
            return False
        self._take_down(Down(True, "its process says too much unasked, and is heard no more"))
        return True

    def expire(self) -> None:
        """Answer questions that have waited for too long. About once a second."""
        now = time.monotonic()
        with self._lock:
            late = [number for number, one in self._waiting.items() if one.deadline < now]
            waited = [self._waiting.pop(number) for number in late]
        for one in waited:
            one.told(f"{self.name}: no answer in time")
        self._prove_more()

    @property
    def state(self) -> str:
        """How it is, in words."""
        if self.down:
            return self.down
        troubled = [f"{key.name} {key.unusable}" for key in self.keys if key.unusable]
        return "; ".join(troubled) or "ready"

    def _taken(self, number: int) -> Told | None:
        with self._lock:
            waiting = self._waiting.pop(number, None)
        return waiting.told if waiting is not None else None

    def _take_down(self, said: Down) -> None:
        with self._lock:
            before, self.down = self.down, f"{UNUSABLE}{said.why}"
            self.lasting = said.lasting
            self.starting = False
            self._unproved.clear()
            waited = list(self._waiting.values())
            self._waiting.clear()
        if self.down != before:
            end = "; it is not tried again before a reload or a restart" if said.lasting else ""
            self._say(f"{self.name} {self.down}{end}")
        for one in waited:
            one.told(f"{self.name}: {said.why}")

    def _take_up(self, said: Ready) -> None:
        """Have each key proved, before any client has it used."""
        if len(said.keys) != len(self.keys):
            self._say(f"{self.name}: {len(said.keys)} keys, and not {len(self.keys)}")
            return
        for key, told in zip(self.keys, said.keys, strict=True):
            key.unusable = told if isinstance(told, str) else _why_not(key, told)
        candidates = [key for key in self.keys if not key.unusable]
        with self._lock:
            self.down = ""
            self.logins += 1
            self._unproved = deque(candidates)
        for key in candidates:
            key.unusable = "is not proved yet"
        self._prove_more()
        if not candidates:
            self._tell_ready()

    def _prove_more(self) -> None:
        """Have keys proved, as many as there is room for; the others' turn comes later."""
        while True:
            with self._lock:
                if not self._unproved or self._proofs >= _MOST_PROVED:
                    return
                key = self._unproved.popleft()
                self._proofs += 1
            if not key.prove(partial(self._prove, key)):
                with self._lock:
                    self._proofs -= 1
                    if not self.down:
                        self._unproved.appendleft(key)
                return

    def _prove(self, key: TokenKey, said: bytes | str) -> None:
        key.unusable = "" if isinstance(said, bytes) else f"is not used: {said}"
        with self._lock:
            self._proofs -= 1
            last = not (self.down or self._unproved or self._proofs)
        if not key.unusable:
            self._found(key)
        if last:
            self._tell_ready()
        else:
            self._prove_more()

    def _tell_ready(self) -> None:
        self.starting = False
        for key in self.keys:
            self._say(f"{self.name}: {key.name} {key.unusable or 'is ready'}")


class States:
    """How all tokens are. What is called once a second."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tokens
        self._told: list[tuple[str, str]] = []
        self._counted: dict[str, list[int]] = {}

    def news(self) -> list[tuple[str, str]] | None:
        """Each token's name and its state, if anything has changed since the last call.

        Questions that have waited for too long are answered.
        """
        for token in self._tokens:
            token.expire()
        now = self.all()
        if now == self._told:
            return None
        self._told = now
        return now

    def all(self) -> list[tuple[str, str]]:
        """Each token's name and its state."""
        return [(_told_name(token), token.state[:_TOLD_CHARACTERS]) for token in self._tokens]

    def counts(self) -> dict[str, list[int]]:
        """By token's name: signatures, failures and logins since keyd's start."""
        found: dict[str, list[int]] = {}
        for token in self._tokens:
            before = found.get(_told_name(token), (0, 0, 0))
            counts = token.signed, token.failed, token.logins
            found[_told_name(token)] = list(map(sum, zip(before, counts, strict=True)))
        return found

    def counted(self) -> dict[str, list[int]] | None:
        """The same, if anything has changed since the last call."""
        now = self.counts()
        if now == self._counted:
            return None
        self._counted = now
        return now


def _told_name(token: Token) -> str:
    return token.name.removeprefix("token ")[:_TOLD_CHARACTERS]


def hear_first(tokens: Iterable[Token]) -> None:
    """Hear each token's process until it has said how it is, for a while at most."""
    deadline = time.monotonic() + _FIRST_SECONDS
    poll = select.poll()
    by_descriptor = {token.socket.fileno(): token for token in tokens}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    while any(token.starting for token in by_descriptor.values()):
        left = deadline - time.monotonic()
        if left <= 0:
            return
        for descriptor, _ in poll.poll(left * 1000):
            token = by_descriptor[descriptor]
            token.hear()
            if not token.starting:
                poll.unregister(descriptor)


def rehearse_verifying() -> None:
    """Verify once with each kind of key: in keyd's empty root, nothing can be loaded any more."""
    spki = ec.derive_private_key(1, ec.SECP256R1()).public_key()
    for public in (rsa.RSAPublicNumbers(65537, (1 << 2048) - 1).public_key(), spki):
        for scheme in SignatureScheme:
            if scheme.name.startswith("rsa" if isinstance(public, rsa.RSAPublicKey) else "ecdsa"):
                _verifies(public, scheme, b"", b"\x01" * 256)
    with suppress(ValueError, UnsupportedAlgorithm):
        load_der_public_key(b"\x30\x00")


def _why_not(key: TokenKey, octets: bytes) -> str:
    """Take a key's public part from what the token says; returns why it cannot be used."""
    if not octets:
        if key.public is None:
            return "has no public key and no certificate beside it in the token: import one"
        return ""
    try:
        public = load_der_public_key(octets)
        reference_pem(public)
    except UnsupportedKey as error:
        return f"is {error}"
    except (ValueError, UnsupportedAlgorithm) as error:
        return f"has a public key that cannot be read: {error}"
    if not isinstance(public, PublicKey):
        return f"is {kind_of_key(public)}: RSA and ECDSA are served from tokens"
    if key.public is not None and key_id(key.public) != key_id(public):
        return "is not the key of its certificate"
    key.public = public
    return ""


def _scheme_for(public: PublicKey) -> SignatureScheme:
    """What a TLS server signs with at least: with RSA, TLS 1.3 takes PSS."""
    if isinstance(public, rsa.RSAPublicKey):
        return SignatureScheme.rsa_pss_rsae_sha256
    return SignatureScheme.ecdsa_secp256r1_sha256


def _digest(scheme: SignatureScheme) -> hashes.HashAlgorithm:
    return _DIGESTS[scheme.name[-6:]]


def _verifies(public: PublicKey, scheme: SignatureScheme, octets: bytes, signature: bytes) -> bool:
    algorithm = _digest(scheme)
    try:
        if isinstance(public, ec.EllipticCurvePublicKey):
            public.verify(signature, octets, ec.ECDSA(algorithm))
        elif scheme.name.startswith("rsa_pkcs1"):
            public.verify(signature, octets, padding.PKCS1v15(), algorithm)
        else:
            form = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
            public.verify(signature, octets, form, algorithm)
    except (InvalidSignature, ValueError):
        return False
    return True
