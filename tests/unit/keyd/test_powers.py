"""What keyd signs and decrypts, and all that it does not."""

import base64
import datetime
import json
import os
from itertools import combinations
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from keyd import mldsa
from keyd.powers import ALL_POWERS, NotGranted, NotTLS, PrivateKey, perform, rehearse
from keyd.protocol import PREMASTER_SECRET_OCTETS, Operation, Power, SignatureScheme
from keyd.pss import Binding, PSSPrivateKey

RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
P256 = ec.generate_private_key(ec.SECP256R1())
P384 = ec.generate_private_key(ec.SECP384R1())
P521 = ec.generate_private_key(ec.SECP521R1())
ED25519 = ed25519.Ed25519PrivateKey.generate()

HASHES: dict[str, hashes.HashAlgorithm] = {
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
    "sha512": hashes.SHA512(),
}
PKCS1 = [f"rsa_pkcs1_{name}" for name in HASHES]
BOUND = PSSPrivateKey(RSA, Binding(bytes.fromhex("300b06092a864886f70d01010a"), None))
PSS = [f"rsa_pss_{kind}_{name}" for kind in ("rsae", "pss") for name in HASHES]
ECDSA = {
    "ecdsa_secp256r1_sha256": P256,
    "ecdsa_secp384r1_sha384": P384,
    "ecdsa_secp521r1_sha512": P521,
}

#: RFC 8446 §4.4.3.
CONTEXT = b"TLS 1.3, server CertificateVerify"
VERIFY = b" " * 64 + CONTEXT + b"\0"
TLS13 = VERIFY + os.urandom(32)
TLS13_SHA384 = VERIFY + os.urandom(48)


def point_of(key: ec.EllipticCurvePrivateKey, compressed: bool = False) -> bytes:
    form = PublicFormat.CompressedPoint if compressed else PublicFormat.UncompressedPoint
    return key.public_key().public_bytes(Encoding.X962, form)


#: NamedGroup, and the public key that a server sends in it.
POINTS = {
    23: point_of(P256),
    24: point_of(P384),
    25: point_of(P521),
    29: os.urandom(32),
    30: os.urandom(56),
}
CURVES = {23: P256, 24: P384, 25: P521}


def key_exchange(group: int = 29, point: bytes | None = None) -> bytes:
    """What a TLS 1.2 server signs: both randoms and its parameters (RFC 8422 §5.4)."""
    point = POINTS[group] if point is None else point
    return os.urandom(64) + b"\3" + group.to_bytes(2, "big") + bytes((len(point),)) + point


def sign(key: PrivateKey, scheme: str | int, octets: bytes) -> bytes:
    number = SignatureScheme[scheme] if isinstance(scheme, str) else scheme
    return perform(Operation.SIGN, key, number, octets, ALL_POWERS, None)


def assert_signed(key: PrivateKey, scheme: str, octets: bytes) -> None:
    """As every verifier will have it: raises InvalidSignature."""
    signature = sign(key, scheme, octets)
    algorithm = HASHES.get(scheme.rpartition("_")[2], hashes.SHA256())
    public = key.key.public_key() if isinstance(key, PSSPrivateKey) else key.public_key()
    if isinstance(public, ed25519.Ed25519PublicKey):
        public.verify(signature, octets)
    elif isinstance(public, ec.EllipticCurvePublicKey):
        public.verify(signature, octets, ec.ECDSA(algorithm))
    elif scheme in PKCS1:
        public.verify(signature, octets, padding.PKCS1v15(), algorithm)
    else:
        form = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
        public.verify(signature, octets, form, algorithm)


def refusal(key: PrivateKey, scheme: str | int, octets: bytes) -> str:
    with pytest.raises(NotTLS) as caught:
        sign(key, scheme, octets)
    return str(caught.value)


def key_for(scheme: str) -> PrivateKey:
    if scheme == "ed25519":
        return ED25519
    return BOUND if scheme.startswith("rsa_pss_pss") else ECDSA.get(scheme, RSA)


# --- what a TLS server signs -----------------------------------------------------------


@pytest.mark.parametrize("scheme", [*PSS, *ECDSA, "ed25519"])
@pytest.mark.parametrize("octets", [TLS13, TLS13_SHA384], ids=["SHA-256", "SHA-384"])
def test_a_certificate_verify_is_signed(scheme: str, octets: bytes) -> None:
    assert_signed(key_for(scheme), scheme, octets)


@pytest.mark.parametrize("scheme", [*PKCS1, *PSS, *ECDSA, "ed25519"])
@pytest.mark.parametrize("group", POINTS)
def test_a_server_key_exchange_is_signed(scheme: str, group: int) -> None:
    assert_signed(key_for(scheme), scheme, key_exchange(group))


