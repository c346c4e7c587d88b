"""TLS clients that come by a unix socket: themselves, or through a load balancer."""

import os
import signal
import socket
import stat
import subprocess
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from keyd.linux.unix_socket import SO_PASSRIGHTS
from titus_py.audit.run import audit
from titus_py.audit.target import find_target

from .conftest import Certificates, Nginx, Serve
from .instance import Instance, eventually, free_port
from .peers import TIMEOUT, Listener, TlsClient, receive_all, receive_exactly
from .proxy_peers import haproxy_in_front, nginx_in_front
from .service import FAILS, edit, reload, status, talk
from .test_pump import established_sockets, sockets_of

ME = f"unix:uid={os.geteuid()},pid={os.getpid()}"
LINE = b"PROXY TCP4 192.0.2.1 203.0.113.2 56324 443\r\n"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL = SIGNATURE + b"\x20\0\0\0"


@pytest.fixture(scope="module")
def direct(shared_directory: Path) -> Path:
    return shared_directory / "direct"


@pytest.fixture(scope="module")
def balanced(shared_directory: Path) -> Path:
    return shared_directory / "balanced"


@pytest.fixture(scope="module")
def hasty(shared_directory: Path) -> Path:
    """As ``balanced``, with little patience."""
    return shared_directory / "hasty"


@pytest.fixture(scope="module")
def shared(
    serve_all: Serve, echoing: Listener, direct: Path, balanced: Path, hasty: Path
) -> Instance:
    return serve_all(
        echoing.address,
        listen=[
            {"address": f"unix:{direct}", "socket_mode": "0666"},
            {"address": f"unix:{balanced}", **PROXIED, "proxy_timeout": "60s"},
            {"address": f"unix:{hasty}", **PROXIED, "proxy_timeout": "3s"},
        ],
    )


PROXIED: dict[str, Any] = {"accept_proxy_from": ["unix"]}


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(TIMEOUT)
    client.connect(str(path))
    return client


def client_of(path: Path, first: bytes = b"") -> TlsClient:
    tls = TlsClient(0, source=connect(path))
    tls.socket.sendall(first)
    return tls


def takes(tls: TlsClient, octets: bytes) -> bool:
    """Whether they can still be sent to whoever is at the other end."""
    try:
        tls.send(octets)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def through(port: int, source: str) -> TlsClient:
    return TlsClient(
        port, source=socket.create_connection(("127.0.0.1", port), TIMEOUT, (source, 0))
    )


def test_clients_that_connect_themselves(shared: Instance, direct: Path) -> None:
    """Named by the kernel, as those of a tunnel are."""
    since = len(shared.events())
    with client_of(direct) as tls:
        assert talk(tls.handshake())
        octets = os.urandom(1 << 20)
        tls.send(octets)
        assert tls.receive_exactly(len(octets)) == octets
        tls.close_notify()
        assert tls.receive_all() == b""
    event = shared.wait_for_event("connection_ended", since=since, client=ME)
    assert (event["local"], event["end"]) == (f"unix:{direct}", "clean")
    assert "balancer" not in event


def test_who_may_connect(shared: Instance, direct: Path, balanced: Path) -> None:
    """By the file's mode, which is the owner's and the group's unless it is set."""
    for path, mode in ((direct, 0o666), (balanced, 0o660)):
        found = path.stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (mode, 0, 0)


