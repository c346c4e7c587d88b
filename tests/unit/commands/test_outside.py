"""What the surroundings have, and what they keep from a unit."""

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from titus_py.commands import outside
from titus_py.configuration import Loaded, load

_UNIT = Path(__file__).parents[3] / "systemd/titus-py.service"


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


def test_a_capability_that_the_unit_does_not_have_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "_UNITS", (tmp_path / "usr", tmp_path / "etc"))
    monkeypatch.setattr(outside, "_HIDDEN", {})
    (tmp_path / "usr").mkdir()
    shutil.copy(_UNIT, tmp_path / "usr")
    (tmp_path / "titus-py").mkdir()
    for file in ("www.crt", "www.key"):
        (tmp_path / "titus-py" / file).touch(mode=0o600)
    configuration = tmp_path / "titus-py" / "titus.toml"
    configuration.write_text(
        '[[listen]]\naddress = ":443"\n[[vhost]]\ncertificate = "www.crt"\nkey = "www.key"\n'
        'backend = "10.0.0.5:80"\nsource_address = "client"\n'
    )
    (warning,) = outside.warnings(load(configuration))
    assert warning.key == "vhost[0].source_address"
    assert warning.reason.startswith("takes CAP_NET_RAW, which titus-py.service does not have")

    drop_in = tmp_path / "etc/titus-py.service.d/override.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nCapabilityBoundingSet=CAP_NET_RAW\n")
    assert list(outside.warnings(load(configuration))) == []


@pytest.fixture
def lending(tmp_path: Path) -> Loaded:
    """A host whose keyd lends a key, with a virtual host of another kind besides."""
    for name in ("keys-1.crt", "keys-1.key"):
        (tmp_path / name).touch(mode=0o600)
    pair = 'certificate = "keys-1.crt"\nkey = "keys-1.key"\n'
    (tmp_path / "home").mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "home/site.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    configuration = tmp_path / "titus.toml"
    configuration.write_text(
        '[[listen]]\naddress = ":8444"\n'
        f'[[vhost]]\nsni = ["a"]\nbackend = "unix:{tmp_path}/app.sock"\n{pair}'
        f'[[vhost]]\nbackend = "unix:{tmp_path}/lend.sock"\n{pair}'
        'client_certificates = "required"\nsend_proxy = "v2-tls-cert"\n'
        f'[[vhost.client]]\nname = "proxy-a"\nspki = ["sha256:{"0a" * 32}"]\n'
        f'[keyd]\nlend = "unix:{tmp_path}/lend.sock"\n'
        '[[keyd.client]]\nname = "proxy-a"\nkeys = ["home/site.key"]\n'
    )
    loaded = load(configuration)
    assert not loaded.mistakes
    return loaded


def test_a_socket_that_titus_py_makes_itself_is_not_missed(
    lending: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "_UNITS", ())
    (warning,) = outside.warnings(lending)
    assert (warning.key, warning.reason) == (
        "vhost[0].backend",
        f"no socket is at {tmp_path}/app.sock: does the backend run?",
    )


def test_a_lent_key_that_is_hidden_from_the_unit_is_named(
    lending: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "_unit_of", lambda _: "titus-py.service")
    monkeypatch.setattr(outside, "_HIDDEN", {str(tmp_path / "home"): "ProtectHome="})
    (warning,) = [one for one in outside.warnings(lending) if "is hidden from" in one.reason]
    assert warning.key == "keyd.client[0].keys"
    assert warning.reason.startswith(f"{tmp_path}/home/site.key is hidden from titus-py.service")


def test_a_directory_that_a_socket_is_to_be_made_in_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit may make it when it is started; and it makes /run/titus-py in any case."""
    monkeypatch.setattr(outside, "_UNITS", ())
    pins = f'connect = "127.0.0.1:1"\npins = ["sha256:{"0a" * 32}"]\n'
    places = f"{tmp_path}/db-1/s", f"{tmp_path}/s", "/run/titus-py/s"
    configuration = tmp_path / "titus.toml"
    configuration.write_text(
        "".join(f'[[tunnel]]\nlisten = "unix:{place}"\n{pins}' for place in places)
    )
    (warning,) = outside.warnings(load(configuration))
    assert warning.key == "tunnel[0].listen"
    assert warning.reason.startswith(f"there is no directory {tmp_path}/db-1: ")
    configuration.write_text(
        "".join(f'[[listen]]\naddress = "unix:{place}"\n' for place in places)
        + '[[vhost]]\ncertificate_dir = "."\nbackend = "127.0.0.1:80"\n'
    )
    (tmp_path / "www.pem").touch(mode=0o600)
    warnings = outside.warnings(load(configuration))
    assert [warning.key for warning in warnings] == ["listen[0].address"]


def test_a_directory_that_the_unit_cannot_write_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a load balancer with a root directory of its own."""
    units = tmp_path / "usr", tmp_path / "etc"
    monkeypatch.setattr(outside, "_UNITS", units)
    monkeypatch.setattr(outside, "_HIDDEN", {})
    for directory in (*units, tmp_path / "titus-py", tmp_path / "balancer"):
        directory.mkdir()
    shutil.copy(_UNIT, units[0])
    (tmp_path / "titus-py/www.pem").touch(mode=0o600)
    place = tmp_path / "balancer/titus.sock"
    configuration = tmp_path / "titus-py/titus.toml"
    configuration.write_text(
        f'[[listen]]\naddress = "unix:{place}"\n'
        '[[listen]]\naddress = "unix:/run/titus-py/s"\n'
        '[[vhost]]\ncertificate_dir = "."\nbackend = "127.0.0.1:80"\n'
        f'[metrics]\naddress = "unix:{place}.metrics"\n'
    )
    warning, metrics = outside.warnings(load(configuration))
    assert (warning.key, metrics.key) == ("listen[0].address", "metrics.address")
    assert warning.reason.startswith(
        f"{place.parent} cannot be written to by titus-py.service (ProtectSystem=): "
        f"'systemctl edit titus-py.service', with ReadWritePaths={place.parent} in [Service]"
    )

    for unit, line, left in (
        ("service", f"ReadWritePaths=-{place.parent}", []),
        ("service", f"BindPaths=/srv:{place.parent}:rbind", []),
        ("service", "ProtectSystem=full", []),
        ("socket", f"ListenStream={place}", ["metrics.address"]),
    ):
        drop_in = units[1] / f"titus-py.{unit}.d/override.conf"
        drop_in.parent.mkdir(exist_ok=True)
        drop_in.write_text(f"{line}\n")
        assert [one.key for one in outside.warnings(load(configuration))] == left
        drop_in.unlink()
