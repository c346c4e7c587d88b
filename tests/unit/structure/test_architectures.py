"""The system call filters of x86-64 and of arm64, which has no poll(2) and no epoll_wait(2)."""

import pytest

from keyd import system_calls as of_keyd
from keyd.linux.seccomp import Rules, build, has
from titus_py.audit import client
from titus_py.commands import pin_reader
from titus_py.metrics.system_calls import SERVING_METRICS
from titus_py.parent.system_calls import FAILING, parent_calls
from titus_py.resolver.system_calls import RESOLVING
from titus_py.worker.system_calls import WORKER

PARSING = {**of_keyd.PARSING, **of_keyd.ASKING_TOKENS}
ALL: dict[str, Rules] = {
    "keyd": of_keyd.SERVING,
    "keyd make": of_keyd.MAKING,
    "upstreams": of_keyd.CONNECTING,
    "parsing": PARSING,
    "parent": {**parent_calls(True, True, True), **FAILING},
    "worker": WORKER,
    "resolver": RESOLVING,
    "metrics": SERVING_METRICS,
    "audit": client._ALLOWED,
    "pins": pin_reader._ALLOWED,
}
#: What the C library calls instead, where there is no such call.
INSTEAD = {
    "access": "faccessat",
    "epoll_wait": "epoll_pwait",
    "poll": "ppoll",
    "readlink": "readlinkat",
    "select": "pselect6",
}


@pytest.mark.parametrize("architecture", ["NATIVE", "AARCH64"])
@pytest.mark.parametrize("process", ALL)
def test_each_has_a_filter(process: str, architecture: str) -> None:
    assert build(ALL[process], architecture=architecture)


@pytest.mark.parametrize("process", ALL)
def test_what_is_called_where_there_is_no_such_call(process: str) -> None:
    rules = ALL[process]
    for name in rules:
        if not has(name, "AARCH64"):
            assert INSTEAD[name] in rules


def test_a_call_that_nobody_has_is_a_mistake() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        build({"epoll_weight": ((),)})
