"""Judging client certificates: what the process that does it relies on."""

import contextlib
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from integration.client_authority import ClientAuthority, ClientCertificate
from OpenSSL import SSL, crypto

from titus_py.between.client_identity import ClientTerms
from titus_py.between.report import ReportWriter
from titus_py.supervisor.metrics import Metrics
from titus_py.worker import client_certificate, peer_certificate, verification
from titus_py.worker.certificate_facts import facts_of, name_id
from titus_py.worker.client_certificate import Verifier


def name(*values: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, value) for value in values])


def test_every_reason_is_counted() -> None:
    source = Path(client_certificate.__file__).read_text()
    said = {reason for reason, _ in peer_certificate._FINDINGS.values()}
    said |= set(client_certificate._WITHOUT_VERDICT.values()) | {"rejected"}
    said |= set(re.findall(r'_refuse\(store_context, "(\w+)"', source))
    assert said | {"other"} == set(Metrics().certificates_refused.counts)


def test_names_that_are_equal_have_one_id() -> None:
    """RFC 5280 §7.1: case and spaces do not tell them apart, and an issuer may write them anew."""
    assert name_id(name("Example  CA ")) == name_id(name("example ca"))
    assert name_id(name("a", "b")) != name_id(name("b", "a"))
    assert name_id(name("a=b")) != name_id(name("a", "b"))


@given(st.text(min_size=1, max_size=16), st.text(min_size=1, max_size=16))
def test_names_that_differ_have_different_ids(one: str, other: str) -> None:
    def plain(text: str) -> str:
        return " ".join(text.casefold().split())

    assert (name_id(name(one)) == name_id(name(other))) == (plain(one) == plain(other))


def test_facts_without_names(tmp_path: Path) -> None:
    facts = facts_of(ClientAuthority(tmp_path).issue("alice", dns=()).certificate)
    assert (facts.dns, facts.uri, facts.cn) == ((), (), ("alice",))


def handshake(
    context: SSL.Context,
    authority: ClientAuthority,
    shown: bool | ClientCertificate,
    between: crypto.X509 | None = None,
) -> tuple[SSL.Connection, SSL.Error | None]:
    """The server's side of a handshake in memory, and what it failed with."""
    server_files = authority.issue(dns=("localhost",))
    context.use_certificate_file(str(server_files.chain))
    context.use_privatekey_file(str(server_files.key))
    client_context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    if shown:
        client_files = authority.issue() if shown is True else shown
        client_context.use_certificate_file(str(client_files.chain))
        client_context.use_privatekey_file(str(client_files.key))
    if between is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            client_context.add_extra_chain_cert(between)
    server, client = SSL.Connection(context), SSL.Connection(client_context)
    server.set_accept_state()
    client.set_connect_state()
    for _ in range(4):
        for side, other in ((client, server), (server, client)):
            try:
                side.do_handshake()
            except SSL.WantReadError:
                pass
            except SSL.Error as error:
                return server, error
            with contextlib.suppress(SSL.WantReadError):
                other.bio_write(side.bio_read(1 << 16))
    return server, None


@pytest.fixture
def verifier(tmp_path: Path) -> tuple[Verifier, SSL.Context, ClientAuthority]:
    authority = ClientAuthority(tmp_path)
    verifier = Verifier(ClientTerms(True, authority.file.read_text(), "", None))
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    verifier.demand(context)
    return verifier, context, authority


def test_a_good_one_is_identified(
    verifier: tuple[Verifier, SSL.Context, ClientAuthority],
) -> None:
    judge, context, authority = verifier
    judge.begin(ReportWriter())
    server, error = handshake(context, authority, shown=True)
    assert error is None
    identity = judge.identity(server)
    assert identity is not None
    assert identity.facts.cn == ("alice",)
    assert [link.issuer for link in identity.links] == [name_id(authority.name)] * 2


def _fail(good: int, address: int) -> bool:
    raise RuntimeError(f"{good} {address}")


@pytest.mark.parametrize("judge", [_fail, lambda good, address: 1, lambda: True])
def test_only_a_clear_yes_lets_anybody_in(
    verifier: tuple[Verifier, SSL.Context, ClientAuthority],
    judge: Callable[[int, int], bool],
) -> None:
    _, context, authority = verifier
    verification.ask(judge)
    assert handshake(context, authority, shown=True)[1] is not None


def test_who_was_not_judged_is_not_identified(
    verifier: tuple[Verifier, SSL.Context, ClientAuthority],
) -> None:
    judge, context, authority = verifier
    verification.ask(lambda good, address: True)
    server, error = handshake(context, authority, shown=True)
    assert error is None
    with pytest.raises(PermissionError):
        judge.identity(server)


def _of_no_version(certificate: x509.Certificate) -> crypto.X509:
    """The same in a version that there is not: OpenSSL reads it, the other library does not."""
    der = certificate.public_bytes(Encoding.DER)
    third = b"\xa0\x03\x02\x01\x02"
    assert der.count(third) == 1
    der = der.replace(third, b"\xa0\x03\x02\x01\x07")
    with pytest.raises(x509.InvalidVersion):
        x509.load_der_x509_certificate(der)
    return crypto.load_certificate(crypto.FILETYPE_ASN1, der)


def test_where_keys_count_others_certificates_do_not(tmp_path: Path) -> None:
    """A client with a known key may send what it likes besides: it gets nobody into trouble."""
    above = ClientAuthority(tmp_path, "above")
    authority = ClientAuthority(tmp_path / "below", "below", above=above)
    known = authority.issue()
    spki = known.spki.removeprefix("sha256:")
    judge = Verifier(ClientTerms(True, "", "", ((), (), (), (spki,))))
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    judge.demand(context)
    judge.begin(ReportWriter())
    odd = _of_no_version(authority.certificate)
    server, error = handshake(context, above, known, odd)
    assert error is None
    assert len(server.get_verified_chain() or []) == 2
    identity = judge.identity(server)
    assert identity is not None
    assert identity.complete
    assert [link.spki.hex() for link in identity.links] == [spki]


def test_a_context_that_does_not_ask_identifies_nobody(
    verifier: tuple[Verifier, SSL.Context, ClientAuthority],
) -> None:
    judge, _, authority = verifier
    server, error = handshake(SSL.Context(SSL.TLS_SERVER_METHOD), authority, shown=True)
    assert error is None
    with pytest.raises(PermissionError):
        judge.identity(server)


def test_the_judge_is_kept_alive() -> None:
    """By the extension itself: nothing else refers to it."""
    before = sys.getrefcount(test_the_judge_is_kept_alive)
    verification.ask(test_the_judge_is_kept_alive)  # type: ignore[arg-type]
    assert sys.getrefcount(test_the_judge_is_kept_alive) == before + 1
    verification.ask(lambda good, address: False)
    assert sys.getrefcount(test_the_judge_is_kept_alive) == before
