"""What programs were built with, seen in real ones."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from titus_py.audit.finding import Verdict
from titus_py.audit.hardening import (
    has_stack_protector,
    interpreter,
    is_position_independent,
    tls_library,
)
from titus_py.audit.observation import mappings_of

SOURCE = """
#include <string.h>
int copy(char *to, const char *from) { char on_stack[64]; strcpy(on_stack, from);
    strcpy(to, on_stack); return on_stack[3]; }
int main(int count, char **words) { char to[64]; return copy(to, words[0]); }
"""


def built(directory: Path, *options: str) -> Path:
    (directory / "it.c").write_text(SOURCE)
    subprocess.run(["gcc", *options, "-o", "it", "it.c"], cwd=directory, check=True)
    return directory / "it"


@pytest.mark.parametrize(("option", "independent"), [("-pie", True), ("-no-pie", False)])
def test_position_independence_is_the_linkers(
    tmp_path: Path, option: str, independent: bool
) -> None:
    program = built(tmp_path, "-fPIE", option)
    assert is_position_independent(program.read_bytes()[:64]) is independent
    assert not is_position_independent(b"#!/bin/sh\n")


@pytest.mark.parametrize(
    ("option", "protected"), [("-fstack-protector-all", True), ("-fno-stack-protector", False)]
)
@pytest.mark.parametrize("kind", ["program", "stripped library"])
def test_a_stack_protector_leaves_its_name(
    tmp_path: Path, kind: str, option: str, protected: bool
) -> None:
    # Start files of a program have none of their own.
    options = ("-shared", "-fPIC", "-s") if kind == "stripped library" else ()
    assert has_stack_protector(built(tmp_path, option, *options)) is protected


def test_a_library_that_an_update_has_replaced_is_noticed(tmp_path: Path) -> None:
    library = tmp_path / "libssl.so.3"
    built(tmp_path, "-shared", "-fPIC", "-fstack-protector-all").rename(library)
    program = f"import ctypes; ctypes.CDLL({str(library)!r}); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        maps = Path(f"/proc/{process.pid}/maps")
        seen = tls_library(process.pid, tuple(mappings_of(maps.read_bytes())))
        assert seen == (Verdict.HOLDS, f"{library} checks canaries")
        # As dpkg does it.
        built(tmp_path, "-shared", "-fPIC", "-fstack-protector-all").rename(library)
        seen = tls_library(process.pid, tuple(mappings_of(maps.read_bytes())))
        assert seen.verdict is Verdict.NOT_AVAILABLE
        assert seen.text.startswith(f"{library} is another file by now")
        process.stdin.close()


def test_an_audit_goes_on_where_root_may_not_open_what_is_mapped() -> None:
    """As in a rootless container, whose root has no capability of the machine's."""
    code = (
        "import os, ssl; from titus_py.audit.hardening import tls_library;"
        "from titus_py.audit.observation import mappings_of;"
        "maps = open('/proc/self/maps', 'rb').read();"
        "print(*tls_library(os.getpid(), tuple(mappings_of(maps))))"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{Verdict.NOT_AVAILABLE} in a user namespace, nobody may open")


def test_an_interpreter_that_an_update_has_replaced_is_noticed(tmp_path: Path) -> None:
    program = tmp_path / "python3"
    shutil.copy("/bin/cat", program)
    with subprocess.Popen([program], stdin=subprocess.PIPE) as process:
        assert f"{program}" in interpreter(process.pid).text
        assert "another file" not in interpreter(process.pid).text
        shutil.copy("/bin/cat", tmp_path / "new")
        (tmp_path / "new").rename(program)
        seen = interpreter(process.pid)
        assert seen.verdict is Verdict.NOT_AVAILABLE
        assert seen.text.startswith(f"{program} is another file by now")
        assert process.stdin is not None
        process.stdin.close()


def test_an_interpreter_of_the_release_before_is_noticed(tmp_path: Path) -> None:
    """As after an upgrade of Debian, which keeps it for whoever needs it, without its updates."""
    earlier, before, after, usual = (
        tmp_path / name for name in ("python3.9", "python3.11", "python3.13", "python3")
    )
    for program in (earlier, before, after):
        shutil.copy("/bin/cat", program)
    usual.symlink_to(before.name)
    with subprocess.Popen([before], stdin=subprocess.PIPE) as process:
        assert "earlier release" not in interpreter(process.pid).text
        # One of the administrator's own choice may be newer than what Debian has.
        usual.unlink()
        usual.symlink_to(earlier.name)
        assert "earlier release" not in interpreter(process.pid).text
        usual.unlink()
        usual.symlink_to(after.name)
        seen = interpreter(process.pid)
        assert seen.verdict is Verdict.NOT_AVAILABLE
        assert seen.text.startswith(f"{before} is an earlier release's")
        assert "that of this one is python3.13" in seen.text
        assert process.stdin is not None
        process.stdin.close()
