"""How much memory workers that were taken over can use up, and who is ended when it runs out."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from integration.certificates import Certificate
from integration.instance import Instance, Process, eventually
from integration.peers import Listener, TlsClient, Truncated
from OpenSSL import SSL

from titus_py.audit.instance import status

from .harness import infected, one_more_connection

MEBIBYTE = 1 << 20
#: What the threat model says that a worker may take beyond what it begins with.
BOUND = 200 * MEBIBYTE
#: How much memory one page in each GiB is, with the two tables that are for it alone.
WITH_TABLES = 3 * 4096
CONTROLLERS = Path("/sys/fs/cgroup")
#: Whether they are of the first version of cgroups.
FIRST_VERSION = (CONTROLLERS / "memory").is_dir()


def kibibytes(process: Process, *names: str) -> int:
    """In octets, the sum of these lines of its status (proc_pid_status(5))."""
    found = status(process.pid)
    return sum(int(found[name].split()[0]) for name in names) * 1024


@contextmanager
def spread_out(instance: Instance, pages: int) -> Iterator[tuple[TlsClient, Process]]:
    """A worker that was taken over and has taken so many pages, or as many as it could."""
    with TlsClient(instance.port, f"e.spread.{pages}.attack.test") as client:
        client.socket.settimeout(60)
        client.handshake()
        assert client.receive(1) == b"."
        begun = instance.wait_for_event("connection_begun", client=client.name)
        yield client, instance.worker_of(begun["uid"])


@pytest.mark.parametrize("without", [[], ["as"]], ids=["as it is", "control"])
def test_page_tables_are_bounded_as_well(
    certificate: Certificate, backend: Listener, tmp_path: Path, without: list[str]
) -> None:
    """The limit is on address space, of which there is a page for each three that are taken."""
    with infected(tmp_path, certificate, backend.address, without) as instance:
        spares = instance.confined_workers(4)
        spare = max(kibibytes(worker, "RssAnon", "VmPTE") for worker in spares)
        with spread_out(instance, BOUND * 5 // 4 // WITH_TABLES) as (_, worker):
            taken = kibibytes(worker, "RssAnon", "VmPTE") - spare
        assert taken > BOUND * 3 // 4
        assert (taken < BOUND) == (not without)
        one_more_connection(instance)


# --- when it runs out -----------------------------------------------------------------------


class MemoryGroup:
    """A memory cgroup (v1 or v2) of the test's own."""

    def __init__(self) -> None:
        within = CONTROLLERS / "memory" if FIRST_VERSION else CONTROLLERS
        self._directory = within / f"titus-py-test-{os.getpid()}"
        self._limit = "memory.limit_in_bytes" if FIRST_VERSION else "memory.max"
        self._usage = "memory.usage_in_bytes" if FIRST_VERSION else "memory.current"
        if not FIRST_VERSION:
            (CONTROLLERS / "cgroup.subtree_control").write_text("+memory")
        self._directory.mkdir()
        swap = "memory.swappiness" if FIRST_VERSION else "memory.swap.max"
        if (self._directory / swap).exists():
            (self._directory / swap).write_text("0")

    def take(self, instance: Instance, room: int) -> None:
        """The whole instance; from now on, it may take so many octets."""
        for process in instance.processes():
            with suppress(ProcessLookupError):
                (self._directory / "cgroup.procs").write_text(str(process.pid))
        usage = int((self._directory / self._usage).read_text())
        (self._directory / self._limit).write_text(str(usage + room))

    def close(self) -> None:
        def removed() -> bool:
            with suppress(OSError):
                self._directory.rmdir()
            return not self._directory.exists()

        eventually(removed, "the cgroup's end")


#: How many workers are ended before the attempt is over, and how many it takes at most.
ENDED, AT_MOST = 4, 60


@pytest.mark.skipif(
    not os.access(CONTROLLERS / ("memory" if FIRST_VERSION else "."), os.W_OK),
    reason="no cgroups can be made here",
)
@pytest.mark.parametrize("without", [[], ["oom"]], ids=["as it is", "control"])
def test_when_it_runs_out_workers_are_ended(
    certificate: Certificate, backend: Listener, tmp_path: Path, without: list[str]
) -> None:
    """Many of them use it up together, and each is smaller than the largest of the others.

    In the control, the largest is ended: the supervisor, and with it everything.
    """
    group = MemoryGroup()
    with ExitStack() as stack:
        stack.callback(group.close)
        instance = stack.enter_context(infected(tmp_path, certificate, backend.address, without))
        honest = stack.enter_context(TlsClient(instance.port)).handshake()
        others = [
            instance.supervisor(),
            instance.parent(),
            instance.keyd(),
            instance.fork_server(),
        ]
        largest = max(kibibytes(process, "VmRSS", "VmPTE") for process in others)
        workers = instance.confined_workers()
        smallest = min(kibibytes(worker, "VmRSS", "VmPTE") for worker in workers)
        difference = largest - smallest
        assert difference > MEBIBYTE
        group.take(instance, 6 * difference)

        def ended() -> int:
            return len(instance.events_named("connection_ended", end="killed by SIGKILL"))

        def somebody_else_is_ended() -> bool:
            return not instance.runs() or not {*others} <= {*instance.processes()}

        order = f"e.spread.{difference // 2 // WITH_TABLES}.attack.test"
        for _ in range(AT_MOST):
            if ended() >= ENDED or somebody_else_is_ended():
                break
            # It may be ended before it has said a word.
            with suppress(OSError, SSL.Error, Truncated):
                attacker = stack.enter_context(TlsClient(instance.port, order))
                attacker.handshake()
                attacker.receive(1)
        if without:
            instance.expected_alarms.add("fork_server_died")
            eventually(lambda: not instance.runs(), "an end of everything")
            return
        assert ended() >= ENDED
        assert not somebody_else_is_ended()
        honest.send(b"still there")
        assert honest.receive_exactly(11) == b"still there"
