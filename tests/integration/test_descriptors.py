"""Short of descriptors: clients wait, nothing spins, nobody dies of it, and it passes by itself."""

import itertools
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from keyd.protocol import Reply, Status
from titus_py.parent.descriptors import descriptors_needed

from .conftest import Certificates, Serve
from .instance import PATIENCE, TITUS_PY, Process, all_processes, eventually
from .peers import Listener, TlsClient, connect
from .service import serves, talk

KEYD = TITUS_PY.with_name("keyd")
#: How long it is watched.
SECONDS = 3.0


@contextmanager
def allowed(process: Process, descriptors: int) -> Iterator[None]:
    """Meanwhile, it gets no new one with this number, or a higher one."""
    process.limit_descriptors(descriptors)
    try:
        yield
    finally:
        process.limit_descriptors()


def processor_seconds(process: Process) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_parent_neither_spins_nor_floods_the_log_and_serves_again(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    # Its spares are there: it could not take one that comes later.
    instance.settled_counts()
    parent = instance.parent()
    with TlsClient(instance.port) as established, ExitStack() as others:
        assert talk(established.handshake())
        with allowed(parent, parent.descriptors + 8):
            begun = time.monotonic()
            for _ in range(40):
                others.enter_context(connect(instance.port))
            event = instance.wait_for_event("accept_failed")
            assert (event["level"], event["reason"]) == ("error", "Too many open files")
            used = processor_seconds(parent)
            time.sleep(SECONDS)
            said = len(instance.wait_for_events(2, "accept_failed"))
            assert said <= time.monotonic() - begun + 2
            assert processor_seconds(parent) - used < SECONDS / 2
            assert talk(established)
        others.close()
        assert serves(instance)
        assert talk(established)
    assert instance.parent() == parent


def test_a_parent_that_cannot_take_keyds_socket_is_given_another(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    instance.expected_alarms.add("keyd_died")
    instance.settled_counts()
    parent = instance.parent()
    with TlsClient(instance.port) as established:
        assert talk(established.handshake())
        with allowed(parent, 3):
            instance.keyd().kill()
            # One that was hung up on has been replaced.
            instance.wait_for_events(3, "keyd_started")
            assert talk(established)
        assert serves(instance)
        assert talk(established)
    assert instance.parent() == parent


def few_descriptors(directory: Path, count: int) -> Path:
    """``titus-py`` as it is with this hard limit."""
    script = directory / "titus-py"
    script.write_text(f'#!/bin/sh\nulimit -n {count}\nexec "{TITUS_PY}" "$@"\n')
    script.chmod(0o755)
    return script


def test_as_many_connections_as_the_limit_allows_are_served_and_others_wait(
    serve: Serve, echoing: Listener, tmp_path: Path
) -> None:
    limit = descriptors_needed(10, 4)
    instance = serve(
        echoing.address,
        program=few_descriptors(tmp_path, limit),
        worker={"max": 50, "spare": 4},
    )
    warning = instance.wait_for_event("configuration", level="warning")["problem"]
    assert f"here {limit} are allowed: beyond 10 connections" in warning
    with ExitStack() as stack:
        clients = []
        for _ in range(60):
            clients.append(stack.enter_context(TlsClient(instance.port)))
            # Who says nothing while others wait would have to go.
            clients[-1].socket.sendall(clients[-1].first_flight())
        for client in clients[:10]:
            assert talk(client.handshake())
        assert instance.wait_for_event("full")["max"] == 10
        for leaving, next_one in itertools.pairwise(clients[9:40]):
            leaving.socket.close()
            assert talk(next_one.handshake())
    assert serves(instance)
    assert not instance.events_named("accept_failed")
    assert not instance.events_named("fork_failed")


def limited_to(descriptors: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))


def test_a_limit_that_is_too_low_is_said_by_check(
    serve: Serve, certificates: Certificates, echoing: Listener
) -> None:
    """And at a start and a reload: see above."""
    instance = serve(echoing.address, worker={"max": 400, "spare": 4})
    assert not instance.events_named("configuration")
    needed = descriptors_needed(400, 4)
    for limit in (needed, needed - 1):
        said = subprocess.run(
            [TITUS_PY, "check", "--config", instance.directory / "titus.toml"],
            preexec_fn=partial(limited_to, limit),
            capture_output=True,
            text=True,
            check=True,
        )
        told = f"warning: {instance.directory}/titus.toml" in said.stderr
        assert told == (limit < needed)
        assert (f"400 connections may take {needed} descriptors" in said.stderr) == told


def test_a_keyd_on_its_own_goes_on(certificates: Certificates, tmp_path: Path) -> None:
    path, log = tmp_path / "keyd.sock", tmp_path / "log"
    command = [KEYD, "listen", f"--key={certificates().key}", f"--socket={path}", "--user=nobody"]
    with (
        log.open("wb") as standard_error,
        subprocess.Popen(
            [*command, f"--chroot={tmp_path / 'root'}"],
            stderr=standard_error,
            preexec_fn=partial(limited_to, 64),
        ) as keyd,
    ):
        try:
            eventually(lambda: answers(path), "keyd listens")
            # It keeps half of what it had at its start for clients that ask: the machine has less.
            next(one for one in all_processes() if one.pid == keyd.pid).limit_descriptors(24)
            begun = time.monotonic()
            with ExitStack() as clients:
                for _ in range(100):
                    client = clients.enter_context(
                        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    )
                    client.connect(str(path))
                eventually(lambda: "no room" in log.read_text(), "it says so")
                time.sleep(SECONDS)

                def lines() -> int:
                    return log.read_text().count("no room for another connection")

                eventually(lambda: lines() >= 2, "and again")
                assert lines() <= time.monotonic() - begun + 2
            eventually(lambda: answers(path), "keyd answers again")
        finally:
            keyd.terminate()
    assert keyd.returncode == 0


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(PATIENCE)
        if client.connect_ex(str(path)):
            return False
        client.send(b"nonsense")
        return Reply.decode(client.recv(4096)).status is Status.MALFORMED


def test_what_ends_keyd_is_said_in_a_line(tmp_path: Path) -> None:
    """A traceback would open its source, and the filter end it before that is said."""
    script = tmp_path / "failing.py"
    script.write_text(
        "from keyd.daemon import Keyd\n"
        "from keyd.linux import seccomp\n"
        "from keyd.system_calls import SERVING\n"
        "from prctl import set_no_new_privs\n"
        "set_no_new_privs(1)\n"
        "keyd = Keyd({}, tick=lambda: 1 // 0)\n"
        "keyd.serve(2, seccomp.build(SERVING), lambda: None)\n"
    )
    ended = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=240
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("keyd: ZeroDivisionError: ")
    assert ended.stderr.endswith(f" at {script}:6\n")
