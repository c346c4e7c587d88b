"""What a worker says of its connection: a page that it writes and the supervisor reads.

The parent makes the page before it orders the worker. The worker finds it at an address that
the fork server has reserved, and keeps it up to date by storing into memory. So there is no
message that could flood, and none that a killed worker could fail to send. The supervisor reads
the page when the worker has ended. It is for the record, and the supervisor trusts none of it.
The parent, which knows of all connections, does not read what a client's worker wrote.
"""

import fcntl
import os
import struct
from enum import IntEnum
from typing import Any, NamedTuple

from keyd.linux.calls import memory
from keyd.linux.memory import PAGE_OCTETS, map_private

__all__ = [
    "End",
    "NoReport",
    "Report",
    "ReportWriter",
    "State",
    "complete_record",
    "make_report",
    "read_report",
]

#: state, end, octets from the client, octets to the client, then text: TLS version,
#: cipher suite, group, server name, detail; the client certificate's subject, issuer, serial
#: number and public key.
_LAYOUT = struct.Struct("=BBxxxxxxQQ16s64s48s256s256s256s256s48s72s")
_OCTETS = 2048
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
#: Where these fields are.
_PLACES = {
    "state": slice(0, 1),
    "end": slice(1, 2),
    "tls_version": slice(24, 40),
    "cipher_suite": slice(40, 104),
    "group": slice(104, 152),
    "server_name": slice(152, 408),
    "detail": slice(408, 664),
    "certificate_subject": slice(664, 920),
    "certificate_issuer": slice(920, 1176),
    "certificate_serial": slice(1176, 1224),
    "certificate_spki": slice(1224, 1296),
}
_CERTIFICATE = tuple(place for place in _PLACES if place.startswith("certificate_"))
#: Where the numbers of octets are.
_COUNTS = slice(8, 24)


class NoReport(ValueError):
    """A descriptor is not that of a worker's report."""


class State(IntEnum):
    """How far the worker has come."""

    CONFINING = 0
    WAITING = 1
    HANDSHAKE = 2
    ESTABLISHED = 3
    ENDED = 4


class End(IntEnum):
    """How a connection ended, as the worker saw it."""

    NONE = 0
    CLEAN = 1
    NOT_TLS = 2
    PLAIN_HTTP = 3
    BAD_CLIENT_HELLO = 4
    NO_VIRTUAL_HOST = 5
    HANDSHAKE_FAILED = 6
    HANDSHAKE_TIMEOUT = 7
    CLIENT_LEFT = 8
    CLIENT_RESET = 9
    CLIENT_TRUNCATED = 10
    CLIENT_PROTOCOL_ERROR = 11
    BACKEND_UNAVAILABLE = 12
    BACKEND_RESET = 13
    WORKER_FAILED = 14
    IDLE = 15
    HALF_CLOSED = 16
    NO_APPLICATION_PROTOCOL = 17
    CLIENT_CERTIFICATE = 18
    BAD_PROXY_HEADER = 19
    PROXY_TIMEOUT = 20
    # Of a tunnel, whose server is the TLS side.
    SERVER_CERTIFICATE = 21
    SERVER_LEFT = 22
    SERVER_RESET = 23
    SERVER_TRUNCATED = 24
    SERVER_PROTOCOL_ERROR = 25
    STARTTLS_REFUSED = 26


class Report(NamedTuple):
    """One reading of a worker's page."""

    state: State
    end: End
    octets_from_client: int
    octets_to_client: int
    tls_version: str
    cipher_suite: str
    group: str
    server_name: str
    detail: str
    #: Of the certificate that the client has shown, or a tunnel's server; empty if none was.
    certificate_subject: str = ""
    certificate_issuer: str = ""
    certificate_serial: str = ""
    certificate_spki: str = ""


class ReportWriter:
    """The worker's side."""

    def __init__(self) -> None:
        """Made by the fork server, over a page of its own. In a worker, the report is there."""
        #: Where that page is.
        self.address = map_private(PAGE_OCTETS)
        self._page = memory(self.address, PAGE_OCTETS)
        counts = self._page[_COUNTS].cast("Q")
        #: How many octets have passed so far, from the client and to it: a number each.
        self.from_client, self.to_client = counts[:1], counts[1:]

    def set(self, **fields: int | str) -> None:
        """Store these fields of Report, except for the octets."""
        for name, value in fields.items():
            place = _PLACES[name]
            if isinstance(value, str):
                length = place.stop - place.start
                self._page[place] = value.encode("utf-8", "replace")[:length].ljust(length, b"\0")
            else:
                self._page[place.start] = value


def make_report() -> int:
    """A page of zeros for one worker: a memory file whose size is sealed, close-on-exec."""
    descriptor = os.memfd_create("report", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, _OCTETS)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


def read_report(descriptor: int) -> Report:
    """Read what the worker wrote. Whatever it wrote, the result is a valid Report.

    Raises NoReport for a descriptor that ``make_report`` has not made: reading it might wait.
    """
    try:
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        sealed = False
    if not sealed or os.fstat(descriptor).st_size != _OCTETS:
        raise NoReport("no report")
    state, end, from_client, to_client, *texts = _LAYOUT.unpack(
        os.pread(descriptor, _LAYOUT.size, 0)
    )
    return Report(
        State(state) if state in State._value2member_map_ else State.ENDED,
        End(end) if end in End._value2member_map_ else End.NONE,
        from_client,
        to_client,
        *map(_text, texts),
    )


def complete_record(ended: dict[str, Any], report: Report) -> str:
    """Add what a worker said to what the parent knows of a connection's end; returns the event.

    ``end`` in ``ended`` is empty if the worker ended by itself. Our code then has said why.
    """
    if not ended["end"] and report.end is End.NONE:
        # Our code always says why. Code that leaves without a word is not ours.
        ended |= {"level": "alarm", "end": "exited without a word"}
    ended |= {
        "server_name": report.server_name or None,
        "tls_version": report.tls_version or None,
        "cipher_suite": report.cipher_suite or None,
        "group": report.group or None,
        "octets_from_client": report.octets_from_client,
        "octets_to_client": report.octets_to_client,
        "end": ended["end"] or report.end.name.lower(),
        "detail": report.detail or None,
    }
    ended |= {name: value for name in _CERTIFICATE if (value := getattr(report, name))}
    if report.tls_version:
        return "connection_ended"
    return "handshake_failed" if ended.get("tunnel") is None else "tunnel_failed"


def _text(octets: bytes) -> str:
    text = octets.partition(b"\0")[0].decode("utf-8", "replace")
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)
