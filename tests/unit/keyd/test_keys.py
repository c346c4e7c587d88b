"""Private keys from files: what is taken, and what is wrong with the others."""

import base64
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from keyd.keys import UnusableKey, load_private_key

NUMBERS = rsa.generate_private_key(65537, 2048).private_numbers()
OTHERS = rsa.generate_private_key(65537, 2048).private_numbers()
FIELDS = ("p", "q", "d", "dmp1", "dmq1", "iqmp", "n", "e")

Numbers = dict[str, int]


def numbers_of(key: rsa.RSAPrivateNumbers) -> Numbers:
    return {
        **{field: getattr(key, field) for field in FIELDS[:6]},
        "n": key.public_numbers.n,
        "e": key.public_numbers.e,
    }


def consistent(p: int, q: int, e: int = 65537) -> Numbers:
    """What would be a key, if p and q were primes."""
    d = pow(e, -1, math.lcm(p - 1, q - 1))
    return {
        "p": p, "q": q, "d": d, "dmp1": d % (p - 1), "dmq1": d % (q - 1),
        "iqmp": pow(q, -1, p), "n": p * q, "e": e,
    }  # fmt: skip


def write(path: Path, numbers: Numbers) -> str:
    """A file with these numbers, whatever they are: RSAPrivateKey of RFC 8017 §A.1.2."""
    order = ("n", "e", "d", "p", "q", "dmp1", "dmq1", "iqmp")
    content = b"".join(map(integer, [0, *(numbers[field] for field in order)]))
    der = b"\x30" + length(len(content)) + content
    armour = "-----{} RSA PRIVATE KEY-----\n"
    path.write_text(
        armour.format("BEGIN") + base64.encodebytes(der).decode() + armour.format("END")
    )
    return str(path)


def integer(number: int) -> bytes:
    octets = number.to_bytes(number.bit_length() // 8 + 1, "big")
    return b"\x02" + length(len(octets)) + octets


def length(octets: int) -> bytes:
    """In as few octets as DER has it."""
    if octets < 128:
        return bytes((octets,))
    encoded = octets.to_bytes((octets.bit_length() + 7) // 8, "big")
    return bytes((0x80 | len(encoded),)) + encoded


def refused_by_the_library(path: str) -> bool:
    try:
        load_pem_private_key(Path(path).read_bytes(), None)
    except ValueError:
        return True
    return False


def composite() -> int:
    """No prime, but without a small factor, and for what else of a 2048-bit key it can be in."""
    while True:
        half = rsa.generate_private_key(65537, 1024).private_numbers()
        product = half.p * half.q
        lengths = {(product * prime).bit_length() for prime in (NUMBERS.p, NUMBERS.q)}
        if lengths == {2048} and math.gcd(65537, product - 1) == 1:
            return product


def damaged(field: str, change: Callable[[int], int]) -> Numbers:
    numbers = numbers_of(NUMBERS)
    return numbers | {field: change(numbers[field])}


def cases() -> dict[str, Numbers]:
    found = {}
    for field in FIELDS:
        found[f"{field}, one bit"] = damaged(field, lambda value: value ^ 1 << 9)
        found[f"{field}, even"] = damaged(field, lambda value: value ^ 1)
        found[f"{field}, another key's"] = damaged(
            field, lambda _, field=field: numbers_of(OTHERS)[field] - 2 * (field == "e")
        )
    swapped = numbers_of(NUMBERS)
    found["primes changed places"] = swapped | {"p": NUMBERS.q, "q": NUMBERS.p}
    found["p no prime"] = consistent(composite(), NUMBERS.q)
    found["q no prime"] = consistent(NUMBERS.p, composite())
    found["one prime, twice"] = {**consistent(NUMBERS.p, NUMBERS.q), "q": NUMBERS.p} | {
        "n": NUMBERS.p**2
    }
    found["no primes"] = numbers_of(NUMBERS) | dict.fromkeys(("p", "q", "dmp1", "dmq1", "iqmp"), 0)
    found["e is 1"] = numbers_of(NUMBERS) | {"e": 1, "d": 1, "dmp1": 1, "dmq1": 1}
    return found


CASES = cases()


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_rsa_key_is_refused_as_the_library_would(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "damaged.key", CASES[case])
    assert refused_by_the_library(path)
    with pytest.raises(UnusableKey) as refused:
        load_private_key(path, None)
    assert refused.value.field == "key"
    assert refused.value.reason == f"{path} is damaged: its numbers are not those of an RSA key"


@pytest.mark.parametrize("numbers", [NUMBERS, OTHERS])
@pytest.mark.parametrize("e", [3, 65537])
def test_a_sound_rsa_key_is_taken(tmp_path: Path, numbers: rsa.RSAPrivateNumbers, e: int) -> None:
    complete = numbers_of(numbers)
    if e == 3:
        complete = numbers_of(rsa.generate_private_key(3, 2048).private_numbers())
    key = load_private_key(write(tmp_path / "sound.key", complete), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    assert key.private_numbers().d == complete["d"]


def test_a_private_exponent_modulo_the_totient_will_do(tmp_path: Path) -> None:
    """RFC 8017 §3.2 has lcm(p-1, q-1), others (p-1)(q-1)."""
    totient = (NUMBERS.p - 1) * (NUMBERS.q - 1)
    numbers = numbers_of(NUMBERS) | {"d": pow(65537, -1, totient)}
    path = write(tmp_path / "totient.key", numbers)
    assert not refused_by_the_library(path)
    load_private_key(path, None)


def test_nobody_waits_for_a_pipe(tmp_path: Path) -> None:
    """One among thousands of files must not keep all others from being checked."""
    os.mkfifo(path := tmp_path / "pipe.pem")
    code = f"from keyd.keys import read; read({str(path)!r}, 'key')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert f"{path}: is no regular file" in done.stderr
