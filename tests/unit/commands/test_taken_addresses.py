"""Addresses that cannot be listened on are named before titus-py is started."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.instance import free_port

from titus_py.commands import outside
from titus_py.configuration import Mistake, load


def warnings(tmp_path: Path, address: str, more: str = "") -> list[Mistake]:
    file = tmp_path / "titus.toml"
    for name in ("www.crt", "www.key"):
        (tmp_path / name).touch(mode=0o600)
    file.write_text(
        f'[[listen]]\naddress = "{address}"\n{more}'
        '[[vhost]]\ncertificate = "www.crt"\nkey = "www.key"\nbackend = "127.0.0.1:1"\n'
    )
    return outside.warnings(load(file))


@pytest.fixture
def other_server() -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A program that listens on 127.0.0.1, and its port."""
    program = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); "
        "print(s.getsockname()[1], flush=True); input()"
    )
    with subprocess.Popen(
        ["python3", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "[::]"])
def test_a_program_that_listens_there_is_named(
    tmp_path: Path, other_server: tuple["subprocess.Popen[str]", int], host: str
) -> None:
    process, port = other_server
    (warning,) = warnings(tmp_path, f"{host}:{port}")
    assert warning.key == "listen[0].address"
    assert warning.reason == (
        f"{host}:{port}: python3 listens there (process {process.pid}): "
        "as it is, titus-py cannot start"
    )


def test_another_address_of_the_same_port_is_free(
    tmp_path: Path, other_server: tuple["subprocess.Popen[str]", int]
) -> None:
    assert warnings(tmp_path, f"127.0.0.2:{other_server[1]}") == []


def test_a_parent_of_titus_py_is_not_another_program(
    tmp_path: Path, other_server: tuple["subprocess.Popen[str]", int]
) -> None:
    """It has its supervisor's sockets, and perhaps a lower pid. Others have other addresses."""
    _, port = other_server
    program = (
        "import socket, pathlib; pathlib.Path('/proc/self/comm').write_text('titus-parent');"
        f"s = socket.create_server(('127.0.0.2', {port})); print(flush=True); input()"
    )
    with subprocess.Popen(
        ["python3", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline()
        found = warnings(tmp_path, f"127.0.0.2:{port}")
        parent.kill()
    assert found == []


def test_systemd_may_listen_where_nothing_is_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units, place = tmp_path / "units", tmp_path / "titus-py"
    monkeypatch.setattr(outside, "_UNITS", (units,))
    monkeypatch.setattr(outside, "_HIDDEN", {})
    for directory in (place, units, units / "titus-py.socket.d"):
        directory.mkdir()
    (units / "titus-py.service").touch()
    assert warnings(place, "203.0.113.7:443")
    (units / "titus-py.socket.d/override.conf").write_text("[Socket]\nFreeBind=yes\n")
    assert warnings(place, "203.0.113.7:443") == []


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        # Of TEST-NET-3 (RFC 5737), and of no machine.
        ("203.0.113.7:443", "no interface of this machine has it"),
        ("[fe80::1%nosuch0]:443", "no interface is named 'nosuch0'"),
    ],
)
def test_an_address_that_is_not_here(tmp_path: Path, address: str, reason: str) -> None:
    (warning,) = warnings(tmp_path, address)
    assert warning.reason == f"{address}: {reason}: as it is, titus-py cannot start"


def test_transparent_connections_come_to_addresses_of_others(tmp_path: Path) -> None:
    found = warnings(tmp_path, "203.0.113.7:443", "transparent = true\n")
    assert [one for one in found if "cannot start" in one.reason] == []


def test_nothing_keeps_the_address(tmp_path: Path) -> None:
    """A server can bind to it, without SO_REUSEADDR, right after the check."""
    port = free_port()
    assert warnings(tmp_path, f"127.0.0.1:{port}") == []
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
