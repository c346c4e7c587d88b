"""What the surroundings keep from a unit: paths that it does not see."""

from pathlib import Path

import pytest

from titus_py.commands import outside
from titus_py.configuration import load


def test_a_directory_that_is_hidden_from_the_unit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of this test are below /tmp, which is another one for the unit."""
    (tmp_path / "titus-py.service").touch()
    monkeypatch.setattr(outside, "_UNITS", (tmp_path,))
    monkeypatch.setattr(outside, "_HIDDEN", {str(tmp_path): "PrivateTmp="})
    live = tmp_path / "titus-py" / "live"
    live.mkdir(parents=True)
    (live / "www.pem").touch(mode=0o600)
    configuration = tmp_path / "titus-py" / "titus.toml"
    configuration.write_text(
        '[[listen]]\naddress = ":443"\n'
        '[[vhost]]\ncertificate_dir = "live"\nbackend = "127.0.0.1:80"\n'
    )
    (warning,) = outside.warnings(load(configuration))
    assert warning.key == "vhost[0].certificate_dir"
    assert warning.reason.startswith(
        f"{live} is hidden from titus-py.service by PrivateTmp=: put it elsewhere"
    )
