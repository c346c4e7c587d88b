"""What the configuration may say of the PROXY protocol."""

from pathlib import Path

import pytest

from titus_py.configuration.loading import Loaded, load

FILES = 'certificate = "site.crt"\nkey = "site.key"\nbackend = "127.0.0.1:80"\n'


def loaded(directory: Path, listen: str = "", vhost: str = "") -> Loaded:
    """With these lines in the only [[listen]], and in the only [[vhost]]."""
    (directory / "site.crt").touch()
    (directory / "site.key").touch(mode=0o600)
    path = directory / "titus.toml"
    path.write_text(f'[[listen]]\naddress = ":443"\n{listen}\n[[vhost]]\n{FILES}{vhost}\n')
    return load(path)


@pytest.mark.parametrize(
    ("listed", "read"),
    [
        ('["10.0.0.0/8"]', ("10.0.0.0/8",)),
        ('["192.0.2.5", "2001:DB8::/32", "::1"]', ("192.0.2.5/32", "2001:db8::/32", "::1/128")),
        # An address as a dual-stack socket shows it is the IPv4 address that it stands for.
        ('["::ffff:10.0.0.0/104", "10.0.0.0/8"]', ("10.0.0.0/8",)),
    ],
)
def test_load_balancers(tmp_path: Path, listed: str, read: tuple[str, ...]) -> None:
    configuration = loaded(tmp_path, f"accept_proxy_from = {listed}").configuration
    assert configuration is not None
    assert configuration.listen[0].accept_proxy_from == read


@pytest.mark.parametrize(
    ("line", "key", "reason"),
    [
        ("accept_proxy_from = []", "accept_proxy_from", "an empty list lets nobody connect"),
        ('accept_proxy_from = "10.0.0.0/8"', "accept_proxy_from", "expected a list of networks"),
        ("accept_proxy_from = [10]", "accept_proxy_from", "expected a string, not 10"),
        ('accept_proxy_from = ["lb.example.org"]', "accept_proxy_from", "expected an address or a"),
        ('accept_proxy_from = ["10.0.0.0/33"]', "accept_proxy_from", "expected an address or a"),
        ('accept_proxy_from = ["10.0.0.1:80"]', "accept_proxy_from", "expected an address or a"),
        ('accept_proxy_from = ["10.1.0.0/8"]', "accept_proxy_from", "write 10.0.0.0/8, or 10.1.0"),
        ('accept_proxy_from = ["0.0.0.0/0"]', "accept_proxy_from", "is everybody"),
        ('accept_proxy_from = ["::/0"]', "accept_proxy_from", "is everybody"),
        ('accept_proxy_from = ["::ffff:0:0/96"]', "accept_proxy_from", "is everybody"),
        ('proxy_timeout = "2s"', "proxy_timeout", "accept_proxy_from is missing"),
        (
            'accept_proxy_from = ["::1"]\nproxy_timeout = "0s"',
            "proxy_timeout",
            "expected a duration from",
        ),
    ],
)
def test_mistakes_about_load_balancers(tmp_path: Path, line: str, key: str, reason: str) -> None:
    [mistake] = loaded(tmp_path, line).mistakes
    assert mistake.key == f"listen[0].{key}"
    assert reason in mistake.reason


def on_unix(directory: Path, listen: str = "", vhost: str = "") -> Loaded:
    """With these lines in the only [[listen]], which is on a unix socket."""
    with_files = loaded(directory)
    path = Path(with_files.source.path)
    address = 'address = "unix:https.sock"'
    path.write_text(path.read_text().replace('address = ":443"', f"{address}\n{listen}") + vhost)
    return load(path)


def test_a_load_balancer_on_a_unix_socket(tmp_path: Path) -> None:
    """Whoever may connect to it; and clients may do so themselves."""
    access = 'socket_mode = "0620"\nsocket_group = 7\n'
    for lines in ("", access + 'accept_proxy_from = ["unix"]\nproxy_timeout = "2s"'):
        configuration = on_unix(tmp_path, lines).configuration
        assert configuration is not None
        ((address, allowed),) = configuration.socket_access.items()
        assert str(address) == f"unix:{tmp_path}/https.sock"
        assert configuration.listening == [address]
    assert (allowed.mode, allowed.owner) == (0o620, (0, 7))
    assert configuration.listen[0].accept_proxy_from == ("unix",)
    dumped = configuration.model_dump(mode="json")
    assert type(configuration).model_validate(dumped) == configuration


