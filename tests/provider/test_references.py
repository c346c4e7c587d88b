"""Reference files: what is taken for one, what is not, and what no one gets out of a key."""

import base64
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from keyd.reference import reference_pem

from .support import (
    Harness,
    Keyd,
    Site,
    StartHarness,
    configure,
    connect,
    environment,
    reference_text,
    servers,
)

ALL = ["rsa", "rsa-pss", "p256", "p384", "p521", "ed25519"]


@pytest.fixture
def harness(start_harness: StartHarness) -> Iterator[Harness]:
    with start_harness() as running:
        yield running


def content_of(reference: bytes) -> bytes:
    return base64.b64decode(b"".join(reference.splitlines()[1:-1]))


def text_of(content: bytes) -> bytes:
    return reference_text(base64.encodebytes(content))


def fields(*values: bytes) -> bytes:
    return b"".join(struct.pack("!H", len(value)) + value for value in values)


# --- what is taken -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pem", "store"])
@pytest.mark.parametrize("name", ALL)
def test_a_reference_is_a_key(
    harness: Harness, sites: dict[str, Site], name: str, how: str
) -> None:
    site = sites[name]
    bits = {"rsa": 2048, "rsa-pss": 3072, "p384": 384, "p521": 521}.get(name, 256)

    outcome = harness.load(site.reference.read_bytes(), how)

    assert outcome == f"ok {site.type} {bits} {site.signature_octets}"


def test_by_the_openssl_of_cryptography(python_harness: Harness, sites: dict[str, Site]) -> None:
    for name in ALL:
        assert python_harness.load(sites[name].reference.read_bytes()).startswith("ok ")


@pytest.mark.parametrize("how", ["pem", "store"])
@pytest.mark.parametrize(
    "form",
    [
        lambda reference, _: reference.replace(b"\n", b"\r\n"),
        lambda reference, _: b"# the key of localhost\n\n" + reference,
        lambda reference, _: b"x" * 1000 + b"\n" + reference + b"trailing\n",
        lambda reference, _: reference.rstrip(b"\n"),
        lambda reference, certificate: reference + certificate,
        lambda reference, certificate: certificate + reference,
        lambda reference, certificate: certificate + b"text\n" + certificate + reference,
    ],
    ids=["crlf", "comment", "long line", "no end", "then cert", "cert", "certs"],
)
def test_a_reference_among_other_things(
    harness: Harness, sites: dict[str, Site], form: object, how: str
) -> None:
    site = sites["p256"]
    assert callable(form)
    content = form(site.reference.read_bytes(), site.certificate.read_bytes())

    assert harness.load(content, how).startswith("ok EC 256")


@pytest.mark.parametrize("how", ["pem", "store"])
@pytest.mark.parametrize("name", ALL)
def test_other_keys_still_load(
    harness: Harness, sites: dict[str, Site], name: str, how: str
) -> None:
    site = sites[name]
    key, certificate = site.key.read_bytes(), site.certificate.read_bytes()
    pkcs8 = ["openssl", "pkcs8", "-topk8", "-passout", "pass:", "-in", str(site.key)]
    encrypted = subprocess.run(pkcs8, check=True, capture_output=True).stdout
    forms = [key, b"text\n" + key, certificate + key, key + certificate]
    if how == "pem":
        forms.append(encrypted)
    if name in ("rsa", "p256"):
        command = ["openssl", "pkey", "-traditional", "-in", str(site.key)]
        forms.append(subprocess.run(command, check=True, capture_output=True).stdout)
    for form in forms:
        assert harness.load(form, how).startswith(f"ok {site.type} ")


