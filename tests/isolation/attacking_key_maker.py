"""``keyd make`` as an attacker has it: with the first order, it does what ``argv`` says.

The confinement is the real one, but for what is left out on request. What came of the attempt is
the order's answer.
"""

import json
import os
import sys
from pathlib import Path

import prctl

sys.path.insert(0, str(Path(__file__).parents[1]))

from isolation.attacks import Place, call, outcome
from keyd import __main__ as keyd
from keyd import confinement, making
from keyd.linux import landlock, seccomp


def read(_: Place, path: str) -> None:
    os.close(call("openat", -100, path.encode(), os.O_RDONLY))


def read_what_was_given(_: Place, descriptor: str) -> None:
    """The new key's file: this process writes it, and reads nothing back."""
    os.read(int(descriptor), 1)


def make_socket(_: Place, family: str) -> None:
    os.close(call("socket", int(family), 1, 0))


def connect(_: Place, port: str) -> None:
    """To the test's own listener on the host's loopback."""
    descriptor = call("socket", 2, 1, 0)
    address = b"\2\0" + int(port).to_bytes(2, "big") + bytes((127, 0, 0, 1)) + bytes(8)
    call("connect", descriptor, address, len(address))


def kill(_: Place, pid: str) -> None:
    call("kill", int(pid), 0)


def execute(_: Place) -> None:
    call("execve", b"/bin/true", None, None)


def fork(_: Place) -> None:
    if call("fork") == 0:
        os._exit(0)


DEEDS = {deed.__name__: deed for deed in (read, read_what_was_given, make_socket, connect, kill)}
DEEDS |= {deed.__name__: deed for deed in (execute, fork)}


def leave_out(layers: list[str]) -> None:
    if "filter" in layers:
        seccomp.install = lambda *_: None
    if "root" in layers:
        confinement.enter_empty_root = lambda _: None
    if "landlock" in layers:
        landlock.restrict_self = lambda _: None
    if "user" in layers:
        confinement.become = lambda *_: prctl.set_no_new_privs(1)
        confinement.keep_capabilities = confinement.forbid_regaining = lambda _: None
    if "network" in layers:
        confinement.leave_namespaces = lambda _: None
    if "limits" in layers:
        making.limit = lambda _: None


if __name__ == "__main__":
    layers, deed, parameter = json.loads(sys.argv.pop(1))
    leave_out(layers)

    def attack(order: making.Order) -> None:
        given = [] if parameter is None else [str(parameter)]
        if deed == "read_what_was_given":
            given = [str(order.key)]
        raise making._CannotMake(outcome(DEEDS[deed], Place(), given))

    making.make = attack
    sys.exit(keyd.main())
