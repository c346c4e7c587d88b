"""What ``check`` says of suites, groups and chains: by the real contexts, in the real child."""

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from keyd import powers
from keyd.protocol import SignatureScheme
from titus_py.configuration import Mistake, load, values
from titus_py.configuration.checking import Checked, check
from titus_py.worker import tls
from titus_py.worker.tls import offered_suites, selected_suites

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

RSA_1024 = rsa.generate_private_key(65537, 1024)
P256 = ec.generate_private_key(ec.SECP256R1())
KEYS: dict[str, Key] = {
    "RSA": rsa.generate_private_key(65537, 2048),
    "P-256": P256,
    "P-384": ec.generate_private_key(ec.SECP384R1()),
    "P-521": ec.generate_private_key(ec.SECP521R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate(),
}
#: Which no instance has that runs on this machine.
_FIRST_UID = 2_010_000_000 + os.getpid() % 20_000 * 4000
UIDS = f'[worker]\nuids = "{_FIRST_UID}-{_FIRST_UID + 3998}"\n[keyd]\nuser = {_FIRST_UID + 3999}\n'
#: https://ssl-config.mozilla.org, "intermediate", version 5.7.
MOZILLA = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:"
    "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:"
    "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305:"
    "DHE-RSA-AES128-GCM-SHA256:DHE-RSA-AES256-GCM-SHA384:DHE-RSA-CHACHA20-POLY1305"
)
Check = Callable[..., Checked]


def certificate(subject: str, key: Key, issuer: str, issuer_key: Key) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    hashed = None if isinstance(issuer_key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=90))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("a.example")]), critical=False)
        .add_extension(x509.BasicConstraints(subject == issuer, None), critical=True)
        .sign(issuer_key, hashed)
        .public_bytes(Encoding.PEM)
    )


@pytest.fixture
def checked(tmp_path: Path) -> Check:
    """Check virtual hosts a0.example, a1.example, …: each a kind of key, and settings."""

    def checked(*hosts: tuple[str, dict[str, object]], authority: Key = P256) -> Checked:
        for kind, key in KEYS.items():
            leaf = certificate("a.example", key, "authority", authority)
            root = certificate("authority", authority, "authority", authority)
            (tmp_path / f"{kind}.crt").write_bytes(leaf + root)
            (tmp_path / f"{kind}.key").touch(mode=0o600)
            (tmp_path / f"{kind}.key").write_bytes(
                key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            )
        lines = [UIDS, '[[listen]]\naddress = "[::]:443"']
        for number, (kind, settings) in enumerate(hosts):
            table = {
                "sni": [f"a{number}.example"],
                "certificate": str(tmp_path / f"{kind}.crt"),
                "key": str(tmp_path / f"{kind}.key"),
                "backend": "127.0.0.1:80",
            }
            lines.append("[[vhost]]")
            lines += [f"{name} = {json.dumps(value)}" for name, value in (table | settings).items()]
        (tmp_path / "titus.toml").write_text("\n".join(lines))
        return check(load(tmp_path / "titus.toml"))

    return checked


def said(problems: list[Mistake], host: int = 0) -> list[str]:
    """What a handshake shows of this virtual host's suites and groups, without the place."""
    texts = [str(problem).partition(f'"a{host}.example": ')[2] for problem in problems]
    # Told without a handshake: ``configuration.ineffective``.
    texts = [text for text in texts if ": has no effect: these are suites" not in text]
    return [text for text in texts if text.partition(":")[0] not in ("", "certificate", "sni")]


# --- what is fine ----------------------------------------------------------------------


FINE: list[dict[str, object]] = [
    {},
    {"max_version": "TLSv1.2"},
    {"min_version": "TLSv1.3"},
    {"ciphers": "ECDHE+AESGCM"},
    {"ciphers": "ECDHE"},
    {"ciphersuites": "TLS_AES_128_CCM_SHA256"},
    {"groups": ["X448", "P-521"]},
    {"groups": ["X25519MLKEM768", "P-384"]},
    {"groups": ["SecP384r1MLKEM1024", "MLKEM1024"], "min_version": "TLSv1.3"},
    {"ciphers": "ECDHE-RSA-AES128-SHA", "min_version": "TLSv1.3"},
]


