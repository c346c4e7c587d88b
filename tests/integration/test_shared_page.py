"""The comparison of a shared page with a socket (bench/shared_page.c), which checks each answer."""

import re
import subprocess
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
LINE = re.compile(r"(socket|futex) +(trips|lives) channels +3: wall +[0-9.]+ us, processor .*")


def test_each_way_answers(tmp_path: Path) -> None:
    program = tmp_path / "shared_page"
    command = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o"]
    subprocess.run([*command, str(program), str(BENCH / "shared_page.c")], check=True)
    ended = subprocess.run(
        [program, "3", "200"], check=True, capture_output=True, text=True, timeout=240
    )
    found = [LINE.fullmatch(line) for line in ended.stdout.splitlines()]
    assert [line and line.groups() for line in found] == [
        ("socket", "trips"),
        ("futex", "trips"),
        ("socket", "lives"),
        ("futex", "lives"),
    ]
    assert subprocess.run([program, "129", "1"], check=False, capture_output=True).returncode == 2
