"""The client's address, told to the backend before anything else: ``send_proxy``."""

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from OpenSSL import SSL
from proxyprotocol.result import ProxyResult
from proxyprotocol.v2 import ProxyProtocolV2

from .client_authority import ClientAuthority, ClientCertificate
from .conftest import Serve
from .instance import Instance, free_port
from .peers import Listener, TlsClient, Truncated, connect, receive_exactly, reset
from .proxy_peers import Server, haproxy_server, nginx_server


@pytest.fixture(scope="module", params=["nginx", "haproxy"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    kind = {"nginx": nginx_server, "haproxy": haproxy_server}[request.param]
    with kind(tmp_path_factory.mktemp(request.param)) as running:
        yield running


def ask(tls: TlsClient) -> str:
    """What the backend says that it was told."""
    tls.handshake()
    tls.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    return tls.receive_all().decode().rpartition("\r\n\r\n")[2]


WAYS = ["v1", "v2", "v2-tls"]


@pytest.fixture(scope="module")
def telling(serve_all: Serve, server: Server) -> tuple[Instance, int, int]:
    """In each way, by the client's server name; a port for IPv4, and one for both families."""
    port, both = free_port(), free_port()
    backends = ((port, server.address), (both, server.unix))
    instance = serve_all(
        listen=[{"address": f"127.0.0.1:{port}"}, {"address": f"[::]:{both}"}],
        vhost=[
            {"sni": [f"{how}.test"], "backend": backend, "send_proxy": how, "local_port": to}
            for how in WAYS
            for to, backend in backends
        ],
    )
    return instance, port, both


@pytest.mark.parametrize("how", WAYS)
def test_servers_see_the_client_over_ipv4_ipv6_and_both_on_one_socket(
    telling: tuple[Instance, int, int], server: Server, how: str
) -> None:
    instance, port, both = telling
    name = f"{how}.test"
    for to, source in ((port, "127.8.8.8"), (both, "127.8.8.9"), (both, "::1")):
        host = "::1" if ":" in source else "127.0.0.1"
        client = connect(to, host, source=source)
        with TlsClient(to, name, source=client) as tls:
            addresses, facts = server.told(ask(tls))
            assert addresses == [source, str(client.getsockname()[1]), host, str(to)]
        assert facts.get("name", "") == (name if "name" in facts and how == "v2-tls" else "")
    assert not instance.events_named("backend_unavailable")


@pytest.fixture(scope="module")
def own(serve_all: Serve) -> Iterator[tuple[Instance, Listener]]:
    """It tells a backend in the test's hands what TLS says, but for two server names."""
    with Listener.tcp() as listening:
        protocols = {"backend": listening.address, "alpn": ["h2", "http/1.1"]}
        hosts = [
            {"sni": ["v2.test"], "send_proxy": "v2"},
            {"sni": ["nothing.test"]},
            {"send_proxy": "v2-tls"},
        ]
        yield serve_all(vhost=[protocols | host for host in hosts]), listening


def first_words(backend: Listener, client: TlsClient) -> tuple[ProxyResult, bytes]:
    """The header of version 2 that came first, and the octets after it."""
    client.send(b"the client's")
    with backend.accept() as connection:
        head = receive_exactly(connection, 16)
        body = receive_exactly(connection, int.from_bytes(head[14:], "big"))
        return ProxyProtocolV2().unpack(head + body), receive_exactly(connection, 12)


@pytest.mark.parametrize(
    ("version", "name"),
    [(SSL.TLS1_3_VERSION, "www.example.org"), (SSL.TLS1_2_VERSION, None)],
)
def test_tls_facts(own: tuple[Instance, Listener], version: int, name: str | None) -> None:
    instance, listener = own
    with TlsClient(instance.port, name, versions=(version, version)) as client:
        client.handshake()
        result, after = first_words(listener, client)
        assert after == b"the client's"
        assert (str(result.source[0]), result.source[1]) == client.socket.getsockname()
        tlv = result.tlv
        assert tlv.authority == name
        assert tlv.ssl.version == client.tls.get_protocol_version_name()
        assert tlv.ssl.cipher == client.tls.get_cipher_name()
        assert tlv.alpn is None


@pytest.mark.parametrize(("how", "told"), [("v2-tls", b"http/1.1"), ("v2", None)])
def test_the_protocol_is_a_tls_fact(
    own: tuple[Instance, Listener], how: str, told: bytes | None
) -> None:
    instance, listener = own
    with TlsClient(instance.port, f"{how}.test", protocols=["http/1.1"]) as client:
        client.handshake()
        result, _ = first_words(listener, client)
        assert result.tlv.alpn == told


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> ClientAuthority:
    return ClientAuthority(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def certified(serve_all: Serve, authority: ClientAuthority) -> Iterator[tuple[Instance, Listener]]:
    """It tells a backend in the test's hands of certificates, which one server name demands."""
    with Listener.tcp() as listening:
        told = {
            "backend": listening.address,
            "send_proxy": "v2-tls-cert",
            "client_ca": authority.file,
            "client_allow": "all",
        }
        hosts = [
            {"sni": ["required.test"], "client_certificates": "required"},
            {"client_certificates": "optional"},
        ]
        yield serve_all(vhost=[told | host for host in hosts]), listening


def show(client: TlsClient, certificate: ClientCertificate) -> None:
    client.tls.use_certificate(certificate.certificate)
    key = load_pem_private_key(certificate.key.read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    client.tls.use_privatekey(key)


def test_a_certificate_and_its_name(
    certified: tuple[Instance, Listener], authority: ClientAuthority
) -> None:
    instance, listener = certified
    alice = authority.issue("alice")
    for certificate in (alice, None):
        with TlsClient(instance.port) as client:
            if certificate is not None:
                show(client, certificate)
            client.handshake()
            result, after = first_words(listener, client)
        assert after == b"the client's"
        assert result.source[0] == ip_address("127.0.0.1")
        ssl = result.tlv.ssl
        if certificate is None:
            assert (ssl.client, ssl.cn, ssl.get(0x28)) == (1, None, None)
            assert ssl.verify != 0
        else:
            der = certificate.certificate.public_bytes(Encoding.DER)
            assert (ssl.client, ssl.verify, ssl.cn, ssl.get(0x28)) == (7, 0, "alice", der)


def test_servers_see_the_certificates_name(
    serve: Serve, server: Server, authority: ClientAuthority
) -> None:
    """As far as their versions have words for it."""
    vhost = {
        "send_proxy": "v2-tls-cert",
        "client_certificates": "required",
        "client_ca": authority.file,
        "client_allow": "all",
    }
    instance = serve(server.address, vhost=[vhost])
    with TlsClient(instance.port) as client:
        show(client, authority.issue("alice"))
        addresses, facts = server.told(ask(client))
        version = client.tls.get_protocol_version_name()
        cipher = client.tls.get_cipher_name()
    assert addresses[0] == "127.0.0.1"
    expected = {"name": "localhost", "version": version, "cipher": cipher, "cn": "alice"}
    tls = bytes.fromhex(facts.pop("tls", ""))
    assert facts.items() <= expected.items()
    assert not tls or all(text.encode() in tls for text in (version, cipher, "alice"))


@pytest.mark.parametrize(
    "long", [{"padding": 17_000}, {"dns": [f"{number:0200}.example.org" for number in range(50)]}]
)
def test_who_has_a_certificate_that_is_too_long_to_be_told_is_refused(
    certified: tuple[Instance, Listener], authority: ClientAuthority, long: dict[str, Any]
) -> None:
    """As a client with a certificate that is not accepted; the backend is not to blame."""
    instance, _ = certified
    with TlsClient(instance.port, "required.test") as client:
        address = "{}:{}".format(*client.socket.getsockname())
        show(client, authority.issue("alice", **long))
        client.handshake()
        with pytest.raises(SSL.Error, match="bad certificate"):
            client.receive_all()
    event = instance.wait_for_event("handshake_failed", client=address)
    assert event["end"] == "client_certificate"
    assert event["detail"].startswith("too_long: ")
    assert not instance.events_named("backend_unavailable")


@pytest.mark.parametrize("octets", [20, 21, 200])
def test_a_long_serial_number_is_no_reason_to_refuse_anybody(
    certified: tuple[Instance, Listener], authority: ClientAuthority, octets: int
) -> None:
    """No authority is to use more than 20 octets (RFC 5280 §4.1.2.2). The header has none of it."""
    instance, listener = certified
    certificate = authority.issue_numbered((1 << 8 * octets - 1) - 1)
    with TlsClient(instance.port, "required.test") as client:
        show(client, certificate)
        client.handshake()
        result, _ = first_words(listener, client)
    der = certificate.certificate.public_bytes(Encoding.DER)
    assert (result.tlv.ssl.cn, result.tlv.ssl.get(0x28)) == ("alice", der)
    assert not instance.events_named("backend_unavailable")


def test_a_backend_that_is_gone_at_once_gets_no_octets_and_the_log_says_why(
    own: tuple[Instance, Listener],
) -> None:
    """Whether the parent or the worker meets the reset: the client's connection ends with it."""
    instance, listener = own
    with TlsClient(instance.port, "v2.test") as client:
        address = "{}:{}".format(*client.socket.getsockname())
        client.handshake()
        reset(listener.accept())
        with pytest.raises((ConnectionResetError, Truncated)):
            client.receive_all()
    ended = instance.wait_for_event("connection_ended", client=address)
    assert ended["end"] in ("backend_reset", "backend_unavailable")


def test_without_it_nothing_comes_first(own: tuple[Instance, Listener]) -> None:
    instance, listener = own
    with TlsClient(instance.port, "nothing.test") as client:
        client.handshake()
        client.send(b"at once")
        with listener.accept() as connection:
            assert receive_exactly(connection, 7) == b"at once"
