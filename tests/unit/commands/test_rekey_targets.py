"""Which certificates ``titus-py rekey`` makes new keys for, and for which it cannot."""

from pathlib import Path

from titus_py.audit.throwaway_authority import ThrowawayAuthority
from titus_py.commands.rekey_targets import selected
from titus_py.configuration import load


def test_the_key_of_another_host_is_made_there(tmp_path: Path) -> None:
    issued = ThrowawayAuthority().issue("P-256", ["www.example.org"])
    (tmp_path / "site.crt").write_bytes(issued.certificate)
    (tmp_path / "titus.toml").write_text(
        '[keyd]\nupstream = ["unix:/run/titus-py/keys.sock"]\nupstream_user = "2099999998"\n'
        '[[listen]]\naddress = "127.0.0.1:443"\n'
        '[[vhost]]\nsni = ["www.example.org"]\ncertificate = "site.crt"\nkey = "upstream"\n'
        'backend = "127.0.0.1:80"\n'
    )
    mistakes: list[str] = []
    assert selected(["www.example.org"], load(tmp_path / "titus.toml"), mistakes) == []
    (mistake,) = mistakes
    assert mistake.startswith(f"{tmp_path}/site.crt: its key is another host's: make the new one")
