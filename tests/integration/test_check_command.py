"""What only the command ``titus-py check`` tells, and what all commands do when nobody reads."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .certificates import Certificate
from .conftest import Certificates, Serve
from .instance import TITUS_PY, UIDS, Table, free_port, toml
from .peers import Listener, connect
from .service import edit, launcher, problems, reload, serves

KEYD = TITUS_PY.with_name("keyd")


def tables(site: Certificate, directory: Path, *backends: str) -> dict[str, Any]:
    uids = UIDS.take()
    vhosts: list[Table] = [
        {"certificate": site.certificate, "key": site.key, "backend": backend}
        for backend in backends
    ]
    for vhost in vhosts[:-1]:
        vhost["local_port"] = free_port()
    ports = [*(vhost["local_port"] for vhost in vhosts[:-1]), free_port()]
    return {
        "worker": {"uids": f"{uids[0]}-{uids[-2]}", "chroot": directory / "empty"},
        "keyd": {"user": str(uids[-1])},
        "listen": [{"address": f"127.0.0.1:{port}"} for port in ports],
        "vhost": vhosts,
    }


def check(file: Path) -> "subprocess.CompletedProcess[str]":
    words = [TITUS_PY, "check", "--config", file]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_backends_that_are_not_there_are_warned_of(
    certificates: Certificates, tmp_path: Path, echoing: Listener
) -> None:
    file, nowhere = tmp_path / "titus.toml", tmp_path / "app.sock"
    backends = f"unix:{nowhere}", "no.such.invalid:80", "no.such.invalid:80", "localhost:80"
    file.write_text(toml(tables(certificates(), tmp_path, *backends, echoing.address)))
    ended = check(file)
    assert ended.returncode == 0
    one, two = [line for line in ended.stderr.splitlines() if "backend" in line]
    assert f"vhost for any name: backend: no socket is at {nowhere}: does the backend run?" in one
    assert "vhost for any name: backend: no.such.invalid cannot be resolved: " in two
    assert two.endswith(")")
    assert "(also vhost for any name: backend (line " in two


COMMANDS = {
    "check": [TITUS_PY, "check", "--config", "{file}"],
    "help": [TITUS_PY, "--help"],
    "version": [TITUS_PY, "--version"],
    "status": [TITUS_PY, "status", "--json"],
    "openssl-conf": [KEYD, "openssl-conf", "--socket", "/run/x"],
    "reference": [KEYD, "reference", "{certificate}"],
}


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("command", COMMANDS)
def test_nobody_reads_what_a_command_says(
    certificates: Certificates,
    serve: Serve,
    echoing: Listener,
    tmp_path: Path,
    command: str,
    unbuffered: str,
) -> None:
    """``titus-py check | true``"""
    site = certificates()
    if command == "status":
        serve(echoing.address)
    file = tmp_path / "titus.toml"
    file.write_text(toml(tables(site, tmp_path, "127.0.0.1:80")))
    ours, theirs = os.pipe()
    os.close(ours)
    ended = subprocess.run(
        [str(word).format(file=file, certificate=site.certificate) for word in COMMANDS[command]],
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(theirs)
    assert "Traceback" not in ended.stderr
    assert "BrokenPipeError" not in ended.stderr
    # Python 3.13's argparse passes over help that cannot be written.
    passed_over = command == "help" and unbuffered and not ended.returncode
    assert ended.returncode == 141 or passed_over


def test_nobody_reads_of_mistakes(tmp_path: Path) -> None:
    """``titus-py check 2>&1 | true``, with enough of them to be written at once."""
    (tmp_path / "titus.toml").write_text("".join(f"typo{i} = 1\n" for i in range(5000)))
    ours, theirs = os.pipe()
    os.close(ours)
    command = [TITUS_PY, "check", "--config", tmp_path / "titus.toml"]
    ended = subprocess.run(command, stdout=theirs, stderr=theirs, timeout=120, check=False)
    os.close(theirs)
    assert ended.returncode == 141


def test_systemd_has_the_port_by_another_address(
    certificates: Certificates, tmp_path: Path
) -> None:
    """Socket activation with 0.0.0.0 in the unit, and 127.0.0.1 in the file."""
    port = free_port()
    program = launcher(tmp_path, ("0.0.0.0", port))
    content = tables(certificates(), tmp_path, "127.0.0.1:80")
    content["listen"] = [{"address": f"127.0.0.1:{port}"}]
    (tmp_path / "titus.toml").write_text(toml(content))
    ended = subprocess.run(
        [program, "serve", "--config", tmp_path / "titus.toml"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert (
        f"cannot listen on 127.0.0.1:{port}: Address already in use by systemd's titus-py.socket, "
        f"which listens on 0.0.0.0:{port}" in ended.stderr
    )


def test_a_socket_of_systemds_that_nobody_accepts_from_is_warned_of(
    serve: Serve, echoing: Listener, tmp_path: Path
) -> None:
    """Whoever connects to it would wait for ever."""
    port = free_port()
    instance = serve(echoing.address, program=launcher(tmp_path, ("127.0.0.1", port)))
    told = instance.wait_for_event("not_accepted", address=f"127.0.0.1:{port}")
    assert told["level"] == "warning"
    with connect(port):
        assert serves(instance)
    edit(instance, lambda tables: tables["listen"].append({"address": f"127.0.0.1:{port}"}))
    before = len(instance.events_named("not_accepted"))
    assert reload(instance)["reloaded"]
    assert len(instance.events_named("not_accepted")) == before
    assert serves(instance, port)


def test_a_reload_takes_no_address_beside_systemds_that_no_start_could_take(
    serve: Serve, echoing: Listener, tmp_path: Path
) -> None:
    port = free_port()
    instance = serve(echoing.address, program=launcher(tmp_path, ("0.0.0.0", port)))
    edit(instance, lambda tables: tables["listen"].append({"address": f"0.0.0.0:{port}"}))
    assert reload(instance)["reloaded"]
    edit(instance, lambda tables: tables["listen"][-1].update(address=f"127.0.0.1:{port}"))
    (problem,) = problems(instance)
    assert "in use by systemd's titus-py.socket" in problem
    assert serves(instance, port)