def test_what_can_shake_hands_is_fine(checked: Check) -> None:
    hosts = [(kind, settings) for kind in KEYS for settings in FINE]
    result = checked(*hosts)
    assert result.mistakes == []
    assert [warning for host in range(len(hosts)) for warning in said(result.warnings, host)] == []
    # A key of its own.
    result = checked(("RSA", {"ciphers": "AES128-SHA", "rsa_key_exchange": True}))
    assert result.mistakes == []
    [warning] = said(result.warnings)
    assert "rsa_key_exchange" in warning


DHE = "DHE-RSA-AES128-GCM-SHA256, DHE-RSA-AES256-GCM-SHA384, DHE-RSA-CHACHA20-POLY1305"


@pytest.mark.parametrize(
    ("kind", "ciphers", "warnings"),
    [
        ("RSA", MOZILLA, [f"ciphers: not offered: {DHE}: keyd signs for ECDHE, and not for DHE"]),
        ("P-256", MOZILLA, []),
        (
            "RSA",
            "HIGH:!aNULL:!MD5",
            [
                "ciphers: not offered: DHE-RSA-AES256-GCM-SHA384, ",
                "ciphers: not offered: AES256-GCM-SHA384, ",
            ],
        ),
        ("P-256", "HIGH:!aNULL:!MD5", []),
        ("RSA", "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256", []),
        (
            "RSA",
            "ECDHE+AESGCM:AES128-SHA",
            ["ciphers: not offered: AES128-SHA: the RSA key exchange is not forward-secret"],
        ),
        (
            "RSA",
            "ECDHE+AESGCM:DES-CBC3-SHA:!RC4:ECDHE+CHACHA21",
            ["ciphers: not offered: DES-CBC3-SHA, ECDHE+CHACHA21: OpenSSL knows no such suite"],
        ),
        (
            "RSA",
            "TLS_AES_128_GCM_SHA256:ECDHE+AESGCM",
            ["ciphers: not offered: TLS_AES_128_GCM_SHA256: suites of TLS 1.3 go into ciphers"],
        ),
        ("RSA", "ECDHE+AESGCM:PSK", ["ciphers: not offered: PSK: there are no pre-shared keys"]),
        ("RSA", "ECDHE+AESGCM:SRP", ["ciphers: not offered: SRP: there are no passwords"]),
        ("RSA", "ALL:!DHE:!kRSA", []),
    ],
)
def test_what_is_asked_for_and_not_offered_is_named(
    checked: Check, kind: str, ciphers: str, warnings: list[str]
) -> None:
    result = checked((kind, {"ciphers": ciphers}))
    assert result.mistakes == []
    found = said(result.warnings)
    assert len(found) == len(warnings)
    for warning, beginning in zip(found, warnings, strict=True):
        assert warning.startswith(beginning)


def test_the_rsa_key_exchange_is_for_rsa_keys(checked: Check) -> None:
    result = checked(("P-256", {"rsa_key_exchange": True}))
    assert result.mistakes == []
    assert said(result.warnings) == [
        "rsa_key_exchange: has no effect: the certificate is not for an RSA key"
    ]


def test_hosts_that_are_alike_share_a_line(checked: Check) -> None:
    result = checked(*[("RSA", {"ciphers": MOZILLA})] * 9)
    [warning] = said(result.warnings)
    named = [f'vhost "a{number}.example": ciphers' for number in range(1, 6)]
    assert warning.count("(also ") == 1
    assert [text for text in named if text.rpartition(":")[0] in warning] == named
    assert warning.endswith(" and 3 more)")


