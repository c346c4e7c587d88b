"""What ps(1) and top(1) call the processes of an instance."""

import subprocess
import sys
from pathlib import Path

from .conftest import Serve
from .instance import Process, eventually
from .peers import Listener, TlsClient

KEYD = Path(sys.executable).with_name("keyd")


def names(process: Process) -> tuple[str, str]:
    """The short one, as in ``ps -e``, and the long one, as in ``ps -ef``."""
    seen = subprocess.run(
        ["ps", "-ww", "-o", "comm=", "-o", "args=", "-p", str(process.pid)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    short, _, long = seen.partition(" ")
    return short, long.strip()


def test_each_process_says_what_it_is(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    configuration = instance.directory / "titus.toml"
    # Which of several instances it is can be seen.
    title = f"titus-py: supervisor serve --config {configuration}"
    assert names(instance.supervisor()) == ("titus-py", title)
    assert names(instance.parent()) == ("titus-parent", "titus-py: parent")
    assert names(instance.keyd()) == ("keyd", "keyd")
    with TlsClient(instance.port) as client:
        client.handshake()
        # While it forks it is called as those that it makes.
        eventually(
            lambda: names(instance.fork_server()) == ("titus-forks", "titus-py: fork server"),
            "the fork server's name",
        )
        workers = {names(worker) for worker in instance.confined_workers(4)}
    assert workers == {("titus-worker", "titus-py: worker")}


def test_nothing_of_the_command_line_is_left_in_a_worker(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    for worker in instance.confined_workers(4):
        shown = Path(f"/proc/{worker.pid}/cmdline").read_bytes()
        assert shown.rstrip(b"\0") == b"titus-py: worker"


def test_a_title_that_does_not_fit_leaves_the_command_line_as_it_is() -> None:
    program = (
        "from keyd.linux.title import set_title\n"
        "set_title('short', 'x' * 10_000)\n"
        "print(open('/proc/self/comm').read(), end='')\n"
        "print(open('/proc/self/cmdline').read().split(chr(0))[1])\n"
        "import os, sys\n"
        "print(os.environ['HOME'], sys.argv)\n"
    )
    seen = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"HOME": "/home"},
    )
    assert seen.stdout.splitlines() == ["short", "-c", "/home ['-c']"]


def test_without_proc_there_is_no_title() -> None:
    """In a container that has none."""
    program = "from keyd.linux.title import set_title; set_title('short', 'long')"
    hidden = 'mount -t tmpfs none /proc && exec "$@"'
    subprocess.run(
        ["unshare", "--mount", "sh", "-c", hidden, "sh", sys.executable, "-c", program], check=True
    )
