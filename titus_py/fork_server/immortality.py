"""Makes all that workers inherit immortal, where the interpreter can do that (PEP 683).

Run by the fork server, before it forks. A worker then copies none of the pages of objects that
it only looks at (``immortal.c``).
"""

import gc
from types import CodeType

from titus_py.fork_server.immortal import AVAILABLE, immortalize

__all__ = ["make_all_immortal"]

#: What running a code object looks at. The garbage collector does not look into code objects.
_PARTS_OF_CODE = (
    "co_consts",
    "co_exceptiontable",
    "co_filename",
    "co_linetable",
    "co_name",
    "co_names",
    "co_qualname",
)


def make_all_immortal() -> None:
    """Every object that can be reached, for the rest of this process and of its children.

    Does nothing where the interpreter has no immortal objects.
    """
    if not AVAILABLE:
        return
    gc.unfreeze()
    waiting = gc.get_objects()
    while new := immortalize(waiting):
        waiting = gc.get_referents(*new)
        for one in new:
            if type(one) is CodeType:
                waiting += [getattr(one, part) for part in _PARTS_OF_CODE]
