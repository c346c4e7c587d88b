"""The fork server's loop, and what a child calls first: as installed, and under sanitizers.

These watch the C code in the caller and, up to where the list of calls has been gone through, in
the child, which is a copy, sanitizer and all. They know nothing of the calls themselves: whether
an address in one of them is of anything is the caller's affair.
"""

import errno
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyd.linux.calls import NUMBERS
from keyd.linux.process import Call, encode

from .sanitized import said_by, sanitized

_PROGRAM = Path(__file__).with_name("making_children.py")
#: Of each extension.
_SOURCES = {
    "calls": ["keyd/linux/calls.c"],
    "forking": ["titus_py/fork_server/forking.c", "titus_py/fork_server/orders.c"],
}
NO_CHILD, FAILED = [0, -1, -1, 0], [0, -1, 1, errno.EBADF]
NO_ORDER = "the parent sent what is no order"
NOT_FOR_WORKERS = "the parent ordered a worker with a uid that is not for workers"
EXPECTED: dict[str, list[object]] = {
    "calls_in_order": [False, False, NO_CHILD, False, True, 7],
    "calls_to_the_first_that_fails": [FAILED, "dup3: Bad file descriptor", True, False, 7],
    "arguments_of_64_bits": [True, NO_CHILD, 7, "child", 0],
    "no_calls": [-1, True, True, NO_CHILD, True, 7],
    "a_sibling": [True, [3, 7]],
    "in_a_namespace": [1, 7],
    "broken_blobs": [["not a whole number of calls"] * 8, True],
    "what_the_order_says": [[4_000_000_000, True, True], 7],
    "a_title": ["a worker", 0, "before"],
    "no_orders": [NO_ORDER, True],
    "uids_of_others": [NOT_FOR_WORKERS, True, [1022, 1023, 1024, 1025]],
    "nobody_orders": [None, True],
    "nobody_waits_for_the_answer": [0, True],
    "around_a_fork": ["a", [[0, True]] * 2, errno.EBADF, [], errno.EBADF, [], True],
    "a_signal": [None, True, True],
    "a_signal_before_the_last_call": [[0, 0], [1, 1], True, True],
    "ended_by_the_first_call": [[0, 0], True],
    "calls_of_our_own": [True, True, errno.EBADF, False, True],
    "what_clone_refuses": [[0, -1, -1, errno.EINVAL], True, 0],
    "many": [200, 0],
}


@pytest.fixture(scope="session", params=["as installed", "sanitized"])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What to hand to the program."""
    if request.param == "as installed":
        return []
    directory = tmp_path_factory.mktemp("sanitized")
    return [sanitized(directory / f"{name}.so", *sources) for name, sources in _SOURCES.items()]


@pytest.mark.parametrize("thing", EXPECTED)
def test_forking(build: list[Path], thing: str) -> None:
    said = said_by(_PROGRAM, thing, *build, preload=bool(build))
    assert json.loads(said) == EXPECTED[thing]


@given(st.sampled_from([*NUMBERS]), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6))
def test_a_call_is_seven_words(name: str, arguments: list[int]) -> None:
    octets = encode([Call(name, tuple(arguments))])
    words = [int.from_bytes(octets[at : at + 8], "little", signed=True) for at in range(0, 56, 8)]
    assert words == [NUMBERS[name], *arguments, *[0] * (6 - len(arguments))]
    assert len(octets) == 56


def test_only_what_is_of_use_can_be_called() -> None:
    with pytest.raises(KeyError):
        encode([Call("execve", ())])
