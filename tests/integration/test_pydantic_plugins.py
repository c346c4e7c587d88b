"""A distribution that is installed beside titus-py, with a plugin for pydantic: root loads none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Where the plugin is installed, and where it says that it was loaded.
_RUN = """
import sys
directory, *sys.argv = sys.argv[1:]
sys.path.append(directory)
exec({program!r})
"""
_PLUGIN = """
import os
from pathlib import Path
Path(__file__).with_name("loaded").touch()
def new_schema_validator(*_, **__): return None, None, None
"""
_OTHERS = "import pydantic\nclass Model(pydantic.BaseModel): number: int\nModel(number=1)"
_OURS = "from titus_py.__main__ import main; sys.exit(main())"


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """Installed here."""
    (tmp_path / "plugged_in.py").write_text(_PLUGIN)
    metadata = tmp_path / "plugged_in-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-in\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pydantic]\nplugged_in = plugged_in\n")
    return tmp_path


def run(program: str, plugin: Path, *words: object) -> int:
    command = [sys.executable, "-I", "-c", _RUN.format(program=program), plugin, "titus-py"]
    # Without what another test's import of the command has left there.
    environment = {name: value for name, value in os.environ.items() if "PYDANTIC" not in name}
    return subprocess.run(
        [*command, *map(str, words)], check=False, capture_output=True, env=environment
    ).returncode


def test_others_load_it(plugin: Path) -> None:
    """Such a plugin works: else the next test would prove nothing."""
    assert run(_OTHERS, plugin) == 0
    assert (plugin / "loaded").exists()


@pytest.mark.parametrize("command", ["check", "serve"])
def test_titus_py_loads_none(plugin: Path, command: str) -> None:
    configuration = plugin / "titus.toml"
    configuration.write_text("[[listen]]\naddress = 1\n")
    assert run(_OURS, plugin, command, "--config", configuration)
    assert not (plugin / "loaded").exists()
