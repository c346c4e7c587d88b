"""clone(2) and what a child calls first: as it is installed, and under sanitizers.

These watch spawn.c in the caller and, up to where the list of calls has been gone through, in
the child, which is a copy, sanitizer and all. They know nothing of the calls themselves: whether
an address in one of them is of anything is the caller's affair.
"""

import errno
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from provider.support import SANITIZE, check_sanitizer, preload_sanitizer

from keyd.linux.process import Call, encode
from keyd.linux.spawn import NUMBERS

_PROGRAM = Path(__file__).with_name("spawning.py")
_SOURCE = Path(__file__).parents[2] / "keyd/linux/spawn.c"
NO_CHILD, FAILED = [0, -1, -1, 0], [0, -1, 1, errno.EBADF]
EXPECTED: dict[str, list[object]] = {
    "calls_in_order": [False, False, NO_CHILD, False, True, 7],
    "calls_to_the_first_that_fails": [FAILED, "dup3: Bad file descriptor", True, False, 7],
    "arguments_of_64_bits": [True, NO_CHILD, 7, "child", 0],
    "no_calls": [-1, True, True, NO_CHILD, True, 7],
    "a_sibling": [True, [3, 7]],
    "in_a_namespace": [1, 7],
    "broken_blobs": [["not a whole number of calls"] * 8, True],
    "calls_of_our_own": [True, True, errno.EBADF, False, True],
    "what_clone_refuses": [[-1, -1, -1, errno.EINVAL], True, 0],
    "many": [200, 0],
}


@pytest.fixture(scope="session", params=["as installed", "sanitized"])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What to hand to the program."""
    if request.param == "as installed":
        return []
    output = tmp_path_factory.mktemp("sanitized") / "spawn.so"
    include = sysconfig.get_path("include")
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fPIC", *SANITIZE, f"-I{include}"]
    subprocess.run([*command, "-shared", "-o", str(output), str(_SOURCE)], check=True)
    return [output]


@pytest.mark.parametrize("thing", EXPECTED)
def test_spawn(build: list[Path], thing: str) -> None:
    done = subprocess.run(
        [sys.executable, _PROGRAM, thing, *build],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **(preload_sanitizer() if build else {})},
        timeout=60,
    )
    check_sanitizer(done.stderr)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == EXPECTED[thing]


def test_the_sanitizer_is_there(build: list[Path]) -> None:
    """The control."""
    if build:
        assert b"__asan_report" in build[0].read_bytes()


@given(st.sampled_from([*NUMBERS]), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6))
def test_a_call_is_seven_words(name: str, arguments: list[int]) -> None:
    octets = encode([Call(name, tuple(arguments))])
    words = [int.from_bytes(octets[at : at + 8], "little", signed=True) for at in range(0, 56, 8)]
    assert words == [NUMBERS[name], *arguments, *[0] * (6 - len(arguments))]
    assert len(octets) == 56


def test_only_what_is_of_use_can_be_called() -> None:
    with pytest.raises(KeyError):
        encode([Call("execve", ())])