def test_a_key_is_itself_and_no_other(
    harness: Harness, sites: dict[str, Site], tmp_path: Path
) -> None:
    """Whichever of the two is a reference, or both are."""
    keys = [(name, path) for name in ALL for path in (sites[name].reference, sites[name].key)]
    for number in range(2):
        pem = tmp_path / f"{number}.ref"
        pem.write_bytes(reference_pem(ec.generate_private_key(ec.SECP256R1()).public_key()))
        keys.append((pem.name, pem))
    for name, path in keys:
        harness.load(path.read_bytes())
        for other_name, other_path in keys:
            outcome = harness.ask(f"equal {other_path.read_bytes().hex()}")
            assert (outcome == "ok 1") == (name == other_name), (path, other_path)


@pytest.mark.parametrize("name", ALL)
def test_parameters_keep_to_their_room(harness: Harness, sites: dict[str, Site], name: str) -> None:
    harness.load(sites[name].reference.read_bytes())

    assert harness.ask("room") == "ok"


def test_a_key_of_another_type_than_asked_for(harness: Harness, sites: dict[str, Site]) -> None:
    for name in ALL:
        content = content_of(sites[name].reference.read_bytes())
        for kind in ("RSA", "RSA-PSS", "EC", "ED25519"):
            outcome = harness.ask(f"content {kind} {content.hex()}")
            assert outcome.startswith("ok" if kind == sites[name].type else "failed")


@pytest.mark.parametrize("how", ["pem", "store"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\0",
        b"text\n",
        b"-----BEGIN ",
        b"-----BEGIN KEYD KEY REFERENCE----",
        b"-----BEGIN KEYD KEY REFERENCE-----X\n-----END KEYD KEY REFERENCE-----\n",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    ],
)
def test_what_is_no_reference_is_declined(harness: Harness, content: bytes, how: str) -> None:
    outcome = harness.load(content, how)

    assert outcome.startswith("failed")
    assert "keyd" not in outcome


# --- what is malformed -------------------------------------------------------------------

ID = bytes(32)
RSA_KEY = fields(b"\xc0" + bytes(254) + b"\x01", b"\x01\x00\x01")
P256 = b"prime256v1"


@pytest.mark.parametrize("how", ["pem", "store"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not a whole PEM block"),
        (b"\x01", "too short"),
        (b"\x01\x01" + ID[1:], "too short"),
        (b"\x02\x01" + ID + RSA_KEY, "an unknown version"),
        (b"\x01\x00" + ID + RSA_KEY, "an unknown type of key"),
        (b"\x01\x08" + ID + RSA_KEY, "an unknown type of key"),
        (b"\x01\x05" + ID + RSA_KEY, "not those of an ML-DSA key"),
        (b"\x01\x07" + ID + b"\x0a\x1f" + bytes(2591), "not those of an ML-DSA key"),
        (b"\x01\x01" + ID, "not those of an RSA key"),
        (b"\x01\x01" + ID + RSA_KEY[:-1], "not those of an RSA key"),
        (b"\x01\x04" + ID + RSA_KEY + b"\0", "not those of an RSA key"),
        (b"\x01\x01" + ID + fields(b"\x7f" + bytes(254) + b"\x01", b"\x03"), "2048 to 8192"),
        (b"\x01\x01" + ID + fields(b"\x00" + bytes(256) + b"\x01", b"\x03"), "2048 to 8192"),
        (b"\x01\x01" + ID + fields(b"\xc0" + bytes(256), b"\x03"), "an even RSA modulus"),
        (b"\x01\x01" + ID + fields(b"\xc1" * 257, b""), "RSA exponent"),
        (b"\x01\x01" + ID + fields(b"\xc1" * 257, b"\x00\x03"), "RSA exponent"),
        (b"\x01\x01" + ID + fields(b"\xc1" * 257, b"\x01"), "even or 1"),
        (b"\x01\x01" + ID + fields(b"\xc1" * 257, b"\x02"), "even or 1"),
        (b"\x01\x01" + ID + fields(b"\xc1" * 257, b"\x03" * 9), "RSA exponent"),
        (b"\x01\x01" + ID + fields(b"\xc1" * 1025, b"\x03"), "2048 to 8192"),
        (b"\x01\x01" + ID + bytes(3000), "not a whole PEM block"),
        (b"\x01\x02" + ID + fields(P256), "not those of an EC key"),
        (b"\x01\x02" + ID + fields(b"prime256v", b"\x04" * 65), "an unknown curve"),
        (b"\x01\x02" + ID + fields(b"secp256k1", b"\x04" * 65), "an unknown curve"),
        (b"\x01\x02" + ID + fields(P256, b"\x04" * 64), "uncompressed point"),
        (b"\x01\x02" + ID + fields(P256, b"\x02" * 65), "uncompressed point"),
        (b"\x01\x02" + ID + fields(P256, b"\x04" * 97), "uncompressed point"),
        (b"\x01\x03" + ID + fields(bytes(31)), "not those of an Ed25519 key"),
        (b"\x01\x03" + ID + fields(bytes(32), b""), "not those of an Ed25519 key"),
    ],
)
def test_a_malformed_reference_is_named(
    harness: Harness, content: bytes, complaint: str, how: str
) -> None:
    outcome = harness.load(text_of(content), how)

    assert outcome.startswith("failed")
    assert "[keyd|malformed key reference|keyd: malformed reference: " in outcome
    assert complaint in outcome


