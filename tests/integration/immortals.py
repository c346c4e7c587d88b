"""What ``test_immortality`` looks at, as a program: nothing of a test runner is made immortal.

Its argument: a build of titus_py/fork_server/immortal.c, or nothing for the one that is
installed. It prints what came of each thing, as JSON.
"""

import ctypes
import gc
import json
import os
import resource
import sys
import weakref
from collections.abc import Callable
from types import CodeType

from builds import use_build

if len(sys.argv) > 1:
    use_build("titus_py.fork_server.immortal", sys.argv[1])

from titus_py.fork_server.immortal import AVAILABLE, immortalize
from titus_py.fork_server.immortality import make_all_immortal

MANY = 100_000


class Thing:
    def method(self) -> float:
        return 1234.5678


def outer(captured: object) -> Callable[[], object]:
    def inner() -> object:
        return captured, 1 << 70, b"octets of a constant", ("a", ("nested", 98765))

    return inner


things = {number: [Thing(), f"text {number}", (number + 1000, str(number))] for number in range(9)}
closure = outer(Thing())
many = [object() for _ in range(MANY)]
cycle: list[object] = []
cycle.append(cycle)
freed: list[str] = []
watched = Thing()
watch = weakref.ref(watched, lambda _: freed.append("a thing that was inherited"))


def inherited() -> list[object]:
    """Some of all kinds, as far away as can be."""
    parts: list[object] = [closure, Thing, Thing.method, cycle, many[0], many[-1]]
    for code in (closure.__code__, Thing.method.__code__, outer.__code__):
        assert isinstance(code, CodeType)
        parts += [code, *code.co_consts, code.co_name, code.co_filename, code.co_linetable]
    for one in things.values():
        parts += [one, *one]
    return [*parts, closure.__closure__, many, sys.modules, vars(Thing)["method"]]


def uncounted() -> bool:
    """Whether none of them counts the references to it."""
    sample = inherited()
    before = [*map(sys.getrefcount, sample)]
    more = [[one] * 1000 for one in sample]
    after = [*map(sys.getrefcount, sample)]
    del more
    return before == after


def faults_of_a_look() -> int:
    """How many pages a child copies that looks at many inherited objects."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for one in many:
            one.__class__  # noqa: B018
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        os.write(writing, faults.to_bytes(4))
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        return int.from_bytes(pipe.read())


def changed_by_old_extensions() -> bool:
    """Those of before Python 3.12 count every object; this one survives all that they can do."""
    count = ctypes.c_ssize_t.from_address(id(watched))
    own = count.value
    # Immortal are counts from 2**31 to 2**32 - 1: the last is of one that no longer is.
    for start in (own, (1 << 32) - 2, 1 << 31, (1 << 31) - 1):
        count.value = start
        for step in (1, -1):
            count.value += step
            held = [watched] * 1000
            del held
    count.value = own
    return watch() is watched and not freed


def new_ones_go() -> bool:
    """What is made afterwards is freed: by its count, and by the garbage collector."""
    alone, circle = Thing(), Thing()
    vars(circle).update(itself=circle, inherited=things)
    both = weakref.ref(alone), weakref.ref(circle)
    del alone, circle
    gc.collect()
    return [ref() for ref in both] == [None, None]


def nothing_is_freed() -> bool:
    """Of what was inherited, even if nobody refers to it any more."""
    things.clear()
    many.clear()
    del globals()["watched"]
    gc.collect()
    return freed == ([] if AVAILABLE else ["a thing that was inherited"])


def refused() -> str:
    try:
        immortalize(())  # type: ignore[arg-type]
    except TypeError as error:
        return str(error)
    return "taken"


def main() -> int:
    counted_before = not uncounted()
    faults = faults_of_a_look()
    make_all_immortal()
    again = immortalize(gc.get_objects()[:1000])
    said = {
        "available": AVAILABLE,
        "counted_before": counted_before,
        "uncounted": uncounted(),
        "made_again": len(again),
        "pages": [faults, faults_of_a_look()],
        "changed_by_old_extensions": changed_by_old_extensions(),
        "new_ones_go": new_ones_go(),
        "nothing_is_freed": nothing_is_freed(),
        "refused": refused(),
    }
    print(json.dumps(said))
    # And the interpreter, as the fork server's, takes itself down.
    return 7


if __name__ == "__main__":
    sys.exit(main())
