"""Octets passed on in C, between OpenSSL and a socket: as installed, and under sanitizers."""

import errno
import json
from pathlib import Path

import pytest

from .sanitized import said_by, sanitized

_PROGRAM = Path(__file__).with_name("passing_octets_on.py")
_SOURCES = ["titus_py/worker/flow.c", "titus_py/worker/flow_module.c"]
_MUCH = 3 << 20
_NO_BUFFER = "not a buffer, a part of it, and a count"
EXPECTED: dict[str, list[object]] = {
    "small_exchanges": [["CLIENT_ENDED", True, 0, 0, 0], 50, [490, 990, 0]],
    "much_both_ways": [["CLIENT_ENDED", True, 0, 0, 0], [True, True], [_MUCH, _MUCH, 0]],
    "a_backend_that_takes_nothing": [["STOOD_STILL", True], [True, True], ["STOOD_STILL", False]],
    "a_clients_end_of_file": [["CLIENT_TRUNCATED", True, 0, 0, 0]] * 2,
    "a_client_that_hangs_up": [
        ["CLIENT_ENDED", True, 8, 0, 0],
        ["ALL_TO_BACKEND", True, 0, 0, 0],
        "the last",
        [8, 0, 0],
    ],
    "nothing_but_a_hang_up": [
        ["CLIENT_ENDED", True, 8, 0, 0],
        *[["STOOD_STILL", False, 8, 0, 0]] * 2,
    ],
    "a_client_that_is_gone_before_it_is_told_the_end": ["HALF_CLOSED", 8],
    # What came before it is there, and an alert.
    "a_damaged_record": [["NOT_DECRYPTED", True, 0, 0, 57], "Error", None, [5, 0, 0]],
    "a_backends_end_of_file": [
        ["BACKEND_ENDED", True, 0, 0, 0],
        ["ALL_TO_CLIENT", False, 0, 0, 0],
        "the last",
        [0, 8, 0],
    ],
    "what_a_backend_may_still_say": ["STOOD_STILL", "the last", 0, 10],
    "a_client_that_is_gone": [["CLIENT_FAILED", True, 0, 0, 0], 104],
    "a_client_that_is_gone_while_it_is_sent_to": [
        ["NOT_TO_CLIENT", True],
        errno.ECONNRESET,
        "the last",
        8,
        True,
    ],
    "the_same_after_its_end": [
        "CLIENT_ENDED",
        ["NOT_TO_CLIENT", True],
        errno.EPIPE,
        "the last",
    ],
    "one_that_hears_nothing_any_more": [["NOT_TO_CLIENT", True], errno.EPIPE, [0, 0]],
    "what_becomes_of_a_connection_whose_client_is_gone": ["CLIENT_RESET", "", "the last", 8],
    "a_backends_reset": [["NOT_FROM_BACKEND", True, 0, 0, 0], 104],
    "nobody_says_anything": [["STOOD_STILL", True, 0, 0, 0], ["STOOD_STILL", False, 0, 0, 0]],
    "a_direction_that_has_ended": ["STOOD_STILL", "answer", [0, 6, 0]],
    "what_is_no_buffer": [[_NO_BUFFER] * 9, True],
}


@pytest.fixture(scope="session", params=["as installed", "sanitized"])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The one to look at; None: the installed one."""
    if request.param == "as installed":
        return None
    return sanitized(tmp_path_factory.mktemp("sanitized") / "flow.so", *_SOURCES)


@pytest.fixture(scope="session")
def found(build: Path | None) -> dict[str, object]:
    """What the program says. All is done by one process: most of its time is its start."""
    said = said_by(_PROGRAM, build or "", *EXPECTED, preload=build is not None)
    what: dict[str, object] = json.loads(said)
    return what


@pytest.mark.parametrize("thing", EXPECTED)
def test_flow(found: dict[str, object], thing: str) -> None:
    assert found[thing] == EXPECTED[thing]
