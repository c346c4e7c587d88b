"""What a reload may not ask for, by what titus-py was started with."""

import subprocess
import sys
from pathlib import Path

#: As the unit has titus-py: root, without CAP_CHOWN.
_WITHOUT_CHOWN = """
import sys
import prctl
from keyd.linux.credentials import give_up_capabilities, permitted_capabilities
from titus_py.configuration import load
from titus_py.supervisor.privileges import given_up

give_up_capabilities(permitted_capabilities() - {prctl.CAP_CHOWN})
print(given_up(load(sys.argv[1]).configuration))
"""


def _given_up(tmp_path: Path, setting: str) -> str:
    configuration = tmp_path / "titus.toml"
    configuration.write_text(
        f'[[tunnel]]\nlisten = "unix:{tmp_path}/db.sock"\n{setting}\n'
        f'connect = "127.0.0.1:1"\npins = ["sha256:{"0a" * 32}"]\n'
    )
    command = [sys.executable, "-I", "-c", _WITHOUT_CHOWN, configuration]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    return done.stdout.strip()


def test_a_socket_of_another_users_takes_a_capability_that_the_unit_has_not(
    tmp_path: Path,
) -> None:
    """Otherwise a reload would say that all is well, and nobody but root could connect."""
    reason = _given_up(tmp_path, 'socket_user = "nobody"\nsocket_mode = "0600"')
    assert reason.startswith("socket_user takes CAP_CHOWN, without which titus-py was started")
    assert not _given_up(tmp_path, 'socket_group = "daemon"')
    assert not _given_up(tmp_path, 'socket_user = "root"')
