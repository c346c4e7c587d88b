"""Virtual hosts, listening addresses and kinds of backends."""

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from .conftest import Certificates, Serve
from .instance import Event, Instance, Table, eventually, free_port
from .peers import Listener, TlsClient, alert_in, connect, served_by

TLS12, TLS13 = SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION
HANDSHAKE_FAILURE, PROTOCOL_VERSION, MISSING_EXTENSION, UNRECOGNIZED_NAME = 40, 70, 109, 112

Site = Callable[..., Table]


@pytest.fixture(scope="module")
def site(certificates: Certificates) -> Iterator[Site]:
    """``site("a", sni=[...])``: a [[vhost]] whose certificate and backend both say "a"."""
    with contextlib.ExitStack() as stack:

        def make(name: str, kind: str = "P-256", **settings: object) -> Table:
            def say_the_name(connection: socket.socket) -> None:
                connection.sendall(name.encode())

            listener = stack.enter_context(Listener.tcp())
            stack.enter_context(served_by(listener, say_the_name))
            certificate = certificates(kind, name)
            return {
                "certificate": certificate.certificate,
                "key": certificate.key,
                "backend": listener.address,
                **settings,
            }

        yield make


def asked(
    port: int, server_name: str | None, host: str = "127.0.0.1", newest: int = TLS13
) -> tuple[str, str]:
    """Whose certificate is shown, and who answers."""
    with TlsClient(port, server_name, host=host, versions=(TLS12, newest)) as client:
        client.handshake()
        shown = client.tls.get_peer_certificate(as_cryptography=True)
        assert isinstance(shown, x509.Certificate)
        (name,) = shown.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(name.value), client.receive_all().decode()


def refused(
    port: int, server_name: str | None, versions: tuple[int, int] = (TLS12, TLS13)
) -> int | None:
    """The alert that ends the handshake."""
    with TlsClient(port, server_name, versions=versions) as client:
        with pytest.raises(SSL.Error):
            client.handshake()
        return alert_in(client.received)


# --- by name ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(serve_all: Serve, site: Site) -> Instance:
    return serve_all(
        vhost=[
            site("exact.example", sni=["exact.example", "also.example"]),
            site("wildcard.example", "RSA-2048", sni=["*.Example.ORG"]),
            site("nameless.example", "Ed25519", sni=[""]),
            site("late.example", sni=["www.example.org", "late.example", "exact.example"]),
        ]
    )


@pytest.mark.parametrize(
    ("server_name", "expected"),
    [
        ("exact.example", "exact.example"),
        ("also.example", "exact.example"),
        ("EXACT.Example", "exact.example"),
        ("www.example.org", "wildcard.example"),
        ("WWW.EXAMPLE.org", "wildcard.example"),
        (None, "nameless.example"),
        ("late.example", "late.example"),
    ],
)
@pytest.mark.parametrize("newest", [TLS12, TLS13], ids=["TLS 1.2", "TLS 1.3"])
def test_the_first_that_matches_the_name_serves_it(
    named: Instance, server_name: str | None, expected: str, newest: int
) -> None:
    assert asked(named.port, server_name, newest=newest) == (expected, expected)


@pytest.mark.parametrize("server_name", ["example.org", "a.b.example.org", "nowhere.example"])
def test_a_name_that_none_matches_gets_unrecognized_name(named: Instance, server_name: str) -> None:
    assert refused(named.port, server_name) == UNRECOGNIZED_NAME
    event = named.wait_for_event("handshake_failed", server_name=server_name)
    assert (event["end"], event["detail"]) == ("no_virtual_host", server_name)


def test_a_client_without_a_name_gets_missing_extension_where_all_have_names(
    serve: Serve, site: Site
) -> None:
    instance = serve(vhost=[site("exact.example", sni=["exact.example"])])
    assert refused(instance.port, None) == MISSING_EXTENSION
    event = instance.wait_for_event("handshake_failed")
    assert (event["end"], event["detail"]) == ("no_virtual_host", "no name")
    assert "server_name" not in event


def test_a_virtual_host_without_names_takes_what_is_left(serve: Serve, site: Site) -> None:
    instance = serve(vhost=[site("first.example", sni=["first.example"]), site("rest.example")])
    assert asked(instance.port, "first.example") == ("first.example", "first.example")
    for name in ("anything.example", None, "127.0.0.1"):
        assert asked(instance.port, name) == ("rest.example", "rest.example")


