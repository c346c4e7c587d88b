"""The keyds of their own that run on this machine, and what they say of themselves.

Run by root, for ``keyd status`` and ``keyd audit``. A keyd is found by its memory file
(``keyd.status_page``). Any user can make one that looks like it: so who the process runs as, and
its unit, are the kernel's and are shown; and what it says is decoded strictly.
"""

import json
import os
import pwd
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import prctl

from keyd.inspection.open_files import name_of, opened
from keyd.inspection.origins import unit_of, user_of
from keyd.protocol import Status
from keyd.status_page import HEAD, NAME, OCTETS, TEXT_CHARACTERS, VERSION, Refused, Report

__all__ = ["NONE_RUNS", "REFUSED", "Running", "Unreadable", "read", "running"]

#: What is said where an administrator looks for one, and how to learn why there is none.
NONE_RUNS = (
    "no keyd of its own runs: one begins when it is first asked, or with "
    "'systemctl start keyd@NAME', which says whether it can"
)

#: What is said of a process that may be a keyd, or have a key, where the kernel refuses to tell.
REFUSED = (
    "cannot be looked into: the kernel does not let this process. In a container, run this on the "
    "host; on the host, a security profile (AppArmor, SELinux) is in the way"
)
_NEEDS = (
    "needs root with CAP_SYS_PTRACE, to look into other processes: use sudo; in a container, "
    "'docker exec --privileged' or 'podman exec --privileged'; or run it on the host"
)

#: How often a page is read that is just being written, and what it is otherwise.
_ATTEMPTS, _PAUSE_SECONDS = 20, 0.01
_TORN = "its page has no whole report"


class Unreadable(ValueError):
    """No page of this version, or not the form that it has to have."""


class Running(NamedTuple):
    """One keyd: by the kernel's account, and by its own. ``problem`` is why it has no report."""

    pid: int
    user: str
    unit: str
    report: Report | None
    problem: str = ""

    @property
    def title(self) -> str:
        return self.unit or f"process {self.pid}"


def running() -> list[Running]:
    """By pid. Raises PermissionError where this process is not root, or has not root's rights."""
    if os.geteuid() != 0 or not prctl.cap_effective.sys_ptrace:
        raise PermissionError(_NEEDS)
    with open(os.memfd_create("mount"), "rb") as own:
        mount = opened("self", own.fileno()).mount
    found: dict[int, Running] = {}
    left = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    for _ in range(_ATTEMPTS):
        for pid in left:
            # Processes end meanwhile, and execute others.
            found.pop(pid, None)
            with suppress(FileNotFoundError, ProcessLookupError):
                one = _looked_at(pid, mount)
                if one is not None:
                    found[pid] = one
        # All of them together: any user can have any number of those that are never whole.
        left = [pid for pid, one in found.items() if one.problem == _TORN]
        if not left:
            break
        time.sleep(_PAUSE_SECONDS)
    return [one for _, one in sorted(found.items())]


def _looked_at(pid: int, mount: int) -> Running | None:
    """None if it is no keyd."""
    if Path(f"/proc/{pid}/comm").read_bytes().strip() != b"keyd":
        return None
    try:
        page = _page_of(pid, mount)
    except PermissionError:
        # In another user namespace, say. It may be one.
        return Running(*_known_of(pid), None, REFUSED)
    if page is None:
        return None
    try:
        return _running(pid, page)
    finally:
        os.close(page)


def _page_of(pid: int, mount: int) -> int | None:
    """Its memory file, opened, which is on this mount: the kernel's own, where nobody makes others.

    A file elsewhere can have the same name, and be one that keeps whoever opens it waiting; and one
    can take the place of the other. So it is opened for nothing at first. Who only reads a page is
    not who writes it: another audit is called keyd, too.
    """
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with suppress(FileNotFoundError):
            if not name_of(path).startswith(f"/memfd:{NAME} "):
                continue
            access = opened(pid, name).access
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                if (opened("self", file).mount, access) == (mount, os.O_RDWR):
                    return os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
            finally:
                os.close(file)
    return None


def _running(pid: int, page: int) -> Running:
    known = _known_of(pid)
    try:
        return Running(*known, read(page))
    except Unreadable as error:
        return Running(*known, None, str(error))


def _known_of(pid: int) -> tuple[int, str, str]:
    """By the kernel's account."""
    uid = user_of(pid)
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    return pid, user, unit_of(pid)


def read(descriptor: int) -> Report:
    """The report in a page; raises Unreadable. Perhaps it is just being written."""
    page = os.pread(descriptor, OCTETS, 0)
    if len(page) > HEAD.size:
        checksum, length = HEAD.unpack_from(page)
        text = page[HEAD.size : HEAD.size + length]
        if text and zlib.crc32(text) == checksum:
            return _report(text)
    raise Unreadable(_TORN)


def _report(text: bytes) -> Report:
    try:
        fields = json.loads(text)
        version = fields.pop("version")
        if version != VERSION:
            raise Unreadable(f"its page has version {version!r:.20}: restart it")
        fields["last_refused"] = [Refused(*one) for one in fields["last_refused"]]
        report = Report(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, Unreadable) else Unreadable("no report") from None
    if not _is_well_formed(report):
        raise Unreadable("its report is not in order")
    return report


def _is_well_formed(report: Report) -> bool:
    counts = [report.keys_in_all, report.signed, report.decrypted, *_list(report.seconds)]
    refusals = report.refused if isinstance(report.refused, dict) else {"": None}
    known = {status.name.lower() for status in Status}
    return (
        _is_text(report.command)
        and _is_number(report.started)
        and _is_number(report.seconds_sum)
        and all(_is_text(one) for one in _list(report.sockets))
        and all(
            len(_list(key)) == 3 and all(_is_text(word) for word in key)
            for key in _list(report.keys)
        )
        and all(
            type(count) is int and 0 <= count < 1 << 63 for count in (*counts, *refusals.values())
        )
        and refusals.keys() <= known
        and all(map(_is_token, _list(report.tokens)))
        and all(
            _is_number(one.at)
            and one.status in known
            and _is_text(one.detail)
            and type(one.process) is int
            for one in report.last_refused
        )
    )


def _is_token(value: Any) -> bool:
    match value:
        case [name, state, [*counts]]:
            return (
                _is_text(name)
                and _is_text(state)
                and len(counts) == 3
                and all(type(count) is int and 0 <= count < 1 << 63 for count in counts)
            )
    return False


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]


def _is_text(value: object) -> bool:
    """It may be a file's name: that has no null, and is octets or characters."""
    if not isinstance(value, str) or len(value) > 2 * TEXT_CHARACTERS or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e18  # type: ignore[operator]
