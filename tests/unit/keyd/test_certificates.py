"""What ``keyd check`` says of a certificate's file: what is wrong, and what clients may refuse."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import AuthorityInformationAccessOID, NameOID

from keyd.certificates import Findings, KeyFiles, examine

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
NOW = datetime.datetime(2026, 7, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
TO_FETCH = x509.AuthorityInformationAccess(
    [
        x509.AccessDescription(
            AuthorityInformationAccessOID.CA_ISSUERS,
            x509.UniformResourceIdentifier("http://ca.example/ca.crt"),
        )
    ]
)


class Issued(NamedTuple):
    """A certificate, and the key that it is for."""

    certificate: x509.Certificate
    key: Key


def issue(
    name: str,
    issuer: Issued | None = None,
    ends: int = 90,
    begins: int = -10,
    key: Key | None = None,
    extension: x509.ExtensionType | None = None,
) -> Issued:
    """In days from now; self-signed if there is no issuer."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + begins * DAY)
        .not_valid_after(NOW + ends * DAY)
    )
    if extension is not None:
        builder = builder.add_extension(extension, critical=False)
    signs = issuer.key if issuer else key
    hashed = None if isinstance(signs, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return Issued(builder.sign(signs, hashed), key)


ROOT = issue("root")
MIDDLE = issue("middle", ROOT)
LEAF = issue("leaf", MIDDLE, extension=TO_FETCH)
OTHER = issue("other")


def pem(one: Issued) -> bytes:
    return one.certificate.public_bytes(Encoding.PEM)


def line(chain: Sequence[Issued], number: int) -> int:
    """Where in the file a certificate begins."""
    return 1 + sum(pem(one).count(b"\n") for one in chain[:number])


def findings(directory: Path, content: bytes, key: Key | None = None) -> Findings:
    (directory / "site.crt").write_bytes(content)
    if key is None:
        return examine(KeyFiles(str(directory / "site.crt"), None), NOW)
    (directory / "site.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return examine(KeyFiles(str(directory / "site.crt"), str(directory / "site.key")), NOW)


def doubts(directory: Path, *chain: Issued) -> list[str]:
    found = findings(directory, b"".join(map(pem, chain)))
    assert found.mistakes == []
    return [warning.reason for warning in found.warnings]


# --- the chain -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chain", [(LEAF, MIDDLE), (LEAF, MIDDLE, ROOT), (MIDDLE,)], ids=["usual", "root", "its root's"]
)
def test_nothing_is_said_of_a_good_chain(tmp_path: Path, chain: tuple[Issued, ...]) -> None:
    """Without its root, as is usual, or with it; or directly from one that clients have."""
    assert doubts(tmp_path, *chain) == []


@pytest.mark.parametrize(
    ("ends", "begins", "said"),
    [
        (-1, -10, "expired on 2026-06-30: renew it"),
        (20, -10, "expires on 2026-07-21: renew it"),
        (90, 2, "is not valid before 2026-07-03"),
    ],
)
def test_an_intermediate_that_is_out_of_date(
    tmp_path: Path, ends: int, begins: int, said: str
) -> None:
    middle = issue("middle", ROOT, ends, begins, MIDDLE.key)
    chain = LEAF, middle, ROOT
    where = f"{tmp_path}/site.crt:{line(chain, 1)}: the issuer's certificate, CN=middle,"
    assert doubts(tmp_path, *chain) == [f"{where} {said}"]


def test_the_wrong_order(tmp_path: Path) -> None:
    chain = LEAF, ROOT, MIDDLE
    assert doubts(tmp_path, *chain) == [
        f"{tmp_path}/site.crt: certificates in the wrong order: CN=leaf is followed by line "
        f"{line(chain, 1)}, and was issued by line {line(chain, 2)}: put each certificate before "
        "its issuer's, the server's own first"
    ]


@pytest.mark.parametrize("chain", [(LEAF, OTHER), (LEAF, MIDDLE, OTHER), (LEAF, LEAF)])
def test_a_certificate_that_is_not_of_the_chain(tmp_path: Path, chain: tuple[Issued, ...]) -> None:
    last = len(chain) - 1
    name, before = (one.certificate.subject.rfc4514_string() for one in (chain[-1], chain[-2]))
    [doubt] = doubts(tmp_path, *chain)
    assert doubt.startswith(
        f"{tmp_path}/site.crt:{line(chain, last)}: {name} is not the issuer of the certificate "
        f"before it, {before}: "
    )


def test_an_issuer_of_the_right_name_alone_is_none(tmp_path: Path) -> None:
    [doubt] = doubts(tmp_path, LEAF, issue("middle", ROOT))
    assert "CN=middle is not the issuer of the certificate before it, CN=leaf" in doubt


def test_a_key_for_a_later_certificate(tmp_path: Path) -> None:
    chain = MIDDLE, ROOT, LEAF
    found = findings(tmp_path, b"".join(map(pem, chain)), LEAF.key)
    [mistake] = found.mistakes
    assert mistake.field == "key"
    assert mistake.reason == (
        f"{tmp_path}/site.key is not the key of certificate {tmp_path}/site.crt, whose first is "
        f"CN=middle, but of the one in line {line(chain, 2)}, CN=leaf: put that first"
    )


def test_a_chain_that_leads_nowhere(tmp_path: Path) -> None:
    assert doubts(tmp_path, LEAF) == [
        f"{tmp_path}/site.crt has no certificate of its issuer, CN=middle: clients that do not "
        "happen to know it will refuse: append it (the full chain)"
    ]


def test_a_self_signed_certificate(tmp_path: Path) -> None:
    assert doubts(tmp_path, OTHER) == [
        f"{tmp_path}/site.crt is self-signed: clients accept it only where they have been given it"
    ]


def test_one_that_demands_an_answer_of_ocsp(tmp_path: Path) -> None:
    """No worker could ask for it, and Firefox refuses the certificate without."""
    feature = x509.TLSFeature([x509.TLSFeatureType.status_request])
    chain = issue("staple", MIDDLE, extension=feature), MIDDLE, ROOT
    assert doubts(tmp_path, *chain) == [
        f"{tmp_path}/site.crt has must-staple, and nothing is stapled: clients that heed it will "
        "refuse: get one without it"
    ]


def test_of_a_key_that_its_peers_know_nobody_asks_who_certified_it(tmp_path: Path) -> None:
    (tmp_path / "site.crt").write_bytes(pem(OTHER))
    files = KeyFiles(str(tmp_path / "site.crt"), None)
    assert [one.reason for one in examine(files, NOW).warnings] != []
    assert examine(files._replace(known=True), NOW).warnings == []
    # But its dates are looked at all the same.
    late = examine(files._replace(known=True), NOW + datetime.timedelta(days=100_000)).warnings
    assert "expired on" in late[0].reason


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (ed25519.Ed25519PrivateKey.generate(), "an Ed25519"),
        (ec.generate_private_key(ec.SECP521R1()), "a P-521"),
    ],
)
def test_keys_that_browsers_refuse(tmp_path: Path, key: Key, kind: str) -> None:
    assert doubts(tmp_path, issue("leaf", MIDDLE, key=key), MIDDLE) == [
        f"{tmp_path}/site.crt is for {kind} key, which browsers refuse: get one for a P-256 key"
    ]


