"""System call filters (seccomp(2)): building them, and installing them.

``build`` is run by the supervisor, or by a keyd on its own before it confines itself. It
uses libseccomp, which knows every architecture's numbers. A process that is given its
filter only runs ``install``, and does not load libseccomp.
"""

import errno
import os
import struct
from collections.abc import Callable, Mapping
from enum import IntFlag
from typing import Any, NamedTuple

from keyd.linux.calls import address, call

__all__ = [
    "SET_MODE_FILTER",
    "Flag",
    "Only",
    "Program",
    "Rules",
    "build",
    "build_forbidding",
    "has",
    "install",
]

SET_MODE_FILTER = 1
#: seccomp_attr_set(3): SCMP_FLTATR_CTL_OPTIMIZE.
_AS_A_TREE = 2
#: seccomp_syscall_resolve_name(3): __NR_SCMP_ERROR. What only other architectures have is below it.
_NO_CALL = -1
_SONAMES = {"c": "libc.so.6", "seccomp": "libseccomp.so.2"}
#: struct sock_fprog: how many instructions, and where.
_SOCK_FPROG = struct.Struct("@HP")


class Only(NamedTuple):
    """A condition on a system call's argument: ``argument & mask == value``."""

    argument: int
    mask: int
    value: int


#: The allowed system calls: each has a name, and alternatives, one of which has to hold. A call
#: that is always allowed has one empty alternative.
Rules = Mapping[str, tuple[tuple[Only, ...], ...]]


class Flag(IntFlag):
    """The flags of seccomp(2) that are used here."""

    ONE_THREAD = 0
    ALL_THREADS = 1  # SECCOMP_FILTER_FLAG_TSYNC


def _pyseccomp() -> Any:
    """The module, imported only here: processes that are given a filter do without its library.

    The dynamic linker finds the libraries by their names. Python's own way would start ldconfig,
    and perhaps a compiler, as root, and finds nothing where /etc/ld.so.cache is missing.
    """
    import ctypes.util

    find = ctypes.util.find_library
    ctypes.util.find_library = lambda name: _SONAMES.get(name)
    try:
        import pyseccomp
    finally:
        ctypes.util.find_library = find
    return pyseccomp


def build(
    rules: Rules, error: int = 0, failing: Rules | None = None, architecture: str = "NATIVE"
) -> bytes:
    """Build a filter, as BPF, that allows these calls and kills the process for any other.

    With ``error``, any other call fails with that errno instead; those of ``failing`` fail with
    EPERM. A call of another architecture (a 32-bit one) kills the process in any case. A call that
    the architecture does not have is left out: arm64 has ppoll(2), and no poll(2). Raises
    OSError or RuntimeError where libseccomp is missing or does not know a call.
    """
    pyseccomp = _pyseccomp()
    program = _filter(pyseccomp.ERRNO(error) if error else pyseccomp.KILL_PROCESS, architecture)
    for action, calls in (
        (pyseccomp.ALLOW, rules),
        (pyseccomp.ERRNO(errno.EPERM), failing or {}),
    ):
        there = {name: rule for name, rule in calls.items() if has(name, architecture)}
        _add(program.add_rule_exactly, action, there)
    return _exported(program)


def has(call: str, architecture: str = "NATIVE") -> bool:
    """Whether an architecture, by libseccomp's name for it, has a call that others may have.

    True as well of what is no call at all: a filter with that cannot be built.
    """
    pyseccomp = _pyseccomp()
    number: int = pyseccomp.resolve_syscall(getattr(pyseccomp.Arch, architecture), call)
    return number >= _NO_CALL


def _filter(otherwise: object, architecture: str = "NATIVE") -> Any:
    """An empty filter, and what it does with calls that it has no rule for."""
    pyseccomp = _pyseccomp()
    program = pyseccomp.SyscallFilter(otherwise)
    if architecture != "NATIVE":
        program.add_arch(getattr(pyseccomp.Arch, architecture))
        program.remove_arch(pyseccomp.Arch.NATIVE)
    program.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    # A tree of comparisons, and not a row. To install a filter, the kernel has it judge each call
    # that there is, and each worker installs one.
    program.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, _AS_A_TREE)
    return program


def _add(add_rule: Callable[..., None], action: object, calls: Rules) -> None:
    pyseccomp = _pyseccomp()
    for name, alternatives in calls.items():
        for conditions in alternatives:
            arguments = [
                pyseccomp.Arg(only.argument, pyseccomp.MASKED_EQ, only.mask, only.value)
                for only in conditions
            ]
            add_rule(action, name, *arguments)


def _exported(program: Any) -> bytes:
    with open(os.memfd_create("filter"), "w+b") as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


def build_forbidding(rules: Rules, failing: Rules) -> bytes:
    """Build a filter that kills the process for these calls, and allows all others.

    Those of ``failing`` fail as if the kernel did not know them (ENOSYS). For code whose calls
    nobody knows. A call that this architecture does not have is left out. Raises as ``build``.
    """
    pyseccomp = _pyseccomp()
    program = _filter(pyseccomp.ALLOW)
    for action, calls in (
        (pyseccomp.KILL_PROCESS, rules),
        (pyseccomp.ERRNO(errno.ENOSYS), failing),
    ):
        _add(program.add_rule, action, calls)
    return _exported(program)


class Program:
    """A filter as the kernel takes it; ``address`` is the address of its struct sock_fprog."""

    def __init__(self, bpf: bytes) -> None:
        self._instructions = bpf
        self._fprog = _SOCK_FPROG.pack(len(bpf) // 8, address(bpf))
        self.address = address(self._fprog)


def install(program: Program, flag: Flag = Flag.ONE_THREAD) -> None:
    """Install a filter for good; filters add up. Needs no_new_privs. Raises OSError."""
    # With TSYNC, a positive result is the id of a thread that cannot have the filter.
    if thread := call("seccomp", SET_MODE_FILTER, int(flag), program.address):
        raise OSError(errno.ECANCELED, f"seccomp: thread {thread} cannot have the filter")
