"""The process that minds a token, as it is, with a module that there is not."""

import json
import os
import socket
import subprocess
import sys

import pytest

from keyd.linux import seccomp
from keyd.system_calls import NOT_FOR_MODULES, unknown_to_modules
from keyd.token.messages import Down, decode

pytest.importorskip("pkcs11")

PATIENCE = 60.0
FILTER = seccomp.build_forbidding(NOT_FOR_MODULES, unknown_to_modules(False)).hex()
#: The first child cannot be forked.
_SCARCE = """
import errno, json, os, socket, sys
from keyd.token import minder
fork, calls = os.fork, []
def scarce():
    calls.append(1)
    if len(calls) == 1:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return fork()
os.fork = scarce
minder.mind(json.loads(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
"""


def test_a_process_that_cannot_be_made_is_tried_again() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    settings = {
        **dict.fromkeys(("token", "manufacturer", "model", "serial", "pin_file")),
        "module": "/nonexistent/module.so",
        "keys": [],
        "uid": os.getuid(),
        "gid": os.getgid(),
        "groups": [],
        "paths": [],
        "network": False,
        "filter": FILTER,
    }
    command = [sys.executable, "-c", _SCARCE, json.dumps(settings), str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        ours.settimeout(PATIENCE)
        scarce, other = (decode(ours.recv(1000)) for _ in range(2))
        ours.close()
        assert process.wait(PATIENCE) == 0
    why = "no process can be made for it: Resource temporarily unavailable"
    assert scarce == Down(False, why)
    assert isinstance(other, Down)
    assert "the module /nonexistent/module.so cannot be used" in other.why
