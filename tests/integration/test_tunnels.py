"""Tunnels: plaintext in, TLS out, to servers that are not ours; whom a tunnel does not accept."""

import os
import queue
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from titus_py.supervisor.control_client import ask

from .client_authority import DAY, ClientAuthority, ClientCertificate
from .conftest import Certificates, Serve
from .instance import TITUS_PY, Event, Instance, eventually, free_port
from .peers import (
    TIMEOUT,
    Listener,
    connect,
    receive_all,
    receive_exactly,
    refusing,
    reset,
    resets,
    served_by,
    was_reset,
)
from .tls_server import server_context, tls_server

NAME = "db.example.test"


class Servers(NamedTuple):
    """Certificates, and where servers show them."""

    authority: ClientAuthority
    shown: Mapping[str, ClientCertificate]
    addresses: Mapping[str, str]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    directory = tmp_path_factory.mktemp("servers")
    authority, other = (ClientAuthority(directory / name, name) for name in ("one", "other"))
    usage = ExtendedKeyUsageOID.SERVER_AUTH
    shown = {
        "good": authority.issue(dns=(NAME,), usage=usage),
        "wildcard": authority.issue(dns=("*.example.test",), usage=usage),
        "named otherwise": authority.issue(NAME, dns=("www.test",), usage=usage),
        "named in its subject": authority.issue(NAME, dns=(), usage=usage),
        "wildcard within a label": authority.issue(dns=("d*.example.test",), usage=usage),
        "expired": authority.issue(dns=(NAME,), usage=usage, ends=-DAY),
        "not yet valid": authority.issue(dns=(NAME,), usage=usage, begins=DAY),
        "for clients": authority.issue(dns=(NAME,)),
        "another authority's": other.issue(dns=(NAME,), usage=usage),
        "self-signed": authority.issue(dns=(NAME,), usage=usage, self_signed=True),
        "self-signed, expired": authority.issue("x", dns=(), self_signed=True, ends=-DAY),
    }
    with ExitStack() as stack:
        addresses = {
            kind: stack.enter_context(tls_server(server_context(one)))
            for kind, one in shown.items()
        }
        yield Servers(authority, shown, addresses)


def tunnel(connect: str, **settings: Any) -> dict[str, Any]:
    return {"listen": f"127.0.0.1:{free_port()}", "connect": connect, **settings}


def somewhere() -> str:
    return f"127.0.0.1:{free_port()}"


def port_of(table: Mapping[str, Any]) -> int:
    return int(table["listen"].rpartition(":")[2])


@pytest.fixture(scope="module")
def tables(servers: Servers) -> Iterator[dict[str, dict[str, Any]]]:
    """Tunnels that work and tunnels that do not, by what they are for."""
    with refusing() as nobody:
        yield all_tables(servers, nobody)


