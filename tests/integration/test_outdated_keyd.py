"""keyd status and keyd audit: a keyd that has files of its program that an update has replaced."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from keyd.inspection.outdated import in_words, outdated

from .test_keyd_status import Listening, keyd, of

#: As the linker finds it.
CRYPTO = "libcrypto.so.3"
#: Executes from, and maps, files that are removed, and are nothing that an update replaces.
OF_REMOVED_FILES = """
import mmap, os, sys
kept = []
def mapped(file, protection):
    os.write(file, b"x" * mmap.PAGESIZE)
    kept.append(mmap.mmap(file, mmap.PAGESIZE, mmap.MAP_PRIVATE, protection))
READ, EXECUTE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_EXEC
mapped(os.memfd_create("libssl.so.3"), EXECUTE)
for name, protection in (("made-by-libffi", EXECUTE), ("cache.so", READ)):
    path = os.path.join(sys.argv[1], name)
    mapped(os.open(path, os.O_RDWR | os.O_CREAT), protection)
    os.unlink(path)
print("there", flush=True)
sys.stdin.read()
"""


def system_libcrypto() -> Path:
    """Which one Python's own modules load, whatever the wheels have."""
    program = "import _hashlib; print(open('/proc/self/maps').read())"
    maps = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    found = re.search(rf"(/\S+/{re.escape(CRYPTO)})$", maps, re.MULTILINE)
    if found is None:
        pytest.skip("this Python has OpenSSL in itself")
    return Path(found[1])


def test_an_openssl_that_was_replaced_on_disk_is_named(tmp_path: Path) -> None:
    """As by apt, while keyd goes on with the one that it has loaded."""
    tmp_path.chmod(0o755)
    library = tmp_path / CRYPTO
    shutil.copy(system_libcrypto(), library)
    listening = Listening(tmp_path, environment={"LD_LIBRARY_PATH": str(tmp_path)})
    pid = listening.process.pid
    title, metric = f"process {pid}", f'{{socket="{listening.socket}",user="daemon"}}'
    audit = "audit", "--json", f"--directory={tmp_path}"

    def audited() -> list[tuple[str, str]]:
        found = json.loads(keyd(*audit).stdout)
        return [
            (one["seen"], one["verdict"])
            for one in found
            if (one["check"], one["subject"]) == ("program", title)
        ]

    with closing(listening):
        assert of(pid)["outdated"] == []
        assert str(library) not in keyd("status").stdout
        assert f"keyd_outdated_files{metric} 0\n" in keyd("status", "--metrics").stdout
        assert [verdict for _, verdict in audited()] == ["holds"]
        # As dpkg does it.
        shutil.copy(library, tmp_path / "new")
        (tmp_path / "new").rename(library)
        words = (
            f"{library} is another file by now, by an update, and this process has the old one: "
            "start it again"
        )
        assert of(pid)["outdated"] == [str(library)]
        assert f"  program  {words}\n" in keyd("status").stdout
        assert f"keyd_outdated_files{metric} 1\n" in keyd("status", "--metrics").stdout
        assert audited() == [(words, "not available")]


def test_what_a_child_of_keyds_has_is_keyds(tmp_path: Path) -> None:
    """A token's module is loaded by a process of its own."""
    program = tmp_path / "module.so"
    shutil.copy("/bin/cat", program)
    child = f"import subprocess, sys; subprocess.run([{str(program)!r}], stdin=sys.stdin)"
    with subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"runs\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"runs\n"
        assert outdated(process.pid) == []
        program.unlink()
        assert outdated(process.pid) == [str(program)]
        process.stdin.close()


def test_files_that_were_removed_and_are_no_programs_are_not_named(tmp_path: Path) -> None:
    with subprocess.Popen(
        ["/usr/bin/python3", "-I", "-c", OF_REMOVED_FILES, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline()
        removed = [
            line
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            if line.endswith(" (deleted)")
        ]
        assert len(removed) == 3
        assert outdated(process.pid) == []
        process.stdin.close()


def test_the_unit_that_is_to_be_restarted_is_named() -> None:
    paths = ["/usr/lib/libcrypto.so.3", "/usr/lib/libssl.so.3", "/usr/bin/python3", "/a", "/b"]
    assert in_words(paths, os.getpid(), "keyd@nginx.service") == (
        "/usr/lib/libcrypto.so.3, /usr/lib/libssl.so.3, /usr/bin/python3 and 2 more are other "
        "files by now, by an update, and this process has the old ones: systemctl restart "
        "keyd@nginx.service"
    )


def test_a_unit_of_a_container_is_not_taken_for_this_machines() -> None:
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"runs\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"runs\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        words = in_words(["/lib.so"], int(children), "keyd@nginx.service")
        process.stdin.close()
    assert words.endswith(": systemctl restart keyd@nginx.service, in its container")
