"""``titus-py status`` and ``reload``, against instances that are sockets and answers."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from titus_py.commands.reload import reload
from titus_py.commands.status import status
from titus_py.supervisor.control_client import NoAnswer, ask, find_instances
from titus_py.supervisor.metrics import Metrics


def make_status() -> dict[str, Any]:
    now = datetime.now(UTC)
    metrics = Metrics()
    for _ in range(5):
        metrics.record("connection_begun", {})
    ended = {"tls_version": "TLSv1.3", "octets_to_client": 12_345_678, "seconds": 1, "end": "clean"}
    metrics.record("connection_ended", ended)
    failed = {"end": "handshake_timeout", "level": "info", "uid": 200_000}
    metrics.record("handshake_failed", failed)
    metrics.record("keyd_died", {"level": "alarm"})
    metrics.protocols.add("h2", 2)
    metrics.protocols.add("http/1.1")
    return {
        "version": "0.1.0",
        "pid": 17,
        "started": (now - timedelta(days=3, hours=2)).isoformat(),
        "seconds_up": (3 * 24 + 2) * 3600,
        "listeners": ["[::]:443"],
        "generations": [
            {
                "number": 2,
                "state": "retired",
                "since": (now - timedelta(minutes=5, seconds=3)).isoformat(),
                "seconds": 303,
                "parent": 20,
                "keyd": 21,
                "connections": 2,
            },
            {
                "number": 3,
                "state": "serving",
                "since": now.isoformat(),
                "seconds": 0,
                "parent": 30,
                "keyd": None,
                "connections": 1,
                "huge_pages": 3,
                "huge_pages_of_code": 1,
            },
        ],
        "processes": [
            {"process": "metrics", "state": "ready", "seconds": 60, "pid": 31},
            {"process": "resolver", "state": "waits\x1b", "seconds": None, "pid": None},
        ],
        "vhosts": [
            {
                "names": ["www.example.org", ""],
                "local_address": None,
                "local_port": 443,
                "backend": "app:8080",
                "send_proxy": "v1",
                "source_address": "client",
                "addresses": ["192.0.2.7:8080"],
                "alpn": ["h2", "http/1.1"],
                "backends": [
                    {
                        "protocol": "h2",
                        "backend": "app:8082",
                        "addresses": ["192.0.2.7:8082"],
                    }
                ],
                "health": [
                    {"backend": "app:8080", "up": True, "since": None, "reason": None},
                    {
                        "backend": "app:8082",
                        "up": False,
                        "since": "2026-11-25T12:00:00+00:00",
                        "reason": "192.0.2.7:8082: Connection refused\x1b",
                    },
                ],
                "certificates": [0],
            },
            {
                "names": None,
                "local_address": "::1",
                "local_port": None,
                "backend": "unix:/run/app.sock",
                "send_proxy": None,
                "addresses": [],
                "alpn": None,
                "backends": [],
                "health": [],
                "certificates": [0],
            },
        ],
        "certificates": [
            {
                "file": "/etc/titus-py/www.crt",
                "subject": "CN=www\x1b[31m",
                "names": ["www.example.org"],
                "not_after": (now + timedelta(days=2)).isoformat(),
                "days_left": 2,
            }
        ],
        "client_authorities": [
            {
                "setting": "client_crl",
                "file": "/etc/titus-py/clients.crl",
                "not_after": (now + timedelta(days=1)).isoformat(),
                "days_left": 1,
            }
        ],
        "immortal_objects": True,
        "counts": metrics.counts(),
    }


class Instance:
    """Listens where a supervisor with this process id would, and answers what it is given."""

    def __init__(self, directory: Path, pid: int, answer: Callable[[dict[str, Any]], bytes]):
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(directory / f"{pid}.control"))
        self._listener.listen()
        self.asked: list[dict[str, Any]] = []
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                if request := client.recv(4096):
                    self.asked.append(json.loads(request))
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
                    client.send(self._answer(self.asked[-1]))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


Start = Callable[[int, object], Instance]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def start_one(pid: int, answer: object) -> Instance:
            octets = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            instance = Instance(tmp_path, pid, lambda _: octets)
            stack.callback(instance.close)
            return instance

        yield start_one


def shown(directory: Path, **options: Any) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=110)
    code = status(directory=directory, console=console, **options)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def test_what_is_shown(start: Start, tmp_path: Path) -> None:
    instance = start(17, make_status())
    code, text = shown(tmp_path)
    assert code == 0
    assert instance.asked == [{"do": "status"}]
    for part in (
        "titus-py 0.1.0, process 17, up 3 d 2 h, listening on [::]:443",
        "retired",
        "5 min ",
        "www.example.org, no name",
        "192.0.2.7:8080",
        "PROXY v1, transparent",
        "  h2",
        "192.0.2.7:8082",
        "down since 2026-11-25",
        "refused\\x1b",
        "2 h2, 1 http/1.1",
        "any name",
        "not resolved",
        r"CN=www\x1b[31m",
        "clients.crl",
        "3 now, 5 accepted",
        "1, 1 failed (1 handshake timeout)",
        "12.3 MB to clients",
        "1 keyd",
        "1 keyd died",
        "metrics ",
        r"waits\x1b",
        "workers share immortal objects",
        "workers share 3 huge pages of memory",
        "workers share 1 huge page of code",
    ):
        assert part in text, text
    assert "\x1b" not in text


@pytest.mark.parametrize("serves", [True, False])
def test_tunnels_alone_have_no_table_of_certificates(
    start: Start, tmp_path: Path, serves: bool
) -> None:
    answer = make_status()
    if not serves:
        answer |= {"certificates": [], "client_authorities": []}
    start(17, answer)
    assert ("days left" in shown(tmp_path)[1]) == serves


def test_for_a_program_that_reads_it_no_line_is_broken(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = make_status()
    name = f"{'long.' * 60}example.org"
    answer["certificates"][0].update(names=[name])
    start(17, answer)
    assert status(directory=tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(name in line for line in lines)
    assert max(map(len, lines)) < 1000


@pytest.mark.parametrize(
    ("pages", "line"),
    [(2, "workers share 2 huge pages of {}\n"), (0, "workers share no huge pages of {}: the ")],
)
@pytest.mark.parametrize(("key", "of"), [("huge_pages", "memory"), ("huge_pages_of_code", "code")])
def test_what_the_kernel_has_made(
    start: Start, tmp_path: Path, key: str, of: str, pages: int, line: str
) -> None:
    answer = make_status()
    answer["generations"][1][key] = pages
    start(17, answer)
    assert line.format(of) in re.sub(" *\n", "\n", shown(tmp_path)[1])


def test_before_the_fork_server_has_told_nothing_is_said_of_its_pages(
    start: Start, tmp_path: Path
) -> None:
    answer = make_status()
    generation = answer["generations"][1]
    generation["huge_pages"] = generation["huge_pages_of_code"] = None
    start(17, answer)
    assert "huge page" not in shown(tmp_path)[1]


def test_what_is_lost_and_not_started_again(start: Start, tmp_path: Path) -> None:
    reason = "the new program failed: ModuleNotFoundError: No module named 'keyd'"
    start(1, make_status() | {"lost": "keyd", "lost_because": reason})
    code, text = shown(tmp_path)
    assert code == 0
    assert f"lost, and not started again: keyd: {reason}" in text.replace("\n", " ")


def test_as_json(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = make_status()
    start(17, expected)
    start(9, b"nonsense")
    assert status(as_json=True, directory=tmp_path) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first == {"error": "process 9 has answered with something else than JSON"}
    assert second == expected


def test_one_of_several(start: Start, tmp_path: Path) -> None:
    others = start(9, b"nonsense")
    start(17, make_status())
    assert shown(tmp_path, pid=17)[0] == 0
    assert not others.asked


def test_another_version(start: Start, tmp_path: Path) -> None:
    start(17, {"version": "7.0", "pid": 17, "generations": "many"})
    code, text = shown(tmp_path)
    assert code == 0
    assert text == "titus-py: process 17 is of another version, 7.0: --json shows it\n"


def test_a_status_that_is_long(start: Start, tmp_path: Path) -> None:
    long = make_status()
    long["vhosts"] *= 5000
    start(17, long)
    assert len(ask(17, {"do": "status"}, 5, tmp_path)["vhosts"]) == 10_000


def test_of_hundreds_of_names_the_first_are_shown(start: Start, tmp_path: Path) -> None:
    """Certificates have them; ``--json`` shows all."""
    answer = make_status()
    answer["certificates"][0]["names"] = [f"c{number}.example.org" for number in range(300)]
    answer["vhosts"][0]["names"] = [f"v{number}.example.org" for number in range(5)]
    start(17, answer)
    _, text = shown(tmp_path)
    words = " ".join(text.split())
    assert len(text.splitlines()) < 60
    for kind, more in (("c", 297), ("v", 2)):
        assert f"{kind}2.example.org" in words
        assert f"{kind}3.example.org" not in words
        assert f"{more} more" in words


@pytest.mark.parametrize("directory", ["", "nonexistent"])
def test_no_instance(directory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (status, reload):
        assert command(directory=tmp_path / directory) == 2  # type: ignore[operator]
        assert capsys.readouterr().err == "titus-py: no instance is running\n"


def test_an_instance_that_is_not_there(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(17, make_status())
    for command in (status, reload):
        assert command(pid=18, directory=tmp_path) == 2  # type: ignore[operator]
        assert capsys.readouterr().err == "titus-py: no instance runs as process 18\n"


def test_what_a_killed_instance_left_behind_is_passed_over(start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(tmp_path / "5.control"))
    (tmp_path / "x.control").touch()
    (tmp_path / "metrics.sock").touch()
    start(17, make_status())
    start(9, make_status())
    assert find_instances(tmp_path) == [9, 17]


def test_an_instance_that_hangs(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stuck:
        stuck.bind(str(tmp_path / "17.control"))
        stuck.listen()
        with pytest.raises(NoAnswer, match=r"process 17 has not answered for 0\.2 s"):
            ask(17, {"do": "status"}, 0.2, tmp_path)


@pytest.mark.parametrize("answer", [b"", b"[]", b"{", b"\xff"])
def test_no_answer(start: Start, tmp_path: Path, answer: bytes) -> None:
    start(17, answer)
    with pytest.raises(NoAnswer):
        ask(17, {"do": "status"}, 5, tmp_path)
    assert shown(tmp_path)[0] == 1


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_somebody_who_is_not_root(mode: int) -> None:
    program = (
        "import os, sys; from pathlib import Path; from titus_py.commands.status import status; "
        "os.setuid(65534); sys.exit(status(directory=Path(sys.argv[1])))"
    )
    with (
        tempfile.TemporaryDirectory() as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as instance,
    ):
        os.chmod(directory, mode)
        instance.bind(f"{directory}/17.control")
        os.chmod(f"{directory}/17.control", 0o600)
        instance.listen()
        done = subprocess.run(
            [sys.executable, "-c", program, directory], capture_output=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == b"titus-py: status must be run as root\n"


@pytest.mark.parametrize("as_json", [True, False])
def test_watching(start: Start, tmp_path: Path, as_json: bool) -> None:
    instance = start(17, make_status())
    program = (
        "import sys; from pathlib import Path; from titus_py.commands.status import status; "
        f"sys.exit(status(as_json={as_json}, watch=True, directory=Path(sys.argv[1])))"
    )
    watching = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(instance.asked) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    watching.send_signal(signal.SIGINT)
    out, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0
    assert "0.1.0" in out
    if as_json:
        assert all(json.loads(line)[0]["pid"] == 17 for line in out.splitlines())


# --- reload ---------------------------------------------------------------------------


def test_reloaded(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    instance = start(17, {"reloaded": True, "generation": 4})
    assert reload(directory=tmp_path) == 0
    assert instance.asked == [{"do": "reload"}]
    assert capsys.readouterr().out == "titus-py: reloaded: generation 4 serves\n"


def test_not_reloaded(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(17, {"reloaded": False, "problems": ["a.toml: x: wrong", "y\x1b: also"]})
    assert reload(directory=tmp_path) == 1
    expected = "titus-py: not reloaded: a.toml: x: wrong\ntitus-py: not reloaded: y\\x1b: also\n"
    assert capsys.readouterr().err == expected


def test_no_answer_to_a_reload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stuck:
        stuck.bind(str(tmp_path / "17.control"))
        stuck.listen()
        assert reload(directory=tmp_path, seconds=0.2) == 1
    assert "has not answered" in capsys.readouterr().err


def test_several_to_reload(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    instances = [start(pid, {"reloaded": True, "generation": 4}) for pid in (9, 17)]
    assert reload(directory=tmp_path) == 2
    assert "several instances are running, as 9, 17: say --pid" in capsys.readouterr().err
    assert not any(instance.asked for instance in instances)
    assert reload(pid=9, directory=tmp_path) == 0
    assert [len(instance.asked) for instance in instances] == [1, 0]
