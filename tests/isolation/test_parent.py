"""What code in the parent could do that is not ours: each is attempted, after a control."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import prctl
import pytest
from integration.peers import connect

from keyd.linux import seccomp
from titus_py.parent.system_calls import FAILING, parent_calls

from .harness import infected, make_certificate

UID = 2_000_000_009
#: Of the sockets of a backend.
GID = 2_000_000_011
USUAL = {"end a worker", "connect to a backend"}
FILES = {
    "read what is root's",
    "read what is everybody's",
    "read another process's memory",
    "write a file",
    "see whether there is a file",
    "list a directory",
}
#: What is attempted, by name: each raises OSError if it is refused. Each is attempted in a process
#: of its own, as root and then confined as the parent is: a filter that kills leaves no second try.
ATTEMPTS = """
import ctypes, errno, json, mmap, os, signal, socket, sys
from keyd.linux import seccomp
from titus_py.parent.confinement import confine

settings = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
program = seccomp.Program(bytes.fromhex(settings["filter"]))
listener = socket.create_server(("127.0.0.1", 0))
address = listener.getsockname()
unbound = socket.socket()
pair = socket.socketpair()

def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)

def connect(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)

def use(*kind):
    socket.socket(*kind).close()

def fork():
    if not os.fork():
        os._exit(0)

def end(victim):
    signal.pidfd_send_signal(victim, signal.SIGKILL)

ATTEMPTS = {
    "read what is root's": lambda: os.open("/etc/shadow", os.O_RDONLY),
    "read what is everybody's": lambda: os.open(settings["file"], os.O_RDONLY),
    "read another process's memory": lambda: os.open(settings["environ"], os.O_RDONLY),
    "write a file": lambda: os.open(settings["file"], os.O_WRONLY),
    "see whether there is a file": lambda: os.stat(settings["file"]),
    "remove a file": lambda: os.unlink(settings["file"] + ".removed"),
    "list a directory": lambda: os.listdir("/etc"),
    "connect to everybody's socket": lambda: connect(settings["everybody"]),
    "connect to a group's socket": lambda: connect(settings["group"]),
    "connect to root's socket": lambda: connect(settings["root"]),
    "become root": lambda: os.setresuid(0, 0, 0),
    "become a worker": lambda: os.setresuid(settings["uid"] - 1, 0, 0),
    "have a group": lambda: os.setgroups([0]),
    "trace a process": lambda: call("ptrace", 0x4206, os.getppid(), None, None),
    "stop a worker": lambda: signal.pidfd_send_signal(settings["victim"], signal.SIGCONT),
    "signal by pid": lambda: os.kill(os.getppid(), 0),
    "find a process": lambda: os.pidfd_open(os.getppid()),
    "execute a program": lambda: os.execv("/bin/true", ["true"]),
    "make a process": fork,
    "bind": lambda: socket.socket().bind(("127.0.0.1", 0)),
    "listen": lambda: listener.listen(7),
    "use a raw socket": lambda: use(socket.AF_INET, socket.SOCK_RAW, 1),
    "use a packet socket": lambda: use(socket.AF_PACKET, socket.SOCK_RAW),
    "use a datagram socket": lambda: use(socket.AF_INET, socket.SOCK_DGRAM),
    "ask for routes": lambda: use(socket.AF_NETLINK, socket.SOCK_RAW, 0),
    "take another's address": lambda: unbound.setsockopt(0, socket.IP_TRANSPARENT, 1),
    "mark what it sends": lambda: unbound.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1),
    "change its root": lambda: os.chroot("/"),
    "make a mount namespace": lambda: call("unshare", 0x20000),
    "make memory executable": lambda: mmap.mmap(-1, 4096, prot=5),
    "map a file": lambda: mmap.mmap(settings["open"], 0, mmap.MAP_SHARED, mmap.PROT_READ),
    "ask who has connected": lambda: pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12),
    "set a timer": lambda: signal.setitimer(signal.ITIMER_REAL, 60),
    "end a worker": lambda: end(settings["victim"]),
    "connect to a backend": lambda: socket.socket().connect(address),
}
def tried(name, confined):
    pid = os.fork()
    if not pid:
        try:
            if confined:
                confine(settings["uid"], settings["groups"], settings["capabilities"], program)
        except BaseException:
            os.abort()
        try:
            ATTEMPTS[name]()
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    code = os.WEXITSTATUS(status)
    return errno.errorcode[code] if code else ""