def all_tables(servers: Servers, nobody: str) -> dict[str, dict[str, Any]]:
    by_ca = {"ca": servers.authority.file, "server_name": NAME}
    pins = {kind: {"pins": [one.spki]} for kind, one in servers.shown.items()}
    addresses = servers.addresses
    return {
        "by ca": tunnel(addresses["good"], **by_ca),
        "by ca, wildcard": tunnel(addresses["wildcard"], **by_ca),
        "by pin": tunnel(addresses["self-signed"], **pins["self-signed"]),
        "by pin, dates and names aside": tunnel(
            addresses["self-signed, expired"], **pins["self-signed, expired"]
        ),
        "by one of two pins": tunnel(
            addresses["good"], pins=[servers.shown["expired"].spki, servers.shown["good"].spki]
        ),
        "by both": tunnel(addresses["good"], **by_ca, **pins["good"]),
        "name_mismatch": tunnel(addresses["named otherwise"], **by_ca),
        "name_mismatch, subject": tunnel(addresses["named in its subject"], **by_ca),
        "name_mismatch, part of a label": tunnel(addresses["wildcard within a label"], **by_ca),
        "expired": tunnel(addresses["expired"], **by_ca),
        "not_yet_valid": tunnel(addresses["not yet valid"], **by_ca),
        "wrong_usage": tunnel(addresses["for clients"], **by_ca),
        "unknown_ca": tunnel(addresses["another authority's"], **by_ca),
        "unknown_ca, self-signed": tunnel(addresses["self-signed"], **by_ca),
        "unknown_ca, to the system": tunnel(addresses["good"], ca="system", server_name=NAME),
        "unknown_ca, pinned": tunnel(addresses["self-signed"], **by_ca, **pins["self-signed"]),
        "name_mismatch, address": tunnel(
            addresses["good"], ca=servers.authority.file, server_name="127.0.0.1"
        ),
        "pin_mismatch": tunnel(addresses["self-signed"], **pins["good"]),
        "pin_mismatch, by both": tunnel(addresses["good"], **by_ca, **pins["self-signed"]),
        "unreachable": tunnel(nobody, **by_ca),
        # To servers that a test starts.
        "openssl": tunnel(openssl := somewhere(), **by_ca),
        "openssl, TLS 1.3": tunnel(openssl, **by_ca, min_version="TLSv1.3"),
        "nginx": tunnel(somewhere(), **by_ca),
        "cut off": tunnel(somewhere(), **by_ca),
        "held": tunnel(somewhere(), **by_ca),
        "told": tunnel(somewhere(), **by_ca, alpn=["imap", "x"], send_proxy="v1"),
    }


@pytest.fixture(scope="module")
def instance(serve_all: Serve, tables: dict[str, dict[str, Any]]) -> Instance:
    """Tunnels alone: no virtual host, and nothing that listens for TLS."""
    return serve_all(listen=[], vhost=[], tunnel=list(tables.values()))


def end_of(instance: Instance, client: socket.socket, name: str = "connection_ended") -> Event:
    return instance.wait_for_event(name, client="{}:{}".format(*client.getsockname()))


WORKING = (
    "by ca",
    "by ca, wildcard",
    "by pin",
    "by pin, dates and names aside",
    "by one of two pins",
    "by both",
)


@pytest.mark.parametrize("kind", WORKING)
def test_octets_go_both_ways_and_so_do_ends(
    instance: Instance, tables: dict[str, dict[str, Any]], kind: str
) -> None:
    octets = bytes(range(256)) * 1024
    with connect(port_of(tables[kind])) as client:
        client.sendall(octets)
        assert receive_exactly(client, len(octets)) == octets
        client.sendall(b"the last")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"the last"
        event = end_of(instance, client)
    assert (event["end"], event["tunnel"]) == ("clean", tables[kind]["listen"])
    assert event["octets_from_client"] == event["octets_to_client"] == len(octets) + 8
    assert event["tls_version"] == "TLSv1.3"
    begun = instance.wait_for_event("connection_begun", connection=event["connection"])
    assert begun["tunnel"] == tables[kind]["listen"]


def test_the_log_has_the_servers_certificate(
    instance: Instance, tables: dict[str, dict[str, Any]], servers: Servers
) -> None:
    with connect(port_of(tables["by ca"])) as client:
        client.sendall(b"?")
        receive_exactly(client, 1)
        client.shutdown(socket.SHUT_WR)
        event = end_of(instance, client)
    assert event["certificate_spki"] == servers.shown["good"].spki
    assert event["server_name"] == NAME


FAILING = (
    "name_mismatch",
    "name_mismatch, address",
    "name_mismatch, subject",
    "name_mismatch, part of a label",
    "expired",
    "not_yet_valid",
    "wrong_usage",
    "unknown_ca",
    "unknown_ca, self-signed",
    "unknown_ca, to the system",
    "unknown_ca, pinned",
    "pin_mismatch",
    "pin_mismatch, by both",
)