@pytest.mark.parametrize("scheme", ECDSA)
@pytest.mark.parametrize("key", ECDSA.values(), ids=["P-256", "P-384", "P-521"])
def test_in_tls_1_2_any_hash_goes_with_any_curve(
    scheme: str, key: ec.EllipticCurvePrivateKey
) -> None:
    assert_signed(key, scheme, key_exchange())


@pytest.mark.parametrize("key", [RSA, BOUND, P256, P384, P521, ED25519])
def test_every_key_can_be_rehearsed(key: PrivateKey) -> None:
    rehearse(key)


# --- what it does not ------------------------------------------------------------------


def certificate_to_be_signed() -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forged")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .issuer_name(name)
        .subject_name(name)
        .public_key(P256.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(P256, hashes.SHA256())
    )
    return certificate.tbs_certificate_bytes


def request_to_be_signed() -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "forged")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    return request.sign(P256, hashes.SHA256()).tbs_certrequest_bytes


def web_token() -> bytes:
    parts = [{"alg": "RS256", "typ": "JWT"}, {"sub": "root", "iat": 1_800_000_000}]
    return b".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts
    )


def ssh_string(octets: bytes) -> bytes:
    return len(octets).to_bytes(4, "big") + octets


def ssh_login() -> bytes:
    """RFC 4252 §7: what a client signs to log in."""
    session = ssh_string(os.urandom(32)) + b"\x32"
    words = (b"root", b"ssh-connection", b"publickey")
    blob = RSA.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return (
        session
        + b"".join(map(ssh_string, words))
        + b"\1"
        + ssh_string(b"rsa-sha2-256")
        + ssh_string(blob)
    )


OTHERS = {
    "nothing": b"",
    "one octet": b"\0",
    "a bare SHA-256": os.urandom(32),
    "an SSH exchange hash": os.urandom(64),
    "an SSH login": ssh_login(),
    "a certificate": certificate_to_be_signed(),
    "a certificate request": request_to_be_signed(),
    "a web token": web_token(),
    "a DigestInfo": bytes.fromhex("3031300d060960864801650304020105000420") + os.urandom(32),
    "a TLS 1.3 client's CertificateVerify": TLS13.replace(b"server", b"client"),
    "an exported authenticator": b" " * 64 + b"Exported Authenticator\0" + os.urandom(32),
    "a delegated credential": b" " * 64 + b"TLS, server delegated credentials\0" + os.urandom(60),
    "a CertificateVerify with a space less": TLS13[1:],
    "a CertificateVerify with a space more": b" " + TLS13,
    "a CertificateVerify of another separator": VERIFY[:-1] + b"\1" + TLS13[-32:],
    "a TLS 1.2 client's transcript": b"\1\0\0\x40\3\3" + os.urandom(300),
    "a DHE key exchange": os.urandom(64)
    + b"".join(len(p).to_bytes(2, "big") + p for p in (os.urandom(256), b"\2", os.urandom(256))),
    "an explicit curve": os.urandom(64) + b"\1" + os.urandom(100),
    "randoms alone": os.urandom(64),
    "randoms and a curve type": os.urandom(64) + b"\3",
    "no point": key_exchange()[:68],
}


