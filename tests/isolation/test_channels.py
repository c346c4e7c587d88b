"""The channels that a worker holds: fuzzed, flooded, left waiting. And how it may end."""

import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Rounds
from integration.certificates import Certificate
from integration.instance import Instance, eventually
from integration.peers import TIMEOUT, Listener, TlsClient, served_by, was_reset

from keyd import protocol
from keyd.protocol import Operation, Request
from titus_py.between import messages

from .harness import infected, one_more_connection, take_over
from .infected_fork_server import random_message

#: So many at most from one worker, of which a channel's buffer takes a part.
FROM_ONE = 400


@pytest.fixture(scope="module")
def some(rounds: Rounds) -> int:
    """To each, by many workers: the first that makes no sense is a worker's last."""
    return rounds(enough=6_000, full=50_000)


@pytest.fixture
def own(certificate: Certificate, backend: Listener, tmp_path: Path) -> Iterator[Instance]:
    with infected(tmp_path, certificate, backend.address) as instance:
        yield instance


@pytest.fixture(scope="module")
def instance(
    certificate: Certificate, backend: Listener, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    """For those to whom it does not matter what others have done to it."""
    directory = tmp_path_factory.mktemp("infected")
    with infected(directory, certificate, backend.address, lasting=True) as instance:
        yield instance


def _order(instance: Instance, name: str) -> None:
    """Take a worker over, and wait for nothing but its end."""
    with TlsClient(instance.port, f"{name}.attack.test") as client:
        client.socket.sendall(client.first_flight())
        was_reset(client.socket)


@pytest.mark.parametrize("to", ["parent", "keyd"])
def test_fuzzing(own: Instance, to: str, some: int) -> None:
    """Through the real channels: nothing but the own connection ends."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    survivor = TlsClient(own.port, "localhost").handshake()
    survivor.send(b"x")
    assert survivor.receive_exactly(1) == b"x"
    before, parent, keyd = own.settled_counts(), own.parent(), own.keyd()

    sent = 0
    with ThreadPoolExecutor(3) as pool:
        while sent < some:
            names = [f"h.fuzz.{to}.{seed + number}.{FROM_ONE}" for number in range(30)]
            seed += len(names)
            list(pool.map(lambda name: _order(own, name), names))
            events = own.events_named("handshake_failed")
            sent = sum(event["octets_from_client"] for event in events)
    print(f"{sent} messages over {len(events)} channels")

    survivor.send(b"unharmed")
    assert survivor.receive_exactly(8) == b"unharmed"
    survivor.socket.close()
    one_more_connection(own)
    assert (own.parent(), own.keyd()) == (parent, keyd)
    after = eventually(lambda: _not_more(own, before), f"no more than {before}")
    assert after
    # Of what was sent, each worker was ended for the first message that made no sense.
    names = {"parent": ("malformed_message", "unexpected_message"), "keyd": ("keyd_refused",)}
    alarms = [event for name in names[to] for event in own.events_named(name)]
    assert alarms
    assert all(event["client"] and event["uid"] and event["attempted"] for event in alarms)


def _not_more(instance: Instance, before: dict[str, int]) -> dict[str, int] | None:
    counts = instance.counts()
    return counts if all(counts[name] <= before[name] for name in before) else None


def test_fuzzing_the_decoders(some: int) -> None:
    """Each message to its end, which no channel would live to see."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    source = random.Random(seed)
    decoded = 0
    for _ in range(some):
        try:
            messages.decode_from_worker(
                random_message(source, "parent")[: messages.WORKER_MESSAGE_OCTETS]
            )
            decoded += 1
        except messages.Malformed as error:
            assert str(error).isprintable()  # noqa: PT017
        try:
            protocol.Request.decode(random_message(source, "keyd"))
            decoded += 1
        except protocol.Malformed as error:
            assert str(error).isprintable()  # noqa: PT017
    assert 0 < decoded < 2 * some


# --- after the handshake --------------------------------------------------------------------


@pytest.mark.parametrize("without", [[], ["filter", "parting"]], ids=["as it is", "control"])
def test_what_the_private_key_is_needed_for_later_reaches_nobody(
    certificate: Certificate, tmp_path: Path, without: list[str]
) -> None:
    """The provider asks at the number that the channel had. Closed, it might be another one's."""
    received = []

    def keep(connection: socket.socket) -> None:
        received.append(connection.recv(65536))

    with Listener.tcp() as listener, served_by(listener, keep):
        # Whoever asks waits for as long as a handshake may take.
        worker = {"handshake_timeout": "10s"}
        with infected(tmp_path, certificate, listener.address, without, worker=worker) as instance:
            result = take_over(instance, "e", "again")
        eventually(lambda: received, "an end of the backend's connection")
    if not without:
        assert result.outcome.startswith("keyd is gone")
        assert received == [b""]
    else:
        assert Request.decode(received[0]).operation is Operation.SIGN


# --- the others are not slowed down ---------------------------------------------------------


def _median_milliseconds(instance: Instance, count: int = 40) -> float:
    durations = []
    for _ in range(count):
        begun = time.monotonic()
        one_more_connection(instance)
        durations.append(time.monotonic() - begun)
    return statistics.median(durations) * 1000


@pytest.mark.parametrize(
    "deed", ["h.burst.parent." + ".".join(["44" * 3] * 10), "h.burst.keyd." + ".".join(["00"] * 10),
             "h.ask.2", "h.stall.2"]
)  # fmt: skip
def test_others_are_not_slowed_down(instance: Instance, deed: str) -> None:
    """One that floods, or stalls, all the time: the ratio of medians, in one run."""
    ratios = []
    # What else the machine does changes from one to the other; that a flood costs others does not.
    for _ in range(6):
        stop = threading.Event()

        def attack(stop: threading.Event = stop) -> None:
            while not stop.is_set():
                _order(instance, deed)
                # An attacker who comes again and again is the limits' business.
                stop.wait(0.05)

        quiet = _median_milliseconds(instance)
        attacker = threading.Thread(target=attack)
        attacker.start()
        busy = _median_milliseconds(instance)
        stop.set()
        attacker.join()
        ratios.append(busy / quiet)
        if ratios[-1] < 2:
            return
    raise AssertionError(f"connections take longer, by these factors: {ratios}")


# --- how a worker ends ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "end"),
    [("crash", "killed by SIGSEGV"), ("useup", "worker_failed"), ("burst.parent.58", None)],
)
@pytest.mark.parametrize("stage", ["h", "e"])
def test_alarms(instance: Instance, stage: str, deed: str, end: str | None) -> None:
    """Loud, and with all that is known: by whom, from where, what, and how it ended."""
    result = take_over(instance, stage, deed)
    assert result.alarms
    for alarm in result.alarms:
        assert alarm["client"]
        assert alarm["uid"] in instance.uids
    if end is None:
        assert "malformed_message" in [alarm["event"] for alarm in result.alarms]
        assert result.end["end"] == "malformed_message"
    elif end in result.end["end"]:
        assert result.end["level"] == "alarm"
    else:
        # Whatever it ran into at last: its own limits, or, trying to cope, the filter.
        assert result.end["end"].startswith(("exited with", "killed by"))
        assert result.end["level"] == "alarm"
    one_more_connection(instance)


