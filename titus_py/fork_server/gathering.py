"""The code that connections run, in one place of what workers inherit.

Run by the fork server, as root, before it confines itself. Python writes to the code that it runs:
it counts, and notes which way a branch went. So a worker copies each page with code that it runs,
and functions lie wherever there was room when they were loaded.
"""

import gc
import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType, FunctionType

from titus_py.fork_server.heap import fill_holes

__all__ = ["gather_code"]


def gather_code(
    room: range, run: Callable[[], None], others: Iterable[Callable[..., object]] = ()
) -> None:
    """Give each function that this calls, and the others, a copy of its code, side by side.

    They are where there is ``room``, or else at the end of the heap. A copy is as if it had never
    run: practice comes afterwards.
    """
    ran: dict[int, CodeType] = {}
    for other in others:
        ran[id(other.__code__)] = other.__code__

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            ran[id(frame.f_code)] = frame.f_code

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    gc.unfreeze()
    functions = [
        one for one in gc.get_objects() if isinstance(one, FunctionType) and id(one.__code__) in ran
    ]
    gc.freeze()
    fill_holes(room.start, room.stop)
    copies = {place: _copy(code, ran) for place, code in ran.items()}
    for function in functions:
        function.__code__ = copies[id(function.__code__)]


def _copy(code: CodeType, ran: dict[int, CodeType]) -> CodeType:
    """With copies of the code that is within it, and was run: of generators, for example."""
    parts = tuple(_copy(one, ran) if id(one) in ran else one for one in code.co_consts)
    return code.replace(co_consts=parts)
