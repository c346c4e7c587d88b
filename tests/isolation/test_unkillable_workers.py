"""A worker that SIGKILL does not end is told of, and does not take a spare's place for good."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from integration.certificates import Certificate
from integration.instance import PATIENCE, Process, all_processes, eventually
from integration.peers import Listener, TlsClient
from integration.service import talk

from .harness import infected, one_more_connection


@contextmanager
def kept_from_ending(worker: Process) -> Iterator[None]:
    """Its kernel waits, when it ends, for a process in its pid namespace that nobody reaps.

    A pid namespace's first process ends last (pid_namespaces(7)). Nothing can shorten that.
    """
    namespace = f"--pid=/proc/{worker.pid}/ns/pid"
    entering = subprocess.Popen(["nsenter", namespace, "sleep", "600"])
    try:

        def entered() -> list[Process]:
            return [one for one in all_processes() if one.parent == entering.pid]

        eventually(entered, "a process in the namespace")
        entering.send_signal(signal.SIGSTOP)
        yield
    finally:
        entering.send_signal(signal.SIGCONT)
        entering.wait(PATIENCE)


def test_it_is_told_and_another_one_serves(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    with infected(
        tmp_path,
        certificate,
        backend.address,
        ["ready"],
        worker={"spare": 1, "handshake_timeout": "60s"},
    ) as instance:
        # It has been forked as root.
        (hangs,) = eventually(
            lambda: [worker for worker in instance.workers() if worker.uid], "a worker that hangs"
        )
        with kept_from_ending(hangs):
            one_more_connection(instance)
            event = instance.wait_for_event("worker_stays", uid=hangs.uid)
            assert (event["level"], event["why"]) == ("error", "hung before it had a client")
            assert hangs in instance.workers()
            assert not instance.events_named("worker_failed")
        instance.wait_for_event("worker_failed", uid=hangs.uid)
        one_more_connection(instance)
        assert len(instance.events_named("worker_stays")) == 1


def test_another_connection_gives_way(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    """When the proxy is full, a newcomer does not wait for one that does not end."""
    settings = {"max": 2, "handshake_timeout": "2s"}
    with (
        infected(tmp_path, certificate, backend.address, worker=settings) as instance,
        ExitStack() as stack,
        TlsClient(instance.port) as first,
    ):
        assert talk(first.handshake())
        second = stack.enter_context(TlsClient(instance.port))
        assert talk(second.handshake())
        # The one that has stood still for longest is first to give way.
        begun = instance.wait_for_event("connection_begun", client=first.name)
        stays = instance.worker_of(begun["uid"])
        with kept_from_ending(stays):
            assert talk(second)
            instance.wait_for_event("full")
            with TlsClient(instance.port) as newcomer:
                newcomer.socket.settimeout(60)
                assert talk(newcomer.handshake())
            told = instance.wait_for_event("worker_stays", uid=stays.uid)
            assert told["why"] == "gave_way"
            ended = instance.events_named("connection_ended", end="gave_way")
            assert [event["uid"] for event in ended] != [stays.uid]
        instance.wait_for_event("connection_ended", connection=told["connection"])
