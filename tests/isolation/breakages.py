"""A driver: ``titus-py serve`` with one protection taken out, for ``test_audit``.

Started as ``python -I breakages.py supervisor NAME FILE serve ...``. It is the tests' own:
no configuration and no environment of the program's reaches it. What the supervisor
starts is this file again, as the parent or as keyd; each takes its one step out, gives
itself the command line that it would have, and goes on as the real one. ``FILE`` is a
file that a breakage may need, such as the private key's.
"""

import ctypes
import mmap
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

#: Whatever has to stay until the process ends.
KEPT: list[Any] = []


class Breakage(NamedTuple):
    """Where to take which protection out, which check is to notice, and for whom."""

    process: str
    take_out: Callable[[str], None]
    check: str
    roles: frozenset[str]


BREAKAGES: dict[str, Breakage] = {}


def breaks(
    check: str, *roles: str, within: str
) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    def note(function: Callable[[str], None]) -> Callable[[str], None]:
        BREAKAGES[function.__name__] = Breakage(within, function, check, frozenset(roles))
        return function

    return note


def nothing(*_: object) -> None:
    pass


# --- workers, by way of the parent that forks them --------------------------------


@breaks("groups", "worker", within="parent")
def worker_groups(_: str) -> None:
    from titus_py import confinement

    real = confinement.become

    def become(uid: int, gid: int) -> None:
        real_setgroups = os.setgroups
        os.setgroups = lambda groups: real_setgroups([4242])
        real(uid, gid)

    confinement.become = become


@breaks("capabilities", "worker", within="parent")
def worker_bounding_set(_: str) -> None:
    from titus_py import confinement

    confinement.forbid_regaining = nothing


@breaks("no_new_privs", "worker", within="both")
def worker_no_new_privs(_: str) -> None:
    """The filter goes on while it is still root, and so does without no_new_privs."""
    import prctl

    from keyd.linux import landlock, seccomp
    from titus_py import confinement, worker

    def confine(to: Any, uid: int, null: int, parent: int) -> None:
        confinement.enter_network_namespace(to.network)
        confinement.enter_empty_root(to.chroot)
        confinement._limit_resources(to.memory)
        confinement.stop_speculation(to.speculation)
        confinement.forbid_regaining(to.bounding)
        if to.landlock is not None:
            landlock.restrict_self(to.landlock)
        confinement.keep_only(null, parent)
        seccomp.install(to.handshake_filter)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        confinement.hide_memory()
        prctl.set_pdeathsig(signal.SIGKILL)

    def narrow(to: Any) -> None:
        prctl.set_no_new_privs(1)
        confinement.narrow(to)

    worker.confine, worker.narrow = confine, narrow


def worker_no_new_privs_supervisor() -> None:
    from titus_py import worker_filter

    for call in ("prctl", "setgroups", "setresgid", "setresuid"):
        worker_filter.HANDSHAKE[call] = ((),)


@breaks("hidden", "worker", within="parent")
def worker_dumpable(_: str) -> None:
    import prctl

    from titus_py import confinement

    confinement.hide_memory = lambda: prctl.set_dumpable(True)


@breaks("namespaces", "worker", within="parent")
def worker_uts_namespace(_: str) -> None:
    from keyd.linux.process import CLONE_NEWUTS
    from titus_py import parent

    parent.WORKER_NAMESPACES &= ~CLONE_NEWUTS


@breaks("network", "worker", within="parent")
def worker_network_of_the_host(_: str) -> None:
    from titus_py import confinement

    confinement.enter_network_namespace = nothing


@breaks("root", "worker", within="parent")
def worker_root(_: str) -> None:
    from titus_py import confinement

    confinement.enter_empty_root = nothing


@breaks("filter", "worker", within="parent")
def worker_second_filter(_: str) -> None:
    from titus_py import worker

    worker.narrow = lambda _: os.close(worker.KEYD_FD)


