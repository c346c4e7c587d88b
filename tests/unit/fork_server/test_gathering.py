"""The code of functions that were called lies together. In a Python of its own."""

import json
import subprocess
import sys

from titus_py.parent import forks

#: Functions with much between them, each with a generator within. Every second one is called, and
#: one is named.
_PROGRAM = """
import json
from titus_py.fork_server.gathering import gather_code

between, functions = [], []
for number in range(40):
    names = {}
    exec(f"def one(): return [*(n for n in [{number}])" + ", 'x'.upper()" * 20 + "]", names)
    functions.append(names["one"])
    between += [bytes(4000) for _ in range(10)]

def places(which):
    codes = [function.__code__ for function in which]
    codes += [part for code in codes for part in code.co_consts if hasattr(part, "co_consts")]
    return [id(code) for code in codes]

called, named, others = functions[::2], functions[1], functions[3::2]
before, before_of_others = places(called), places(others)
gather_code(range(0), lambda: [function() for function in called] and None, [named])
after = [*places(called), id(named.__code__)]
print(json.dumps([
    max(before) - min(before),
    max(after) - min(after),
    places(others) == before_of_others,
    [function()[0] for function in functions],
]))
"""


def test_code_that_was_run_lies_together() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env=forks.MALLOC,
        check=True,
        capture_output=True,
        text=True,
    )
    before, after, others_stay, results = json.loads(done.stdout)
    # Each has about a kibibyte of code.
    assert after < 64 * 1024 < before
    assert others_stay
    assert results == list(range(40))
