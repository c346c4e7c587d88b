"""What all tests start from."""

import fcntl
import gc
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import settings

# How long an example takes depends on what else runs on the machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# A shell that is not interactive has its background jobs ignore these two (POSIX, "Shell Command
# Language", 2.11), and so would all that the tests start.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="long tests as often as was once promised, and not only as often as shows a mistake",
    )


class Rounds(Protocol):
    """How often a long test does what it does: ``enough``, or, with ``--full``, ``full``."""

    def __call__(self, *, enough: int, full: int) -> int: ...


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> Rounds:
    def choose(*, enough: int, full: int) -> int:
        return full if pytestconfig.getoption("full") else enough

    return choose


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long tests first, each in a process of its own.

    Last of all, or one behind the other, they would have one process busy and the others idle.
    """
    long = [item for item in items if _takes_long(item)]
    others = [item for item in items if not _takes_long(item)]
    processes: int = getattr(config, "workerinput", {"workercount": 1})["workercount"]
    count = len(items)
    items.clear()
    for process in range(processes):
        # What pytest-xdist gives it to begin with (--dist worksteal): its share of what is left.
        end = len(items) + (count - len(items)) // (processes - process)
        items += long[process::processes]
        filling = max(0, end - len(items))
        items += others[:filling]
        del others[:filling]


def _takes_long(item: pytest.Item) -> bool:
    """It says so itself: it may take longer than others may."""
    timeout = item.get_closest_marker("timeout")
    return timeout is not None and timeout.args[0] > float(item.config.getini("timeout"))


def pytest_collection_finish() -> None:
    """The collector, for which many tests wait, need not look at thousands of tests each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def threads_ended(request: pytest.FixtureRequest) -> Iterator[None]:
    """A unit test ends its threads: others fork, and a child has locks as it finds them.

    It does not answer for those that were there before, such as a shared fixture's.
    """
    before = threading.enumerate()
    yield
    if "unit" in request.path.parts:
        for thread in threading.enumerate():
            if thread not in before:
                thread.join(60)
                assert not thread.is_alive(), f"{thread.name} is left"


@contextmanager
def alone_with(what: str) -> Iterator[None]:
    """Meanwhile no other process that runs tests has this."""
    with open(Path(tempfile.gettempdir()) / f"titus-py-tests.{what}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def default_uids() -> Iterator[None]:
    """For as long as the test has it, no other one starts an instance with the default uids.

    Processes in a container count: its kernel, and so its uids, are this machine's.
    """
    with alone_with("uids"):
        yield
