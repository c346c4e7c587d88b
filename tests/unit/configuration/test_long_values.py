"""A value may be as long as the file: a mistake quotes no more of it than can be read."""

from pathlib import Path

import pytest

from titus_py.configuration.loading import load


@pytest.mark.parametrize(
    ("content", "begins", "ends"),
    [
        ('[[listen]]\naddress = "LONG"', '2: listen "xy\\u001b', "or unix:/run/app.sock"),
        ('[[vhost]]\nbackend = "LONG:http"', "2: vhost for any name: backend: 'xy\\x1b", "'http'"),
        ('[worker]\nuids = "LONG"', "2: worker.uids: expected a range of uids", '…"'),
        ('"LONG" = 1', '1: "xy\\u001b', ", listen, vhost, tunnel"),
        ('[keyd]\n"LONG" = 1', '2: keyd."xy\\u001b', "user, lock_memory"),
    ],
    ids=["address", "backend", "uids", "table", "key"],
)
def test_the_middle_is_left_out(tmp_path: Path, content: str, begins: str, ends: str) -> None:
    path = tmp_path / "titus.toml"
    path.write_text(content.replace("LONG", "xy\\u001b" * 35_000))
    said = [str(mistake).removeprefix(f"{path}:") for mistake in load(path).mistakes]
    (line,) = [one for one in said if "xy" in one]
    assert line.isprintable()
    assert len(line) < 5_000
    # What to do about it comes last.
    assert line.startswith(begins)
    assert line.endswith(ends)