open(settings["file"] + ".removed", "w").close()
control = {name: tried(name, False) for name in ATTEMPTS if name != "end a worker"}
open(settings["file"] + ".removed", "w").close()
os.write(1, json.dumps([control, {name: tried(name, True) for name in ATTEMPTS}]).encode())
"""


def run(code: str, calls: seccomp.Rules, first: str = "") -> "subprocess.CompletedProcess[bytes]":
    """Run this in a process that is confined as the parent is, after what comes first."""
    program = seccomp.build(calls, failing=FAILING).hex()
    confined = (
        "from keyd.linux import seccomp\n"
        "from titus_py.parent.confinement import confine\n"
        f"confine({UID}, [], [], seccomp.Program(bytes.fromhex({program!r})))\n"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", first + confined + code],
        capture_output=True,
        check=False,
        timeout=240,
    )


def attempted(
    *capabilities: int,
    unix: bool = False,
    source: bool = False,
    groups: tuple[int, ...] = (),
    unix_clients: bool = False,
) -> list[dict[str, str]]:
    """How each attempt ended, as root and in a parent: an empty text is a success."""
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        socket.socket(socket.AF_UNIX) as everybodys,
        socket.socket(socket.AF_UNIX) as groups_own,
        socket.socket(socket.AF_UNIX) as roots,
        subprocess.Popen(["sleep", "600"], user=UID + 1) as victim,
    ):
        Path(directory).chmod(0o777)
        file = Path(directory, "file")
        file.write_text("x")
        file.chmod(0o666)
        for name, listener, mode in (
            ("everybody", everybodys, 0o666),
            ("group", groups_own, 0o660),
            ("root", roots, 0o600),
        ):
            listener.bind(f"{directory}/{name}")
            Path(directory, name).chmod(mode)
            listener.listen()
        os.chown(f"{directory}/group", 0, GID)
        pidfd = os.pidfd_open(victim.pid)
        opened = os.open(file, os.O_RDONLY)
        settings = {
            "uid": UID,
            "groups": groups,
            "capabilities": capabilities,
            "filter": seccomp.build(
                parent_calls(unix, source, unix_clients), failing=FAILING
            ).hex(),
            "file": str(file),
            "everybody": f"{directory}/everybody",
            "group": f"{directory}/group",
            "root": f"{directory}/root",
            "victim": pidfd,
            "open": opened,
            "environ": f"/proc/{os.getpid()}/environ",
        }
        ran = subprocess.run(
            [sys.executable, "-I", "-c", ATTEMPTS, json.dumps(settings)],
            capture_output=True,
            check=False,
            timeout=240,
            pass_fds=(pidfd, opened),
        )
        os.close(pidfd)
        os.close(opened)
        victim.kill()
    assert ran.returncode == 0, ran.stderr.decode()
    found: list[dict[str, str]] = json.loads(ran.stdout)
    return found


def succeeded(attempts: dict[str, str]) -> set[str]:
    return {name for name, refusal in attempts.items() if not refusal}


@pytest.fixture(scope="module")
def found() -> list[dict[str, str]]:
    return attempted(prctl.CAP_KILL)


def test_as_root_all_of_it_can_be_done(found: list[dict[str, str]]) -> None:
    assert {name: refusal for name, refusal in found[0].items() if refusal} == {}


def test_the_parent_can_end_a_worker_and_connect_to_a_backend_and_nothing_else(
    found: list[dict[str, str]],
) -> None:
    assert succeeded(found[1]) == USUAL


def test_it_is_killed_for_each_attempt_but_for_looking_for_a_file(
    found: list[dict[str, str]],
) -> None:
    """Which fails: Python looks for its source before it writes a traceback."""
    refusals = {name: refusal for name, refusal in found[1].items() if refusal}
    assert refusals == {name: "EPERM" if name in FILES else "SIGSYS" for name in refusals}


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        # With the capability, it is for connect(2) alone: nothing else takes a file's name.
        (
            ((prctl.CAP_DAC_OVERRIDE,), True, False, ()),
            {
                "connect to everybody's socket",
                "connect to a group's socket",
                "connect to root's socket",
                "set a timer",
            },
        ),
        # In a group, without the capability: what is the group's.
        (
            ((), True, False, (GID,)),
            {"connect to everybody's socket", "connect to a group's socket", "set a timer"},
        ),
        (((), True, False, ()), {"connect to everybody's socket", "set a timer"}),
        # With the capability, it is for addresses: not for packets.
        (((prctl.CAP_NET_RAW,), False, True, ()), {"bind", "take another's address"}),
    ],
    ids=["unix sockets", "a group's", "everybody's", "clients' addresses"],
)
def test_where_the_configuration_takes_it_the_parent_can_do_more(
    settings: tuple[tuple[int, ...], bool, bool, tuple[int, ...]], more: set[str]
) -> None:
    capabilities, unix, source, groups = settings
    _, found = attempted(prctl.CAP_KILL, *capabilities, unix=unix, source=source, groups=groups)
    assert succeeded(found) == USUAL | more


def test_whom_it_asks_where_clients_are_on_a_unix_socket() -> None:
    """And a timer ends what closing one may wait for, as where a backend is on one."""
    _, found = attempted(prctl.CAP_KILL, unix_clients=True)
    assert succeeded(found) == USUAL | {"ask who has connected", "set a timer"}


#: As in Python 3.14, which tries to load that module then, and does without it if it cannot.
IMPORTS_LATE = """
import sys
def hook(*error):
    try:
        import traceback
    except ImportError:
        sys.__excepthook__(*error)
sys.excepthook = hook
"""


@pytest.mark.parametrize("first", ["", "import traceback\n", IMPORTS_LATE])
def test_the_reason_of_an_end_that_nobody_has_foreseen_is_told(first: str) -> None:
    """Python 3.13 writes it by that module, if it is loaded."""
    code = 'raise ValueError("nobody\'s fault")'
    ran = run(code, parent_calls(False, False), first)
    assert ran.returncode == 1
    assert ran.stderr.endswith(b"ValueError: nobody's fault\n")


@pytest.mark.parametrize(
    ("without", "how"), [((), "killed by SIGSYS"), (("parent filter",), "exited with 0")]
)
def test_the_real_one_executes_no_program(
    tmp_path: Path, without: tuple[str, ...], how: str
) -> None:
    with infected(
        tmp_path, make_certificate(tmp_path), "127.0.0.1:1", ("parent serves", *without)
    ) as instance:
        instance.expected_alarms.add("parent_died")
        with connect(instance.port) as client:
            client.sendall(b"x")
            assert instance.wait_for_event("parent_died")["how"] == how