@pytest.mark.parametrize(
    ("line", "key", "reason"),
    [
        ('accept_proxy_from = ["127.0.0.1"]', "accept_proxy_from", 'expected ["unix"]: who'),
        ('accept_proxy_from = ["unix", "::1"]', "accept_proxy_from", 'expected ["unix"]: who'),
        ("transparent = true", "transparent", "only this machine can connect"),
        ('starttls = "postgresql"', "starttls", "these clients ask for no TLS"),
        ('socket_mode = "0440"', "socket_mode", "lets only root connect"),
    ],
)
def test_mistakes_of_a_unix_socket(tmp_path: Path, line: str, key: str, reason: str) -> None:
    [mistake] = on_unix(tmp_path, line).mistakes
    assert mistake.key == f"listen[0].{key}"
    assert reason in mistake.reason


@pytest.mark.parametrize(
    ("line", "key", "reason"),
    [
        ('accept_proxy_from = ["::1", "unix"]', "accept_proxy_from", "is for a unix socket"),
        ('socket_mode = "0600"', "socket_mode", "has no effect on [::]:443"),
        ("socket_user = 7", "socket_user", "has no effect on [::]:443"),
        ("socket_group = 7", "socket_group", "has no effect on [::]:443"),
    ],
)
def test_only_of_a_unix_socket(tmp_path: Path, line: str, key: str, reason: str) -> None:
    [mistake] = loaded(tmp_path, line).mistakes
    assert mistake.key == f"listen[0].{key}"
    assert reason in mistake.reason


@pytest.mark.parametrize(
    ("vhost", "key", "reason"),
    [
        ("local_port = 443", "local_port", "nothing listens on port 443"),
        ('local_address = "192.0.2.1"', "local_address", "nothing listens on 192.0.2.1"),
    ],
)
def test_a_unix_socket_has_no_address(tmp_path: Path, vhost: str, key: str, reason: str) -> None:
    [mistake] = on_unix(tmp_path, vhost=vhost).mistakes
    assert mistake.key == f"vhost[0].{key}"
    assert reason in mistake.reason


def test_no_backend_sees_a_unix_sockets_clients(tmp_path: Path) -> None:
    elsewhere = FILES.replace("127.0.0.1:80", "192.0.2.9:80") + 'source_address = "client"\n'
    more = f'sni = ["a.test"]\n[[vhost]]\n{elsewhere}'
    [mistake] = on_unix(tmp_path, vhost=more).mistakes
    assert mistake.key == "vhost[1].backend"
    assert "no client's address can be used" in mistake.reason
    assert not on_unix(tmp_path, 'accept_proxy_from = ["unix"]', more).mistakes


def test_a_backend_that_is_the_listener_itself(tmp_path: Path) -> None:
    loop = FILES.replace("127.0.0.1:80", f"unix:{tmp_path}/https.sock")
    [mistake] = on_unix(tmp_path, vhost=f'sni = ["a.test"]\n[[vhost]]\n{loop}').mistakes
    assert mistake.key == "vhost[1].backend"
    assert "would come back here" in mistake.reason


@pytest.mark.parametrize("setting", ["socket", "lend"])
def test_where_keyd_listens_nobody_else_does(tmp_path: Path, setting: str) -> None:
    kind = "" if setting == "socket" else "unix:"
    keyd = f'[keyd]\n{setting} = "{kind}{tmp_path}/https.sock"\n'
    mistakes = on_unix(tmp_path, vhost=keyd).mistakes
    reasons = [one.reason for one in mistakes if one.key == "listen[0].address"]
    assert any(f"is keyd.{setting}" in reason for reason in reasons)


def test_how_a_backend_is_told(tmp_path: Path) -> None:
    for how in ("v1", "v2", "v2-tls"):
        configuration = loaded(tmp_path, vhost=f'send_proxy = "{how}"').configuration
        assert configuration is not None
        assert configuration.vhost[0].send_proxy == how
    [mistake] = loaded(tmp_path, vhost='send_proxy = "v3"').mistakes
    assert mistake.key == "vhost[0].send_proxy"
    assert mistake.reason == 'expected "v1", "v2", "v2-tls" or "v2-tls-cert", not "v3"'


def test_certificates_are_told_only_where_they_are_asked_for(tmp_path: Path) -> None:
    [mistake] = loaded(tmp_path, vhost='send_proxy = "v2-tls-cert"').mistakes
    assert mistake.key == "vhost[0].send_proxy"
    assert "no client is asked for a certificate" in mistake.reason
    spki = f"sha256:{bytes(32).hex()}"
    asked = f'''send_proxy = "v2-tls-cert"
        client_certificates = "optional"
        client_allow = {{ spki = ["{spki}"] }}'''
    assert loaded(tmp_path, vhost=asked).mistakes == []
