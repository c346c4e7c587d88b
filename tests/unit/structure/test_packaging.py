"""The package's own scripts, where they can be run without installing anything."""

import subprocess
from pathlib import Path

import pytest

POSTRM = Path(__file__).parents[3] / "packaging" / "debian" / "postrm"
#: As on a machine from which the package has been removed. Everything that the script may touch is
#: in file systems of their own, which are gone when this shell ends.
MACHINE = """
    set -eu
    for directory in /etc /run /var/lib; do mount -t tmpfs tmpfs "$directory"; done
    mkdir -p /run/titus-py/empty /run/titus-keyd/root /var/lib/titus-py /run/stubs
    touch /run/titus-py/uids
    printf '#!/bin/sh\\n' > /run/stubs/deb-systemd-helper
    chmod 755 /run/stubs/deb-systemd-helper
    PATH=/run/stubs:$PATH
"""


@pytest.mark.parametrize(
    ("before", "left"),
    [
        ("", ""),
        ("touch /run/titus-py/4711.control", "/run/titus-py/4711.control /run/titus-py/uids"),
    ],
    ids=["alone", "beside another instance"],
)
def test_purging_leaves_what_instances_of_others_need(before: str, left: str) -> None:
    script = f"{MACHINE}\n{before}\nsh {POSTRM} purge\nfind /run -type f ! -path '/run/stubs/*'"
    answer = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert sorted(answer.stdout.split()) == left.split()
