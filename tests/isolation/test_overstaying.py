"""A worker that was taken over stays although its client has left."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from integration.certificates import Certificate
from integration.instance import Event, Instance, eventually, free_port
from integration.peers import Listener, TlsClient, receive_all, served_by

from .harness import infected, one_more_connection

#: A worker that stays is ended after five times half_closed_timeout, which is 1 s here, or at the
#: next look.
ANSWER_SECONDS = 14.0


def answer_for_long(connection: socket.socket) -> None:
    """A backend that answers a client which has ended its half; otherwise, an echo."""
    asked = connection.recv(4096)
    if asked != b"for long":
        while asked:
            connection.sendall(asked)
            asked = connection.recv(4096)
        return
    assert not connection.recv(1)
    until = time.monotonic() + ANSWER_SECONDS
    while time.monotonic() < until:
        connection.sendall(b".")
        time.sleep(0.05)
    connection.sendall(b"!")


@contextmanager
def instance_of(
    directory: Path, certificate: Certificate, limits: dict[str, str]
) -> Iterator[Instance]:
    directory.mkdir()
    with (
        Listener.tcp() as listener,
        served_by(listener, answer_for_long),
        Listener.tcp() as attacker,
    ):
        site = f"127.0.0.1:{free_port()}"
        by_ca = {"ca": certificate.authority, "server_name": "localhost"}
        tunnels = [
            {"listen": f"unix:{directory}/taken", "connect": attacker.address, **by_ca},
            {"listen": f"unix:{directory}/honest", "connect": site, **by_ca},
        ]
        with infected(
            directory,
            certificate,
            listener.address,
            limits=limits,
            listen=[{"address": site}],
            tunnel=tunnels,
        ) as instance:
            yield instance


def leave_a_worker_behind(instance: Instance, by_reset: bool) -> Event:
    """Take a worker over, and leave; returns what was said of its beginning."""
    with TlsClient(instance.port, "e.stall.600.attack.test") as client:
        client.handshake()
        name = "{}:{}".format(*client.socket.getsockname())
        if by_reset:
            no_linger = b"\1\0\0\0\0\0\0\0"
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
    return instance.wait_for_event("connection_begun", client=name)


def connect_by(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(2 * ANSWER_SECONDS)
    client.connect(str(path))
    return client


def leave_a_tunnels_worker_behind(instance: Instance) -> str:
    """Have its server take it over, and leave; returns the tunnel's name."""
    path = instance.directory / "taken"
    with connect_by(path) as client:
        client.sendall(b"t.stall.600.attack.test")
    return f"unix:{path}"


def ends_of(instance: Instance, begun: Event) -> list[Event]:
    return instance.events_named("connection_ended", client=begun["client"])


def test_it_is_ended_and_an_honest_half_closed_connection_is_kept(
    tmp_path: Path, certificate: Certificate
) -> None:
    with (
        instance_of(tmp_path / "1", certificate, {"half_closed_timeout": "1s"}) as instance,
        instance_of(tmp_path / "2", certificate, {}) as control,
        TlsClient(instance.port, "localhost") as honest,
        connect_by(instance.directory / "honest") as local,
        ThreadPoolExecutor(1) as pool,
    ):
        taken, stays_taken = map(leave_a_tunnels_worker_behind, (instance, control))
        local.sendall(b"for long")
        local.shutdown(socket.SHUT_WR)
        # Read meanwhile: nor may one that is half-closed stand still for so long.
        local_answer = pool.submit(receive_all, local)
        left = [leave_a_worker_behind(instance, by_reset) for by_reset in (False, True)]
        stays = leave_a_worker_behind(control, by_reset=False)
        honest.handshake()
        honest.send(b"for long")
        honest.close_notify()
        honest.socket.shutdown(socket.SHUT_WR)
        answer = honest.receive_all()
        assert answer.endswith(b"!")
        assert local_answer.result().endswith(b"!")
        assert instance.wait_for_event("tunnel_failed", tunnel=taken)["end"] == "client_gone"
        assert not control.events_named("tunnel_failed", tunnel=stays_taken, end="client_gone")
        for begun in left:
            [end] = eventually(lambda begun=begun: ends_of(instance, begun), "its end")
            assert (end["end"], end["level"]) == ("client_gone", "warning")
            assert end["seconds"] < ANSWER_SECONDS
        # With five minutes, it is still there.
        assert not ends_of(control, stays)
        assert control.worker_of(stays["uid"])
        one_more_connection(instance)