def test_curl(
    serve: Serve, nginx: Nginx, certificates: Certificates, shared_directory: Path
) -> None:
    path = shared_directory / "curl"
    serve(nginx.address, listen=[{"address": f"unix:{path}"}])
    done = subprocess.run(
        ["curl", "--silent", "--unix-socket", path, "--cacert", certificates().authority,
         "https://localhost/"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "It works."


@pytest.mark.parametrize("how", ["at once", "apart", "by octets"])
def test_the_client_is_who_the_header_says(shared: Instance, balanced: Path, how: str) -> None:
    since = len(shared.events())
    with client_of(balanced) as tls:
        hello = tls.first_flight()
        if how == "at once":
            tls.socket.sendall(LINE + hello)
        else:
            size = len(LINE) if how == "apart" else 1
            for at in range(0, len(LINE), size):
                tls.socket.sendall(LINE[at : at + size])
            tls.socket.sendall(hello)
        assert talk(tls.handshake())
        tls.close_notify()
        tls.receive_all()
    event = shared.wait_for_event("connection_ended", since=since, balancer=ME)
    assert (event["client"], event["end"]) == ("192.0.2.1:56324", "clean")


def test_a_load_balancers_own_connection(shared: Instance, balanced: Path) -> None:
    since = len(shared.events())
    with client_of(balanced, LOCAL) as tls:
        assert talk(tls.handshake())
        tls.close_notify()
        tls.receive_all()
    event = shared.wait_for_event("connection_ended", since=since, client=ME)
    assert event["end"] == "clean"
    assert "balancer" not in event


@pytest.mark.parametrize(
    ("octets", "end"),
    [(b"GET / HTTP/1.1\r\n\r\n", "bad_proxy_header"), (LINE[:20], "proxy_timeout")],
)
def test_what_is_no_header(
    shared: Instance, balanced: Path, hasty: Path, octets: bytes, end: str
) -> None:
    since = len(shared.events())
    with connect(hasty if end == "proxy_timeout" else balanced) as side:
        side.sendall(octets)
        with suppress(ConnectionResetError):
            assert side.recv(1) == b""
    shared.wait_for_event("handshake_failed", since=since, client=ME, end=end)


def test_descriptors_of_a_client_are_nobodys(shared: Instance, balanced: Path, hasty: Path) -> None:
    """Before Linux 6.16, which refuses them. With the ClientHello they are thrown away. Within the
    header, they hide what is behind.
    """
    for path in (balanced, hasty):
        take_descriptors(shared, path)
    since = len(shared.events())
    with open("/dev/null") as null:
        with client_of(balanced, LINE) as tls:
            socket.send_fds(tls.socket, [tls.first_flight()], [null.fileno()])
            assert talk(tls.handshake())
        shared.wait_for_event("connection_ended", since=since, balancer=ME)
        with client_of(hasty) as tls:
            socket.send_fds(tls.socket, [LINE[:10]], [null.fileno()])
            tls.socket.sendall(LINE[10:])
            with pytest.raises(FAILS):
                tls.handshake()
    shared.wait_for_event("handshake_failed", since=since, client=ME, end="proxy_timeout")


def test_a_client_that_hears_nothing_more_has_reset_its_connection(
    serve: Serve, backend: Listener, shared_directory: Path
) -> None:
    """Although it goes on sending: else each octet would hold the worker for longer."""
    path = shared_directory / "deaf"
    instance = serve(backend.address, listen=[{"address": f"unix:{path}"}])
    with client_of(path) as tls:
        tls.handshake()
        with backend.accept() as connection:
            # The parent has connected it, and hands it over.
            (worker,) = eventually(
                lambda: [one for one in instance.workers() if established_sockets(one.pid) == 1],
                "its worker has the backend's connection",
            )
            worker.kill(signal.SIGSTOP)
            before = os.urandom(40_000)
            tls.send(before)
            tls.socket.shutdown(socket.SHUT_RD)
            connection.sendall(b"not to be heard")
            worker.kill(signal.SIGCONT)
            eventually(lambda: not takes(tls, b"and this"), "no more is taken")
            # What it had sent by then has arrived.
            assert receive_exactly(connection, len(before)) == before
            with pytest.raises(ConnectionResetError):
                receive_all(connection)
    assert instance.wait_for_event("connection_ended", client=ME)["end"] == "client_reset"


def take_descriptors(instance: Instance, path: Path) -> None:
    """Have this listener do so, as before Linux 6.16."""
    for one in sockets_of(instance.pid):
        if one.family == socket.AF_UNIX and one.getsockname() == str(path):
            with suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 1)


# --- with others -----------------------------------------------------------------------------


def in_front(program: str, directory: Path, to: Path) -> AbstractContextManager[int]:
    if program == "nginx":
        return nginx_in_front(directory, to)
    return haproxy_in_front(directory, to, program.removeprefix("haproxy "))


@pytest.mark.parametrize(
    "program",
    [
        "haproxy send-proxy-v2",
        "haproxy send-proxy",
        # With health checks, which it sends as LOCAL.
        "haproxy send-proxy-v2 check inter 100ms",
        "nginx",
    ],
)
def test_behind_a_load_balancer(
    shared: Instance, balanced: Path, tmp_path: Path, program: str
) -> None:
    since = len(shared.events())
    with in_front(program, tmp_path, balanced) as port, through(port, "127.9.9.9") as tls:
        assert talk(tls.handshake())
        client = f"127.9.9.9:{tls.socket.getsockname()[1]}"
        begun = shared.wait_for_event("connection_begun", since=since, client=client)
        assert begun["balancer"].startswith("unix:uid=")
        assert begun["local"] == f"unix:{balanced}"


def test_curl_behind_haproxy(
    serve: Serve, nginx: Nginx, certificates: Certificates, shared_directory: Path, tmp_path: Path
) -> None:
    path = shared_directory / "behind-haproxy"
    instance = serve(nginx.address, listen=[{"address": f"unix:{path}", **PROXIED}])
    with haproxy_in_front(tmp_path, path, "send-proxy-v2") as port:
        done = subprocess.run(
            ["curl", "--silent", "--cacert", certificates().authority, "--interface", "127.8.8.8",
             "--resolve", f"localhost:{port}:127.0.0.1",
             "--write-out", "%{local_ip}:%{local_port}", f"https://localhost:{port}/"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    page, _, client = done.stdout.rpartition("\n")
    assert page == "It works."
    assert client.startswith("127.8.8.8:")
    assert instance.wait_for_event("connection_begun", client=client)


def test_limits_are_for_the_client_and_not_for_its_balancer(
    serve: Serve, echoing: Listener, shared_directory: Path, tmp_path: Path
) -> None:
    path = shared_directory / "limits"
    instance = serve(
        echoing.address,
        listen=[{"address": f"unix:{path}", **PROXIED}],
        limits={"connections_per_address": 2},
    )
    with haproxy_in_front(tmp_path, path, "send-proxy-v2") as port, ExitStack() as stack:
        for source in ("127.0.1.1", "127.0.1.1", "127.0.1.2", "127.0.1.3"):
            assert talk(stack.enter_context(through(port, source)).handshake())
        with through(port, "127.0.1.1") as refused, pytest.raises(FAILS):
            talk(refused.handshake())
        event = instance.wait_for_event("limited", limit="connections_per_address")
        assert event["last_client"] == "127.0.1.1"
        with through(port, "127.0.1.2") as another:
            assert talk(another.handshake())
    assert status(instance)["counts"]["limited"] == {"connections_per_address": 1}


def test_limits_of_clients_that_connect_themselves_are_for_their_user(
    serve: Serve, echoing: Listener, shared_directory: Path
) -> None:
    path = shared_directory / "users"
    instance = serve(
        echoing.address,
        listen=[{"address": f"unix:{path}"}],
        limits={"connections_per_address": 1},
    )
    with client_of(path) as first:
        assert talk(first.handshake())
        with pytest.raises(FAILS), client_of(path) as second:
            talk(second.handshake())
        event = instance.wait_for_event("limited", limit="connections_per_address")
    assert event["last_client"] == ME.partition(",")[0]


@pytest.mark.parametrize(
    ("how", "first", "header"),
    [
        ("v1", b"", b"PROXY UNKNOWN\r\n"),
        ("v2", b"", SIGNATURE + b"\x21\0\0\0"),
        ("v1", LINE, LINE),
    ],
)
def test_what_a_backend_is_told(
    serve: Serve, backend: Listener, shared_directory: Path, how: str, first: bytes, header: bytes
) -> None:
    """What the load balancer said. A client that has connected itself has no address."""
    path = shared_directory / f"backend-{how}-{bool(first)}"
    proxied = PROXIED if first else {}
    serve(
        listen=[{"address": f"unix:{path}", **proxied}],
        vhost=[{"backend": backend.address, "send_proxy": how}],
    )
    with client_of(path, first) as tls:
        tls.handshake()
        tls.send(b"and this")
        with backend.accept() as connection:
            expected = header + b"and this"
            assert receive_exactly(connection, len(expected)) == expected


# --- its life --------------------------------------------------------------------------------


def test_a_reload_keeps_the_socket_and_its_connections(
    serve: Serve, echoing: Listener, shared_directory: Path
) -> None:
    path = shared_directory / "reloaded"
    instance = serve(echoing.address, listen=[{"address": f"unix:{path}"}])
    inode = path.stat().st_ino
    with client_of(path) as earlier:
        assert talk(earlier.handshake())

        def change(tables: dict[str, Any]) -> None:
            tables["listen"][0].update(PROXIED, socket_mode="0666")

        edit(instance, change)
        assert reload(instance)["reloaded"] is True
        assert path.stat().st_ino == inode
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        with client_of(path, LINE) as tls:
            assert talk(tls.handshake())
        assert talk(earlier)
    edit(instance, lambda tables: tables["listen"].insert(0, _on_tcp()))
    edit(instance, lambda tables: tables["listen"].pop())
    assert reload(instance)["reloaded"] is True
    assert not path.exists()


def _on_tcp() -> dict[str, Any]:
    return {"address": f"127.0.0.1:{free_port()}"}


@pytest.mark.parametrize("settings", [{}, PROXIED])
def test_the_audit_is_a_client_of_it(
    serve: Serve, echoing: Listener, shared_directory: Path, settings: dict[str, Any]
) -> None:
    path = shared_directory / f"audited-{len(settings)}"
    instance = serve(echoing.address, listen=[{"address": f"unix:{path}", **settings}])
    made = audit(find_target(instance.pid))
    assert made.holds, [finding for finding in made.findings if finding.verdict != "holds"]
    stages = {finding.subject.stage for finding in made.findings}
    assert {"before its handshake", "after its handshake"} <= stages
