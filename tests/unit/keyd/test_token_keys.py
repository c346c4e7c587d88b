"""keyd's side of a token: what its process says is decoded, verified and held against deadlines.

The test is the process.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from select import select

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from keyd.powers import ALL_POWERS, NotTLS, perform
from keyd.protocol import Operation, SignatureScheme
from keyd.token import keys, minder
from keyd.token.keys import States, Token, TokenKey
from keyd.token.messages import Answer, Down, Failure, Question, Ready

KEY = ec.generate_private_key(ec.SECP256R1())
SPKI = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
SCHEME = SignatureScheme.ecdsa_secp256r1_sha256
OCTETS = b"\x20" * 64 + b"TLS 1.3, server CertificateVerify\x00" + bytes(32)


class Process:
    """A token with one key, and the other end of its socket."""

    def __init__(self, public: ec.EllipticCurvePublicKey | None = None) -> None:
        ours, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)
        self.said: list[str] = []
        self.found: list[TokenKey] = []
        publics = [public]
        self.token = Token("web", ours, ["site"], publics, self.said.append, self.found.append)
        (self.key,) = self.token.keys

    def say(self, message: bytes) -> None:
        self.socket.send(message)
        assert not self.token.hear()

    def say_last(self, message: bytes) -> None:
        """And end, whatever is unread."""
        self.socket.send(message)
        self.socket.close()

    def question(self) -> Question:
        return Question.decode(self.socket.recv(1000))

    def sign(self) -> None:
        """Answer the next question rightly."""
        asked = self.question()
        form = ec.ECDSA(Prehashed(hashes.SHA256()))
        self.say(Answer(asked.number, KEY.sign(asked.digest, form)).encode())

    def log_in(self) -> None:
        self.say(Ready((SPKI,)).encode())
        self.sign()

    def ask(self) -> list[bytes | str]:
        """Where the answer will be, once there is one."""
        told: list[bytes | str] = []
        later = perform(Operation.SIGN, self.key, SCHEME, OCTETS, ALL_POWERS, None)
        assert not isinstance(later, bytes)
        later(told.append)
        return told


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process(KEY.public_key())
    yield process
    process.socket.close()
    process.token.socket.close()


def test_a_key_is_proved_before_it_is_used(process: Process) -> None:
    assert process.ask() == ["token web is starting"]
    process.say(Ready((SPKI,)).encode())
    assert process.ask() == ["token web: site is not proved yet"]
    process.sign()
    assert process.found == [process.key]
    assert process.said == ["token web: site is ready"]
    told = process.ask()
    process.sign()
    (signature,) = told
    assert isinstance(signature, bytes)
    KEY.public_key().verify(signature, OCTETS, ec.ECDSA(hashes.SHA256()))


def test_what_no_tls_server_signs_is_not_asked_for(process: Process) -> None:
    process.log_in()
    for scheme, octets in ((SCHEME, b"anything"), (SignatureScheme.rsa_pkcs1_sha256, OCTETS)):
        with pytest.raises(NotTLS):
            perform(Operation.SIGN, process.key, scheme, octets, ALL_POWERS, None)
    with pytest.raises(NotTLS, match="a key of another kind"):
        perform(Operation.DECRYPT, process.key, 0x0303, bytes(256), ALL_POWERS, None)
    with pytest.raises(BlockingIOError):
        process.question()


def test_a_signature_that_does_not_verify_is_given_to_nobody(process: Process) -> None:
    process.log_in()
    told = process.ask()
    other = ec.generate_private_key(ec.SECP256R1()).sign(OCTETS, ec.ECDSA(hashes.SHA256()))
    process.say(Answer(process.question().number, other).encode())
    assert told == ["token web: a signature that does not verify"]


@pytest.mark.parametrize("of_certificate", [True, False])
def test_another_key_than_the_certificates_is_not_used(of_certificate: bool) -> None:
    """By what the token says that it is; or, where it says nothing, by its signature."""
    process = Process(ec.generate_private_key(ec.SECP256R1()).public_key())
    process.say(Ready((SPKI if of_certificate else b"",)).encode())
    if not of_certificate:
        process.sign()
    (told,) = process.ask()
    assert isinstance(told, str)
    assert ("is not the key of its certificate" in told) == of_certificate
    assert ("a signature that does not verify" in told) != of_certificate
    assert process.found == []


def test_a_question_has_a_deadline_and_a_late_answer_is_for_nobody(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    process.log_in()
    states = States([process.token])
    assert states.news() == [("web", "ready")]
    monkeypatch.setattr(keys, "_DEADLINE_SECONDS", -1.0)
    told = process.ask()
    assert states.news() is None
    assert told == ["token web: no answer in time"]
    process.sign()
    assert len(told) == 1


def test_so_many_questions_wait_and_no_more(process: Process) -> None:
    process.log_in()
    waiting = [process.ask() for _ in range(keys._MOST_WAITING)]
    assert process.ask() == [f"token web has {keys._MOST_WAITING} questions to answer already"]
    assert not any(waiting)
    process.say(Failure(process.question().number, "MechanismInvalid").encode())
    assert waiting[0] == ["token web: MechanismInvalid"]
    assert process.ask() == []
    # All that wait are answered when it goes down, and the next ones at once.
    process.say(Down(False, "DeviceRemoved").encode())
    assert waiting[1:] == [["token web: DeviceRemoved"]] * (len(waiting) - 1)
    assert process.ask() == ["token web cannot be used: DeviceRemoved"]


def test_nonsense_is_logged_and_changes_nothing(process: Process) -> None:
    process.log_in()
    told = process.ask()
    for message in (b"X", b"A", Ready(()).encode(), Answer(1 << 40, b"nobody's").encode()):
        process.say(message)
    assert told == []
    process.sign()
    assert isinstance(told[0], bytes)


def test_what_clients_got_is_counted_and_logins(process: Process) -> None:
    states = States([process.token])
    assert states.counted() == {"web": [0, 0, 0]}
    process.ask()
    process.log_in()
    process.ask()
    process.sign()
    # The proof of a login is no client's.
    process.log_in()
    assert states.counted() == {"web": [1, 1, 2]}
    assert states.counted() is None


def test_an_empty_packet_is_nonsense_and_not_the_end(process: Process) -> None:
    process.log_in()
    process.say(b"")
    assert not process.token.down
    process.socket.close()
    assert process.token.hear()
    assert "its process has ended" in process.token.down


def test_the_same_trouble_is_said_once(process: Process) -> None:
    for _ in range(3):
        process.say(Down(False, "there is no such token").encode())
    assert process.said == ["token web cannot be used: there is no such token"]
    process.socket.close()
    assert process.token.hear()
    assert "needs keyd to be started anew" in process.said[-1]


def test_a_pin_that_was_not_taken_stays_the_reason(process: Process) -> None:
    """For its process's end, another keyd is started, which would try it again."""
    process.say(Down(True, "its PIN was not taken").encode())
    process.socket.close()
    assert process.token.hear()
    assert process.token.state == "cannot be used: its PIN was not taken"