@breaks("filter", "worker", within="parent")
def worker_first_filter(_: str) -> None:
    from titus_py import confinement

    real, calls = confinement.seccomp.install, iter("12")
    confinement.seccomp = type("", (), {"install": lambda p: next(calls) == "2" and real(p)})


@breaks("limits", "worker", within="parent")
def worker_descriptor_limit(_: str) -> None:
    import resource

    from titus_py import confinement

    real = confinement.limit
    confinement.limit = lambda limits: real(
        {name: most for name, most in limits.items() if name != resource.RLIMIT_NOFILE}
    )


@breaks("limits", "worker", within="parent")
def worker_memory_limit(_: str) -> None:
    import resource

    from titus_py import confinement

    real = confinement.limit
    confinement.limit = lambda limits: real(
        {name: most for name, most in limits.items() if name != resource.RLIMIT_AS}
    )


@breaks("speculation", "worker", within="parent")
def worker_speculation(_: str) -> None:
    from titus_py import confinement

    confinement.stop_speculation = nothing


@breaks("landlock", "parent", within="parent")
def worker_landlock(_: str) -> None:
    from titus_py import parent

    parent.landlock.version = lambda: 0


@breaks("descriptors", "worker", within="parent")
def worker_one_more_descriptor(_: str) -> None:
    from titus_py import confinement

    real = confinement.keep_only

    def keep_only(null: int, parent: int) -> None:
        real(null, parent)
        # Where nothing that the worker is given later will be.
        os.dup2(0, 7)

    confinement.keep_only = keep_only


@breaks("descriptors", "worker", within="parent")
def worker_keeps_keyd(_: str) -> None:
    from keyd.linux import seccomp
    from titus_py import worker

    worker.narrow = lambda to: seccomp.install(to.established_filter)


@breaks("mappings", "worker", within="parent")
def worker_writable_code(_: str) -> None:
    from titus_py import confinement

    real = confinement.hide_memory

    def hide_memory() -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        KEPT.append(mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, protection))
        real()

    confinement.hide_memory = hide_memory


@breaks("connection", "worker", within="parent")
def parent_keeps_the_client(_: str) -> None:
    from titus_py.parent import Parent

    real = Parent._hand_over

    def hand_over(self: Parent, arrival: Any) -> None:
        KEPT.append(arrival.client.dup())
        real(self, arrival)

    Parent._hand_over = hand_over


@breaks("end", "worker", within="parent")
def worker_outlives_its_connection(_: str) -> None:
    import select

    from titus_py.worker import Pump

    real = Pump.run

    def run(self: Pump) -> Any:
        result = real(self)
        select.poll().poll(8000)
        return result

    Pump.run = run


# --- the parent -------------------------------------------------------------------


@breaks("capabilities", "parent", "worker", within="parent")
def parent_capabilities(_: str) -> None:
    """With what its bounding set keeps, its workers' keep some of it, too."""
    from titus_py import parent

    parent.keep_capabilities = nothing


@breaks("hidden", "parent", within="parent")
def parent_dumpable(_: str) -> None:
    from titus_py import parent

    parent.hide_memory = nothing


@breaks("descriptors", "parent", within="parent")
def parent_opens_a_file(file: str) -> None:
    KEPT.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))


@breaks("key", "parent", "worker", within="parent")
def parent_loads_the_key(file: str) -> None:
    """Workers, forked from it, have it then as well."""
    from keyd.keys import load_private_key

    key = load_private_key(file, None)
    KEPT.append((key, key.private_numbers()))


# --- the supervisor ---------------------------------------------------------------


@breaks("processes", "supervisor", within="supervisor")
def supervisor_has_a_stranger(_: str) -> None:
    import subprocess

    KEPT.append(subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "sleep", "60"]))


@breaks("capabilities", "supervisor", within="supervisor")
def supervisor_capabilities(_: str) -> None:
    from titus_py import supervisor

    supervisor.keep_capabilities = nothing


