"""``titus-py demo``, as it is typed."""

import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from .instance import TITUS_PY, Process, all_processes, eventually

#: A demo takes a few, where nothing else runs.
SECONDS = 240
#: The colours and the like that a terminal gets.
STYLE = re.compile(r"\x1b\[[0-9;]*m")


class Demo:
    """A running demo, whose temporary files are below a directory of the test's."""

    def __init__(self, temporary: Path, **options: object) -> None:
        temporary.mkdir()
        self.temporary = temporary
        self.process = subprocess.Popen(
            [TITUS_PY, "demo"],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(temporary), "COLUMNS": "80"},
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )

    def output(self) -> str:
        text: str = self.process.communicate(timeout=SECONDS)[0]
        return text

    def instance(self) -> list[Process]:
        """The processes that serve this demo's configuration, and those below them."""
        found = [
            process
            for process in all_processes()
            if str(self.temporary).encode() in command_line(process.pid)
            and process.parent == self.process.pid
        ]
        for above in found:
            found += [process for process in all_processes() if process.parent == above.pid]
        return found

    def assert_nothing_is_left(self, instance: Iterable[Process]) -> None:
        assert os.listdir(self.temporary) == []
        eventually(lambda: not set(instance) & set(all_processes()), "all processes gone")


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    return tmp_path / "temporary"


def test_shows_a_request_the_processes_and_where_the_key_is(temporary: Path) -> None:
    demo = Demo(temporary, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    instance: set[Process] = set()

    def is_over() -> bool:
        # All the time: it has live workers for a moment, and some are root's at their start.
        instance.update(demo.instance())
        return demo.process.poll() is not None

    eventually(is_over, "its end", SECONDS)
    output, errors = demo.process.communicate(timeout=SECONDS)
    assert (demo.process.returncode, errors) == (0, ""), output
    assert max(len(line) for line in output.splitlines()) <= 80
    assert "\x1b" not in output

    assert re.search(r"^Request +curl --cacert \S+ https://localhost:\d+/", output, re.M)
    assert re.search(r"^TLS +TLSv1\.3, TLS_\w+, \w+, certificate verified", output, re.M)
    assert re.search(r"^Answer +HTTP/1\.1 200 OK: Hello", output, re.M)

    rows = re.findall(r"^ (\S[\w: ]+?) +(\d+) +(\d+)  +((?:yes|no)\b.*\S) *$", output, re.M)
    roles = [row[0] for row in rows]
    assert roles.count("worker: this connection") == 1
    assert roles.count("worker: waiting for a client") == 2
    assert {"supervisor", "parent", "fork server", "keyd"} <= set(roles)
    seen = {(process.pid, process.uid) for process in instance}
    for role, pid, uid, key in rows:
        assert key.startswith("yes: d, dp, dq, p, q, qinv" if role == "keyd" else "no ("), role
        if role in ("supervisor", "parent", "fork server", "keyd"):
            assert (int(pid), int(uid)) in seen
    uids = [int(row[2]) for row in rows if row[0] not in ("supervisor", "parent", "fork server")]
    assert 0 not in uids
    assert len(set(uids)) == len(uids)

    for shown in ("Root directory", "Namespaces apart", "Capabilities", "System calls"):
        assert shown in output
    log_line = " ".join(output[output.index("in the log") :].split())
    assert re.search(r" connection_ended .*end=clean .*tls_version=TLSv1\.3 ", log_line)
    assert "found in keyd and nowhere else" in output.splitlines()[-1]
    demo.assert_nothing_is_left(instance)


def test_on_a_terminal(temporary: Path) -> None:
    ours, theirs = pty.openpty()
    demo = Demo(temporary, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    while True:
        try:
            output += os.read(ours, 65536)
        except OSError:  # EIO: nobody has the other end any more
            break
    os.close(ours)
    assert demo.process.wait(SECONDS) == 0
    text = STYLE.sub("", output.decode())
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "found in keyd and nowhere else" in text
    demo.assert_nothing_is_left([])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["at the start", "while it serves"])
def test_leaves_nothing_behind_when_interrupted(
    number: signal.Signals, moment: str, temporary: Path
) -> None:
    wanted = 1 if moment == "at the start" else 7
    # On a busy machine, a demo may be over before this process has looked, or has sent anything.
    for which in range(20):
        demo = Demo(
            temporary.with_name(f"demo {which}."),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        instance: list[Process] = []
        while len(instance) < wanted and demo.process.poll() is None:
            instance = demo.instance()
        # From somebody in a hurry, who does not stop before it has ended.
        while demo.process.poll() is None:
            demo.process.send_signal(number)
            time.sleep(0.001)
        output = demo.output()
        if demo.process.returncode != 0:
            break
        assert "found in keyd" in output
        demo.assert_nothing_is_left(instance)
    assert demo.process.returncode == 130, output
    assert "Traceback" not in output
    demo.assert_nothing_is_left(instance)


def test_says_that_it_has_to_be_root() -> None:
    # So that it can be read also where it is installed below /root.
    capability = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    result = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", *capability, TITUS_PY, "demo"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"titus-py: demo must be started as root.*\n", result.stderr)


def test_says_that_curl_is_missing(tmp_path: Path) -> None:
    result = subprocess.run(
        [TITUS_PY, "demo"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 1
    assert "curl" in result.stderr
