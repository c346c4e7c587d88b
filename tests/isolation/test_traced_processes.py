"""A process that is traced, and whose tracer is stopped, holds nobody else up."""

import re
from pathlib import Path

from integration.certificates import Certificate
from integration.instance import PATIENCE, Instance, Process, eventually, zombies
from integration.peers import TIMEOUT, Listener, TlsClient
from integration.service import talk
from integration.tracing import traced

from titus_py.supervisor.control_client import ask

from .harness import infected, one_more_connection


def test_a_workers_end_is_waited_for_by_nobody_else(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    with (
        infected(tmp_path, certificate, backend.address) as instance,
        TlsClient(instance.port) as client,
        TlsClient(instance.port) as other,
    ):
        other.socket.settimeout(TIMEOUT)
        for one in (client, other):
            assert talk(one.handshake())
        parent = instance.parent()
        name = "{}:{}".format(*client.socket.getsockname())
        begun = instance.wait_for_event("connection_begun", client=name)
        worker = instance.worker_of(begun["uid"])
        with traced(worker.pid) as tracer:
            worker.kill()
            # The parent has heard of its end, and nobody has reaped it.
            eventually(lambda: _is_zombie(worker), "a zombie")
            for _ in range(10):
                one_more_connection(instance)
            told = instance.wait_for_event("worker_stays", uid=worker.uid)
            (number,) = re.findall("/proc/([0-9]+)/status", told["why"])
            assert (int(number), told["connection"]) == (worker.pid, begun["connection"])
            status = Path(f"/proc/{number}/status").read_text()
            assert f"TracerPid:\t{tracer}\n" in status
            assert _that_stay(instance) == 1
            assert not instance.events_named("connection_ended", client=name)
        ended = instance.wait_for_event("connection_ended", client=name)
        assert ended["end"] == "killed by SIGKILL"
        eventually(lambda: not _that_stay(instance), "no worker that stays")
        assert len(instance.events_named("worker_stays")) == 1
        assert talk(other)
        assert instance.parent() == parent


def test_another_keyd_is_started(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    with (
        infected(tmp_path, certificate, backend.address) as instance,
        TlsClient(instance.port) as other,
    ):
        instance.expected_alarms.add("keyd_died")
        other.socket.settimeout(TIMEOUT)
        assert talk(other.handshake())
        keyd = instance.keyd()
        with traced(keyd.pid):
            keyd.kill()
            died = instance.wait_for_event("keyd_died", pid=keyd.pid)
            assert died["how"] == "ended for its tracer only"
            instance.wait_for_events(2, "keyd_started")
            one_more_connection(instance)
            assert _is_zombie(keyd)
        assert talk(other)
        # Whoever starts something next reaps it.
        instance.keyd().kill()
        eventually(lambda: not zombies(instance.pid), "no zombies")
        one_more_connection(instance)


def test_another_program_reaps_it(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    with infected(tmp_path, certificate, backend.address) as instance:
        instance.expected_alarms.add("keyd_died")
        keyd = instance.keyd()
        with traced(keyd.pid):
            keyd.kill()
            instance.wait_for_event("keyd_died", pid=keyd.pid)
            instance.wait_for_events(2, "keyd_started")
            assert ask(instance.pid, {"do": "reload program"}, PATIENCE)["reloaded"]
            assert instance.wait_for_event("program_changed")
            assert _is_zombie(keyd)
        instance.keyd().kill()
        eventually(lambda: not zombies(instance.pid), "no zombies")
        one_more_connection(instance)


def test_another_fork_server_is_started(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    with (
        infected(tmp_path, certificate, backend.address) as instance,
        TlsClient(instance.port) as other,
    ):
        instance.expected_alarms.add("fork_server_died")
        other.socket.settimeout(TIMEOUT)
        assert talk(other.handshake())
        fork_server = instance.fork_server()
        with traced(fork_server.pid):
            fork_server.kill()
            died = instance.wait_for_event("fork_server_died")
            assert died["how"] == "ended for its tracer only"
            instance.wait_for_event("reloaded", generation=2)
            one_more_connection(instance)
            assert _is_zombie(fork_server)
        assert talk(other)


def _that_stay(instance: Instance) -> int:
    (serving,) = ask(instance.pid, {"do": "status"}, PATIENCE)["generations"]
    count: int = serving["workers_that_stay"]
    return count


def _is_zombie(process: Process) -> bool:
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    return stat[stat.rindex(")") + 2] == "Z"
