"""Events as lines: each one line, whatever is in it, and never waited for."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titus_py.supervisor.log import _json as as_json
from titus_py.supervisor.log import as_text

ROOT = Path(__file__).parents[3]
NOW = "2026-01-02T03:04:05.678Z"


def run(program: str, *, input: bytes | None = None) -> "subprocess.CompletedProcess[bytes]":
    """In a process of its own, whose standard error is the log."""
    environment = {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"}
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        timeout=60,
        cwd=ROOT,
        env=environment,
        input=input,
        check=False,
    )


def read_late(program: str) -> tuple[bytes, list[dict[str, Any]]]:
    """The line that it prints while nobody reads its log, and the events that are read then."""
    reader, writer = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=writer, cwd=ROOT
    ) as process:
        os.close(writer)
        assert process.stdout is not None
        printed = process.stdout.readline()
        with os.fdopen(reader, "rb") as lines:
            events = [json.loads(line) for line in lines]
        assert process.wait(60) == 0
    return printed, events


# --- one line --------------------------------------------------------------------------


def test_an_event_is_a_line_of_words() -> None:
    fields: dict[str, object] = {"client": "[::1]:5", "seconds": 0.25, "detail": 'say "no"'}
    line = as_text(NOW, "info", "connection_ended", fields)
    words = f'{NOW} info connection_ended client=[::1]:5 seconds=0.25 detail="say \\"no\\""'
    assert line == words


def test_an_event_is_a_json_object() -> None:
    line = as_json(NOW, "error", "failed", {"count": 3, "all": True, "path": Path("/x")})
    assert json.loads(line) == {
        "time": NOW,
        "level": "error",
        "event": "failed",
        "count": 3,
        "all": True,
        "path": "/x",
    }


@given(st.text())
def test_any_text_stays_within_its_line_and_its_field(text: str) -> None:
    line = as_text(NOW, "info", "event", {"before": 1, "field": text, "after": 2})
    assert line.isprintable()
    assert line.startswith(f"{NOW} info event before=1 field=")
    assert line.endswith(" after=2")
    value = line.removeprefix(f"{NOW} info event before=1 field=").removesuffix(" after=2")
    if value.startswith('"'):
        assert json.loads(value) == text
    else:
        assert value == text
        assert not {" ", "=", '"', "\\"} & set(value)


@pytest.mark.parametrize(
    "text", ["\n", "\x1b[2J", "\x7f", "\x9b2J", "\u2028", "\u202e", "a\rb", "\udc80", "\0"]
)
def test_nothing_that_steers_a_terminal_gets_through(text: str) -> None:
    line = as_text(NOW, "info", "event", {"field": f"x{text}y"})
    assert line.isascii()
    assert line.isprintable()


@given(st.text())
def test_any_text_comes_back_from_json(text: str) -> None:
    line = as_json(NOW, "info", "event", {"field": text})
    assert json.loads(line)["field"] == text
    assert "\n" not in line
    assert "\r" not in line


# --- writing ---------------------------------------------------------------------------


def test_events_are_written_in_order_and_without_what_is_unknown() -> None:
    ended = run(
        "from titus_py.supervisor.log import Log\n"
        "log = Log('json')\n"
        "for number in range(1000): log('event', number=number, nothing=None)\n"
        "log('last', level='alarm')\n"
        "log.close()\n"
    )
    events = [json.loads(line) for line in ended.stderr.decode().splitlines()]
    assert [event.get("number") for event in events] == [*range(1000), None]
    assert set(events[0]) == {"time", "level", "event", "number"}
    assert (events[-1]["event"], events[-1]["level"]) == ("last", "alarm")


def test_a_text_that_is_no_unicode_does_not_end_the_log() -> None:
    ended = run(
        "from titus_py.supervisor.log import Log\n"
        "for form in ('text', 'json'):\n"
        "    log = Log(form)\n"
        "    log('event', name='\\udcff')\n"
        "    log.close()\n"
    )
    assert ended.returncode == 0
    assert len(ended.stderr.splitlines()) == 2
    assert json.loads(ended.stderr.splitlines()[1])["name"] == "\udcff"


def test_nobody_waits_for_a_reader_that_does_not_read() -> None:
    """More than the pipe and the queue hold; then the reader reads, and is told."""
    reader, writer = os.pipe()
    program = (
        "import sys, time\n"
        "from titus_py.supervisor.log import Log\n"
        "log = Log('json')\n"
        "started = time.monotonic()\n"
        "for number in range(40_000): log('event', number=number)\n"
        "print(time.monotonic() - started, flush=True)\n"
        "sys.stdin.read()\n"
        "for _ in range(100): time.sleep(0.01) or log('after')\n"
        "log.close(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writer,
        cwd=ROOT,
    ) as process:
        os.close(writer)
        assert process.stdout is not None
        assert process.stdin is not None
        assert float(process.stdout.readline()) < 60
        process.stdin.close()
        with os.fdopen(reader, "rb") as lines:
            events = [json.loads(line) for line in lines]
        assert process.wait(60) == 0
    lost = sum(event["count"] for event in events if event["event"] == "log_lines_lost")
    written = [event["number"] for event in events if event["event"] == "event"]
    assert lost > 0
    after = [event for event in events if event["event"] == "after"]
    assert lost + len(written) + len(after) == 40_000 + 100
    assert written == sorted(written)
    assert events[-1]["event"] == "after"


def test_long_lines_that_nobody_reads_do_not_fill_the_memory() -> None:
    """Whoever controls a child makes them as long as they may be. There is room for alarms."""
    program = (
        "import os\n"
        "from titus_py.supervisor.log import Log\n"
        "log = Log('json')\n"
        "before = int(open('/proc/self/statm').read().split()[1])\n"
        "for _ in range(1000): log('event', text='\U000e0001' * 10_000)\n"
        "for _ in range(20): log('alarming', level='alarm', text='x' * 10_000)\n"
        "log('event')\n"
        "after = int(open('/proc/self/statm').read().split()[1])\n"
        "print((after - before) * os.sysconf('SC_PAGE_SIZE'), log.lost, flush=True)\n"
        "log.close(60)\n"
    )
    printed, events = read_late(program)
    octets, lost = map(int, printed.split())
    names = [event["event"] for event in events]
    assert octets < 64 * 1024 * 1024
    assert names.count("alarming") == 20
    assert names.count("event") + lost == 1001


def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    program = (
        "import os, time\n"
        "from titus_py.supervisor.log import Log\n"
        "reader, writer = os.pipe()\n"
        "os.close(reader)\n"
        "os.dup2(writer, 2)\n"
        "log = Log('text')\n"
        "for _ in range(100): log('event')\n"
        "log.close()\n"
        "print('alive')\n"
    )
    started = time.monotonic()
    assert run(program).stdout == b"alive\n"
    assert time.monotonic() - started < 20


# --- which -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        ("info", ["info", "warning", "error", "alarm"]),
        ("warning", ["warning", "error", "alarm"]),
        ("error", ["error", "alarm"]),
        ("alarm", ["alarm"]),
    ],
)
def test_only_what_is_loud_enough_is_written(least: str, expected: list[str]) -> None:
    ended = run(
        "from titus_py.supervisor.events import LEVELS\n"
        "from titus_py.supervisor.log import Log\n"
        "log = Log('json')\n"
        f"log.least = {least!r}\n"
        "for level in LEVELS: log('event', level=level)\n"
        "log.close()\n"
        "print(log.lost)\n"
    )
    assert [json.loads(line)["level"] for line in ended.stderr.splitlines()] == expected
    assert ended.stdout == b"0\n", "what was not wanted is not lost"


def test_a_flood_leaves_room_for_alarms() -> None:
    """With a reader that does not read, and then does."""
    program = (
        "import sys\n"
        "from titus_py.supervisor.log import Log\n"
        "log = Log('json')\n"
        "for number in range(40_000): log('event', number=number)\n"
        "for number in range(500): log('alarming', level='alarm', number=number)\n"
        "for number in range(1000): log('event', number=number)\n"
        "print(flush=True)\n"
        "log.close(60)\n"
    )
    _, events = read_late(program)
    assert any(event["event"] == "log_lines_lost" for event in events)
    alarms = [event["number"] for event in events if event["event"] == "alarming"]
    assert alarms == list(range(500))
