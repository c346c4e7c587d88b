"""``titus-py audit``: that it passes where all holds, and for each check that it can fail.

Protections are taken out by a driver of the tests' own (``breakages``); for each, the audit
has to fail on exactly the check that looks at it, of exactly those processes.
"""

import contextlib
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.instance import eventually
from integration.peers import TlsClient

from keyd.linux.namespaces import enter_network_namespace
from titus_py.audit import throwaway
from titus_py.audit.finding import Finding, Verdict
from titus_py.audit.instance import Process, Role, instance_processes
from titus_py.audit.observation import Scene
from titus_py.audit.probe import Probe
from titus_py.audit.refusals import ask_keyd
from titus_py.audit.run import CHECKS, Audit, audit
from titus_py.audit.target import CannotAudit, find_target
from titus_py.audit.throwaway import SPARE, TitusInstance
from titus_py.supervisor.control_client import ask

from . import breakages
from .breakages import BREAKAGES, apart

TITUS_PY = Path(sys.executable).parent / "titus-py"
SIOCSIFFLAGS = 0x8914
#: A bound for what hangs: a loaded machine may need long for an audit.
PATIENCE = 300
#: As a throwaway instance's configuration has it.
HANDSHAKE_TIMEOUT = 'handshake_timeout = "60s"\n'


