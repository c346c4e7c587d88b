"""The control socket: root's own way to ask an instance how it is."""

import datetime
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from titus_py.between.event_loop import EventLoop
from titus_py.supervisor import control

from .certificates import Certificate
from .conftest import Certificates, Serve
from .instance import TITUS_PY, Instance, eventually
from .peers import Listener, TlsClient
from .service import reload, serves, status, talk, what_another_user_gets

STATUS = b'{"do": "status"}'
NONSENSE = [
    b"",
    b"\0",
    b"status",
    b"[]",
    b"null",
    b'"status"',
    b"{}",
    b'{"do": null}',
    b'{"do": ["status"]}',
    b'{"do": "stop"}',
    b'{"do": "__class__"}',
    b'{"do": "status"',
    b"\xff" * 4096,
    b"[" * 4096,
    b'{"do":' * 600,
]


def path(instance: Instance) -> Path:
    return Path(f"/run/titus-py/{instance.pid}.control")


def connected(instance: Instance) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(str(path(instance)))
    client.settimeout(60)
    return client


@pytest.fixture(scope="module")
def instance(serve_all: Serve, echoing: Listener) -> Instance:
    return serve_all(echoing.address)


def answered(instance: Instance) -> bool:
    return bool(status(instance)["pid"] == instance.pid)


# --- what it answers -------------------------------------------------------------------


def test_a_status_is_what_there_is(
    serve: Serve, certificates: Certificates, echoing: Listener
) -> None:
    first: Certificate = certificates("P-256", "www.example.org", "example.org")
    second: Certificate = certificates("RSA-2048", "other.example.org")
    instance = serve(
        echoing.address,
        vhost=[
            {"sni": ["www.example.org"], "certificate": first.certificate, "key": first.key},
            {"certificate": second.certificate, "key": second.key, "backend": "localhost:9"},
        ],
    )
    began = datetime.datetime.now(datetime.UTC)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(TlsClient(instance.port, "www.example.org")).handshake()
        told = eventually(
            lambda: s if (s := status(instance))["generations"][0]["connections"] == 2 else None,
            "two connections",
        )
    assert told["version"] == version("titus-py")
    assert told["pid"] == instance.pid
    started = datetime.datetime.fromisoformat(told["started"])
    assert datetime.timedelta() <= began - started < datetime.timedelta(minutes=1)
    assert told["listeners"] == [f"127.0.0.1:{instance.port}"]
    (generation,) = told["generations"]
    assert generation["number"] == 1
    assert generation["state"] == "serving"
    assert generation["parent"] == instance.parent().pid
    assert generation["keyd"] == instance.keyd().pid
    assert datetime.datetime.fromisoformat(generation["since"]) >= started
    assert [vhost["names"] for vhost in told["vhosts"]] == [["www.example.org"], None]
    assert [vhost["backend"] for vhost in told["vhosts"]] == [echoing.address, "localhost:9"]
    assert told["vhosts"][0]["addresses"] == [echoing.address]
    assert "127.0.0.1:9" in told["vhosts"][1]["addresses"]
    assert [vhost["certificates"] for vhost in told["vhosts"]] == [[0], [1]]
    shown = told["certificates"]
    assert [one["names"] for one in shown] == [
        ["www.example.org", "example.org"],
        ["other.example.org"],
    ]
    assert [one["file"] for one in shown] == [str(first.certificate), str(second.certificate)]
    assert {one["days_left"] for one in shown} <= {89, 90}
    assert shown[0]["subject"] == "CN=www.example.org"


def test_no_answer_holds_a_key(instance: Instance, certificates: Certificates) -> None:
    text = json.dumps(status(instance))
    assert "PRIVATE" not in text
    assert str(certificates().key) not in text


