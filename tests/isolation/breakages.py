"""A driver: ``titus-py serve`` with protections taken out, for ``test_audit``.

Started as ``python -I breakages.py supervisor NAME[,NAME...] FILE serve ...``. It is the tests'
own: no configuration and no environment of the program's reaches it. What the supervisor
starts is this file again, as the parent or as keyd, and so is what the parent starts, as
the fork server; each takes its own steps out, gives itself the command line that it would
have, and goes on as the real one. ``FILE`` is a file that a breakage may need, such as the
private key's.
"""

import ctypes
import fcntl
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from keyd.linux.process import Call

# prctl(2)
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
#: Whatever has to stay until the process ends.
KEPT: list[Any] = []


class Breakage(NamedTuple):
    """Where to take which protection out, which check is to notice, and for whom."""

    process: str
    take_out: Callable[[str], None]
    check: str
    roles: frozenset[str]


BREAKAGES: dict[str, Breakage] = {}


def apart(one: Breakage, other: Breakage) -> bool:
    """Whether an audit that finds both tells which finding comes of which."""
    return one.check != other.check and not one.roles & other.roles


def breaks(
    check: str, *roles: str, within: str
) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    def note(function: Callable[[str], None]) -> Callable[[str], None]:
        BREAKAGES[function.__name__] = Breakage(within, function, check, frozenset(roles))
        return function

    return note


def nothing(*_: object) -> None:
    pass


# --- workers, by way of the fork server: the calls that each of them makes ------------


def change_calls(change: Callable[["list[Call]"], "list[Call]"]) -> None:
    """Have new workers make other calls than they should."""
    from titus_py.fork_server import life as fork_server

    real = fork_server.worker_calls
    fork_server.worker_calls = lambda *arguments: change(real(*arguments))


def prctl_of(option: int, *arguments: int) -> "Call":
    from keyd.linux.process import Call

    return Call("prctl", (option, *arguments))


@breaks("groups", "worker", within="fork_server")
def worker_groups(_: str) -> None:
    from keyd.linux.process import Call

    KEPT.append(groups := (ctypes.c_uint32 * 1)(4242))
    theirs = Call("setgroups", (1, ctypes.addressof(groups)))
    change_calls(lambda calls: [theirs if call.name == "setgroups" else call for call in calls])


@breaks("capabilities", "worker", within="fork_server")
def worker_capabilities(_: str) -> None:
    """It keeps them beyond its change of uid."""
    from keyd.linux import prctl
    from titus_py.fork_server import confinement

    def forbid_regaining(bounding: Any) -> None:
        for capability in bounding:
            prctl.drop_bounding(capability)
        prctl.set_securebits(prctl.SECBIT_NO_SETUID_FIXUP)

    confinement.forbid_regaining = forbid_regaining


@breaks("hidden", "worker", within="fork_server")
def worker_dumpable(_: str) -> None:
    hide, show = prctl_of(PR_SET_DUMPABLE, 0), prctl_of(PR_SET_DUMPABLE, 1)
    change_calls(lambda calls: [show if call == hide else call for call in calls])


@breaks("namespaces", "worker", within="fork_server")
def worker_uts_namespace(_: str) -> None:
    from keyd.linux.process import CLONE_NEWUTS
    from titus_py.fork_server import life as fork_server

    fork_server.WORKER_NAMESPACES &= ~CLONE_NEWUTS


@breaks("namespaces", "worker", within="fork_server")
def worker_pid_namespace(_: str) -> None:
    from keyd.linux.process import CLONE_NEWPID
    from titus_py.fork_server import life as fork_server

    fork_server.WORKER_NAMESPACES &= ~CLONE_NEWPID


