"""Backends that see the client's own address, and connections to other machines' addresses.

Three machines, each a network namespace: the client's, titus-py's, which is in the middle, and the
backend's. Each of the outer two knows no way but by the one in the middle.
"""

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import prctl
import pytest

from .conftest import Certificates, Serve
from .instance import TITUS_PY, Instance, eventually
from .namespaces import ip, new_namespace, within
from .peers import TIMEOUT, TlsClient
from .service import reload

CLIENT = "198.18.1.2", "2001:db8:1::2"
MIDDLE = "198.18.1.1", "2001:db8:1::1"
BACKEND = "198.18.2.2", "2001:db8:2::2"
#: Of no machine at all.
ELSEWHERE = "203.0.113.9", "2001:db8:9::9"
WEB, PROXIED = 8080, 8081
PORT = 443


class Machines(NamedTuple):
    client: int
    middle: int
    backend: int

    def get(self, host: str, name: str = "localhost", source: str | None = None) -> bytes:
        """What the backend answers the client; empty if the connection is reset."""

        def connect() -> socket.socket:
            return socket.create_connection((host, PORT), TIMEOUT, (source or "", 0))

        try:
            with TlsClient(PORT, name, source=within(self.client, connect)) as client:
                client.handshake()
                client.send(b"GET / HTTP/1.0\r\n\r\n")
                answer = b""
                while piece := client.receive():
                    answer += piece
        except ConnectionError:
            return b""
        return answer.partition(b"\r\n\r\n")[2]

    def route(self, file: Path) -> None:
        """Run the commands that ``titus-py check`` prints."""
        words = [TITUS_PY, "check", "--config", file]
        checked = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
        script = "set -e\n" + checked.stdout.partition("configuration is fine\n")[2]
        within(self.middle, lambda: subprocess.run(["sh", "-c", script], check=True))


@pytest.fixture
def machines() -> Iterator[Machines]:
    machines = Machines(new_namespace(), new_namespace(), new_namespace())

    def cable(net: str, far: int) -> None:
        """Between the one in the middle, which has address 1, and another, which has address 2."""
        here, there = f"near{net}", f"far{net}"
        to = f"/proc/{os.getpid()}/fd/{far}"
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", to)
        up(here, net, 1)
        within(far, lambda: up(there, net, 2))
        within(far, lambda: ip("route", "add", "default", "via", f"198.18.{net}.1"))
        within(far, lambda: ip("route", "add", "default", "via", f"2001:db8:{net}::1"))

    def up(interface: str, net: str, number: int) -> None:
        ip("address", "add", f"198.18.{net}.{number}/24", "dev", interface)
        ip("address", "add", f"2001:db8:{net}::{number}/64", "dev", interface, "nodad")
        ip("link", "set", interface, "up")

    for namespace in machines:
        within(namespace, lambda: ip("link", "set", "lo", "up"))
    within(machines.middle, lambda: cable("1", machines.client))
    within(machines.middle, lambda: cable("2", machines.backend))
    yield machines
    for namespace in machines:
        os.close(namespace)


@pytest.fixture
def web(machines: Machines, tmp_path: Path) -> Iterator[Path]:
    """An nginx on the backend's machine, which tells its client's address; yields its log."""
    log = tmp_path / "access.log"
    log.touch()
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(
        f"""\
        user root;
        worker_processes 1;
        pid {tmp_path}/nginx.pid;
        events {{ }}
        http {{
            log_format seen "$remote_addr";
            access_log {log} seen;
            client_body_temp_path {tmp_path}/body;
            proxy_temp_path {tmp_path}/proxy;
            fastcgi_temp_path {tmp_path}/fastcgi;
            uwsgi_temp_path {tmp_path}/uwsgi;
            scgi_temp_path {tmp_path}/scgi;
            server {{
                listen {BACKEND[0]}:{WEB};
                listen [{BACKEND[1]}]:{WEB};
                return 200 "$remote_addr $remote_port";
            }}
        }}
        """
    )
    words = ["nginx", "-c", configuration, "-e", tmp_path / "error.log", "-g", "daemon off;"]
    process = within(machines.backend, lambda: subprocess.Popen(words, start_new_session=True))
    try:
        # It listens by then.
        eventually((tmp_path / "nginx.pid").exists, "nginx serves")
        yield log
    finally:
        process.terminate()
        process.wait(60)


