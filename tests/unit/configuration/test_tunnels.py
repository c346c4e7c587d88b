"""[[tunnel]]: what it may say, and what it may not."""

import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from titus_py.configuration import Loaded, load

PIN = "sha256:" + "0a" * 32
TUNNEL = 'listen = "127.0.0.1:5432"\nconnect = "db.example.org:5432"\n'
Load = Callable[..., Loaded]


@pytest.fixture
def load_tunnels(tmp_path: Path) -> Load:
    """Load tables [[tunnel]] with these settings, after what is at the top."""

    def load_tunnels(*tunnels: str, top: str = "") -> Loaded:
        path = tmp_path / "titus.toml"
        path.write_text("\n".join([top, *(f"[[tunnel]]\n{tunnel}" for tunnel in tunnels)]))
        return load(path)

    (tmp_path / "ca.crt").write_text("")
    return load_tunnels


def told(loaded: Loaded) -> list[str]:
    return [f"{mistake.key}: {mistake.reason}" for mistake in loaded.mistakes]


def test_it_needs_nothing_else(load_tunnels: Load) -> None:
    loaded = load_tunnels(TUNNEL + 'ca = "system"')
    assert told(loaded) == []
    assert loaded.configuration is not None
    (tunnel,) = loaded.configuration.tunnel
    assert tunnel.verified_name == "db.example.org"
    assert list(map(str, loaded.configuration.listening)) == ["127.0.0.1:5432"]
    assert tunnel.model_dump(mode="json", exclude_defaults=True) == {
        "listen": "127.0.0.1:5432",
        "connect": "db.example.org:5432",
        "ca": "system",
    }


def test_as_a_successor_reads_it(load_tunnels: Load) -> None:
    """What one program writes for the next is what a file may say."""
    settings = f'ca = "ca.crt"\npins = ["{PIN}"]\nsend_proxy = "v1"\ndrain = "1s"\nalpn = ["x"]'
    loaded = load_tunnels(TUNNEL + settings)
    assert loaded.configuration is not None
    dumped = loaded.configuration.model_dump(mode="json")
    assert type(loaded.configuration).model_validate(dumped) == loaded.configuration


ON_UNIX = 'listen = "unix:x.sock"\nconnect = "db.example.org:5432"\nca = "system"\n'


def test_one_on_a_unix_socket(load_tunnels: Load, tmp_path: Path) -> None:
    """Relative to the file's directory; whose it is, by name or number."""
    access = 'socket_mode = "0620"\nsocket_user = "nobody"\nsocket_group = 7\n'
    loaded = load_tunnels(ON_UNIX + access)
    assert told(loaded) == []
    assert loaded.configuration is not None
    ((address, allowed),) = loaded.configuration.socket_access.items()
    assert loaded.configuration.listening == [address]
    assert str(address) == f"unix:{tmp_path}/x.sock"
    assert (allowed.mode, allowed.owner) == (0o620, (pwd.getpwnam("nobody").pw_uid, 7))
    dumped = loaded.configuration.model_dump(mode="json", exclude_defaults=True)
    assert dumped["tunnel"][0]["socket_mode"] == "0620"
    assert type(loaded.configuration).model_validate(dumped) == loaded.configuration


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        ("socket_mode = 660", "socket_mode", 'expected a mode such as "0660", in quotes, not 660'),
        ('socket_mode = "0868"', "socket_mode", "expected a mode"),
        ('socket_mode = "4660"', "socket_mode", "expected a mode"),
        ('socket_mode = "0444"', "socket_mode", '"0444" lets only root connect'),
        ('socket_user = "no such"', "socket_user", 'no user is named "no such"'),
        ("socket_user = -1", "socket_user", "expected a number from 0 to 4294967294, not -1"),
        ("socket_user = 1.5", "socket_user", "expected a user's name or number, not 1.5"),
        ('socket_group = "no such"', "socket_group", 'no group is named "no such"'),
        ("allow_remote = true", "allow_remote", "only this machine can connect"),
        ('send_proxy = "v1"', "send_proxy", "has no address that it could send"),
    ],
)
def test_mistakes_of_a_unix_socket(
    load_tunnels: Load, settings: str, key: str, reason: str
) -> None:
    (line,) = told(load_tunnels(ON_UNIX + settings))
    assert line.startswith(f"tunnel[0].{key}: ")
    assert reason in line


