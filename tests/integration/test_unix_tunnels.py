"""Tunnels that listen on a unix socket: its file, from start to end; who may connect; the log."""

import grp
import json
import os
import pwd
import queue
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from titus_py.supervisor.control_client import ask
from titus_py.worker.farewell import unread

from .client_authority import ClientAuthority, ClientCertificate
from .conftest import Serve
from .instance import TITUS_PY, Event, Instance, eventually, free_port
from .peers import (
    TIMEOUT,
    Listener,
    lingering,
    receive_all,
    receive_exactly,
    refusing,
    reset,
)
from .service import PATIENCE, edit, problems, reload, status
from .test_unix_listeners import take_descriptors
from .tls_server import echo_to_the_end, server_context, tls_server

ME = f"unix:uid={os.geteuid()},pid={os.getpid()}"
#: Nobody's, on any system that tests run on.
STRANGER = 4_200_000


class Server(NamedTuple):
    """A TLS server that echoes, and its certificate."""

    address: str
    shown: ClientCertificate


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    authority = ClientAuthority(tmp_path_factory.mktemp("servers"))
    shown = authority.issue(dns=("echo.test",), usage=ExtendedKeyUsageOID.SERVER_AUTH)
    with tls_server(server_context(shown), echo_to_the_end) as address:
        yield Server(address, shown)


def tunnel(path: Path, server: Server, **settings: Any) -> dict[str, Any]:
    settings = {"connect": server.address, "pins": [server.shown.spki], **settings}
    return {"listen": f"unix:{path}", **settings}


@pytest.fixture(scope="module")
def told() -> str:
    """Where a test has a server of its own."""
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def nobody() -> Iterator[str]:
    with refusing() as address:
        yield address


@pytest.fixture(scope="module")
def shared(
    serve_all: Serve, server: Server, shared_directory: Path, told: str, nobody: str
) -> Instance:
    """One instance for whatever does not change it."""
    users = {"socket_user": "nobody", "socket_group": "daemon", "socket_mode": "0620"}
    return serve_all(
        listen=[],
        vhost=[],
        tunnel=[
            tunnel(shared_directory / "echo", server, socket_mode="0666"),
            tunnel(shared_directory / "root's", server),
            tunnel(shared_directory / "nobody's", server, **users),
            tunnel(shared_directory / "told", server, connect=told),
            tunnel(shared_directory / "unreachable", server, connect=nobody),
            tunnel(
                shared_directory / "both ends", server, connect=f"unix:{shared_directory}/server"
            ),
        ],
        limits={"connections_per_address": 3},
    )


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(TIMEOUT)
    client.connect(str(path))
    return client


def echoes(path: Path) -> bool:
    with connect(path) as client:
        client.sendall(b"ping")
        return receive_exactly(client, 4) == b"ping"


def of_this_path(path: Path, name: str, instance: Instance, **fields: object) -> Event:
    return instance.wait_for_event(name, tunnel=f"unix:{path}", **fields)


def test_octets_go_both_ways_and_so_do_ends(shared: Instance, shared_directory: Path) -> None:
    path, octets = shared_directory / "root's", os.urandom(3 << 20)
    with connect(path) as client:
        sender = threading.Thread(target=client.sendall, args=[octets])
        sender.start()
        assert receive_exactly(client, len(octets)) == octets
        sender.join()
        client.sendall(b"the last")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"the last"
    event = of_this_path(path, "connection_ended", shared)
    assert (event["end"], event["client"], event["local"]) == ("clean", ME, f"unix:{path}")
    assert event["octets_from_client"] == event["octets_to_client"] == len(octets) + 8
    begun = shared.wait_for_event("connection_begun", connection=event["connection"])
    assert (begun["client"], begun["tunnel"]) == (ME, f"unix:{path}")


def test_what_was_sent_before_an_end_arrives_before_it(
    shared: Instance, shared_directory: Path, server: Server, told: str
) -> None:
    """A client that sends and leaves; and one that reads only once its server has reset."""
    sent, heard = os.urandom(100_000), queue.Queue[bytes]()

    def hear(connection: ssl.SSLSocket) -> None:
        octets = bytearray()
        while piece := connection.recv(65536):
            octets += piece
        heard.put(bytes(octets))

    def say_and_reset(connection: ssl.SSLSocket) -> None:
        connection.sendall(sent)
        # Once the client says that it has come: a reset takes what has not.
        connection.recv(1)
        reset(socket.socket(fileno=connection.detach()))

    path, context = shared_directory / "told", server_context(server.shown)
    with tls_server(context, hear, address=told):
        with connect(path) as client:
            client.sendall(sent)
        assert heard.get(timeout=TIMEOUT) == sent
        assert of_this_path(path, "connection_ended", shared)["octets_from_client"] == len(sent)
    with tls_server(context, say_and_reset, address=told), connect(path) as client:
        eventually(lambda: unread(client) == len(sent), "all of it has come")
        client.sendall(b"?")
        of_this_path(path, "connection_ended", shared, end="server_reset")
        # A unix socket knows no reset: the stream is at its end.
        assert receive_all(client) == sent


