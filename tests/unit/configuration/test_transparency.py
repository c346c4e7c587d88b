"""Transparent connections: what the configuration may say, and which commands they take."""

from pathlib import Path

import pytest

from titus_py.commands.routing import commands
from titus_py.configuration.loading import Loaded, load

FILES = 'certificate = "site.crt"\nkey = "site.key"\n'
CLIENT = 'source_address = "client"\n'


def loaded(directory: Path, listen: str, *vhosts: str) -> Loaded:
    (directory / "site.crt").touch()
    (directory / "site.key").touch(mode=0o600)
    path = directory / "titus.toml"
    tables = "".join(f"[[vhost]]\n{FILES}{vhost}\n" for vhost in vhosts)
    path.write_text(f"[[listen]]\n{listen}\n{tables}")
    return load(path)


def printed(directory: Path, listen: str, vhost: str) -> list[str]:
    configuration = loaded(directory, listen, vhost).configuration
    assert configuration is not None
    return list(commands(configuration))


@pytest.mark.parametrize(
    ("vhost", "key", "reason"),
    [
        ('backend = "unix:/run/app.sock"', "backend", "is on this machine"),
        ('backend = "127.0.0.1:80"', "backend", "127.0.0.1:80 is on this machine"),
        ('backend = "[::1]:80"', "backend", "is on this machine"),
        ('backend = "[::ffff:127.0.0.2]:80"', "backend", "127.0.0.2:80 is on this machine"),
        ('backend = ["10.0.0.5:80", "127.0.0.1:80"]', "backend", "is on this machine"),
        (
            'backend = "10.0.0.5:80"\nalpn = ["h2"]\nbackends = { h2 = "127.0.0.1:80" }',
            "backends.h2",
            "is on this machine",
        ),
    ],
)
def test_the_backend_must_be_elsewhere(tmp_path: Path, vhost: str, key: str, reason: str) -> None:
    listen = 'address = ":443"'
    [mistake] = loaded(tmp_path, listen, CLIENT + vhost).mistakes
    assert f": {key}: " in str(mistake) or f": {key} (" in str(mistake)
    assert reason in str(mistake)
    assert "send_proxy" in str(mistake)
    # Without the setting, it may be anywhere.
    assert not loaded(tmp_path, listen, vhost).mistakes


def test_only_the_clients_address(tmp_path: Path) -> None:
    vhost = 'backend = "10.0.0.5:80"\nsource_address = "192.0.2.1"'
    [mistake] = loaded(tmp_path, 'address = ":443"', vhost).mistakes
    assert 'source_address: expected "client", not "192.0.2.1"' in str(mistake)


def test_no_commands_where_nothing_is_transparent(tmp_path: Path) -> None:
    assert not printed(tmp_path, 'address = ":443"', 'backend = "10.0.0.5:80"')


@pytest.mark.parametrize(
    ("address", "rule"),
    [
        (":443", "tcp dport 443 tproxy to :443"),
        ("0.0.0.0:443", "meta nfproto ipv4 tcp dport 443 tproxy ip to :443"),
        ("192.0.2.1:8443", "meta nfproto ipv4 tcp dport 8443 tproxy ip to 192.0.2.1:8443"),
        ("[2001:db8::1]:443", "meta nfproto ipv6 tcp dport 443 tproxy ip6 to [2001:db8::1]:443"),
    ],
)
def test_commands_for_a_listener(tmp_path: Path, address: str, rule: str) -> None:
    listen = f'address = "{address}"\ntransparent = true'
    lines = printed(tmp_path, listen, 'backend = "127.0.0.1:80"')
    assert f"nft add rule inet titus-py prerouting {rule} meta mark set 1 accept" in lines
    assert not any("socket transparent" in line for line in lines)


def test_a_transparent_listener_receives_what_is_for_any_address(tmp_path: Path) -> None:
    vhosts = [
        'backend = "127.0.0.1:80"\nlocal_address = "203.0.113.9"',
        'backend = "127.0.0.1:80"\nlocal_port = 8443',
        'backend = "127.0.0.1:80"',
    ]
    listen = 'address = "192.0.2.1:443"'
    assert len(loaded(tmp_path, listen, *vhosts).mistakes) == 2
    assert not loaded(tmp_path, f"{listen}\ntransparent = true", *vhosts).mistakes


@pytest.mark.parametrize(
    ("listen", "backend", "wrong"),
    [
        ("192.0.2.1:443", '"[2001:db8::9]:80"', True),
        ("0.0.0.0:443", '["[2001:db8::8]:80", "[2001:db8::9]:80"]', True),
        ("[2001:db8::1]:443", '"10.0.0.5:80"', True),
        ("[2001:db8::1]:443", '["10.0.0.5:80", "[2001:db8::9]:80"]', False),
        ("192.0.2.1:443", '"name.example:80"', False),
        # Only clients of one family are served; which come is not known.
        ("[::]:443", '"10.0.0.5:80"', False),
        # What a load balancer says of its client may be of either family.
        ('192.0.2.1:443"\naccept_proxy_from = ["10.0.0.0/8"] #', '"[2001:db8::9]:80"', False),
    ],
)
def test_a_backend_has_an_address_of_some_clients_family(
    tmp_path: Path, listen: str, backend: str, wrong: bool
) -> None:
    vhost = f"backend = {backend}\n"
    mistakes = loaded(tmp_path, f'address = "{listen}"', CLIENT + vhost).mistakes
    assert [mistake.key for mistake in mistakes] == ["vhost[0].backend"] * wrong
    if wrong:
        assert "no client's address can be used to connect to it" in mistakes[0].reason
    assert not loaded(tmp_path, f'address = "{listen}"', vhost).mistakes