@pytest.mark.parametrize(
    ("listen", "reason"),
    [
        ("unix:", "expected a path after unix:"),
        ("unix:@x", "abstract unix sockets are not supported"),
        (f"unix:/{'x' * 107}", "at most 107 are possible"),
        ("db.test:5432", "or unix:/run/app.sock"),
    ],
)
def test_where_none_can_listen(load_tunnels: Load, listen: str, reason: str) -> None:
    (line,) = told(load_tunnels(f'listen = "{listen}"\nconnect = "a.test:1"\nca = "system"'))
    assert line.startswith("tunnel[0].listen: ")
    assert reason in line


def test_a_unix_socket_is_one_thing(load_tunnels: Load, tmp_path: Path) -> None:
    """Of two tunnels, of the metrics and of keyd: each says so."""
    where = f"unix:{tmp_path}/x.sock"
    (line,) = told(load_tunnels(ON_UNIX, ON_UNIX))
    assert line.startswith(f"tunnel[1].listen: {where} overlaps ")
    assert line.endswith(f"{where}: only one can be bound")
    (line,) = told(load_tunnels(ON_UNIX, top='[metrics]\naddress = "unix:x.sock"'))
    assert line.startswith(f"metrics.address: {where} overlaps ")
    (line,) = told(load_tunnels(ON_UNIX, top='[keyd]\nsocket = "x.sock"'))
    assert line == f"tunnel[0].listen: {where} is keyd.socket, where keyd listens"
    to_itself = ON_UNIX.replace("db.example.org:5432", "unix:x.sock") + 'server_name = "a.test"'
    (line,) = told(load_tunnels(to_itself))
    assert line.startswith("tunnel[0].connect: ")
    assert line.endswith("which speaks no TLS")


def test_a_unix_socket_where_others_could_put_theirs(load_tunnels: Load, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    warned = load_tunnels(ON_UNIX).warnings
    assert [one.key for one in warned if "put another file in its place" in one.reason][-1:] == [
        "tunnel[0].listen"
    ]


def test_modes_and_owners_are_for_unix_sockets(load_tunnels: Load) -> None:
    access = 'socket_mode = "0620"\nsocket_user = "nobody"\nsocket_group = 7\n'
    lines = told(load_tunnels(TUNNEL + 'ca = "system"\n' + access))
    assert [line.partition(":")[0] for line in lines] == [
        f"tunnel[0].socket_{field}" for field in ("mode", "user", "group")
    ]
    assert all("127.0.0.1:5432, which is no unix socket" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        ("", "ca", "is missing, and so is pins: the server is always verified"),
        ("pins = []", "pins", "an empty list accepts no server"),
        ('pins = ["sha256:00"]', "pins", '"sha256:00" is no public key\'s hash'),
        ('ca = "nowhere.crt"', "ca", "no such file or directory"),
        ("ca = false", "ca", "expected a string, not false"),
        ('ca = "system"\nserver_name = "a b"', "server_name", "'a b' is no host name"),
        ('ca = "system"\nmin_version = "TLSv1.1"', "min_version", "expected "),
        ('ca = "system"\nsend_proxy = "v2-tls"', "send_proxy", 'expected "v1" or "v2"'),
        ('ca = "system"\nverify = false', "verify", "unknown key: known here are listen"),
    ],
)
def test_mistakes(load_tunnels: Load, settings: str, key: str, reason: str) -> None:
    (line,) = told(load_tunnels(TUNNEL + settings))
    assert line.startswith(f"tunnel[0].{key}: ")
    assert reason in line


