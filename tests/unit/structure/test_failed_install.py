"""`make install` that fails, for want of a network for one, leaves what is installed as it was."""

import os
import subprocess
from pathlib import Path

_REPOSITORY = Path(__file__).parents[3]


def test_the_program_that_is_there_stays(tmp_path: Path) -> None:
    """It may be running: it starts its processes from these files."""
    installed = tmp_path / "usr/lib/titus-py/bin/python"
    installed.parent.mkdir(parents=True)
    installed.write_text("of before\n")
    places = {"DESTDIR": str(tmp_path), "PREFIX": "/usr", "SYSCONFDIR": "/etc"}
    failed = subprocess.run(
        [_REPOSITORY / "packaging/install", "/bin/false", "wheels"],
        env={**os.environ, **places},
        check=False,
    )
    assert failed.returncode == 1
    assert installed.read_text() == "of before\n"
    assert [path.name for path in (tmp_path / "usr/lib").iterdir()] == ["titus-py"]
