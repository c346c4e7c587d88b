"""Code that runs in keyd and speaks for it: it ends keyd, and neither the supervisor nor the proxy.

Its sockets are taken from it (pidfd_getfd(2)), and messages are sent on them.
"""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from .conftest import Serve
from .instance import Event, Instance, Process, all_processes, eventually
from .peers import Listener, TlsClient, lingering

_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


def peers_of(process: Process) -> dict[int, set[int]]:
    """For each of its unix sockets, by descriptor, the processes that have the other end."""
    listed = subprocess.run(["ss", "-xpH"], capture_output=True, text=True, check=True).stdout
    by_inode: dict[str, list[tuple[int, int]]] = {}
    ends: dict[str, str] = {}
    for line in listed.splitlines():
        if found := re.search(r" \* (\d+) +\* (\d+)", line):
            ends[found[1]] = found[2]
            by_inode[found[1]] = [
                (int(pid), int(fd)) for pid, fd in re.findall(r"pid=(\d+),fd=(\d+)", line)
            ]
    return {
        fd: {pid for pid, _ in by_inode.get(ends[inode], [])}
        for inode, holders in by_inode.items()
        for holder, fd in holders
        if holder == process.pid
    }


@contextmanager
def mouth(process: Process, listener: Process) -> Iterator[socket.socket]:
    """A process's own socket to another one."""

    def between() -> list[int]:
        return [fd for fd, pids in peers_of(process).items() if listener.pid in pids]

    # While one is handed on, both may have another for a moment.
    (number,) = eventually(lambda: len(found := between()) == 1 and found, "one socket")
    pidfd = os.pidfd_open(process.pid)
    try:
        taken = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
        assert taken >= 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(pidfd)
    with socket.socket(fileno=taken) as ours:
        yield ours


def replaced(instance: Instance, since: int, keyd: Process) -> Event:
    died = instance.wait_for_event("keyd_died", since=since)
    assert (died["pid"], died["how"]) == (keyd.pid, "killed by SIGKILL")
    return instance.wait_for_event("keyd_started", since=since)


FORGED = [
    {"event": "x", "name": 1},
    {"event": "keyd_refused", "connection": 1, "of_generation": 2},
    {"event": "fork_server_died", "level": "alarm", "how": "forged"},
]