@pytest.mark.parametrize(
    ("connect", "more", "why"),
    [
        ('"192.0.2.1:5432"', "", "connect is 192.0.2.1:5432"),
        ('"unix:/run/server"', "", "connect is unix:/run/server"),
        ('["a.test:1", "b.test:1"]', f'pins = ["{PIN}"]', "connect has several hosts"),
    ],
)
def test_a_certificate_is_for_some_name(
    load_tunnels: Load, connect: str, more: str, why: str
) -> None:
    settings = f'listen = "127.0.0.1:1"\nconnect = {connect}\n{more}\n'
    (line,) = told(load_tunnels(settings + 'ca = "system"'))
    assert line.startswith(f"tunnel[0].server_name: is missing: {why}")
    assert told(load_tunnels(settings + 'ca = "system"\nserver_name = "192.0.2.1"')) == []
    assert (
        told(load_tunnels(f'listen = "127.0.0.1:1"\nconnect = {connect}\npins = ["{PIN}"]')) == []
    )


@pytest.mark.parametrize("address", ["192.0.2.1:5432", "[::]:5432", ":5432", "[2001:db8::1]:5432"])
def test_who_may_connect(load_tunnels: Load, address: str) -> None:
    settings = f'listen = "{address}"\nconnect = "a.test:1"\nca = "system"\n'
    (line,) = told(load_tunnels(settings))
    assert line.startswith("tunnel[0].listen: ")
    assert "other machines can connect" in line
    assert told(load_tunnels(settings + "allow_remote = true")) == []


def test_addresses_that_meet(load_tunnels: Load) -> None:
    other = f'connect = "127.0.0.1:5432"\npins = ["{PIN}"]\nlisten = '
    lines = told(load_tunnels(TUNNEL + 'ca = "system"', other + '"127.0.0.1:5432"'))
    assert "tunnel[1].listen: 127.0.0.1:5432 overlaps" in lines[0]
    assert "which speaks no TLS" in lines[1]
    top = '[metrics]\naddress = "127.0.0.1:5432"'
    (line,) = told(load_tunnels(TUNNEL + 'ca = "system"', top=top))
    assert line.startswith("metrics.address: 127.0.0.1:5432 overlaps tunnel")


def test_a_listener_still_needs_a_host(load_tunnels: Load) -> None:
    top = '[[listen]]\naddress = "127.0.0.1:443"\n'
    lines = told(load_tunnels(TUNNEL + 'ca = "system"', top=top))
    assert lines == ["vhost: at least one [[vhost]] is needed"]


def test_in_an_included_file(load_tunnels: Load, tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text(f'[[tunnel]]\n{TUNNEL}\nca = "system"\n[[tunnel]]\nx = 1')
    loaded = load_tunnels(top='include = ["one.toml"]')
    assert {mistake.file for mistake in loaded.mistakes} == {str(tmp_path / "one.toml")}
    (tmp_path / "one.toml").write_text(f'[[tunnel]]\n{TUNNEL}\nca = "system"\n')
    assert told(load_tunnels(top='include = ["one.toml"]')) == []


def test_load_balancers_do_not_ask_for_tls(load_tunnels: Load) -> None:
    settings = '[[listen]]\naddress = "127.0.0.1:1"\naccept_proxy_from = ["10.0.0.1"]\n'
    lines = told(load_tunnels(top=settings + 'starttls = "postgresql"'))
    assert any(line.startswith("listen[0].starttls: does not go with") for line in lines)


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        ('certificate = "ca.crt"', "key", "is missing"),
        ('key = "ca.crt"', "key", "has no effect without certificate"),
        (
            'certificate = "ca.crt"\nkey = "ca.crt"\nmin_version = "TLSv1.2"',
            "min_version",
            "with a certificate, only TLSv1.3",
        ),
    ],
)
def test_a_certificate_has_a_key_and_takes_tls_1_3(
    load_tunnels: Load, settings: str, key: str, reason: str
) -> None:
    (line,) = told(load_tunnels(TUNNEL + f'ca = "system"\n{settings}'))
    assert line.startswith(f"tunnel[0].{key}: {reason}")
