"""Uids that others have: another instance, any process. Nobody is given a uid that is not free."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .conftest import Certificates, Serve
from .instance import TITUS_PY, UIDS, Instance, free_port, toml
from .peers import Listener, TlsClient
from .service import edit, problems, reload, serves, talk

Tables = dict[str, Any]


def edited(instance: Instance, directory: Path, change: Callable[[str], str] = str) -> Path:
    """A file as the instance has it, on another port."""
    directory.mkdir()
    text = (instance.directory / "titus.toml").read_text()
    file = directory / "titus.toml"
    file.write_text(change(text.replace(str(instance.port), str(free_port()))))
    return file


def run(command: str, file: Path) -> "subprocess.CompletedProcess[str]":
    words = [TITUS_PY, command, "--config", file]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_a_second_instance_with_the_same_uids_does_not_start(
    serve: Serve, echoing: Listener, tmp_path: Path
) -> None:
    """Who forgot to give it uids of its own is told whose they are.

    To ``check``, the file may also be one that is to take the other's place.
    """
    instance = serve(echoing.address)
    other = edited(instance, tmp_path / "other")
    for command, status, begins in (("check", 0, "warning: "), ("serve", 2, f"{other}")):
        ended = run(command, other)
        assert ended.returncode == status
        (line,) = ended.stderr.splitlines()
        assert line.startswith(begins)
        whose = f"the instance of {instance.directory}/titus.toml, process {instance.pid}"
        assert f"worker.uids: some of them are those of {whose}" in line
    assert serves(instance)
    # Of the one that runs, all is well.
    for _ in range(2):
        assert run("check", instance.directory / "titus.toml").returncode == 0
        assert reload(instance)["reloaded"]
    assert instance.terminate() == 0
    assert run("check", other).returncode == 0


def test_a_reload_into_the_uids_of_another_is_refused(
    serve: Serve, echoing: Listener, tmp_path: Path
) -> None:
    one, two = serve(echoing.address), serve(echoing.address)
    theirs = f"{one.uids[0]}-{one.uids[-2]}"
    edit(two, lambda tables: tables["worker"].update(uids=theirs))
    (problem,) = problems(two)
    assert f"those of the instance of {one.directory}/titus.toml" in problem
    assert serves(two)
    assert one.terminate() == 0
    # Whatever has these from now on is not left of it.
    former, one.uids = one.uids, range(0)
    with TlsClient(two.port) as client:
        assert talk(client.handshake())
        assert reload(two)["reloaded"]
        assert talk(client)
    # They are two's now, and so are those that it had before.
    for uids in (former, two.uids):
        own = {"worker": {"uids": f"{uids[0]}-{uids[-2]}"}}
        text = (two.directory / "titus.toml").read_text().replace(theirs, own["worker"]["uids"])
        (tmp_path / "titus.toml").write_text(text)
        assert f"some of them are those of the instance of {two.directory}/titus.toml" in (
            run("check", tmp_path / "titus.toml").stderr
        )


def test_a_shared_user_of_keyd_is_warned_of(
    serve: Serve, echoing: Listener, tmp_path: Path
) -> None:
    instance = serve(echoing.address)
    uids = UIDS.take()

    def with_uids(text: str) -> str:
        return text.replace(f'"{instance.uids[0]}-{instance.uids[-2]}"', f'"{uids[0]}-{uids[-1]}"')

    ended = run("check", edited(instance, tmp_path / "other", with_uids))
    assert ended.returncode == 0
    (line,) = ended.stderr.splitlines()
    assert line.startswith("warning: ")
    assert "keyd.user: another instance's keyd runs as this user" in line
    assert run("check", instance.directory / "titus.toml").stderr == ""


def test_a_uid_of_a_process_is_not_given_away(certificates: Certificates, tmp_path: Path) -> None:
    site = certificates()
    uids = UIDS.take()
    tables: Tables = {
        "worker": {"uids": f"{uids[0]}-{uids[-2]}", "chroot": tmp_path / "empty"},
        "keyd": {"user": str(uids[-1])},
        "listen": [{"address": f"127.0.0.1:{free_port()}"}],
        "vhost": [{"certificate": site.certificate, "key": site.key, "backend": "127.0.0.1:80"}],
    }
    file = tmp_path / "titus.toml"
    file.write_text(toml(tables))
    assert run("check", file).returncode == 0
    with subprocess.Popen(["sleep", "60"], user=uids[1000], cwd="/") as sleeping:
        for command in ("check", "serve"):
            ended = run(command, file)
            assert ended.returncode == 2
            name = json.dumps("sleep")
            known = f"{uids[1000]} is the uid of a running process ({sleeping.pid}, {name})"
            assert f"worker.uids: {known}" in ended.stderr
        sleeping.kill()
        # It is a zombie now, as those of an instance that was killed where nobody reaps them.
        with subprocess.Popen(["sleep", "60"], user=uids[-1], cwd="/") as another:
            ended = run("check", file)
            assert ended.returncode == 0
            assert "keyd.user: another process runs as this user" in ended.stderr
            another.kill()


def test_a_reload_into_the_uids_of_a_process_is_refused(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    uids = UIDS.take()
    edit(instance, lambda tables: tables["worker"].update(uids=f"{uids[0]}-{uids[-2]}"))
    with subprocess.Popen(["sleep", "60"], user=uids[400], cwd="/") as sleeping:
        (problem,) = problems(instance)
        told = f"worker.uids: {uids[400]} is the uid of a process that is not of this instance"
        assert problem == told
        sleeping.kill()
    assert serves(instance)
    assert reload(instance)["reloaded"]


def test_where_nothing_can_be_written_its_own_workers_hold_up_no_reload(
    serve: Serve, echoing: Listener, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    read_only = "mkdir -p /run/titus-py && mount -t tmpfs -o ro none /run/titus-py"
    inner = f'{read_only} && exec "$0" "$@"'
    program.write_text(f"#!/bin/sh\nexec unshare --mount sh -c '{inner}' {TITUS_PY} \"$@\"\n")
    program.chmod(0o755)
    instance = serve(echoing.address, program=program)
    assert instance.events_named("uids_not_held")[0]["reason"] == "Read-only file system"
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        instance.signal(signal.SIGHUP)
        instance.wait_for_event("reloaded")
        assert talk(client)
    assert serves(instance)
