"""Finds running instances and asks them: the client's side of the control sockets.

Run by ``titus-py status`` and ``titus-py reload``, as root. Each instance has one socket in a
directory of root's, named after its supervisor's process id. Answers are trusted; only their
form (a JSON object) is checked.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keyd.linux.descriptors import receive_descriptors
from keyd.linux.sealed import read_all
from titus_py.supervisor.control import CONTROL_DIRECTORY, listens

__all__ = ["DIRECTORY", "NoAnswer", "ask", "find_instances", "instances_to_ask"]

DIRECTORY = CONTROL_DIRECTORY
_SUFFIX = ".control"
_MAX_ANSWER_OCTETS = 4 * 1024 * 1024
#: How soon to try again when the listen queue is full.
_QUEUE_SECONDS = 0.02


class NoAnswer(Exception):
    """An instance did not answer; the text says why."""


def find_instances(directory: Path = DIRECTORY) -> list[int]:
    """The process ids of the instances that listen, lowest first. Raises PermissionError.

    A socket that a killed instance has left behind is passed over.
    """
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    pids = [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]
    return [
        pid
        for pid in sorted(int(pid) for pid in pids if pid.isdecimal())
        if listens(Path(_path(pid, directory)))
    ]


def instances_to_ask(command: str, pid: int | None, directory: Path = DIRECTORY) -> list[int]:
    """All running instances, or only ``pid``. If there is none, says why on standard error."""
    try:
        running = find_instances(directory)
    except PermissionError:
        print(f"titus-py: {command} must be run as root", file=sys.stderr)
        return []
    if pid is not None and pid not in running:
        print(f"titus-py: no instance runs as process {pid}", file=sys.stderr)
        return []
    if not running:
        print("titus-py: no instance is running", file=sys.stderr)
    return running if pid is None else [pid]


def ask(
    pid: int, question: Mapping[str, object], seconds: float, directory: Path = DIRECTORY
) -> dict[str, Any]:
    """Ask an instance, and wait up to ``seconds`` for its answer. Raises NoAnswer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            _connect(connection, _path(pid, directory), time.monotonic() + seconds)
            connection.settimeout(seconds)
            connection.send(json.dumps(question).encode())
            octets, files = receive_descriptors(connection, _MAX_ANSWER_OCTETS, 1)
            if files:
                # It was too long for a packet.
                octets = read_all(files[0])
        except TimeoutError:
            raise NoAnswer(f"process {pid} has not answered for {seconds:g} s") from None
        except OSError as error:
            raise NoAnswer(f"process {pid} does not answer: {error.strerror}") from None
    if not octets:
        raise NoAnswer(f"process {pid} has closed the connection without an answer")
    try:
        answer = json.loads(octets)
    except ValueError:
        raise NoAnswer(f"process {pid} has answered with something else than JSON") from None
    if not isinstance(answer, dict):
        raise NoAnswer(f"process {pid} has answered with something else than an object")
    return answer


def _connect(connection: socket.socket, path: str, deadline: float) -> None:
    """Connect, waiting for a place in the listen queue. Raises OSError."""
    connection.setblocking(False)
    while True:
        try:
            connection.connect(path)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(_QUEUE_SECONDS)


def _path(pid: int, directory: Path) -> str:
    return str(directory / f"{pid}{_SUFFIX}")
