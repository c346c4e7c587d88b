"""A worker that was taken over, and the client's address that its backend is told.

The parent writes it, from what the kernel said or, behind a load balancer, from the one message in
which the worker passes the balancer's header on, before it reads anything of its client's. So a
client that takes its worker over comes too late. Each attempt is made again on a parent that takes
such a message at any time, where it succeeds.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from integration.certificates import Certificate
from integration.instance import Instance, eventually, free_port
from integration.peers import Listener, TlsClient, receive_exactly, served_by
from integration.service import FAILS
from proxyprotocol.v2 import ProxyProtocolV2

from titus_py.between.messages import Dial, Ends, Proxied

from .harness import infected

BALANCERS = {"accept_proxy_from": ["127.0.0.0/8"]}
LINE = b"PROXY TCP4 192.0.2.1 203.0.113.2 56324 443\r\n"
FORGED = "198.51.100.66"
REPORT = Proxied(Ends(FORGED, 66, "203.0.113.2", 443)).encode().hex()
UNKNOWN = Proxied(None).encode().hex()
DIAL = Dial(0, None).encode().hex()


class Backend:
    """Notes of each connection whose it is, as the header says."""

    def __init__(self, listener: Listener) -> None:
        self.address = listener.address
        self.told: list[str] = []

    def handle(self, connection: socket.socket) -> None:
        head = receive_exactly(connection, 16)
        body = receive_exactly(connection, int.from_bytes(head[14:], "big"))
        self.told.append(str(ProxyProtocolV2().unpack(head + body).source[0]))
        connection.settimeout(None)
        while octets := connection.recv(65536):
            connection.sendall(octets)


@contextmanager
def serving(
    directory: Path, certificate: Certificate, without: str = ""
) -> Iterator[tuple[Instance, Backend]]:
    """Two listeners, the second for load balancers; and the backend of both."""
    with Listener.tcp() as listener:
        backend = Backend(listener)
        addresses = [{"address": f"127.0.0.1:{free_port()}"} for _ in range(2)]
        addresses[1] |= BALANCERS
        with (
            served_by(listener, backend.handle),
            infected(
                directory,
                certificate,
                backend.address,
                without.split(),
                listen=addresses,
                vhost=[{"send_proxy": "v2"}],
            ) as instance,
        ):
            yield instance, backend


@pytest.fixture(scope="module")
def served(
    certificate: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Instance, Backend]]:
    with serving(tmp_path_factory.mktemp("as-it-is"), certificate) as both:
        yield both


@pytest.fixture(scope="module")
def gullible(
    certificate: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Instance, Backend]]:
    """The parent takes an address at any time, from whoever says it."""
    with serving(tmp_path_factory.mktemp("gullible"), certificate, "once") as both:
        yield both


def port_of(instance: Instance, balanced: bool) -> int:
    configuration = (instance.directory / "titus.toml").read_text()
    ports = [
        int(line.rpartition(":")[2].rstrip('"'))
        for line in configuration.splitlines()
        if line.startswith("address = ")
    ]
    return ports[balanced]


def attempt(instance: Instance, balanced: bool, stage: str, *messages: str) -> str:
    """Have a client's worker send these to the parent; returns that client's name."""
    order = ".".join([stage, "burst", "parent", *messages])
    port = port_of(instance, balanced)
    with TlsClient(port, f"{order}.attack.test") as client:
        own = "{}:{}".format(*client.socket.getsockname())
        if balanced:
            client.socket.sendall(LINE)
        with suppress(*FAILS):
            client.handshake()
            client.receive_all()
    return own


ATTEMPTS = [
    pytest.param(False, "h", (REPORT, DIAL), id="where no balancer connects"),
    pytest.param(True, "h", (REPORT, DIAL), id="a second time"),
    pytest.param(True, "h", (UNKNOWN, DIAL), id="that it is unknown"),
    pytest.param(True, "h", (DIAL, REPORT), id="after the dial"),
    pytest.param(True, "e", (REPORT,), id="after the handshake"),
]


@pytest.mark.parametrize(("balanced", "stage", "messages"), ATTEMPTS)
def test_no_other_address_is_told(
    served: tuple[Instance, Backend], balanced: bool, stage: str, messages: tuple[str, ...]
) -> None:
    instance, backend = served
    before = len(backend.told)
    own = attempt(instance, balanced, stage, *messages)
    named = {"balancer": own} if balanced else {"client": own}
    begun = instance.wait_for_event("connection_begun", **named)
    number = begun["connection"]
    alarm = instance.wait_for_event("unexpected_message", connection=number)
    assert alarm["attempted"].startswith("Proxied(ends=")
    ends = eventually(
        lambda: [
            event
            for name in ("connection_ended", "handshake_failed")
            for event in instance.events_named(name, connection=number)
        ],
        "its end",
    )
    assert ends[0]["end"] == "unexpected_message"
    assert ends[0]["client"] == ("192.0.2.1:56324" if balanced else own)
    # If its dial came first, its backend may have been told who it is.
    dialled = messages[0] == DIAL or stage == "e"
    assert set(backend.told[before:]) <= ({"192.0.2.1"} if dialled else set())


@pytest.mark.parametrize("balanced", [False, True])
def test_a_parent_that_believed_it_would_tell_the_backend(
    gullible: tuple[Instance, Backend], balanced: bool
) -> None:
    """The control."""
    instance, backend = gullible
    before = len(backend.told)
    order = ".".join(["h", "burst", "parent", REPORT, DIAL])
    with TlsClient(port_of(instance, balanced), f"{order}.attack.test") as client:
        if balanced:
            client.socket.sendall(LINE)
        client.socket.sendall(client.first_flight())
        told = eventually(lambda: backend.told[before:], "the backend is told")
    assert told == [FORGED]


def test_without_the_balancers_word_there_is_no_backend(
    certificate: Certificate, tmp_path: Path
) -> None:
    """A worker that does not read the header, and so has nothing to say, gets no backend."""
    with serving(tmp_path, certificate, "header") as (instance, backend):
        # Nothing is signed for a client without a header, so it cannot come as far as that itself.
        order = f"h.burst.parent.{DIAL}.attack.test"
        with TlsClient(port_of(instance, True), order) as client, suppress(*FAILS):
            client.handshake()
            client.receive_all()
        alarm = instance.wait_for_event("unexpected_message")
        assert alarm["attempted"].startswith("Dial(vhost=0")
        assert backend.told == []
