"""Certificates and keys held against each other, by the real ``keyd check``."""

import base64
import datetime
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID
from integration.instance import eventually

from keyd.making import self_signed
from keyd.reference import key_id, reference_pem
from titus_py.commands.check import check_main
from titus_py.configuration import from_options, load
from titus_py.configuration.checking import Checked, check
from titus_py.configuration.helper import Helper

ROOT = Path(__file__).parents[3]
#: From the source tree, so that these tests need no installed package.
KEYD_CHECK = (sys.executable, "-m", "keyd", "check")
HANDSHAKE_CHECK = (sys.executable, "-m", "titus_py.fork_server.handshake_check")
_IN_SERVICE = (sys.executable, "-I", "-m", "keyd", "--help")
KEYD_IS_INSTALLED = not subprocess.run(_IN_SERVICE, capture_output=True).returncode

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

_AUTHORITY = ec.generate_private_key(ec.SECP256R1())
_SIGNS = x509.KeyUsage(True, *[False] * 8)

LISTEN = '[[listen]]\naddress = "[::]:443"\n'
#: Neither the default ones nor those of other tests: an instance on this machine may have them.
_FIRST_UID = 2_010_000_000 + os.getpid() % 20_000 * 4000
UIDS = f'[worker]\nuids = "{_FIRST_UID}-{_FIRST_UID + 3998}"\n[keyd]\nuser = {_FIRST_UID + 3999}\n'


@pytest.fixture(autouse=True)
def _in_the_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def keys() -> dict[str, Key]:
    return {
        "rsa": rsa.generate_private_key(65537, 2048),
        "ec": ec.generate_private_key(ec.SECP256R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
    }


def write_key(path: Path, key: Key, passphrase: bytes | None = None) -> None:
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))