@pytest.mark.parametrize("kind", FAILING)
def test_a_server_that_is_not_the_one_gets_nothing(
    instance: Instance, tables: dict[str, dict[str, Any]], kind: str
) -> None:
    assert resets(port_of(tables[kind]), b"for nobody else")
    event = instance.wait_for_event("tunnel_failed", tunnel=tables[kind]["listen"])
    assert (event["level"], event["end"]) == ("error", "server_certificate")
    assert event["detail"].startswith(f"{kind.partition(',')[0]}: ")
    assert event["certificate_spki"].startswith("sha256:")
    assert event["octets_from_client"] == 0


def test_a_server_that_cannot_be_reached(
    instance: Instance, tables: dict[str, dict[str, Any]]
) -> None:
    """And the log is not filled by a program that tries again and again."""
    table, attempts = tables["unreachable"], 100
    for _ in range(attempts):
        assert resets(port_of(table))

    def told() -> list[Event] | None:
        events = instance.events_named("tunnel_failed", tunnel=table["listen"])
        counted = sum(event.get("count", 1) for event in events)
        return events if counted == attempts else None

    events = eventually(told, "every failure is accounted for")
    assert {event["end"] for event in events} == {"unreachable"}
    assert all(f"{table['connect']}: Connection refused" in one["detail"] for one in events)
    # A line a second, and the first at once: on a busy machine, the attempts take some seconds.
    assert len(events) < attempts / 4
    assert not instance.events_named("connection_begun", tunnel=table["listen"])


def test_a_server_that_speaks_no_tls(serve: Serve, servers: Servers) -> None:
    def say_nothing_of_tls(connection: socket.socket) -> None:
        connection.sendall(b"220 mail.test ESMTP\r\n")
        receive_all(connection)

    def leave(connection: socket.socket) -> None:
        connection.recv(1)

    by_ca = {"ca": servers.authority.file, "server_name": NAME}
    with (
        Listener.tcp() as plain,
        Listener.tcp() as leaving,
        Listener.tcp() as silent,
        served_by(plain, say_nothing_of_tls),
        served_by(leaving, leave),
    ):
        ends = {
            "handshake_failed": tunnel(plain.address, **by_ca),
            "server_left": tunnel(leaving.address, **by_ca),
            "handshake_timeout": tunnel(silent.address, **by_ca),
            "handshake_timeout, asked": tunnel(silent.address, **by_ca, starttls="postgresql"),
        }
        instance = serve(
            listen=[], vhost=[], tunnel=list(ends.values()), worker={"handshake_timeout": "3s"}
        )
        for end, table in ends.items():
            assert resets(port_of(table))
            event = instance.wait_for_event("tunnel_failed", tunnel=table["listen"])
            assert event["end"] == end.partition(",")[0]


def test_whatever_the_length_it_comes_back_equal(
    instance: Instance, tables: dict[str, dict[str, Any]]
) -> None:
    with connect(port_of(tables["by ca"])) as client:
        for length in (1, 16383, 16384, 16385, 65535, 65536, 65537, 3 << 20):
            octets = os.urandom(length)
            sender = threading.Thread(target=client.sendall, args=[octets])
            sender.start()
            assert receive_exactly(client, length) == octets
            sender.join()


