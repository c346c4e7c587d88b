"""The journal's native protocol: what is sent is parsed back as systemd documents it."""

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titus_py.supervisor.journal import Journal, entry, is_standard_error


def parse(octets: bytes) -> dict[str, bytes]:
    """https://systemd.io/JOURNAL_NATIVE_PROTOCOL/, the receiving side."""
    fields: dict[str, bytes] = {}
    while octets:
        head, _, rest = octets.partition(b"\n")
        name, equals, value = head.partition(b"=")
        if equals:
            octets = rest
        else:
            (length,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            octets = rest[1:]
        assert name.decode() not in fields
        fields[name.decode()] = value
    return fields


class Journald:
    """The receiving end."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(10)

    def entry(self) -> dict[str, bytes]:
        octets, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
        if descriptors:
            assert octets == b""
            with open(descriptors[0], "rb") as file:
                octets = file.read()
        return parse(octets)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    receiver = Journald(tmp_path / "socket")
    yield receiver
    receiver.close()


def test_an_event() -> None:
    fields = {"connection": 17, "client": "[::1]:5", "detail": None, "server_name": "a b"}
    assert parse(entry("the line", "info", "connection_ended", fields)) == {
        "MESSAGE": b"the line",
        "PRIORITY": b"6",
        "SYSLOG_IDENTIFIER": b"titus-py",
        "TITUS_EVENT": b"connection_ended",
        "TITUS_CONNECTION": b"17",
        "TITUS_CLIENT": b"[::1]:5",
        "TITUS_SERVER_NAME": b"a b",
    }


@pytest.mark.parametrize(
    ("level", "priority"),
    [("info", b"6"), ("warning", b"4"), ("error", b"3"), ("alarm", b"1"), ("new", b"5")],
)
def test_priorities(level: str, priority: bytes) -> None:
    assert parse(entry("", level, "x", {}))["PRIORITY"] == priority


VALUES = st.text() | st.text(st.sampled_from("\n=A\0é\ud800")) | st.integers() | st.floats()


@settings(deadline=None)
@given(
    st.text(),
    st.text(),
    st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,40}", fullmatch=True), VALUES),
)
def test_a_value_cannot_pass_for_a_field(line: str, event: str, fields: dict[str, object]) -> None:
    def octets(value: object) -> bytes:
        return str(value).encode("utf-8", "backslashreplace")

    expected = {f"TITUS_{name.upper()}": octets(value) for name, value in fields.items()}
    expected["MESSAGE"] = octets(line)
    expected["PRIORITY"] = b"6"
    expected["SYSLOG_IDENTIFIER"] = b"titus-py"
    expected.setdefault("TITUS_EVENT", octets(event))
    if "event" not in fields:
        assert parse(entry(line, "info", event, fields)) == expected


@settings(deadline=None)
@given(st.text(min_size=1).filter(lambda name: name.upper() != "EVENT"))
def test_names_are_what_the_journal_takes(name: str) -> None:
    *_, last = parse(entry("", "info", "x", {name: 1}))
    assert len(last) <= 64
    assert last.startswith("TITUS_")
    assert all(c.isascii() and (c.isupper() or c.isdigit() or c == "_") for c in last)


def test_sending(journald: Journald, tmp_path: Path) -> None:
    Journal(str(tmp_path / "socket")).write(entry("hello", "info", "x", {"detail": "a\nB=c"}))
    received = journald.entry()
    assert received["MESSAGE"] == b"hello"
    assert received["TITUS_DETAIL"] == b"a\nB=c"


def test_what_is_too_long_for_a_datagram(journald: Journald, tmp_path: Path) -> None:
    Journal(str(tmp_path / "socket")).write(entry("x" * 5_000_000, "info", "x", {}))
    assert len(journald.entry()["MESSAGE"]) == 5_000_000


def test_a_journal_that_is_behind_does_not_block(journald: Journald, tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "socket"))
    started = time.monotonic()

    def fill() -> None:
        while True:
            journal.write(b"MESSAGE=x\n")

    with pytest.raises(BlockingIOError):
        fill()
    assert time.monotonic() - started < 5
    for _ in range(2):
        journald.entry()
    journal.write(b"MESSAGE=y\n")


def test_a_journal_that_is_restarted(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    journal = Journal(str(path))
    with pytest.raises(FileNotFoundError):
        journal.write(b"MESSAGE=1\n")
    first = Journald(path)
    journal.write(b"MESSAGE=2\n")
    assert first.entry()["MESSAGE"] == b"2"
    first.close()
    with pytest.raises(ConnectionRefusedError):
        journal.write(b"MESSAGE=3\n")
    path.unlink()
    second = Journald(path)
    journal.write(b"MESSAGE=4\n")
    assert second.entry()["MESSAGE"] == b"4"
    second.close()


def test_where_standard_error_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.fstat(2)
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    assert not is_standard_error()
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert is_standard_error()
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    assert not is_standard_error()