def test_the_commands_show_it_and_reload_it(instance: Instance) -> None:
    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [TITUS_PY, *words, "--pid", str(instance.pid)],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    shown = run("status", "--json")
    assert shown.returncode == 0, shown.stderr
    assert str(instance.pid) in shown.stdout
    number = status(instance)["generations"][-1]["number"]
    reloaded = run("reload")
    assert reloaded.returncode == 0, reloaded.stderr
    assert reloaded.stdout == f"titus-py: reloaded: generation {number + 1} serves\n"


def test_a_reload_is_answered_when_it_is_done(instance: Instance) -> None:
    number = status(instance)["generations"][-1]["number"]
    assert reload(instance) == {"reloaded": True, "generation": number + 1}
    assert status(instance)["generations"][-1]["state"] == "serving"


def test_all_who_asked_for_a_reload_are_answered(instance: Instance) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(connected(instance)) for _ in range(5)]
        for client in clients:
            client.send(b'{"do": "reload"}')
        # One that does not wait for it.
        clients.pop().close()
        answers = [json.loads(client.recv(4096)) for client in clients]
    assert all(answer["reloaded"] for answer in answers)
    assert serves(instance)


def test_a_status_of_a_thousand_virtual_hosts_is_a_whole_one(
    serve: Serve, certificates: Certificates, echoing: Listener
) -> None:
    names = [f"host-{number}.example.org" for number in range(1000)]
    instance = serve(echoing.address, vhost=[{"sni": [name]} for name in names])
    assert [vhost["names"] for vhost in status(instance)["vhosts"]] == [[name] for name in names]
    # Each has its backend: the parent has been told all of them.
    for name in (names[0], names[500], names[-1]):
        with TlsClient(instance.port, name) as client:
            assert talk(client.handshake())


# --- who may ask -----------------------------------------------------------------------


def test_the_socket_is_roots_and_nobody_elses(instance: Instance) -> None:
    found = os.stat(path(instance))
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_uid, found.st_gid) == (0, 0)
    directory = os.stat(path(instance).parent)
    assert directory.st_uid == 0
    assert not directory.st_mode & 0o022


def test_another_user_cannot_connect(instance: Instance) -> None:
    assert what_another_user_gets(path(instance)) == "PermissionError"


# --- what it takes ---------------------------------------------------------------------


@pytest.mark.parametrize("request_", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_is_hung_up_on(instance: Instance, request_: bytes) -> None:
    with connected(instance) as client:
        client.send(request_)
        assert client.recv(4096) == b""
    assert answered(instance)


def test_who_does_not_read_its_answer_holds_nobody_up(instance: Instance) -> None:
    before = instance.supervisor().descriptors
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connected(instance)).send(STATUS)
        assert answered(instance)
        eventually(lambda: instance.supervisor().descriptors <= before, "all are dropped")


def test_who_comes_and_says_nothing_makes_room_for_others(instance: Instance) -> None:
    before = instance.supervisor().descriptors
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(connected(instance))
        assert answered(instance)
        with TlsClient(instance.port) as client:
            assert talk(client.handshake())
        assert instance.supervisor().descriptors <= before + 20
    eventually(lambda: instance.supervisor().descriptors <= before, "nothing is left of them")


def test_who_comes_and_goes_leaves_nothing(instance: Instance) -> None:
    before = instance.supervisor().descriptors
    for number in range(200):
        with connected(instance) as client:
            if number % 2:
                client.send(STATUS)
    assert answered(instance)
    eventually(lambda: instance.supervisor().descriptors <= before, "nothing is left of them")


# --- what it leaves --------------------------------------------------------------------