@breaks("hidden", "supervisor", within="supervisor")
def supervisor_dumpable(_: str) -> None:
    from titus_py import supervisor

    supervisor.hide_memory = nothing


@breaks("descriptors", "supervisor", within="supervisor")
def supervisor_opens_the_key(file: str) -> None:
    KEPT.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))


@breaks("limits", "supervisor", within="supervisor")
def supervisor_core_dumps(_: str) -> None:
    from titus_py import supervisor

    supervisor.forbid_core_dumps = nothing


@breaks("environment", "parent", "worker", within="supervisor")
def parent_environment(_: str) -> None:
    _environment_of("parent")


@breaks("environment", "keyd", within="supervisor")
def keyd_environment(_: str) -> None:
    _environment_of("keyd")


def _environment_of(name: str) -> None:
    from titus_py import generation

    real = generation._start

    def start(
        child: str, program: Any, given: Any, environment: Any = None, shared: Any = ()
    ) -> Any:
        if child == name:
            environment = {**(environment or {}), "SECRET": "of the operator's"}
        return real(child, program, given, environment, shared)

    generation._start = start


# --- keyd -------------------------------------------------------------------------


@breaks("uid", "keyd", within="keyd")
def keyd_uid(_: str) -> None:
    from keyd import daemon

    real = daemon.become
    daemon.become = lambda uid, gid: real(uid - 1, gid - 1)


@breaks("capabilities", "keyd", within="keyd")
def keyd_bounding_set(_: str) -> None:
    from keyd import daemon

    daemon.forbid_regaining = nothing


@breaks("hidden", "keyd", within="keyd")
def keyd_dumpable(_: str) -> None:
    import prctl

    from keyd import daemon

    daemon.hide_memory = lambda: prctl.set_dumpable(True)


@breaks("namespaces", "keyd", within="keyd")
def keyd_ipc_namespace(_: str) -> None:
    from keyd import daemon

    real = daemon.leave_namespaces
    daemon.leave_namespaces = lambda flags: real(flags & ~daemon.CLONE_NEWIPC)


@breaks("network", "keyd", within="keyd")
def keyd_network(_: str) -> None:
    from keyd import daemon

    real = daemon.leave_namespaces
    daemon.leave_namespaces = lambda flags: real(flags & ~daemon.CLONE_NEWNET)


@breaks("root", "keyd", within="keyd")
def keyd_root(_: str) -> None:
    from keyd import daemon

    daemon.enter_empty_root = nothing


@breaks("filter", "keyd", within="keyd")
def keyd_filter_of_one_thread(_: str) -> None:
    from keyd.linux import seccomp

    real = seccomp.install
    seccomp.install = lambda program, flag: real(program)


@breaks("locked", "keyd", within="keyd")
def keyd_swappable(_: str) -> None:
    from keyd import daemon

    daemon.lock_memory = lambda: False


@breaks("descriptors", "keyd", within="keyd")
def keyd_opens_the_key(file: str) -> None:
    KEPT.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))


@breaks("mappings", "keyd", within="keyd")
def keyd_maps_the_key(file: str) -> None:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    KEPT.append(_map(descriptor, os.fstat(descriptor).st_size))
    os.close(descriptor)


def _map(descriptor: int, length: int) -> int:
    """mmap(2) itself: Python's keeps the descriptor."""
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    address: int = call(
        None, ctypes.c_size_t(length), mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, 0
    )
    return address


@breaks("signs", "keyd", within="keyd")
def keyd_fails_to_sign(_: str) -> None:
    from keyd import daemon
    from keyd.protocol import Status

    real = daemon.Keyd._grant

    def grant(self: Any, channel: Any, message: bytes) -> bytes:
        result: bytes = real(self, channel, message)
        if channel.connection == 0:
            raise daemon._Refused(Status.FAILED, "taken out")
        return result

    daemon.Keyd._grant = grant