@pytest.mark.parametrize("octets", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("scheme", ["rsa_pkcs1_sha256", "rsa_pss_rsae_sha256", *ECDSA, "ed25519"])
def test_what_no_tls_server_signs_is_not_signed(scheme: str, octets: bytes) -> None:
    refusal(key_for(scheme), scheme, octets)


@pytest.mark.parametrize("length", [0, 1, 20, 28, 31, 33, 47, 49, 64, 500])
def test_a_transcript_hash_has_the_length_of_a_suites_hash(length: int) -> None:
    reason = f"a transcript hash of {length} octets"
    assert refusal(RSA, "rsa_pss_rsae_sha256", VERIFY + bytes(length)) == reason


@pytest.mark.parametrize("group", POINTS)
def test_a_point_has_the_length_of_its_group(group: int) -> None:
    octets, point = key_exchange(group), POINTS[group]
    for wrong in (
        octets[:-1],
        octets + b"\0",
        key_exchange(group, point[:-1]),
        key_exchange(group, point + b"\0"),
        key_exchange(group, b""),
    ):
        assert "a ServerKeyExchange of" in refusal(P256, "ecdsa_secp256r1_sha256", wrong)


@pytest.mark.parametrize("group", [0, 1, 19, 22, 26, 31, 256, 0x11EC, 0xFF01])
def test_only_the_groups_of_tls_1_2_servers_are_signed(group: int) -> None:
    for point in POINTS.values():
        assert "in group" in refusal(RSA, "rsa_pkcs1_sha256", key_exchange(group, point))


@pytest.mark.parametrize("group", CURVES)
def test_a_compressed_point_is_not_signed(group: int) -> None:
    compressed = point_of(CURVES[group], compressed=True)
    assert "in group" in refusal(RSA, "rsa_pkcs1_sha256", key_exchange(group, compressed))


@pytest.mark.parametrize("group", CURVES)
@pytest.mark.parametrize("first", [b"\0", b"\2", b"\3", b"\5", b"\6", b"\7"])
def test_a_point_of_the_right_length_in_another_form_is_not_signed(
    group: int, first: bytes
) -> None:
    octets = key_exchange(group, first + POINTS[group][1:])
    assert "compressed" in refusal(RSA, "rsa_pkcs1_sha256", octets)


@pytest.mark.parametrize("group", CURVES)
@given(data=st.data())
def test_a_point_off_the_curve_is_not_signed(group: int, data: st.DataObject) -> None:
    """Else there would be room in it for another text."""
    point = bytearray(POINTS[group])
    at = data.draw(st.integers(1, len(point) - 1))
    point[at] ^= data.draw(st.integers(1, 255))
    octets = key_exchange(group, bytes(point))
    assert "a point off" in refusal(RSA, "rsa_pkcs1_sha256", octets)


@pytest.mark.parametrize("scheme", PKCS1)
def test_pkcs_1_is_not_for_tls_1_3(scheme: str) -> None:
    for octets in (TLS13, TLS13_SHA384):
        assert refusal(RSA, scheme, octets) == f"{scheme} in TLS 1.3"


@pytest.mark.parametrize("scheme", ECDSA)
@pytest.mark.parametrize("key", ECDSA.values(), ids=["P-256", "P-384", "P-521"])
def test_in_tls_1_3_a_scheme_has_its_own_curve(
    scheme: str, key: ec.EllipticCurvePrivateKey
) -> None:
    if ECDSA[scheme] is key:
        assert_signed(key, scheme, TLS13)
    else:
        assert f"with a key on {key.curve.name}" in refusal(key, scheme, TLS13)


@pytest.mark.parametrize(
    ("key", "scheme"),
    [
        (RSA, "ecdsa_secp256r1_sha256"),
        (RSA, "ed25519"),
        (P256, "rsa_pss_rsae_sha256"),
        (P256, "rsa_pkcs1_sha256"),
        (P256, "ed25519"),
        (ED25519, "rsa_pss_rsae_sha256"),
        (ED25519, "ecdsa_secp256r1_sha256"),
    ],
)
def test_a_key_signs_in_its_own_schemes_alone(key: PrivateKey, scheme: str) -> None:
    for octets in (TLS13, key_exchange()):
        assert refusal(key, scheme, octets) == f"{scheme} with a key of another kind"


@pytest.mark.parametrize("scheme", [0, 0x0201, 0x0203, 0x0401 + 1, 0x0808, 0x0907, 0xFFFF])
def test_schemes_beyond_the_list_are_refused(scheme: int) -> None:
    """SHA-1 (0x0201, 0x0203) among them."""
    for key in (RSA, P256, ED25519):
        assert refusal(key, scheme, TLS13) == f"signature scheme 0x{scheme:04x}"


@given(st.binary(max_size=1024))
def test_of_any_octets_only_the_two_shapes_are_signed(octets: bytes) -> None:
    try:
        sign(ED25519, "ed25519", octets)
    except NotTLS:
        return
    tls13 = octets.startswith(VERIFY) and len(octets) - len(VERIFY) in (32, 48)
    assert tls13 or octets[64:65] == b"\3"


# --- what only some virtual hosts need ---------------------------------------------------


MARK = b"DOWNGRD\x01"
TLS12, TLS12_MARKED = frozenset({Power.SIGN_TLS12}), frozenset({Power.SIGN_TLS12_MARKED})
X448 = frozenset({Power.SIGN_TLS12_X448})


def marked(octets: bytes) -> bytes:
    """As a server signs it that speaks TLS 1.3, too (RFC 8446 §4.1.3)."""
    return octets[:56] + MARK + octets[64:]


@pytest.mark.parametrize(
    ("octets", "enough"),
    [
        (TLS13, [frozenset({Power.SIGN_TLS13})]),
        *((key_exchange(group), [TLS12]) for group in (23, 24, 25, 29)),
        *((marked(key_exchange(group)), [TLS12, TLS12_MARKED]) for group in (23, 24, 25, 29)),
        (key_exchange(30), [TLS12 | X448]),
        (marked(key_exchange(30)), [TLS12 | X448, TLS12_MARKED | X448]),
    ],
    # Not by the octets, which are random: all processes of a run have to collect the same tests.
    ids=[
        "tls13",
        *("P-256", "P-384", "P-521", "X25519"),
        *("P-256-marked", "P-384-marked", "P-521-marked", "X25519-marked"),
        *("X448", "X448-marked"),
    ],
)
def test_each_shape_takes_its_powers(octets: bytes, enough: list[frozenset[Power]]) -> None:
    """With every set of powers that there is."""
    sets = [frozenset(some) for n in range(len(Power) + 1) for some in combinations(Power, n)]
    for granted in sets:
        if any(needed <= granted for needed in enough):
            perform(Operation.SIGN, ED25519, SignatureScheme.ed25519, octets, granted, None)
        else:
            with pytest.raises(NotGranted):
                perform(Operation.SIGN, ED25519, SignatureScheme.ed25519, octets, granted, None)


# --- a client's key ------------------------------------------------------------------------


AS_A_CLIENT = frozenset({Power.SIGN_TLS13_CLIENT})
CLIENT_VERIFY = VERIFY.replace(b"server", b"client")


@pytest.mark.parametrize("length", [32, 48])
@pytest.mark.parametrize("scheme", ["rsa_pss_rsae_sha256", *ECDSA, "ed25519"])
def test_a_clients_key_signs_a_clients_certificate_verify(scheme: str, length: int) -> None:
    octets, key = CLIENT_VERIFY + os.urandom(length), key_for(scheme)
    assert perform(Operation.SIGN, key, SignatureScheme[scheme], octets, AS_A_CLIENT, None)


@pytest.mark.parametrize("octets", [TLS13, marked(key_exchange(29))], ids=["1.3", "1.2"])
def test_a_clients_key_signs_nothing_of_a_servers(octets: bytes) -> None:
    with pytest.raises(NotGranted):
        perform(Operation.SIGN, ED25519, SignatureScheme.ed25519, octets, AS_A_CLIENT, None)
    with pytest.raises(NotGranted):
        perform(Operation.DECRYPT, RSA, 0x0303, bytes(256), AS_A_CLIENT, None)


@pytest.mark.parametrize("length", [0, 20, 31, 33, 47, 49, 64])
def test_a_client_signs_no_other_length(length: int) -> None:
    octets = CLIENT_VERIFY + bytes(length)
    with pytest.raises(NotTLS, match="a transcript hash"):
        perform(Operation.SIGN, ED25519, SignatureScheme.ed25519, octets, AS_A_CLIENT, None)


@given(st.binary(max_size=1024))
def test_of_any_octets_a_clients_key_signs_none(octets: bytes) -> None:
    with pytest.raises((NotTLS, NotGranted)):
        perform(Operation.SIGN, ED25519, SignatureScheme.ed25519, octets, AS_A_CLIENT, None)


@pytest.mark.parametrize("scheme", ["rsa_pkcs1_sha256", "ecdsa_secp384r1_sha384"])
def test_a_client_keeps_to_the_schemes_of_tls_1_3(scheme: str) -> None:
    """PKCS #1 is not among them, and each curve has its own."""
    key = RSA if scheme.startswith("rsa") else key_for("ecdsa_secp256r1_sha256")
    octets = CLIENT_VERIFY + bytes(32)
    with pytest.raises(NotTLS, match=r"in TLS 1\.3"):
        perform(Operation.SIGN, key, SignatureScheme[scheme], octets, AS_A_CLIENT, None)


@pytest.mark.parametrize(
    "random",
    [bytes(24) + b"DOWNGRD\x00", bytes(23) + MARK + bytes(1), MARK + bytes(24), bytes(32)],
    ids=["of TLS 1.1", "one octet early", "in front", "none"],
)
def test_the_mark_of_a_downgrade_is_at_the_end_of_the_servers_random(random: bytes) -> None:
    octets = key_exchange()
    # The client's random is the client's: a mark there counts for nothing.
    unmarked = bytes(24) + MARK + random + octets[64:]
    with pytest.raises(NotGranted, match="without the mark of a downgrade"):
        perform(Operation.SIGN, ED25519, SignatureScheme.ed25519, unmarked, TLS12_MARKED, None)


def test_decryption_takes_a_power_of_its_own() -> None:
    with pytest.raises(NotGranted):
        perform(Operation.DECRYPT, RSA, 0x0303, bytes(256), ALL_POWERS - {Power.DECRYPT}, None)


# --- decrypt ---------------------------------------------------------------------------


def encrypted(secret: bytes, key: RSAPublicKey | None = None) -> bytes:
    return (key or RSA.public_key()).encrypt(secret, padding.PKCS1v15())


def decrypt(ciphertext: bytes, version: int = 0x0303, key: PrivateKey = RSA) -> bytes:
    return perform(Operation.DECRYPT, key, version, ciphertext, ALL_POWERS, None)


def test_a_premaster_secret_is_decrypted() -> None:
    secret = b"\3\3" + os.urandom(46)
    assert decrypt(encrypted(secret)) == secret


BAD = {
    "another version": encrypted(b"\3\1" + bytes(46)),
    "a short secret": encrypted(b"\3\3" + bytes(45)),
    "a long secret": encrypted(b"\3\3" + bytes(47)),
    "an empty secret": encrypted(b""),
    "one octet": encrypted(b"\3"),
    "bad padding": os.urandom(256 - 1).rjust(256, b"\0"),
    "another key's": encrypted(b"\3\3" + bytes(46), OTHER_RSA.public_key())[1:].rjust(256, b"\0"),
    "OAEP": RSA.public_key().encrypt(
        b"\3\3" + bytes(46),
        padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None),
    ),
    "the modulus": RSA.public_key().public_numbers().n.to_bytes(256, "big"),
    "more than the modulus": b"\xff" * 256,
    "zero": bytes(256),
    "one": bytes(255) + b"\1",
    **{f"{length} octets": bytes(length - 1) + b"\1" for length in (1, 48, 255, 257, 512, 1024)},
    "an octet less": encrypted(b"\3\3" + bytes(46))[1:],
    "a zero in front": b"\0" + encrypted(b"\3\3" + bytes(46)),
}


