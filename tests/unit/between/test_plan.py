"""What the supervisor tells a parent to do, once through JSON."""

from titus_py.between.client_allow import Allow
from titus_py.between.client_identity import ClientTerms
from titus_py.between.known_client import KnownClient, Rate
from titus_py.between.plan import Certificate, Limits, Plan, VirtualHost
from titus_py.between.virtual_host import TlsSettings

TLS = TlsSettings.decode(["TLSv1.2", "TLSv1.3", *[None] * (len(TlsSettings._fields) - 2)])

WEB = KnownClient("web-1", Allow(spki=("00" * 32,)), ("10.0.0.5:5432",), 20, Rate(50, 1))
DB = KnownClient("db-1", Allow(dns=("*.example.org",)), (), None, None)


def host(clients: ClientTerms | None) -> VirtualHost:
    return VirtualHost(
        server_names=None,
        local_address=None,
        local_port=None,
        certificates=(Certificate("chain", "reference", "00"),),
        certificate_index=None,
        backend=("127.0.0.1:80",),
        backends={},
        balance="round-robin",
        health=None,
        tls=TLS,
        truncated="reset",
        send_proxy=None,
        source_address=None,
        clients=clients,
    )


def plan(*vhosts: VirtualHost) -> Plan:
    return Plan(
        listeners=(),
        vhosts=vhosts,
        tunnels=(),
        addresses={},
        checks=(),
        states=(),
        first_uid=1,
        last_uid=2,
        max_workers=1,
        spare_workers=1,
        handshake_timeout=1.0,
        connect_timeout=1.0,
        limits=Limits._make([None] * len(Limits._fields)),
        chroot="/run/empty",
        required=(),
        worker_filter="",
        parent_uid=3,
        parent_filter="",
    )


def test_what_is_asked_of_clients() -> None:
    allow = (("*.example.org",), (), (), ("00" * 32,))
    asked = [
        None,
        ClientTerms(True, "authorities", "lists", None),
        ClientTerms(False, "", "", allow),
        ClientTerms(False, "authorities", "", None),
        ClientTerms(True, "", "", allow, (WEB, DB)),
    ]
    whole = plan(*map(host, asked))
    assert Plan.decode(whole.encode()).vhosts == whole.vhosts


def test_files_that_many_hosts_name_are_there_once() -> None:
    """A list of revoked certificates may be megabytes long."""
    terms = ClientTerms(True, "some authorities", "a long list", None)
    encoded = plan(*[host(terms)] * 100).encode()
    assert encoded.count(b"a long list") == encoded.count(b"some authorities") == 1
    found = Plan.decode(encoded)
    assert len({id(one.clients.revocations) for one in found.vhosts if one.clients}) == 1


def test_where_a_known_clients_connections_go() -> None:
    knowing = host(ClientTerms(True, "", "", None, (WEB, DB)))
    knowing = knowing._replace(backends={"h2": ("127.0.0.1:81",)})
    assert knowing.backend_for(None, None) == knowing.backend_for(None, 1) == ("127.0.0.1:80",)
    assert knowing.backend_for("h2", None) == knowing.backend_for("h2", 1) == ("127.0.0.1:81",)
    assert knowing.backend_for(None, 0) == knowing.backend_for("h2", 0) == ("10.0.0.5:5432",)
    assert knowing.all_backends == {("127.0.0.1:80",), ("127.0.0.1:81",), ("10.0.0.5:5432",)}