@breaks("filter", "worker", within="fork_server")
def worker_one_more_filter(_: str) -> None:
    """As an attacker might bring one, if seccomp(2) were left to it."""
    import struct

    from keyd.linux.process import Call
    from keyd.linux.seccomp import SET_MODE_FILTER, Program

    program = Program(struct.pack("HBBI", 6, 0, 0, 0x7FFF_0000))

    def change(calls: "list[Call]") -> "list[Call]":
        return [*calls[:-1], Call("seccomp", (SET_MODE_FILTER, 0, program.address)), calls[-1]]

    change_calls(change)


@breaks("filter", "worker", within="fork_server")
def worker_filter(_: str) -> None:
    change_calls(lambda calls: [call for call in calls if call.name != "seccomp"])


@breaks("limits", "worker", within="fork_server")
def worker_process_limit(_: str) -> None:
    import resource

    change_calls(lambda calls: [call for call in calls if not limits(call, resource.RLIMIT_NPROC)])


@breaks("limits", "worker", within="fork_server")
def worker_descriptor_limit(_: str) -> None:
    """It has what the fork server may have."""
    import resource

    change_limits(lambda limits: {**limits, resource.RLIMIT_NOFILE: 64})
    change_calls(lambda calls: [call for call in calls if not limits(call, resource.RLIMIT_NOFILE)])


def keep_keyd() -> None:
    from titus_py.fork_server import life as fork_server

    fork_server.parting_calls = list


def limits(call: "Call", what: int) -> bool:
    return call.name == "prlimit64" and call.arguments[1] == what


@breaks("landlock", "fork server", within="fork_server")
def no_landlock(_: str) -> None:
    from titus_py.fork_server import confinement

    confinement.landlock.version = lambda: 0  # type: ignore[assignment]


@breaks("descriptors", "worker", within="fork_server")
def worker_one_more_descriptor(_: str) -> None:
    from keyd.linux.process import Call

    # Where nothing that the worker is given later will be.
    more = Call("dup3", (0, 7, 0))
    change_calls(lambda calls: [*calls[:-1], more, calls[-1]])


@breaks("descriptors", "worker", within="fork_server")
def worker_keeps_keyd(_: str) -> None:
    keep_keyd()


@breaks("descriptors", "worker", within="fork_server")
def worker_keeps_keyd_and_is_slow(_: str) -> None:
    """Its client's handshake is done long before it comes to what it does not do."""
    import select

    from titus_py.fork_server import life as fork_server
    from titus_py.worker import life as worker

    # Practice would take too long.
    fork_server.rehearse = nothing
    worker._acknowledge = lambda _: select.poll().poll(1000)
    keep_keyd()


@breaks("mappings", "worker", within="fork_server")
def worker_writable_code(_: str) -> None:
    from keyd.linux.process import Call

    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    more = Call("mmap", (0, mmap.PAGESIZE, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1))
    change_calls(lambda calls: [*calls[:-1], more, calls[-1]])


@breaks("end", "worker", within="fork_server")
def worker_outlives_its_connection(_: str) -> None:
    import select

    from titus_py.fork_server import life as fork_server
    from titus_py.worker.life import Pump

    # Practice would take too long.
    fork_server.rehearse = nothing
    real = Pump.run

    def run(self: Pump, backend: Any) -> Any:
        result = real(self, backend)
        select.poll().poll(8000)
        return result

    Pump.run = run


# --- the fork server, and what its workers have from it -----------------------------


@breaks("groups", "fork server", within="fork_server")
def fork_server_groups(_: str) -> None:
    real = os.setgroups
    os.setgroups = lambda _: real([4242])


@breaks("capabilities", "fork server", within="fork_server")
def fork_server_capabilities(_: str) -> None:
    from keyd.linux import prctl
    from titus_py.fork_server import confinement

    real = confinement.keep_capabilities
    confinement.keep_capabilities = lambda kept: real({*kept, prctl.CAP_SETPCAP})


@breaks("capabilities", "fork server", "worker", within="fork_server")
def fork_server_bounding_set(_: str) -> None:
    from titus_py.fork_server import confinement

    confinement.forbid_regaining = nothing


