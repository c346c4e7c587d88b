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
