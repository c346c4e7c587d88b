"""Which files a process runs that an update has replaced since: its program, its libraries.

Run by ``keyd status`` and ``keyd audit``, as root, for each keyd. It trusts the kernel, and opens
none of these files: any user can have a process that looks like a keyd. Python's own modules are
in no memory as they are on disk. But no update replaces them without the interpreter, or without
the libraries in C that keyd and each package of it come with.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from keyd.inspection.findings import first_of
from keyd.inspection.mappings import mappings
from keyd.inspection.open_files import name_of

__all__ = ["in_words", "outdated"]

#: What the kernel adds to the name of a file that is no longer there (proc_pid_maps(5)).
_DELETED = " (deleted)"
#: In whose memory something may be that is no file of a program, whatever it is called.
_IN_MEMORY = "/memfd:"
#: What is named first: most updates that are urgent are OpenSSL's.
_OPENSSL = "libssl.", "libcrypto.", "_rust."


def outdated(pid: int) -> list[str] | None:
    """The paths of those files, where others are by now, or none; None if it cannot be told.

    Of the process and its children: keyd's have the modules of tokens.
    """
    try:
        paths = set(_outdated(pid))
        for child in _children(pid):
            with suppress(FileNotFoundError, ProcessLookupError):
                paths.update(_outdated(child))
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        return None
    return sorted(paths, key=lambda path: (not Path(path).name.startswith(_OPENSSL), path))


def _outdated(pid: int) -> Iterator[str]:
    """Memory that was made of a file, and the file removed, is no such file. What is executed, and
    is the program or called a library, is.
    """
    program = name_of(f"/proc/{pid}/exe")
    for one in mappings(pid):
        name = one.span.mapping
        if (
            one.executable
            and name.endswith(_DELETED)
            and not name.startswith(_IN_MEMORY)
            and (name == program or ".so" in Path(name).name)
        ):
            yield name.removesuffix(_DELETED)


def _children(pid: int) -> list[int]:
    """And theirs (proc_tid_children(5))."""
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(FileNotFoundError, ProcessLookupError):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                found += [int(child), *_children(int(child))]
    return found


def in_words(paths: list[str], pid: int, unit: str) -> str:
    """In the words of ``titus-py audit``, with what to do."""
    one = len(paths) == 1
    are, what = ("is another file", "the old one") if one else ("are other files", "the old ones")
    return (
        f"{first_of(paths)} {are} by now, by an update, and this process has {what}: "
        f"{_how_to_renew(pid, unit)}"
    )


def _how_to_renew(pid: int, unit: str) -> str:
    """A container has services of the same name as this machine's."""
    what = f"systemctl restart {unit}" if unit else "start it again"
    with suppress(OSError):
        if os.stat(f"/proc/{pid}/ns/pid").st_ino != os.stat("/proc/self/ns/pid").st_ino:
            return f"{what}, in its container"
    return what