def write_certificate(
    path: Path,
    key: Key,
    days: int = 90,
    age: int = 1,
    names: Sequence[str] = ("www.example.org", "*.example.org"),
) -> None:
    """Begun ``age`` days ago and ending ``days`` from now."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "www.example.org")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=age))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name) for name in names]),
            critical=False,
        )
        .add_extension(_SIGNS, critical=True)
        .sign(_AUTHORITY, hashes.SHA256())
    )
    path.write_bytes(certificate.public_bytes(Encoding.PEM))


def vhost(directory: Path, name: str, more: str = "") -> str:
    return (
        f'[[vhost]]\nsni = ["{name}"]\ncertificate = "{directory}/site.crt"\n'
        f'key = "{directory}/site.key"\nbackend = "127.0.0.1:80"\n{more}'
    )


def checked(directory: Path, text: str = "") -> Checked:
    path = directory / "titus.toml"
    path.write_text(LISTEN + (text or vhost(directory, "www.example.org")) + UIDS)
    return check(load(path), Helper(KEYD_CHECK), Helper(HANDSHAKE_CHECK))


@pytest.mark.parametrize("kind", ["rsa", "ec", "ed25519"])
def test_the_facts_of_a_good_certificate(tmp_path: Path, keys: dict[str, Key], kind: str) -> None:
    public = keys[kind].public_key()
    write_certificate(tmp_path / "site.crt", keys[kind])
    write_key(tmp_path / "site.key", keys[kind])
    result = checked(tmp_path)
    assert result.mistakes == []
    doubtful = [f"{tmp_path}/site.crt is for an Ed25519 key, which browsers refuse"]
    found = [warning.reason.partition(":")[0] for warning in result.warnings]
    assert found == (doubtful if kind == "ed25519" else [])
    assert result.configuration is not None
    facts = result.certificates[result.configuration.vhost[0].credentials[""]]
    assert facts.key_id == key_id(public)
    assert facts.reference.encode() == reference_pem(public)
    assert facts.subject == "CN=www.example.org"
    assert facts.names == ("www.example.org", "*.example.org")
    days = (facts.not_after - datetime.datetime.now(datetime.UTC)).days
    assert days in (89, 90)


@pytest.mark.parametrize(
    ("program", "dumps"), [(("-m", "keyd", "check"), False), (("-c", "input()"), True)]
)
def test_no_core_is_left_of_a_check(tmp_path: Path, program: tuple[str, ...], dumps: bool) -> None:
    """It may have read keys when somebody at a terminal presses Ctrl-backslash."""
    child = subprocess.Popen(
        [sys.executable, *program],
        stdin=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2),
    )
    # It waits for what it is to check: read(2), from standard input (proc_pid_syscall(5)).
    waits = Path(f"/proc/{child.pid}/syscall")
    eventually(lambda: waits.read_text().startswith("0 0x0 "), "a check that waits")
    child.send_signal(signal.SIGQUIT)
    _, status = os.waitpid(child.pid, 0)
    child.returncode = status
    assert os.WIFSIGNALED(status)
    assert os.WCOREDUMP(status) is dumps


def test_one_question_for_the_same_files_and_all_who_use_them_named(
    tmp_path: Path, keys: dict[str, Key]
) -> None:
    write_certificate(tmp_path / "site.crt", keys["ec"])
    write_key(tmp_path / "site.key", keys["rsa"])
    result = checked(tmp_path, "".join(vhost(tmp_path, f"{name}.example") for name in "abc"))
    assert result.configuration is None
    (mistake,) = result.mistakes
    assert mistake.key == "vhost[0].key"
    assert str(tmp_path / "site.key") in mistake.reason
    assert str(tmp_path / "site.crt") in mistake.reason
    assert mistake.reason.endswith('(also vhost "b.example" (line 8), vhost "c.example" (line 13))')


def test_certificates_are_looked_at_whatever_else_is_wrong(
    tmp_path: Path, keys: dict[str, Key]
) -> None:
    write_certificate(tmp_path / "site.crt", keys["ec"])
    (tmp_path / "site.key").write_text("no key\n")
    (tmp_path / "site.key").chmod(0o600)
    result = checked(tmp_path, vhost(tmp_path, "a.example", "typo = 1\n"))
    assert [mistake.key for mistake in result.mistakes] == ["vhost[0].typo", "vhost[0].key"]
    assert result.certificates == {}


#: Options of openssl-req(1), and what is said of a certificate for such a key.
UNSERVED = {
    "rsa-pss": (
        [
            *("rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048", "-pkeyopt", "rsa_pss_keygen_md:sha1"),
            *("-pkeyopt", "rsa_pss_keygen_mgf1_md:sha1", "-pkeyopt", "rsa_pss_keygen_saltlen:20"),
        ],
        "an RSA key bound to PSS that TLS cannot use: it is bound to a digest other than",
    ),
    "brainpool": (["ec", "-pkeyopt", "ec_paramgen_curve:brainpoolP256r1"], "EC key on brainpool"),
    "ed448": (
        ["ed448"],
        "an Ed448 key (RSA of 2048 to 8192 bits (also bound to PSS), ECDSA on P-256, P-384 ",
    ),
    "small": (["rsa:1024"], "an RSA key of 1024 bits (2048 to 8192 are served)"),
}


@pytest.mark.parametrize("kind", UNSERVED)
def test_keys_that_are_not_served_are_mistakes(tmp_path: Path, kind: str) -> None:
    options, said = UNSERVED[kind]
    certificate, key = tmp_path / "site.crt", tmp_path / "site.key"
    command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=www.example.org"]
    made = [*command, "-keyout", key, "-out", certificate, "-newkey", *options]
    subprocess.run(made, check=True, capture_output=True)
    reasons = [mistake.reason for mistake in checked(tmp_path).mistakes]
    (reason,) = [reason for reason in reasons if reason.startswith(f"{certificate} is for ")]
    assert said in reason
    assert not any("is not the key of" in reason for reason in reasons)
    assert refused(certificate) == f"keyd: {reason}\n"


def refused(certificate: Path) -> str:
    """What ``keyd reference`` says instead of one."""
    command = [sys.executable, "-m", "keyd", "reference", certificate]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    return ended.stderr


def test_no_reference_for_what_is_no_certificate(tmp_path: Path) -> None:
    path = tmp_path / "site.crt"
    assert refused(path) == f"keyd: {path}: No such file or directory\n"
    path.write_text("no certificate\n")
    assert refused(path) == f"keyd: {path} holds no PEM certificate\n"
    # Swapped with the key.
    path.write_text("-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n")
    assert refused(path) == f"keyd: {path} holds no PEM certificate, but EC PRIVATE KEY\n"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["x509", "-outform", "DER"], "is binary (DER), not PEM: convert it with 'openssl x509 "),
        (
            ["pkcs12", "-export", "-nokeys", "-passout", "pass:"],
            "is PKCS #12 (.p12, .pfx), not PEM: take it out with 'openssl pkcs12 -in OLD -nokeys ",
        ),
    ],
)
def test_what_makes_pem_of_a_binary_certificate(
    tmp_path: Path, keys: dict[str, Key], command: list[str], why: str
) -> None:
    path = tmp_path / "site.crt"
    write_certificate(path, keys["ec"])
    made = subprocess.run(
        ["openssl", *command], input=path.read_bytes(), capture_output=True, check=True
    )
    path.write_bytes(made.stdout)
    assert refused(path).startswith(f"keyd: {path} {why}")


def test_a_socket_for_other_programs_has_an_absolute_path() -> None:
    """Each of them may be in another directory."""
    command = [sys.executable, "-m", "keyd", "openssl-conf", "--socket", "www.sock"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "--socket: 'www.sock': expected an absolute path" in ended.stderr


#: What is changed in a certificate's DER, and what is said of it: by one library or the other.
DAMAGE = {
    "version": (b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05", ":1: a damaged certificate"),
    "two of an extension": (b"\x55\x1d\x0f", b"\x55\x1d\x11", "no handshake is possible with it"),
    "subject": (b"\x0c\x0fwww.", b"\x0c\x0f\xff\xff\xff.", "no handshake is possible with it"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_certificate_hides_no_other_mistake(
    tmp_path: Path, keys: dict[str, Key], damage: str
) -> None:
    """What the library finds wrong, some of it late, concerns this one file."""
    old, new, said = DAMAGE[damage]
    write_certificate(tmp_path / "good.crt", keys["ec"])
    certificate = x509.load_pem_x509_certificate((tmp_path / "good.crt").read_bytes())
    der = certificate.public_bytes(Encoding.DER)
    assert old in der
    lines = textwrap.wrap(base64.b64encode(der.replace(old, new)).decode(), 64)
    text = "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])
    (tmp_path / "site.crt").write_text(text)
    write_key(tmp_path / "site.key", keys["ec"])
    other = tmp_path / "other"
    other.mkdir()
    write_certificate(other / "site.crt", keys["ec"])
    write_key(other / "site.key", keys["rsa"])
    result = checked(tmp_path, vhost(tmp_path, "a.example") + vhost(other, "b.example"))
    found = {mistake.key: mistake.reason for mistake in result.mistakes}
    assert f"{other / 'site.key'} is not the key" in found.pop("vhost[1].key")
    assert said in found.pop("vhost[0].certificate")
    assert not found


def test_what_else_a_certificates_file_holds_is_left_there(
    tmp_path: Path, keys: dict[str, Key]
) -> None:
    """A private key above all, but also what OpenSSL would stumble over."""
    for name, kind in (("leaf", "ec"), ("issuer", "rsa")):
        write_certificate(tmp_path / f"{name}.crt", keys[kind])
    write_key(tmp_path / "site.key", keys["ec"])
    leaf, issuer, key = (
        (tmp_path / name).read_bytes() for name in ("leaf.crt", "issuer.crt", "site.key")
    )
    strange = b"subject=/O=M\xfcller\n\0 "
    (tmp_path / "site.crt").write_bytes(strange + leaf + key + b"\n" + strange + issuer)
    result = checked(tmp_path)
    assert not result.mistakes
    [facts] = result.certificates.values()
    assert facts.chain.encode() == leaf + issuer


@pytest.mark.parametrize(
    ("given", "field"),
    [(None, "key"), ("wrong", "passphrase_file"), ("", "passphrase_file"), ("right", None)],
)
def test_encrypted_keys(
    tmp_path: Path, keys: dict[str, Key], given: str | None, field: str | None
) -> None:
    write_certificate(tmp_path / "site.crt", keys["rsa"])
    write_key(tmp_path / "site.key", keys["rsa"], b"right")
    more = ""
    if given is not None:
        (tmp_path / "pass").touch(mode=0o600)
        (tmp_path / "pass").write_text(given + "\n")
        more = f'passphrase_file = "{tmp_path}/pass"\n'
    result = checked(tmp_path, vhost(tmp_path, "a.example", more))
    assert [mistake.key for mistake in result.mistakes] == ([f"vhost[0].{field}"] if field else [])
    assert len(result.certificates) == (field is None)


#: Keys that no key can be read from, and the true reason.
UNREADABLE = {
    "camellia": "is encrypted with a cipher that cannot be read here: encrypt it with AES",
    "aria": "is encrypted with a cipher that cannot be read here: encrypt it with AES",
    "traditional": "is encrypted with a cipher that cannot be read here: encrypt it with AES",
    "version 2": "is in version 2 of PKCS #8, which holds the public key as well",
    "openssh": "is in OpenSSH's format: convert a copy of it with 'ssh-keygen",
    "der": "is binary (DER), not PEM: convert it with 'openssl pkey -inform DER",
    "pkcs12": "is PKCS #12 (.p12, .pfx), not PEM: take it out with 'openssl pkcs12 -in OLD -noc",
    "public": "holds a PUBLIC KEY, and no private key",
    "certificate": "holds a CERTIFICATE, and no private key",
    "text": "holds no PEM private key",
    "damaged": "holds a PEM private key that is damaged",
    "x25519": "is an X25519 key: RSA of 2048 to 8192 bits (also bound to PSS), ECDSA on P-256, "
    "P-384 or P-521, ",
}


def unreadable(kind: str, keys: dict[str, Key], directory: Path) -> bytes:
    def openssl(*arguments: str) -> bytes:
        command = ["openssl", *arguments]
        return subprocess.run(command, input=pem, capture_output=True, check=True).stdout

    key = keys["ec"]
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    if kind in ("camellia", "aria"):
        return openssl("pkcs8", "-topk8", "-v2", f"{kind}-256-cbc", "-passout", "pass:right")
    if kind == "traditional":
        return openssl("ec", "-camellia256", "-passout", "pass:right")
    if kind == "version 2":  # as in RFC 8410 §10.3, but without attributes
        ed25519_key = keys["ed25519"]
        assert isinstance(ed25519_key, ed25519.Ed25519PrivateKey)
        secret, public = (
            ed25519_key.private_bytes_raw(),
            ed25519_key.public_key().public_bytes_raw(),
        )
        body = (
            bytes.fromhex("020101 3005 0603 2b6570 0422 0420") + secret + b"\x81\x21\x00" + public
        )
        text = base64.b64encode(b"\x30" + bytes([len(body)]) + body)
        return b"-----BEGIN PRIVATE KEY-----\n" + text + b"\n-----END PRIVATE KEY-----\n"
    if kind == "certificate":
        return (directory / "site.crt").read_bytes()
    if kind == "pkcs12":
        return openssl("pkcs12", "-export", "-nocerts", "-passout", "pass:right")
    if kind == "x25519":
        return openssl("genpkey", "-algorithm", "x25519")
    return {
        "openssh": key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        "der": key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        "public": key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "text": b"no key\n",
        "damaged": pem.replace(b"M", b"N", 1),
    }[kind]


@pytest.mark.parametrize("kind", UNREADABLE)
def test_why_a_key_cannot_be_read(tmp_path: Path, keys: dict[str, Key], kind: str) -> None:
    write_certificate(tmp_path / "site.crt", keys["ec"])
    (tmp_path / "site.key").touch(mode=0o600)
    (tmp_path / "site.key").write_bytes(unreadable(kind, keys, tmp_path))
    (tmp_path / "pass").touch(mode=0o600)
    (tmp_path / "pass").write_text("right\n")
    encrypted = kind in ("camellia", "aria", "traditional")
    more = f'passphrase_file = "{tmp_path}/pass"\n' if encrypted else ""
    (mistake,) = checked(tmp_path, vhost(tmp_path, "www.example.org", more)).mistakes
    assert mistake.key == "vhost[0].key"
    assert mistake.reason.startswith(f"{tmp_path}/site.key {UNREADABLE[kind]}")


@pytest.mark.parametrize(("days", "age"), [(-1, 30), (20, 30), (90, -1)])
def test_certificates_out_of_date_are_warned_of(
    tmp_path: Path, keys: dict[str, Key], days: int, age: int
) -> None:
    write_certificate(tmp_path / "site.crt", keys["ec"], days, age)
    write_key(tmp_path / "site.key", keys["ec"])
    result = checked(tmp_path)
    assert result.configuration is not None
    assert [warning.key for warning in result.warnings] == ["vhost[0].certificate"]
    assert len(result.certificates) == 1


def test_options_are_named_as_options(tmp_path: Path, keys: dict[str, Key]) -> None:
    certificate, key = tmp_path / "site.crt", tmp_path / "site.key"
    write_certificate(certificate, keys["ec"])
    write_key(key, keys["rsa"])
    loaded = from_options([":443"], "127.0.0.1:80", str(certificate), str(key))
    mistakes = check(loaded, Helper(KEYD_CHECK), Helper(HANDSHAKE_CHECK)).mistakes
    # An instance on this machine may have the default uids.
    (mistake,) = [mistake for mistake in mistakes if mistake.key != "worker.uids"]
    assert str(mistake).startswith("--key: ")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9: no message"),
        ("import sys; sys.exit('out of luck')", "exit code 1: out of luck"),
        ("print('{')", "not an answer: "),
        ("print('[]')", "0 answers to 1 questions"),
        (
            "print('[{\"mistakes\": [], \"warnings\": [], \"chain\": null, \"key_id\": null,"
            " \"reference\": null, \"subject\": \"\", \"names\": [], \"not_before\": null,"
            " \"not_after\": null}]')",
            "neither mistakes nor facts",
        ),
    ],
)  # fmt: skip
def test_a_keyd_that_fails_is_a_mistake(tmp_path: Path, program: str, reason: str) -> None:
    for name in ("site.crt", "site.key"):
        (tmp_path / name).touch(mode=0o600)
    path = tmp_path / "titus.toml"
    path.write_text(LISTEN + vhost(tmp_path, "a.example") + UIDS)
    keyd_check = Helper((sys.executable, "-c", program))
    result = check(load(path), keyd_check, timeout=0.5 if "sleep" in program else 30)
    assert result.configuration is None
    # On a busy machine, nor does the other helper answer in so short a time.
    (mistake,) = (one for one in result.mistakes if "'keyd check'" in one.reason)
    assert reason in mistake.reason


def test_a_keyd_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    for name in ("site.crt", "site.key"):
        (tmp_path / name).touch(mode=0o600)
    path = tmp_path / "titus.toml"
    path.write_text(LISTEN + vhost(tmp_path, "a.example") + UIDS)
    (mistake,) = check(load(path), Helper(("/no/python",))).mistakes
    assert "/no/python: No such file or directory" in str(mistake)


def test_the_environment_does_not_reach_the_child(
    tmp_path: Path, keys: dict[str, Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openssl.cnf").write_text("openssl_conf = nonsense\n[nonsense]\nproviders = no\n")
    monkeypatch.setenv("OPENSSL_CONF", str(tmp_path / "openssl.cnf"))
    write_certificate(tmp_path / "site.crt", keys["rsa"])
    write_key(tmp_path / "site.key", keys["rsa"])
    assert checked(tmp_path).mistakes == []


def test_no_tls_library_is_loaded_here() -> None:
    names = subprocess.run(
        [sys.executable, "-c", "import sys, titus_py.configuration.checking\nprint(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert not {"cryptography", "OpenSSL", "ssl", "_ssl"} & set(names)


@pytest.mark.skipif(not KEYD_IS_INSTALLED, reason="keyd is not installed in this environment")
def test_the_command(
    tmp_path: Path, keys: dict[str, Key], capsys: pytest.CaptureFixture[str]
) -> None:
    write_certificate(tmp_path / "site.crt", keys["ec"], days=3)
    write_key(tmp_path / "site.key", keys["ec"])
    path = tmp_path / "titus.toml"
    path.write_text(LISTEN + vhost(tmp_path, "a.example") + UIDS)
    assert check_main(path) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{path}: configuration is fine\n"
    assert printed.err.startswith(f'warning: {path}:5: vhost "a.example": certificate: ')

    write_key(tmp_path / "site.key", keys["rsa"])
    path.write_text("typo = 1\n" + LISTEN + vhost(tmp_path, "a.example") + UIDS)
    assert check_main(path) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    mistakes = [line for line in printed.err.splitlines() if not line.startswith("warning: ")]
    assert [line.removeprefix(f"{path}:").split(": /")[0] for line in mistakes] == [
        "1: typo: unknown key: known here are include, worker, limits, keyd, log, metrics, "
        "service, listen, vhost, tunnel",
        '7: vhost "a.example": key',
    ]


def test_a_mistake_elsewhere_casts_no_doubt_on_a_known_key(
    tmp_path: Path, keys: dict[str, Key]
) -> None:
    """Whether a certificate is that of a tunnel shows in a whole configuration alone."""
    key = keys["ec"]
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    (tmp_path / "own.crt").write_bytes(self_signed("web-1", key, int(time.time())))
    write_key(tmp_path / "own.key", key)
    tunnel = (
        '[[tunnel]]\nlisten = "127.0.0.1:8080"\nconnect = "192.0.2.7:8443"\n'
        f'pins = ["sha256:{"0" * 64}"]\n'
        f'certificate = "{tmp_path}/own.crt"\nkey = "{tmp_path}/own.key"\n'
    )
    result = checked(tmp_path, f'{tunnel}[[vhost]]\nbackend = "127.0.0.1:80"\n')
    assert {mistake.key.partition(".")[0] for mistake in result.mistakes} == {"vhost[0]"}
    assert [warning.reason for warning in result.warnings] == []


def test_a_name_that_the_certificate_is_not_for_is_warned_of(
    tmp_path: Path, keys: dict[str, Key]
) -> None:
    """One line a virtual host, and it serves: who knows what clients look at."""
    write_certificate(tmp_path / "site.crt", keys["ec"])
    write_key(tmp_path / "site.key", keys["ec"])
    text = vhost(tmp_path, "a.example.org") + vhost(tmp_path, 'b.example", "a.b.example.org')
    result = checked(tmp_path, text)
    assert result.configuration is not None
    [warning] = result.warnings
    assert str(warning) == (
        f'{tmp_path}/titus.toml:9: vhost "b.example": sni: {tmp_path}/site.crt is not for '
        "b.example, a.b.example.org, and clients will refuse it: it is for www.example.org, "
        "*.example.org"
    )


# --- several certificates for one host -------------------------------------------------


def several(directory: Path, *kinds: str) -> str:
    tables = "".join(
        f'[[vhost.certificates]]\ncertificate = "{directory}/{kind}.crt"\n'
        f'key = "{directory}/{kind}.key"\n'
        for kind in kinds
    )
    return f'[[vhost]]\nsni = ["www.example.org"]\nbackend = "127.0.0.1:80"\n{tables}'


def test_a_certificate_for_each_kind_of_key(tmp_path: Path, keys: dict[str, Key]) -> None:
    for kind, key in keys.items():
        write_certificate(tmp_path / f"{kind}.crt", key)
        write_key(tmp_path / f"{kind}.key", key)
    result = checked(tmp_path, several(tmp_path, *keys))
    assert result.mistakes == []
    assert {facts.kind for facts in result.certificates.values()} == {"RSA", "ECDSA", "Ed25519"}
    assert not any("depends on the kinds" in warning.reason for warning in result.warnings)


def test_of_two_for_keys_of_one_kind_clients_would_see_one(
    tmp_path: Path, keys: dict[str, Key]
) -> None:
    keys = {"one": keys["ec"], "rsa": keys["rsa"], "two": ec.generate_private_key(ec.SECP384R1())}
    for kind, key in keys.items():
        write_certificate(tmp_path / f"{kind}.crt", key)
        write_key(tmp_path / f"{kind}.key", key)
    (mistake,) = checked(tmp_path, several(tmp_path, *keys)).mistakes
    assert mistake.key == "vhost[0].certificates[2].certificate"
    assert str(mistake).endswith(
        f':13: vhost "www.example.org": certificates[2].certificate: {tmp_path}/two.crt is for a '
        'key of the same kind (ECDSA) as vhost "www.example.org": certificates[0].certificate '
        "(line 7): there can be one of each kind"
    )


def test_names_that_differ_are_worth_a_warning(tmp_path: Path, keys: dict[str, Key]) -> None:
    write_certificate(tmp_path / "ec.crt", keys["ec"])
    write_certificate(tmp_path / "rsa.crt", keys["rsa"], names=("www.example.org",))
    for kind in ("ec", "rsa"):
        write_key(tmp_path / f"{kind}.key", keys[kind])
    result = checked(tmp_path, several(tmp_path, "ec", "rsa"))
    assert result.mistakes == []
    (warning,) = [one for one in result.warnings if one.key == "vhost[0].certificates"]
    assert warning.reason == (
        f"{tmp_path}/ec.crt is for www.example.org, *.example.org, and {tmp_path}/rsa.crt for "
        "www.example.org: which of them a client is shown depends on the kinds of keys that it "
        "knows"
    )


@pytest.mark.parametrize("own", [True, False])
def test_the_rsa_key_exchange_takes_a_key_of_its_own(
    tmp_path: Path, keys: dict[str, Key], own: bool
) -> None:
    """Or whoever takes a worker over reads recorded sessions of other virtual hosts."""
    other = rsa.generate_private_key(65537, 2048) if own else keys["rsa"]
    tables = []
    for name, key in (("a", keys["rsa"]), ("b", other)):
        write_certificate(tmp_path / f"{name}.crt", key, names=[f"{name}.example.org"])
        write_key(tmp_path / f"{name}.key", key)
        tables.append(
            f'[[vhost]]\nsni = ["{name}.example.org"]\nbackend = "127.0.0.1:80"\n'
            f'certificate = "{tmp_path}/{name}.crt"\nkey = "{tmp_path}/{name}.key"\n'
        )
    result = checked(tmp_path, "".join(tables) + "rsa_key_exchange = true\n")
    shared = [one for one in result.mistakes if one.key == "vhost[1].rsa_key_exchange"]
    assert result.mistakes == shared
    assert bool(shared) != own
    if shared:
        assert "its key also signs for" in shared[0].reason
        assert "give this virtual host a key of its own" in shared[0].reason
    [warning] = [one for one in result.warnings if one.key == "vhost[1].rsa_key_exchange"]
    assert "reads recorded sessions of this key, one for each connection" in warning.reason


def test_a_suite_for_one_of_the_keys_is_enough(tmp_path: Path, keys: dict[str, Key]) -> None:
    for kind in ("ec", "rsa"):
        write_certificate(tmp_path / f"{kind}.crt", keys[kind])
        write_key(tmp_path / f"{kind}.key", keys[kind])
    settings = 'ciphers = "ECDHE+aRSA+AESGCM"\nrsa_key_exchange = true\n[[vhost.certificates]]'
    text = several(tmp_path, "ec", "rsa").replace("[[vhost.certificates]]", settings, 1)
    result = checked(tmp_path, text)
    assert result.mistakes == []
    assert not any("has no effect" in warning.reason for warning in result.warnings)


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("", "certificate", "is missing"),
        ("certificates = []\n", "certificate", "is missing"),
        ('certificates = "a.crt"\n', "certificates", "expected tables, each headed [[vhost.certif"),
        ('key = "site.key"\n{both}', "key", "goes into one of the tables [[vhost.certificates]]"),
        ("[[vhost.certificates]]\n", "certificates[0].certificate", "is missing"),
        ("[[vhost.certificates]]\n", "certificates[0].key", "is missing"),
        ("{both}kye = 1\n", "certificates[0].kye", "unknown key: did you mean key?"),
    ],
)
def test_how_several_certificates_are_not_written(
    tmp_path: Path, keys: dict[str, Key], text: str, key: str, reason: str
) -> None:
    write_certificate(tmp_path / "site.crt", keys["ec"])
    write_key(tmp_path / "site.key", keys["ec"])
    both = '[[vhost.certificates]]\ncertificate = "site.crt"\nkey = "site.key"\n'
    found = checked(tmp_path, '[[vhost]]\nbackend = ":80"\n' + text.replace("{both}", both))
    assert any(
        mistake.key == f"vhost[0].{key}" and mistake.reason.startswith(reason)
        for mistake in found.mistakes
    ), found.mistakes


# --- a directory of certificates -------------------------------------------------------


def pair(directory: Path, name: str, key: Key, names: Sequence[str] = (), days: int = 90) -> Path:
    place = directory / name
    place.mkdir(parents=True)
    write_certificate(place / "fullchain.pem", key, days, names=names or (f"{name}.example",))
    write_key(place / "privkey.pem", key)
    return place


def of_a_directory(tmp_path: Path, more: str = "") -> Checked:
    text = f'[[vhost]]\ncertificate_dir = "live"\nbackend = "127.0.0.1:80"\n{more}'
    return checked(tmp_path, text)


def test_each_bad_certificate_of_a_directory_is_a_mistake(
    tmp_path: Path, keys: dict[str, Key]
) -> None:
    live = tmp_path / "live"
    for name, kind in (("a", "ec"), ("b", "rsa"), ("c", "ec"), ("d", "ec"), ("e", "ed25519")):
        pair(live, name, keys[kind])
    (live / "b" / "fullchain.pem").write_text("nothing\n")
    write_key(live / "c" / "privkey.pem", keys["rsa"])
    (live / "d" / "privkey.pem").unlink()
    result = of_a_directory(tmp_path)
    assert {mistake.key for mistake in result.mistakes} == {"vhost[0].certificate_dir"}
    assert {mistake.line for mistake in result.mistakes} == {4}
    assert [mistake.reason for mistake in result.mistakes] == [
        f"{live}/b/fullchain.pem holds no PEM certificate",
        f"{live}/c/privkey.pem is not the key of certificate {live}/c/fullchain.pem",
        f"{live}/d/privkey.pem: No such file or directory",
    ]
    assert {one.certificate.parent.name for one in result.certificates} == {"a", "e"}


def test_a_weak_certificate_of_a_directory_is_found(tmp_path: Path, keys: dict[str, Key]) -> None:
    """Though only the first one for each kind of key is tried in a handshake."""
    live = tmp_path / "live"
    for name in "abc":
        pair(live, name, keys["rsa"])
    result = of_a_directory(tmp_path, 'ciphers = "ECDHE+AESGCM:@SECLEVEL=3"\n')
    weak = [str(live / name) for name in "abc"]
    assert [mistake.reason.partition("/fullchain.pem")[0] for mistake in result.mistakes] == weak


def test_what_of_a_directory_is_never_shown_is_worth_a_warning(
    tmp_path: Path, keys: dict[str, Key]
) -> None:
    live = tmp_path / "live"
    pair(live, "old", keys["ec"], ("www.example.org", "example.org"), days=80)
    pair(live, "old-0001", ec.generate_private_key(ec.SECP256R1()), ("www.example.org",))
    result = of_a_directory(tmp_path)
    assert result.mistakes == []
    (warning,) = [one for one in result.warnings if "is not shown" in one.reason]
    assert warning.reason == (
        f"{live}/old/fullchain.pem is not shown for www.example.org: "
        f"{live}/old-0001/fullchain.pem is for the same, and valid for longer, or as long"
    )


def test_a_directory_goes_with_a_host_for_every_other_name(
    tmp_path: Path, keys: dict[str, Key]
) -> None:
    pair(tmp_path / "live", "a", keys["ec"])
    other = (
        '[[vhost]]\ncertificate = "live/a/fullchain.pem"\nkey = "live/a/privkey.pem"\n'
        'backend = "127.0.0.1:80"\n'
    )
    assert of_a_directory(tmp_path, other).mistakes == []
    away = '[[vhost]]\ncertificate_dir = "away"\nbackend = "127.0.0.1:80"\n'
    (mistake,) = checked(tmp_path, away + other).mistakes
    assert mistake.reason == f"{tmp_path}/away: no such file or directory"
    text = f'{other}[[vhost]]\ncertificate_dir = "live"\nbackend = "127.0.0.1:80"\n'
    (mistake,) = checked(tmp_path, text).mistakes
    assert mistake.key == "vhost[1]"
    assert mistake.reason.startswith("can never match")


@pytest.mark.parametrize(
    ("table", "key", "reason"),
    [
        ('certificate_dir = "nowhere"', "certificate_dir", "{}/nowhere: no such file or directory"),
        ('certificate_dir = "live/a/fullchain.pem"', "certificate_dir", "{}/live/a/fullchain.pem:"),
        ('certificate_dir = "empty"', "certificate_dir", "{}/empty: holds no certificate: neither"),
        ('certificate_dir = "live"\nsni = ["a.example"]', "sni", "does not go with certificate_d"),
        ('certificate_dir = "live"\nkey = "live/a/privkey.pem"', "key", "does not go with cert"),
    ],
)
def test_how_a_directory_is_not_given(
    tmp_path: Path, keys: dict[str, Key], table: str, key: str, reason: str
) -> None:
    pair(tmp_path / "live", "a", keys["ec"])
    (tmp_path / "empty").mkdir()
    (mistake,) = checked(tmp_path, f'[[vhost]]\nbackend = "127.0.0.1:80"\n{table}\n').mistakes
    assert mistake.key == f"vhost[0].{key}"
    assert mistake.reason.startswith(reason.format(tmp_path))