def test_an_unclean_end_is_passed_on(
    instance: Instance, tables: dict[str, dict[str, Any]], servers: Servers
) -> None:
    """A reset either way; and a stream that ends without a close_notify is one."""

    def truncate(connection: ssl.SSLSocket) -> None:
        connection.recv(1)
        connection.sendall(b"half")
        socket.socket(fileno=connection.detach()).shutdown(socket.SHUT_WR)

    context = server_context(servers.shown["good"])
    ends: queue.Queue[bool] = queue.Queue()
    served = threading.Event()

    def wait(connection: ssl.SSLSocket) -> None:
        # A reset before that could be told to OpenSSL, which sends its tickets and ignores it.
        connection.recv(1)
        served.set()
        # Python's ssl takes a reset for an end.
        with socket.socket(fileno=connection.detach()) as under_tls:
            under_tls.settimeout(TIMEOUT)
            ends.put(was_reset(under_tls))

    cut, held = tables["cut off"], tables["held"]
    with (
        tls_server(context, truncate, address=cut["connect"]),
        tls_server(context, wait, address=held["connect"]),
    ):
        with connect(port_of(cut)) as client:
            client.sendall(b"?")
            assert receive_exactly(client, 4) == b"half"
            assert was_reset(client)
            assert end_of(instance, client)["end"] == "server_truncated"
        client = connect(port_of(held))
        client.sendall(b"then a reset")
        name = "{}:{}".format(*client.getsockname())
        assert served.wait(60)
        reset(client)
        assert instance.wait_for_event("connection_ended", client=name)["end"] == "client_reset"
        assert ends.get(timeout=60)


def test_to_openssl_which_is_too_old_for_one(
    instance: Instance, tables: dict[str, dict[str, Any]], servers: Servers, tmp_path: Path
) -> None:
    shown, old, new = servers.shown["good"], tables["openssl"], tables["openssl, TLS 1.3"]
    command = [
        *("openssl", "s_server", "-accept", old["connect"], "-tls1_2", "-rev"),
        *("-cert", shown.chain, "-key", shown.key),
    ]
    log = tmp_path / "s_server"
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file) as server,
    ):
        eventually(lambda: b"ACCEPT" in log.read_bytes(), "s_server listens")
        assert resets(port_of(new))
        failed = instance.wait_for_event("tunnel_failed", tunnel=new["listen"])
        assert failed["end"] == "handshake_failed"
        assert failed["detail"] == "tlsv1 alert protocol version"
        with connect(port_of(old)) as client:
            client.sendall(b"abc\n")
            assert receive_exactly(client, 4) == b"cba\n"
            client.shutdown(socket.SHUT_WR)
            event = end_of(instance, client)
        server.terminate()
    assert event["tls_version"] == "TLSv1.2"


def test_what_a_server_is_told(
    instance: Instance, tables: dict[str, dict[str, Any]], servers: Servers
) -> None:
    """The name and the protocols, and before TLS whose connection it is."""
    told: dict[str, str | None] = {}
    context = server_context(servers.shown["good"])
    context.set_alpn_protocols(["x"])
    context.sni_callback = lambda _, name, __: told.update(name=name)

    def take_header(connection: socket.socket) -> None:
        # No octet after the header: that is TLS's.
        while not told.get("header", "").endswith("\r\n"):
            told["header"] = told.get("header", "") + connection.recv(1).decode()

    def answer(connection: ssl.SSLSocket) -> None:
        told["protocol"] = connection.selected_alpn_protocol()
        connection.sendall(b"!")
        connection.unwrap()

    table = tables["told"]
    with tls_server(context, answer, take_header, table["connect"]):
        with connect(port_of(table)) as client:
            # The server speaks first: the client need not.
            assert receive_all(client) == b"!"
            ends = client.getsockname()[1], port_of(table)
    header = "PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n".format(*ends)
    assert told == {"name": NAME, "protocol": "x", "header": header}


def test_to_our_own_listener(
    serve: Serve, echoing: Listener, certificates: Certificates, tmp_path: Path
) -> None:
    """Both ends here: the client's octets go out encrypted, and come back in."""
    site = certificates("P-256", "both.test")
    at = f"127.0.0.1:{free_port()}"
    table = tunnel(at, ca=site.authority, server_name="both.test", send_proxy="v2")
    instance = serve(
        listen=[{"address": at, "accept_proxy_from": ["127.0.0.1"]}],
        vhost=[{"backend": echoing.address, "certificate": site.certificate, "key": site.key}],
        tunnel=[table],
        worker={"spare": 8},
    )
    with connect(port_of(table)) as client:
        client.sendall(b"there and back")
        assert receive_exactly(client, 14) == b"there and back"
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""
        name = "{}:{}".format(*client.getsockname())

    def both() -> list[Event]:
        # The header told our listener whose connection it is.
        return instance.events_named("connection_ended", client=name)

    eventually(lambda: len(both()) == 2, "both ends of the connection")
    assert {event.get("tunnel") for event in both()} == {None, table["listen"]}
    assert {event["end"] for event in both()} == {"clean"}