@contextlib.contextmanager
def accepting(listener: socket.socket) -> Iterator[None]:
    """A backend: it accepts, and waits for the other side to close."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=wait, args=[connection], daemon=True).start()

    def wait(connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionResetError):
            connection.recv(1)

    listener.listen()
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)


@pytest.fixture(scope="module")
def backend() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener, accepting(listener):
        yield f"127.0.0.1:{listener.getsockname()[1]}"


class Patient(TitusInstance):
    """On a busy machine, an audit takes longer with a handshake, and a worker to its backend.

    With the time for the handshake, a worker's channel to keyd ends, too: one that is kept for
    longer is not seen any more.
    """

    def _configuration(self, directory: Path, backend: str) -> str:
        text = super()._configuration(directory, backend)
        assert text.count(HANDSHAKE_TIMEOUT) == 1
        times = 'handshake_timeout = "300s"\nconnect_timeout = "60s"\n'
        return text.replace(HANDSHAKE_TIMEOUT, times)


class WithMetrics(Patient):
    def _configuration(self, directory: Path, backend: str) -> str:
        metrics = f'[metrics]\naddress = "unix:{directory}/metrics"\n'
        return super()._configuration(directory, backend) + metrics


@pytest.fixture(scope="module")
def instance(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TitusInstance]:
    """As it is by default, with every process: the backend has a name, and there are metrics."""
    name = backend.replace("127.0.0.1", "localhost")
    found = WithMetrics(tmp_path_factory.mktemp("instance"), name, "RSA-2048", ["localhost"])
    found.wait_until_listening()
    yield found
    found.stop()


def run_audit(*options: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [TITUS_PY, "audit", *options], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def broken(made: Audit) -> tuple[set[str], set[str]]:
    """The checks that fail, and the roles of those that they fail for."""
    findings = made.having(Verdict.BROKEN)
    return {one.check for one in findings}, {one.subject.role for one in findings}


# --- where all holds --------------------------------------------------------------


def test_all_holds_on_a_default_instance(instance: TitusInstance, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    answer = run_audit("--pid", str(instance.pid), "--html", page)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "All promises hold." in answer.stdout
    lines = answer.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    # Workers are alike, also in what the machine cannot do.
    workers = lines[next(n for n, line in enumerate(lines) if line.startswith("workers:")) :]
    assert sum("indirect-branch" in line for line in workers) == 1

    answer = run_audit("--pid", str(instance.pid), "--html", "/dev/full")
    assert (answer.returncode, answer.stderr) == (
        2,
        "titus-py audit: /dev/full: No space left on device\n",
    )

    html = page.read_text()
    assert "All promises hold" in html
    assert not re.search(r"(src|href)=|@import|url\(", html)


def test_json_names_every_check_of_every_process(instance: TitusInstance) -> None:
    answer = run_audit("--pid", str(instance.pid), "--json")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (made,) = json.loads(answer.stdout)
    assert (made["format"], made["result"]) == (1, "holds")
    assert made["instance"]["supervisor"] == instance.pid
    assert made["instance"]["listening"] == [instance.address]
    assert made["summary"]["broken"] == 0
    fields = {"check", "process", "promised", "how", "seen", "verdict"}
    assert all(finding.keys() == fields for finding in made["findings"])

    found = {(one["check"], one["process"]["role"]) for one in made["findings"]}
    expected = {(check.name, role) for check in CHECKS for role in check.roles}
    # It has no key elsewhere.
    elsewhere = {Role.MODULE, Role.CONNECTOR}
    assert {(name, role) for name, role in expected if role not in elsewhere} <= found
    stages = {one["process"]["stage"] for one in made["findings"]}
    assert {"spare", "before its handshake", "after its handshake"} <= stages


def test_it_says_what_the_interpreter_and_the_tls_library_were_built_with(
    instance: TitusInstance,
) -> None:
    made = audit(find_target(instance.pid))
    found = {one.check: one for one in made.findings if one.subject.role is Role.FORK_SERVER}
    interpreter = os.path.realpath(sys.executable)
    independent = re.search(r"Type: +(\w+)", readelf("-h", interpreter))
    assert independent
    assert found["interpreter"].seen.startswith(interpreter)
    assert (found["interpreter"].verdict is Verdict.HOLDS) == (independent[1] == "DYN")
    library = found["library"].seen.partition(" ")[0].removesuffix(":")
    assert library.startswith("/")
    symbols = readelf("--dyn-syms", "--wide", library)
    assert (found["library"].verdict is Verdict.HOLDS) == ("__stack_chk_fail" in symbols)


def readelf(*words: str) -> str:
    return subprocess.run(["readelf", *words], capture_output=True, text=True, check=True).stdout


def alarms(instance: TitusInstance) -> dict[str, int]:
    """As ``titus-py status`` has them, and the metrics."""
    counted: dict[str, int] = ask(instance.pid, {"do": "status"}, PATIENCE)["counts"]["alarms"]
    return counted


def await_alarm(instance: TitusInstance, connection: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any(
        (event["connection"], event["level"]) == (connection, "alarm")
        for event in instance.events("keyd_refused")
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_rings_no_alarm(instance: TitusInstance) -> None:
    before = alarms(instance)
    since = len(instance.events("audit_announced"))
    assert audit(find_target(instance.pid)).holds
    (announced,) = instance.events("audit_announced")[since:]
    statuses = {"exhausted", "not_tls", "not_granted", "malformed", "expired", "unwitnessed"}
    deadline = time.monotonic() + PATIENCE
    refusals: list[dict[str, Any]] = []
    # keyd tells the parent, and that the supervisor.
    while {event["status"] for event in refusals} != statuses:
        assert time.monotonic() < deadline, refusals
        refusals = [
            event
            for event in instance.events("audit_refused")
            if event["connection"] == announced["connection"]
        ]
    assert {event["level"] for event in (announced, *refusals)} == {"info"}
    assert alarms(instance) == before


def test_what_is_not_its_own_is_an_alarm_meanwhile(instance: TitusInstance) -> None:
    """Another audit's word for it, an attack's number, or one refusal too many."""

    def refusals(connection: int) -> None:
        with Probe(target) as probe:
            probe.find_worker()
            probe.shake_hands()
            found = list(ask_keyd(Scene(target), probe.certificate, connection))
        assert all(one.verdict is not Verdict.BROKEN for one in found)

    target = find_target(instance.pid)
    own = ask(instance.pid, {"do": "audit"}, PATIENCE)["connection"]
    before = alarms(instance).get("keyd_refused", 0)
    refusals(own)
    assert alarms(instance).get("keyd_refused", 0) == before
    for stranger in (0, own + 1, instance.events("connection_begun")[-1]["connection"]):
        refusals(stranger)
        await_alarm(instance, stranger)
    announced = {event["connection"] for event in instance.events("audit_announced")}
    assert {event["connection"] for event in instance.events("audit_refused")} <= announced
    # So many as an audit makes, with a few to spare, and the others are alarms.
    refusals(own)
    refusals(own)
    await_alarm(instance, own)


def test_connections_of_others_are_audited_as_well(instance: TitusInstance) -> None:
    with TlsClient(instance.port) as other:
        # Before the whole of it is there, there is no worker.
        other.socket.sendall(other.first_flight())
        made = audit(find_target(instance.pid))
    assert made.holds, broken(made)
    assert "in its handshake" in {one.subject.stage for one in made.findings}


def another(instance: TitusInstance, directory: Path, **changes: str) -> tuple[Path, int]:
    """A configuration like this instance's, for one beside it: its file, and its port."""
    port, uids = throwaway._free_port(), throwaway._free_uids(400)
    text = (instance.key_file.parent / "titus.toml").read_text()
    text = text.replace(str(instance.port), str(port))
    text = re.sub(r'uids = "\d+-\d+"', f'uids = "{uids[0]}-{uids[-2]}"', text)
    text = re.sub(r'user = "\d+"', f'user = "{uids[-1]}"', text)
    for name in ("empty", "metrics"):
        text = text.replace(str(instance.key_file.parent / name), str(directory / name))
    for name, line in changes.items():
        text, count = re.subn(rf"^{name} = .*$", line, text, flags=re.M)
        assert count == 1
    (directory / "titus.toml").write_text(text)
    return directory / "titus.toml", port


