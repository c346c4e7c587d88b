"""keyd's decryption: 48 octets, whatever it is given, and nothing to be learnt from them."""

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from keyd.powers import ALL_POWERS, NotTLS, perform
from keyd.protocol import PREMASTER_SECRET_OCTETS, Operation

VERSION = 0x0303
SECRET = b"\3\3" + bytes(range(46))
_KEY = rsa.generate_private_key(65537, 2048)
_SIZE = 256


def encrypt(encoded: bytes) -> bytes:
    numbers = _KEY.public_key().public_numbers()
    return pow(int.from_bytes(encoded, "big"), numbers.e, numbers.n).to_bytes(_SIZE, "big")


def padded(content: bytes, start: bytes = b"\0\2") -> bytes:
    return start + b"\xa5" * (_SIZE - 3 - len(content)) + b"\0" + content


def decrypt(ciphertext: bytes, version: int = VERSION) -> bytes:
    return perform(Operation.DECRYPT, _KEY, version, ciphertext, ALL_POWERS, None)


@pytest.mark.parametrize("version", [0x0301, 0x0302, 0x0303])
def test_a_good_one_gives_the_secret(version: int) -> None:
    secret = version.to_bytes(2, "big") + SECRET[2:]
    assert decrypt(encrypt(padded(secret)), version) == secret


@pytest.mark.parametrize(
    "encoded",
    [
        padded(b"\3\1" + SECRET[2:]),
        padded(b"\3\2" + SECRET[2:]),
        padded(b"\2\3" + SECRET[2:]),
        padded(SECRET, b"\0\1"),
        padded(SECRET, b"\1\2"),
        padded(SECRET, b"\0\0"),
        b"\0\2" + b"\xa5" * (_SIZE - 2),
        b"\0\2" + b"\xa5" * 7 + b"\0" + b"\xa5" * (_SIZE - 10),
        padded(SECRET[:-1]),
        padded(SECRET + b"\0"),
        padded(SECRET[:1]),
        padded(SECRET[:2]),
        padded(b""),
        padded(SECRET * 5),
        bytes(_SIZE),
        bytes(_SIZE - 1) + b"\1",
    ],
    ids=lambda encoded: encoded[:3].hex(),
)
def test_a_bad_one_gives_random_octets(encoded: bytes) -> None:
    """Others each time: what is the same twice would tell that it was no secret."""
    ciphertext = encrypt(encoded)
    answers = {decrypt(ciphertext) for _ in range(20)}
    assert len(answers) == 20
    assert {len(answer) for answer in answers} == {PREMASTER_SECRET_OCTETS}
    assert not any(answer in encoded for answer in answers)


def _modulus() -> int:
    return _KEY.public_key().public_numbers().n


@pytest.mark.parametrize(
    "number", [_modulus, lambda: _modulus() + 1, lambda: (1 << 2048) - 1], ids=["n", "n+1", "max"]
)
def test_a_number_above_the_modulus_gives_random_octets(number: Callable[[], int]) -> None:
    ciphertext = number().to_bytes(_SIZE, "big")
    assert len({decrypt(ciphertext) for _ in range(20)}) == 20


@pytest.mark.parametrize("length", [0, 1, 48, 255, 257, 512, 1024])
def test_another_length_than_the_modulus_gives_random_octets(length: int) -> None:
    """RFC 5246 §7.4.7.1: the handshake goes on, with a secret that nobody has."""
    answers = {decrypt(bytes(length)) for _ in range(20)}
    assert len(answers) == 20
    assert {len(answer) for answer in answers} == {PREMASTER_SECRET_OCTETS}


def test_a_key_of_another_kind_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(NotTLS, match="another kind"):
        perform(Operation.DECRYPT, key, VERSION, bytes(256), ALL_POWERS, None)
