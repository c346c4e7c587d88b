"""A running ``titus-py serve``, seen from outside: its log, its processes, its end."""

import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from titus_py.configuration.toml import key_text

from .peers import connected_at

TITUS_PY = Path(sys.executable).parent / "titus-py"
Event = dict[str, Any]
Table = dict[str, Any]
#: For what comes soon, on a machine that is busy.
PATIENCE = 60.0


class Process(NamedTuple):
    """One process, as /proc had it. ``started`` tells two with the same number apart."""

    pid: int
    parent: int
    uid: int
    started: int

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def sockets(self) -> list[int]:
        """The numbers of those of its descriptors that are sockets."""
        directory = f"/proc/{self.pid}/fd"
        return [
            int(number)
            for number in os.listdir(directory)
            if os.readlink(f"{directory}/{number}").startswith("socket:")
        ]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)
        if number is signal.SIGSTOP:
            # Its threads stop one after the other, each when it has a processor.
            eventually(lambda: set(self._states()) <= {"T", "t"}, "it stops")

    @property
    def sleeps(self) -> bool:
        """Whether all its threads wait for something."""
        return set(self._states()) == {"S"}

    def _states(self) -> Iterator[str]:
        """Of its threads (proc_pid_stat(5)). None has ended meanwhile."""
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            stat = Path(f"/proc/{self.pid}/task/{thread}/stat").read_text()
            yield stat[stat.rindex(")") + 2]

    def limit_descriptors(self, soft: int | None = None) -> None:
        """Set its soft limit; None: as high as it goes.

        As its own uid may (prlimit(2)): root may lack CAP_SYS_RESOURCE.
        """
        if soft is None:
            limits = Path(f"/proc/{self.pid}/limits").read_text()
            found = re.search(r"^Max open files +\S+ +(\d+)", limits, re.MULTILINE)
            assert found
            soft = int(found[1])
        command = ["prlimit", f"--pid={self.pid}", f"--nofile={soft}:"]
        ids = {"user": self.uid, "group": self.uid, "extra_groups": []} if self.uid else {}
        subprocess.run(command, check=True, **ids)  # type: ignore[call-overload]


#: Among the flags in /proc/PID/stat: one of the kernel's own.
_PF_KTHREAD = 0x0020_0000


def all_processes() -> Iterator[Process]:
    """Every process that is more than a zombie, but for the kernel's own.

    Tests look all the time, and the machine has many: so it is read as cheaply as it can be.
    """
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (process := _process(int(entry))) is not None:
            yield process


