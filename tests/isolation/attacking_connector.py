"""The process that connects to upstreams, with somebody else's code in it.

``python -I attacking_connector.py``: settings come as JSON, outcomes leave as JSON. Each attempt
is made in a child of its own, once as root and once in the place where that process, confined by
then, would connect to its upstream.
"""

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from keyd.upstream import connector

__all__ = ["attempts"]

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) == -1:
        raise OSError(ctypes.get_errno(), name)


def _connect(family: int, address: Any) -> None:
    with socket.socket(family) as client:
        client.connect(address)


def _read(path: str) -> None:
    with open(path, "rb") as file:
        file.read(1)


def _fork() -> None:
    if not os.fork():
        os._exit(0)


def _linger() -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))


def _listen() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("")
        server.listen()


def attempts(settings: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Each raises OSError if it is refused, or ends its process."""
    other = settings["other"]
    return {
        "connect to a unix socket": lambda: _connect(socket.AF_UNIX, settings["socket"]),
        "connect to an abstract one": lambda: _connect(socket.AF_UNIX, settings["abstract"]),
        "connect by TCP": lambda: _connect(socket.AF_INET, ("127.0.0.1", settings["port"])),
        "have a socket's last holder wait": _linger,
        "use netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
        "read a file": lambda: _read(settings["file"]),
        "list a directory": lambda: os.listdir("/"),
        "signal another process": lambda: os.kill(other, 0),
        "trace another process": lambda: _call("ptrace", 0x4206, other, None, None),
        "make a process": _fork,
        "execute a program": lambda: os.execv("/bin/true", ["true"]),
        "make memory executable": lambda: mmap.mmap(
            -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        ),
        "become root": lambda: os.setresuid(0, 0, 0),
        "listen": _listen,
        "make a user namespace": lambda: _call("unshare", 0x10000000),
    }


def _try(attempt: Callable[[], object]) -> NoReturn:
    try:
        attempt()
    except OSError as error:
        os._exit(min(error.errno or 255, 255))
    os._exit(0)


def _outcome(attempt: Callable[[], object], settings: dict[str, Any] | None) -> str:
    """In words; nothing if it succeeded. With ``settings``, in the confined process."""
    pid = os.fork()
    if not pid:
        if settings is None:
            _try(attempt)
        connector._try = lambda *_: _try(attempt)  # type: ignore[assignment]
        keyd, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connector.connect(settings["connector"], keyd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return signal.Signals(-code).name if code < 0 else os.strerror(code) if code else ""


def main() -> None:
    settings = json.load(sys.stdin)
    made = attempts(settings)
    found = {
        name: (_outcome(attempt, None), _outcome(attempt, settings))
        for name, attempt in made.items()
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
