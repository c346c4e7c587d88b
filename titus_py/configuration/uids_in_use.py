"""Whether other instances, or any other process, use the uids that a configuration gives away.

Run by the supervisor, as root, and by ``titus-py check``. Processes of the same instance are no
mistake. It is known by its configuration file, or as the process that asks or its parent.
"""

from pathlib import Path

from titus_py.configuration.held_uids import UIDS_FILE, holder, is_running, process_with
from titus_py.configuration.loading import Loaded
from titus_py.configuration.mistake import Mistake, described
from titus_py.configuration.uids import GENERATIONS

__all__ = ["uids_in_use"]

#: How long the processes of an instance that was just killed may take to end.
_PATIENCE_SECONDS = 3.0


def uids_in_use(
    loaded: Loaded, running: bool, only_asked: bool = False, held: Path = UIDS_FILE
) -> tuple[list[Mistake], list[Mistake]]:
    """The mistakes and the warnings about uids in use. Raises nothing.

    ``running``: the instance itself asks, for a reload. It looks at processes itself.
    ``only_asked``: nothing is started. The file may be meant to take the place of the one that an
    instance has read, and then has its uids rightly: that they are another's is a warning.
    """
    configuration, source = loaded.configuration, loaded.source
    mistakes: list[Mistake] = []
    warnings: list[Mistake] = []
    if configuration is None:
        return mistakes, warnings
    worker, keyd = configuration.worker, configuration.keyd
    other = holder(worker.uids, held)
    if other is not None and not other.is_ours(source.path):
        reason = f"some of them are those of {other}: each instance has uids of its own"
        if only_asked:
            reason += ". Not a mistake where this file is to take that one's place"
        found = warnings if only_asked else mistakes
        found.append(source.mistake("worker.uids", reason))
    if running or other is not None or is_running(source.path, held):
        # Other processes with these uids may be this instance's own.
        return mistakes, warnings
    needed = worker.uids[: GENERATIONS * (worker.max + worker.spare + 1)]
    if (uid := process_with(needed, _PATIENCE_SECONDS)) is not None:
        reason = f"{uid} is the uid of a running process{_process_of(uid)}: take others"
        mistakes.append(source.mistake("worker.uids", reason))
    if keyd.socket is None:
        uid = keyd.user.uid
        other = holder(range(uid, uid + 1), held)
        if other is not None and not other.shared:
            reason = f"{uid} is among the uids of the workers of {other}"
            mistakes.append(source.mistake("keyd.user", reason))
        elif other is not None:
            reason = "another instance's keyd runs as this user, too, and could end this one's"
            warnings.append(source.mistake("keyd.user", f"{reason}: give each a user of its own"))
        elif process_with(range(uid, uid + 1), _PATIENCE_SECONDS) is not None:
            reason = f"another process runs as this user{_process_of(uid)}, and could end keyd"
            warnings.append(source.mistake("keyd.user", f"{reason}: give it a user of its own"))
    return mistakes, warnings


def _process_of(uid: int) -> str:
    """The process with this uid, as the end of a message; "" if it cannot be seen."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if directory.stat().st_uid == uid:
                name = (directory / "comm").read_text(errors="replace").strip()
                return f" ({directory.name}, {described(name)})"
        except OSError:
            continue
    return ""
