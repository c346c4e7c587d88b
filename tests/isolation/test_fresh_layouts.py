"""Workers are made to crash, as by an attacker who guesses at the layout of their memory."""

import re
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from integration.instance import Instance, eventually
from integration.peers import Listener, TlsClient, Truncated, echo, served_by
from integration.service import reload
from OpenSSL import SSL

from .harness import infected, make_certificate, one_more_connection, take_over

AT_RANDOM = 25


def layout(instance: Instance) -> tuple[str, bytes]:
    """Where the fork server, and so each of its workers, has its stack; and its canary."""
    process = Path("/proc", str(instance.fork_server().pid))
    stack = re.search(r"^([0-9a-f]+)-.*\[stack\]$", (process / "maps").read_text(), re.MULTILINE)
    assert stack
    auxiliary = (process / "auxv").read_bytes()
    pairs = dict(struct.iter_unpack("QQ", auxiliary))
    with (process / "mem").open("rb") as memory:
        memory.seek(pairs[AT_RANDOM])
        return stack[1], memory.read(16)


class Clients:
    """Who come one after the other all the time."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._over = threading.Event()
        self.served = 0
        self.failures: list[Exception] = []

    def _come(self) -> None:
        while not self._over.is_set():
            try:
                one_more_connection(self._instance)
                self.served += 1
            except (AssertionError, OSError, SSL.Error) as error:
                self.failures.append(error)
                return
            time.sleep(0.05)

    @contextmanager
    def coming(self) -> Iterator[None]:
        thread = threading.Thread(target=self._come)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()


def test_after_three_crashes_there_is_another_layout_and_nobody_notices(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    with (
        Listener.tcp() as listener,
        served_by(listener, echo),
        infected(tmp_path, certificate, listener.address) as instance,
        TlsClient(instance.port) as established,
    ):
        established.handshake()
        clients = Clients(instance)
        before = layout(instance)
        with clients.coming():
            for _ in range(2):
                assert take_over(instance, "e", "crash").end["end"] == "killed by SIGSEGV"
            # As many as come anyhow, and in each of them the layout is the same.
            served = clients.served
            eventually(lambda: clients.served > served + 3, "clients")
            assert not instance.events_named("fork_server_replaced")
            assert layout(instance) == before
            assert take_over(instance, "h", "crash").end["end"] == "killed by SIGSEGV"
            event = instance.wait_for_event("fork_server_replaced")
            assert (event["level"], event["reason"]) == (
                "warning",
                "3 workers within a minute, the last one killed by SIGSEGV",
            )
            instance.wait_for_event("reloaded", generation=2)
            served = clients.served
            eventually(lambda: clients.served > served + 3, "clients")
            after = layout(instance)
            assert before[0] != after[0]
            assert before[1] != after[1]
            # Not again at once.
            for _ in range(3):
                take_over(instance, "e", "crash")
            one_more_connection(instance)
            assert len(instance.events_named("fork_server_replaced")) == 1
        assert not clients.failures
        established.send(b"still there")
        assert established.receive_exactly(11) == b"still there"


def test_idle_connections_do_not_keep_a_layout_for_ever(tmp_path: Path) -> None:
    """There is room for three generations, and each has a connection. The oldest one goes."""
    certificate = make_certificate(tmp_path)
    with (
        Listener.tcp() as listener,
        served_by(listener, echo),
        infected(
            tmp_path,
            certificate,
            listener.address,
            worker={"max": 1000, "spare": 8},
        ) as instance,
        ExitStack() as stack,
    ):
        first = stack.enter_context(TlsClient(instance.port)).handshake()
        assert reload(instance)["reloaded"]
        second = stack.enter_context(TlsClient(instance.port)).handshake()
        assert reload(instance)["reloaded"]
        third = stack.enter_context(TlsClient(instance.port)).handshake()
        before = layout(instance)
        for _ in range(3):
            take_over(instance, "e", "crash")
        event = instance.wait_for_event("generation_gives_way")
        assert (event["generation"], event["level"]) == (1, "warning")
        instance.wait_for_event("fork_server_replaced")
        assert layout(instance) != before
        with pytest.raises((ConnectionResetError, Truncated)):
            first.receive()
        for client in (second, third):
            client.send(b"still there")
            assert client.receive_exactly(11) == b"still there"
        assert not instance.events_named("reload_failed")
