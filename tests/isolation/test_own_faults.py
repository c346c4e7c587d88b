"""A fault of its own ends a confined process with a word, and not by a signal.

One that the filter kills looks as if it had been taken over. The faults are of those who order.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from integration.instance import PATIENCE, UIDS

from keyd.linux import seccomp
from keyd.linux.sealed import sealed_file
from keyd.system_calls import CONNECTING


def started(module: str, *arguments: object, given: list[int]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-I", "-m", module, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=given,
        env={},
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=PATIENCE)
    return process.returncode, said


def empty(directory: Path) -> Path:
    root = directory / "empty"
    root.mkdir(mode=0o555)
    return root


def packets() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE)
    return ours, theirs


def test_of_the_process_that_makes_keys(tmp_path: Path) -> None:
    uid = UIDS.take(1)[0]
    to = {"uid": uid, "gid": uid, "chroot": str(empty(tmp_path)), "must_lock": False}
    settings = sealed_file("settings", json.dumps(to).encode())
    ours, theirs = packets()
    with ours, theirs:
        options = f"--settings-fd={settings}", f"--orders-fd={theirs.fileno()}"
        process = started("keyd", "make", *options, given=[settings, theirs.fileno()])
        os.close(settings)
        ours.send(b"no order")
        code, said = ended(process)
    assert code == 1
    assert said.splitlines()[-1].startswith("keyd: JSONDecodeError: Expecting value")


def test_of_the_process_that_connects_to_upstreams() -> None:
    uid = UIDS.take(1)[0]
    told = {"paths": [], "user": (uid, uid, []), "filter": seccomp.build(CONNECTING).hex()}
    settings = sealed_file("settings", json.dumps(told).encode())
    ours, theirs = packets()
    with ours, theirs:
        options = f"--settings-fd={settings}", f"--keyd-fd={theirs.fileno()}"
        process = started("keyd", "connect", *options, given=[settings, theirs.fileno()])
        os.close(settings)
        ours.send(b"not of this length")
        # Its standard error is /dev/null in keyd, and its filter does not let it write.
        assert ended(process) == (1, "")


def test_of_the_process_that_reads_pins(tmp_path: Path) -> None:
    ours, theirs = packets()
    file = sealed_file("file", b"no certificate")
    ours.close()
    with theirs:
        arguments = "no", empty(tmp_path), theirs.fileno(), file
        process = started("titus_py.commands.pin_reader", *arguments, given=[theirs.fileno(), file])
    os.close(file)
    code, said = ended(process)
    assert code == 1
    assert said.startswith("titus-py: BrokenPipeError: ")


def test_of_the_audits_client(tmp_path: Path) -> None:
    ours, theirs = packets()
    peer, _ = socket.socketpair()
    with ours, theirs, peer:
        given = [theirs.fileno(), peer.fileno()]
        arguments = UIDS.take(1)[0], empty(tmp_path), *given
        process = started("titus_py.audit.client", *arguments, given=given)
        assert json.loads(ours.recv(1000)) == {"confined": True}
        ours.send(b"no order")
        code, said = ended(process)
    assert code == 1
    assert said.startswith("titus-py: the audit's client: JSONDecodeError: Expecting value")
