"""What code in the resolver could do that is not ours: each is attempted, after a control.

In its confinement alone; and in the running one, by whoever has taken over the thread that hears
name servers.
"""

import errno
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from integration.instance import Instance
from integration.peers import Listener, echo, receive_all, served_by

from keyd.linux import landlock, seccomp
from titus_py.audit.instance import Role, instance_processes
from titus_py.resolver.system_calls import RESOLVING

from .harness import infected, make_certificate, over_tls
from .infected_resolver import NAME

UID = 2_000_000_007
PROGRAM = Path(__file__).with_name("infected_resolver.py")
#: Of the control and of the attempt: each errno, 0 if it succeeded; an address, and the uid.
Found = tuple[dict[str, int], dict[str, int], str, int]
#: Those for which even the supervisor may have no capability: nor has a child of its.
BEYOND_THE_SUPERVISOR = {
    "read another process's memory",
    "trace its supervisor",
    "use a raw socket",
    "use a packet socket",
}


@pytest.fixture(scope="module")
def things() -> Iterator[dict[str, str]]:
    """A file that everybody may change, where everybody may make others, and root's socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o777)
        file = Path(directory, "everybodys")
        file.write_text("x")
        file.chmod(0o666)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{directory}/roots")
            Path(directory, "roots").chmod(0o600)
            listener.listen()
            yield {"file": str(file), "socket": f"{directory}/roots"}


@pytest.fixture(scope="module")
def found(things: dict[str, str]) -> Found:
    settings = {"uid": UID, "filter": seccomp.build(RESOLVING, errno.ENOSYS).hex(), **things}
    ran = subprocess.run(
        [sys.executable, "-I", PROGRAM, json.dumps(settings), "alone"],
        capture_output=True,
        check=False,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr.decode()
    return tuple(json.loads(ran.stdout))


def successes(outcomes: dict[str, int]) -> set[str]:
    return {name for name, error in outcomes.items() if not error}


def assert_nothing_is_possible(outcomes: dict[str, int]) -> None:
    possible = successes(outcomes)
    if not landlock.version():
        # Then the filter and its uid are all that there is.
        possible -= {"read what is everybody's", "read of other processes"}
    assert possible == set()


def test_as_root_all_of_it_can_be_done(found: Found) -> None:
    control = found[0]
    assert successes(control) == {*control}


def test_the_resolver_can_do_none_of_it(found: Found) -> None:
    assert_nothing_is_possible(found[1])


def test_and_it_can_look_names_up(found: Found) -> None:
    assert list(found[2:]) == ["127.0.0.1", UID]


@contextmanager
def taken_over(
    directory: Path, things: dict[str, str], confined: bool
) -> Iterator[tuple[Instance, int, dict[str, int]]]:
    """An instance whose resolver was taken over as it looked a name up; its uid, what it could."""
    certificate = make_certificate(directory)
    with Listener.tcp() as backend, served_by(backend, echo), Listener.tcp() as told:
        settings: dict[str, Any] = {"port": told.port, "confined": confined, **things}
        without = [f"resolver {json.dumps(settings)}"]
        with (
            infected(directory, certificate, f"{NAME}:{backend.port}", without) as instance,
            told.accept() as resolver,
        ):
            uid, outcomes = json.loads(receive_all(resolver))
            yield instance, uid, outcomes


def test_the_running_one_can_do_none_of_it(things: dict[str, str], tmp_path: Path) -> None:
    with taken_over(tmp_path, things, confined=True) as (instance, uid, outcomes):
        assert uid in instance.uids
        assert_nothing_is_possible(outcomes)
        # It is the instance's, and goes on.
        roles = [(one.role, one.uid) for one in instance_processes(instance.pid)]
        assert (Role.RESOLVER, uid) in roles
        assert over_tls(instance, "localhost", b"served") == b"served"


def test_the_running_one_could_without_its_confinement(
    things: dict[str, str], tmp_path: Path
) -> None:
    """The control."""
    with taken_over(tmp_path, things, confined=False) as (_, uid, outcomes):
        assert uid == 0
        assert {*outcomes} - BEYOND_THE_SUPERVISOR <= successes(outcomes)
