"""keyd gone, slow, refusing or talking nonsense: an error that says so, never a crash or hang.

All of it under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from keyd.protocol import (
    MAX_PAYLOAD_OCTETS,
    PREMASTER_SECRET_OCTETS,
    Operation,
    Reply,
    Request,
    SignatureScheme,
    Status,
)

from .support import (
    CERTIFICATE_VERIFY,
    Harness,
    Keyd,
    Servers,
    Site,
    StartHarness,
    configure,
    connect,
    keyds_answer,
    servers,
)

DIGEST = {"rsa": "SHA256", "p256": "SHA256", "p384": "SHA384", "p521": "SHA512", "ed25519": "-"}
CIPHERTEXT = bytes(range(256))
TIMEOUT = 0.2
#: Far from any timeout, and far from never.
SOON = 20.0


def _always(reply: bytes | None, _: bytes) -> bytes | None:
    return reply


@pytest.fixture
def harness(start_harness: StartHarness, bad_keyd: Keyd) -> Iterator[Harness]:
    """A harness whose keyd is the bad one."""
    with start_harness(f"socket = {bad_keyd.path}") as running:
        yield running


@pytest.fixture
def impatient(start_harness: StartHarness, bad_keyd: Keyd) -> Iterator[Harness]:
    """The same, and it does not wait for long."""
    with start_harness(f"socket = {bad_keyd.path}", "timeout_ms = 200") as running:
        yield running


# --- what is asked -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site_name", "digest", "padding", "salt", "scheme"),
    [
        ("rsa", "SHA256", "-", "-", "rsa_pkcs1_sha256"),
        ("rsa", "SHA384", "1", "-", "rsa_pkcs1_sha384"),
        ("rsa", "SHA2-512", "1", "-", "rsa_pkcs1_sha512"),
        ("rsa", "SHA256", "6", "-1", "rsa_pss_rsae_sha256"),
        ("rsa", "SHA384", "6", "48", "rsa_pss_rsae_sha384"),
        ("rsa", "SHA512", "6", "-", "rsa_pss_rsae_sha512"),
        ("rsa-pss", "SHA256", "-", "-1", "rsa_pss_pss_sha256"),
        ("rsa-pss", "SHA384", "6", "-1", "rsa_pss_pss_sha384"),
        ("rsa-pss", "SHA512", "6", "64", "rsa_pss_pss_sha512"),
        ("p256", "SHA256", "-", "-", "ecdsa_secp256r1_sha256"),
        ("p521", "SHA384", "-", "-", "ecdsa_secp384r1_sha384"),
        ("p384", "SHA512", "-", "-", "ecdsa_secp521r1_sha512"),
        ("ed25519", "-", "-", "-", "ed25519"),
    ],
)
def test_a_signing_request(
    harness: Harness,
    bad_keyd: Keyd,
    sites: dict[str, Site],
    site_name: str,
    digest: str,
    padding: str,
    salt: str,
    scheme: str,
) -> None:
    site = sites[site_name]
    signature = os.urandom(site.signature_octets)
    bad_keyd.answer = lambda _: Reply(Status.DONE, signature).encode()
    harness.load(site.reference.read_bytes())

    outcome = harness.sign(digest, CERTIFICATE_VERIFY, padding, salt)

    assert outcome == f"ok {signature.hex()}"
    asked = SignatureScheme[scheme]
    expected = Request(Operation.SIGN, asked, site.key_id, CERTIFICATE_VERIFY)
    assert [Request.decode(request) for request in bad_keyd.requests] == [expected]


def test_a_decryption_request(harness: Harness, bad_keyd: Keyd, sites: dict[str, Site]) -> None:
    secret = os.urandom(PREMASTER_SECRET_OCTETS)
    bad_keyd.answer = lambda _: Reply(Status.DONE, secret).encode()
    harness.load(sites["rsa"].reference.read_bytes())

    assert harness.decrypt(CIPHERTEXT, 0x0302) == f"ok {secret.hex()}"

    expected = Request(Operation.DECRYPT, 0x0302, sites["rsa"].key_id, CIPHERTEXT)
    assert [Request.decode(request) for request in bad_keyd.requests] == [expected]


@pytest.mark.parametrize("length", [0, 1025, 2046])
def test_a_ciphertext_that_no_request_can_hold_is_one_of_another_length(
    harness: Harness, bad_keyd: Keyd, sites: dict[str, Site], length: int
) -> None:
    """For keyd to answer, with a random secret: the handshake goes on (RFC 5246 §7.4.7.1)."""
    secret = os.urandom(PREMASTER_SECRET_OCTETS)
    bad_keyd.answer = lambda _: Reply(Status.DONE, secret).encode()
    harness.load(sites["rsa"].reference.read_bytes())

    assert harness.decrypt(bytes(length)) == f"ok {secret.hex()}"

    expected = Request(Operation.DECRYPT, 0x0303, sites["rsa"].key_id, b"\0")
    assert [Request.decode(request) for request in bad_keyd.requests] == [expected]


@pytest.mark.parametrize(
    ("site_name", "command", "reason"),
    [
        ("rsa", "sign SHA1 - - - 00", "digest SHA1"),
        ("rsa", "sign SHA224 - - - 00", "digest SHA2-224|digest SHA224"),
        ("rsa", "sign MD5-SHA1 - - - 00", "digest MD5-SHA1"),
        ("rsa", "sign SHA256 3 - - 00", "padding 3"),
        ("rsa", "sign SHA256 5 - - 00", "padding 5"),
        ("rsa", "sign SHA256 6 20 - 00", "a PSS salt"),
        ("rsa", "sign SHA256 6 48 - 00", "a PSS salt"),
        ("rsa", "sign SHA256 6 -2 - 00", "a PSS salt"),
        ("rsa", "sign SHA256 6 -3 - 00", "a PSS salt"),
        ("rsa", "sign SHA256 6 -1 SHA512 00", "two different digests"),
        ("rsa", "sign SHA256 6 -1 SHA1 00", "digest SHA1"),
        ("rsa-pss", "sign SHA256 1 - - 00", "PKCS#1 v1.5"),
        ("p256", "sign SHA1 - - - 00", "digest SHA1"),
        ("p256", "sign SHA3-256 - - - 00", "digest SHA3-256"),
        ("ed25519", "sign SHA512 - - - 00", "Ed25519 or ML-DSA with digest"),
        ("rsa", "sign SHA256 - - - -", "0 octets"),
        ("rsa", "sign SHA256 - - - " + "00" * 1025, "1025 octets"),
        ("rsa", "decrypt 1 0x303 00", "outside the TLS RSA key exchange"),
        ("rsa", "decrypt 3 0x303 00", "outside the TLS RSA key exchange"),
        ("rsa", "decrypt 4 0x303 00", "outside the TLS RSA key exchange"),
        ("rsa", "decrypt - 0x303 00", "outside the TLS RSA key exchange"),
        ("rsa", "decrypt 7 0 00", "outside the TLS RSA key exchange"),
        ("rsa", "decrypt 7 0x10303 00", "a bad TLS version"),
        ("rsa", "decrypt 7 0xffffffff 00", "a bad TLS version"),
        ("rsa-pss", "decrypt 7 0x303 00", "a key that is not RSA"),
        ("p256", "decrypt 7 0x303 00", "not supported"),
    ],
)
def test_what_is_not_tls_is_not_even_asked(
    harness: Harness,
    bad_keyd: Keyd,
    sites: dict[str, Site],
    site_name: str,
    command: str,
    reason: str,
) -> None:
    bad_keyd.answer = lambda _: Reply(Status.DONE, bytes(256)).encode()
    harness.load(sites[site_name].reference.read_bytes())

    outcome = harness.ask(command)

    assert outcome.startswith("failed")
    assert any(part in outcome for part in reason.split("|")), outcome
    assert bad_keyd.requests == []


# --- what is answered ----------------------------------------------------------------


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.DONE])
def test_a_refusal_names_its_reason(
    harness: Harness, bad_keyd: Keyd, sites: dict[str, Site], status: Status
) -> None:
    bad_keyd.answer = lambda _: Reply(status).encode()
    harness.load(sites["rsa"].reference.read_bytes())
    reason = {"not_tls": "not TLS"}.get(status.name.lower(), status.name.lower().replace("_", " "))

    outcomes = harness.sign("SHA256"), harness.decrypt(CIPHERTEXT)

    expected = f"[keyd|refused: {reason}|keyd: refused: {reason}]"
    for outcome in outcomes:
        assert outcome.startswith(f"failed {expected}")


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (b"", "gone"),
        (b"\x01", "a reply of 1 octets"),
        (b"\x00\x00" + bytes(256), "version 0, status 0"),
        (b"\x02\x00" + bytes(256), "version 2, status 0"),
        (b"\x01\x09", "version 1, status 9"),
        (b"\x01\xff" + bytes(256), "version 1, status 255"),
        (b"\x01\x00", "a signature of 0 octets"),
        (b"\x01\x00" + bytes(255), "a signature of 255 octets"),
        (b"\x01\x00" + bytes(257), "more than 256 octets"),
        (b"\x01\x00" + bytes(100_000), "more than 256 octets"),
        (b"\x01\x05" + bytes(257), "more than 256 octets"),
    ],
)
def test_a_nonsensical_reply(
    harness: Harness, bad_keyd: Keyd, sites: dict[str, Site], reply: bytes, complaint: str
) -> None:
    bad_keyd.answer = lambda _: reply
    harness.load(sites["rsa"].reference.read_bytes())

    outcome = harness.sign("SHA256")

    assert outcome.startswith("failed [keyd|")
    assert complaint in outcome


@pytest.mark.parametrize("length", [0, 1, 47, 49, 256, 1024])
def test_a_premaster_secret_is_of_48_octets(
    harness: Harness, bad_keyd: Keyd, sites: dict[str, Site], length: int
) -> None:
    bad_keyd.answer = lambda _: Reply(Status.DONE, bytes(length)).encode()
    harness.load(sites["rsa"].reference.read_bytes())

    assert harness.decrypt(CIPHERTEXT).startswith("failed [keyd|nonsensical answer|")


REPLIES = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda head, payload: head + payload,
        st.binary(max_size=2) | st.sampled_from([b"\x01\x00"] * 4 + [b"\x01\x07"]),
        st.integers(0, MAX_PAYLOAD_OCTETS + 40).map(bytes)
        | st.sampled_from([48, 63, 64, 65, 71, 72, 73, 255, 256, 257]).map(bytes),
    ),
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(site_name=st.sampled_from(sorted(DIGEST)), reply=REPLIES)
@example(site_name="p256", reply=b"\x01\x00" + bytes(72))
@example(site_name="p256", reply=b"\x01\x00" + bytes(7))
def test_any_reply(
    harness: Harness, bad_keyd: Keyd, sites: dict[str, Site], site_name: str, reply: bytes
) -> None:
    """Only what looks like an answer passes for one, whatever keyd sends."""
    site = sites[site_name]
    bad_keyd.answer = lambda _: reply
    harness.load(site.reference.read_bytes())

    outcomes = {Operation.SIGN: harness.sign(DIGEST[site_name])}
    lengths = range(site.signature_octets, site.signature_octets + 1)
    if site.type == "EC":
        lengths = range(8, site.signature_octets + 1)
    if site.type == "RSA":
        outcomes[Operation.DECRYPT] = harness.decrypt(CIPHERTEXT)
    for operation, outcome in outcomes.items():
        if operation is Operation.DECRYPT:
            lengths = range(PREMASTER_SECRET_OCTETS, PREMASTER_SECRET_OCTETS + 1)
        if reply[:2] == b"\x01\x00" and len(reply) - 2 in lengths:
            assert outcome == f"ok {reply[2:].hex()}"
        else:
            assert outcome.startswith("failed [keyd|")


# --- gone and slow ---------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["connection refused", "no such socket"])
def test_no_keyd(
    start_harness: StartHarness, sites: dict[str, Site], tmp_path: Path, reason: str
) -> None:
    path = tmp_path / "nobody.sock"
    if reason == "connection refused":
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as closed:
            closed.bind(str(path))
    with start_harness(f"socket = {path}") as harness:
        harness.load(sites["rsa"].reference.read_bytes())
        outcome = harness.sign("SHA256")

    assert outcome.startswith(f"failed [keyd|keyd cannot be reached: {reason}|")
    assert str(path) in outcome


def test_keyd_is_not_for_this_user(
    start_harness: StartHarness, sites: dict[str, Site], tmp_path: Path
) -> None:
    path = tmp_path / "others.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0)
        # Root as well is somebody to whom a file's mode applies.
        without_override = ("setpriv", "--bounding-set=-dac_override")
        with start_harness(f"socket = {path}", run_by=without_override) as harness:
            harness.load(sites["rsa"].reference.read_bytes())
            outcome = harness.sign("SHA256")

    assert outcome.startswith("failed [keyd|keyd cannot be reached: permission denied|")
    assert str(path) in outcome


def test_no_channel_configured(start_harness: StartHarness, sites: dict[str, Site]) -> None:
    with start_harness() as harness:
        assert harness.load(sites["rsa"].reference.read_bytes()).startswith("ok RSA 2048")
        assert "no channel to keyd configured" in harness.sign("SHA256")


def test_silence_is_waited_for_only_so_long(
    impatient: Harness, bad_keyd: Keyd, sites: dict[str, Site]
) -> None:
    bad_keyd.answer = lambda _: None
    impatient.load(sites["rsa"].reference.read_bytes())

    operations: list[Callable[[], str]] = [
        lambda: impatient.sign("SHA256"),
        lambda: impatient.decrypt(CIPHERTEXT),
    ]
    for operation in operations:
        started = time.monotonic()
        outcome = operation()
        waited = time.monotonic() - started

        assert outcome.startswith("failed [keyd|no answer in time|keyd: no answer in 200 ms]")
        assert TIMEOUT <= waited < SOON


def test_connecting_is_waited_for_only_so_long(
    start_harness: StartHarness, sites: dict[str, Site], tmp_path: Path
) -> None:
    path = tmp_path / "full.sock"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first,
    ):
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        with start_harness(f"socket = {path}", "timeout_ms = 200") as harness:
            harness.load(sites["rsa"].reference.read_bytes())
            started = time.monotonic()
            outcome = harness.sign("SHA256")
            waited = time.monotonic() - started

    assert "keyd: no answer in 200 ms" in outcome
    assert TIMEOUT <= waited < SOON


def test_sending_is_waited_for_only_so_long(
    start_harness: StartHarness, sites: dict[str, Site]
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                ours.send(bytes(1024))
        with start_harness(
            f"channel_fd = {ours.fileno()}", "timeout_ms = 200", pass_fds=(ours.fileno(),)
        ) as harness:
            harness.load(sites["rsa"].reference.read_bytes())
            assert "keyd: no answer in 200 ms" in harness.sign("SHA256")


def test_no_descriptor_is_left_open(
    impatient: Harness, bad_keyd: Keyd, sites: dict[str, Site]
) -> None:
    """A connection is kept only while all is well (test_connection.py)."""
    impatient.load(sites["rsa"].reference.read_bytes())
    replies = [None, b"", Reply(Status.DONE, bytes(256)).encode(), b"nonsense"]
    replies += [Reply(Status.DONE, bytes(256)).encode(), Reply(Status.FAILED).encode()]
    before = os.listdir(f"/proc/{impatient.process.pid}/fd")

    for reply in replies:
        bad_keyd.answer = partial(_always, reply)
        impatient.sign("SHA256")

    assert os.listdir(f"/proc/{impatient.process.pid}/fd") == before


@contextmanager
def disturbed(harness: Harness) -> Iterator[None]:
    """Send signals to it, many and fast."""
    done = threading.Event()

    def disturb() -> None:
        while not done.wait(0.005):
            harness.process.send_signal(signal.SIGUSR1)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        yield
    finally:
        done.set()
        disturber.join()


def test_signals_do_not_disturb(harness: Harness, bad_keyd: Keyd, sites: dict[str, Site]) -> None:
    signature = bytes(256)
    harness.load(sites["rsa"].reference.read_bytes())

    def answer_late(_: bytes) -> bytes:
        time.sleep(0.1)
        return Reply(Status.DONE, signature).encode()

    bad_keyd.answer = answer_late
    with disturbed(harness):
        assert harness.sign("SHA256") == f"ok {signature.hex()}"


def test_signals_do_not_prolong_the_wait(
    impatient: Harness, bad_keyd: Keyd, sites: dict[str, Site]
) -> None:
    impatient.load(sites["rsa"].reference.read_bytes())
    bad_keyd.answer = partial(_always, None)
    with disturbed(impatient):
        started = time.monotonic()
        assert "keyd: no answer in 200 ms" in impatient.sign("SHA256")
        assert time.monotonic() - started < SOON


# --- a channel that was there before -----------------------------------------------------


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])
def test_a_channel_is_used_and_left_alone(
    start_harness: StartHarness, bad_keyd: Keyd, sites: dict[str, Site], blocking: bool
) -> None:
    site = sites["rsa"]
    replies = [Reply(Status.DONE, os.urandom(256)) for _ in range(2)] + [Reply(Status.EXHAUSTED)]
    left = iter(replies)
    bad_keyd.answer = lambda _: next(left).encode()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def serve() -> None:
        for _ in replies:
            bad_keyd.answer_one(theirs)

    server = threading.Thread(target=serve)
    server.start()
    ours.setblocking(blocking)
    with ours, theirs:
        number = ours.fileno()
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
        with start_harness(f"channel_fd = {number}", pass_fds=(number,)) as harness:
            harness.load(site.reference.read_bytes())
            inode = os.stat(f"/proc/{harness.process.pid}/fd/{number}").st_ino
            outcomes = [harness.sign("SHA256") for _ in range(4)]
            # Still open, and still the same.
            assert os.stat(f"/proc/{harness.process.pid}/fd/{number}").st_ino == inode
        assert fcntl.fcntl(number, fcntl.F_GETFL) == flags
        server.join()

    assert outcomes[:2] == [f"ok {reply.payload.hex()}" for reply in replies[:2]]
    assert "[keyd|refused: exhausted|keyd: refused: exhausted]" in outcomes[2]
    # A refusal is the channel's end.
    assert "[keyd|keyd is gone|keyd: gone: " in outcomes[3]


def test_a_channel_closed_by_keyd(start_harness: StartHarness, sites: dict[str, Site]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        theirs.close()
        with start_harness(f"channel_fd = {ours.fileno()}", pass_fds=(ours.fileno(),)) as harness:
            harness.load(sites["rsa"].reference.read_bytes())
            assert "[keyd|keyd is gone|keyd: gone: Broken pipe]" in harness.sign("SHA256")


def test_a_channel_that_is_none(start_harness: StartHarness, sites: dict[str, Site]) -> None:
    with start_harness("channel_fd = 999") as harness:
        harness.load(sites["rsa"].reference.read_bytes())
        assert "[keyd|keyd is gone|keyd: gone: Bad file descriptor]" in harness.sign("SHA256")


def test_a_late_answer_is_not_taken_for_the_next(
    start_harness: StartHarness, sites: dict[str, Site]
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        with start_harness(
            f"channel_fd = {ours.fileno()}", "timeout_ms = 200", pass_fds=(ours.fileno(),)
        ) as harness:
            harness.load(sites["rsa"].reference.read_bytes())
            assert "keyd: no answer in 200 ms" in harness.sign("SHA256")
            theirs.settimeout(60)
            assert theirs.recv(2000)
            with pytest.raises(BrokenPipeError):
                theirs.send(Reply(Status.DONE, bytes(256)).encode())
            assert "[keyd|keyd is gone|" in harness.sign("SHA256")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("channel_fd = x", "no file descriptor"),
        ("channel_fd = -1", "no file descriptor"),
        ("channel_fd = 99999999999999999999", "no file descriptor"),
        ("channel_fd = 3\nsocket = /run/keyd.sock", "channel_fd and socket are both set"),
        ("socket = /" + 108 * "x", "empty or too long"),
        ("timeout_ms = 0", "not within 1 to"),
        ("timeout_ms = 10s", "not within 1 to"),
        ("timeout_ms = 86400001", "not within 1 to"),
    ],
)
def test_a_mistaken_configuration(
    start_harness: StartHarness, sites: dict[str, Site], setting: str, complaint: str
) -> None:
    """It is named when it matters, and does no harm to keys that are no references."""
    site = sites["rsa"]
    with start_harness(setting) as harness:
        for how in ("pem", "store"):
            outcome = harness.load(site.reference.read_bytes(), how)
            assert "[keyd|bad provider configuration|keyd: bad configuration: " in outcome
            assert complaint in outcome
            assert harness.load(site.key.read_bytes(), how).startswith("ok RSA")


# --- in a handshake, by the OpenSSL within cryptography ----------------------------------


@pytest.fixture
def failing_server(
    sanitized_provider_path: Path,
    sanitizer_preloaded: dict[str, str],
    bad_keyd: Keyd,
    sites: dict[str, Site],
    tmp_path: Path,
) -> Iterator[Servers]:
    channel = f"socket = {bad_keyd.path}", "timeout_ms = 3000"
    configuration = configure(tmp_path / "openssl.cnf", sanitized_provider_path, *channel)
    with servers(
        "pyopenssl", [sites["rsa"]], configuration, tmp_path / "log.txt", **sanitizer_preloaded
    ) as running:
        yield running


@pytest.mark.parametrize(
    "options",
    [["-tls1_3"], ["-tls1_2"], ["-tls1_2", "-cipher", "AES128-GCM-SHA256"]],
    ids=["1.3", "1.2", "1.2-rsa"],
)
def test_a_failed_handshake_says_why_and_the_next_one_works(
    failing_server: Servers,
    bad_keyd: Keyd,
    sites: dict[str, Site],
    options: list[str],
) -> None:
    site = sites["rsa"]
    port = failing_server.port(site)
    replies = {
        "keyd is gone": b"",
        "no answer in time": None,
        "nonsensical answer": os.urandom(400),
        "refused: exhausted": Reply(Status.EXHAUSTED).encode(),
    }
    for reason, reply in replies.items():
        bad_keyd.answer = partial(_always, reply)
        client = connect(port, site, *options)

        assert client.code != 0
        failing_server.wait_for(f"('keyd', '', '{reason}')")

    bad_keyd.answer = keyds_answer([site])
    assert connect(port, site, *options).code == 0