def capabilities(pid: int) -> set[int]:
    """Those that it has. There is no way to others."""
    sets = dict(re.findall(r"^Cap(\w+):\s+(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M))
    permitted, bounding = int(sets["Prm"], 16), int(sets["Bnd"], 16)
    assert bounding in (permitted, 0)
    return {number for number in range(64) if permitted >> number & 1}


@pytest.fixture
def transparent(
    serve: Serve, certificates: Certificates, machines: Machines, web: Path
) -> Instance:
    vhosts = [
        {"sni": ["six.example"], "backend": f"[{BACKEND[1]}]:{WEB}", "source_address": "client"},
        {"sni": ["ours.example"], "backend": f"{BACKEND[0]}:{WEB}"},
        {
            "backend": [f"{BACKEND[0]}:{WEB}", f"[{BACKEND[1]}]:{WEB}"],
            "source_address": "client",
        },
    ]
    listen = [{"address": f"[::]:{PORT}", "transparent": True}]
    instance: Instance = within(
        machines.middle,
        lambda: serve(listen=listen, vhost=vhosts, worker={"connect_timeout": "5s"}),
    )
    machines.route(instance.directory / "titus.toml")
    return instance


def test_the_backend_sees_the_client(machines: Machines, transparent: Instance, web: Path) -> None:
    for family, address in enumerate(CLIENT):
        # One of the two backends has the other family: the next one is taken.
        for _ in range(2):
            seen, port = machines.get(MIDDLE[family]).decode().split()
            assert seen == address
            source = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
            ended = transparent.wait_for_event("connection_ended", source=source)
            assert ended["client"].startswith(source.rpartition(":")[0])
        assert machines.get(MIDDLE[family], "ours.example").startswith(b"198.18.2.1 ")
    assert capabilities(transparent.parent().pid) == {prctl.CAP_KILL, prctl.CAP_NET_RAW}


def test_connections_to_other_machines(machines: Machines, transparent: Instance) -> None:
    for family, address in enumerate(ELSEWHERE):
        seen = machines.get(address).decode().split()[0]
        assert seen == CLIENT[family]
        text = f"[{address}]:{PORT}" if ":" in address else f"{address}:{PORT}"
        transparent.wait_for_event("connection_ended", local=text)


def test_an_address_that_cannot_be_bound_ends_the_connection(
    machines: Machines, transparent: Instance, web: Path
) -> None:
    before = web.read_text()
    assert machines.get(MIDDLE[0], "six.example") == b""
    failed = transparent.wait_for_event("backend_unavailable")
    assert failed["reason"] == (
        f"[{BACKEND[1]}]:{WEB}: the client's address, {CLIENT[0]}, is IPv4, "
        "and the backend's is not"
    )
    transparent.wait_for_event("connection_ended", end="backend_unavailable")
    assert web.read_text() == before


def test_a_load_balancer_names_the_client(serve: Serve, machines: Machines, web: Path) -> None:
    instance = within(
        machines.middle,
        lambda: serve(
            listen=[{"address": f"[::]:{PORT}", "accept_proxy_from": [CLIENT[0]]}],
            vhost=[{"backend": f"{BACKEND[0]}:{WEB}", "source_address": "client"}],
        ),
    )
    machines.route(instance.directory / "titus.toml")
    for named, seen in (("192.0.2.7", b"192.0.2.7 "), ("0.0.0.0", b""), ("127.0.0.1", b"")):
        balancer = within(
            machines.client, lambda: socket.create_connection((MIDDLE[0], PORT), TIMEOUT)
        )
        balancer.sendall(f"PROXY TCP4 {named} {MIDDLE[0]} 1234 443\r\n".encode())
        answer = b""
        try:
            with TlsClient(PORT, source=balancer) as client:
                client.handshake().send(b"GET / HTTP/1.0\r\n\r\n")
                while piece := client.receive():
                    answer += piece
        except ConnectionError:
            pass
        assert answer.partition(b"\r\n\r\n")[2].startswith(seen)
        assert bool(answer) == bool(seen)
    one, two = [event["reason"] for event in instance.wait_for_events(2, "backend_unavailable")]
    assert one.endswith("the client's address, 0.0.0.0, is the unspecified one")
    assert two.endswith("the client's address, 127.0.0.1, does not leave this machine")


def test_a_reload_that_takes_the_capability_asks_for_a_restart(
    serve: Serve, machines: Machines
) -> None:
    instance = within(
        machines.middle,
        lambda: serve(listen=[{"address": f"[::]:{PORT}"}], vhost=[{"backend": "198.18.2.2:80"}]),
    )
    assert prctl.CAP_NET_RAW not in capabilities(instance.pid)
    assert prctl.CAP_NET_RAW not in capabilities(instance.parent().pid)
    file = instance.directory / "titus.toml"
    file.write_text(file.read_text().replace("[[listen]]", "[[listen]]\ntransparent = true"))
    answer = reload(instance)
    assert "which titus-py gave up when it was started without them: restart it" in str(answer)
