"""An instance whose workers can be taken over (see ``infected_fork_server``), and its clients."""

import json
import socket
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

from integration import instance as instances
from integration.certificates import Authority, Certificate
from integration.hellos import certificate_verify, client_hello, flight, records
from integration.instance import Event, Instance, eventually, free_port
from integration.peers import TIMEOUT, TlsClient, Truncated, connect
from OpenSSL import SSL

from keyd.protocol import Request

__all__ = [
    "Relay",
    "Result",
    "infected",
    "make_certificate",
    "one_more_connection",
    "over_tls",
    "take_over",
]

#: What these tests provoke.
ALARMS = {
    "connection_ended",
    "handshake_failed",
    "worker_killed",
    "worker_failed",
    "malformed_message",
    "unexpected_message",
    "keyd_refused",
}


class Result(NamedTuple):
    """What came of a worker that was taken over.

    ``outcome`` is what it had to say, or how it ended; ``alarms`` is what was said of it.
    """

    outcome: str
    end: Event
    alarms: list[Event]


@contextmanager
def infected(
    directory: Path,
    certificate: Certificate,
    backend: str,
    without: Sequence[str] = (),
    lasting: bool = False,
    high_uids: bool = False,
    **tables: Any,
) -> Iterator[Instance]:
    """Serve, with these parts of the confinement left out.

    ``lasting``: the fork server is not replaced, however many workers are killed.
    """
    driver = directory / "titus-py"
    script = Path(__file__).with_name("driver.py")
    words = f"'{json.dumps(list(without))}' {'lasting' if lasting else 'renewed'}"
    driver.write_text(f'#!/bin/sh\nexec {sys.executable} -I {script} {words} "$@"\n')
    driver.chmod(driver.stat().st_mode | stat.S_IXUSR)
    vhosts = tables.pop("vhost", [{}])
    complete: dict[str, Any] = {
        "listen": [{"address": f"127.0.0.1:{free_port()}"}],
        "vhost": [
            {
                "certificate": certificate.certificate,
                "key": certificate.key,
                "backend": backend,
                **vhost,
            }
            for vhost in vhosts
        ],
        **tables,
    }
    with mock.patch.object(instances, "TITUS_PY", driver):
        instance = Instance.from_tables(directory, complete, high_uids=high_uids)
    instance.expected_alarms |= ALARMS
    try:
        instance.wait_until_listening()
        yield instance
    finally:
        instance.close()


def make_certificate(directory: Path, kind: str = "P-256", *names: str) -> Certificate:
    return Authority(directory).issue(kind, *names)


def take_over(
    instance: Instance, stage: str, deed: str | int, *parameters: object, seconds: float = TIMEOUT
) -> Result:
    """Take a worker over, with the server name as the order, and see what comes of it."""
    since = len(instance.events())
    words = ".".join([stage, str(deed), *map(str, parameters)])
    with TlsClient(instance.port, f"{words}.attack.test") as client:
        client.socket.settimeout(seconds)
        name = "{}:{}".format(*client.socket.getsockname())
        said = _answer(client, stage)
    begun = instance.wait_for_event("connection_begun", since=since, client=name)

    def of_it() -> list[Event]:
        return [
            event
            for event in instance.events()[since:]
            if event.get("connection") == begun["connection"]
        ]

    def ended() -> list[Event]:
        return [event for event in of_it() if "end" in event]

    end = eventually(ended, f"an end of {begun}")[-1]
    alarms = [event for event in of_it() if event["level"] == "alarm"]
    recorded = str(end.get("detail", "")).removeprefix("taken over: ")
    if not said:
        said = recorded if recorded != end.get("detail", "") else end["end"]
    return Result(said, end, alarms)


def _answer(client: TlsClient, stage: str) -> str | None:
    """What the worker said, None if it ended without a word."""
    octets = bytearray()
    try:
        if stage == "h":
            client.socket.sendall(client.first_flight())
            while piece := client.socket.recv(65536):
                octets += piece
        else:
            client.handshake()
            while piece := client.receive():
                octets += piece
    except (ConnectionResetError, SSL.Error, Truncated):
        return octets.decode(errors="replace") or None
    return octets.decode(errors="replace")


def over_tls(
    instance: Instance, server_name: str, octets: bytes, source: socket.socket | None = None
) -> bytes:
    """Send these octets through a worker that nobody took over, and take them back."""
    with TlsClient(instance.port, server_name, source=source) as client:
        client.handshake()
        client.send(octets)
        answer = client.receive_exactly(len(octets))
        client.close_notify()
        client.receive_all()
    return answer


def one_more_connection(instance: Instance) -> None:
    """The instance still serves."""
    assert over_tls(instance, "localhost", b"still there") == b"still there"


class Relay:
    """Through a taken-over worker, messages to keyd, and its answers."""

    def __init__(
        self,
        instance: Instance,
        seconds: int | str = 0,
        source: socket.socket | None = None,
        hello: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """``hello`` is what ``client_hello`` is to make it of, besides the name."""
        self.socket = source or connect(instance.port)
        self.client = "{}:{}".format(*self.socket.getsockname())
        #: Those of a handshake, which go along with each request to sign.
        self.messages: bytes | None = None
        #: What the parent sees of it.
        self.hello = client_hello(
            f"h.relay.{seconds}.attack.test", **{"random": bytes(32), **hello}
        )
        self.socket.sendall(records(self.hello))
        # Not before the ClientHello was read, and not together with it.
        assert self.socket.recv(2, socket.MSG_WAITALL) == bytes(2)

    def ask(self, message: bytes) -> bytes:
        """keyd's answer; empty if it hung up, an errno's name if it had."""
        if self.messages is not None and message[:2] == b"\1\1":
            message = Request.decode(message)._replace(messages=self.messages).encode()
        self.socket.sendall(message)
        head = self.socket.recv(2, socket.MSG_WAITALL)
        return self.socket.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)

    def handshake(self, suite: int = 0x1301, algorithm: str = "sha256") -> bytes:
        """Have a handshake with this client; returns what is to be signed for it."""
        self.messages = flight(suite)
        return certificate_verify(self.hello, self.messages, algorithm)

    def close(self) -> None:
        self.socket.close()
