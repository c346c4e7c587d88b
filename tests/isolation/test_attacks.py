"""A worker that was taken over, and all that it cannot do: ``attacks`` has the table.

Each attempt is made three times over: by an unconfined child, where it succeeds; by the real
worker, before and after its handshake; and by workers of which a part of the confinement was
left out, so that the other parts are seen to hold.
"""

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from integration.certificates import Certificate
from integration.instance import Instance
from integration.peers import Listener, TlsClient, reset, served_by

from .attacks import ATTEMPTS, Attempt
from .harness import infected, take_over

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="system calls by their numbers on x86-64"
)


def _echo_or_reset(connection: socket.socket) -> None:
    connection.settimeout(None)
    while octets := connection.recv(65536):
        if octets == b"reset":
            reset(connection)
            return
        connection.sendall(octets)


@pytest.fixture(scope="module")
def backend() -> Iterator[Listener]:
    """Echoes; but resets the connection when it is asked to."""
    with Listener.tcp() as listener, served_by(listener, _echo_or_reset):
        yield listener


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Listener]:
    """A service of the host's that is nobody's backend; and one on an abstract name."""
    with Listener.tcp() as listener, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0titus-py-attack-{os.getpid()}")
        abstract.listen(1024)
        listener.socket.listen(1024)
        yield listener


class Victims(NamedTuple):
    """An instance, and those in it that are to be attacked."""

    instance: Instance
    pids: dict[str, int]


Instances = Callable[..., Victims]


@pytest.fixture(scope="module")
def instance_without(
    certificate: Certificate, backend: Listener, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instances]:
    """An instance without these parts of the confinement; each is started once.

    Each has a client already, whose worker is among the victims, and who is unharmed in the end.
    """
    started: dict[str, Victims] = {}
    with ExitStack() as stack:

        def start(without: str = "") -> Victims:
            if without not in started:
                directory = tmp_path_factory.mktemp("infected")
                instance = stack.enter_context(
                    infected(directory, certificate, backend.address, without.split(), lasting=True)
                )
                worker = stack.enter_context(_bystander(instance))
                pids = {
                    "keyd": instance.keyd().pid,
                    "parent": instance.parent().pid,
                    "fork server": instance.fork_server().pid,
                    "worker": worker,
                }
                started[without] = Victims(instance, pids)
            return started[without]

        yield start


@contextmanager
def _bystander(instance: Instance) -> Iterator[int]:
    with TlsClient(instance.port, "localhost") as client:
        client.handshake()
        client.send(b"harmed?")
        assert client.receive_exactly(7) == b"harmed?"
        # The only one that holds a backend.
        worker = max(instance.confined_workers(2), key=lambda worker: worker.descriptors)
        victims = {worker, instance.keyd(), instance.parent(), instance.fork_server()}
        yield worker.pid
        client.send(b"unharmed")
        assert client.receive_exactly(8) == b"unharmed"
        assert victims <= set(instance.processes())


def _mapping(pid: int, permissions: str) -> int:
    """An address in a process's memory."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    line = next(line for line in lines if line.split()[1].startswith(permissions))
    return int(line.partition("-")[0], 16)


def _given(attempt: Attempt, victims: Victims, elsewhere: Listener) -> list[int]:
    """What the attempt's code is to be handed."""
    numbers = []
    for gift in attempt.given:
        match gift.rpartition(" "):
            case (_, _, "port"):
                numbers.append(elsewhere.port)
            case (_, _, "number"):
                numbers.append(os.getpid())
            case (who, _, "pid"):
                numbers.append(victims.pids[who])
            case (who, _, "address"):
                numbers.append(_mapping(victims.pids[who], "r"))
            case (who, _, "variables"):
                numbers.append(_mapping(victims.pids[who], "rw"))
    return numbers


def _cases() -> list[object]:
    return [
        pytest.param(number, stage, id=f"{attempt.what}-{stage}")
        for number, attempt in enumerate(ATTEMPTS)
        for stage in attempt.stages
    ]


