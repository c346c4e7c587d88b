"""Signals in every moment of a start: none ends it, or hangs it, that is not meant to."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from .certificates import Certificate
from .conftest import Certificates
from .instance import PATIENCE, TITUS_PY, Instance, descendants, eventually, free_port
from .peers import Listener, TlsClient
from .service import serves, talk

KEYD = TITUS_PY.with_name("keyd")
KEYS = 100
#: Every few milliseconds.
PAUSE = 0.005
HARMLESS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE)


def has_taken_precautions(pid: int) -> bool:
    """Whether its first line has run; before, there is only the interpreter's own start."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        masks = [line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")]
        return bool(int(masks[0], 16) >> (signal.SIGUSR2 - 1) & 1)
    return False


def many_keys(certificate: Certificate, directory: Path, backend: str) -> list[dict[str, object]]:
    """As many virtual hosts, each with files of its own."""
    found = []
    for number in range(KEYS):
        files = directory / f"{number}.crt", directory / f"{number}.key"
        for file, original in zip(files, (certificate.certificate, certificate.key), strict=True):
            file.touch(mode=0o600)
            file.write_bytes(original.read_bytes())
        sni = ["localhost"] if not number else [f"site-{number}.example"]
        found.append({"sni": sni, "certificate": files[0], "key": files[1], "backend": backend})
    return found


@pytest.fixture
def start(certificates: Certificates, echoing: Listener, tmp_path: Path) -> Iterator["Start"]:
    vhosts = many_keys(certificates("RSA-2048"), tmp_path, echoing.address)
    start = Start(tmp_path, vhosts)
    yield start
    for instance in start.instances:
        instance.close()


class Start:
    """Starts instances with many keys, up to where their first line has run."""

    def __init__(self, directory: Path, vhosts: list[dict[str, object]]) -> None:
        self._directory = directory
        self._vhosts = vhosts
        self.instances: list[Instance] = []

    def __call__(self) -> Instance:
        directory = self._directory / str(len(self.instances))
        directory.mkdir()
        listen = [{"address": f"127.0.0.1:{free_port()}"}]
        instance = Instance.from_tables(directory, {"listen": listen, "vhost": self._vhosts}, 6000)
        self.instances.append(instance)
        eventually(lambda: has_taken_precautions(instance.pid), "its first line has run")
        return instance


def send_to_all(instance: Instance) -> None:
    """As ``systemctl kill`` does: to the supervisor and to all that came of it."""
    for process in descendants(instance.pid):
        for number in HARMLESS:
            with suppress(ProcessLookupError):
                process.kill(number)


def test_a_start_goes_through_and_so_do_connections_whatever_all_processes_are_sent(
    start: Start,
) -> None:
    instance = start()
    while not instance.events_named("listening"):
        assert instance.runs(), instance.log()
        send_to_all(instance)
        time.sleep(PAUSE)
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        for _ in range(20):
            send_to_all(instance)
            time.sleep(PAUSE)
        assert talk(client)

        # One reload may do for many signals.
        def settled() -> bool:
            begun, done = instance.events_named("reloading"), instance.events_named("reloaded")
            return bool(begun) and len(begun) == len(done)

        eventually(settled, "all reloads")
        assert talk(client)
        assert serves(instance)
    assert not instance.events_named("reload_failed")
    assert not instance.events_named("start_failed")
    assert instance.terminate() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_start_that_is_ended_leaves_nothing_and_needs_no_traceback(
    start: Start, number: signal.Signals
) -> None:
    """Before anything is started, the signal's default is all that it takes."""
    ends = set()
    for step in range(5):
        instance = start()
        time.sleep(step * 0.25)
        instance.signal(number)
        ends.add(instance.wait(PATIENCE))
        instance.assert_nothing_is_left()
        assert "Traceback" not in instance.log()
    assert -number in ends
    assert ends <= {0, -number}


def test_keyd_on_its_own_is_not_ended_either(certificates: Certificates, tmp_path: Path) -> None:
    """What started it as a service would take it for an end that was wanted."""
    path = tmp_path / "keyd.sock"
    options = [f"--key={certificates('P-256').key}", f"--socket={path}", "--user=nobody"]
    for command in ("listen", "control"):
        with subprocess.Popen([KEYD, command, *options, f"--chroot={tmp_path / 'root'}"]) as keyd:
            try:
                eventually(lambda: has_taken_precautions(keyd.pid), "its first line")
                while not connects(path):
                    assert keyd.poll() is None
                    for number in HARMLESS:
                        keyd.send_signal(number)
                    time.sleep(PAUSE)
                for number in HARMLESS:
                    keyd.send_signal(number)
                assert connects(path)
            finally:
                keyd.terminate()
        assert keyd.returncode in {0, -signal.SIGTERM}
        path.unlink()


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        return client.connect_ex(str(path)) == 0
