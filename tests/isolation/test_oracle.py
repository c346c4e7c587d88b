"""keyd asked, over the channel of a worker that was taken over, for what it must refuse."""

import base64
import datetime
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from integration.certificates import Authority, Certificate
from integration.hellos import TLS12 as VERSION_12
from integration.hellos import TLS13 as VERSION_13
from integration.instance import Instance, free_port
from integration.peers import Listener

from keyd.protocol import Operation, Reply, Request, SignatureScheme, Status
from keyd.reference import key_id

from .harness import Relay, infected, one_more_connection

TLS13 = b" " * 64 + b"TLS 1.3, server CertificateVerify\0"
HANDSHAKE = TLS13 + bytes(range(32))
ECDSA = SignatureScheme.ecdsa_secp256r1_sha256


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def certificates(authority: Authority) -> dict[str, Certificate]:
    """Of the listener that is attacked (``own``), of the one where decrypt is on, and of others."""
    return {
        "own": authority.issue("P-256"),
        "other": authority.issue("RSA-2048", "other.test"),
        "tls13": authority.issue("P-256", "tls13.test"),
        "tls12": authority.issue("P-256", "tls12.test"),
    }


@pytest.fixture(scope="module")
def instance(
    certificates: dict[str, Certificate],
    backend: Listener,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Instance]:
    ports = [free_port() for _ in range(4)]
    other = certificates["other"]
    with infected(
        tmp_path_factory.mktemp("infected"),
        certificates["own"],
        backend.address,
        listen=[{"address": f"127.0.0.1:{port}"} for port in ports],
        vhost=[
            {"local_port": ports[0]},
            {
                "local_port": ports[1],
                "certificate": other.certificate,
                "key": other.key,
                "rsa_key_exchange": True,
            },
            {
                "local_port": ports[2],
                "certificate": certificates["tls13"].certificate,
                "key": certificates["tls13"].key,
                "min_version": "TLSv1.3",
                "groups": ["X25519", "X448"],
            },
            {
                "local_port": ports[3],
                "certificate": certificates["tls12"].certificate,
                "key": certificates["tls12"].key,
                "max_version": "TLSv1.2",
                "groups": ["X448", "P-256"],
            },
        ],
    ) as instance:
        yield instance


@pytest.fixture
def relay(instance: Instance) -> Iterator[Relay]:
    relay = Relay(instance)
    yield relay
    relay.close()
    one_more_connection(instance)