# --- the file --------------------------------------------------------------------------


def relabelled(label: bytes) -> bytes:
    return pem(MIDDLE).replace(b"CERTIFICATE", label)


UNREAD = {
    pem(MIDDLE)[:-40]: "no end of the CERTIFICATE that begins here",
    relabelled(b"TRUSTED CERTIFICATE"): "a TRUSTED CERTIFICATE, which has OpenSSL's trust settings",
    relabelled(b"CERTIFICATE REQUEST"): "a CERTIFICATE REQUEST, which is only a request",
    relabelled(b"PKCS7"): "a PKCS7, which is to be unpacked, with 'openssl pkcs7 -print_certs'",
    pem(MIDDLE)[:60] + b"A" + pem(MIDDLE)[60:]: "a damaged certificate",
    pem(MIDDLE)[:28] + pem(MIDDLE)[-26:]: "a damaged certificate",
}


@pytest.mark.parametrize("unread", UNREAD, ids=UNREAD.values())
@pytest.mark.parametrize("after", [b"", pem(ROOT)], ids=["at the end", "in the middle"])
def test_a_second_certificate_that_would_be_left_out_is_a_mistake(
    tmp_path: Path, unread: bytes, after: bytes
) -> None:
    found = findings(tmp_path, pem(LEAF) + unread + after, LEAF.key)
    [mistake] = found.mistakes
    assert mistake.field == "certificate"
    where = f"{tmp_path}/site.crt:{line((LEAF,), 1)}: "
    assert mistake.reason.startswith(where + UNREAD[unread])
    assert found.chain is None


def test_openssls_former_label_is_a_certificate(tmp_path: Path) -> None:
    former = pem(MIDDLE).replace(b"CERTIFICATE", b"X509 CERTIFICATE")
    found = findings(tmp_path, pem(LEAF) + former)
    assert (found.mistakes, found.warnings) == ([], [])
    assert found.chain is not None
    assert found.chain.encode() == pem(LEAF) + pem(MIDDLE)