@breaks("no_new_privs", "supervisor", "fork server", within="fork_server")
def fork_server_no_new_privs(_: str) -> None:
    """What it leaves out, its workers do. It would have it from the supervisor (``main``)."""
    from keyd.linux import prctl

    prctl.set_no_new_privs = nothing
    change_calls(lambda calls: [prctl_of(PR_SET_NO_NEW_PRIVS, 1), *calls])


@breaks("no_new_privs", "supervisor", "fork server", "worker", within="fork_server")
def worker_no_new_privs(_: str) -> None:
    """The filter goes on while it is still root, and so does without no_new_privs."""
    from keyd.linux import prctl
    from titus_py.fork_server import life as fork_server
    from titus_py.worker import life as worker

    # Practice would forbid it to the fork server.
    fork_server.rehearse = nothing
    forbid = prctl.set_no_new_privs
    prctl.set_no_new_privs = nothing

    def change(calls: "list[Call]") -> "list[Call]":
        at = next(at for at, call in enumerate(calls) if call.name == "setresuid")
        return [*calls[:at], calls[-1], *calls[at:-1]]

    make = worker.make

    def forbid_and_make(calls: bytes) -> None:
        forbid(1)
        make(calls)

    change_calls(change)
    worker.make = forbid_and_make


def worker_no_new_privs_supervisor() -> None:
    from titus_py.worker import system_calls as worker_filter

    for call in ("prctl", "setresuid"):
        worker_filter.WORKER[call] = ((),)


@breaks("hidden", "fork server", within="fork_server")
def fork_server_dumpable(_: str) -> None:
    from titus_py.fork_server import life as fork_server

    fork_server.hide_memory = nothing


@breaks("network", "fork server", "worker", within="fork_server")
def fork_server_network_of_the_host(_: str) -> None:
    from titus_py.fork_server import confinement

    confinement.leave_namespaces = nothing


@breaks("root", "fork server", "worker", within="fork_server")
def fork_server_root(_: str) -> None:
    from titus_py.fork_server import confinement

    confinement.enter_empty_root = nothing


@breaks("root", "fork server", "worker", within="fork_server")
def fork_server_working_directory(_: str) -> None:
    """It has the empty root, and stays outside of it."""
    from titus_py.fork_server import confinement

    confinement.enter_empty_root = os.chroot


@breaks("limits", "fork server", "worker", within="fork_server")
def fork_server_file_limit(_: str) -> None:
    import resource

    change_limits(lambda limits: without(limits, resource.RLIMIT_FSIZE))


@breaks("limits", "fork server", "worker", within="fork_server")
def fork_server_memory_limit(_: str) -> None:
    import resource

    change_limits(lambda limits: without(limits, resource.RLIMIT_AS))


@breaks("limits", "fork server", within="fork_server")
def fork_server_descriptor_limit(_: str) -> None:
    """Its workers have the one that they should."""
    import resource

    from keyd.linux.process import Call

    KEPT.append(few := (ctypes.c_uint64 * 2)(8, 8))
    lower = Call("prlimit64", (0, resource.RLIMIT_NOFILE, ctypes.addressof(few)))
    change_limits(lambda limits: without(limits, resource.RLIMIT_NOFILE))
    change_calls(lambda calls: [lower, *calls])


def change_limits(change: Callable[[dict[int, int]], dict[int, int]]) -> None:
    from titus_py.fork_server import confinement

    real = confinement.limit
    confinement.limit = lambda limits: real(change(dict(limits)))


def without(limits: dict[int, int], what: int) -> dict[int, int]:
    return {name: most for name, most in limits.items() if name != what}


@breaks("speculation", "fork server", "worker", within="fork_server")
def fork_server_speculation(_: str) -> None:
    from titus_py.fork_server import confinement

    confinement.stop_speculation = nothing