def test_all_holds_in_a_pid_namespace_of_its_own(instance: TitusInstance, tmp_path: Path) -> None:
    """The supervisor is one of the first processes of what looks like a container."""
    configuration, port = another(instance, tmp_path)
    script = f"""
        {TITUS_PY} serve --config {configuration} 2> {tmp_path}/log &
        until grep -q '"listening"' {tmp_path}/log; do kill -0 $! || exit 9; sleep 0.1; done
        {TITUS_PY} audit --json
    """
    answer = subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    # No other instance was in sight there.
    (made,) = json.loads(answer.stdout)
    assert made["instance"]["listening"] == [f"127.0.0.1:{port}"]
    assert made["instance"]["supervisor"] < 10


def test_all_holds_with_a_keyd_that_is_a_service_and_a_backend_on_a_unix_socket(
    instance: TitusInstance, tmp_path: Path
) -> None:
    configuration, _ = another(
        instance,
        tmp_path,
        user=f'socket = "{tmp_path}/keyd"',
        key="",
        backend=f'backend = "unix:{tmp_path}/backend"',
    )
    keyd = [TITUS_PY.with_name("keyd"), "control", "--socket", tmp_path / "keyd", "--user"]
    # Of all users, one that no other test and nothing in Debian runs as.
    keyd += ["games", "--chroot", tmp_path / "empty", "--key", instance.key_file]
    titus_py = [TITUS_PY, "serve", "--config", configuration]
    with socket.socket(socket.AF_UNIX) as listener, (tmp_path / "log").open("wb") as log:
        listener.bind(f"{tmp_path}/backend")
        with (
            accepting(listener),
            subprocess.Popen(keyd, stderr=subprocess.DEVNULL) as service,
            subprocess.Popen(titus_py, stderr=log) as supervisor,
        ):
            try:
                deadline = time.monotonic() + PATIENCE
                while b'"listening"' not in (tmp_path / "log").read_bytes():
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                made = audit(find_target(supervisor.pid))
            finally:
                supervisor.kill()
                service.kill()
    assert made.holds, made.having(Verdict.BROKEN)
    (signed,) = (one for one in made.findings if one.check == "signs")
    assert (signed.verdict, signed.subject.pid) == (Verdict.HOLDS, service.pid)


