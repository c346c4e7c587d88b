"""``titus-py reload``: have an instance read its configuration anew, and say what came of it.

Run by the administrator or systemd, as root. The supervisor does the work; this waits for it.
"""

import sys
from pathlib import Path

from keyd.printable import printable
from titus_py.supervisor.control_client import DIRECTORY, NoAnswer, ask, instances_to_ask

__all__ = ["reload"]

#: Longer than new processes may take to start.
_SECONDS = 90.0


def reload(
    pid: int | None = None,
    program: bool = False,
    cut: bool = False,
    directory: Path = DIRECTORY,
    seconds: float = _SECONDS,
) -> int:
    """Reload one instance: the only one, or the one of this process id.

    With ``program``, it reloads its program, too. With ``cut``, it ends the connections whose
    client certificate the new configuration does not accept.

    Returns the exit code: 0 once the new configuration serves, 1 if it does not (the old
    one goes on) or not all connections were judged, 2 if there is no such instance, or more than
    one.
    """
    running = instances_to_ask("reload", pid, directory)
    if len(running) > 1:
        pids = ", ".join(map(str, running))
        print(f"titus-py: several instances are running, as {pids}: say --pid", file=sys.stderr)
    if len(running) != 1:
        return 2
    request = "reload program" if program else "reload cut" if cut else "reload"
    try:
        answer = ask(running[0], {"do": request}, seconds, directory)
    except NoAnswer as error:
        print(f"titus-py: {error}", file=sys.stderr)
        return 1
    if answer.get("reloaded") is not True:
        for problem in answer.get("problems") or ["no reason was given"]:
            print(printable(f"titus-py: not reloaded: {problem}"), file=sys.stderr)
        return 1
    print(f"titus-py: reloaded: generation {answer.get('generation')} serves")
    if not cut:
        return 0
    count = answer.get("cut", 0)
    print(f"titus-py: {count} {'connection' if count == 1 else 'connections'} ended")
    if "cut" in answer and "not_cut" not in answer:
        return 0
    # Another program may have taken over before it came to this.
    reason = answer.get("not_cut", "it did not come to that")
    print(printable(f"titus-py: not all were judged: {reason}: try again"), file=sys.stderr)
    return 1
