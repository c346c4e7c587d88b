"""``titus-py``, whose workers can be taken over: see ``infected_fork_server``.

Its first argument is for that one, by way of ``driven_parent``; the second is "lasting" if its fork
server is to be the same for as long as it runs, however many workers are killed. The others are the
command line of ``titus-py``. A part of the confinement that is left out here is "own key": a key
that decrypts may be another virtual host's. With "resolver SETTINGS", the resolver can be taken
over as well: see ``infected_resolver``.
"""

import json
import sys
from pathlib import Path

from titus_py.__main__ import main
from titus_py.configuration import checking
from titus_py.supervisor import child, renewals, unprivileged


def infect_resolver(settings: str) -> None:
    usual, program = unprivileged._program, str(Path(__file__).with_name("infected_resolver.py"))
    unprivileged._program = lambda name: (program, settings) if name == "resolver" else usual(name)


if __name__ == "__main__":
    for part in json.loads(sys.argv[1]):
        what, _, settings = part.partition(" ")
        if part == "own key":
            checking._decrypted_for_others = lambda *_: iter(())
        elif what == "resolver":
            infect_resolver(settings)
    child._PARENT = (str(Path(__file__).with_name("driven_parent.py")), sys.argv.pop(1))
    if sys.argv.pop(1) == "lasting":
        renewals._ENDS = frozenset()
    sys.exit(main())