def test_to_nginx(
    instance: Instance, tables: dict[str, dict[str, Any]], servers: Servers, tmp_path: Path
) -> None:
    assert instance.runs()
    shown, table = servers.shown["good"], tables["nginx"]
    (tmp_path / "file").write_bytes(octets := os.urandom(1 << 20))
    (tmp_path / "nginx.conf").write_text(
        f"""\
        daemon off;
        worker_processes 1;
        user root;
        error_log {tmp_path}/error.log;
        pid {tmp_path}/nginx.pid;
        events {{ }}
        http {{
            access_log off;
            server {{
                listen {table["connect"]} ssl;
                ssl_certificate {shown.chain};
                ssl_certificate_key {shown.key};
                root {tmp_path};
            }}
        }}
        """
    )
    command = ["nginx", "-c", tmp_path / "nginx.conf", "-e", tmp_path / "error.log"]
    with subprocess.Popen(command, start_new_session=True) as nginx:
        url = f"http://{table['listen']}/file"
        asked = ["curl", "-sf", "--retry", "20", "--retry-all-errors", "--retry-delay", "0", url]
        assert subprocess.run(asked, check=True, capture_output=True).stdout == octets
        nginx.terminate()


def test_connections_that_never_end_get_so_much_time(serve: Serve, servers: Servers) -> None:
    by_pin = {"pins": [servers.shown["good"].spki]}
    short = tunnel(servers.addresses["good"], **by_pin, drain="200ms")
    long = tunnel(servers.addresses["good"], **by_pin)
    instance = serve(listen=[], vhost=[], tunnel=[short, long])

    def established(table: Mapping[str, Any]) -> socket.socket:
        client = connect(port_of(table))
        client.sendall(b"?")
        assert receive_exactly(client, 1) == b"?"
        return client

    with established(short) as first, established(long) as second:
        instance.signal(signal.SIGHUP)
        instance.wait_for_event("reloaded")
        assert was_reset(first)
        assert end_of(instance, first)["end"] == "drained"
        second.sendall(b"still there")
        assert receive_exactly(second, 11) == b"still there"
        with established(short) as third:
            instance.signal(signal.SIGTERM)
            assert was_reset(third)
            second.sendall(b"still there")
            assert receive_exactly(second, 11) == b"still there"
    assert instance.wait() == 0


def test_status_and_metrics(serve: Serve, servers: Servers, tmp_path: Path) -> None:
    good = tunnel(servers.addresses["good"], pins=[servers.shown["good"].spki])
    bad = tunnel(servers.addresses["good"], pins=[servers.shown["expired"].spki])
    path = tmp_path / "metrics.sock"
    instance = serve(listen=[], vhost=[], tunnel=[good, bad], metrics={"address": f"unix:{path}"})
    with connect(port_of(good)) as client:
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""
        end_of(instance, client)
    assert resets(port_of(bad))
    instance.wait_for_event("tunnel_failed", tunnel=bad["listen"])
    answer = ask(instance.pid, {"do": "status"}, 60)
    assert [one["listen"] for one in answer["tunnels"]] == [good["listen"], bad["listen"]]
    assert answer["tunnels"][0]["addresses"] == [servers.addresses["good"]]
    assert answer["counts"]["tunnel_failures"] == {"pin_mismatch": 1}
    asked = ["curl", "-sf", "--unix-socket", str(path), "http://localhost/metrics"]
    text = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    assert f'titus_tunnel_connections_total{{tunnel="{good["listen"]}"}} 1' in text
    assert 'titus_tunnel_failures_total{reason="pin_mismatch"} 1' in text


