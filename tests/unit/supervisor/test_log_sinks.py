"""Where the log goes, and that nothing that can happen there happens to the proxy.

Each of these runs a program with the log on its own standard error.
"""

import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_journal import Journald

#: What every program below begins with.
HEAD = """
import sys, time
from titus_py.supervisor.log import Log
form, socket = sys.argv[1:]
log = Log(form, socket)
def step():
    sys.stdout.write("."); sys.stdout.flush(); sys.stdin.readline()
"""
FLOOD = """
started = time.monotonic()
for number in range(60_000):
    log("event", number=number, padding="x" * 200)
assert time.monotonic() - started < 60
print(log.lost > 10_000, flush=True)
"""


class Program:
    """A program that logs, and that waits for us at each ``step()``."""

    def __init__(
        self,
        text: str,
        stderr: int,
        form: str = "text",
        journal: Path = Path("/nonexistent"),
        journal_stream: str = "",
    ) -> None:
        environment = {"JOURNAL_STREAM": journal_stream} if journal_stream else {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEAD + text, form, str(journal)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
        )

    def said(self, line: bytes) -> bool:
        assert self.process.stdout is not None
        return self.process.stdout.readline() == line

    def reached(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.read(1) == b"."

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def ended(self) -> str:
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return out.decode()


def test_many_lines_are_few_writes_of_whole_lines() -> None:
    """A socket stands in for the pipe: each write is one message of it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    text = "log('alone')\nstep()\n"
    text += "for number in range(2000): log('connection_begun', number=number)\n"
    text += "log('urgent', number=2000)\nstep()\nlog.close()"
    program = Program(text, theirs.fileno())
    theirs.close()
    with ours:
        assert ours.recv(1 << 16).endswith(b" info alone\n")
        program.reached()
        program.go_on()
        program.reached()
        # All is written without the log's being closed.
        writes = [ours.recv(1 << 16)]
        while b" urgent " not in writes[-1]:
            writes.append(ours.recv(1 << 16))
        program.go_on()
        program.ended()
    assert all(len(written) <= select.PIPE_BUF and written.endswith(b"\n") for written in writes)
    lines = b"".join(writes).decode().splitlines()
    assert [line.split(" number=")[1] for line in lines] == [str(n) for n in range(2001)]
    assert len(writes) < len(lines) // 2


def test_a_full_disk() -> None:
    program = "for number in range(100): log('x', number=number)\nlog.close(); print(log.lost)"
    with open("/dev/full", "wb") as full:
        assert Program(program, full.fileno()).ended() == "100\n"


def test_a_disk_that_was_full_for_a_while(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for the disk: a line is cut off, the next ones are not written."""
    path = tmp_path / "log"
    program = """
import os, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log("before")
while not os.fstat(2).st_size: time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
for number in range(10): log("meanwhile", padding="x" * 50)
while log.lost < 10: time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log("after"); log("and_on"); log.close(); print(log.lost)
"""
    with path.open("wb") as file:
        assert Program(program, file.fileno()).ended() == "10\n"
    before, _cut, lost, after, and_on = path.read_text().splitlines()
    assert " info before" in before
    assert lost.endswith(" error log_lines_lost count=10")
    assert after.endswith(" info after")
    assert and_on.endswith(" info and_on")


def test_a_closed_pipe() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    program = "for _ in range(100): log('x')\nlog.close(); print(log.lost)"
    assert Program(program, theirs).ended() == "100\n"
    os.close(theirs)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_is_stuck_for_a_while(blocking: bool) -> None:
    """The program goes on, and says what was lost once it is read again."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, blocking)
    program = Program(FLOOD + "step()\nlog('again'); log.close(60); step()", theirs)
    os.close(theirs)
    assert program.said(b"True\n")
    program.reached()
    octets = bytearray()
    while b"number=15000 " not in octets:
        octets += os.read(ours, 1 << 20)
    program.go_on()
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    while b" again\n" not in octets and poll.poll(60_000):
        octets += os.read(ours, 1 << 20)
    program.go_on()
    program.ended()
    os.close(ours)
    logged = octets.decode().splitlines()
    assert logged[-1].endswith(" info again")
    reported = [int(line.split("count=")[1]) for line in logged if "log_lines_lost" in line]
    numbers = [line.split("number=")[1].split()[0] for line in logged if "number=" in line]
    assert len(numbers) == len(set(numbers))
    assert sum(reported) + len(numbers) == 60_000


def test_a_reader_that_is_stuck_for_good() -> None:
    ours, theirs = os.pipe()
    program = Program(FLOOD + "step()\nlog.close()", theirs)
    assert program.said(b"True\n")
    program.reached()
    started = time.monotonic()
    program.go_on()
    program.ended()
    assert time.monotonic() - started < 10
    os.close(ours)
    os.close(theirs)


# --- the journal ----------------------------------------------------------------------


def stream(descriptor: int) -> str:
    """As systemd sets $JOURNAL_STREAM."""
    status = os.fstat(descriptor)
    return f"{status.st_dev}:{status.st_ino}"


def test_the_journal_itself(tmp_path: Path) -> None:
    journald = Journald(tmp_path / "socket")
    ours, theirs = socket.socketpair()
    program = Program(
        "log('x', connection=5, detail='a\\nb'); log.form = 'json'; log('y'); log.close()",
        theirs.fileno(),
        journal=tmp_path / "socket",
        journal_stream=stream(theirs.fileno()),
    )
    theirs.close()
    found = journald.entry()
    assert found["MESSAGE"].endswith(rb' info x connection=5 detail="a\nb"')
    assert found["TITUS_CONNECTION"] == b"5"
    assert found["TITUS_DETAIL"] == b"a\nb"
    program.ended()
    assert json.loads(ours.recv(1000))["event"] == "y"
    ours.close()
    journald.close()


def test_standard_error_that_is_not_the_journal(tmp_path: Path) -> None:
    journald = Journald(tmp_path / "socket")
    ours, theirs = os.pipe()
    program = "log('x'); log.close()"
    Program(program, theirs, journal=tmp_path / "socket", journal_stream="1:2").ended()
    # The journal, but out of reach: its stream is better than nothing.
    Program(program, theirs, journal=tmp_path / "no", journal_stream=stream(theirs)).ended()
    assert os.read(ours, 1000).count(b" info x\n") == 2
    os.close(ours)
    os.close(theirs)
    journald.close()


def test_a_restart_of_the_journal_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = Journald(path)
    ours, theirs = socket.socketpair()
    program = Program(
        "log('one'); step()\nfor n in range(50): log('meanwhile', n=n)\nstep()\n"
        "log('two'); log.close(10)",
        theirs.fileno(),
        journal=path,
        journal_stream=stream(theirs.fileno()),
    )
    assert first.entry()["TITUS_EVENT"] == b"one"
    first.close()
    program.reached()
    program.go_on()
    program.reached()
    path.unlink()
    second = Journald(path)
    program.go_on()
    found = [second.entry() for _ in range(51)]
    assert [entry.get("TITUS_N") for entry in found[:50]] == [str(n).encode() for n in range(50)]
    assert found[50]["TITUS_EVENT"] == b"two"
    program.ended()
    for end in (ours, theirs, second):
        end.close()


def test_a_journal_that_is_stuck_blocks_nobody(tmp_path: Path) -> None:
    journald = Journald(tmp_path / "socket")
    ours, theirs = socket.socketpair()
    program = Program(
        FLOOD + "step()\nlog('again'); log.close(20)",
        theirs.fileno(),
        journal=tmp_path / "socket",
        journal_stream=stream(theirs.fileno()),
    )
    assert program.said(b"True\n")
    program.reached()
    received = lost = 0
    while (found := journald.entry())["TITUS_EVENT"] != b"again":
        if found["TITUS_EVENT"] == b"log_lines_lost":
            lost += int(found["TITUS_COUNT"])
        else:
            received += 1
            if received == 15_000:  # By now there is room in the queue again.
                program.go_on()
    assert lost > 10_000
    assert received + lost == 60_000
    program.ended()
    for end in (ours, theirs, journald):
        end.close()
