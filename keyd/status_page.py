"""What a keyd of its own tells of itself: a page of memory that root can read, by /proc.

Written by ``keyd listen`` and ``keyd control``, read by root (``inspection.reports``). So there is
no socket for it, no file, and no system call: keyd hears nobody who asks. A keyd that was taken
over can write there what it likes: the reader checks its form.

The page is a memory file (memfd_create(2)): CRC-32 and length of a text in JSON, four octets each,
most significant first, and the text. Who reads half of a new text sees it by the CRC, and reads
again.
"""

import json
import mmap
import os
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from keyd import mldsa
from keyd.powers import Key
from keyd.protocol import Refusal
from keyd.pss import PSSPublicKey
from keyd.tally import Tally
from keyd.token.keys import States, TokenKey

__all__ = [
    "HEAD",
    "NAME",
    "OCTETS",
    "TEXT_CHARACTERS",
    "VERSION",
    "Refused",
    "Report",
    "StatusPage",
]

#: The memory file's, as in /proc/PID/fd.
NAME = "keyd-status"
VERSION = 2
OCTETS = 256 * 1024
HEAD = struct.Struct("!II")
#: How many have a line of their own. All of them fit into the page, whatever is in them, except for
#: the keys: of these, fewer are told of where many have long names that are not ASCII.
_KEYS, _REFUSALS, _SOCKETS, _TOKENS = 128, 16, 32, 32
TEXT_CHARACTERS = 200


class Refused(NamedTuple):
    """A refusal: when, what, and which process had asked."""

    at: float
    status: str
    detail: str
    process: int


class Report(NamedTuple):
    """What one keyd says of itself. Times are seconds since 1970."""

    command: str
    started: float
    sockets: list[str]
    #: Some of the keys: the file's path or ``TokenKey.full_name``, the kind, and the SHA-256 of the
    #: public key.
    keys: list[list[str]]
    keys_in_all: int
    signed: int
    decrypted: int
    refused: dict[str, int]
    last_refused: list[Refused]
    #: As in the tally's totals.
    seconds: list[int]
    seconds_sum: float
    #: The tokens: name, state, and what ``States.counts`` has of it.
    tokens: list[tuple[str, str, list[int]]]


class StatusPage:
    """Made before keyd is confined; ``write`` is called once a second."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._sockets: Sequence[str] = ()
        self._started = time.time()
        self._refused: deque[Refused] = deque(maxlen=_REFUSALS)
        self._keys: Mapping[bytes, Key] = {}
        self._paths: Callable[[], Mapping[bytes, str]] = dict
        self._tally = Tally()
        self._states = States(())
        self._tokens: list[tuple[str, str, list[int]]] = []
        self._lines: list[list[str]] = []
        self._keys_changed = True
        self._lock = threading.Lock()
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC)
        os.ftruncate(descriptor, OCTETS)
        # It keeps a descriptor of its own, by which the page is found.
        self._memory = mmap.mmap(descriptor, OCTETS)
        os.close(descriptor)

    def refused(self, refusal: Refusal, process: int) -> None:
        """Keep one of the last refusals in mind."""
        detail = refusal.detail[:TEXT_CHARACTERS]
        self._refused.append(Refused(time.time(), refusal.status.name.lower(), detail, process))

    def keys_changed(self) -> None:
        """Whenever a key has come or gone."""
        self._keys_changed = True

    def tell_of(
        self,
        keys: Mapping[bytes, Key],
        paths: Callable[[], Mapping[bytes, str]],
        sockets: Sequence[str],
        tally: Tally,
        states: States,
    ) -> None:
        """Tell of these from now on. ``paths`` are the keys' files, by the keys' ids."""
        self._keys, self._paths, self._tally, self._states = keys, paths, tally, states
        self._sockets = sockets[:_SOCKETS]
        self.write()

    def write(self) -> None:
        """Tell what there is to be told, if it has changed."""
        with self._lock:
            news, before = self._tally.news(), self._tokens
            counts = self._states.counts()
            self._tokens = [
                (name[:TEXT_CHARACTERS], state[:TEXT_CHARACTERS], counts[name])
                for name, state in self._states.all()[:_TOKENS]
            ]
            # First: what another thread changes from here on is told of the next time.
            changed, self._keys_changed = self._keys_changed, False
            if news is None and not changed and self._tokens == before:
                return
            # A copy: another thread may take a key in, or let go of one.
            keys = dict(self._keys)
            if changed:
                paths = self._paths()
                self._lines = [
                    [_name(paths.get(identity, ""), key), _kind(key), identity.hex()]
                    for identity, key in list(keys.items())[:_KEYS]
                ]
            report = Report(
                self._command,
                self._started,
                list(self._sockets),
                self._lines,
                len(keys),
                last_refused=list(self._refused),
                tokens=self._tokens,
                **(news or self._tally.totals()),
            )
            text = _text(report)
            while len(text) > OCTETS - HEAD.size and report.keys:
                report = report._replace(keys=report.keys[: len(report.keys) // 2])
                text = _text(report)
            head = HEAD.pack(zlib.crc32(text), len(text))
            self._memory[: len(head) + len(text)] = head + text


def _text(report: Report) -> bytes:
    return json.dumps({"version": VERSION, **report._asdict()}).encode()


def _name(path: str, key: Key) -> str:
    name = path or (key.full_name if isinstance(key, TokenKey) else "")
    return name[:TEXT_CHARACTERS]


def _kind(key: Key) -> str:
    public = key.public_key()
    if isinstance(public, PSSPublicKey):
        return f"RSA-{public.key.key_size}, bound to PSS"
    if parameter_set := mldsa.parameter_set(public):
        return parameter_set
    if isinstance(public, rsa.RSAPublicKey):
        return f"RSA-{public.key_size}"
    if isinstance(public, ec.EllipticCurvePublicKey):
        return public.curve.name
    return "Ed25519"