def test_a_revoked_pin_cuts_what_is_open(serve: Serve, servers: Servers) -> None:
    good, expired = servers.shown["good"].spki, servers.shown["expired"].spki
    revoked = tunnel(servers.addresses["good"], pins=[good, expired])
    kept = tunnel(servers.addresses["expired"], pins=[expired])
    instance = serve(listen=[], vhost=[], tunnel=[revoked, kept])
    with connect(port_of(revoked)) as first, connect(port_of(kept)) as second:
        for client in (first, second):
            client.sendall(b"?")
            assert receive_exactly(client, 1) == b"?"
        path = instance.directory / "titus.toml"
        path.write_text(path.read_text().replace(f'"{good}", ', ""))
        command = [TITUS_PY, "reload", "--cut", "--pid", str(instance.pid)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "1 connection ended" in said
        assert was_reset(first)
        assert end_of(instance, first)["end"] == "no_longer_allowed"
        second.sendall(b"still there")
        assert receive_exactly(second, 11) == b"still there"
    with suppress(ConnectionResetError), connect(port_of(revoked)) as client:
        assert was_reset(client)
    event = instance.wait_for_event("tunnel_failed", tunnel=revoked["listen"])
    assert event["detail"].startswith("pin_mismatch: ")


def test_another_program_takes_the_connections_on(serve: Serve, servers: Servers) -> None:
    table = tunnel(servers.addresses["good"], pins=[servers.shown["good"].spki])
    instance = serve(listen=[], vhost=[], tunnel=[table])
    with connect(port_of(table)) as client:
        client.sendall(b"?")
        assert receive_exactly(client, 1) == b"?"
        command = [TITUS_PY, "reload", "--program", "--pid", str(instance.pid)]
        subprocess.run(command, check=True, capture_output=True)
        client.sendall(b"still there")
        assert receive_exactly(client, 11) == b"still there"
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""
        assert end_of(instance, client)["tunnel"] == table["listen"]
    with connect(port_of(table)) as client:
        client.sendall(b"!")
        assert receive_exactly(client, 1) == b"!"


def test_an_audit_of_tunnels_alone(instance: Instance, tables: dict[str, dict[str, Any]]) -> None:
    with connect(port_of(tables["by ca"])) as client:
        client.sendall(b"?")
        assert receive_exactly(client, 1) == b"?"
        command = [TITUS_PY, "audit", "--quiet", "--pid", str(instance.pid)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_by_name_to_the_next_of_several_and_by_ipv6(serve: Serve, servers: Servers) -> None:
    """As backends have it: a name that is looked up, and one that is not reached."""
    shown = servers.authority.issue(dns=("localhost",), usage=ExtendedKeyUsageOID.SERVER_AUTH)
    with tls_server(server_context(shown)) as address, refusing() as nobody:
        named = f"localhost:{address.rpartition(':')[2]}"
        by_name = tunnel(named, ca=servers.authority.file)
        several = {
            "listen": f"[::1]:{free_port()}",
            "connect": [nobody, named],
            "balance": "priority",
            "pins": [shown.spki],
        }
        instance = serve(listen=[], vhost=[], tunnel=[by_name, several])
        for table, host in ((by_name, "127.0.0.1"), (several, "::1")):
            with connect(port_of(table), host) as client:
                client.sendall(b"found")
                assert receive_exactly(client, 5) == b"found"
        event = instance.wait_for_event("connection_ended", tunnel=several["listen"])
        assert event["backend"] == named
        event = instance.wait_for_event("connection_ended", tunnel=by_name["listen"])
        assert event["server_name"] == "localhost"