@breaks("descriptors", "fork server", within="fork_server")
def fork_server_opens_a_file(file: str) -> None:
    from titus_py.fork_server import confinement

    real = confinement.keep_only

    # Not where the others are dup2()ed to, which are below.
    opened = fcntl.fcntl(os.open(file, os.O_RDONLY), fcntl.F_DUPFD_CLOEXEC, 100)
    confinement.keep_only = lambda kept: real({**kept, 7: opened})


@breaks("mappings", "fork server", "worker", within="fork_server")
def fork_server_writable_code(_: str) -> None:
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    KEPT.append(mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, protection))


@breaks("environment", "fork server", "worker", within="parent")
def fork_server_environment(_: str) -> None:
    from titus_py.parent import forks

    class Subprocess:
        DEVNULL = forks.subprocess.DEVNULL

        @staticmethod
        def Popen(*arguments: Any, env: dict[str, str], **named: Any) -> Any:
            env = {**env, "SECRET": "of the operator's"}
            return subprocess.Popen(*arguments, env=env, **named)

    subprocess, forks.subprocess = forks.subprocess, Subprocess


@breaks("key", "fork server", "worker", within="fork_server")
def fork_server_loads_the_key(file: str) -> None:
    _load_key(file)


# --- the parent -------------------------------------------------------------------


@breaks("connection", "worker", within="parent")
def parent_keeps_the_client(_: str) -> None:
    """By a message to itself: its filter would end it for dup(2)."""
    import socket

    from titus_py.parent.life import Parent

    real = Parent._hand_over

    def hand_over(self: Parent, arrival: Any) -> bool:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            socket.send_fds(ours, [b"."], [arrival.client.fileno()])
            KEPT.append(socket.recv_fds(theirs, 1, 1)[1])
        return real(self, arrival)

    Parent._hand_over = hand_over


@breaks("capabilities", "parent", within="parent")
def parent_capabilities(_: str) -> None:
    from keyd.linux import prctl
    from titus_py.parent import confinement

    real = confinement.become_with

    def become_with(uid: int, gid: int, kept: list[int], groups: Sequence[int]) -> None:
        real(uid, gid, [*kept, prctl.CAP_SETUID], groups)

    confinement.become_with = become_with


@breaks("uid", "parent", within="parent")
def parent_root(_: str) -> None:
    from titus_py.parent import confinement

    real = confinement.become_with
    confinement.become_with = lambda uid, gid, kept, groups: real(0, 0, kept, groups)


@breaks("filter", "parent", within="parent")
def parent_filter(_: str) -> None:
    from titus_py.parent import confinement

    confinement.seccomp.install = nothing


@breaks("hidden", "parent", within="parent")
def parent_dumpable(_: str) -> None:
    from keyd.linux import prctl
    from titus_py.parent import confinement

    confinement.hide_memory = lambda: prctl.set_dumpable(True)


@breaks("descriptors", "parent", within="parent")
def parent_opens_a_file(file: str) -> None:
    KEPT.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))


@breaks("key", "parent", within="parent")
def parent_has_the_key_in_what_passes_for_a_report(file: str) -> None:
    descriptor = os.memfd_create("report")
    with open(file, "rb") as key:
        os.write(descriptor, key.read())
    KEPT.append(descriptor)


@breaks("key", "parent", within="parent")
def parent_loads_the_key(file: str) -> None:
    _load_key(file)


def _load_key(file: str) -> None:
    from keyd.keys import load_private_key

    key = load_private_key(file, None)
    KEPT.append((key, key.private_numbers()))


# --- the supervisor ---------------------------------------------------------------


def change(role: str, change: str) -> None:
    """Have the resolver, or the metrics server, run this before all else."""
    from titus_py.supervisor import unprivileged

    real = unprivileged._program
    names = f"from titus_py.{role} import confinement, life"
    changed = ("-c", f"{names}\n{change}\nlife.main()")
    unprivileged._program = lambda name: changed if name == role else real(name)


@breaks("filter", "resolver", within="supervisor")
def resolver_filter(_: str) -> None:
    change("resolver", "confinement.seccomp.install = lambda *_: None")