@pytest.mark.parametrize(
    "body",
    [
        b"!!!!\n",
        b"AQ==AQ==\n",
        b"AQI\n",
        b"AQI==\n",
        b"AR==\n",
        b"AQJ=\n",
        b"=\n",
        b"====\n",
        b"AAA\0\n",
        b"AAAA" * 100_000 + b"\n",
        b"AAAA\n" * 100_000,
    ],
    ids=lambda body: repr(body[:10]),
)
def test_base64_is_taken_strictly(harness: Harness, body: bytes) -> None:
    assert "malformed reference: not a whole PEM block" in harness.load(reference_text(body))


def test_an_unfinished_reference(harness: Harness, sites: dict[str, Site]) -> None:
    reference = sites["rsa"].reference.read_bytes()

    for length in range(34, len(reference) - 1):
        assert not harness.load(reference[:length]).startswith("ok")


# --- fuzzing -----------------------------------------------------------------------------


def accepts(content: bytes) -> bool:
    """The format, a second time."""
    if len(content) < 34 or content[0] != 1:
        return False
    rest, values = content[34:], []
    while rest:
        length = int.from_bytes(rest[:2], "big")
        if len(rest) < 2 + length:
            return False
        values.append(rest[2 : 2 + length])
        rest = rest[2 + length :]
    if content[1] in (1, 4) and len(values) == 2:
        n, e = (int.from_bytes(value, "big") for value in values)
        lengths = [(number.bit_length() + 7) // 8 for number in (n, e)]
        return (
            lengths == [len(value) for value in values]
            and 2048 <= n.bit_length() <= 8192
            and n % 2 == 1
            and e % 2 == 1
            and 3 <= e < 1 << 64
        )
    points = {b"prime256v1": 65, b"secp384r1": 97, b"secp521r1": 133}
    if content[1] == 2 and len(values) == 2:
        return points.get(values[0]) == len(values[1]) and values[1][0] == 4
    return content[1] == 3 and [len(value) for value in values] == [32]


@st.composite
def mutated(draw: st.DrawFn, original: bytes) -> bytes:
    """A few octets changed, lost, repeated or inserted."""
    octets = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(octets)))
        upto = min(len(octets), at + draw(st.sampled_from([0, 1, 1, 2, 64])))
        octets[at:upto] = draw(st.binary(max_size=3) | st.just(bytes(octets[at:upto] * 2)))
    return bytes(octets)


FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(data=st.data(), name=st.sampled_from(ALL))
def test_mutated_content(
    harness: Harness, sites: dict[str, Site], data: st.DataObject, name: str
) -> None:
    content = data.draw(mutated(content_of(sites[name].reference.read_bytes())))

    outcome = harness.load(text_of(content), data.draw(st.sampled_from(["pem", "store"])))

    assert outcome.startswith("ok") == accepts(content)
    if outcome.startswith("ok"):
        assert harness.ask("private") == "ok"
        assert harness.ask("copy").startswith(("ok", "failed"))