# --- by address ------------------------------------------------------------------------


def test_the_local_address_and_port_choose(serve: Serve, site: Site) -> None:
    one, two = free_port(), free_port()
    instance = serve(
        listen=[{"address": f"[::]:{one}"}, {"address": f"127.0.0.1:{two}"}],
        vhost=[
            site("two.example", local_port=two),
            site("v4.example", local_address="127.0.0.1"),
            site("v6.example", local_address="::1", sni=["v6.example"]),
            site("three.example", local_address="127.0.0.3", local_port=one),
        ],
    )
    assert asked(two, "x.example") == ("two.example", "two.example")
    # An IPv4 client of a dual-stack socket came to an IPv4 address.
    assert asked(one, "x.example") == ("v4.example", "v4.example")
    assert asked(one, "v6.example", "::1") == ("v6.example", "v6.example")
    assert asked(one, "x.example", "127.0.0.3") == ("three.example", "three.example")
    # Nobody serves this address: as little as a name that nobody serves.
    with TlsClient(one, host="127.0.0.4") as client:
        with pytest.raises(SSL.Error):
            client.handshake()
        assert alert_in(client.received) == UNRECOGNIZED_NAME
    with TlsClient(one, "x.example", host="::1") as client:
        with pytest.raises(SSL.Error):
            client.handshake()
        assert alert_in(client.received) == UNRECOGNIZED_NAME
    ended = instance.wait_for_events(4, "connection_ended")
    assert {event["local"] for event in ended} == {
        f"127.0.0.1:{two}", f"127.0.0.1:{one}", f"[::1]:{one}", f"127.0.0.3:{one}",
    }  # fmt: skip
    for event in ended:
        assert event["client"].startswith(event["local"].rpartition(":")[0].replace("0.3", "0.1"))


# --- settings of its own ---------------------------------------------------------------


CHACHA12, AES12 = "ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-GCM-SHA256"
CHACHA13, AES13 = "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256"


@pytest.fixture(scope="module")
def differing(serve_all: Serve, site: Site) -> Instance:
    return serve_all(
        vhost=[
            site("old.example", sni=["old.example"], max_version="TLSv1.2"),
            site("new.example", sni=["new.example"], min_version="TLSv1.3"),
            site("a.example", sni=["a.example"], ciphers=CHACHA12, ciphersuites=CHACHA13),
            site("b.example", sni=["b.example"], ciphers=AES12, ciphersuites=AES13),
        ]
    )


def ended_of(instance: Instance, count: int, event: str, *names: str) -> list[Event]:
    """The ends of those who came for these names, once there are so many."""

    def found() -> list[Event]:
        of_names = [one for one in instance.events_named(event) if one.get("server_name") in names]
        return of_names if len(of_names) >= count else []

    ends: list[Event] = eventually(found, f"{count} {event} of {names}")
    return ends


def test_virtual_hosts_on_one_port_have_versions_of_their_own(differing: Instance) -> None:
    instance, names = differing, ("old.example", "new.example")
    assert asked(instance.port, "old.example") == ("old.example", "old.example")
    assert asked(instance.port, "new.example") == ("new.example", "new.example")
    ended = ended_of(instance, 2, "connection_ended", *names)
    # The first connection may be the last that has ended.
    versions = {event["server_name"]: event["tls_version"] for event in ended}
    assert versions == {"old.example": "TLSv1.2", "new.example": "TLSv1.3"}
    assert refused(instance.port, "old.example", versions=(TLS13, TLS13)) == PROTOCOL_VERSION
    assert refused(instance.port, "new.example", versions=(TLS12, TLS12)) == PROTOCOL_VERSION
    for event in ended_of(instance, 2, "handshake_failed", *names):
        assert event["end"] == "handshake_failed"
        assert "unsupported protocol" in event["detail"]


