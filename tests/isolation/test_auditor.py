"""The audit's own processes: the one that talks to the suspect has no key and no privileges.

What takes a process of the instance over may wait for the auditor, who is root.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.instance import TITUS_PY, Process, descendants, eventually

from titus_py.audit import descriptors, probe
from titus_py.audit.finding import Verdict
from titus_py.audit.instance import Role, instance_processes, namespaces, status
from titus_py.audit.observation import Scene
from titus_py.audit.probe import Probe, Unanswered
from titus_py.audit.target import Target, find_target
from titus_py.audit.throwaway import TitusInstance

from . import infected_client
from .held_file import held
from .test_audit import Patient


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TitusInstance]:
    directory = tmp_path_factory.mktemp("instance")
    found = Patient(directory, "127.0.0.1:1", "P-256", ["localhost"])
    found.wait_until_listening()
    yield found
    found.stop()


def outcome(instance: TitusInstance, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What came of this attempt, within the process that the audit starts for its handshake."""
    driver = (sys.executable, "-I", infected_client.__file__, *arguments)
    monkeypatch.setattr(probe, "_CLIENT", driver)
    with Probe(find_target(instance.pid)) as made:
        with pytest.raises(Unanswered) as answer:
            made.shake_hands()
        if "has ended" in str(answer.value):
            return signal.Signals(-made._client._process.wait(60)).name
    return str(answer.value).rpartition(": ")[2]


@pytest.mark.parametrize(
    ("attempt", "without_filter"),
    [
        ("read_a_file", "ENOENT"),
        ("connect", "ENETUNREACH"),
        ("signal_the_audit", "EPERM"),
        ("fork", "EAGAIN"),
        ("become_root", "EPERM"),
        ("read_the_audits_memory", "ENOENT"),
    ],
)
def test_who_takes_over_the_audits_client_can_do_nothing_with_it(
    instance: TitusInstance,
    monkeypatch: pytest.MonkeyPatch,
    attempt: str,
    without_filter: str,
) -> None:
    assert outcome(instance, monkeypatch, attempt, "all") == "SIGSYS"
    assert outcome(instance, monkeypatch, attempt, "no filter") == without_filter
    # The control.
    assert outcome(instance, monkeypatch, attempt, "none") == "done"


def test_nobody_is_connected_before_the_audits_client_can_speak(
    instance: TitusInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine its start takes longer than a client may be silent."""
    begun = []

    class Client(probe._Client):
        def __init__(self, target: Target, peer: socket.socket) -> None:
            super().__init__(target, peer)
            self._peer = peer

        def wait_until_confined(self) -> None:
            super().wait_until_confined()
            with pytest.raises(OSError, match="not connected"):
                self._peer.getpeername()
            begun.append(self)

    monkeypatch.setattr(probe, "_Client", Client)
    with Probe(find_target(instance.pid)) as made:
        assert made.find_worker().verdict is Verdict.HOLDS
        assert made.shake_hands().verdict is Verdict.HOLDS
    assert begun


def test_a_socket_that_was_closed_meanwhile_is_not_held_against_a_process(
    instance: TitusInstance,
) -> None:
    """Of what a parent holds under load, some is gone when the kernel's tables are read."""
    scene = Scene(find_target(instance.pid))
    parent = scene.newest(Role.PARENT)
    assert parent is not None
    (check,) = (
        one for one in descriptors.CHECKS if one.name == "descriptors" if Role.PARENT in one.roles
    )
    ours = parent.process._replace(pid=os.getpid())
    # Before it is connected, it is in no table.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as unknown:
        what = f"socket:[{os.fstat(unknown.fileno()).st_ino}]"
        seen = parent._replace(process=ours, descriptors={**parent.descriptors, 999: what})
        found = check.find(seen, scene)
        assert (found.verdict, found.seen) == (
            Verdict.BROKEN,
            f"more than it may hold: 999: {what}",
        )
    assert check.find(seen, scene).verdict is Verdict.HOLDS


def words(process: Process) -> bytes:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # It has ended meanwhile.
        return b""


def test_only_the_process_that_searches_reads_the_keys_and_it_has_no_network(
    instance: TitusInstance,
) -> None:
    parent = next(one for one in instance_processes(instance.pid) if one.role is Role.PARENT)

    def child(module: bytes) -> Process | None:
        found = descendants(audit.pid)[1:]
        return next((process for process in found if module in words(process)), None)

    command = [TITUS_PY, "audit", "--pid", str(instance.pid), "--quiet"]
    os.kill(parent.pid, signal.SIGSTOP)
    with subprocess.Popen(command) as audit:
        try:
            # Until the parent goes on, the audit looks for the worker of its connection.
            eventually(lambda: child(b"titus_py.audit.client"), "the audit's client")
            with held(instance.key_file) as file:
                os.kill(parent.pid, signal.SIGCONT)
                opener = eventually(file.opener, "the key is opened")
                holder = child(b"titus_py.audit.key_holder")
                assert holder is not None
                assert holder.pid == opener
                assert int(status(holder.pid)["VmLck"].split()[0]) > 0
                assert namespaces("self")["net"] != namespaces(holder.pid)["net"]
                assert holder.sockets == []
            assert audit.wait(240) == 0
        finally:
            os.kill(parent.pid, signal.SIGCONT)
            audit.kill()
