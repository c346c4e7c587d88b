"""The index of a directory's certificates: what is written is found, by name."""

import base64
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titus_py.between.certificate_index import CertificateIndex, names, write
from titus_py.between.plan import Certificate
from titus_py.between.virtual_host import matches


def certificate(*ders: bytes) -> Certificate:
    pem = "".join(
        f"-----BEGIN CERTIFICATE-----\n{base64.encodebytes(der).decode()}"
        "-----END CERTIFICATE-----\n"
        for der in ders
    )
    return Certificate(pem, f"reference of {ders[0].hex()}", hashlib.sha256(ders[0]).hexdigest())


@contextmanager
def index(
    certificates: Sequence[Certificate], names: Mapping[str, int]
) -> Iterator[CertificateIndex]:
    descriptor = write(certificates, names)
    made = CertificateIndex(descriptor)
    os.close(descriptor)
    yield made
    made._file.close()


labels = st.text("abc", min_size=1, max_size=2)
hosts = st.lists(labels, min_size=1, max_size=3).map(".".join)
patterns = st.one_of(hosts, hosts.map("*.".__add__))


@given(st.lists(patterns, unique=True, max_size=40), st.one_of(hosts, st.text(max_size=5)))
def test_a_name_is_found_as_virtual_hosts_match_it(known: list[str], asked: str) -> None:
    """Except that an exact name comes first, wherever it is in the list."""
    with index([certificate(b"x")], dict.fromkeys(known, 0)) as made:
        assert (made.find(asked) == 0) == any(matches(pattern, asked) for pattern in known)


def test_an_exact_name_comes_before_a_wildcard() -> None:
    names = {"*.example.org": 0, "www.example.org": 1, "*.b.example.org": 2}
    with index([certificate(bytes([number])) for number in range(3)], names) as made:
        assert made.find("www.example.org") == 1
        assert made.find("WWW.Example.ORG.") == 1
        assert made.find("mail.example.org") == 0
        assert made.find("a.b.example.org") == 2
        for unknown in ("example.org", "a.b.c.example.org", ".example.org", "", ".", None):
            assert made.find(unknown) is None
        # Signs of other alphabets that lower() turns into ASCII.
        assert made.find("\N{KELVIN SIGN}.example.org") is None


@pytest.mark.parametrize("count", [0, 1, 300])
def test_each_certificate_comes_back_whole(count: int) -> None:
    written = [
        certificate(number.to_bytes(4), b"issuer" * number, b"root") for number in range(count)
    ]
    numbers = {f"host{number}.example": number for number in range(count)}
    descriptor = write(written, numbers)
    keys = {name: bytes.fromhex(written[number].key) for name, number in numbers.items()}
    assert sorted(names(descriptor)) == sorted(keys.items())
    made = CertificateIndex(descriptor)
    os.close(descriptor)
    for number, one in enumerate(written):
        assert made.find(f"host{number}.example") == number
        assert made.certificate(number) == (
            [number.to_bytes(4), b"issuer" * number, b"root"],
            one.key_reference.encode(),
        )


def test_a_name_that_no_client_can_send_is_left_out() -> None:
    with index([certificate(b"x")], {"a" * 256: 0, "b" * 255: 0}) as made:
        assert made.find("a" * 256) is None
        assert made.find("b" * 255) == 0


def test_the_file_cannot_be_changed() -> None:
    descriptor = write([certificate(b"x")], {"a": 0})
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"!", 0)
    os.close(descriptor)