def private_key(certificate: Certificate) -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey:
    key = serialization.load_pem_private_key(certificate.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
    return key


def request(
    certificate: Certificate,
    octets: bytes,
    scheme: int = ECDSA,
    operation: Operation = Operation.SIGN,
) -> bytes:
    return Request(
        operation, scheme, key_id(private_key(certificate).public_key()), octets
    ).encode()


def assert_refused(
    instance: Instance, relay: Relay, message: bytes, status: Status, attempted: str
) -> None:
    """Refused, the channel closed, and recorded with the connection that it came from."""
    since = len(instance.events())
    assert Reply.decode(relay.ask(message)) == Reply(status)
    assert relay.ask(message) in (b"", b"EPIPE", b"ECONNRESET")
    event = instance.wait_for_event("keyd_refused", since=since, client=relay.client)
    # By its number: a client's port may have been an earlier client's.
    begun = instance.wait_for_event("connection_begun", connection=event["connection"])
    assert event["level"] == "alarm"
    assert begun["client"] == relay.client
    assert event["uid"] == begun["uid"]
    assert event["status"] == status.name.lower()
    assert attempted in event["attempted"]


def test_what_a_handshake_needs_is_signed(
    instance: Instance, relay: Relay, certificates: dict[str, Certificate]
) -> None:
    """The control: the way to keyd works."""
    octets = relay.handshake()
    reply = Reply.decode(relay.ask(request(certificates["own"], octets)))
    assert reply.status is Status.DONE
    key = private_key(certificates["own"]).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(reply.payload, octets, ec.ECDSA(hashes.SHA256()))


def test_a_second_signature(
    instance: Instance, relay: Relay, certificates: dict[str, Certificate]
) -> None:
    message = request(certificates["own"], relay.handshake())
    assert Reply.decode(relay.ask(message)).status is Status.DONE
    assert_refused(instance, relay, message, Status.EXHAUSTED, "sign beyond")


# --- octets that no TLS server signs --------------------------------------------------------


def tlv(tag: int, *content: bytes) -> bytes:
    """DER."""
    octets = b"".join(content)
    length = len(octets)
    if length < 128:
        return bytes((tag, length)) + octets
    return bytes((tag, 0x81, length)) + octets


def certificate_in_disguise(issuer: x509.Name) -> bytes:
    """A TBSCertificate in the shape of a ServerKeyExchange with a P-521 point.

    At octet 64, within a serial number of 59 octets, it has what announces such a point, and
    it is of just the length: 64 + 4 + 133. Signed, it makes Mallory's key the one of "a.b".
    """
    mallory = ed25519.Ed25519PrivateKey.generate().public_key()
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")  # ecdsa-with-SHA256
    name = tlv(0x30, tlv(0x82, b"a.b"))
    alternative = tlv(0x30, bytes.fromhex("0603551d11"), tlv(0x04, name))
    serial = b"\1" * 54 + b"\3\0\x19\x85\4"
    octets = tlv(
        0x30,
        bytes.fromhex("a003020102"),
        tlv(0x02, serial),
        algorithm,
        issuer.public_bytes(),
        tlv(0x30, tlv(0x17, b"260101000000Z"), tlv(0x17, b"350101000000Z")),
        tlv(0x30),
        mallory.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        tlv(0xA3, tlv(0x30, alternative)),
    )
    assert len(octets) == 64 + 4 + 133
    assert octets[64:69] == b"\3\0\x19\x85\4"
    return octets


def certificate_to_be_signed() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mallory")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now)
    return builder.sign(key, hashes.SHA256()).tbs_certificate_bytes


def jwt() -> bytes:
    parts = [{"alg": "ES256", "typ": "JWT"}, {"sub": "admin", "exp": 4102444800}]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts]
    return b".".join(encoded)


def ssh_login() -> bytes:
    """RFC 4252 §7: what a client signs to log in with a public key."""
    words = [b"root", b"ssh-connection", b"publickey"]
    key = [b"ecdsa-sha2-nistp256", bytes(104)]
    strings = [struct.pack("!I", len(word)) + word for word in (*words, *key)]
    session = struct.pack("!I", 32) + bytes(32)
    return session + b"\x32" + b"".join(strings[:3]) + b"\1" + b"".join(strings[3:])


def key_exchange(group: int, point: bytes) -> bytes:
    """A TLS 1.2 ServerKeyExchange (RFC 8422 §5.4)."""
    return bytes(64) + b"\3" + group.to_bytes(2, "big") + bytes([len(point)]) + point


ROOT = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
NOT_TLS = {
    "a certificate": (certificate_to_be_signed(), "no TLS server signs"),
    "a certificate in disguise": (certificate_in_disguise(ROOT), "a point off secp521r1"),
    "a JWT": (jwt(), "no TLS server signs"),
    "an SSH exchange hash": (hashlib.sha256(b"exchange").digest(), "32 octets"),
    "an SSH login": (ssh_login(), "no TLS server signs"),
    "a TLS client's CertificateVerify": (
        HANDSHAKE.replace(b"server", b"client"),
        "no TLS server signs",
    ),
    "a delegated credential": (
        b" " * 64 + b"TLS, server delegated credentials\0" + bytes(32),
        "no TLS server signs",
    ),
    "a transcript hash of another length": (TLS13 + bytes(20), "a transcript hash of 20"),
    "a CertificateVerify with more behind it": (HANDSHAKE + b"x", "a transcript hash of 33"),
    "a ServerKeyExchange of another group": (key_exchange(22, bytes(65)), "in group 22"),
    "a ServerKeyExchange with explicit parameters": (
        bytes(64) + b"\1" + bytes(67),
        "no TLS server signs",
    ),
    "a ServerKeyExchange with finite-field parameters": (
        bytes(64) + b"\1\0" + bytes(256),
        "no TLS server signs",
    ),
    "a compressed point": (key_exchange(23, b"\2" + bytes(64)), "compressed"),
    "a point that is none": (key_exchange(23, b"\4" + bytes(64)), "a point off secp256r1"),
    "nothing but randoms": (bytes(64), "no TLS server signs"),
    "a single octet": (b"x", "no TLS server signs"),
}


