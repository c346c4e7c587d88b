"""System calls by their names, and the memory that they take. Attempted, on this process."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from keyd.linux import prctl
from keyd.linux.calls import NUMBERS, address, call, memory
from keyd.linux.limits import RLIM_INFINITY, RLIMIT_NOFILE, get_limit, set_limit
from keyd.linux.memory import PAGE_OCTETS, map_private


def test_a_call_that_fails_says_which_and_why() -> None:
    with pytest.raises(OSError, match="setns: Bad file descriptor") as caught:
        call("setns", -1, 0)
    assert caught.value.errno == errno.EBADF


def test_its_result_is_returned() -> None:
    copy = call("dup3", 1, os.dup(1), os.O_CLOEXEC)
    assert os.fstat(copy) == os.fstat(1)
    os.close(copy)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), TypeError),
        (("prctl", 1, 2, 3, 4, 5, 6, 7), TypeError),
        (("fork",), ValueError),
        ((1,), TypeError),
        (("dup3", "1"), TypeError),
        (("dup3", 1 << 64), OverflowError),
    ],
)
def test_what_is_no_call_is_not_made(arguments: tuple[str, ...], error: type[Exception]) -> None:
    assert "fork" not in NUMBERS
    with pytest.raises(error):
        call(*arguments)  # type: ignore[arg-type]


def test_memory_is_read_and_written_where_it_is() -> None:
    octets = bytearray(b"what was there")
    memory(address(octets), 4)[:] = b"that"
    assert octets == b"that was there"
    place = map_private(PAGE_OCTETS)
    page = memory(place, PAGE_OCTETS)
    assert bytes(page) == bytes(PAGE_OCTETS)
    page[:5] = b"octet"
    assert bytes(memory(place, 5)) == b"octet"
    call("munmap", place, PAGE_OCTETS)


def test_limits_are_those_that_python_reads() -> None:
    import resource

    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE, resource.RLIMIT_AS):
        theirs = [RLIM_INFINITY if one < 0 else one for one in resource.getrlimit(limit)]
        assert list(get_limit(limit)) == theirs


def test_limits_and_flags_that_are_set_hold() -> None:
    program = """
import resource, sys
from pathlib import Path
from keyd.linux import prctl
from keyd.linux.limits import RLIMIT_CORE, set_limit

set_limit(RLIMIT_CORE, 0, 4096)
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 4096)
prctl.set_name("another")
prctl.set_no_new_privs(1)
prctl.set_dumpable(False)
status = Path("/proc/self/status").read_text()
assert "Name:\\tanother\\n" in status, status
assert "NoNewPrivs:\\t1\\n" in status, status
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_more_than_the_hard_limit_is_refused() -> None:
    _, hard = get_limit(RLIMIT_NOFILE)
    with pytest.raises(OSError, match="prlimit64"):
        set_limit(RLIMIT_NOFILE, hard + 1, hard)


def test_capabilities_are_those_of_the_kernel() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert prctl.is_known(last)
    assert not prctl.is_known(last + 1)


def test_capabilities_that_the_kernel_does_not_tell_of_are_not_taken_for_none() -> None:
    """Whoever drops all that are known would drop none, and go on."""
    program = """
from keyd.linux import prctl, seccomp
from keyd.linux.credentials import keep_capabilities

CAPBSET_READ = seccomp.Only(0, 0xFFFF_FFFF, 23)
filter = seccomp.build_forbidding({}, {"prctl": ((CAPBSET_READ,),)})
prctl.set_no_new_privs(1)
seccomp.install(seccomp.Program(filter))
try:
    keep_capabilities([])
except OSError as error:
    print(error)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "prctl: Function not implemented" in done.stdout


def test_numbers_are_those_that_python_prctl_has() -> None:
    import prctl as library

    ours = {name: number for name, number in vars(prctl).items() if re.match("CAP_|SPEC_", name)}
    assert "CAP_SETPCAP" in ours
    assert ours == {name: getattr(library, name) for name in ours}