def test_the_reason_is_heard_of_one_that_ends_with_a_question_unread(process: Process) -> None:
    process.log_in()
    told = process.ask()
    process.say_last(Down(True, "its PIN was not taken").encode())
    assert not process.token.hear()
    assert process.token.hear()
    assert told == ["token web: its PIN was not taken"]
    assert process.said[-1].startswith("token web cannot be used: its PIN was not taken; ")


class Scarce(socket.socket):
    """One that cannot receive, for once: no test has the kernel run out of memory."""

    error = 0

    def recv(self, *arguments: int) -> bytes:
        error, self.error = self.error, 0
        if error:
            raise OSError(error, os.strerror(error))
        return super().recv(*arguments)


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.ENOBUFS])
def test_a_machine_that_is_short_of_memory_ends_no_token(process: Process, error: int) -> None:
    ours = process.token.socket
    process.token.socket = scarce = Scarce(fileno=ours.detach())
    process.log_in()
    told = process.ask()
    process.socket.send(Failure(process.question().number, "said").encode())
    scarce.error = error
    assert not process.token.hear()
    assert not told
    assert not process.token.hear()
    assert told == ["token web: said"]
    assert process.said == ["token web: site is ready"]


@pytest.mark.parametrize(
    "message",
    [Ready((SPKI,)), Down(False, "pulled"), Failure(9, "of no question"), Answer(9, b"late")],
)
def test_a_process_that_floods_keyd_is_heard_no_more(
    process: Process,
    message: Ready | Down | Failure | Answer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keys, "_UNASKED_PER_SECOND", 0)
    process.log_in()
    told = process.ask()

    def is_last() -> bool:
        # What it is asked, to begin with.
        with suppress(BlockingIOError):
            while process.socket.recv(1000):
                pass
        process.socket.send(message.encode())
        return process.token.hear()

    heard = 0
    while heard < 1000 and not is_last():
        heard += 1
    assert heard == keys._MOST_UNASKED - 1
    why = "its process says too much unasked, and is heard no more"
    assert process.token.lasting
    assert process.token.state == f"cannot be used: {why}"
    assert len(told) == 1
    assert why in str(process.ask())
    # Nor by whoever did not know.
    process.socket.send(Ready((SPKI,)).encode())
    assert process.token.hear()
    assert process.token.down


