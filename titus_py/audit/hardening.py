"""Checks: how hard an error in memory is to use in a worker: what the programs were built with.

Run by ``titus-py audit``. It says what there is: whoever builds the interpreter and the TLS library
decides, not titus-py. The files are opened as the fork server has mapped them, whatever is at their
path by now.
"""

import mmap
import os
import re
import struct
from pathlib import Path

from titus_py.audit.finding import Check, Seen, holds, not_available
from titus_py.audit.instance import Role
from titus_py.audit.observation import Mapping, Observation, Scene

__all__ = [
    "CHECKS",
    "has_stack_protector",
    "interpreter",
    "is_position_independent",
    "tls_library",
]

#: <elf.h>: what the file is for, at this place of its header.
_ELF, _TYPE_PLACE, _ET_DYN = b"\x7fELF", 16, 3
#: What checked code calls when the canary is not what it was: a name in the file's symbol table.
_CANARY = b"\0__stack_chk_fail\0"
#: Where OpenSSL is: a library of the system's, or within cryptography's wheel.
_SYSTEMS, _WHEELS = "libssl.so", "_rust.abi3.so"
#: A program of Debian's, with its minor version.
_PYTHON = re.compile(r"python3\.(\d+)")
#: What the kernel adds to the name of a file that is no longer there (proc_pid_maps(5)).
_DELETED = " (deleted)"


def is_position_independent(header: bytes) -> bool:
    """Whether a program can be loaded anywhere. ``header``: its first 18 octets or more."""
    if header[: len(_ELF)] != _ELF:
        return False
    kind: int = struct.unpack_from("=H", header, _TYPE_PLACE)[0]
    return kind == _ET_DYN


def has_stack_protector(file: Path) -> bool:
    """Whether any function of an ELF file checks a canary. Raises OSError."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as octets:
        return octets.find(_CANARY) >= 0


def _interpreter(seen: Observation, _: Scene) -> Seen:
    return interpreter(seen.pid)


def interpreter(pid: int) -> Seen:
    """What a process's Python is like: loaded anywhere, and one that is still seen to?"""
    program = Path(f"/proc/{pid}/exe")
    try:
        name = os.readlink(program)
        with program.open("rb") as opened:
            header = opened.read(64)
            one = os.fstat(opened.fileno())
    except (FileNotFoundError, ProcessLookupError):
        return not_available("it ended while it was looked at")
    if name.endswith(_DELETED):
        return _replaced(name)
    if next_one := _release_after(Path(name), one):
        return not_available(
            f"{name} is an earlier release's, and has no updates any more: that of this one is "
            f"{next_one}. Build titus-py anew on this release, and install that (installation.md)"
        )
    if is_position_independent(header):
        return holds(f"{name}: its addresses are drawn by lot at each start")
    return not_available(
        f"{name} is always at the same addresses: an attacker need not find them out. Run titus-py "
        "with a Python that was built with -fPIE -pie"
    )


def _release_after(program: Path, one: os.stat_result) -> str | None:
    """What python3 is by now, beside a program of a lower version, which it once was."""
    usual = program.with_name("python3")
    try:
        # In a container, another file may have that name.
        if not os.path.samestat(program.stat(), one):
            return None
        next_one = usual.resolve(strict=True).name
    except OSError:
        return None
    ours, theirs = (_PYTHON.fullmatch(name) for name in (program.name, next_one))
    return next_one if ours and theirs and int(ours[1]) < int(theirs[1]) else None


def _library(seen: Observation, _: Scene) -> Seen:
    return tls_library(seen.pid, seen.mappings)


def tls_library(pid: int, mappings: tuple[Mapping, ...]) -> Seen:
    """What a process's OpenSSL is like: protected, and still the one that is installed?"""
    mapping = _openssl(mappings)
    if mapping is None:
        return not_available("no file of this process is known to hold OpenSSL")
    if mapping.name.endswith(_DELETED):
        return _replaced(mapping.name)
    try:
        protected = has_stack_protector(
            Path(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")
        )
    except (FileNotFoundError, ProcessLookupError):
        return not_available("it ended while it was looked at")
    except PermissionError:
        # The kernel asks for a capability of the first user namespace's (proc_pid_map_files(5)).
        return not_available(f"in a user namespace, nobody may open what is mapped: {mapping.name}")
    if protected:
        return holds(f"{mapping.name} checks canaries")
    return not_available(
        f"{mapping.name} was built without a stack protector, as cryptography's wheels are: the "
        "distribution's packages have one"
    )


def _replaced(name: str) -> Seen:
    return not_available(
        f"{name.removesuffix(_DELETED)} is another file by now, by an update, and this process has "
        "the old one. Have new connections use the new one: titus-py reload --program; if keyd is "
        "a unit of its own, systemctl restart titus-keyd"
    )


def _openssl(mappings: tuple[Mapping, ...]) -> Mapping | None:
    for file in (_SYSTEMS, _WHEELS):
        for mapping in mappings:
            if Path(mapping.name.removesuffix(_DELETED)).name.startswith(file):
                return mapping
    return None


CHECKS = (
    Check(
        "interpreter",
        frozenset({Role.FORK_SERVER}),
        "the interpreter is position-independent, and is the one that the system sees to",
        "the ELF header of /proc/PID/exe",
        _interpreter,
    ),
    Check(
        "library",
        frozenset({Role.FORK_SERVER}),
        "the TLS library has a stack protector, and is the one that is installed",
        "the symbols of the file with OpenSSL, by /proc/PID/maps and map_files",
        _library,
    ),
)