@contextlib.contextmanager
def beside(configuration: Path, *around: str) -> Iterator[int]:
    """Another instance, started within ``around``; its supervisor's pid."""
    log = configuration.with_name("log")
    with log.open("wb") as file:
        started = subprocess.Popen(
            [*around, TITUS_PY, "serve", "--config", configuration], stderr=file
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while b'"listening"' not in log.read_bytes():
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield started.pid
    finally:
        started.terminate()
        started.wait(PATIENCE)


def test_what_lives_elsewhere_is_passed_over_for_those_that_do_not(
    instance: TitusInstance, tmp_path: Path
) -> None:
    """Both in a pid namespace of their own, where no other test's instances are in sight."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
        another(instance, tmp_path / name)
    script = f"""
        cd {tmp_path}
        {TITUS_PY} serve --config here/titus.toml 2> here/log & here=$!
        unshare --net {TITUS_PY} serve --config elsewhere/titus.toml 2> elsewhere/log & elsewhere=$!
        for name in here elsewhere; do
            until grep -q '"listening"' $name/log; do
                kill -0 $here $elsewhere || exit 9
                sleep 0.1
            done
        done
        echo $here > here/pid; echo $elsewhere > elsewhere/pid
        {TITUS_PY} audit --pid $elsewhere --quiet > alone.out 2> alone.err; echo $? > alone.code
        {TITUS_PY} audit --json > all.out 2> all.err
        {TITUS_PY} audit --json --quiet 2> quiet.err
    """
    answer = subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
        stdout=subprocess.DEVNULL,
        timeout=PATIENCE,
        check=False,
    )
    assert answer.returncode == 0
    said = {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}
    here, elsewhere = (int((tmp_path / name / "pid").read_text()) for name in ("here", "elsewhere"))
    # Of that one alone there is nothing to say.
    assert (int(said["alone.code"]), said["alone.out"]) == (2, "")
    assert f"nsenter --target {elsewhere}" in said["alone.err"]
    assert [one["instance"]["supervisor"] for one in json.loads(said["all.out"])] == [here]
    assert f"passed over: process {elsewhere} lives in a container" in said["all.err"]
    assert "passed over" not in said["quiet.err"]


def test_an_instance_with_credentials_is_audited(instance: TitusInstance, tmp_path: Path) -> None:
    configuration, _ = another(
        instance,
        tmp_path,
        key='key = "credential:www.key"',
        certificate='certificate = "credential:www.crt"',
    )
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    shutil.copy(instance.key_file, credentials / "www.key")
    shutil.copy(instance.certificate_file, credentials / "www.crt")
    with beside(configuration, "env", f"CREDENTIALS_DIRECTORY={credentials}") as pid:
        answer = run_audit("--pid", str(pid), "--quiet")
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    check = [TITUS_PY, "check", "--config", configuration]
    without = subprocess.run(check, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert without.returncode == 2
    assert "titus-py check takes --credentials" in without.stderr
    told = subprocess.run(
        [*check, "--credentials", credentials],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert told.returncode == 0, told.stderr


def test_quiet_it_says_only_what_does_not_hold(instance: TitusInstance) -> None:
    right = instance.certificate_file.read_bytes()
    try:
        instance.certificate_file.write_bytes(instance.ca_file.read_bytes())
        answer = run_audit("--pid", str(instance.pid), "--quiet")
    finally:
        instance.certificate_file.write_bytes(right)
    assert answer.returncode == 1
    assert "certificate: promised:" in " ".join(answer.stdout.split())
    assert len(answer.stdout.splitlines()) < 10


# --- where there is nothing to audit ----------------------------------------------


def test_without_an_instance_it_says_so(tmp_path: Path) -> None:
    answer = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", TITUS_PY, "audit"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert answer.returncode == 2
    assert "no running instance" in answer.stderr


def test_a_process_that_is_no_supervisor_is_not_audited() -> None:
    answer = run_audit("--pid", str(os.getpid()))
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "'titus-py serve'" in answer.stderr or "no supervisor" in answer.stderr


def test_it_takes_root(instance: TitusInstance) -> None:
    program = shutil.which("setpriv")
    assert program is not None
    answer = subprocess.run(
        [program, "--bounding-set", "-sys_ptrace", TITUS_PY, "audit", "--pid", str(instance.pid)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert answer.returncode == 2
    assert "CAP_SYS_PTRACE" in answer.stderr


def test_an_instance_that_ends_is_not_called_broken(
    backend: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ended = TitusInstance(tmp_path_factory.mktemp("ended"), backend, "P-256", ["localhost"])
    ended.wait_until_listening()
    target = find_target(ended.pid)
    ended.stop()
    with pytest.raises(CannotAudit):
        audit(target)


def test_an_instance_without_its_fork_server_is_not_called_sound(
    backend: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Nobody would be there to be held to its promises."""
    found = TitusInstance(tmp_path_factory.mktemp("crippled"), backend, "P-256", ["localhost"])
    found.wait_until_listening()
    pids = {process.role: process.pid for process in instance_processes(found.pid)}
    # Or else the parent might have another one before it is looked at.
    os.kill(pids[Role.PARENT], signal.SIGSTOP)
    try:
        os.kill(pids[Role.FORK_SERVER], signal.SIGKILL)
        eventually(
            lambda: all(one.role is not Role.FORK_SERVER for one in instance_processes(found.pid)),
            "the fork server's end",
        )
        with pytest.raises(CannotAudit, match="no fork server"):
            find_target(found.pid)
    finally:
        os.kill(pids[Role.PARENT], signal.SIGCONT)
        found.stop()


# --- each check, with what it looks at taken out ----------------------------------


#: What not every machine can break.
ALONE = ["fork_server_speculation", "keyd_speculation", "supervisor_core_dumps"]


def taken_out_together() -> list[list[str]]:
    """All breakages, in as few instances as tell them apart.

    Where what is taken out differs in its check and in all of its processes, a check that is
    noticed for a process has one breakage to come from.
    """
    groups: list[list[str]] = []
    for name in [name for name in BREAKAGES if name not in ALONE]:
        for group in groups:
            if all(apart(BREAKAGES[name], BREAKAGES[other]) for other in group):
                group.append(name)
                break
        else:
            groups.append([name])
    return [*groups, *([name] for name in ALONE)]


@pytest.mark.parametrize("names", taken_out_together(), ids=",".join)
def test_a_protection_taken_out_is_noticed(
    names: list[str],
    backend: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    breakages_here = [BREAKAGES[name] for name in names]
    if "supervisor_core_dumps" in names and resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("core dumps are forbidden to these tests, too")
    directory = tmp_path_factory.mktemp("broken")
    driver = (sys.executable, "-I", breakages.__file__, "supervisor", ",".join(names))
    monkeypatch.setattr(throwaway, "PROGRAM", (*driver, str(directory / "site.key")))
    expected = {(one.check, role) for one in breakages_here for role in one.roles}
    roles = {role for _, role in expected}
    if "resolver" in roles:
        backend = backend.replace("127.0.0.1", "localhost")
    kind = WithMetrics if "metrics" in roles else Patient
    found = kind(directory, backend, "P-256", ["localhost"])
    found.wait_until_listening()
    try:
        made = audit(find_target(found.pid))
    finally:
        found.stop()
    findings = made.having(Verdict.BROKEN)
    if names[0].endswith("_speculation") and not findings:
        pytest.skip("this machine cannot turn speculation off")
    assert {(one.check, one.subject.role) for one in findings} == expected, findings


def test_of_a_handshake_that_took_too_long_nothing_is_said(
    instance: TitusInstance, tmp_path: Path
) -> None:
    """The instance has ended it meanwhile, and nothing is wrong with that."""
    configuration, _ = another(
        instance,
        tmp_path,
        handshake_timeout='handshake_timeout = "1s"',
        backend='backend = "127.0.0.1:1"',
    )
    with beside(configuration) as pid, Probe(find_target(pid)) as made:
        time.sleep(2)
        with pytest.raises(CannotAudit, match=r"longer than worker\.handshake_timeout, 1 s"):
            made.shake_hands()


class Hasty(TitusInstance):
    def _configuration(self, directory: Path, backend: str) -> str:
        text = super()._configuration(directory, backend)
        assert text.count(HANDSHAKE_TIMEOUT) == 1
        return text.replace(HANDSHAKE_TIMEOUT, 'handshake_timeout = "1s"\n')


def test_what_is_broken_is_told_although_the_handshake_took_too_long(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Probe.find_worker

    def find_slowly(self: Probe) -> Finding:
        found = real(self)
        time.sleep(2)
        return found

    monkeypatch.setattr(Probe, "find_worker", find_slowly)
    driver = (sys.executable, "-I", breakages.__file__, "supervisor", "parent_dumpable")
    monkeypatch.setattr(throwaway, "PROGRAM", (*driver, str(tmp_path / "site.key")))
    found = Hasty(tmp_path, backend, "P-256", ["localhost"])
    found.wait_until_listening()
    try:
        made = audit(find_target(found.pid))
    finally:
        found.stop()
    (broken,) = made.having(Verdict.BROKEN)
    assert (broken.check, broken.subject.role) == (BREAKAGES["parent_dumpable"].check, "parent")
    assert made.findings[-1].verdict is Verdict.NOT_AVAILABLE
    assert "longer than worker.handshake_timeout, 1 s" in made.findings[-1].seen


def test_that_others_use_up_a_limit_is_not_the_instances_fault(
    instance: TitusInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user of this machine can."""
    configuration, port = another(instance, tmp_path)
    with configuration.open("a") as file:
        file.write("[limits]\nconnections_per_prefix = 1\n")
    with beside(configuration) as pid, TlsClient(port) as other:
        other.handshake()
        made = audit(find_target(pid))
        assert made.holds, broken(made)
        assert "certificate" in {one.check for one in made.findings}
        # Elsewhere it has the one address that it has.
        monkeypatch.setattr("titus_py.audit.probe._is_loopback", lambda _: False)
        with pytest.raises(CannotAudit, match=r"away: limits\.connections_per_prefix"):
            audit(find_target(pid))


def test_without_a_backend_nothing_is_said_of_what_comes_after(
    instance: TitusInstance, tmp_path: Path
) -> None:
    configuration, _ = another(instance, tmp_path, backend='backend = "127.0.0.1:1"')
    with beside(configuration) as pid:
        made = audit(find_target(pid))
    assert made.holds, broken(made)
    (later,) = (
        one
        for one in made.findings
        if one.subject.stage == "after its handshake" and one.check != "certificate"
    )
    assert later.verdict is Verdict.NOT_AVAILABLE
    assert "is there a backend?" in later.seen


def spare(instance: TitusInstance) -> Process:
    """A worker that stays: one that is confined, and waits for a client."""
    found: list[Process] = []

    def at_rest() -> bool:
        found[:] = [one for one in instance_processes(instance.pid) if one.role is Role.WORKER]
        return len(found) == SPARE and all(worker.uid for worker in found)

    # A worker is root until it is confined; one that has had a client is about to end.
    eventually(at_rest, "none but spare workers")
    return found[0]


def test_a_uid_that_somebody_else_has_is_noticed(instance: TitusInstance) -> None:
    uid = spare(instance).uid
    with subprocess.Popen(["sleep", str(PATIENCE)], user=uid, group=uid) as stranger:
        try:
            assert broken(audit(find_target(instance.pid))) == ({"uid"}, {"worker"})
        finally:
            stranger.kill()


def test_an_interface_in_an_empty_network_is_noticed(instance: TitusInstance) -> None:
    worker = spare(instance)
    # Held, since the worker may be the one that serves the probe, and end with it.
    network = os.open(f"/proc/{worker.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def bring_lo(flags: int) -> None:
        """Up is 1, down is 0. A thread of its own goes there, and ends there."""

        def bring() -> None:
            enter_network_namespace(network)
            with socket.socket() as control:
                fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags))

        thread = threading.Thread(target=bring)
        thread.start()
        thread.join()

    try:
        bring_lo(1)
        assert broken(audit(find_target(instance.pid))) == ({"network"}, {"fork server", "worker"})
    finally:
        bring_lo(0)
        os.close(network)


def test_another_certificate_than_the_configured_one_is_noticed(instance: TitusInstance) -> None:
    right = instance.certificate_file.read_bytes()
    try:
        instance.certificate_file.write_bytes(instance.ca_file.read_bytes())
        assert broken(audit(find_target(instance.pid))) == ({"certificate"}, {"worker"})
    finally:
        instance.certificate_file.write_bytes(right)


def test_a_key_that_keyd_does_not_have_is_noticed(instance: TitusInstance) -> None:
    """The search's control: a key that is nowhere would be found nowhere else, too."""
    right = instance.key_file.read_bytes()
    try:
        subprocess.run(
            ["openssl", "genrsa", "-out", instance.key_file, "2048"],
            check=True,
            capture_output=True,
        )
        assert broken(audit(find_target(instance.pid))) == ({"key"}, {"keyd"})
    finally:
        instance.key_file.write_bytes(right)


def test_every_check_has_something_taken_out() -> None:
    """A check that nobody has seen fail is none."""
    tried = {breakage.check for breakage in BREAKAGES.values()}
    tried |= {"uid", "certificate"}
    # They tell what there is, and cannot fail: tests/unit/audit/test_hardening.py.
    tried |= {"interpreter", "library"}
    assert {check.name for check in CHECKS} <= tried