# --- what is not -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "mistake"),
    [
        ("RSA", {"ciphers": "ECDHE+AESGCM:eNULL"}, "eNULL: suites without encryption are never"),
        ("RSA", {"ciphers": "ECDHE:aNULL"}, "aNULL: suites without authentication are never"),
        ("RSA", {"ciphers": "ECDHE:AECDH-AES128-SHA"}, "AECDH-AES128-SHA: suites without authent"),
        ("RSA", {"ciphers": "ECDHE:COMPLEMENTOFALL"}, "COMPLEMENTOFALL: suites without encryption"),
        ("RSA", {"ciphers": "ECDHE:@SECLEVEL=0"}, "@SECLEVEL=0 is below 2, which is kept"),
        ("RSA", {"ciphers": "DEFAULT@SECLEVEL=1"}, "@SECLEVEL=1 is below 2, which is kept"),
        ("RSA", {"ciphers": "nonsense"}, "OpenSSL finds no cipher suite in 'nonsense'"),
        ("RSA", {"ciphers": "TLS_AES_128_GCM_SHA256"}, "those of TLS 1.3 go into ciphersuites"),
        (
            "RSA",
            {"ciphers": "AES128-SHA"},
            "no suite of TLS 1.2 is left: not offered: AES128-SHA: the RSA key exchange",
        ),
        (
            "RSA",
            {"ciphers": "DHE+AESGCM"},
            "no suite of TLS 1.2 is left: not offered: DHE-RSA-AES256-GCM-SHA384, ",
        ),
        (
            "P-256",
            {"ciphers": "ECDHE+aRSA"},
            "no suite of TLS 1.2 is left: for this certificate, whose key is ECDSA, add "
            "ECDHE+aECDSA+AESGCM",
        ),
        ("Ed25519", {"ciphers": "ECDHE+aRSA"}, "whose key is Ed25519, add ECDHE+aECDSA+AESGCM"),
        ("RSA", {"ciphers": "ECDHE+aECDSA"}, "whose key is RSA, add ECDHE+aRSA+AESGCM"),
        ("P-256", {"ciphers": "kRSA", "rsa_key_exchange": True}, "whose key is ECDSA"),
        (
            "RSA",
            {"ciphers": "ECDHE-RSA-AES128-GCM-SHA256:@SECLEVEL=3"},
            "RSA.crt: no handshake is possible with it: its key is too short",
        ),
        ("P-256", {"ciphersuites": "TLS_AES_128_CCM_8_SHA256"}, "no handshake is possible with"),
        ("P-256", {"groups": ["X25519MLKEM768"]}, "no TLS 1.2 handshake is possible with X25519ML"),
    ],
)
def test_what_cannot_shake_hands_is_a_mistake(
    checked: Check, kind: str, settings: dict[str, object], mistake: str
) -> None:
    result = checked((kind, settings))
    assert result.configuration is None
    [found] = result.mistakes
    assert mistake in found.reason


def test_a_chain_that_openssl_does_not_take_is_named(checked: Check) -> None:
    result = checked(("P-256", {}), authority=RSA_1024)
    assert result.configuration is None
    [mistake] = result.mistakes
    assert mistake.key == "vhost[0].certificate"
    assert (
        "P-256.crt: no handshake is possible with certificate 2, CN=authority: " in mistake.reason
    )
    assert "its key is too short (OpenSSL at security level 2: ca key too small)" in mistake.reason


# --- what is offered -------------------------------------------------------------------


@pytest.mark.parametrize(
    "ciphers",
    [MOZILLA, "HIGH:!aNULL:!MD5", "ALL:COMPLEMENTOFALL:@SECLEVEL=0", "aNULL:eNULL", "PSK", "DHE"],
)
def test_only_what_keyd_signs_for_is_offered_whatever_is_asked_for(ciphers: str) -> None:
    offered = offered_suites(ciphers, rsa_key_exchange=False)
    # ECDHE-ARIA: OpenSSL's name for ECDHE-RSA-ARIA.
    assert all(suite.startswith(("ECDHE-RSA-", "ECDHE-ECDSA-", "ECDHE-ARIA")) for suite in offered)
    assert not any("NULL" in suite or "PSK" in suite for suite in offered)
    with_rsa = offered_suites(ciphers, rsa_key_exchange=True)
    assert with_rsa[: len(offered)] == offered
    assert set(with_rsa[len(offered) :]) <= set(selected_suites("kRSA:!eNULL"))


def test_the_order_is_the_settings_own_but_that_forward_secrecy_comes_first() -> None:
    ciphers = "AES128-SHA:ECDHE-RSA-AES128-SHA:AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384"
    assert offered_suites(ciphers, rsa_key_exchange=True) == (
        "ECDHE-RSA-AES128-SHA",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "AES128-SHA",
        "AES256-GCM-SHA384",
    )


def test_the_groups_of_tls_1_2_are_those_whose_parameters_keyd_signs() -> None:
    numbers = {"P-256": 23, "P-384": 24, "P-521": 25, "X25519": 29, "X448": 30}
    assert {group for group in values._GROUPS if "MLKEM" not in group} == set(numbers)
    assert set(powers._POINT_OCTETS) == set(numbers.values())


def test_the_schemes_that_are_agreed_upon_are_those_that_keyd_signs_with() -> None:
    schemes = tls._POST_QUANTUM_SCHEMES + tls._SIGNATURE_SCHEMES
    assert set(schemes.split(":")) == {scheme.name for scheme in SignatureScheme}
