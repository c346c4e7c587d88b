"""keyd as a service of its own: the proxy has no key, and either goes without the other."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from keyd.protocol import Parting, decode_report

from .certificates import Certificate
from .conftest import Certificates, Serve
from .instance import (
    PATIENCE,
    TITUS_PY,
    Instance,
    Process,
    descendants,
    eventually,
    free_port,
    toml,
)
from .peers import Listener, TlsClient
from .service import (
    FAILS,
    clients_meanwhile,
    install,
    name_shown_to_a_new_client,
    problems,
    reload,
    replace,
    serves,
    status,
    talk,
    what_another_user_gets,
)
from .test_stopping import be_nobody_who_may_read_everything

KEYD = TITUS_PY.with_name("keyd")


class OwnKeyd:
    """``keyd control``, which a test may end and start again."""

    def __init__(self, directory: Path, options: Sequence[str], program: Path = KEYD) -> None:
        self._program = program
        self.socket = directory / "keyd.control"
        self._options = [f"--socket={self.socket}", *options]
        self._process: subprocess.Popen[bytes] | None = None
        self._log = directory / "keyd-log"

    def start(self, prepare: Callable[[], None] | None = None) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "control", *self._options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=prepare,
                start_new_session=True,
            )
        eventually(self.listens, f"keyd listens: {self.log()}")

    def listens(self) -> bool:
        """It has keys to tell of: only then is it in its filter."""
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(self.socket))
                return bool(probe.recv(4096))
            except OSError:
                return False

    def log(self) -> str:
        return self._log.read_text()

    @property
    def process(self) -> Process:
        assert self._process is not None
        return descendants(self._process.pid)[0]

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait(PATIENCE)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.end()


Start = Callable[..., OwnKeyd]


@pytest.fixture
def start_keyd(tmp_path: Path) -> Iterator[Start]:
    """A keyd with these keys; as ``nobody``, unless a test has other options."""
    started: list[OwnKeyd] = []

    def start(
        *keys: Path, options: Sequence[str] = ("--user=nobody",), prepare: Any = None
    ) -> OwnKeyd:
        keyd = OwnKeyd(
            tmp_path,
            [*(f"--key={key}" for key in keys), f"--chroot={tmp_path / 'keyds-root'}", *options],
        )
        started.append(keyd)
        keyd.start(prepare)
        return keyd

    yield start
    for keyd in started:
        keyd.close()


@pytest.fixture
def start_proxy(tmp_path: Path) -> Iterator[Callable[..., Instance]]:
    """An instance that reaches a keyd of its own."""
    instances: list[Instance] = []

    def start(
        backend: str, *certificates: Certificate, keyd: OwnKeyd, awaited: str = "listening"
    ) -> Instance:
        directory = tmp_path / f"instance-{len(instances)}"
        directory.mkdir()
        tables = {
            "listen": [{"address": f"127.0.0.1:{free_port()}"}],
            "vhost": [{"certificate": one.certificate, "backend": backend} for one in certificates],
        }
        instance = Instance.from_tables(directory, {"keyd": {"socket": keyd.socket}, **tables})
        instances.append(instance)
        instance.wait_for_event(awaited, PATIENCE)
        return instance

    yield start
    problems = []
    for instance in instances:
        try:
            instance.close()
        except AssertionError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)


# --- serving ---------------------------------------------------------------------------


def test_connections_are_served_without_the_proxy_having_a_key(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    echoing: Listener,
    tmp_path: Path,
) -> None:
    site = install(certificates("RSA-2048"), tmp_path)
    keyd = start_keyd(site.key)
    # Nobody needs it any more; and nobody finds it.
    site.key.unlink()
    instance = start_proxy(echoing.address, site, keyd=keyd)
    assert all(serves(instance) for _ in range(5))
    processes = instance.processes()
    children = [process for process in processes if process.parent == instance.pid]
    assert len(children) == 1, "a parent, and no keyd"
    assert status(instance)["generations"][0]["keyd"] is None
    assert instance.wait_for_event("keyd_connected")["socket"] == str(keyd.socket)
    assert reload(instance)["reloaded"]
    assert serves(instance)


def test_keyd_has_nothing_but_its_keys_and_its_socket(
    start_keyd: Start, certificates: Certificates
) -> None:
    keyd = start_keyd(certificates().key)
    said = process_status(keyd.process)
    assert keyd.process.uid == 65534
    assert {said[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    assert (said["NoNewPrivs"], said["Seccomp"]) == (1, 2)
    root = os.stat(f"/proc/{keyd.process.pid}/root")
    assert (root.st_dev, root.st_ino) != (os.stat("/").st_dev, os.stat("/").st_ino)
    assert os.stat(keyd.socket).st_mode & 0o777 == 0o600
    assert os.stat(keyd.socket).st_uid == 0


def process_status(process: Process) -> dict[str, int]:
    """The numbers in /proc/PID/status: capabilities in hexadecimal."""
    numbers = {}
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        name, _, value = line.partition(":\t")
        if name.startswith("Cap"):
            numbers[name] = int(value, 16)
        elif value.isdecimal():
            numbers[name] = int(value)
    return numbers


def test_keyd_may_be_started_by_a_user_without_any_privilege(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    echoing: Listener,
    tmp_path: Path,
) -> None:
    def be_nobody() -> None:
        os.umask(0o077)
        be_nobody_who_may_read_everything()

    site = install(certificates("P-256"), tmp_path)
    # The way to the socket is everybody's; the socket itself is not.
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(directory.stat().st_mode | 0o011)
    os.chown(tmp_path, 65534, 65534)
    keyd = start_keyd(site.key, options=["--lock-memory=try"], prepare=be_nobody)
    said = process_status(keyd.process)
    assert keyd.process.uid == 65534
    may_read = 1 << 2
    assert not said["CapEff"] & ~may_read, "nothing but what reads this test's own files"
    assert (said["NoNewPrivs"], said["Seccomp"]) == (1, 2)
    instance = start_proxy(echoing.address, site, keyd=keyd)
    assert serves(instance)


def test_another_user_cannot_have_anything_signed(
    start_keyd: Start, certificates: Certificates
) -> None:
    keyd = start_keyd(certificates().key)
    assert what_another_user_gets(keyd.socket) == "PermissionError"


@pytest.mark.parametrize("octets", [b"\0", b"nonsense" * 10, b"\xff" * 200], ids=range(3))
def test_nonsense_from_root_does_not_end_keyd(
    start_keyd: Start, certificates: Certificates, octets: bytes
) -> None:
    keyd = start_keyd(certificates().key)
    process = keyd.process
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(keyd.socket))
        client.settimeout(PATIENCE)
        assert client.recv(4096)
        client.send(octets)
        assert decode_report(client.recv(4096)) == Parting()
        assert client.recv(4096) == b""
    eventually(keyd.listens, "it listens")
    assert keyd.process == process


# --- one without the other -------------------------------------------------------------


def test_keyd_may_be_killed_and_started_again(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    echoing: Listener,
) -> None:
    site = certificates("P-256")
    keyd = start_keyd(site.key)
    instance = start_proxy(echoing.address, site, keyd=keyd)
    before = instance.supervisor().descriptors
    with TlsClient(instance.port) as established:
        assert talk(established.handshake())
        for _ in range(2):
            since = len(instance.events())
            keyd.end()
            instance.wait_for_event("keyd_lost", since=since)
            assert talk(established)
            with ThreadPoolExecutor() as pool:
                waiting = [pool.submit(serves, instance) for _ in range(3)]
                time.sleep(0.5)
                assert not any(one.done() for one in waiting), "they wait for a keyd"
                keyd.start()
                assert all(one.result(PATIENCE) for one in waiting)
            instance.wait_for_event("keyd_connected", since=since)
            assert talk(established)
            assert serves(instance)
    assert len(instance.events_named("parent_started")) == 1
    eventually(lambda: instance.supervisor().descriptors == before, "as before")


def test_the_proxy_may_be_started_before_keyd(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    echoing: Listener,
) -> None:
    site = certificates("P-256")
    keyd = start_keyd(site.key)
    keyd.end()
    instance = start_proxy(echoing.address, site, keyd=keyd, awaited="keyd_unreachable")
    event = instance.wait_for_event("keyd_unreachable")
    assert (event["level"], event["socket"]) == ("error", str(keyd.socket))
    time.sleep(1)
    assert len(instance.events_named("keyd_unreachable")) == 1, "said once"
    assert not instance.events_named("listening")
    with TlsClient(instance.port) as client:
        client.socket.sendall(client.first_flight())
        keyd.start()
        assert talk(client.handshake())
    assert instance.wait_for_event("listening")


def test_the_proxy_may_be_restarted_without_keyd(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    echoing: Listener,
) -> None:
    site = certificates("P-256")
    keyd = start_keyd(site.key)
    process = keyd.process
    descriptors = process.descriptors
    for number in (signal.SIGTERM, signal.SIGKILL):
        instance = start_proxy(echoing.address, site, keyd=keyd)
        assert serves(instance)
        instance.signal(number)
        instance.wait()
        instance.assert_nothing_is_left()
    instance = start_proxy(echoing.address, site, keyd=keyd)
    assert serves(instance)
    instance.terminate()
    assert keyd.process == process
    eventually(lambda: process.descriptors <= descriptors, "keyd has nothing left of them")


def test_two_proxies_may_share_a_keyd(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    echoing: Listener,
) -> None:
    site = certificates("P-256")
    keyd = start_keyd(site.key)
    instances = [start_proxy(echoing.address, site, keyd=keyd) for _ in range(2)]
    assert all(serves(instance) for instance in instances)


def test_a_killed_parent_finds_keyd_again(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    echoing: Listener,
) -> None:
    site = certificates("P-256")
    instance = start_proxy(echoing.address, site, keyd=start_keyd(site.key))
    instance.expected_alarms.add("parent_died")
    since = len(instance.events())
    instance.parent().kill()
    instance.wait_for_event("keyd_connected", since=since)
    assert serves(instance)


# --- other keys ------------------------------------------------------------------------


def test_a_key_that_keyd_lacks_is_named(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    echoing: Listener,
) -> None:
    without = certificates("P-256", "without.test")
    instance = start_proxy(
        echoing.address, without, keyd=start_keyd(certificates("P-256", "with.test").key)
    )
    instance.expected_alarms |= {"keyd_refused"}
    event = instance.wait_for_event("keyd_lacks_key")
    assert event["level"] == "error"
    assert len(event["key"]) == 64
    assert event["certificate"] == str(without.certificate)
    with TlsClient(instance.port) as client, pytest.raises(FAILS):
        client.handshake()


@pytest.mark.parametrize("by", ["reload", "itself"])
def test_a_renewal_loses_no_handshake(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    patient: str,
    tmp_path: Path,
    by: str,
) -> None:
    """systemctl restart titus-keyd && systemctl reload titus-py, or without the second."""
    site = install(certificates("P-256", "0.test"), tmp_path)
    keyd = start_keyd(site.key)
    # No alarm is expected.
    instance = start_proxy(patient, site, keyd=keyd)
    with (
        clients_meanwhile(instance, 4) as wait_for_some,
        TlsClient(instance.port) as established,
    ):
        assert talk(established.handshake())
        for number in (1, 2, 3):
            wait_for_some()
            since = len(instance.events())
            install(certificates("P-256", f"{number}.test"), tmp_path)
            assert keyd.end(signal.SIGTERM) == 0
            keyd.start()
            if by == "reload":
                assert reload(instance)["reloaded"]
            else:
                instance.wait_for_event("reloaded", since=since)
            assert name_shown_to_a_new_client(instance) == f"{number}.test"
            assert talk(established)
    assert not instance.events_named("keyd_refused")
    assert not instance.events_named("handshake_failed")


def test_keyd_answers_what_it_was_asked_before_it_leaves(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    patient: str,
) -> None:
    """Whoever is slow has a moment; whoever is too slow does not hold up the others."""
    site = certificates("P-256")
    keyd = start_keyd(site.key)
    instance = start_proxy(patient, site, keyd=keyd)
    process = keyd.process
    # Their first ClientHello is answered with a HelloRetryRequest: nothing is signed for it.
    groups = ["X25519", "X25519MLKEM768"]
    with (
        TlsClient(instance.port, groups=groups) as slow,
        TlsClient(instance.port, groups=groups) as silent,
    ):
        for client in (slow, silent):
            client.socket.sendall(client.first_flight())
        instance.wait_for_events(2, "connection_begun")
        process.kill(signal.SIGTERM)
        instance.wait_for_event("keyd_lost")
        assert keyd.process == process, "it still waits for their requests"
        assert talk(slow.handshake())
        assert keyd.wait() == 0
        keyd.start()
        instance.wait_for_event("keyd_connected")
        assert serves(instance)
        with pytest.raises(FAILS):
            silent.handshake()


def test_a_reload_that_keyd_cannot_serve_is_not_taken(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    patient: str,
    tmp_path: Path,
) -> None:
    """As by a renewal whose hook reloads titus-py, and forgets keyd."""
    site = install(certificates("P-256", "before.test"), tmp_path)
    keyd = start_keyd(site.key)
    instance = start_proxy(patient, site, keyd=keyd)
    with clients_meanwhile(instance, 2):
        install(certificates("P-256", "after.test"), tmp_path)
        (reason,) = problems(instance)
        assert reason == (
            f"keyd.socket: the keyd at {keyd.socket} does not have the key of {site.certificate}: "
            "have it read its keys again (systemctl restart titus-keyd)"
        )
        assert name_shown_to_a_new_client(instance) == "before.test"
        assert [one["state"] for one in status(instance)["generations"]] == ["serving"]
        since = len(instance.events())
        keyd.end(signal.SIGTERM)
        keyd.start()
        instance.wait_for_event("reloaded", since=since)
        assert name_shown_to_a_new_client(instance) == "after.test"


def test_the_service_manager_is_told_what_is_waited_for(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    echoing: Listener,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = certificates("P-256")
    keyd = start_keyd(site.key)
    keyd.end()
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        instance = start_proxy(echoing.address, site, keyd=keyd, awaited="keyd_unreachable")
        while b"waits for keyd" not in (heard := manager.recv(4096)):
            continue
        assert f"waits for keyd at {keyd.socket}: Connection refused" in heard.decode()
        monkeypatch.undo()
        keyd.start()
        instance.wait_for_event("listening")


def test_a_keyd_that_comes_back_with_other_keys_makes_for_a_reload(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    patient: str,
    tmp_path: Path,
) -> None:
    """One for each change: not for the same keys, and not for keys that serve no certificate."""
    site = install(certificates("P-256", "before.test"), tmp_path)
    keyd = start_keyd(site.key)
    instance = start_proxy(patient, site, keyd=keyd)
    instance.expected_alarms |= {"keyd_refused"}

    def reloads_after_a_restart(expected: str | None = None) -> int:
        since = len(instance.events())
        keyd.end()
        keyd.start()
        instance.wait_for_event("keyd_connected", since=since)
        if expected is not None:
            instance.wait_for_event(expected, since=since)
        # A loop would go on meanwhile.
        time.sleep(1)
        return sum(event["event"] == "reloaded" for event in instance.events()[since:])

    with TlsClient(instance.port) as established:
        assert talk(established.handshake())
        assert reloads_after_a_restart() == 0
        install(certificates("P-256", "after.test"), tmp_path)
        assert reloads_after_a_restart("reloaded") == 1
        assert name_shown_to_a_new_client(instance) == "after.test"
        assert serves(instance)
        assert reloads_after_a_restart() == 0
        replace(site.key, certificates("P-256", "no-certificate.test").key.read_bytes())
        assert reloads_after_a_restart("reload_failed") == 0
        assert len(instance.events_named("reload_failed")) == 1
        assert instance.events_named("keyd_lacks_key"), "it has what there is"
        assert talk(established)
    assert len(instance.events_named("keys_changed")) == 2


# --- configuration ---------------------------------------------------------------------


def mistakes(directory: Path, tables: dict[str, Any]) -> list[str]:
    file = directory / "titus.toml"
    file.write_text(toml(tables))
    checked = subprocess.run(
        [TITUS_PY, "check", "--config", file], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 2
    prefix = rf"{re.escape(str(file))}(:\d+)?: "
    return [re.sub(prefix, "", line, count=1) for line in checked.stderr.splitlines()]


def tables_with(certificate: Certificate, keyd: dict[str, Any], **vhost: Any) -> dict[str, Any]:
    return {
        "keyd": keyd,
        "listen": [{"address": f"127.0.0.1:{free_port()}"}],
        "vhost": [{"certificate": certificate.certificate, "backend": "127.0.0.1:9", **vhost}],
    }


def test_either_keyd_has_the_keys_or_the_configuration(
    certificates: Certificates, tmp_path: Path
) -> None:
    site = certificates()
    both = tables_with(site, {"socket": "/run/keyd.control"}, key=site.key)
    assert mistakes(tmp_path, both) == [
        "vhost for any name: key: is not for this program to read: "
        "the keyd at /run/keyd.control has the keys"
    ]
    neither = tables_with(site, {})
    assert mistakes(tmp_path, neither) == ["vhost for any name: key: is missing"]


def test_a_credential_is_found_where_systemd_put_it(
    serve: Serve,
    certificates: Certificates,
    echoing: Listener,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = install(certificates("P-256", "credential.test"), tmp_path)
    site.key.rename(tmp_path / "www.key")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    vhost = {"certificate": "credential:site.crt", "key": "credential:www.key"}
    instance = serve(echoing.address, vhost=[vhost])
    assert name_shown_to_a_new_client(instance) == "credential.test"
    assert reload(instance)["reloaded"]
    assert serves(instance)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.key", "no such file or directory"),
        ("../www.key", "is no credential's name"),
        ("", "is no credential's name"),
    ],
)
def test_a_credential_that_is_not_there_is_a_mistake(
    certificates: Certificates,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    reason: str,
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (mistake,) = mistakes(tmp_path, tables_with(certificates(), {}, key=f"credential:{name}"))
    assert mistake.startswith("vhost for any name: key: ")
    assert mistake.endswith(reason)


def test_without_systemd_there_are_no_credentials(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    (mistake,) = mistakes(tmp_path, tables_with(certificates(), {}, key="credential:www.key"))
    assert "systemd passed no credentials" in mistake


# --- not starting ----------------------------------------------------------------------


@pytest.mark.parametrize("key", ["upstream", "unix:/run/titus-py/keys-1.sock"])
@pytest.mark.parametrize("command", ["listen", "control"])
def test_it_has_no_key_of_another_host(command: str, key: str) -> None:
    ended = subprocess.run(
        [str(KEYD), command, "--key", key, "--lock-memory=try"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    expected = f"keyd: --key {key}: other hosts' keys are for a keyd that titus-py starts "
    assert (ended.returncode, ended.stderr[: len(expected)]) == (1, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--key=/nonexistent.key", "--user=nobody", "--socket={}/s"], "/nonexistent.key"),
        (["--key={}/www.key", "--socket={}/s"], "no --user to become"),
        (["--key={}/www.key", "--user=nobody"], "no --socket"),
        (["--key={}/www.key", "--user=no-such-user", "--socket={}/s"], "no-such-user"),
        (["--key={}/www.key", "--user=nobody", "--socket={}/none/s"], "/none/s: No such file"),
    ],
    ids=["key", "user", "socket", "unknown user", "directory"],
)
def test_keyd_says_why_it_does_not_start(
    certificates: Certificates, tmp_path: Path, options: list[str], words: str
) -> None:
    shutil.copy(certificates().key, tmp_path / "www.key")
    ended = subprocess.run(
        [
            str(KEYD),
            "control",
            f"--chroot={tmp_path}/root",
            *(option.format(tmp_path) for option in options),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 1
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert sys.executable not in ended.stderr


def test_a_keyd_that_reads_its_keys_again_makes_for_a_reload(
    start_keyd: Start,
    start_proxy: Callable[..., Instance],
    certificates: Certificates,
    echoing: Listener,
    tmp_path: Path,
) -> None:
    """A renewal without a restart of either: keyd is told, and titus-py finds the new key."""
    site = install(certificates("P-256", "before.test"), tmp_path)
    keyd = start_keyd(site.key)
    instance = start_proxy(echoing.address, site, keyd=keyd)
    process = keyd.process
    with TlsClient(instance.port) as established:
        assert talk(established.handshake())
        install(certificates("P-256", "after.test"), tmp_path)
        since = len(instance.events())
        process.kill(signal.SIGHUP)
        instance.wait_for_event("keys_changed", since=since)
        eventually(
            lambda: name_shown_to_a_new_client(instance) == "after.test", "the new key", PATIENCE
        )
        assert talk(established)
    assert keyd.process == process