def test_keyd_can_neither_end_the_supervisor_nor_speak_for_others(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(backend=echoing.address)
    instance.expected_alarms |= {"unintelligible", "keyd_died"}
    with TlsClient(instance.port) as client:
        client.handshake()
        # Two: a third within ten seconds is as a third crash, and the supervisor gives up.
        for forged in (FORGED[0], FORGED[2]):
            since = len(instance.events())
            keyd = instance.keyd()
            supervisor = instance.supervisor()
            with mouth(keyd, supervisor) as ours:
                # Held, so that all is sent before keyd is ended.
                supervisor.kill(signal.SIGSTOP)
                for said in (forged, *FORGED):
                    ours.send(json.dumps(said).encode())
                supervisor.kill(signal.SIGCONT)
            alarm = instance.wait_for_event("unintelligible", since=since)
            assert (alarm["process"], alarm["pid"]) == ("keyd", keyd.pid)
            replaced(instance, since, keyd)
            names = [event["event"] for event in instance.events()[since:]]
            assert names.count("unintelligible") == 1
            assert "x" not in names
        client.send(b"still there")
        assert client.receive_exactly(11) == b"still there"
    with TlsClient(instance.port) as client:
        client.handshake()
    assert not instance.events_named("fork_server_died")


def test_the_parent_cannot_have_the_supervisor_wait_in_closing_a_socket(
    serve: Serve, echoing: Listener
) -> None:
    """The control is among the tests of ``supervisor.children``."""
    instance = serve(backend=echoing.address)
    instance.expected_alarms |= {"unintelligible", "parent_died"}
    alive = json.dumps({"event": "alive", "spares": 1}).encode()
    since = len(instance.events())
    supervisor = instance.supervisor()
    with mouth(instance.parent(), supervisor) as ours:
        side, peer = lingering()
        with peer:
            # Held, so that it is the last to close it.
            supervisor.kill(signal.SIGSTOP)
            with side:
                for _ in range(3):
                    socket.send_fds(ours, [alive], [side.fileno()] * 100)
            supervisor.kill(signal.SIGCONT)
            instance.wait_for_event("parent_started", since=since)
            with TlsClient(instance.port) as client:
                client.handshake()
    alarms = [event["process"] for event in instance.events_named("unintelligible")]
    assert alarms == ["parent"]


@pytest.mark.parametrize("said", [b"nonsense", b"X" * 2000])
def test_keyd_that_the_parent_does_not_understand_is_replaced(
    serve: Serve, echoing: Listener, said: bytes
) -> None:
    instance = serve(backend=echoing.address)
    instance.expected_alarms.add("keyd_died")
    since = len(instance.events())
    keyd = instance.keyd()
    with mouth(keyd, instance.parent()) as parent:
        # It hangs up, and may leave some of it unread.
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(20):
                parent.send(said)
    # Perhaps it has ended by itself, since the parent has hung up, before it could be killed.
    instance.wait_for_event("keyd_started", since=since)
    assert keyd not in all_processes()
    assert len(instance.events_named("keyd_incomprehensible")) == 1
    with TlsClient(instance.port) as client:
        client.handshake()


@pytest.mark.parametrize("answer", [b"nonsense", b"P" + bytes(8) + b"\1\0\0\0"])
def test_a_fork_server_that_answers_nonsense_is_replaced(
    serve: Serve, echoing: Listener, answer: bytes
) -> None:
    """Or, as the second one, what nobody has ordered."""
    instance = serve(backend=echoing.address)
    instance.expected_alarms.add("fork_server_died")
    with TlsClient(instance.port) as client:
        client.handshake()
        instance.settled_counts()
        since = len(instance.events())
        with mouth(instance.fork_server(), instance.parent()) as parent:
            parent.send(answer)
        died = instance.wait_for_event("fork_server_died", since=since)
        assert died["how"] == "killed by SIGKILL"
        instance.wait_for_event("parent_started", since=since)
        client.send(b"still there")
        assert client.receive_exactly(11) == b"still there"
    with TlsClient(instance.port) as client:
        client.handshake()


def test_keyd_has_no_way_to_the_log_but_its_own_event(serve: Serve, echoing: Listener) -> None:
    instance = serve(backend=echoing.address)
    instance.expected_alarms.add("keyd_died")
    keyd = instance.keyd()
    log = os.stat(instance.directory / "log")
    for entry in os.scandir(f"/proc/{keyd.pid}/fd"):
        held = entry.stat()
        assert (held.st_dev, held.st_ino) != (log.st_dev, log.st_ino)
    assert os.readlink(f"/proc/{keyd.pid}/fd/2") == "/dev/null"
    # What keyd itself has to say: its parent is not understood.
    since = len(instance.events())
    with mouth(instance.parent(), keyd) as parent:
        parent.send(b"nonsense")
    said = instance.wait_for_event("keyd_said", since=since)
    assert said["text"].startswith("closing the connection to a parent: ")
    instance.wait_for_event("keyd_started", since=since)

    keyd = instance.keyd()
    forged = json.dumps({"level": "alarm", "event": "worker_failed", "uid": 1})
    since = len(instance.events())
    with mouth(keyd, instance.supervisor()) as supervisor:
        for _ in range(200):
            said = {"event": "keyd_said", "text": f"\n{forged}\n"}
            supervisor.send(json.dumps(said).encode())
    event = instance.wait_for_event("keyd_said", since=since)
    assert (event["level"], event["text"]) == ("error", f"\n{forged}\n")
    with TlsClient(instance.port) as client:
        client.handshake()
    assert not instance.events_named("worker_failed")
    texts = [event["text"] for event in instance.events_named("keyd_said")]
    # Ten a second, and a busy machine may take some seconds.
    assert len(texts) < 200