@breaks("limits", "resolver", within="supervisor")
def resolver_limits(_: str) -> None:
    change("resolver", "confinement.limit = lambda _: None")


@breaks("filter", "metrics", within="supervisor")
def metrics_filter(_: str) -> None:
    change("metrics", "confinement.seccomp.install = lambda *_: None")


@breaks("limits", "metrics", within="supervisor")
def metrics_limits(_: str) -> None:
    change("metrics", "confinement.limit = lambda _: None")


@breaks("root", "metrics", within="supervisor")
def metrics_root(_: str) -> None:
    change("metrics", "confinement.enter_empty_root = lambda _: None")


@breaks("namespaces", "metrics", within="supervisor")
def metrics_namespaces(_: str) -> None:
    """But for the network's."""
    change(
        "metrics",
        "real = confinement.leave_namespaces;"
        "confinement.leave_namespaces = lambda _: real(confinement.CLONE_NEWNET)",
    )


@breaks("network", "metrics", within="supervisor")
def metrics_network(_: str) -> None:
    change(
        "metrics",
        "real = confinement.leave_namespaces;"
        "confinement.leave_namespaces = lambda kinds: real(kinds & ~confinement.CLONE_NEWNET)",
    )


@breaks("descriptors", "metrics", within="supervisor")
def metrics_listens_elsewhere(_: str) -> None:
    change("metrics", "import socket; life.KEPT = socket.create_server(('127.0.0.1', 0))")


@breaks("processes", "supervisor", within="supervisor")
def supervisor_has_a_stranger(_: str) -> None:
    import subprocess

    KEPT.append(subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "sleep", "60"]))


@breaks("capabilities", "supervisor", within="supervisor")
def supervisor_capabilities(_: str) -> None:
    from titus_py.supervisor import life as supervisor

    supervisor.keep_capabilities = nothing


@breaks("hidden", "supervisor", within="supervisor")
def supervisor_dumpable(_: str) -> None:
    from titus_py.supervisor import life as supervisor

    supervisor.hide_memory = nothing


@breaks("descriptors", "supervisor", within="supervisor")
def supervisor_opens_the_key(file: str) -> None:
    KEPT.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))


@breaks("limits", "supervisor", within="supervisor")
def supervisor_core_dumps(_: str) -> None:
    from titus_py.supervisor import life as supervisor

    supervisor.forbid_core_dumps = nothing


@breaks("environment", "parent", within="supervisor")
def parent_environment(_: str) -> None:

    from titus_py.supervisor import child

    _environment_of(child._PARENT)


@breaks("environment", "keyd", within="supervisor")
def keyd_environment(_: str) -> None:

    from titus_py.supervisor import child

    _environment_of(child._KEYD)


def _environment_of(program: tuple[str, ...]) -> None:
    import subprocess

    real = subprocess.Popen

    def start(arguments: Any, **given: Any) -> Any:
        if set(program) <= set(arguments):
            given["env"] = {**given["env"], "SECRET": "of the operator's"}
        return real(arguments, **given)

    subprocess.Popen = start  # type: ignore[assignment,misc]


# --- keyd -------------------------------------------------------------------------


@breaks("uid", "keyd", within="keyd")
def keyd_uid(_: str) -> None:
    from keyd import confinement

    real = confinement.become
    # The one before it is the metrics server's.
    confinement.become = lambda uid, gid: real(uid + 1, gid + 1)


@breaks("capabilities", "keyd", within="keyd")
def keyd_bounding_set(_: str) -> None:
    from keyd import confinement

    confinement.forbid_regaining = nothing


@breaks("hidden", "keyd", within="keyd")
def keyd_dumpable(_: str) -> None:
    from keyd import confinement
    from keyd.linux import prctl

    confinement.hide_memory = lambda: prctl.set_dumpable(True)


