"""Keys that other hosts have: what a configuration may say of them, and what it may not."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from titus_py.audit.throwaway_authority import ThrowawayAuthority
from titus_py.configuration import Loaded, Valid, load
from titus_py.configuration.checking import check
from titus_py.configuration.upstreams import told, unproved_keys

UPSTREAM = 'upstream = ["unix:/run/titus-py/keys.sock"]'
USER = 'upstream_user = "2099999998"\n'
KEYD = USER + UPSTREAM
#: Beside those of an instance on this machine that may have the default ones.
_FIRST_UID = 2_010_000_000 + os.getpid() % 20_000 * 4000
WORKER = f'[worker]\nuids = "{_FIRST_UID}-{_FIRST_UID + 3998}"\n'
Load = Callable[..., Loaded]


@pytest.fixture
def load_with(tmp_path: Path) -> Load:
    """Load a virtual host with these settings, and this [keyd], after what is at the top."""
    issued = ThrowawayAuthority().issue("P-256", ["www.example.org"])
    (tmp_path / "site.crt").write_bytes(issued.certificate)
    (tmp_path / "site.key").write_bytes(issued.key)
    (tmp_path / "site.key").chmod(0o600)

    def load_with(vhost: str = 'key = "upstream"', keyd: str = KEYD, top: str = "") -> Loaded:
        path = tmp_path / "titus.toml"
        path.write_text(
            f'{top}\n[keyd]\n{keyd}\n[[listen]]\naddress = "127.0.0.1:443"\n'
            f'[[vhost]]\ncertificate = "site.crt"\nbackend = "127.0.0.1:80"\n{vhost}\n'
        )
        return load(path)

    return load_with


def mistakes(loaded: Loaded) -> list[str]:
    return [f"{mistake.key}: {mistake.reason}" for mistake in loaded.mistakes]


def test_the_certificate_alone_is_read(load_with: Load) -> None:
    checked = check(load_with(top=WORKER))
    assert [str(one) for one in checked.mistakes] == []
    assert checked.configuration is not None
    ((credential, facts),) = checked.certificates.items()
    assert credential.upstream
    assert credential.key is None
    assert not credential.secrets
    keyd = told(checked.configuration.keyd, [facts.reference, facts.reference])
    assert keyd is not None
    assert keyd["references"] == [facts.reference]
    assert keyd["paths"] == ["/run/titus-py/keys.sock"]
    (line,) = unproved_keys(checked.configuration)
    assert line.startswith("# Not checked: whether another host has the key of one certificate")


def test_as_a_successor_reads_it(load_with: Load) -> None:
    configuration = load_with(keyd=USER + 'upstream = ["unix:/a", "unix:/b"]').configuration
    assert configuration is not None
    assert configuration.keyd.upstream is not None
    assert list(map(str, configuration.keyd.upstream)) == ["unix:/a", "unix:/b"]
    dumped = configuration.model_dump(mode="json", exclude_defaults=True)
    assert type(configuration).model_validate(dumped, context=Valid()) == configuration


def test_a_file_of_that_name_is_a_file(load_with: Load) -> None:
    (one,) = mistakes(load_with('key = "./upstream"', ""))
    assert one.startswith("vhost[0].key: ")
    assert one.endswith("no such file or directory")


@pytest.mark.parametrize(
    ("keyd", "reason"),
    [
        ('upstream = "unix:/a"', 'expected a list of unix sockets, such as ["unix:'),
        ("upstream = []", "expected 1 to 8 unix sockets, not 0"),
        ("upstream = [1]", "expected a string, not 1"),
        ('upstream = ["10.0.0.1:443"]', "is no unix socket, and keyd uses no network"),
        ('upstream = ["unix:run/a"]', "expected an absolute path"),
        ('upstream = ["unix:"]', "expected a path after unix:"),
        ('upstream = ["unix:/a", "unix:/a"]', "is there twice"),
        (f"upstream = {[f'unix:/{number}' for number in range(9)]}", "not 9"),
    ],
)
def test_what_is_no_upstream(load_with: Load, keyd: str, reason: str) -> None:
    (one,) = mistakes(load_with(keyd=USER + keyd))
    assert one.startswith("keyd.upstream")
    assert reason in one


@pytest.mark.parametrize(
    ("vhost", "keyd", "key", "reason"),
    [
        ('key = "upstream"', USER, "keyd.upstream", "is missing: vhost"),
        ('key = "upstream"', UPSTREAM, "keyd.upstream_user", "is missing: vhost"),
        (
            'key = "upstream"',
            f'{UPSTREAM}\nupstream_user = "root"',
            "keyd.upstream_user",
            "cannot be root",
        ),
        (
            'key = "upstream"',
            f'{UPSTREAM}\nupstream_user = "2099999999"',
            "keyd.upstream_user",
            "is keyd.user",
        ),
        (
            'key = "upstream"',
            f'{UPSTREAM}\nupstream_user = "2100000001"',
            "keyd.upstream_user",
            "is among worker.uids",
        ),
        (
            'key = "upstream"\npassphrase_file = "site.crt"',
            KEYD,
            "vhost[0].passphrase_file",
            "does not go with a key that other hosts have",
        ),
        (
            'key = "site.key"\n[[tunnel]]\nlisten = "127.0.0.1:1"\nconnect = "x:1"\nca = "site.crt"'
            '\ncertificate = "site.crt"\nkey = "upstream"',
            KEYD,
            "tunnel[0].key",
            "a tunnel's key is in a file",
        ),
        (
            "",
            f'{KEYD}\nsocket = "/run/titus-py/keyd.sock"',
            "keyd.upstream",
            "does not go with keyd.socket: the keyd at /run/titus-py/keyd.sock has its own keys",
        ),
        (
            'key = "upstream"',
            'socket = "/run/titus-py/keyd.sock"',
            "vhost[0].key",
            "only a keyd that titus-py starts asks other hosts",
        ),
    ],
)
def test_what_does_not_go_together(
    load_with: Load, vhost: str, keyd: str, key: str, reason: str
) -> None:
    (one,) = mistakes(load_with(vhost, keyd))
    assert one.startswith(f"{key}: ")
    assert reason in one


def test_each_mistake_is_said(load_with: Load) -> None:
    vhost = '[[vhost]]\nbackend = "127.0.0.1:80"\ncertificate = "site.crt"\nkey = "upstream"'
    several = load_with(f'sni = ["a.example.org"]\nkey = "upstream"\n{vhost}', "")
    assert len(mistakes(several)) == 4


def test_no_rsa_key_exchange(load_with: Load, tmp_path: Path) -> None:
    issued = ThrowawayAuthority().issue("RSA-2048", ["www.example.org"])
    loaded = load_with('key = "upstream"\nrsa_key_exchange = true', top=WORKER)
    (tmp_path / "site.crt").write_bytes(issued.certificate)
    (one,) = check(loaded).mistakes
    assert one.key == "vhost[0].rsa_key_exchange"
    assert one.reason.startswith("its key is another host's, which keyd has sign")


def warnings(loaded: Loaded) -> list[str]:
    return [
        f"{one.key}: {one.reason}"
        for one in loaded.warnings
        if one.key.startswith(("keyd.upstream", "tunnel"))
    ]


def test_a_socket_that_is_not_there_is_warned_of(load_with: Load, tmp_path: Path) -> None:
    path = tmp_path / "keys.sock"
    loaded = load_with(keyd=f'{USER}upstream = ["unix:{path}"]')
    (warning,) = warnings(loaded)
    assert warning == (
        f"keyd.upstream: unix:{path}: no [[tunnel]] listens there, and nothing is there now"
    )
    path.touch()
    assert not warnings(load_with(keyd=f'{USER}upstream = ["unix:{path}"]'))


TUNNEL = f"""
[[tunnel]]
listen = "unix:/run/titus-py/keys.sock"
connect = "192.0.2.10:8444"
pins = ["sha256:{"0a" * 32}"]
"""


@pytest.mark.parametrize(
    ("access", "lets_in"),
    [
        ("", False),
        ('socket_group = "2099999998"', True),
        ('socket_group = "2099999998"\nsocket_mode = "0600"', False),
        ('socket_group = "2099999997"', False),
        ('socket_user = "2099999998"', True),
        ('socket_user = "2099999998"\nsocket_mode = "0066"', False),
        ('socket_mode = "0666"', True),
    ],
)
def test_a_tunnel_that_keeps_out_who_is_to_connect(
    load_with: Load, access: str, lets_in: bool
) -> None:
    loaded = load_with(f'key = "upstream"{TUNNEL}{access}')
    assert mistakes(loaded) == []
    found = warnings(loaded)
    assert bool(found) is not lets_in
    for warning in found:
        assert warning.startswith("tunnel[0].socket_group: its socket does not let keyd.upstream_")
        assert "which is 2099999998" in warning


def test_upstreams_that_nobody_needs(load_with: Load) -> None:
    loaded = load_with('key = "site.key"')
    assert not loaded.mistakes
    (warning,) = (one for one in warnings(loaded) if "no effect" in one)
    assert warning == 'keyd.upstream: has no effect: no [[vhost]] has key = "upstream"'


@pytest.mark.parametrize("number", [0, 1])
def test_the_files_of_the_page_are_configurations(tmp_path: Path, number: int) -> None:
    """As docs/remote-keys.md has them, with whole pins, and files and users that there are."""
    page = (Path(__file__).parents[3] / "docs/remote-keys.md").read_text()
    text = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[number]
    text = re.sub(r"sha256:[0-9a-f]{4}…", "sha256:" + "0a" * 32, text)
    text = text.replace("/etc/titus-py", str(tmp_path)).replace("titus-upstream", "2099999998")
    text = text.replace("192.0.2.10:8444", "127.0.0.1:8444") if number == 0 else text
    authority = ThrowawayAuthority()
    (tmp_path / "keys").mkdir()
    for name in ("site", "keys/keys-1", "keys/proxy-a"):
        issued = authority.issue("P-256", ["www.example.org"])
        (tmp_path / f"{name}.crt").write_bytes(issued.certificate)
        (tmp_path / f"{name}.key").touch(0o600)
        (tmp_path / f"{name}.key").write_bytes(issued.key)
    (tmp_path / "titus.toml").write_text(WORKER + text)
    checked = check(load(tmp_path / "titus.toml"))
    assert [str(one) for one in checked.mistakes] == []
    assert not [one for one in map(str, checked.warnings) if "upstream" in one or "lend" in one]