def test_the_socket_goes_with_the_instance(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    assert path(instance).is_socket()
    instance.terminate()
    assert not path(instance).exists()


def test_the_socket_of_one_that_was_killed_goes_with_the_next_one(
    serve: Serve, echoing: Listener
) -> None:
    killed = serve(echoing.address)
    killed.signal(signal.SIGKILL)
    killed.wait()
    assert path(killed).is_socket()
    killed.assert_nothing_is_left()
    serve(echoing.address)
    assert not path(killed).exists()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    with mock.patch.object(control, "CONTROL_DIRECTORY", tmp_path):
        yield tmp_path


def bound(file: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(file))


def test_a_socket_left_by_one_with_the_same_process_id_is_replaced(directory: Path) -> None:
    """In a container each has the same one, every time."""
    bound(control.control_path(os.getpid()))
    loop, handlers = EventLoop(), dict[str, Callable[[control.Answer], None]]()
    control.Control(loop, handlers).close()
    assert not list(directory.iterdir())


def test_sockets_of_those_who_live_are_left_alone(directory: Path) -> None:
    # One and the same where the tests are process 1 of a container.
    others: set[Any] = {1, os.getppid()}
    for pid in [*others, 2**22 + 1, "other"]:
        bound(directory / f"{pid}.control")
    (directory / "empty").mkdir()
    elsewhere = directory / f"{2**22 + 2}.control"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as in_another_namespace:
        in_another_namespace.bind(str(elsewhere))
        in_another_namespace.listen()
        control.Control(EventLoop(), {}).close()
    left = {file.name for file in directory.iterdir()} - {elsewhere.name}
    assert left == {"1.control", f"{os.getppid()}.control", "other.control", "empty"}
    assert elsewhere.exists()


def test_the_socket_of_one_with_the_same_process_id_elsewhere_is_left_to_it(
    directory: Path,
) -> None:
    """In another container, which shares the directory: its commands would reach this one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as in_another_namespace:
        in_another_namespace.bind(str(control.control_path(os.getpid())))
        in_another_namespace.listen()
        with pytest.raises(OSError, match="another instance listens there"):
            control.Control(EventLoop(), {})
        assert control.listens(control.control_path(os.getpid()))


def test_a_directory_that_was_removed_is_made_anew(directory: Path) -> None:
    place = control.control_path(os.getpid())
    loop = EventLoop()
    ours = control.Control(loop, {})
    assert not ours.look_after()
    shutil.rmtree(directory)
    assert not control.listens(place)
    assert ours.look_after()
    assert control.listens(place)
    assert not ours.look_after()
    # What has taken its place is not removed with it.
    place.unlink()
    bound(place)
    ours.close()
    assert place.is_socket()


def test_a_socket_that_was_removed_is_made_anew(serve: Serve, echoing: Listener) -> None:
    """And goes with the instance. (The others' is to stay: tests may come in any order.)"""
    instance = serve(echoing.address)
    path(instance).unlink()
    assert instance.wait_for_event("control_socket_removed")["level"] == "warning"
    assert answered(instance)
    assert serves(instance)
    instance.terminate()
    assert not path(instance).exists()


def test_an_instance_without_a_place_for_its_socket_serves_all_the_same(
    serve: Serve, echoing: Listener, tmp_path: Path
) -> None:
    driver = tmp_path / "titus-py"
    script = tmp_path / "driver.py"
    nowhere = tmp_path / "file"
    nowhere.touch()
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from titus_py.supervisor import control\n"
        f"control.CONTROL_DIRECTORY = Path({str(nowhere)!r})\n"
        "from titus_py.__main__ import main\n"
        "sys.exit(main())\n"
    )
    driver.write_text(f'#!/bin/sh\nexec {sys.executable} -I {script} "$@"\n')
    driver.chmod(0o755)
    instance = serve(echoing.address, program=driver)
    assert instance.wait_for_event("no_control_socket")["level"] == "warning"
    assert serves(instance)
    since = len(instance.events())
    instance.signal(signal.SIGHUP)
    instance.wait_for_event("reloaded", since=since)
    time.sleep(0.1)
    assert serves(instance)
    # It has one as soon as there is a place.
    nowhere.unlink()
    eventually((nowhere / f"{instance.pid}.control").is_socket, "a control socket")
    assert len(instance.events_named("no_control_socket")) == 1
    instance.terminate()
    assert not list(nowhere.iterdir())
