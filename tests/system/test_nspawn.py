"""What docs/containers.md has for systemd-nspawn, tried: what it gives by default is not enough."""

import secrets
import subprocess
from pathlib import Path

import pytest

from tests.integration.certificates import Authority
from tests.integration.instance import TITUS_PY, toml

_CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def container(tmp_path: Path) -> list[str]:
    """The command that runs another in a container of which only /usr, and this, is ours."""
    site = Authority(tmp_path).issue("P-256", "www.example.org")
    tables = {
        "worker": {"chroot": "/run/titus-py/empty"},
        "listen": [{"address": "127.0.0.1:8443"}],
        "vhost": [
            {"certificate": site.certificate, "key": site.key, "backend": "127.0.0.1:80"},
        ],
    }
    (tmp_path / "titus.toml").write_text(toml(tables))
    return [
        *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--pipe"),
        *("--private-network", "--link-journal=no", "--resolv-conf=off", "--timezone=off"),
        *("--directory=/", "--volatile=yes", f"--machine=titus-py-{secrets.token_hex(4)}"),
        *(f"--bind-ro={_CHECKOUT}", f"--bind-ro={tmp_path}"),
    ]


def check(
    container: list[str], directory: Path, *options: str
) -> "subprocess.CompletedProcess[str]":
    command = TITUS_PY, "check", "--config", directory / "titus.toml"
    words = *container, *options, "--", *command
    return subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )


def test_by_default_memory_cannot_be_locked(container: list[str], tmp_path: Path) -> None:
    ended = check(container, tmp_path)
    assert ended.returncode == 2
    # nspawn may have something to say of its own.
    (line,) = [line for line in ended.stderr.splitlines() if "titus-py: " in line]
    assert line.startswith("titus-py: keyd cannot lock its memory")


def test_with_that_capability_all_is_well(container: list[str], tmp_path: Path) -> None:
    ended = check(container, tmp_path, "--capability=CAP_IPC_LOCK")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip().endswith("configuration is fine")