@breaks("namespaces", "keyd", within="keyd")
def keyd_ipc_namespace(_: str) -> None:
    from keyd import confinement

    real = confinement.leave_namespaces
    confinement.leave_namespaces = lambda flags: real(flags & ~confinement.CLONE_NEWIPC)


@breaks("network", "keyd", within="keyd")
def keyd_network(_: str) -> None:
    from keyd import confinement

    real = confinement.leave_namespaces
    confinement.leave_namespaces = lambda flags: real(flags & ~confinement.CLONE_NEWNET)


@breaks("root", "keyd", within="keyd")
def keyd_root(_: str) -> None:
    from keyd import confinement

    confinement.enter_empty_root = nothing


@breaks("root", "keyd", within="keyd")
def keyd_working_directory(_: str) -> None:
    """It has the empty root, and stays outside of it."""
    from keyd import confinement

    confinement.enter_empty_root = os.chroot


@breaks("filter", "keyd", within="keyd")
def keyd_filter_of_one_thread(_: str) -> None:
    from keyd.linux import seccomp

    real = seccomp.install
    seccomp.install = lambda program, flag: real(program)


@breaks("locked", "keyd", within="keyd")
def keyd_swappable(_: str) -> None:
    from keyd import __main__, confinement

    confinement.lock_memory = lambda: False
    confinement.lock_memory_meanwhile = __main__.lock_memory_meanwhile = nothing


@breaks("speculation", "keyd", within="keyd")
def keyd_speculation(_: str) -> None:
    from keyd import serve

    serve.guard = list


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
    from keyd import channel
    from keyd.protocol import Status
    from titus_py.supervisor.announced_audits import FIRST_CONNECTION

    real = channel.Channel.grant

    def grant(self: Any, keys: Any, message: bytes) -> Any:
        result = real(self, keys, message)
        if result is not None and self.connection >= FIRST_CONNECTION:
            raise channel.Refused(Status.FAILED, "taken out")
        return result

    channel.Channel.grant = grant  # type: ignore[method-assign]


def _change_terms(**changes: Any) -> None:
    """Have keyd hear other terms than those that were stated for the audit's channels."""
    from keyd.protocol import Open
    from titus_py.supervisor.announced_audits import FIRST_CONNECTION

    real = Open.decode.__func__  # type: ignore[attr-defined]

    def decode(cls: type[Open], message: bytes) -> Open:
        terms: Open = real(cls, message)
        if terms.connection < FIRST_CONNECTION:
            return terms
        return terms._replace(
            **{name: change(getattr(terms, name)) for name, change in changes.items()}
        )

    Open.decode = classmethod(decode)  # type: ignore[assignment,method-assign]


def _change_grants(
    change: Callable[[Any], Any], of: Callable[[Any], bool] = lambda stated: True
) -> None:
    """Likewise, other grants."""
    from keyd import daemon
    from keyd.sites import Sites
    from titus_py.supervisor.announced_audits import FIRST_CONNECTION

    class Changed(Sites):
        def __init__(self, stated: Sites) -> None:
            self._stated = stated

        def select(self, server_name: str | None) -> Any:
            return change(self._stated.select(server_name))

    real = daemon.Keyd.open

    def opened(self: Any, terms: Any, grants: Any, *others: Any) -> None:
        real(
            self,
            terms,
            Changed(grants) if terms.connection >= FIRST_CONNECTION and of(grants) else grants,
            *others,
        )

    daemon.Keyd.open = opened  # type: ignore[method-assign]


@breaks("refuses_second", "keyd", within="keyd")
def keyd_does_not_count(_: str) -> None:
    _change_terms(operations=lambda stated: stated + 9)


@breaks("refuses_late", "keyd", within="keyd")
def keyd_has_no_clock(_: str) -> None:
    _change_terms(lifetime_ms=lambda stated: 60_000)


@breaks("refuses_decrypt", "keyd", within="keyd")
def keyd_decrypts(_: str) -> None:
    from keyd.protocol import Power

    _change_grants(lambda stated: {key: powers | {Power.DECRYPT} for key, powers in stated.items()})


