"""A program of a test's own whose processes note what they import: once confined, or before."""

from pathlib import Path
from shutil import copyfile
from typing import NamedTuple

from . import import_witness
from .import_witness import COUNT_OCTETS, IMPORTED, LATE, NOTES, STARTED, WITHDREW
from .installed import Installed

__all__ = ["Notes", "Watched"]


class Notes(NamedTuple):
    """Of one process, and of those that it has forked."""

    command: str
    #: The modules of ours that took the last step of its confinement.
    withdrew: tuple[str, ...]
    #: What it has imported before.
    imported: frozenset[str]
    #: What it has imported, or tried to, once it was confined: a name, and where.
    late: tuple[str, ...]


class Watched(Installed):
    """As Installed. The witness is in its virtual environment, not in what is tested."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._notes = self.site / NOTES
        self._notes.mkdir()
        copyfile(import_witness.__file__, self.site / "import_witness.py")
        (self.site / "witness.pth").write_text(
            "import sys; known = {*sys.modules}; import import_witness; import_witness.begin(known)"
        )

    def notes(self) -> list[Notes]:
        """Of each process that there has been."""
        return [_read(path) for path in self._notes.iterdir()]


def _read(path: Path) -> Notes:
    found: dict[str, list[str]] = {kind: [] for kind in (STARTED, WITHDREW, IMPORTED, LATE)}
    for line in path.read_bytes()[COUNT_OCTETS:].rstrip(b"\0").decode().splitlines():
        kind, _, text = line.partition(" ")
        found[kind].append(text)
    (command,) = found[STARTED]
    return Notes(
        command,
        tuple(found[WITHDREW]),
        frozenset(found[IMPORTED]),
        tuple(found[LATE]),
    )
