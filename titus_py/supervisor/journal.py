"""Writes events to systemd's journal, by its native protocol: an event's fields stay fields.

Run by the supervisor, as root, on the log's own thread. The journal is trusted to keep what
it is sent; it may be slow, restarting or gone. Fields come from the parent, and some of them
from workers. A value with a line break is sent with its length, so that no part of it can pass
for another field.

The protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

import errno
import os
import re
import socket
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache

from keyd.linux.sealed import sealed_file

__all__ = ["PASSING", "SOCKET", "Journal", "entry", "is_standard_error"]

SOCKET = "/run/systemd/journal/socket"
#: What ``Journal.write`` raises while the journal is too slow, or being restarted.
PASSING = (BlockingIOError, ConnectionRefusedError, FileNotFoundError)
_IDENTIFIER = "titus-py"
#: syslog's numbers (syslog(3)). An alarm is 1, "action must be taken immediately". An emergency,
#: 0, would be written to every terminal (journald.conf(5), MaxLevelWall).
_PRIORITIES = {"info": 6, "warning": 4, "error": 3, "alarm": 1}
_UNKNOWN_PRIORITY = 5
_LENGTH = struct.Struct("<Q")
#: How long to wait for room in the journal's queue: a struct timeval of 0.1 s.
_WAIT = struct.pack("@ll", 0, 100_000)
_NOT_IN_A_NAME = re.compile("[^A-Z0-9_]")
_NAME_CHARACTERS = 64
_STANDARD_ERROR = 2


def is_standard_error() -> bool:
    """Whether standard error goes to the journal (systemd.exec(5), $JOURNAL_STREAM)."""
    try:
        status = os.fstat(_STANDARD_ERROR)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def entry(line: str, level: str, event: str, fields: Mapping[str, object]) -> bytes:
    """An event as one message to the journal.

    ``line`` is what ``journalctl`` shows; ``connection=5`` becomes TITUS_CONNECTION=5.
    """
    return b"".join(_encoded(line, level, event, fields))


def _encoded(line: str, level: str, event: str, fields: Mapping[str, object]) -> Iterator[bytes]:
    yield _field("MESSAGE", line)
    yield _field("PRIORITY", _PRIORITIES.get(level, _UNKNOWN_PRIORITY))
    yield _field("SYSLOG_IDENTIFIER", _IDENTIFIER)
    yield _field("TITUS_EVENT", event)
    for name, value in fields.items():
        if value is not None:
            yield _field(_field_name(name), value)


@lru_cache
def _field_name(name: str) -> str:
    return ("TITUS_" + _NOT_IN_A_NAME.sub("_", name.upper()))[:_NAME_CHARACTERS]


def _field(name: str, value: object) -> bytes:
    octets = str(value).encode("utf-8", "backslashreplace")
    if b"\n" in octets:
        return name.encode() + b"\n" + _LENGTH.pack(len(octets)) + octets + b"\n"
    return name.encode() + b"=" + octets + b"\n"


class Journal:
    """A socket to the journal that goes on working when the journal is restarted."""

    def __init__(self, path: str = SOCKET) -> None:
        """Does not connect: ``write`` sends to the path."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # Let the kernel wait: poll(2) cannot, for a datagram socket that is not connected.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _WAIT)

    def write(self, octets: bytes) -> None:
        """Send one entry, or raise OSError; either within a tenth of a second."""
        try:
            # To the path each time: a restarted journal has a new socket there.
            self._socket.sendto(octets, self._path)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._write_as_file(octets)

    def _write_as_file(self, octets: bytes) -> None:
        """Send an entry that is too long for a datagram as a sealed file."""
        descriptor = sealed_file("journal-entry", octets)
        try:
            rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", descriptor)
            # Not socket.send_fds, which ignores the address.
            self._socket.sendmsg([], [rights], 0, self._path)
        finally:
            os.close(descriptor)
