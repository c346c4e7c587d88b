"""The process that connects to upstreams, as it is, and what it answers where it is asked to."""

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from keyd.linux import seccomp
from keyd.linux.descriptors import receive_descriptors
from keyd.linux.sealed import sealed_file
from keyd.system_calls import CONNECTING
from keyd.upstream.connector import ABSENT, CONNECTED, FAILED, LOST, MAX_MESSAGE_OCTETS, WANTED

PATIENCE = 60.0


class Connector(NamedTuple):
    keyd: socket.socket
    path: Path
    pid: int

    def hear(self) -> bytes:
        message, descriptors = receive_descriptors(self.keyd, MAX_MESSAGE_OCTETS, 2)
        for one in descriptors:
            os.close(one)
        return message

    def answer(self, question: bytes) -> bytes:
        """What it says to this, and not by itself."""
        self.keyd.send(question)
        while (said := self.hear())[:1] == FAILED:
            pass
        return said


@pytest.fixture
def connector(tmp_path: Path) -> Iterator[Connector]:
    path = tmp_path / "socket"
    user = os.getuid(), os.getgid(), []
    told = {"paths": [str(path)], "user": user, "filter": seccomp.build(CONNECTING).hex()}
    settings = sealed_file("settings", json.dumps(told).encode())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE)
    with ours, theirs:
        given = settings, theirs.fileno()
        options = f"--settings-fd={settings}", f"--keyd-fd={theirs.fileno()}"
        command = [sys.executable, "-I", "-m", "keyd", "connect", *options]
        with subprocess.Popen(command, pass_fds=given) as process:
            os.close(settings)
            theirs.close()
            yield Connector(ours, path, process.pid)
            ours.close()
            assert process.wait(PATIENCE) == 0


def test_who_is_wanted_is_tried_at_once(connector: Connector) -> None:
    """By itself, it would wait for up to five seconds."""
    assert connector.hear() == FAILED + b"\0No such file or directory"
    assert connector.answer(WANTED + b"\0") == ABSENT + b"\0No such file or directory"
    with socket.socket(socket.AF_UNIX) as upstream:
        upstream.bind(str(connector.path))
        assert connector.answer(WANTED + b"\0") == ABSENT + b"\0Connection refused"
        upstream.listen(0)
        assert connector.answer(WANTED + b"\0") == CONNECTED + b"\0"
        # There is nothing to say of one that is there.
        connector.keyd.send(WANTED + b"\0")
        # Its queue is full by now: it may have room in a moment.
        connector.keyd.send(LOST + b"\0\0")
        connector.keyd.send(WANTED + b"\0")
        assert connector.hear() == FAILED + b"\0Resource temporarily unavailable"


def test_without_a_descriptor_it_tries_again(connector: Connector) -> None:
    assert connector.hear() == FAILED + b"\0No such file or directory"
    most = resource.prlimit(connector.pid, resource.RLIMIT_NOFILE, (1, 64))
    connector.keyd.send(WANTED + b"\0")
    while (said := connector.hear()) != FAILED + b"\0Too many open files":
        assert said == FAILED + b"\0No such file or directory"
    with socket.socket(socket.AF_UNIX) as upstream:
        upstream.bind(str(connector.path))
        upstream.listen()
        resource.prlimit(connector.pid, resource.RLIMIT_NOFILE, most)
        assert connector.answer(WANTED + b"\0") == CONNECTED + b"\0"