def test_a_server_on_a_unix_socket_as_well(
    shared: Instance, shared_directory: Path, server: Server
) -> None:
    with Listener.unix(shared_directory / "server") as listener:

        def serve() -> None:
            context = server_context(server.shown)
            with context.wrap_socket(listener.accept(), server_side=True) as wrapped:
                echo_to_the_end(wrapped)

        thread = threading.Thread(target=serve)
        thread.start()
        assert echoes(shared_directory / "both ends")
        thread.join(TIMEOUT)


def test_a_client_whose_server_is_not_there_is_ended(
    shared: Instance, shared_directory: Path
) -> None:
    path = shared_directory / "unreachable"
    with connect(path) as client:
        # A unix socket knows no reset, unless something was left unread.
        assert receive_all(client) == b""
    event = of_this_path(path, "tunnel_failed", shared)
    assert (event["end"], event["client"]) == ("unreachable", ME)


def test_what_a_client_leaves_in_its_socket_holds_nobody_up(
    shared: Instance, shared_directory: Path
) -> None:
    """A descriptor that makes its last holder wait for ten minutes, for who turns it away.

    Since Linux 6.16, it is refused.
    """
    parent, path = shared.parent(), shared_directory / "unreachable"
    take_descriptors(shared, path)
    side, peer = lingering()
    with side:
        # What was sent is there before the parent has accepted.
        parent.kill(signal.SIGSTOP)
        with connect(path) as hostile:
            socket.send_fds(hostile, [b"x"], [side.fileno()])
            side.close()
            parent.kill(signal.SIGCONT)
            with suppress(ConnectionResetError):
                receive_all(hostile)
    assert echoes(shared_directory / "echo")
    assert peer.fileno() >= 0
    peer.close()


def access(path: Path) -> tuple[int, int, int]:
    seen = path.lstat()
    return stat.S_IMODE(seen.st_mode), seen.st_uid, seen.st_gid


def test_mode_and_owner(shared: Instance, shared_directory: Path) -> None:
    nobody, daemon = pwd.getpwnam("nobody").pw_uid, grp.getgrnam("daemon").gr_gid
    assert access(shared_directory / "root's") == (0o660, 0, 0)
    assert access(shared_directory / "nobody's") == (0o620, nobody, daemon)
    assert access(shared_directory / "echo") == (0o666, 0, 0)


#: Connects and says how that went; then holds the connection until its input ends.
_STRANGER = """
import socket, sys
client = socket.socket(socket.AF_UNIX)
try:
    client.connect(sys.argv[1])
    client.sendall(b"x")
    print(client.recv(1).decode(), flush=True)
except OSError as error:
    print(error.strerror, flush=True)
sys.stdin.read()
"""


def strangers(path: Path, uid: int = STRANGER) -> "subprocess.Popen[str]":
    # The system's, which everybody may run.
    command = ["/usr/bin/python3", "-I", "-c", _STRANGER, str(path)]
    ids: dict[str, Any] = {"user": uid, "group": uid, "extra_groups": []}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd="/", **ids)


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_mode_says_who_may_connect(shared: Instance, shared_directory: Path) -> None:
    with strangers(shared_directory / "root's") as process:
        assert said(process) == "Permission denied"


def test_limits_count_users(shared: Instance, shared_directory: Path) -> None:
    """``connections_per_address``: a user is an address, and nobody takes another one's place."""
    path = shared_directory / "echo"
    with strangers(path) as one, strangers(path) as two, strangers(path) as three:
        assert [said(process) for process in (one, two, three)] == ["x"] * 3
        begun = shared.wait_for_event(
            "connection_begun", client=f"unix:uid={STRANGER},pid={two.pid}"
        )
        with strangers(path) as excess:
            assert said(excess) in ("", "Connection reset by peer", "Broken pipe")
        limited = shared.wait_for_event("limited", last_client=f"unix:uid={STRANGER}")
        assert limited["limit"] == "connections_per_address"
        assert echoes(path)
    ended = shared.wait_for_event("connection_ended", connection=begun["connection"])
    assert ended["end"] == "clean"


