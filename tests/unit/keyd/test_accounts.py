"""A user or a group that there is not is named, with what makes it."""

import subprocess
import sys
from pathlib import Path

import pytest

from keyd.accounts import gid_of, user_of


def test_those_that_there_are() -> None:
    assert user_of("root").pw_uid == gid_of("root") == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--user", "nosuch"], 'no user is named "nosuch": create it with \'useradd --system '),
        (["--user", "nobody", "--group", "nosuch"], 'no group is named "nosuch": create it with '),
    ],
)
def test_keyd_does_not_start(tmp_path: Path, options: list[str], said: str) -> None:
    key = tmp_path / "www.key"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    command = [sys.executable, "-m", "keyd", "listen", "--socket", tmp_path / "sock", "--key", key]
    ended = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"keyd: {said}")
