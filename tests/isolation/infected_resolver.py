"""The real resolver, with somebody else's code in it: started in its place by ``driver``.

``python -I infected_resolver.py SETTINGS ...``: JSON, and then the resolver's own arguments. When
it is asked for ``NAME``, and confined by then, it makes the attempts below in the thread that would
hear the name servers, and tells the test by TCP what came of each. With "alone" instead of the
arguments, it is no resolver: it confines itself, and tries.
"""

import ctypes
import errno
import json
import os
import resource
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

from keyd.linux import seccomp
from titus_py.between.lookups import Question
from titus_py.resolver import life
from titus_py.resolver.confinement import confine

__all__ = ["NAME", "outcomes"]

NAME = "taken-over.test"
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)


def _connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def _listen() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()


def _fork() -> None:
    if not os.fork():
        os._exit(0)


def _socket(*kind: int) -> None:
    socket.socket(*kind).close()


def _read(path: str) -> None:
    with open(path, "rb") as file:
        file.read(1)


def _write(path: str) -> None:
    with open(path, "w") as file:
        file.write("x")


def _linger() -> None:
    """Whoever closes the last descriptor of such a socket waits: its supervisor, if it is sent."""
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))


def attempts(file: str, roots_socket: str) -> dict[str, Callable[[], object]]:
    """Each raises OSError if it is refused. ``file`` is everybody's, the socket is root's."""
    its_supervisor, another = os.getppid(), 1_999_999_999
    return {
        "read what is root's": lambda: _read("/etc/shadow"),
        "read what is everybody's": lambda: _read(file),
        "read of other processes": lambda: _read(f"/proc/{its_supervisor}/status"),
        "read another process's memory": lambda: _read(f"/proc/{its_supervisor}/environ"),
        "write a file": lambda: _write(file + ".new"),
        "remove a file": lambda: os.unlink(file + ".removed"),
        "list a directory": lambda: os.listdir("/etc"),
        "connect to root's socket": lambda: _connect(roots_socket),
        "become root": lambda: os.setresuid(0, 0, 0),
        "become a worker": lambda: os.setresuid(another, another, another),
        "have a group": lambda: os.setgroups([0]),
        "signal its supervisor": lambda: os.kill(its_supervisor, 0),
        # PTRACE_SEIZE, which does not stop the other one.
        "trace its supervisor": lambda: _call("ptrace", 0x4206, its_supervisor, None, None),
        "execute a program": lambda: os.execv("/bin/true", ["true"]),
        "make a process": _fork,
        "listen": _listen,
        "use a raw socket": lambda: _socket(socket.AF_INET, socket.SOCK_RAW, 1),
        "use a packet socket": lambda: _socket(socket.AF_PACKET, socket.SOCK_DGRAM),
        "use another netlink": lambda: _socket(socket.AF_NETLINK, socket.SOCK_RAW, 4),
        "change its root": lambda: os.chroot("/"),
        "make a user namespace": lambda: _call("unshare", 0x10000000),
        "make a mount namespace": lambda: _call("unshare", 0x20000),
        "raise a limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)),
        "have whoever closes a socket wait": _linger,
        "share memory": lambda: os.memfd_create("x"),
    }


def _outcome(attempt: Callable[[], object]) -> int:
    """The errno; 0 if it succeeded."""
    try:
        attempt()
    except OSError as error:
        return error.errno or -1
    except ValueError:
        # What Python makes of EPERM from setrlimit(2).
        return errno.EPERM
    return 0


def _outcome_aside(attempt: Callable[[], object]) -> int:
    """In a child: for attempts that may well succeed."""
    # From Python 3.12 on, a fork of a process with threads is warned of, in the instance's log.
    with warnings.catch_warnings(action="ignore"):
        pid = os.fork()
    if not pid:
        os._exit(min(_outcome(attempt), 255))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcomes(settings: dict[str, Any], aside: bool) -> dict[str, int]:
    if aside:
        _write(settings["file"] + ".removed")
    outcome = _outcome_aside if aside else _outcome
    listed = attempts(settings["file"], settings["socket"])
    return {name: outcome(attempt) for name, attempt in listed.items()}


def _as_the_resolver(settings: dict[str, Any]) -> int:
    look_up = life._look_up

    def taken_over(question: Question) -> tuple[tuple[str, int], ...]:
        if question.name != NAME:
            return look_up(question)
        if question.family != socket.AF_INET:
            raise socket.gaierror(socket.EAI_NODATA, "an IPv4 address is enough")
        found = outcomes(settings, aside=not settings["confined"])
        with socket.create_connection(("127.0.0.1", settings["port"])) as test:
            test.sendall(json.dumps([os.geteuid(), found]).encode())
        return (("127.0.0.1", 0),)

    life._look_up = taken_over
    if not settings["confined"]:
        life.confine = lambda *_: None
    return life.main()


def _alone(settings: dict[str, Any]) -> None:
    """Prints what came of each as root, then once confined, and whether names can be looked up."""
    as_root = outcomes(settings, aside=True)
    _write(settings["file"] + ".removed")
    confine(settings["uid"], seccomp.Program(bytes.fromhex(settings["filter"])))
    confined = outcomes(settings, aside=False)
    addresses: list[Any] = []
    thread = threading.Thread(
        target=lambda: addresses.extend(socket.getaddrinfo(b"localhost", None, socket.AF_INET))
    )
    thread.start()
    thread.join()
    found = [as_root, confined, addresses[0][4][0], os.geteuid()]
    os.write(1, json.dumps(found).encode())
    os._exit(0)


if __name__ == "__main__":
    its_settings = json.loads(sys.argv.pop(1))
    if sys.argv[1:] == ["alone"]:
        _alone(its_settings)
    sys.exit(_as_the_resolver(its_settings))
