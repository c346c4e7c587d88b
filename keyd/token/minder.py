"""The process of one token: it starts the one with the vendor's module, and watches it.

keyd starts it before it reads a key: as root, or as keyd's own user where keyd was never root. It
reads the PIN, gives up what no module needs (``_confine``), and forks. The child alone loads the
module, under a filter. A child that has crashed or lost its session is replaced, after a while; one
that hangs is killed. It trusts keyd; of its child it believes the exit code, and a page of memory
that says how long the module may still take.
"""

import os
import resource
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import prctl

from keyd.keys import passphrase_in, read
from keyd.linux import landlock, seccomp
from keyd.linux.child_end import ChildEnd
from keyd.linux.credentials import (
    become,
    forbid_regaining,
    hide_memory,
    keep_capabilities,
    limit,
    lock_memory,
)
from keyd.linux.namespaces import leave_namespaces
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWUTS, how_ended
from keyd.token.messages import Down
from keyd.token.progress import Progress

__all__ = ["mind"]

#: What a module and the libraries that it loads read, besides what the settings name.
_READ = (
    *("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/ssl", "/etc/pkcs11"),
    *("/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd", "/etc/group"),
    *("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/proc/self", "/sys/devices/system"),
)
#: Where there is a network, for names and trust.
_READ_FOR_NETWORK = ("/etc/hosts", "/etc/resolv.conf", "/etc/gai.conf", "/etc/services")
_LIMITS = {
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_NOFILE: 256,
    resource.RLIMIT_FSIZE: 64 * 1024 * 1024,
}
#: In seconds: the first and the longest pause before another child (the next one is short again
#: once a child has answered a client), how often to look whether the module hangs, and how long it
#: may take to log out once keyd has ended.
_PAUSES, _LOOK, _FAREWELL = (1.0, 60.0), 1.0, 3.0
_HUNG = -(1 << 16)


def mind(settings: dict[str, Any], keyd: socket.socket) -> NoReturn:
    """Serve keyd with one token until keyd ends. ``settings`` are ``starting.Settings``'s."""
    try:
        pin_file = settings["pin_file"]
        pin = None if pin_file is None else passphrase_in(read(pin_file, "pin-source")).decode()
        # The library, and not yet the module: of that, only a child's memory has anything.
        from keyd.token.session import SAID, SAID_FOR_GOOD, Wanted, serve
    except ImportError as error:
        why = f"python-pkcs11 is missing (docs/tokens.md has how to install it): {error}"
        _give_up(keyd, why)
    except ValueError as error:
        _give_up(keyd, str(error))
    wanted = Wanted(
        **{name: settings[name] for name in ("module", "token", "manufacturer", "model", "serial")},
        keys=tuple((label, id and bytes.fromhex(id)) for label, id in settings["keys"]),
    )
    progress = Progress()
    program = seccomp.Program(bytes.fromhex(settings["filter"]))
    try:
        _confine(settings)
    except OSError as error:
        _give_up(keyd, f"its process cannot be confined: {error}")

    pause, longest = _PAUSES
    while True:
        progress.begin()
        try:
            child = os.fork()
        except OSError as error:
            # EAGAIN, ENOMEM: that may pass.
            _tell(keyd, Down(False, f"no process can be made for it: {error.strerror}"))
            _wait_for_end(keyd, pause)
            pause = min(2 * pause, longest)
            continue
        if child == 0:
            prctl.set_pdeathsig(signal.SIGKILL)
            seccomp.install(program)
            serve(wanted, pin, keyd, progress)
        code = _watch(child, keyd, progress)
        # If keyd has ended, it is seen here.
        _wait_for_end(keyd, None if code == SAID_FOR_GOOD else 0)
        if code == _HUNG:
            _tell(keyd, Down(False, "its module hung, and was killed"))
        elif code != SAID:
            _tell(keyd, Down(False, f"its module ended its process: {how_ended(code)}"))
        # Each key has been used once by keyd itself.
        if progress.answered > len(wanted.keys):
            pause = _PAUSES[0]
        _wait_for_end(keyd, pause)
        pause = min(2 * pause, longest)


def _confine(settings: dict[str, Any]) -> None:
    """Give up what no module needs; raises OSError. What is given up cannot be had again."""
    ruleset = None
    network = settings["network"]
    if landlock.version():
        ruleset = landlock.make_ruleset(network=not network)
        readable = (*_READ, *(_READ_FOR_NETWORK if network else ()))
        module = str(Path(settings["module"]).resolve().parent)
        for path in (*readable, module, settings["module"], sys.prefix, *sys.path):
            with suppress(FileNotFoundError, NotADirectoryError):
                landlock.allow_using(ruleset, path, writing=False)
        for path in settings["paths"]:
            landlock.allow_using(ruleset, path, writing=True)
    limit(_LIMITS)
    # Against swapping the PIN out. A child has it as well, in memory that is not locked: modules
    # may be large.
    with suppress(OSError):
        lock_memory()
    if os.geteuid() == 0:
        leave_namespaces(CLONE_NEWIPC | CLONE_NEWUTS | (0 if network else CLONE_NEWNET))
        kept = {prctl.CAP_SETUID, prctl.CAP_SETGID, prctl.CAP_SETPCAP}
        keep_capabilities(kept)
        forbid_regaining(kept)
        become(settings["uid"], settings["gid"], settings["groups"])
    prctl.set_no_new_privs(1)
    hide_memory()
    if ruleset is not None:
        landlock.restrict_self(ruleset)
        os.close(ruleset)


def _watch(child: int, keyd: socket.socket, progress: Progress) -> int:
    """Wait until the child has ended: its exit code, minus a signal's number, or _HUNG."""
    end = ChildEnd(child, keyd)
    hung = False
    while (code := end.code(_LOOK)) is None:
        if end.other_has_ended:  # as the child sees, too
            if end.code(_FAREWELL) is None:
                os.kill(child, signal.SIGKILL)
            os._exit(0)
        if progress.hangs:
            hung = True
            os.kill(child, signal.SIGKILL)
    return _HUNG if hung else code


def _wait_for_end(keyd: socket.socket, seconds: float | None) -> None:
    """Wait for so long; exit if keyd ends meanwhile."""
    poll = select.poll()
    poll.register(keyd, 0)
    if poll.poll(None if seconds is None else seconds * 1000):
        os._exit(0)


def _tell(keyd: socket.socket, said: Down) -> None:
    """It waits for room, or for keyd's end: there is nothing else to be done meanwhile."""
    with suppress(OSError):
        keyd.send(said.encode())


def _give_up(keyd: socket.socket, why: str) -> NoReturn:
    _tell(keyd, Down(True, why))
    _wait_for_end(keyd, None)
    os._exit(0)