@pytest.mark.parametrize(
    ("message", "attempted"),
    [
        ("44ffffff", "Dial(vhost=65535, protocol=None, facts=None)"),
        ("52", "Ready()"),
        ("440001ff", "Dial(vhost=1, protocol=None, facts=None)"),
        ("44000000", "Dial(vhost=0, protocol=0, facts=None)"),
        (
            "440000ff017601730131",
            "Dial(vhost=0, protocol=None, facts=TlsFacts(version='v', cipher_suite='s', "
            "server_name='1'))",
        ),
    ],
)
def test_messages_out_of_place(instance: Instance, message: str, attempted: str) -> None:
    """Well-formed, but not what a worker would say now, or may have."""
    result = take_over(instance, "h", "burst", "parent", message)
    [alarm] = [event for event in result.alarms if event["event"] == "unexpected_message"]
    assert alarm["attempted"] == attempted
    assert result.end["end"] == "unexpected_message"


def test_protocols_that_a_virtual_host_has_not(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    """A worker that was taken over gets to the backends of its virtual hosts' protocols alone."""
    with Listener.tcp() as of_protocol:
        of_protocol.socket.setblocking(False)
        negotiates = {"alpn": ["x/1"], "backends": {"x/1": of_protocol.address}}
        requires = {"sni": ["localhost"], "alpn_required": True}
        hosts = [negotiates | requires, {"sni": [""]}, negotiates]
        with infected(tmp_path, certificate, backend.address, vhost=hosts) as instance:
            for message, attempted in (
                ("44000201", "Dial(vhost=2, protocol=1,"),
                ("440002fe", "Dial(vhost=2, protocol=254,"),
                ("440000ff", "Dial(vhost=0, protocol=None,"),
                ("44000100", "Dial(vhost=1, protocol=0,"),
            ):
                result = take_over(instance, "h", "burst", "parent", message)
                (alarm,) = (event for event in result.alarms if "attempted" in event)
                assert alarm["attempted"].startswith(attempted)
                with pytest.raises(BlockingIOError):
                    of_protocol.accept()
            # The control: what it has.
            with TlsClient(instance.port, "h.burst.parent.44000200.attack.test") as client:
                client.socket.sendall(client.first_flight())
                of_protocol.socket.settimeout(TIMEOUT)
                of_protocol.accept().close()


def test_nothing_outlives_its_connection(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    """Where fork is possible (no filter, no limit on processes): the namespace ends it all."""
    with infected(
        tmp_path, certificate, backend.address, ["filter", "nproc", "become"]
    ) as instance:
        since = {process.pid for process in instance.processes()}
        result = take_over(instance, "h", "child")
        assert "a child is alive" in result.outcome
        eventually(
            lambda: all(
                worker.parent in (instance.parent().pid, instance.pid)
                for worker in instance.processes()
                if worker.pid not in since
            ),
            "no process but the instance's own",
        )


def test_without_the_namespace_it_would(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    """The control: the same child, with its worker gone, is still there."""
    layers = ["filter", "nproc", "namespaces"]
    with infected(tmp_path, certificate, backend.address, layers) as instance:
        with TlsClient(instance.port, "h.child.attack.test") as client:
            client.socket.sendall(client.first_flight())
            assert client.socket.recv(100).startswith(b"a child is alive")
            uid = instance.wait_for_event("handshake_failed")["uid"]
            client.socket.settimeout(1)
            # Its connection has not ended, though its worker has.
            with pytest.raises(TimeoutError):
                client.socket.recv(100)
        _end_leftovers(instance, uid)


def _end_leftovers(instance: Instance, uid: int) -> None:
    """What the control left behind: the supervisor's now, with the uid that its worker had."""
    for process in instance.processes():
        if (process.parent, process.uid) == (instance.pid, uid):
            process.kill()