def test_status_and_audit_know_it(shared: Instance, shared_directory: Path) -> None:
    path = shared_directory / "echo"
    told = status(shared)
    assert f"unix:{path}" in told["listeners"]
    assert f"unix:{path}" in [one["listen"] for one in told["tunnels"]]
    with connect(path) as client:
        client.sendall(b"x")
        assert receive_exactly(client, 1) == b"x"
        command = [TITUS_PY, "audit", "--pid", str(shared.pid), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    (about,) = json.loads(done.stdout)
    assert not [one for one in about["findings"] if one["verdict"] == "broken"], done.stdout
    seen = [
        one["seen"]
        for one in about["findings"]
        if one["check"] == "descriptors" and one["process"]["stage"] == "established"
    ]
    assert [what for what in seen if "client" in what and "backend" in what]


def test_a_reload_keeps_the_socket_and_so_does_a_new_program(
    serve: Serve, server: Server, directory: Path
) -> None:
    path = directory / "x.sock"
    instance = serve(listen=[], vhost=[], tunnel=[tunnel(path, server)])
    made = path.lstat().st_ino
    with connect(path) as stayer:
        answer = ask(instance.pid, {"do": "reload program"}, PATIENCE)
        assert answer == {"reloaded": True, "generation": 2}
        assert echoes(path)
        stayer.sendall(b"still")
        assert receive_exactly(stayer, 5) == b"still"
        assert path.lstat().st_ino == made

    # Nor does the parent's end take it away.
    instance.expected_alarms = {"parent_died"}
    instance.parent().kill()
    assert echoes(path)
    # Who may connect follows the configuration; the socket stays.
    edit(instance, lambda tables: tables["tunnel"][0].update(socket_mode="0600", socket_group=7))
    assert reload(instance)["reloaded"]
    assert (access(path), path.lstat().st_ino) == ((0o600, 0, 7), made)
    # A configuration that cannot be had changes nothing: somebody else has that socket.
    occupied = directory / "another's.sock"
    edit(instance, lambda tables: tables["tunnel"].append(tunnel(occupied, server)))
    with Listener.unix(occupied):
        (problem,) = problems(instance)
    assert problem.startswith(f"cannot listen on unix:{occupied}: another process serves this")
    assert echoes(path)
    assert occupied.is_socket()
    # Once it has gone, its file is in nobody's way. What is not listened on any more is removed.
    edit(instance, lambda tables: tables.update(tunnel=[tunnel(occupied, server)]))
    assert reload(instance)["reloaded"]
    assert echoes(occupied)
    assert not path.exists()


def test_after_a_crash(serve: Serve, server: Server, directory: Path) -> None:
    """The file is left, and the next start replaces it; at its end, it is removed."""
    path = directory / "x.sock"
    instance = serve(listen=[], vhost=[], tunnel=[tunnel(path, server)])
    os.kill(instance.pid, signal.SIGKILL)
    instance.wait()
    instance.assert_nothing_is_left()
    assert path.is_socket()
    again = serve(listen=[], vhost=[], tunnel=[tunnel(path, server)])
    assert echoes(path)
    assert again.terminate() == 0
    assert not path.exists()


_LAUNCHER = f"""#!{sys.executable} -I
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind({{path!r}})
listener.listen()
os.dup2(listener.detach(), 4)
os.dup2(4, 3)
os.environ |= {{{{"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}}}}
os.execv({str(TITUS_PY)!r}, [{str(TITUS_PY)!r}, *sys.argv[1:]])
"""


def test_systemd_may_have_made_the_socket(serve: Serve, server: Server, directory: Path) -> None:
    """As with TCP: systemd's socket is used, is there after a reload, and is not removed.

    And there is as much room as for TCP: who stands still gives way.
    """
    path, program = directory / "x.sock", directory / "launcher"
    program.write_text(_LAUNCHER.format(path=str(path)))
    program.chmod(0o755)
    instance = serve(
        listen=[],
        vhost=[],
        tunnel=[tunnel(path, server)],
        program=program,
        worker={"max": 3, "spare": 1, "handshake_timeout": "5s"},
        limits={"connections_per_prefix": None},
    )
    made = path.lstat().st_ino
    assert reload(instance)["reloaded"]
    idle = [connect(path) for _ in range(3)]
    for client in idle:
        client.sendall(b"x")
        assert receive_exactly(client, 1) == b"x"
    assert echoes(path)
    event = instance.wait_for_event("connection_ended", end="gave_way")
    assert event["client"] == ME
    for client in idle:
        client.close()
    # Its mode is systemd's to set.
    edit(instance, lambda tables: tables["tunnel"][0].update(socket_mode="0666"))
    (problem,) = problems(instance)
    assert "systemd's titus-py.socket has made it: set SocketMode=" in problem
    assert instance.terminate() == 0
    assert path.lstat().st_ino == made
