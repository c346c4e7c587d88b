"""``titus-py``, whose workers can be taken over: see ``infected_fork_server``.

Its first argument is for that one, by way of ``driven_parent``; the others are the command
line of ``titus-py``.
"""

import sys
from pathlib import Path

from titus_py.__main__ import main
from titus_py.supervisor import generation

if __name__ == "__main__":
    generation._PARENT = (str(Path(__file__).with_name("driven_parent.py")), sys.argv.pop(1))
    sys.exit(main())
