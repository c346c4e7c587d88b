"""A peer that vanishes, as a machine does that loses its power or its network."""

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from .conftest import Serve
from .instance import free_port
from .namespaces import ip, new_namespace, within
from .peers import Listener, TlsClient, receive_exactly, was_reset
from .test_pump import sockets_of, the_busy_worker
from .test_reload import hang_up


class Lan(NamedTuple):
    """A network with one other machine on it."""

    #: This machine's address on it, and the other one's.
    here: str
    there: str
    #: The other machine's network namespace, as a descriptor, and its interface.
    namespace: int
    interface: str

    def on_the_other_machine(self, do: Callable[[], Any]) -> Any:
        return within(self.namespace, do)

    def vanish(self) -> None:
        self.on_the_other_machine(lambda: ip("link", "set", self.interface, "down"))


@pytest.fixture
def lan() -> Iterator[Lan]:
    number = os.getpid() % 16384
    net = f"198.18.{number // 64}.{number % 64 * 4}"
    prefix, _, last = net.rpartition(".")
    here, there = f"{prefix}.{int(last) + 1}", f"{prefix}.{int(last) + 2}"
    ours, theirs = f"tp{number}h", f"tp{number}t"
    namespace = new_namespace()
    ip("link", "add", ours, "type", "veth", "peer", "name", theirs)
    try:
        ip("link", "set", theirs, "netns", f"/proc/{os.getpid()}/fd/{namespace}")
        ip("address", "add", f"{here}/30", "dev", ours)
        ip("link", "set", ours, "up")
        lan = Lan(here, there, namespace, theirs)
        lan.on_the_other_machine(lambda: ip("address", "add", f"{there}/30", "dev", theirs))
        lan.on_the_other_machine(lambda: ip("link", "set", theirs, "up"))
        yield lan
    finally:
        ip("link", "delete", ours)
        os.close(namespace)


def test_a_peer_that_vanished_is_noticed(serve: Serve, lan: Lan, backend: Listener) -> None:
    with lan.on_the_other_machine(lambda: Listener.tcp(lan.there)) as far:
        instance = serve(
            listen=[{"address": f"{lan.here}:{free_port()}"}],
            vhost=[
                {"sni": ["far.example"], "backend": far.address},
                {"sni": ["near.example"], "backend": backend.address},
            ],
            limits={"keepalive": "1s"},
        )
        there = lan.on_the_other_machine(
            lambda: socket.create_connection((lan.here, instance.port), 60)
        )
        with (
            TlsClient(instance.port, "far.example", host=lan.here) as client,
            TlsClient(instance.port, "near.example", source=there) as vanishing,
        ):
            client.handshake().send(b"hello")
            vanishing.handshake().send(b"hello")
            with far.accept() as vanishing_backend, backend.accept() as accepted:
                assert receive_exactly(vanishing_backend, 5) == b"hello"
                assert receive_exactly(accepted, 5) == b"hello"
                lan.vanish()
                with pytest.raises(ConnectionResetError):
                    client.receive()
                assert was_reset(accepted)
    for end in ("backend_reset", "client_reset"):
        event = instance.wait_for_event("connection_ended", end=end)
        assert event["level"] == "info"
        assert event["detail"] in ("No route to host", "Connection timed out")


@pytest.mark.parametrize(
    ("setting", "options"), [("60s", (1, 60, 15, 4)), ("off", (0, None, None, None))]
)
def test_both_sides_are_asked_whether_they_are_there(
    serve: Serve, backend: Listener, setting: str, options: tuple[int | None, ...]
) -> None:
    instance = serve(backend.address, limits={"keepalive": setting})
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    with TlsClient(instance.port) as client:
        client.handshake()
        with backend.accept():
            seen = [
                (
                    side.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    *(side.getsockopt(socket.IPPROTO_TCP, name) for name in names),
                )
                for side in sockets_of(the_busy_worker(instance, client.name).pid)
                if side.family == socket.AF_INET
            ]
    assert len(seen) == 2
    for one in seen:
        assert [got for got, wanted in zip(one, options, strict=True) if wanted is not None] == [
            wanted for wanted in options if wanted is not None
        ]


def test_a_reload_changes_it_for_those_who_come_later(serve: Serve, backend: Listener) -> None:
    instance = serve(backend.address, limits={"keepalive": "60s"})
    configuration = instance.directory / "titus.toml"
    configuration.write_text(configuration.read_text().replace('"60s"', '"7s"'))
    hang_up(instance, 2)
    with TlsClient(instance.port) as client:
        client.handshake()
        with backend.accept():
            assert {
                side.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
                for side in sockets_of(the_busy_worker(instance, client.name).pid)
                if side.family == socket.AF_INET
            } == {7}