def test_messages_with_thousands_of_keys_are_soon_a_flood(process: Process) -> None:
    """Reading one takes as long as a hundred others."""
    process.log_in()
    message = Ready((b"",) * 20_000).encode()
    for _ in range(keys._MOST_UNASKED):
        process.socket.send(message)
        if process.token.hear():
            break
    assert len(process.said) < 10
    assert process.token.lasting


def test_answers_to_what_another_process_was_asked_are_no_flood(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_UNASKED_PER_SECOND", 0)
    process.log_in()
    for _ in range(keys._MOST_WAITING):
        process.ask()
    process.say(Down(False, "crashed").encode())
    process.say(Ready((SPKI,)).encode())
    for _ in range(keys._MOST_WAITING):
        process.sign()
    process.sign()
    assert process.token.state == "ready"


def test_answers_to_questions_are_no_flood(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_UNASKED_PER_SECOND", 0)
    process.log_in()
    for _ in range(2 * keys._MOST_UNASKED):
        told = process.ask()
        process.sign()
        assert isinstance(told[0], bytes)


def of_many_keys(most: int) -> Process:
    process = Process()
    names = [str(number) for number in range(most)]
    process.token = Token(
        "web", process.token.socket, names, [None] * most, process.said.append, process.found.append
    )
    return process


def test_more_keys_are_proved_than_there_may_be_questions() -> None:
    """Those that were too many were not used before the next login."""
    process = of_many_keys(200)
    process.say(Ready((SPKI,) * 200).encode())
    for _ in range(200):
        process.sign()
    assert process.found == process.token.keys
    assert process.token.state == "ready"
    assert process.said == [f"token web: {number} is ready" for number in range(200)]


def test_clients_keep_no_key_from_being_proved() -> None:
    """They ask for the keys that are proved already, whenever there is room."""
    process = of_many_keys(40)

    def flood(key: TokenKey) -> None:
        process.found.append(key)
        process.key = process.token.keys[0]
        while not process.ask():
            pass

    process.token._found = flood
    process.say(Ready((SPKI,) * 40).encode())
    while len(process.found) < 40:
        process.sign()
    assert process.token.state == "ready"


def test_a_key_is_proved_once_there_is_room_to_ask_for_it() -> None:
    process = of_many_keys(10)
    process.token.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    states = States([process.token])
    process.say(Ready((SPKI,) * 10).encode())
    questions = []
    while len(questions) < 10:
        with suppress(BlockingIOError):
            while True:
                questions.append(process.question())
        assert {key.unusable for key in process.token.keys} == {"is not proved yet"}
        states.news()
    for asked in questions:
        form = ec.ECDSA(Prehashed(hashes.SHA256()))
        process.say(Answer(asked.number, KEY.sign(asked.digest, form)).encode())
    assert process.token.state == "ready"


def test_one_that_fails_while_keys_are_proved_proves_them_all_again() -> None:
    process = of_many_keys(100)
    process.say(Ready((SPKI,) * 100).encode())
    process.sign()
    process.say(Down(False, "it hung").encode())
    assert len(process.found) == 1
    assert process.said[-1] == "token web cannot be used: it hung"
    with suppress(BlockingIOError):
        while True:
            process.question()
    process.say(Ready((SPKI,) * 100).encode())
    for _ in range(100):
        process.sign()
    assert process.token.state == "ready"


class Waiting(socket.socket):
    """The process's end: while it waits for room, keyd goes on."""

    def __init__(self, process: Process) -> None:
        super().__init__(fileno=os.dup(process.socket.fileno()))
        self._hear = process.token.hear

    def send(self, octets: bytes, flags: int = 0) -> int:  # type: ignore[override]
        while not flags & socket.MSG_DONTWAIT:
            try:
                return super().send(octets, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._hear()
        return super().send(octets, flags)


def test_a_keyd_that_does_not_keep_up_learns_that_its_token_has_failed(process: Process) -> None:
    process.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    process.log_in()
    with suppress(BlockingIOError):
        while True:
            process.socket.send(Failure(7, "").encode())
    with Waiting(process) as end:
        minder._tell(end, Down(True, "it hung"))
    while select([process.token.socket], [], [], 0)[0]:
        process.token.hear()
    assert process.token.state == "cannot be used: it hung"
