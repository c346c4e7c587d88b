"""Pins: the hashes by which public keys are known, and the process that finds them.

Run by ``titus-py keys``, as root or as anybody. What is to be read goes to a confined process
(``pin_reader``), whose answer is strictly decoded: a stranger may have written what it read.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from keyd.linux.process import signals_held_back

__all__ = ["MAX_ANSWER_OCTETS", "MOST_KEYS", "Known", "Shown", "Unread", "read_pins"]

MOST_KEYS = 16
MAX_ANSWER_OCTETS = 64 * 1024
_COMMAND = (sys.executable, "-I", "-m", "titus_py.commands.pin_reader")
_CHROOT = Path("/run/titus-py/empty")


class Unread(Exception):
    """What was to be read has no pin, or the process failed; the text says why."""


class Known(NamedTuple):
    """A public key: its pin, the name in its certificate and until when that is valid, or ""."""

    pin: str
    subject: str
    until: str


class Shown(NamedTuple):
    """The keys that were found, and how many more there are."""

    keys: Sequence[Known]
    left_out: int


def read_pins(
    source: int, server_name: str | None, seconds: float, starttls: str | None = None
) -> Shown:
    """The keys of a file, or those that a TLS server shows.

    ``source`` is a descriptor: of the file, to be read, or of a connected socket. ``server_name``
    is None for a file; for a server it is the name to ask it for, "" for none. ``starttls`` is the
    protocol by which it is first asked for TLS. Raises Unread.
    """
    if os.geteuid() == 0:
        _CHROOT.mkdir(mode=0o555, parents=True, exist_ok=True)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = "no" if server_name is None else f"{starttls or 'tls'}:{server_name}"
    with ours:
        ours.settimeout(seconds)
        with theirs, signals_held_back():
            process = subprocess.Popen(
                [*_COMMAND, server, str(_CHROOT), str(theirs.fileno()), str(source)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(), source),
                env={},  # Above all no OPENSSL_CONF, which could have it load anything.
            )
        with process:
            try:
                answer = ours.recv(MAX_ANSWER_OCTETS)
            except TimeoutError:
                raise Unread(f"no answer within {seconds:g} s") from None
            finally:
                process.kill()
            said = process.stderr.read(4096).decode(errors="replace") if process.stderr else ""
    if not answer:
        reason = said.strip().rpartition("\n")[2] or "no message"
        raise Unread(f"the process that reads it has ended ({process.returncode}): {reason}")
    return _decoded(answer)


def _decoded(answer: bytes) -> Shown:
    try:
        told = json.loads(answer)
    except (ValueError, RecursionError):
        raise Unread("the process that reads it has given no answer") from None
    match told:
        case {"problem": str(problem)} if problem:
            raise Unread(problem)
        case {"keys": [*keys], "left_out": int(left_out)} if 0 < len(keys) <= MOST_KEYS:
            return Shown([_key(one) for one in keys], left_out)
    raise Unread("the process that reads it has given no answer")


def _key(told: object) -> Known:
    match told:
        case [str(digest), str(subject), str(until)] if re.fullmatch("[0-9a-f]{64}", digest):
            return Known(f"sha256:{digest}", subject, until)
    raise Unread("the process that reads it has given no answer")
