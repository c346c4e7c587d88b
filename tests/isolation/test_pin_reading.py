"""The process that reads pins, taken over by what it reads: it has nothing but that.

Each attempt is made where nothing confines it, where it succeeds; without the filter, so that the
rest is seen to hold; and by the real process.
"""

import json
import os
import platform
import socket
import sys
from pathlib import Path
from unittest import mock

import pytest

from keyd.linux.sealed import sealed_file
from titus_py.commands import pins
from titus_py.commands.pins import Unread, read_pins

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="system calls by their numbers on x86-64"
)
#: By Landlock, where it knows of connecting, and by the empty network.
WITHOUT_FILTER = {
    "read": {"ENOENT"},
    "connect": {"EACCES", "ENETUNREACH"},
    "kill": {"EPERM"},
    "execute": {"ENOENT"},
}


def attempt(left_out: list[str], deeds: dict[str, object]) -> str:
    """What came of it."""
    script = Path(__file__).with_name("attacking_pin_reader.py")
    command = (sys.executable, "-I", str(script), json.dumps([left_out, deeds]))
    with (
        mock.patch.object(pins, "_COMMAND", command),
        open(sealed_file("test", b""), "rb") as file,
        pytest.raises(Unread) as said,
    ):
        read_pins(file.fileno(), None, 30)
    return str(said.value)


@pytest.fixture(scope="module")
def deeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    key = tmp_path_factory.mktemp("keys") / "web-1.key"
    key.touch(mode=0o600)
    return {"read": str(key), "connect": 1, "kill": os.getpid(), "execute": None}


def test_with_parts_of_the_confinement_left_out(deeds: dict[str, object]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        deeds = deeds | {"connect": listener.getsockname()[1]}
        # What execve(2) starts gives no answer.
        alone = {name: deed for name, deed in deeds.items() if name != "execute"}
        assert set(json.loads(attempt(["all"], alone)).values()) == {"done"}
        assert "has ended (0)" in attempt(["all"], {"execute": None})
        came_of_it = json.loads(attempt(["filter"], deeds))
    assert came_of_it.keys() == WITHOUT_FILTER.keys()
    assert all(came_of_it[deed] in refusals for deed, refusals in WITHOUT_FILTER.items())


@pytest.mark.parametrize("deed", WITHOUT_FILTER)
def test_the_filter_ends_it(deeds: dict[str, object], deed: str) -> None:
    assert "has ended (-31)" in attempt([], {deed: deeds[deed]})  # SIGSYS
