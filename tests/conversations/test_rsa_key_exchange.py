"""The RSA key exchange of TLS 1.2, whose padding must not be told from what is none.

RFC 5246 §7.4.7.1: whatever is wrong with an encrypted premaster secret, the handshake goes on, with
another secret, and fails at Finished. Who could tell one failure from another could decrypt
recorded sessions (Bleichenbacher 1998). keyd decrypts, and OpenSSL never sees which it was.
"""

from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from integration.certificates import Certificate
from integration.instance import Instance
from tlslite.constants import CipherSuite

from .client import HANDSHAKE, TLS12, Client, Handshake, message, vector
from .outcome import SERVED, outcome

SUITE = CipherSuite.TLS_RSA_WITH_AES_128_GCM_SHA256
OCTETS = 256
SECRET = b"\3\3" + bytes(range(1, 47))

Encrypt = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def encrypt(rsa_certificate: Certificate) -> Encrypt:
    """RSA without padding."""
    key = x509.load_pem_x509_certificate(rsa_certificate.certificate.read_bytes()).public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    numbers = key.public_numbers()

    def encrypt(block: bytes) -> bytes:
        return pow(int.from_bytes(block), numbers.e, numbers.n).to_bytes(OCTETS)

    return encrypt


def padded(secret: bytes = SECRET, start: bytes = b"\0\2", separator: bytes = b"\0") -> bytes:
    """PKCS #1 v1.5 (RFC 8017 §7.2.1), of the modulus's length."""
    padding = OCTETS - len(start) - len(separator) - len(secret)
    return start + b"\xaa" * padding + separator + secret


def with_octet(place: int, octet: int) -> bytes:
    block = bytearray(padded())
    block[place] = octet
    return bytes(block)


def converse_with(exchange: bytes, secret: bytes = SECRET) -> Callable[[Client], None]:
    """To the end, as if the server had got this secret."""

    def converse(client: Client) -> None:
        client.start()
        client.exchange_keys(exchange, secret)
        client.change_cipher()
        client.say(client.finished())
        client.hear_last_flight()

    return converse


def of(instance: Instance, exchange: bytes, secret: bytes = SECRET) -> tuple[str, str]:
    """What comes of it, and what is logged."""
    # Its port may have been another's.
    earlier = len(instance.events())
    with Client(instance.port, TLS12, SUITE, b"rsa.localhost") as client:
        host, port = client.socket.getsockname()
        came = outcome(client, converse_with(exchange, secret))
    if came == SERVED:
        return came, ""
    event = instance.wait_for_event("handshake_failed", since=earlier, client=f"{host}:{port}")
    return came, f"{event['end']}: {event['detail']}"


BLOCKS = {
    "a first octet that is not 0": with_octet(0, 1),
    "a first octet of 128": b"\x7f" + padded()[1:],
    "type 1": padded(start=b"\0\1"),
    "type 0": padded(start=b"\0\0"),
    "type 3": padded(start=b"\0\3"),
    "a zero first in the padding": with_octet(2, 0),
    "a zero in the padding's first eight octets": with_octet(9, 0),
    "a zero behind the padding's first eight octets": with_octet(10, 0),
    "a zero an octet before the secret's place": with_octet(OCTETS - 50, 0),
    "no zero": padded(SECRET.replace(b"\0", b"\1"), separator=b"\1"),
    "no secret": padded(b""),
    "a secret of one octet": padded(b"\3"),
    "a secret of 47 octets": padded(SECRET[1:]),
    "a secret of 49 octets": padded(SECRET + b"\1"),
    "a secret of 48 octets and its padding short": b"\0\2" + b"\xaa" * 7 + b"\0" + bytes(246),
    "version 3.2": padded(b"\3\2" + SECRET[2:]),
    "version 3.4": padded(b"\3\4" + SECRET[2:]),
    "version 2.3": padded(b"\2\3" + SECRET[2:]),
    "version 0.0": padded(b"\0\0" + SECRET[2:]),
    "nothing but zeros": bytes(OCTETS),
    "one": bytes(OCTETS - 1) + b"\1",
}

#: Made of a good one.
CIPHERTEXTS: dict[str, Callable[[bytes], bytes]] = {
    "another ciphertext": lambda good: good[:-1] + bytes((good[-1] ^ 1,)),
    "an octet short, at its end": lambda good: good[:-1],
    "an octet short, at its start": lambda good: good[1:],
    "an octet more, at its end": lambda good: good + b"\0",
    "a zero more, at its start": lambda good: b"\0" + good,
    "one octet": lambda good: b"\1",
    "none": lambda good: b"",
    "half of it": lambda good: good[: OCTETS // 2],
    "twice": lambda good: good + good,
    "more than the modulus": lambda good: b"\xff" * OCTETS,
}


def test_a_premaster_secret_is_decrypted(instance: Instance, encrypt: Encrypt) -> None:
    """The control: with nothing wrong, it is served."""
    assert of(instance, vector(2, encrypt(padded()))) == (SERVED, "")


@pytest.fixture(scope="module")
def failure(instance: Instance, encrypt: Encrypt) -> tuple[str, str]:
    """Of a client whose premaster secret is as it should be, and which does not know it."""
    failed = of(instance, vector(2, encrypt(padded())), secret=bytes(48))
    assert failed[0] == "bad_record_mac"
    return failed


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_bad_padding_is_told_from_nothing(
    instance: Instance, encrypt: Encrypt, failure: tuple[str, str], block: bytes
) -> None:
    assert len(block) == OCTETS
    assert of(instance, vector(2, encrypt(block))) == failure
    # And with what might be taken for the secret.
    assert of(instance, vector(2, encrypt(block)), block[-48:]) == failure


@pytest.mark.parametrize("change", CIPHERTEXTS.values(), ids=CIPHERTEXTS)
def test_a_ciphertext_that_is_none_is_told_from_nothing(
    instance: Instance, encrypt: Encrypt, failure: tuple[str, str], change: Callable[[bytes], bytes]
) -> None:
    assert of(instance, vector(2, change(encrypt(padded())))) == failure


@pytest.mark.parametrize(
    "exchange", [b"", b"\1", b"\1\0", b"\1\0" + bytes(255), b"\1\0" + bytes(257)]
)
def test_a_key_exchange_of_another_form_gets_decode_error(
    instance: Instance, exchange: bytes
) -> None:
    """§7.2.2: the vector's length is no secret."""
    with Client(instance.port, TLS12, SUITE, b"rsa.localhost") as client:

        def converse(client: Client) -> None:
            client.start()
            client.record(HANDSHAKE, message(Handshake.CLIENT_KEY_EXCHANGE, exchange))
            client.hear()

        assert outcome(client, converse) == "decode_error"