@pytest.mark.parametrize("ciphertext", BAD.values(), ids=BAD)
def test_whatever_is_wrong_the_answer_is_random_octets(ciphertext: bytes) -> None:
    """Bleichenbacher: nothing in the answer says what was wrong, or that anything was."""
    answers = {decrypt(ciphertext) for _ in range(4)}
    assert {len(answer) for answer in answers} == {PREMASTER_SECRET_OCTETS}
    assert len(answers) == 4, "an answer that can be told from a random one"


def test_the_version_is_the_clients_own() -> None:
    secret = b"\3\1" + os.urandom(46)
    assert decrypt(encrypted(secret), 0x0301) == secret
    assert decrypt(encrypted(secret), 0x0303) != secret


@pytest.mark.parametrize("key", [P256, ED25519])
def test_only_rsa_keys_decrypt(key: PrivateKey) -> None:
    with pytest.raises(NotTLS, match="of another kind"):
        decrypt(bytes(256), key=key)


# --- keys that are bound to PSS ----------------------------------------------------------


def test_a_key_that_is_bound_to_pss_does_nothing_else() -> None:
    for scheme in [*PKCS1, "rsa_pss_rsae_sha256", "ed25519"]:
        assert "with a key of another kind" in refusal(BOUND, scheme, key_exchange())
    # And what is for such keys alone, a plain one does not sign.
    assert "with a key of another kind" in refusal(RSA, "rsa_pss_pss_sha256", TLS13)
    with pytest.raises(NotTLS, match="RSA key exchange with a key of another kind"):
        perform(Operation.DECRYPT, BOUND, 0x0303, bytes(256), ALL_POWERS, None)


def test_a_key_that_is_bound_to_a_digest_signs_with_no_other() -> None:
    key = PSSPrivateKey(RSA, BOUND.binding._replace(digest="sha384"))
    assert_signed(key, "rsa_pss_pss_sha384", TLS13)
    for scheme in ("rsa_pss_pss_sha256", "rsa_pss_pss_sha512"):
        assert refusal(key, scheme, TLS13) == f"{scheme} with a key that is bound to sha384"
    rehearse(key)


# --- ML-DSA ------------------------------------------------------------------------------


@pytest.mark.parametrize(("parameter_set", "types"), mldsa.KEY_TYPES.items())
def test_ml_dsa_signs_in_tls_1_3_alone(parameter_set: str, types: tuple[Any, Any]) -> None:
    key, scheme = types[0].generate(), parameter_set.lower().replace("-", "")
    key.public_key().verify(sign(key, scheme, TLS13), TLS13)
    rehearse(key)
    assert refusal(key, scheme, key_exchange()) == f"{scheme} in TLS 1.2"
    other = "mldsa65" if scheme == "mldsa44" else "mldsa44"
    assert refusal(key, other, TLS13) == f"{other} with a key of another kind"