def test_virtual_hosts_on_one_port_have_suites_of_their_own(differing: Instance) -> None:
    instance = differing
    for newest in (TLS12, TLS13):
        for name in ("a.example", "b.example"):
            assert asked(instance.port, name, newest=newest) == (name, name)
    ended = ended_of(instance, 4, "connection_ended", "a.example", "b.example")
    suites = sorted((event["server_name"], event["cipher_suite"]) for event in ended)
    a, b = "a.example", "b.example"
    assert suites == sorted([(a, CHACHA12), (b, AES12), (a, CHACHA13), (b, AES13)])
    with TlsClient(instance.port, "a.example", versions=(TLS12, TLS12), ciphers=AES12) as client:
        with pytest.raises(SSL.Error):
            client.handshake()
        assert alert_in(client.received) == HANDSHAKE_FAILURE


# --- listening addresses ---------------------------------------------------------------


def test_several_addresses_of_both_families_are_listened_on(serve: Serve, site: Site) -> None:
    ports = [free_port() for _ in range(4)]
    four, six, both, short = ports
    addresses = [f"127.0.0.1:{four}", f"[::1]:{six}", f"[::]:{both}", f":{short}"]
    instance = serve(
        listen=[{"address": address} for address in addresses], vhost=[site("any.example")]
    )
    # The log has each of them.
    for address in addresses[:3]:
        instance.wait_for_event("listening", address=address)
    answer = ("any.example", "any.example")
    assert asked(four, None, "127.0.0.1") == answer
    assert asked(six, None, "::1") == answer
    for port in (both, short):
        assert asked(port, None, "127.0.0.1") == answer
        assert asked(port, None, "::1") == answer
    with pytest.raises(ConnectionRefusedError):
        connect(four, "::1")
    with pytest.raises(ConnectionRefusedError):
        connect(six, "127.0.0.1")


# --- backends --------------------------------------------------------------------------


def test_a_backend_may_be_of_any_kind(serve: Serve, tmp_path: Path) -> None:
    with (
        Listener.tcp() as four,
        Listener.tcp("::1") as six,
        Listener.tcp() as named,
        Listener.unix(tmp_path / "app.sock") as unix,
    ):
        kinds = {
            "four.example": (four, four.address),
            "six.example": (six, six.address),
            "named.example": (named, f"localhost:{named.port}"),
            "unix.example": (unix, unix.address),
        }
        instance = serve(
            vhost=[{"sni": [name], "backend": address} for name, (_, address) in kinds.items()]
        )
        for name, (listener, _) in [*kinds.items()] * 3:
            with TlsClient(instance.port, name) as client:
                client.handshake()
                client.send(b"question")
                with listener.accept() as backend:
                    assert backend.recv(100) == b"question"
                    backend.sendall(b"answer")
                    backend.shutdown(socket.SHUT_WR)
                    assert client.receive_all() == b"answer"
                    client.close_notify()
        for name in kinds:
            instance.wait_for_event("connection_ended", server_name=name, end="clean")


def test_a_unix_socket_is_found_relative_to_the_configuration(serve: Serve) -> None:
    instance = serve("unix:app.sock")
    path = instance.directory / "app.sock"
    with Listener.unix(path) as listener, TlsClient(instance.port) as client:
        client.handshake()
        with listener.accept() as backend:
            backend.sendall(b"found")
            assert client.receive_exactly(5) == b"found"


# --- several certificates --------------------------------------------------------------


@pytest.fixture(scope="module")
def of_two_kinds(serve_all: Serve, site: Site, certificates: Certificates) -> Instance:
    table = site("both.example")
    del table["certificate"], table["key"]
    issued = [certificates(kind, "both.example") for kind in ("RSA-2048", "P-256")]
    table["certificates"] = [{"certificate": one.certificate, "key": one.key} for one in issued]
    return serve_all(vhost=[table])


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["-tls1_3"], ec.EllipticCurvePublicKey),
        (["-tls1_2"], ec.EllipticCurvePublicKey),
        (["-tls1_3", "-sigalgs", "rsa_pss_rsae_sha256"], rsa.RSAPublicKey),
        (["-tls1_2", "-cipher", "ECDHE+aRSA"], rsa.RSAPublicKey),
    ],
)
def test_a_client_is_shown_the_certificate_that_it_can_verify(
    of_two_kinds: Instance, options: list[str], kind: type
) -> None:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{of_two_kinds.port}", *options]
    said = subprocess.run(command, input=b"", capture_output=True, timeout=240, check=True).stdout
    pem = said[said.index(b"-----BEGIN") :]
    assert isinstance(x509.load_pem_x509_certificate(pem).public_key(), kind)
    assert b"both.example" in said
