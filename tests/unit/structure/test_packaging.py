"""The package's own scripts, where they can be run without installing anything."""

import os
import subprocess
from pathlib import Path

import pytest

PACKAGING = Path(__file__).parents[3] / "packaging"
POSTRM = PACKAGING / "debian" / "postrm"
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


def built(directory: Path, openssl: str) -> Path:
    """A package with next to nothing in it, from a program that Python 3.11 runs."""
    stage, file = directory / "stage", directory / "it.deb"
    for place in ("etc", "usr/share/doc/titus-py", "usr/lib/titus-py/bin"):
        (stage / place).mkdir(parents=True)
    (stage / "usr/lib/titus-py/bin/python").symlink_to("/usr/bin/python3.11")
    subprocess.run(
        [PACKAGING / "deb", stage, "1.0-1", openssl, file],
        env={**os.environ, "SOURCE_DATE_EPOCH": "1750000000"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return file


@pytest.mark.parametrize("openssl", ["wheels", "debian"])
def test_a_package_stays_with_the_python_that_it_was_made_with(
    tmp_path: Path, openssl: str
) -> None:
    """Not with Debian's current one: an upgrade of Debian would remove it, and every server stop.

    Where there is no such Python, dpkg is to leave what is installed as it was. What Debian builds
    for its current Python, and the package has no copy of, ties it to that all the same.
    """
    file = built(tmp_path, openssl)
    before, after = (
        subprocess.run(
            ["dpkg-deb", "--field", file, field], capture_output=True, text=True, check=True
        ).stdout.strip()
        for field in ("Pre-Depends", "Depends")
    )
    assert before == "python3.11"
    assert ("python3 (<< 3.12~)" in after) == (openssl == "debian")
    assert ("python3-cryptography" in after) == (openssl == "debian")