def _change_terms(**changes: Any) -> None:
    """Have keyd hear other terms than those that were stated for the audit's channels."""
    from keyd.protocol import Open

    real = Open.decode.__func__  # type: ignore[attr-defined]

    def decode(cls: type[Open], message: bytes) -> Open:
        terms: Open = real(cls, message)
        if terms.connection:
            return terms
        return terms._replace(
            **{name: change(getattr(terms, name)) for name, change in changes.items()}
        )

    Open.decode = classmethod(decode)  # type: ignore[assignment,method-assign]


@breaks("refuses_second", "keyd", within="keyd")
def keyd_does_not_count(_: str) -> None:
    _change_terms(operations=lambda stated: stated + 9)


@breaks("refuses_late", "keyd", within="keyd")
def keyd_has_no_clock(_: str) -> None:
    _change_terms(lifetime_ms=lambda stated: 60_000)


@breaks("refuses_decrypt", "keyd", within="keyd")
def keyd_decrypts(_: str) -> None:
    from keyd.protocol import Operation

    _change_terms(grants=lambda stated: dict.fromkeys(stated, frozenset(Operation)))


@breaks("refuses_other_key", "keyd", within="keyd")
def keyd_grants_every_key(_: str) -> None:
    from keyd.protocol import Operation

    class Every(dict[bytes, frozenset[Operation]]):
        def get(self, key: bytes, default: object = None) -> frozenset[Operation]:  # type: ignore[override]
            return frozenset({Operation.SIGN})

    _change_terms(grants=lambda stated: Every())


@breaks("refuses_malformed", "keyd", within="keyd")
def keyd_takes_any_version(_: str) -> None:
    from keyd.protocol import Request

    real = Request.decode.__func__  # type: ignore[attr-defined]
    Request.decode = classmethod(  # type: ignore[assignment,method-assign]
        lambda cls, message: real(cls, b"\x01" + message[1:])
    )


def _sign_also(fits: Callable[[bytes], bool]) -> None:
    from keyd import powers

    real = powers._check_server_key_exchange
    powers._check_server_key_exchange = lambda octets: None if fits(octets) else real(octets)


@breaks("refuses_certificate", "keyd", within="keyd")
def keyd_signs_certificates(_: str) -> None:
    _sign_also(lambda octets: octets[:2] == b"\x30\x82")


@breaks("refuses_token", "keyd", within="keyd")
def keyd_signs_tokens(_: str) -> None:
    _sign_also(lambda octets: octets.startswith(b"eyJ"))


@breaks("refuses_ssh", "keyd", within="keyd")
def keyd_signs_logins(_: str) -> None:
    _sign_also(lambda octets: len(octets) == 32)


# --- being the real one, but for that ---------------------------------------------


def main() -> int:
    _, role, name, file, *rest = sys.argv
    breakage = BREAKAGES[name]
    if role == "supervisor":
        from titus_py import generation
        from titus_py.__main__ import main as serve

        if breakage.process == "supervisor":
            breakage.take_out(file)
        else:
            program = (__file__, "keyd" if breakage.process == "keyd" else "parent", name, file)
            if breakage.process == "keyd":
                generation._KEYD = program
            else:
                generation._PARENT = program
            if breakage.process == "both":
                worker_no_new_privs_supervisor()
        sys.argv = ["titus-py", *rest]
        return serve()
    if role == "parent":
        _seem_to_be("titus_py.parent", *rest)
        from titus_py import parent

        sys.argv = ["titus_py.parent", *rest]
        breakage.take_out(file)
        return parent.main()
    _seem_to_be("keyd", "serve", *rest)
    from keyd.__main__ import main as keyd

    sys.argv = ["keyd", "serve", *rest]
    breakage.take_out(file)
    return keyd()


def _seem_to_be(*words: str) -> None:
    """Have the command line that the real one has: it is shorter, and in our own memory."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    content = b"\0".join(os.fsencode(word) for word in (sys.executable, "-I", "-m", *words))
    ctypes.memmove(start, content.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    sys.exit(main())
