"""The process that looks names up: only if there are names; started again, never waited for."""

import signal
import subprocess

from titus_py.audit.finding import Verdict
from titus_py.audit.instance import Process, Role, instance_processes
from titus_py.audit.run import audit
from titus_py.audit.target import find_target

from .conftest import Serve
from .instance import TITUS_PY, Instance, eventually
from .peers import Listener, TlsClient
from .service import talk


def resolvers(instance: Instance) -> list[Process]:
    return [one for one in instance_processes(instance.pid) if one.role is Role.RESOLVER]


def is_served(instance: Instance) -> None:
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())


def test_without_a_name_there_is_none(serve: Serve, echoing: Listener) -> None:
    assert resolvers(serve(echoing.address)) == []


def test_it_has_a_uid_of_its_own_and_is_started_again(serve: Serve, echoing: Listener) -> None:
    instance = serve(f"localhost:{echoing.port}")
    [first] = resolvers(instance)
    assert first.uid in instance.uids
    assert [one.pid for one in instance.processes() if one.uid == first.uid] == [first.pid]
    instance.expected_alarms = {"resolver_died"}
    subprocess.run(["kill", "-KILL", str(first.pid)], check=True)
    died = instance.wait_for_event("resolver_died", pid=first.pid)
    assert died["how"] == "killed by SIGKILL"
    is_served(instance)
    [second] = eventually(lambda: resolvers(instance), "another resolver")
    assert second.pid != first.pid
    is_served(instance)


def test_one_that_hangs_delays_nothing_but_new_names(serve: Serve, echoing: Listener) -> None:
    instance = serve(f"localhost:{echoing.port}")
    [resolver] = resolvers(instance)
    instance.expected_alarms = {"resolver_died"}
    subprocess.run(["kill", "-STOP", str(resolver.pid)], check=True)
    is_served(instance)
    instance.signal(signal.SIGHUP)
    # The name's address is known.
    instance.wait_for_event("reloaded")
    is_served(instance)
    subprocess.run(["kill", "-KILL", str(resolver.pid)], check=True)
    instance.wait_for_event("resolver_died")


def test_another_program_starts_its_own(serve: Serve, echoing: Listener) -> None:
    instance = serve(f"localhost:{echoing.port}")
    [first] = resolvers(instance)
    subprocess.run([TITUS_PY, "reload", "--program", f"--pid={instance.pid}"], check=True)
    # The first one may take a moment to end.
    eventually(
        lambda: [one.pid == first.pid for one in resolvers(instance)] == [False], "another resolver"
    )
    is_served(instance)


def test_it_ends_with_the_last_name(serve: Serve, echoing: Listener) -> None:
    instance = serve(f"localhost:{echoing.port}")
    assert resolvers(instance)
    file = instance.directory / "titus.toml"
    file.write_text(file.read_text().replace("localhost:", "127.0.0.1:"))
    instance.signal(signal.SIGHUP)
    instance.wait_for_event("reloaded")
    eventually(lambda: not resolvers(instance), "no resolver")
    is_served(instance)


def test_an_audit_finds_it_as_it_should_be(serve: Serve, echoing: Listener) -> None:
    instance = serve(f"localhost:{echoing.port}")
    made = audit(find_target(instance.pid))
    assert made.having(Verdict.BROKEN) == []
    checks = {one.check for one in made.findings if one.subject.role == Role.RESOLVER}
    assert checks >= {"uid", "groups", "capabilities", "no_new_privs", "hidden", "filter", "limits"}
    assert checks >= {"descriptors", "mappings", "environment"}
