"""Addresses that two settings would share, and listeners that nobody could come to."""

from pathlib import Path

import pytest

from titus_py.configuration.address import Bindable, IPAddress
from titus_py.configuration.loading import Loaded, load

PAIR = 'certificate = "site.crt"\n'


def loaded(
    directory: Path, listen: str, backend: str, before: str = "", key: bool = True
) -> Loaded:
    (directory / "site.crt").touch()
    (directory / "site.key").touch(mode=0o600)
    path = directory / "titus.toml"
    vhost = PAIR + ('key = "site.key"\n' if key else "") + f"backend = {backend}\n"
    path.write_text(f"{before}\n[[listen]]\n{listen}\n[[vhost]]\n{vhost}")
    return load(path)


def told(found: Loaded) -> list[tuple[str, str]]:
    return [(mistake.key, mistake.reason) for mistake in found.mistakes]


@pytest.mark.parametrize(
    ("listen", "backend"),
    [
        ("192.0.2.5:443", "192.0.2.5:443"),
        ("[2001:db8::5]:443", "[2001:db8::5]:443"),
        ("[::]:443", "127.0.0.1:443"),
        ("[::]:443", "[::1]:443"),
        ("0.0.0.0:443", "127.0.0.9:443"),
    ],
)
def test_a_backend_is_no_listener_of_this_instance(
    tmp_path: Path, listen: str, backend: str
) -> None:
    ((key, reason),) = told(loaded(tmp_path, f'address = "{listen}"', f'"{backend}"'))
    assert key == "vhost[0].backend"
    assert reason.startswith(f"{backend} is listen ")
    assert reason.endswith("the plaintext would come back here, as from a client")


@pytest.mark.parametrize(
    ("listen", "backend"),
    [
        ("192.0.2.5:443", "192.0.2.5:80"),
        ("192.0.2.5:443", "127.0.0.1:443"),
        ("0.0.0.0:443", "[::1]:443"),
        # Which addresses this machine has is not known here.
        ("[::]:443", "192.0.2.5:443"),
    ],
)
def test_a_backend_may_have_a_listeners_port(tmp_path: Path, listen: str, backend: str) -> None:
    assert told(loaded(tmp_path, f'address = "{listen}"', f'"{backend}"')) == []


@pytest.mark.parametrize(
    ("metrics", "backend"),
    [
        ("127.0.0.1:9443", "127.0.0.1:9443"),
        ("0.0.0.0:9443", "127.0.0.1:9443"),
        ("unix:/run/app.sock", "unix:/run/app.sock"),
    ],
)
def test_metrics_are_not_where_a_backend_is(tmp_path: Path, metrics: str, backend: str) -> None:
    tables = f'[metrics]\naddress = "{metrics}"'
    ((key, reason),) = told(loaded(tmp_path, 'address = "[::]:443"', f'"{backend}"', tables))
    assert key == "metrics.address"
    assert backend in reason
    assert ": backend (line " in reason


@pytest.mark.parametrize("other", ["metrics", "backend"])
def test_the_socket_of_keyd_is_nothing_else(tmp_path: Path, other: str) -> None:
    """The metrics would remove it and bind their own; a client's octets would go to keyd."""
    tables, backend = '[keyd]\nsocket = "/run/k.sock"\n', '"127.0.0.1:80"'
    if other == "metrics":
        tables += '[metrics]\naddress = "unix:/run/k.sock"\n'
    else:
        backend = '"unix:/run/k.sock"'
    ((key, reason),) = told(loaded(tmp_path, 'address = ":443"', backend, tables, key=False))
    assert key == ("metrics.address" if other == "metrics" else "vhost[0].backend")
    assert reason.startswith("unix:/run/k.sock is keyd.socket")


@pytest.mark.parametrize(
    ("listen", "balancers", "wrong"),
    [
        ("192.0.2.5:443", '["2001:db8::/32"]', "no IPv6 connection comes to 192.0.2.5:443"),
        ("0.0.0.0:443", '["2001:db8::7"]', "no IPv6 connection comes to 0.0.0.0:443"),
        ("[2001:db8::5]:443", '["10.0.0.0/8"]', "no IPv4 connection comes to [2001:db8::5]:443"),
        ("[::]:443", '["10.0.0.0/8"]', None),
        ("192.0.2.5:443", '["2001:db8::/32", "10.0.0.0/8"]', None),
    ],
)
def test_load_balancers_that_no_connection_can_come_from(
    tmp_path: Path, listen: str, balancers: str, wrong: str | None
) -> None:
    table = f'address = "{listen}"\naccept_proxy_from = {balancers}'
    found = told(loaded(tmp_path, table, '"127.0.0.1:80"'))
    if wrong is None:
        assert found == []
    else:
        ((key, reason),) = found
        assert key == "listen[0].accept_proxy_from"
        assert wrong in reason


def test_thousands_of_listeners_are_not_each_held_against_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = 0
    covers = IPAddress.covers

    def counted(self: IPAddress, other: Bindable) -> bool:
        nonlocal compared
        compared += 1
        return covers(self, other)

    monkeypatch.setattr(IPAddress, "covers", counted)
    count = 1000
    more = "\n[[listen]]\n".join(f'address = "127.0.0.1:{1000 + n}"' for n in range(count))
    assert not told(loaded(tmp_path, more, '"127.0.0.1:80"'))
    assert compared <= 5 * count
