"""The code of functions that were called lies together. In a Python of its own."""

import json
import subprocess
import sys

from titus_py.parent import forks

#: Functions with much between them; every second one is called.
_PROGRAM = """
import json
from titus_py.fork_server.gathering import gather_code

between, functions = [], []
for number in range(40):
    names = {}
    exec(f"def one(): return [{number}" + ", 'x'.upper()" * 20 + "]", names)
    functions.append(names["one"])
    between += [bytes(4000) for _ in range(10)]

def places(which):
    return [id(function.__code__) for function in which]

called, others = functions[::2], functions[1::2]
before, before_of_others = places(called), places(others)
gather_code(lambda: [function() for function in called] and None)
print(json.dumps([
    max(before) - min(before),
    max(places(called)) - min(places(called)),
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