@pytest.mark.parametrize("what", NOT_TLS)
def test_octets_that_no_tls_server_signs(
    instance: Instance, relay: Relay, certificates: dict[str, Certificate], what: str
) -> None:
    octets, attempted = NOT_TLS[what]
    message = request(certificates["own"], octets)
    assert_refused(instance, relay, message, Status.NOT_TLS, attempted)


def test_the_certificate_in_disguise_would_be_one() -> None:
    """The control: signed by a key that signs anything, it is a certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    octets = certificate_in_disguise(ROOT)
    signature = key.sign(octets, ec.ECDSA(hashes.SHA256()))
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")
    content = octets + algorithm + tlv(0x03, b"\0" + signature)
    parsed = x509.load_der_x509_certificate(b"\x30\x82" + len(content).to_bytes(2, "big") + content)
    key.public_key().verify(
        parsed.signature, parsed.tbs_certificate_bytes, ec.ECDSA(hashes.SHA256())
    )
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["a.b"]


@pytest.mark.parametrize(
    "scheme", [0x0401, 0x0603, 0x0804, 0x0807, 0x0203, 0x0000], ids=lambda number: f"{number:#06x}"
)
def test_a_scheme_that_is_not_the_keys(
    instance: Instance, relay: Relay, certificates: dict[str, Certificate], scheme: int
) -> None:
    message = request(certificates["own"], HANDSHAKE, scheme)
    assert_refused(instance, relay, message, Status.NOT_TLS, "sign of")


# --- other keys, other operations -----------------------------------------------------------


def test_another_listeners_key(
    instance: Instance, relay: Relay, certificates: dict[str, Certificate]
) -> None:
    scheme = SignatureScheme.rsa_pss_rsae_sha256
    message = request(certificates["other"], HANDSHAKE, scheme)
    key = key_id(private_key(certificates["other"]).public_key()).hex()
    assert_refused(instance, relay, message, Status.NOT_GRANTED, f"sign with key {key}")


def test_another_listeners_decryption(
    instance: Instance, relay: Relay, certificates: dict[str, Certificate]
) -> None:
    message = request(certificates["other"], bytes(256), 0x0303, Operation.DECRYPT)
    assert_refused(instance, relay, message, Status.NOT_GRANTED, "decrypt with key")


def test_an_unknown_key(instance: Instance, relay: Relay) -> None:
    message = Request(Operation.SIGN, ECDSA, bytes(32), HANDSHAKE).encode()
    assert_refused(instance, relay, message, Status.NOT_GRANTED, "sign with key 0000")


def test_decryption_where_it_is_off(
    instance: Instance, relay: Relay, certificates: dict[str, Certificate]
) -> None:
    message = request(certificates["own"], bytes(256), 0x0303, Operation.DECRYPT)
    assert_refused(instance, relay, message, Status.NOT_GRANTED, "decrypt with key")


@pytest.mark.parametrize("good", [True, False])
def test_decryption_where_it_is_on(
    instance: Instance, certificates: dict[str, Certificate], good: bool
) -> None:
    """The control; and 48 octets, whatever was encrypted."""
    key = private_key(certificates["other"])
    assert isinstance(key, rsa.RSAPrivateKey)
    secret = b"\3\3" + bytes(range(46)) if good else b"no premaster secret"
    encrypted = key.public_key().encrypt(secret, padding.PKCS1v15())
    relay = relay_at(instance, 1)
    message = request(certificates["other"], encrypted, 0x0303, Operation.DECRYPT)
    reply = Reply.decode(relay.ask(message))
    assert reply.status is Status.DONE
    assert len(reply.payload) == 48
    assert (reply.payload == secret) == good
    assert_refused(instance, relay, message, Status.EXHAUSTED, "decrypt beyond")
    relay.close()


def relay_at(instance: Instance, listener: int, *versions: bytes) -> Relay:
    """Through a worker whose client came to another listener than the first one.

    It offers these versions, or both.
    """
    listening = instance.wait_for_events(listener + 1, "listening")
    addresses = [event["address"] for event in listening]
    port, instance.port = instance.port, int(addresses[listener].rpartition(":")[2])
    try:
        return Relay(instance, hello={"versions": versions or (VERSION_13, VERSION_12)})
    finally:
        instance.port = port


# --- other versions of TLS ------------------------------------------------------------------

KEY_EXCHANGES = {"X25519": key_exchange(29, bytes(32)), "X448": key_exchange(30, bytes(56))}
#: As a server signs it that speaks TLS 1.3, too (RFC 8446 §4.1.3).
MARKED = {
    name: octets[:56] + b"DOWNGRD\x01" + octets[64:] for name, octets in KEY_EXCHANGES.items()
}
#: By the name of a certificate: its listener, and what may be signed there.
SIGNED_AT: dict[str, tuple[int, dict[str, bytes]]] = {
    "own": (0, {"TLS 1.3": HANDSHAKE, "TLS 1.2": MARKED["X25519"]}),
    "tls13": (2, {"TLS 1.3": HANDSHAKE}),
    "tls12": (3, {"TLS 1.2": KEY_EXCHANGES["X25519"], "X448": KEY_EXCHANGES["X448"]}),
}
NOT_SIGNED_AT = [
    ("own", MARKED["X448"], "a ServerKeyExchange of TLS 1.2 in X448"),
    # A client that speaks both would not see that it was made to speak TLS 1.2.
    (
        "own",
        KEY_EXCHANGES["X25519"],
        "a ServerKeyExchange of TLS 1.2 without the mark of a downgrade",
    ),
    ("tls13", MARKED["X25519"], "a ServerKeyExchange of TLS 1.2"),
    ("tls13", MARKED["X448"], "a ServerKeyExchange of TLS 1.2"),
    ("tls12", HANDSHAKE, "a CertificateVerify of TLS 1.3"),
]


@pytest.mark.parametrize(
    ("name", "octets", "what"),
    NOT_SIGNED_AT,
    ids=[f"{name}-{what[2:]}" for name, _, what in NOT_SIGNED_AT],
)
def test_a_version_or_group_that_a_virtual_host_does_not_have(
    instance: Instance,
    certificates: dict[str, Certificate],
    name: str,
    octets: bytes,
    what: str,
) -> None:
    """Else a site of TLS 1.3 alone could be impersonated in TLS 1.2."""
    relay = relay_at(instance, SIGNED_AT[name][0])
    message = request(certificates[name], octets)
    assert_refused(instance, relay, message, Status.NOT_GRANTED, f"sign of {what} with key")
    relay.close()


@pytest.mark.parametrize("name", SIGNED_AT)
def test_the_versions_and_groups_that_a_virtual_host_has(
    instance: Instance, certificates: dict[str, Certificate], name: str
) -> None:
    """The control."""
    listener, signed = SIGNED_AT[name]
    for version, octets in signed.items():
        tls13 = version == "TLS 1.3"
        relay = relay_at(instance, listener, VERSION_13 if tls13 else VERSION_12)
        octets = relay.handshake() if tls13 else octets
        assert Reply.decode(relay.ask(request(certificates[name], octets))).status is Status.DONE
        relay.close()


@pytest.mark.parametrize(
    "message",
    [
        b"x",
        bytes(2000),
        b"\2" + request.__name__.encode() * 10,
        b"\1\4" + bytes(100),
        b"\1O" + bytes(14) + b"\xff\xff" + b"\6" + bytes(32),  # what the parent says
        b"\1R" + bytes(20),  # what keyd says
    ],
)
def test_nonsense(instance: Instance, relay: Relay, message: bytes) -> None:
    assert_refused(instance, relay, message, Status.MALFORMED, "a request")


def test_after_the_handshake_timeout(
    certificates: dict[str, Certificate], backend: Listener, tmp_path: Path
) -> None:
    """Not even the first signature."""
    with infected(
        tmp_path, certificates["own"], backend.address, worker={"handshake_timeout": "4500ms"}
    ) as instance:
        # Two seconds after its time, the parent ends it.
        relay = Relay(instance, seconds=5)
        answer = relay.ask(request(certificates["own"], HANDSHAKE))
        # A worker that comes late has an answer, and waits for no other keyd.
        assert Reply.decode(answer) == Reply(Status.EXPIRED)
        instance.wait_for_event("keyd_refused", status="expired", client=relay.client)
        relay.close()
        one_more_connection(instance)