def _process(pid: int) -> Process | None:
    """The same of one; None if it has ended."""
    try:
        fields = _short_file(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        if fields[0] == b"Z" or int(fields[6]) & _PF_KTHREAD:
            return None
        # /proc/PID of a process that is not dumpable is root's: the status tells.
        status = _short_file(f"/proc/{pid}/status")
    except OSError:
        return None
    uid = int(status.partition(b"\nUid:")[2].split(maxsplit=1)[0])
    return Process(pid, int(fields[1]), uid, int(fields[19]))


def _short_file(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 8192)
    finally:
        os.close(descriptor)


def zombies(parent: int) -> list[int]:
    """The children of this process that have ended, and that it took no note of."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if fields[0] == "Z" and int(fields[1]) == parent:
                    found.append(int(entry))
    return found


def descendants(pid: int) -> list[Process]:
    """A process and all that came of it.

    Asked by tests all the time: to look at every process for it took a tenth of theirs.
    """
    found = [] if (first := _process(pid)) is None else [first]
    for process in found:
        children = map(_process, sorted(_children(process.pid)))
        found += [child for child in children if child is not None]
    return found


def _children(pid: int) -> set[int]:
    """Its children's numbers, of all its threads (proc_pid_task_tid_children(5)).

    If one ends while it is read, another may be missing: it is read until it stays the same.
    """
    before: set[int] | None = None
    while True:
        now: set[int] = set()
        with suppress(FileNotFoundError, ProcessLookupError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with suppress(FileNotFoundError, ProcessLookupError):
                    with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                        now.update(map(int, file.read().split()))
        if now == before:
            return now
        before = now


def of_each(processes: Iterable[Process], file: str) -> dict[Process, bytes]:
    """This file in /proc/PID of each of them, but of those that have ended since they were listed.

    Who reads it asks for those by name that have to be there.
    """
    found = {}
    for process in processes:
        with suppress(FileNotFoundError, ProcessLookupError):
            found[process] = Path(f"/proc/{process.pid}/{file}").read_bytes()
    return found


def eventually(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Wait until this is true, and return what it is."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)
    return result


_given: set[int] = set()
#: Which of the processes this one is that run tests, and how many there are.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


def free_port() -> int:
    """A port on which nothing listens, outside what the kernel gives to clients.

    Given once, and to one process that runs tests: whoever asked for one may not listen there yet.
    Those below are for instances that the product itself starts (``titus_py.audit.throwaway``).
    """
    while True:
        port = random.randrange(16_000 + _WORKER, 32_000, _WORKERS)
        if port in _given:
            continue
        _given.add(port)
        try:
            with socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True):
                return port
        except OSError:
            continue


def toml(tables: Mapping[str, Any]) -> str:
    """As much TOML as a configuration needs."""
    lines = []
    for name, content in tables.items():
        heading = f"[[{name}]]" if isinstance(content, list) else f"[{name}]"
        for table in content if isinstance(content, list) else [content]:
            lines.append(heading)
            within = {
                f"{name}.{key}": value for key, value in table.items() if _holds_tables(value)
            }
            # JSON's strings, numbers, booleans and arrays of them are TOML's.
            lines += [
                f"{key_text(key)} = {json.dumps(value, default=str)}"
                for key, value in table.items()
                if f"{name}.{key}" not in within
            ]
            lines.append(toml(within))
    return "\n".join(lines) + "\n"


def _holds_tables(value: object) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and any(isinstance(one, Mapping) for one in value)
    )


class Uids:
    """Ranges of uids that no other instance uses, on a machine where many tests may run.

    Every other one is from the upper half of all uids: no signed integer holds those.
    """

    #: Three generations of worker.max as it is by default.
    SIZE = 4000
    _PER_TEST_PROCESS = 200_000
    _UPPER_HALF = 1 << 31

    def __init__(self) -> None:
        self._first = 10_000_000 + os.getpid() % 10_000 * self._PER_TEST_PROCESS
        self._next = 0
        self._upper = False
        #: Those of instances that run: some run as long as all tests, and ranges come round again.
        self._held: list[range] = []

    def take(self, count: int = SIZE, high: bool = False) -> range:
        """``high``: from the upper half, where no interpreter has its heap."""
        while True:
            if self._next + count > self._PER_TEST_PROCESS:
                self._next = 0
            first = self._first + self._next + (high or self._upper) * self._UPPER_HALF
            self._next += count
            self._upper = not self._upper
            uids = range(first, first + count)
            if not any(uids.start < held.stop and held.start < uids.stop for held in self._held):
                return uids

    def hold(self, uids: range) -> None:
        self._held.append(uids)

    def give_back(self, uids: range) -> None:
        self._held = [held for held in self._held if held != uids]


#: For all tests of this process.
UIDS = Uids()


class Instance:
    """``titus-py serve``, from its start until nothing is left of it.

    ``expected_alarms`` are the events of level "alarm" that a test provokes: any other
    one fails the test when the instance is closed. ``?`` is what is no event at all.
    """

    #: The client that makes the parent fork.
    _USES_SPARES_UP = "127.0.0.77"

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        uids: range,
        port: int,
        program: Path | None = None,
    ) -> None:
        self.port = port
        self.uids = self._given_uids = uids
        UIDS.hold(uids)
        self.expected_alarms: set[str] = set()
        self.directory = log.parent
        self._log = log
        self._offset = 0
        self._events: list[Event] = []
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [program or TITUS_PY, "serve", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._seen: set[Process] = set()
        #: The clients of ``settled_counts`` whose end is not told yet, and until when to wait for
        #: that: for ever, once they are known to have a worker.
        self._using_up: dict[str, float] = {}

    @classmethod
    def from_tables(
        cls,
        directory: Path,
        tables: Table,
        uids_count: int = Uids.SIZE,
        program: Path | None = None,
        high_uids: bool = False,
    ) -> "Instance":
        """Serve these tables, with what they leave out of [worker], [keyd] and [log]."""
        uids = UIDS.take(uids_count, high_uids)
        worker = {
            "uids": f"{uids[0]}-{uids[-2]}",
            "max": 500,
            "spare": 4,
            # A client may have to wait for processes that start.
            "handshake_timeout": f"{PATIENCE:g}s",
            "chroot": directory / "empty",
            **tables.get("worker", {}),
        }
        # A test's clients have one address, as a rule.
        limits = {
            "connections_per_prefix": worker["max"],
            "unfinished": {"per_prefix": 1_000_000},
            **tables.get("limits", {}),
        }
        complete = {
            "log": {"format": "json"},
            **tables,
            "keyd": {"user": str(uids[-1]), **tables.get("keyd", {})},
            "limits": {name: value for name, value in limits.items() if value is not None},
            "worker": worker,
        }
        configuration = directory / "titus.toml"
        configuration.write_text(toml(complete))
        first = (
            tables["listen"][0]["address"] if tables["listen"] else tables["tunnel"][0]["listen"]
        )
        port = 0 if first.startswith("unix:") else int(first.rpartition(":")[2])
        return cls(["--config", str(configuration)], directory / "log", uids, port, program)

    # --- what it says -------------------------------------------------------------

    def log(self) -> str:
        return self._log.read_text()

    def events(self) -> list[Event]:
        """All events so far, but for what ``settled_counts`` made happen.

        Lines that are no JSON are events named ``?``.
        """
        with self._log.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.decode().splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                event = {"event": "?", "line": line}
            client = event.get("client", "")
            if not client.startswith(f"{self._USES_SPARES_UP}:"):
                self._events.append(event)
            elif event["event"] == "connection_begun":
                self._using_up[client] = math.inf
            elif "end" in event:
                self._using_up.pop(client, None)
        return self._events

    def events_named(self, name: str, **fields: object) -> list[Event]:
        return [event for event in self.events() if fits(event, {"event": name, **fields})]

    def wait_for_event(
        self, name: str, seconds: float = PATIENCE, since: int = 0, **fields: object
    ) -> Event:
        """The first event with this name and these fields, from the one numbered ``since``.

        Of a client's connections, the last one counts: its port may have been an earlier client's.
        """

        def found() -> list[Event]:
            # Once it has ended, there is nothing to wait for.
            ended = self._process.poll() is not None
            events = fitting()
            assert events or not ended, "it has ended"
            return events

        def fitting() -> list[Event]:
            events = self.events()[since:]
            if "client" in fields:
                of_client = [event for event in events if event.get("client") == fields["client"]]
                last = max((event.get("connection", 0) for event in of_client), default=0)
                events = [event for event in of_client if event.get("connection", 0) in (0, last)]
            return [event for event in events if fits(event, {"event": name, **fields})]

        try:
            events: list[Event] = eventually(found, f"event {name} {fields}", seconds)
        except AssertionError as error:
            tail = self.log()[-8000:]
            raise AssertionError(f"no event {name} {fields}: {error}\n{tail}") from None
        return events[0]

    def wait_for_events(self, count: int, name: str, seconds: float = PATIENCE) -> list[Event]:
        """All with this name, once there are so many."""
        return list(
            eventually(
                lambda: found if len(found := self.events_named(name)) >= count else None,
                f"{count} events {name}",
                seconds,
            )
        )

    def wait_until_listening(self) -> "Instance":
        """In either form of the log."""

        def listening() -> bool:
            assert self._process.poll() is None, f"it ended:\n{self.log()}"
            return " listening " in self.log() or bool(self.events_named("listening"))

        eventually(listening, "listening")
        return self

    # --- what it consists of ------------------------------------------------------

    def processes(self) -> list[Process]:
        """The supervisor and all below it."""
        found = descendants(self.pid)
        self._seen.update(found)
        return found

    def parent(self) -> Process:
        return self._started("parent_started")

    def keyd(self) -> Process:
        return self._started("keyd_started")

    def _started(self, event: str) -> Process:
        pid = self._pid_in(event)
        return next(process for process in self.processes() if process.pid == pid)

    def _pid_in(self, event: str) -> int:
        pid: int = self.events_named(event)[-1]["pid"]
        return pid

    def supervisor(self) -> Process:
        return next(process for process in self.processes() if process.pid == self.pid)

    def fork_server(self) -> Process:
        """What the parent started first, of what still runs as root (a worker may be about to)."""
        return _fork_server(self._forked())

    def workers(self) -> list[Process]:
        """All of them, the spare ones too, and those that are not confined yet."""
        forked = self._forked()
        oldest = min(forked, key=lambda one: (one.started, one.pid), default=None)
        return [one for one in forked if one != oldest or one.uid]

    def confined_workers(self, at_least: int = 1) -> list[Process]:
        """The same, once there are so many, and each is confined."""

        def confined() -> list[Process]:
            listed = self.workers()
            if len(listed) < at_least or not all(map(_is_confined, listed)):
                return []
            # One that was root's when it was listed has another uid by now.
            now = [_process(worker.pid) for worker in listed]
            return [worker for worker in now if worker is not None] if all(now) else []

        found: list[Process] = eventually(confined, f"{at_least} confined workers")
        return found

    def _forked(self) -> list[Process]:
        parent = self._pid_in("parent_started")
        return [one for one in self.processes() if one.parent == parent]

    def worker_of(self, uid: int) -> Process:
        return next(worker for worker in self.workers() if worker.uid == uid)

    def counts(self) -> dict[str, int]:
        """What must not grow: processes, and the descriptors of those that stay."""
        processes = {one.pid: one for one in self.processes()}
        parent = processes[self._pid_in("parent_started")]
        staying = {
            "supervisor": processes[self.pid],
            "parent": parent,
            "fork server": _fork_server(
                one for one in processes.values() if one.parent == parent.pid
            ),
            "keyd": processes[self._pid_in("keyd_started")],
        }
        descriptors = {f"{name}'s descriptors": one.descriptors for name, one in staying.items()}
        return {"processes": len(processes), **descriptors}

    def settled_counts(self, spare: int = 4) -> dict[str, int]:
        """The counts with no connection, and with as many spare workers as there may be.

        Spares are forked when half of them are used up: until then, some are used up.
        """

        def settled() -> bool:
            workers = self.workers()
            if len(workers) < spare:
                use_one_up()
            # None of them may be one that has just got a client, and is about to end.
            time.sleep(0.1)
            self.events()
            awaited = any(until > time.monotonic() for until in self._using_up.values())
            return len(workers) == spare and self.workers() == workers and not awaited

        def use_one_up() -> None:
            here = self._USES_SPARES_UP, 0
            with socket.create_connection(("127.0.0.1", self.port), PATIENCE, here) as client:
                # One that is turned away has no end in the log, and may be reset at any moment.
                self._using_up["{}:{}".format(*client.getsockname())] = time.monotonic() + 2
                with suppress(OSError):
                    client.sendall(b"\x16")  # who says nothing gets none
                    client.shutdown(socket.SHUT_WR)
                    client.recv(1)

        try:
            eventually(settled, f"{spare} spare workers, no others")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.workers()}\n{self.log()[-4000:]}") from None

        def staying() -> dict[str, int] | None:
            self.confined_workers(spare)
            counts = self.counts()
            # The last spare may still be on its way to say that it is ready.
            time.sleep(0.2)
            return counts if counts == self.counts() else None

        found: dict[str, int] = eventually(staying, "counts that stay")
        return found

    # --- its end ------------------------------------------------------------------

    def signal(self, number: signal.Signals) -> None:
        self.processes()
        os.kill(self.pid, number)

    def runs(self) -> bool:
        return self._process.poll() is None

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code, once it has ended."""
        return self._process.wait(seconds)

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def left_behind(self) -> list[Process]:
        """What there still is of it, one way or another."""
        return [
            process
            for process in all_processes()
            if process in self._seen or process.uid in self.uids
        ]

    def assert_nothing_is_left(self, seconds: float = PATIENCE) -> None:
        eventually(
            lambda: not self.left_behind(), f"no process left of {self.left_behind()}", seconds
        )

    def close(self) -> None:
        """End it if it still runs; fail if anything is left or anything went unforeseen."""
        problems = []
        self.processes()
        if self._process.poll() is None:
            # The second one makes it leave at once.
            self._process.send_signal(signal.SIGTERM)
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                problems.append("it did not end when told to")
        try:
            self.assert_nothing_is_left()
        except AssertionError as error:
            problems.append(str(error))
        if problems:
            for process in [*self.left_behind(), *descendants(self.pid)]:
                with suppress(ProcessLookupError):
                    process.kill()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(5)
        UIDS.give_back(self._given_uids)
        problems += [f"not foreseen: {event}" for event in self.events() if self._alarms(event)]
        assert not problems, "\n".join([*problems, self.log()[-8000:]])

    def _alarms(self, event: Event) -> bool:
        if event["event"] == "?" and "?" not in self.expected_alarms:
            return not re.match(r"[0-9T:.-]+Z (info|warning) ", event["line"])
        return event.get("level") == "alarm" and event["event"] not in self.expected_alarms


def _fork_server(forked: Iterable[Process]) -> Process:
    return min((one for one in forked if not one.uid), key=lambda one: (one.started, one.pid))


def _is_confined(worker: Process) -> bool:
    """Its title is the last that it sets: until then it has the fork server's."""
    try:
        return _short_file(f"/proc/{worker.pid}/cmdline").rstrip(b"\0") == b"titus-py: worker"
    except (FileNotFoundError, ProcessLookupError):
        return False


def fits(event: Event, fields: Mapping[str, object]) -> bool:
    """Whether it has these fields; of a client in them, whether it is of the last connection."""
    if any(event.get(field) != value for field, value in fields.items()):
        return False
    port = str(event.get("local")).rpartition(":")[2]
    if not port.isdigit():
        return True
    names = (str(fields.get(side)) for side in ("client", "balancer"))
    connected = max(connected_at.get((name, int(port)), 0.0) for name in names)
    # The log has milliseconds, without what is left over.
    return connected < datetime.fromisoformat(event["time"]).timestamp() + 0.001
