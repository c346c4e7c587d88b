"""Whether somebody else has the uids that the configuration gives to workers and to keyd.

No other process may have a worker's uid: it could end the worker with kill(2). So the range must
hold no user or group in /etc, and no uid that other programs hand out at will.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from titus_py.configuration.mistake import described

__all__ = [
    "DEFAULT_KEYD_UID",
    "DEFAULT_UIDS",
    "GENERATIONS",
    "Owner",
    "handed_out",
    "unmapped",
    "users_and_groups",
]

#: Above what useradd hands out as subordinate ids (login.defs(5), SUB_UID_MAX: 600100000), what
#: systemd-nspawn takes (to 1879048191), and what SSSD maps to by default (to 2000200000). Below
#: 2^31, where some programs' uids end.
DEFAULT_UIDS = range(2_100_000_000, 2_100_065_536)
DEFAULT_KEYD_UID = 2_099_999_999
#: The generation that serves, the one that a reload starts, and an earlier one with connections
#: left.
GENERATIONS = 3

#: https://systemd.io/UIDS-GIDS/
_SYSTEMD = {
    range(60_001, 60_514): "systemd gives to users of systemd-homed",
    range(61_184, 65_520): "systemd gives to services with DynamicUser=",
    range(65_534, 65_535): "the kernel gives to who has no uid here (nobody)",
    range(65_535, 65_536): "is, in 16 bits, no uid at all",
}


class Owner(NamedTuple):
    """A range of uids (or gids), and who has them or hands them out."""

    ids: range
    what: str

    def __str__(self) -> str:
        first, last = self.ids[0], self.ids[-1]
        ids = f"{first} is" if first == last else f"{first} to {last} are"
        return f"{ids} what {self.what}"


def users_and_groups(wanted: range, etc: Path = Path("/etc")) -> Iterator[Owner]:
    """The users and groups whose uid or gid is one of these."""
    for file, kind in (("passwd", "user"), ("group", "group")):
        for name, _, number, *_ in _entries(etc / file, 3):
            if number.isdecimal() and int(number) in wanted:
                ids = range(int(number), int(number) + 1)
                yield Owner(ids, f"{kind} {described(name)} has ({etc / file})")


def handed_out(wanted: range, etc: Path = Path("/etc")) -> Iterator[Owner]:
    """The programs that may give these ids to processes at any time: container engines, systemd."""
    for file in ("subuid", "subgid"):
        for name, first, count, *_ in _entries(etc / file, 3):
            if first.isdecimal() and count.isdecimal():
                ids = range(int(first), int(first) + int(count))
                if _overlap(ids, wanted):
                    yield Owner(ids, f"{etc / file} gives to the containers of {described(name)}")
    for ids, what in _SYSTEMD.items():
        if _overlap(ids, wanted):
            yield Owner(ids, what)


def unmapped(wanted: range, proc: Path = Path("/proc")) -> str | None:
    """The first of these ids that this process's user namespace lacks, as a reason; else None.

    See user_namespaces(7). None also if /proc is not there to ask: that is reported elsewhere.
    """
    for kind in ("uid", "gid"):
        try:
            lines = (proc / f"self/{kind}_map").read_text().splitlines()
        except OSError:
            return None
        mapped = sorted(
            (
                range(int(first), int(first) + int(count))
                for first, _, count in map(str.split, lines)
            ),
            key=lambda ids: ids.start,
        )
        at = wanted.start
        for ids in mapped:
            if at in ids:
                at = ids.stop
        if at < wanted.stop:
            there = ", ".join(f"{ids[0]} to {ids[-1]}" for ids in mapped) or "none"
            return f"this user namespace has no {kind} {at} (it has {there})"
    return None


def _entries(file: Path, fields: int) -> Iterator[list[str]]:
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        entry = line.split(":")
        if len(entry) >= fields and not line.startswith("#"):
            yield entry


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