@FUZZ
@given(data=st.data(), name=st.sampled_from(ALL))
def test_mutated_text(
    harness: Harness, sites: dict[str, Site], data: st.DataObject, name: str
) -> None:
    text = data.draw(mutated(sites[name].reference.read_bytes()))

    for how in ("pem", "store"):
        assert harness.load(text, how).startswith(("ok", "failed"))


@FUZZ
@given(content=st.binary(max_size=400) | st.binary(max_size=400).map(lambda b: b"\x01\x03" + b))
@example(content=b"\x01\x03" + ID + fields(bytes(32)))
def test_content_without_its_pem(harness: Harness, content: bytes) -> None:
    """Other formats' octets pass by the second decoder: nothing happens."""
    assert harness.load(content, "store").startswith(("ok", "failed"))


@settings(FUZZ, max_examples=150)
@given(data=st.data(), name=st.sampled_from(ALL))
def test_mutated_text_by_the_openssl_of_cryptography(
    python_harness: Harness, sites: dict[str, Site], data: st.DataObject, name: str
) -> None:
    text = data.draw(mutated(sites[name].reference.read_bytes()))

    assert python_harness.load(text).startswith(("ok", "failed"))


# --- the private part --------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_no_call_of_libcrypto_gets_the_private_part(
    harness: Harness, sites: dict[str, Site], name: str
) -> None:
    harness.load(sites[name].reference.read_bytes())

    assert harness.ask("private") == "ok"
    assert harness.ask("copy") == "ok"
    assert harness.ask("private") == "ok"


@pytest.mark.parametrize("name", ALL)
def test_nor_does_pyopenssl(python_harness: Harness, sites: dict[str, Site], name: str) -> None:
    python_harness.load(sites[name].reference.read_bytes())

    assert python_harness.ask("private").startswith("failed Error(")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "command",
    ["pkey", "pkey -traditional", "pkey -outform DER", "pkcs8 -topk8 -nocrypt", "rsa", "ec"],
)
def test_nor_does_a_command(
    provider_path: Path, tmp_path: Path, sites: dict[str, Site], name: str, command: str
) -> None:
    configuration = configure(tmp_path / "openssl.cnf", provider_path)
    done = subprocess.run(
        ["openssl", *command.split(), "-in", str(sites[name].reference)],
        check=False,
        capture_output=True,
        env=environment(configuration),
    )

    assert done.returncode != 0
    assert done.stdout == b""


@pytest.mark.parametrize("name", ALL)
def test_the_public_part_is_anyones(
    provider_path: Path, tmp_path: Path, sites: dict[str, Site], name: str
) -> None:
    site = sites[name]
    configuration = configure(tmp_path / "openssl.cnf", provider_path)
    done = subprocess.run(
        ["openssl", "pkey", "-in", str(site.reference), "-pubout"],
        check=True,
        capture_output=True,
        env=environment(configuration),
    )

    assert done.stdout == site.public_key.read_bytes()


# --- beside ordinary keys, in a server -----------------------------------------------------


@pytest.mark.parametrize("program", ["openssl", "pyopenssl"])
def test_a_server_with_an_ordinary_key(
    provider_path: Path, keyd: Keyd, sites: dict[str, Site], tmp_path: Path, program: str
) -> None:
    """The provider is loaded, and has no part in it."""
    site = sites["rsa"]._replace(reference=sites["rsa"].key)
    configuration = configure(tmp_path / "openssl.cnf", provider_path, "socket = /nowhere")
    with servers(program, [site], configuration, tmp_path / "log.txt") as running:
        for options in (["-tls1_3"], ["-tls1_2"], ["-tls1_2", "-cipher", "AES128-SHA"]):
            assert connect(running.port(site), site, *options).code == 0
