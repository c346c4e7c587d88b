"""What code in the metrics server could do that is not ours: each is attempted, after a control.

Each attempt is made by the program itself (``titus_py/metrics/life.py``), confined and serving, at
the moment when a client has sent its request. The control is the same without confinement.
"""

import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from keyd.linux import seccomp
from titus_py.metrics.system_calls import SERVING_METRICS

UID = 2_000_000_013
_SIGSYS = -31
#: What is attempted: each raises OSError if it is refused.
ATTEMPTS = """
import ctypes, json, os, resource, socket, sys
from keyd.linux.calls import NUMBERS
from keyd.linux.sealed import sealed_file
from titus_py.metrics import confinement, life

settings = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_ssize_t
held = {}

def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)

def connect(family, address):
    with socket.socket(family) as client:
        client.connect(address)

def listen():
    with socket.create_server(("127.0.0.1", 0)):
        pass

def fork():
    if not os.fork():
        os._exit(0)

def readable(path):
    with open(path) as file:
        file.read(1)

ATTEMPTS = {
    "nothing": lambda: None,
    "read a file": lambda: readable(settings["file"]),
    "write a file": lambda: open(settings["file"] + ".new", "w").close(),
    "write to what is open": lambda: os.write(held["file"], b"x"),
    "list the root": lambda: os.listdir("/"),
    "see its supervisor": lambda: readable(f"/proc/{os.getppid()}/status"),
    "see all processes": lambda: os.listdir("/proc"),
    "make a socket": lambda: socket.socket().close(),
    "connect by TCP": lambda: connect(socket.AF_INET, tuple(settings["tcp"])),
    "connect a socket that it has": lambda: held["stream"].connect(tuple(settings["tcp"])),
    "bind a socket that it has": lambda: held["stream"].bind(("127.0.0.1", 0)),
    "connect to root's socket": lambda: connect(socket.AF_UNIX, settings["socket"]),
    "send to an address": lambda: held["datagrams"].sendto(b"x", tuple(settings["udp"])),
    "listen": listen,
    "end listening": lambda: held["listener"].shutdown(socket.SHUT_RD),
    "set an option of the socket": lambda: held["listener"].setsockopt(1, 2, 1),
    "signal its supervisor": lambda: os.kill(os.getppid(), 0),
    "trace its supervisor": lambda: call("ptrace", 0x4206, os.getppid(), None, None),
    "read its supervisor's memory": lambda: readable(f"/proc/{os.getppid()}/environ"),
    "become root": lambda: os.setresuid(0, 0, 0),
    "become a worker": lambda: os.setresuid(settings["uid"] + 1, 0, 0),
    "have a group": lambda: os.setgroups([0]),
    "execute a program": lambda: os.execv("/bin/true", ["true"]),
    "make a process": fork,
    "make a user namespace": lambda: call("unshare", 0x10000000),
    "make memory executable": lambda: call("mmap", 0, 4096, 7, 0x22, -1, 0),
    "map what is open": lambda: call("mmap", 0, 4096, 1, 2, held["file"], 0),
    "change its root": lambda: os.chroot("/"),
    "raise a limit": lambda: resource.setrlimit(7, (4096, 4096)),
    "share memory": lambda: os.memfd_create("x"),
    "put on another filter": lambda: call("syscall", NUMBERS["seccomp"], 1, 0, None),
}

def run(name, how, listener, theirs):
    if how == "control":
        life.confine = lambda *_: None
    if how == "unfiltered":
        confinement.seccomp.install = lambda *_: None
    # Everything that an attempt needs is there before.
    file = os.memfd_create("open")
    os.write(file, b"x" * 4096)
    held.update(
        file=file,
        stream=socket.socket(),
        datagrams=socket.socket(type=socket.SOCK_DGRAM),
        listener=listener,
    )
    real = life.MetricsServer._has_asked

    def has_asked(server, client):
        try:
            ATTEMPTS[name]()
        except OSError as error:
            os._exit(min(error.errno or 255, 255))
        if name == "nothing":
            real(server, client)
        else:
            os._exit(0)

    life.MetricsServer._has_asked = has_asked
    told = {key: settings[key] for key in ("uid", "chroot", "filter")} | {"alive_seconds": 60}
    given = {
        "settings": sealed_file("settings", json.dumps(told).encode()),
        "supervisor": theirs.detach(),
        "listener": os.dup(listener.fileno()),
    }
    sys.argv = ["life", *(f"--{key}-fd={number}" for key, number in given.items())]
    life.main()

def attempt(name, how):
    listener = socket.create_server(("127.0.0.1", 0))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        ours.close()
        try:
            run(name, how, listener, theirs)
        finally:
            os._exit(254)
    theirs.close()
    assert ours.recv(2) == b"R", (name, how)
    with socket.create_connection(listener.getsockname(), timeout=60) as client:
        client.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
        if name == "nothing":
            assert ours.recv(2) == b"W"
            text = sealed_file("metrics", b"the text")
            socket.send_fds(ours, [b"T"], [text])
            assert client.makefile("rb").read().endswith(b"the text")
            ours.close()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

found = {how: {name: attempt(name, how) for name in ATTEMPTS} for how in sys.argv[2:]}
print(json.dumps(found))
"""


class Found(NamedTuple):
    """By attempt: the errno, 0 if it succeeded; a signal's number, below 0, if it was killed."""

    control: dict[str, int]
    unfiltered: dict[str, int]
    confined: dict[str, int]


@pytest.fixture(scope="module")
def found() -> Found:
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        socket.socket(socket.AF_UNIX) as roots,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
    ):
        Path(directory).chmod(0o777)
        (empty := Path(directory, "empty")).mkdir(0o755)
        file = Path(directory, "everybodys")
        file.write_text("x")
        file.chmod(0o666)
        roots.bind(f"{directory}/roots")
        roots.listen(100)
        tcp.listen(100)
        udp.bind(("127.0.0.1", 0))
        settings = {
            "uid": UID,
            "chroot": str(empty),
            "filter": seccomp.build(SERVING_METRICS).hex(),
            "file": str(file),
            "socket": f"{directory}/roots",
            "tcp": tcp.getsockname(),
            "udp": udp.getsockname(),
        }
        ran = subprocess.run(
            [sys.executable, "-I", "-c", ATTEMPTS, json.dumps(settings), *Found._fields],
            capture_output=True,
            check=False,
            timeout=120,
        )
    assert ran.returncode == 0, ran.stderr.decode()
    return Found(**json.loads(ran.stdout))


def test_as_root_all_of_it_can_be_done(found: Found) -> None:
    possible = {name for name, error in found.control.items() if not error}
    # A filter without a program is refused in any case (EFAULT), and does not end the process.
    assert found.control.keys() - possible == {"put on another filter"}


def test_each_attempt_ends_the_metrics_server(found: Found) -> None:
    assert found.confined.pop("nothing") == 0
    ended = {name for name, code in found.confined.items() if code == _SIGSYS}
    assert found.confined.keys() - ended == set()


def test_without_its_filter_it_would_still_reach_nothing(found: Found) -> None:
    possible = {name for name, error in found.unfiltered.items() if not error}
    assert possible <= {
        "nothing",
        # Where Landlock does not forbid it. The root is empty, and so is the network.
        "list the root",
        "listen",
        "bind a socket that it has",
        "connect a socket that it has",
        "make a socket",
        "send to an address",
        "end listening",
        "set an option of the socket",
        "make memory executable",
        "map what is open",
        "share memory",
    }
