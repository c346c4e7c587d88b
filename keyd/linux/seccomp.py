"""System call filters (seccomp(2)): building them, and putting them on.

``build`` is run by the supervisor, or by a keyd on its own, while it is still root:
libseccomp knows every architecture's numbers, and is not carried into the process
that the filter is for. That process only runs ``install``.
"""

import ctypes
import os
from collections.abc import Mapping
from enum import IntFlag
from typing import NamedTuple

__all__ = ["SET_MODE_FILTER", "Flag", "Only", "Program", "Rules", "build", "install"]

SET_MODE_FILTER = 1
_SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}[os.uname().machine]


class Only(NamedTuple):
    """A condition on a system call's argument: ``argument & mask == value``."""

    argument: int
    mask: int
    value: int


#: What is allowed: a system call's name, and the alternatives under which it is; a call
#: without any condition is allowed with one empty alternative.
Rules = Mapping[str, tuple[tuple[Only, ...], ...]]


class Flag(IntFlag):
    """seccomp(2)'s flags that are of use here."""

    ONE_THREAD = 0
    ALL_THREADS = 1  # SECCOMP_FILTER_FLAG_TSYNC


def build(rules: Rules) -> bytes:
    """A filter that allows these calls and kills the process for any other, as BPF.

    So it does for a call of another architecture's (the 32-bit ones). Raises OSError or
    RuntimeError where libseccomp is missing or does not know a call.
    """
    # Here and nowhere else: the processes that a filter is for do without these, and without
    # the libraries that they load.
    import tempfile

    import pyseccomp

    program = pyseccomp.SyscallFilter(pyseccomp.KILL_PROCESS)
    program.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for name, alternatives in rules.items():
        for conditions in alternatives:
            arguments = [
                pyseccomp.Arg(only.argument, pyseccomp.MASKED_EQ, only.mask, only.value)
                for only in conditions
            ]
            program.add_rule_exactly(pyseccomp.ALLOW, name, *arguments)
    with tempfile.TemporaryFile() as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class Program:
    """A filter as the kernel takes it: ``address`` is that of its struct sock_fprog."""

    def __init__(self, bpf: bytes) -> None:
        self._fprog = _SockFprog(len(bpf) // 8, bpf)
        self.address = ctypes.addressof(self._fprog)


_libc = ctypes.CDLL(None, use_errno=True)


def install(program: Program, flag: Flag = Flag.ONE_THREAD) -> None:
    """Put a filter on, for good; filters add up. Needs no_new_privs. Raises OSError."""
    result = _libc.syscall(
        _SYS_SECCOMP, SET_MODE_FILTER, int(flag), ctypes.c_void_p(program.address)
    )
    if result:
        # With TSYNC, a positive result is a thread that could not be brought along.
        error = ctypes.get_errno()
        raise OSError(error, f"seccomp: {os.strerror(error)} ({result})")