@breaks("refuses_version", "keyd", within="keyd")
def keyd_signs_for_any_version(_: str) -> None:
    from keyd.protocol import Power

    _change_grants(lambda stated: dict.fromkeys(stated, frozenset(Power) - {Power.DECRYPT}))


@breaks("refuses_other_key", "keyd", within="keyd")
def keyd_grants_every_key(_: str) -> None:
    from keyd.protocol import Power

    class Every(dict[bytes, frozenset[Power]]):
        def get(self, key: bytes, default: object = None) -> frozenset[Power]:  # type: ignore[override]
            return super().get(key, frozenset({Power.SIGN_TLS13}))

    # With several virtual hosts, another check would notice.
    _change_grants(Every, lambda stated: len(stated._sites) == 1)


@breaks("refuses_other_site", "keyd", within="keyd")
def keyd_grants_every_sites_keys(_: str) -> None:
    from keyd.sites import Sites

    def every(self: Any, server_name: str | None) -> Any:
        return {key: powers for _, some in self._sites.values() for key, powers in some.items()}

    Sites.select = every  # type: ignore[method-assign]


@breaks("refuses_unseen", "keyd", within="keyd")
def keyd_signs_for_nobody(_: str) -> None:
    from keyd import channel

    real = channel.witness
    anybody = bytes.fromhex("010000320303" + "00" * 32 + "000002130101000007")
    anybody += bytes.fromhex("002b0003020304")
    channel.witness = lambda message: real(message or anybody)


@breaks("refuses_other_handshake", "keyd", within="keyd")
def keyd_signs_any_hash(_: str) -> None:
    from keyd import powers

    powers._check_client_of_certificate_verify = lambda octets, client: None


@breaks("refuses_malformed", "keyd", within="keyd")
def keyd_takes_any_version(_: str) -> None:
    from keyd.protocol import Request

    real = Request.decode.__func__  # type: ignore[attr-defined]
    Request.decode = classmethod(  # type: ignore[assignment,method-assign]
        lambda cls, message: real(cls, b"\x01" + message[1:])
    )


def _sign_also(fits: Callable[[bytes], bool]) -> None:
    from keyd import powers

    real = powers._group_of_server_key_exchange
    powers._group_of_server_key_exchange = lambda octets: 29 if fits(octets) else real(octets)
    powers._check_client_of_server_key_exchange = lambda *_: None


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
    _, role, words, file, *rest = sys.argv
    names = words.split(",")
    taken_out = [BREAKAGES[name] for name in names]
    processes = {breakage.process for breakage in taken_out}
    if role == "supervisor":
        if any(breakage.check == "no_new_privs" for breakage in taken_out):
            import prctl

            prctl.set_no_new_privs = nothing
        from titus_py.__main__ import main as serve
        from titus_py.supervisor import child

        if "keyd" in processes:
            child._KEYD = (__file__, "keyd", words, file)
        if processes & {"parent", "fork_server"}:
            child._PARENT = (__file__, "parent", words, file)
        if "worker_no_new_privs" in names:
            worker_no_new_privs_supervisor()
        sys.argv = ["titus-py", *rest]
        life = serve
    elif role == "parent":
        from titus_py.parent import forks
        from titus_py.parent import life as parent

        if "fork_server" in processes:
            forks._PROGRAM = (__file__, "fork_server", words, file)
        sys.argv = ["titus_py.parent.life", *rest]
        life = parent.main
    elif role == "fork_server":
        from titus_py.fork_server import life as fork_server

        sys.argv = ["titus_py.fork_server.life", *rest]
        life = fork_server.main
    else:
        from keyd.__main__ import main as keyd

        sys.argv = ["keyd", "serve", *rest]
        life = keyd
    for breakage in taken_out:
        if breakage.process == role:
            breakage.take_out(file)
    return life()


if __name__ == "__main__":
    sys.exit(main())
