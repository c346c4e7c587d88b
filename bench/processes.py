"""Starting programs so that none is left behind, and what a tree of processes has used.

A proxy is the process that was started and everything below it. /proc counts a process's
reaped children for it, so that workers which came and went between two looks are counted too.
"""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import prctl

__all__ = ["Failed", "cpu_seconds", "free_port", "kernel_octets", "pss_octets", "running"]

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """A program did not do what it was started for; the text is for the report."""


@contextmanager
def running(
    command: Sequence[str | Path],
    log: Path,
    port: int | None = None,
    cpus: set[int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """Have this program run, with all that it starts; yields its pid once the port is open.

    It is in a session of its own, so that Ctrl-C reaches this process alone, and is told to
    stop if this process dies. Raises Failed.
    """

    def prepare() -> None:
        prctl.set_pdeathsig(signal.SIGTERM)
        if cpus:
            os.sched_setaffinity(0, cpus)

    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=prepare,
            env=environment,
        )
    try:
        if port is not None:
            _wait_for(port, process, log)
        yield process.pid
    finally:
        _stop(process)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Failed(f"ended at once, {process.returncode}: {_tail(log)}")
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    raise Failed(f"does not listen: {_tail(log)}")


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-3:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """It is asked to; then it and whatever of its session is left is killed."""
    if process.returncode is not None:
        return
    # Not Popen.terminate(), which would reap one that has ended. As long as it is not reaped,
    # nobody else gets its number, nor that of its session.
    os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    unreaped = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while not os.waitid(os.P_PID, process.pid, unreaped) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A port on which nothing listens, outside what the kernel gives to clients.

    Nor do our tests choose one of these, and some of them are the bench's, at the same time.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        if port not in _given:
            with suppress(OSError), socket.create_server(("127.0.0.1", port)):
                _given.add(port)
                return port
    raise Failed("no free port")


_given: set[int] = set()
_PORTS = range(4_000, 10_000)


def _tree(root: int) -> list[tuple[int, list[str]]]:
    """This process and all below it: the pid, and /proc/PID/stat from the state on."""
    below: dict[int, list[tuple[int, list[str]]]] = {}
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = (
                    Path(f"/proc/{name}/stat")
                    .read_text(errors="replace")
                    .rpartition(")")[2]
                    .split()
                )
            except (FileNotFoundError, ProcessLookupError):
                continue
            below.setdefault(int(stat[1]), []).append((int(name), stat))
            if int(name) == root:
                found.append((root, stat))
    for pid, _ in found:
        found += below.get(pid, [])
    return found


def cpu_seconds(root: int) -> float:
    """The processor's time, user and system, of a tree and of all that it has reaped."""
    return sum(sum(map(int, stat[11:15])) for _, stat in _tree(root)) / _TICKS


def pss_octets(root: int) -> int:
    """The proportional set size of a tree: a page that n processes share counts 1/n for each."""
    total = 0
    for pid, _ in _tree(root):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024


def kernel_octets() -> int:
    """What the kernel holds for all processes and sockets: page tables, stacks, slabs."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    wanted = ("PageTables:", "KernelStack:", "SUnreclaim:", "Percpu:")
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(wanted))
