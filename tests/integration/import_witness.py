"""What a process imports, and whether it has confined itself before: noted from within.

Part of a program of a test's (``watched``), and of no other: each of its processes runs this as it
starts, before anything of the product's. A confined process can write to no file. So the notes are
in memory that it shares with a file, from its start on, and its children with it.
"""

import ctypes
import os
import sys

# What this module imports, a process has that might not have it otherwise: next to nothing.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

__all__ = ["COUNT_OCTETS", "IMPORTED", "LATE", "NOTES", "OCTETS", "STARTED", "WITHDREW", "begin"]

#: The directory, beside this file, with a file for each process; and how long each is.
NOTES, OCTETS = "notes", 1 << 18
#: Of each file, the first octets say how many there are in use after them.
COUNT_OCTETS = 8
#: What a line says: the command; the module that confined the process; what was imported before,
#: and after.
STARTED, WITHDREW, IMPORTED, LATE = "started", "withdrew", "imported", "late"
#: Whatever confines itself calls one of these, as MODULE.NAME.
_LAST_STEPS = (("keyd.linux.seccomp", "install"), ("keyd.linux.landlock", "restrict_self"))
_PROT_READ_WRITE, _MAP_SHARED = 1 | 2, 1
_FRAMES = 8


class _Notes:
    """Lines of text in a file's mapping: how many octets, the lines, zeros."""

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(descriptor, OCTETS)
        # Python's mmap would keep a descriptor, in processes that are to have no other than theirs.
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        at = libc.mmap(None, OCTETS, _PROT_READ_WRITE, _MAP_SHARED, descriptor, 0)
        os.close(descriptor)
        self._noted = ctypes.c_uint64.from_address(at)
        self._lines = at + COUNT_OCTETS
        self._move = ctypes.memmove

    def note(self, kind: str, text: str) -> None:
        line = f"{kind} {text}\n".encode()
        noted = self._noted.value
        if COUNT_OCTETS + noted + len(line) <= OCTETS:
            self._move(self._lines + noted, line, len(line))
            # A child that was forked goes on from here.
            self._noted.value = noted + len(line)


class _Witness:
    """The first that is asked where a module is, of each that is not there yet. It finds none."""

    def __init__(self, notes: _Notes) -> None:
        self._notes = notes
        self._confined = False

    def find_spec(self, name: str, path: "Sequence[str] | None", target: object = None) -> None:
        del path, target
        for module, step in _LAST_STEPS:
            if (there := sys.modules.get(module)) is not None and hasattr(there, step):
                self._watch(there, step)
        if self._confined:
            self._notes.note(LATE, f"{name} {_callers()}")
        else:
            self._notes.note(IMPORTED, name)

    def _watch(self, module: "ModuleType", step: str) -> None:
        take: Callable[..., None] = getattr(module, step)
        if getattr(take, "watched", False):
            return

        def watched(*arguments: object) -> None:
            take(*arguments)
            self._confined = True
            # The one that was started has another __name__.
            self._notes.note(WITHDREW, sys._getframe(1).f_globals["__spec__"].name)

        watched.watched = True  # type: ignore[attr-defined]
        setattr(module, step, watched)


def _callers() -> str:
    frame, found = sys._getframe(2), []
    while frame is not None and len(found) < _FRAMES:
        if "importlib" not in frame.f_code.co_filename:
            found.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)


def begin(known: set[str]) -> None:
    """Witness what this process imports. ``known`` is what it had imported before this module."""
    # Of a virtual environment, Python reads what has it begin more than once.
    if any(type(one).__name__ == _Witness.__name__ for one in sys.meta_path):
        return
    started = os.stat("/proc/self").st_ctime_ns
    notes = _Notes(f"{os.path.dirname(__file__)}/{NOTES}/{os.getpid()}-{started}")
    notes.note(STARTED, repr(sys.orig_argv))
    for name in set(sys.modules) - known:
        # What only this module needs, the product has to import itself. What is in C is there once.
        if not name.startswith("_"):
            del sys.modules[name]
    sys.meta_path.insert(0, _Witness(notes))  # type: ignore[arg-type]
