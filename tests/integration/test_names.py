"""Backends by name, with name servers that answer half, or nothing."""

import json
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@cache
def scene(name: str) -> dict[str, list[Any]]:
    """What came of it: see ``name_server``."""
    script = [sys.executable, "-m", "tests.integration.name_server", name]
    ran = subprocess.run(
        ["unshare", "--net", "--mount", *script],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=120,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, list[Any]] = json.loads(ran.stdout)
    return found


def ipv4(host: str) -> list[object]:
    return [socket.AF_INET, [host, 80]]


IPV6_LOOPBACK = [socket.AF_INET6, ["::1", 80, 0, 0]]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no-aaaa.test", [[ipv4("127.0.0.1")]]),
        ("aaaa-dropped.test", [[ipv4("127.0.0.1")]]),
        *((f"dropped-{number}.test", [[ipv4("127.0.0.1")]]) for number in (0, 19)),
        ("aaaa-failing.test", [[ipv4("127.0.0.1")]]),
        ("a-dropped.test", [[IPV6_LOOPBACK]]),
        ("unknown.test", ["Name or service not known"]),
        ("failing.test", ["Temporary failure in name resolution"]),
    ],
)
def test_a_family_that_is_not_answered_delays_nothing(name: str, told: list[object]) -> None:
    """Those that are dropped are still awaited: glibc gives up after ten seconds."""
    assert scene("resolver")[name][:1] == told


def test_both_families_are_used_in_turn_ipv6_first() -> None:
    assert scene("resolver")["both.test"][-1] == [IPV6_LOOPBACK, ipv4("127.0.0.2")]


def test_a_name_in_the_hosts_file_has_what_is_there_and_nothing_else() -> None:
    assert all(told == [ipv4("127.0.0.7")] for told in scene("resolver")["in-hosts-file.test"])


def test_a_name_without_an_address_is_asked_for_again_sooner_than_others() -> None:
    """As where the machine boots before its name server answers. What fails again says nothing."""
    assert scene("late") == {
        "unknown.test": ["Name or service not known"],
        "late.test": ["Name or service not known", [ipv4("127.0.0.3")]],
    }


def test_the_start_waits_for_names_and_for_none_longer_than_it_may() -> None:
    """Who comes to an instance that listens is served, whatever is not answered."""
    assert scene("start") == {
        "aaaa-dropped.test": ["listening"],
        "silent.test": ["backend_unresolved", "listening"],
    }
