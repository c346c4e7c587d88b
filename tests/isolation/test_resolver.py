"""What code in the resolver could do that is not ours: each is attempted, after a control."""

import errno
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from keyd.linux import landlock, seccomp
from titus_py.resolver.system_calls import RESOLVING

UID = 2_000_000_007
#: Of the control and of the attempt: each errno, 0 if it succeeded; an address, and the uid.
Found = tuple[dict[str, int], dict[str, int], str, int]
#: What is attempted: each raises OSError if it is refused.
ATTEMPTS = """
import ctypes, json, os, socket, sys, threading
from keyd.linux import seccomp
from titus_py.resolver.confinement import confine

settings = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)

def connect(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)

def listen():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

def fork():
    if not os.fork():
        os._exit(0)

def raw(*kind):
    socket.socket(*kind).close()

def ptrace():
    # PTRACE_SEIZE, which does not stop the other one.
    call("ptrace", 0x4206, os.getppid(), None, None)

def readable(path):
    with open(path) as file:
        file.read(1)

def write(path):
    with open(path, "w") as file:
        file.write("x")

ATTEMPTS = {
    "read what is root's": lambda: readable("/etc/shadow"),
    "read what is everybody's": lambda: readable(settings["file"]),
    "read of other processes": lambda: readable(f"/proc/{os.getppid()}/status"),
    "read another process's memory": lambda: readable(f"/proc/{os.getppid()}/environ"),
    "write a file": lambda: write(settings["file"] + ".new"),
    "remove a file": lambda: os.unlink(settings["file"] + ".removed"),
    "list a directory": lambda: os.listdir("/etc"),
    "connect to root's socket": lambda: connect(settings["socket"]),
    "become root": lambda: os.setresuid(0, 0, 0),
    "become a worker": lambda: os.setresuid(UID + 1, UID + 1, UID + 1),
    "have a group": lambda: os.setgroups([0]),
    "signal its supervisor": lambda: os.kill(os.getppid(), 0),
    "trace its supervisor": ptrace,
    "execute a program": lambda: os.execv("/bin/true", ["true"]),
    "make a process": fork,
    "listen": listen,
    "use a raw socket": lambda: raw(socket.AF_INET, socket.SOCK_RAW, 1),
    "use a packet socket": lambda: raw(socket.AF_PACKET, socket.SOCK_DGRAM),
    "use another netlink": lambda: raw(socket.AF_NETLINK, socket.SOCK_RAW, 4),
    "change its root": lambda: os.chroot("/"),
    "make a user namespace": lambda: call("unshare", 0x10000000),
    "make a mount namespace": lambda: call("unshare", 0x20000),
    "raise a limit": lambda: __import__("resource").setrlimit(7, (4096, 4096)),
    "share memory": lambda: os.memfd_create("x"),
}
UID = settings["uid"]

def tried(attempt):
    try:
        attempt()
    except OSError as error:
        return error.errno or -1
    return 0

def tried_aside(attempt):
    pid = os.fork()
    if not pid:
        os._exit(min(tried(attempt), 255))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

control = {name: tried_aside(attempt) for name, attempt in ATTEMPTS.items()}
open(settings["file"] + ".removed", "w").close()
confine(UID, seccomp.Program(bytes.fromhex(settings["filter"])))
found = {name: tried(attempt) for name, attempt in ATTEMPTS.items()}
addresses = []
thread = threading.Thread(
    target=lambda: addresses.extend(socket.getaddrinfo(b"localhost", None, socket.AF_INET))
)
thread.start()
thread.join()
os.write(1, json.dumps([control, found, addresses[0][4][0], os.geteuid()]).encode())
os._exit(0)
"""


@pytest.fixture(scope="module")
def found() -> Found:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o777)
        file = Path(directory, "everybodys")
        for path in (file, Path(f"{file}.removed")):
            path.write_text("x")
            path.chmod(0o666)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{directory}/roots")
            Path(directory, "roots").chmod(0o600)
            listener.listen()
            settings = {
                "uid": UID,
                "filter": seccomp.build(RESOLVING, errno.ENOSYS).hex(),
                "file": str(file),
                "socket": f"{directory}/roots",
            }
            ran = subprocess.run(
                [sys.executable, "-I", "-c", ATTEMPTS, json.dumps(settings)],
                capture_output=True,
                check=False,
                timeout=60,
            )
    assert ran.returncode == 0, ran.stderr.decode()
    return tuple(json.loads(ran.stdout))


def test_as_root_all_of_it_can_be_done(found: Found) -> None:
    control = found[0]
    assert {name for name, error in control.items() if error} == set()


def test_the_resolver_can_do_none_of_it(found: Found) -> None:
    attempted = found[1]
    possible = {name for name, error in attempted.items() if not error}
    if not landlock.version():
        # Then the filter and its uid are all that there is.
        possible -= {"read what is everybody's", "read of other processes"}
    assert possible == set()


def test_and_it_can_look_names_up(found: Found) -> None:
    assert list(found[2:]) == ["127.0.0.1", UID]