def _cases_without() -> list[object]:
    return [
        pytest.param(number, without, becomes, id=f"{attempt.what}-without {without}")
        for number, attempt in enumerate(ATTEMPTS)
        for without, becomes in attempt.without.items()
    ]


def _try(instance: Instance, number: int, stage: str, parameters: list[int]) -> str:
    """Its outcome, and that its worker alone was affected."""
    result = take_over(instance, stage, number, *parameters)
    if result.outcome.startswith("killed"):
        # Loud, and with all that is known of it.
        [alarm] = [event for event in result.alarms if event.get("end") == result.outcome]
        assert alarm["client"]
        assert alarm["uid"] in instance.uids
        assert alarm["connection"]
    return result.outcome


@pytest.mark.parametrize("stage", ["h", "e"])
def test_code_that_does_nothing_is_not_stopped(instance_without: Instances, stage: str) -> None:
    """So that what stops the others is not what was needed to take the worker over."""
    result = take_over(instance_without("").instance, stage, "nothing")
    assert result.outcome == "nothing"
    assert not result.alarms


@pytest.mark.parametrize(("number", "stage"), _cases())
def test_a_worker_is_stopped(
    instance_without: Instances, elsewhere: Listener, number: int, stage: str
) -> None:
    attempt = ATTEMPTS[number]
    victims = instance_without("")
    given = _given(attempt, victims, elsewhere)
    assert _try(victims.instance, number, stage, given) == attempt.stopped


@pytest.mark.parametrize(("number", "without", "becomes"), _cases_without())
def test_without_parts_of_the_confinement(
    instance_without: Instances, elsewhere: Listener, number: int, without: str, becomes: str
) -> None:
    attempt = ATTEMPTS[number]
    victims = instance_without(without)
    given = _given(attempt, victims, elsewhere)
    assert _try(victims.instance, number, attempt.stages[0], given) == becomes


def test_unconfined_they_succeed(
    instance_without: Instances, elsewhere: Listener, backend: Listener, tmp_path: Path
) -> None:
    """The same code, in children of root's that nothing confines."""
    victims = instance_without("")
    script = "import sys; from isolation.control import main; main(int(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", script, str(backend.port)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[1])},
        input=json.dumps([_given(attempt, victims, elsewhere) for attempt in ATTEMPTS]),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert not result.stderr, result.stderr
    outcomes = dict(
        zip([attempt.what for attempt in ATTEMPTS], json.loads(result.stdout), strict=True)
    )
    unexpected = {
        attempt.what: outcomes[attempt.what]
        for attempt in ATTEMPTS
        if outcomes[attempt.what] not in attempt.control.split(" or ")
    }
    assert not unexpected


def _descriptors(pid: int) -> dict[int, str]:
    """What each is, as the kernel names it: a socket by its number."""
    directory = f"/proc/{pid}/fd"
    return {int(name): os.readlink(f"{directory}/{name}") for name in os.listdir(directory)}


def _written_together(pid: int) -> list[str]:
    """Its shared mappings that it may write to."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if line.split()[1] == "rw-s"]


def test_a_worker_shares_nothing_with_the_fork_server(instance_without: Instances) -> None:
    """Neither a socket nor memory that either can change: what it inherits are copies."""
    victims = instance_without("")
    server = _descriptors(victims.pids["fork server"])
    assert {0: "/dev/null", 1: "/dev/null"}.items() <= server.items()
    assert not _written_together(victims.pids["fork server"])
    for worker in victims.instance.confined_workers(2):
        held = _descriptors(worker.pid)
        assert {number: held.pop(number) for number in range(3)} == dict.fromkeys(
            range(3), "/dev/null"
        )
        # The parent; and whoever serves also a client, a backend, and what was the channel to keyd.
        assert len(held) == (4 if worker.pid == victims.pids["worker"] else 1)
        assert all(name.startswith("socket:") for name in held.values())
        assert not {*held.values()} & {*server.values()}
        assert _written_together(worker.pid) == ["/memfd:report (deleted)"]
