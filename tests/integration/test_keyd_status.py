"""keyd status and keyd audit: what a keyd of its own says, and where its keys are."""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from keyd.inspection import audit, auditors, reports
from keyd.inspection.findings import Finding
from keyd.inspection.key_search import Needle, needles, search
from keyd.inspection.open_files import Opened
from keyd.inspection.reports import running
from keyd.keys import load_private_key
from keyd.powers import PrivateKey
from keyd.protocol import Operation, Reply, Request, SignatureScheme, Status
from keyd.status_page import VERSION

from .instance import PATIENCE, TITUS_PY, eventually

KEYD = TITUS_PY.with_name("keyd")
CONTENT = b" " * 64 + b"TLS 1.3, server CertificateVerify\0" + bytes(32)
#: Names itself keyd, and has a page as keyd's, with what it is told, and a secret; then stays.
FORGER = """
import os, struct, sys, zlib
open("/proc/self/comm", "w").write("keyd")
text, secret = (bytes.fromhex(word) for word in sys.argv[1:])
page = os.memfd_create("keyd-status")
os.write(page, struct.pack("!II", zlib.crc32(text), len(text)) + text)
print("there", flush=True)
sys.stdin.read()
"""
#: Names itself keyd, and has open a pipe that is called what keyd's page is, as the root of its
#: mount has been taken away. It is open for writing as well, as keyd's page is; if it were not,
#: whoever opened it would wait. A user namespace lets anybody.
FORGER_OF_A_PIPE = """
import ctypes, os, sys
def check(result): assert result == 0, ctypes.get_errno()
libc = ctypes.CDLL(None, use_errno=True)
check(libc.unshare(0x20000))  # CLONE_NEWNS
check(libc.mount(None, b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
check(libc.mount(b"tmpfs", b"/mnt", b"tmpfs", 0, None))
os.mkfifo("/mnt/memfd:keyd-status (deleted)")
os.open("/mnt/memfd:keyd-status (deleted)", os.O_RDWR)
check(libc.umount2(b"/mnt", 2))  # MNT_DETACH
open("/proc/self/comm", "w").write("keyd")
print("there", flush=True)
sys.stdin.read()
"""
#: Names itself keyd, and has read the page of the keyd that it is told.
READER = """
import glob, os, sys
open("/proc/self/comm", "w").write("keyd")
for path in glob.glob(f"/proc/{sys.argv[1]}/fd/*"):
    if "keyd-status" in os.readlink(path):
        page = open(path, "rb")
assert page.read(8)
print("there", flush=True)
sys.stdin.read()
"""
#: Asks for nothing that there is.
ASKS = """
import socket, sys
client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
client.connect(sys.argv[1])
client.send(b"?")
client.recv(1)
"""
#: As a keyd without a key has it.
REPORT = {
    "version": VERSION,
    "command": "listen",
    "started": 1.0,
    "sockets": [],
    "keys": [],
    "keys_in_all": 1,
    "signed": 0,
    "decrypted": 0,
    "refused": {},
    "last_refused": [],
    "seconds": [],
    "seconds_sum": 0.0,
    "tokens": [],
}


def make_key(path: Path) -> None:
    """Without this process having it: its memory is looked at, too."""
    command = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
    subprocess.run([*command, "-out", path], check=True, umask=0o077)


class Listening:
    """``keyd listen`` with one key, for the group www-data. Its log is a file, or ``log``."""

    def __init__(
        self, directory: Path, log: int | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.socket = directory / "www.sock"
        self.key = directory / "www.key"
        make_key(self.key)
        command = ["openssl", "pkey", "-in", self.key, "-pubout", "-outform", "DER"]
        public = subprocess.run(command, check=True, capture_output=True).stdout
        #: RFC 5280's SubjectPublicKeyInfo, hashed.
        self.identity = hashlib.sha256(public).digest()
        self._log = (directory / "log").open("wb")
        self.process = subprocess.Popen(
            [
                *(KEYD, "listen", f"--socket={self.socket}", f"--key={self.key}"),
                *("--user=daemon", "--group=www-data", f"--chroot={directory / 'root'}"),
            ],
            stderr=self._log if log is None else log,
            env=environment,
        )
        # It tells of itself a moment after there is a socket, and then puts its filter on.
        status = Path(f"/proc/{self.process.pid}/status")
        eventually(lambda: "Seccomp:\t2" in status.read_text(), "keyd serves")

    def ask(self, octets: bytes = CONTENT) -> Status:
        request = Request(
            Operation.SIGN, SignatureScheme.ecdsa_secp256r1_sha256, self.identity, octets
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.settimeout(PATIENCE)
            client.connect(str(self.socket))
            client.send(request.encode())
            return Reply.decode(client.recv(2000)).status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    keyd = Listening(tmp_path_factory.mktemp("keyd"))
    yield keyd
    keyd.close()


def keyd(*words: object) -> "subprocess.CompletedProcess[str]":
    """An audit looks through all memory that the machine has in use, other tests' as well."""
    command = [str(KEYD), *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=4 * PATIENCE, check=False
    )


def of(pid: int) -> dict[str, Any]:
    """What ``keyd status`` says of this one."""
    found: list[dict[str, Any]] = json.loads(keyd("status", "--json").stdout)
    (one,) = [each for each in found if each["pid"] == pid]
    return one


def told(listening: Listening, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Once it has said so: it writes its page about once a second."""
    seen: list[dict[str, Any]] = []

    def says() -> bool:
        seen.append(of(listening.process.pid))
        return is_so(seen[-1])

    eventually(says, "it is told")
    return seen[-1]


def test_a_keyd_says_what_it_has_did_and_refused(listening: Listening) -> None:
    before = of(listening.process.pid)
    assert listening.ask() is Status.DONE
    assert listening.ask(CONTENT[:-1]) is Status.NOT_TLS
    signed, refused = before["signed"] + 1, before["refused"].get("not_tls", 0) + 1
    seen = told(listening, lambda one: one["refused"].get("not_tls") == refused)
    assert seen["signed"] == signed
    assert (seen["command"], seen["user"]) == ("listen", "daemon")
    (key,) = seen["keys"]
    assert key["name"] == str(listening.key)
    assert key["kind"] == "secp256r1"
    assert key["fingerprint"] == listening.identity.hex()
    assert seen["sockets"] == [
        {"path": str(listening.socket), "mode": "rw-rw----", "user": "daemon", "group": "www-data"}
    ]
    last = seen["last_refused"][-1]
    assert (last["status"], last["process"]) == ("not_tls", os.getpid())
    text = keyd("status").stdout
    for words in (str(listening.key), "daemon:www-data", "a transcript hash of 31 octets"):
        assert words in text


def test_whoever_asks_cannot_fill_its_log(tmp_path: Path) -> None:
    """A few lines a second of what a process is refused, and how much it was; all of another's."""
    asked = 500
    tmp_path.chmod(0o755)
    keyd = Listening(tmp_path)
    try:
        for each in range(asked):
            assert keyd.ask(CONTENT[:-1]) is Status.NOT_TLS
            if each == asked // 2:
                with subprocess.Popen([sys.executable, "-c", ASKS, keyd.socket]) as other:
                    assert other.wait(PATIENCE) == 0
        last = "sign of 3 octets that no TLS server signs"
        assert keyd.ask(b"end") is Status.NOT_TLS
        seen = told(keyd, lambda one: one["refused"].get("not_tls") == asked + 1)
        assert (seen["refused"]["malformed"], seen["last_refused"][-1]["detail"]) == (1, last)
        keyd.process.terminate()
        assert keyd.process.wait(PATIENCE) == 0
    finally:
        keyd.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert sum(f"(process {other.pid})" in line for line in lines) == 1
    own = [line for line in lines if line.endswith(f"(process {os.getpid()})")]
    whole = [line for line in own if line.startswith("keyd: refused, NOT_TLS: ")]
    besides = [re.search("besides: ([0-9]+) NOT_TLS", line) for line in own if line not in whole]
    assert len(whole) + sum(int(one[1]) for one in besides if one) == asked + 1
    assert len(own) < asked // 2


def test_its_metrics_are_prometheus_own(listening: Listening) -> None:
    assert listening.ask() is Status.DONE
    told(listening, lambda one: one["signed"] > 0)
    text = keyd("status", "--metrics").stdout
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr + text
    label = f'socket="{listening.socket}",user="daemon"'
    assert f"keyd_keys{{{label}}} 1\n" in text
    assert f'keyd_operations_total{{{label},operation="sign"}} ' in text


@pytest.mark.parametrize(
    "page",
    [
        b"",
        json.dumps(REPORT | {"sockets": ["/run/one"], "signed": 10**400}).encode(),
    ],
    ids=["without a report", "with a number that is none of Prometheus'"],
)
def test_no_user_can_keep_metrics_from_being_written(listening: Listening, page: bytes) -> None:
    """A cron job moves them into place if keyd exits with 0."""
    told(listening, lambda one: bool(one["keys"]))
    with forged(page):
        seen = keyd("status", "--metrics")
    assert seen.returncode == 0
    assert f'keyd_keys{{socket="{listening.socket}",user="daemon"}} 1\n' in seen.stdout
    # Other tests have such pages as well.
    assert re.search("^keyd_without_report [1-9]", seen.stdout, re.MULTILINE)
    assert "/run/one" not in seen.stdout


def test_no_two_samples_are_of_one_series(listening: Listening) -> None:
    """The node exporter would refuse them."""
    page = json.dumps(REPORT | {"sockets": [str(listening.socket)]}).encode()
    told(listening, lambda one: bool(one["keys"]))
    with forged(page), forged(page):
        lines = keyd("status", "--metrics").stdout.splitlines()
    series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series))
    for user in ("daemon", "nobody"):
        assert f'keyd_keys{{socket="{listening.socket}",user="{user}"}}' in series


@pytest.mark.parametrize("command", ["status", "audit"])
def test_where_none_runs_the_next_step_is_said(command: str) -> None:
    """In a process namespace of its own there is none. It may be that its unit cannot start."""
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", KEYD, command],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("keyd: no keyd of its own runs: ")
    assert "'systemctl start keyd@NAME'" in done.stderr
    assert ("--key" in done.stderr) == (command == "audit")


#: A user, who may read the program wherever it is installed.
A_USER = [
    *("setpriv", "--reuid=65534", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]


@pytest.mark.parametrize("command", ["status", "audit"])
@pytest.mark.parametrize("less", [A_USER, ["capsh", "--drop=cap_sys_ptrace"]])
def test_what_it_needs_is_said(command: str, less: list[str], listening: Listening) -> None:
    """By a user, and in a container, which has root mostly without this capability."""
    told(listening, lambda one: bool(one["keys"]))
    run = ["--", "-c", f"{KEYD} {command}"] if less[0] == "capsh" else [KEYD, command]
    done = subprocess.run(
        [*less, *run], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    needs, _, what_to_do = done.stderr.partition(": use sudo; ")
    assert needs == "keyd: needs root with CAP_SYS_PTRACE, to look into other processes"
    assert "'docker exec --privileged'" in what_to_do


#: Root, but of a user namespace: it has the capability there, and the kernel refuses all the same.
ELSEWHERE = ["unshare", "--user", "--map-root-user"]


def test_of_whom_nothing_can_be_seen_is_said(listening: Listening) -> None:
    told(listening, lambda one: bool(one["keys"]))
    words = (KEYD, "status", "--json")
    done = subprocess.run(
        [*ELSEWHERE, *words], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 1, done.stderr
    (one,) = [one for one in json.loads(done.stdout) if one["pid"] == listening.process.pid]
    assert one["problem"].startswith("cannot be looked into: ")


def test_what_was_not_searched_is_not_counted_as_without_the_key(tmp_path: Path) -> None:
    """One line for all of them, and none that says of a key that it is in nobody's memory."""
    key = tmp_path / "www.key"
    make_key(key)
    words = (KEYD, "audit", "--json", f"--key={key}", f"--directory={tmp_path}")
    with ExitStack() as stack:
        others = [
            stack.enter_context(subprocess.Popen(["cat"], stdin=subprocess.PIPE)) for _ in range(5)
        ]
        done = subprocess.run(
            [*ELSEWHERE, *words], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        for other in others:
            other.communicate()
    found = [one for one in json.loads(done.stdout) if one["check"] == "memory"]
    assert done.returncode == 1
    (of_key,) = [one for one in found if one["subject"] == str(key)]
    counts = re.match(
        r"in none of \d+ others of this container; (\d+) could not be searched", of_key["seen"]
    )
    assert counts is not None, of_key
    assert int(counts[1]) >= len(others)
    assert of_key["verdict"] == "not available"
    refused = [one["subject"] for one in found if one["seen"].startswith("cannot be looked into")]
    # Those that come meanwhile have another.
    assert 1 <= len(refused) <= 3
    assert re.fullmatch(r"(process \d+ \(.+\),? ){3}and \d+ more", refused[0])


def test_only_root_can_look(listening: Listening) -> None:
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            os.listdir(f"/proc/{listening.process.pid}/fd")
        with pytest.raises(PermissionError, match="needs root with CAP_SYS_PTRACE"):
            running()
    finally:
        os.seteuid(0)


@contextmanager
def forged(text: bytes, secret: bytes = b"", user: str = "nobody") -> Iterator[int]:
    """A process of nobody's that has this page; its pid."""
    with subprocess.Popen(
        ["/usr/bin/python3", "-I", "-c", FORGER, text.hex(), secret.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        user=user,
        group="nogroup",
        extra_groups=[],
        cwd="/",
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline()
        yield process.pid
        process.stdin.close()


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"\xff" * 100, b"[" * 60_000),
        *(b'{"version": 1}', b'{"version": 2}', b'{"version": [1]}'),
        *(json.dumps(REPORT | {"sockets": [name]}).encode() for name in ("/\0", "/\ud800")),
    ],
    ids=[
        *("empty", "octets", "nested", "without fields", "later", "of another kind"),
        *("with a null", "with half a character"),
    ],
)
def test_what_is_no_report_is_said_to_be_none(listening: Listening, text: bytes) -> None:
    with forged(text) as pid:
        seen = keyd("status", "--json")
        assert seen.returncode == 1, "one of them has no report"
        (one,) = [each for each in json.loads(seen.stdout) if each["pid"] == pid]
    assert one["user"] == "nobody"
    assert one["problem"]


def test_what_only_has_the_name_of_a_page_is_not_opened(listening: Listening) -> None:
    """That could take as long as another user likes."""
    with subprocess.Popen(
        ["/usr/bin/python3", "-I", "-c", FORGER_OF_A_PIPE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline()
            found = json.loads(keyd("status", "--json").stdout)
        finally:
            process.stdin.close()
    pids = [one["pid"] for one in found]
    assert listening.process.pid in pids
    assert process.pid not in pids


#: Has a page as keyd's, and another file in its place when it is told.
FORGER_THAT_CHANGES = """
import os, sys
open("/proc/self/comm", "w").write("keyd")
page = os.memfd_create("keyd-status")
print("there", flush=True)
sys.stdin.readline()
reader, writer = os.pipe()
os.dup2(reader, page)
print("changed", flush=True)
sys.stdin.read()
"""


def test_what_takes_the_place_of_a_page_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """That could take as long as another user likes, too."""
    opened = reports.opened
    command = ["/usr/bin/python3", "-I", "-c", FORGER_THAT_CHANGES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def opened_before(pid: int | str, descriptor: int | str) -> Opened:
            seen = opened(pid, descriptor)
            if pid == process.pid and process.stdin and process.stdout:
                process.stdin.write(b"\n")
                process.stdin.flush()
                assert process.stdout.readline()
            return seen

        try:
            assert process.stdout.readline()
            monkeypatch.setattr(reports, "opened", opened_before)
            found = running()
        finally:
            process.stdin.close()
    assert process.pid not in [one.pid for one in found]


#: Is called keyd, and has a file open with a path that is longer than any that the kernel tells.
DEEP = """
import os, sys
open("/proc/self/comm", "w").write("keyd")
for _ in range(20):
    os.mkdir(250 * "d")
    os.chdir(250 * "d")
file = open("file", "w")
print(flush=True)
sys.stdin.read()
"""


def test_a_process_may_have_a_file_open_that_has_no_name(tmp_path: Path) -> None:
    """It ended status, audit and metrics, whoever it was of."""
    command = ["/usr/bin/python3", "-I", "-c", DEEP]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        try:
            assert process.pid not in {one.pid for one in running()}
            assert not auditors.is_one(process.pid)
            assert search(process.pid, [Needle("it", os.urandom(32))]).octets
        finally:
            process.communicate()


def test_pages_that_are_never_whole_are_waited_for_together(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, any number of them would take as long as another user likes."""
    pauses: list[float] = []
    monkeypatch.setattr(reports.time, "sleep", pauses.append)
    with ExitStack() as stack:
        torn = {stack.enter_context(forged(b"")) for _ in range(5)}
        found = {one.pid: one.problem for one in running()}
    assert {found[pid] for pid in torn} == {"its page has no whole report"}
    assert listening.process.pid in found
    assert len(pauses) <= 20


def test_who_reads_a_page_is_no_keyd(listening: Listening) -> None:
    """Another audit is a program called keyd, and has the page open for a moment."""
    told(listening, lambda one: bool(one["keys"]))
    with subprocess.Popen(
        ["/usr/bin/python3", "-I", "-c", READER, str(listening.process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline()
            found = running()
        finally:
            process.stdin.close()
    pids = [one.pid for one in found]
    assert listening.process.pid in pids
    assert process.pid not in pids


def test_processes_may_have_any_name(listening: Listening) -> None:
    """It is octets, and need not be characters."""
    program = r"open('/proc/self/comm', 'wb').write(b'\xff'); print(flush=True); input()"
    with subprocess.Popen(
        ["/usr/bin/python3", "-I", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline()
            assert Path(f"/proc/{process.pid}/comm").read_bytes() == b"\xff\n"
            found = running()
        finally:
            process.communicate(b"\n")
    assert listening.process.pid in [one.pid for one in found]


def test_a_report_cannot_steer_a_terminal(listening: Listening) -> None:
    told(listening, lambda one: bool(one["keys"]))
    report = REPORT | {
        "sockets": ["\x1b[2J"],
        "keys": [["\x1b]0;title\x07", "\n", "\u202e"]],
        "refused": {"not_tls": 1},
        "last_refused": [[1.0, "not_tls", "\x1b[31m", 1]],
    }
    with forged(json.dumps(report).encode()) as pid:
        seen = keyd("status").stdout
        assert f"process {pid} of nobody" in seen
        assert r"\x1b[31m" in seen
        assert not {c for c in seen if not c.isprintable()} - {"\n"}
        # And none of it is a line of its own.
        metrics = keyd("status", "--metrics").stdout
    assert "\x1b" not in metrics


# --- audit -----------------------------------------------------------------------------


def audited(directory: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(
        keyd("audit", "--json", f"--directory={directory}").stdout
    )
    return found


def verdicts(listening: Listening, directory: Path) -> dict[str, list[tuple[str, str]]]:
    """Of this keyd, by check: what was seen, and the verdict. Other tests' keyds run as well."""
    return of_keyd(listening, audited(directory))


def of_keyd(
    listening: Listening, findings: list[dict[str, str]]
) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for one in findings:
        if one["subject"] in (str(listening.key), f"process {listening.process.pid}"):
            found.setdefault(one["check"], []).append((one["seen"], one["verdict"]))
    return found


#: How many processes were searched, and how many could not be.
IN_NONE = re.compile(
    r"in none of (\d+) others(?: of this container)?"
    r"(?:; (\d+) could not be searched, or not all of them)?"
    r"(?:; \d+ that came since were not searched)?"
)


def test_a_key_is_where_it_is_to_be(listening: Listening) -> None:
    found = verdicts(listening, listening.key.parent)
    pid = listening.process.pid
    assert (f"in process {pid} (keyd), which is to have it", "holds") in found["memory"]
    # Another test may have memory that nobody can read; and this machine, a process.
    ((counts, verdict),) = [
        (counts, verdict)
        for seen, verdict in found["memory"]
        if (counts := IN_NONE.fullmatch(seen))
    ]
    assert int(counts[1]) > int(counts[2] or 0), found["memory"]
    assert verdict == ("not available" if counts[2] else "holds")
    assert any(
        f"group www-data, at {listening.socket}" in seen and verdict == "holds"
        for seen, verdict in found["asks"]
    )
    ((seen, verdict),) = found["file"]
    assert str(listening.key) in seen
    assert verdict == "holds"


def said_of(pid: int, findings: list[dict[str, str]]) -> list[str]:
    """What could not be searched, and in whom a key was found that is not to be there."""
    return [
        one["seen"]
        for one in findings
        if one["verdict"] != "holds" and f"process {pid} (" in one["subject"] + one["seen"]
    ]


def test_the_search_of_an_instances_audit_is_not_taken_for_a_leak(listening: Listening) -> None:
    """It has the key, too."""
    command = [sys.executable, "-I", "-m", "titus_py.audit.key_holder"]
    with (
        subprocess.Popen(["cat"], stdin=subprocess.PIPE) as searched,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder,
    ):
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            # Its answer is longer than fits into a pipe: it waits there, and has the key.
            question = {"files": [[str(listening.key), None]], "pids": [searched.pid] * 2000}
            holder.stdin.write(json.dumps(question).encode())
            holder.stdin.close()
            assert holder.stdout.read(1)
            findings = audited(listening.key.parent)
        finally:
            holder.kill()
            searched.kill()
    # Not because it could not be searched.
    assert not said_of(holder.pid, findings)
    found = of_keyd(listening, findings)["memory"]
    assert not [seen for seen, verdict in found if verdict == "broken"], found
    assert any("which is to have it" in seen for seen, _ in found), found


def test_two_audits_do_not_find_each_others_keys(listening: Listening) -> None:
    """Each reads all of them."""
    command = [KEYD, "audit", "--json", f"--directory={listening.key.parent}"]
    with ExitStack() as stack:
        audits = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE)) for _ in range(2)
        ]
        for audit, other in zip(audits, reversed(audits), strict=True):
            assert audit.stdout is not None
            found = [one for one in json.load(audit.stdout) if one["check"] == "memory"]
            # Not because it could not be searched.
            assert not said_of(other.pid, found)
            own = [one for one in found if one["subject"] == str(listening.key)]
            assert any("which is to have it" in one["seen"] for one in own), found
            assert "broken" not in {one["verdict"] for one in own}, found


def test_a_file_larger_than_any_key_is_not_read(tmp_path: Path) -> None:
    """A keyd that was taken over may say that it is one: it may be larger than the memory."""
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 42)
    keys = [[str(large), "RSA-2048", "00"], ["/dev/null", "RSA-2048", "00"]]
    report = REPORT | {"keys": keys, "keys_in_all": 9}
    with forged(json.dumps(report).encode(), user="root"):
        seen = keyd("audit", "--json", f"--directory={tmp_path}")
    assert not seen.stderr
    # Nor is what is no file opened: a device may do something then.
    assert "/dev/null: is no regular file" in seen.stdout
    # And what it does not tell of is not looked for.
    assert "7 of 9 keys it does not tell of" in seen.stdout
    findings = [one for one in json.loads(seen.stdout) if one["subject"] == str(large)]
    assert [one["verdict"] for one in findings] == ["not available"]


def test_where_a_key_is_not_to_be_is_named(listening: Listening, tmp_path: Path) -> None:
    """A server whose administrator forgot to restart it; files; and a socket of everybody's."""
    script = (
        'umask 077; (echo certificate; cat "$0") > backup.pem; chmod 640 backup.pem;'
        ' openssl pkey -in "$0" -outform DER -out site.der'
    )
    subprocess.run(["sh", "-c", script, listening.key], cwd=tmp_path, check=True)
    (tmp_path / "link").symlink_to(listening.key)
    os.mkfifo(tmp_path / "pipe")
    listening.socket.chmod(0o666)
    server = "import sys; key = open(sys.argv[1]).read(); print('read', flush=True); input()"
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", server, listening.key],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        found = verdicts(listening, tmp_path)
        other.kill()
    listening.socket.chmod(0o660)
    assert (f"in process {other.pid} (python3)", "broken") in found["memory"]
    assert (f"everybody, at {listening.socket} (rw-rw-rw-)", "broken") in found["asks"]
    assert {seen.split()[1]: verdict for seen, verdict in found["file"]} == {
        str(tmp_path / "backup.pem"): "broken",
        str(tmp_path / "site.der"): "holds",
    }


def test_memory_that_cannot_be_read_is_not_memory_without_the_key(listening: Listening) -> None:
    """For one, memory that is closed to all other processes, root's too (memfd_secret(2))."""
    program = (
        "import ctypes, mmap, os; file = ctypes.CDLL(None).syscall(447, 0);"
        "os.truncate(file, 2 * mmap.PAGESIZE); there = mmap.mmap(file, 2 * mmap.PAGESIZE);"
        "there[:4] = b'here'; print('closed', flush=True); input()"
    )
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        if not other.stdout.readline():
            pytest.skip("the kernel has none")
        seen = keyd("audit", "--json", f"--directory={listening.key.parent}")
        other.kill()
    assert seen.returncode == 1
    ((text, verdict),) = [
        (one["seen"], one["verdict"])
        for one in json.loads(seen.stdout)
        if one["subject"] == f"process {other.pid} (python3)"
    ]
    assert verdict == "not available"
    assert text == "not all could be read: /secretmem (deleted) (Input/output error)"


def test_what_a_user_says_to_be_a_keyd_changes_nothing(tmp_path: Path) -> None:
    """That it is to have a key that it has stolen; that the key's file is another key's."""
    # A keyd of this test's own: this process has its key from here on.
    listening = Listening(tmp_path)
    pem = listening.key.read_bytes()
    der = base64.b64decode(b"".join(pem.splitlines()[1:-1]))
    identity = listening.identity.hex()
    keys = [["/stolen", "P-256", identity], [str(listening.key), "P-256", "00" * 32]]
    report = REPORT | {"keys": keys, "sockets": ["/dev/shm"]}
    with (
        closing(listening),
        forged(json.dumps(report).encode(), der) as thief,
        forged(json.dumps(report).encode()) as liar,
    ):
        seen = keyd("audit", "--json", f"--directory={listening.key.parent}")
    found = [(one["subject"], one["seen"], one["verdict"]) for one in json.loads(seen.stdout)]
    key = str(listening.key)
    assert (key, f"in process {thief} (keyd)", "broken") in found
    assert (
        key,
        f"in process {listening.process.pid} (keyd), which is to have it",
        "holds",
    ) in found
    assert not [one for one in found if one[0] == "/stolen" or f"process {liar} (keyd)" in one[1]]
    of_forgers = [one for one in found if one[0] in (f"process {thief}", f"process {liar}")]
    assert {verdict for *_, verdict in of_forgers} == {"holds"}
    assert all(text.startswith("passed over: nobody runs it") for _, text, _ in of_forgers)


def loaded(directory: Path) -> tuple[PrivateKey, str, list[Needle]]:
    """A key of this process's, its file, and what to look for.

    None of a keyd that other tests look at: they would find it here, and tests come in any order.
    """
    path = directory / "own.key"
    make_key(path)
    key = load_private_key(str(path), None)
    return key, str(path), [Needle(f"{path}: {one.name}", one.octets) for one in needles(key)]


def test_a_keyd_that_begins_meanwhile_may_have_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is started again: when the search began, there was none."""
    listening = Listening(tmp_path)
    key, path = load_private_key(str(listening.key), None), str(listening.key)
    sought = [Needle(f"{path}: {one.name}", one.octets) for one in needles(key)]
    look_at = audit._look_at
    monkeypatch.setattr(
        audit, "_look_at", lambda pids, *rest: look_at(pids & {listening.process.pid}, *rest)
    )
    try:
        (found,) = audit._memory([], {path: key}, sought)
        assert found.verdict == "holds"
        monkeypatch.setattr(audit, "running", list)
        (found,) = audit._memory([], {path: key}, sought)
        assert found.verdict == "broken"
    finally:
        listening.close()


def test_processes_that_come_too_late_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may always be one more: each time that all others were searched, another one comes."""
    key, path, sought = loaded(tmp_path)
    searched: list[int] = []

    with ExitStack() as stack:

        def another_comes(pids: set[int], *_: object) -> Iterator[Finding]:
            searched.extend(pids)
            stack.enter_context(subprocess.Popen(["cat"], stdin=subprocess.PIPE))
            yield from ()

        monkeypatch.setattr(audit, "_look_at", another_comes)
        (found,) = audit._memory([], {path: key}, sought)
        # Whatever else begins on this machine meanwhile.
        said = re.fullmatch(
            r"in none of (\d+) others(?: of this container)?; (\d+) that came since were not "
            r"searched",
            found.seen,
        )
        assert said is not None, found.seen
        assert int(said[1]) == len(searched)
        assert int(said[2]) >= 1
    assert found.verdict == "holds"


def cat_with(pid: int) -> "subprocess.Popen[bytes]":
    """One that has the pid of one that has ended, whatever else begins on this machine."""
    for _ in range(100):
        try:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        except OSError:
            pytest.skip("the kernel lets nobody choose a pid")
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        if process.pid == pid:
            return process
        process.communicate()
    pytest.skip("another process has the pid")


def test_a_process_that_has_the_pid_of_another_one_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are few pids, or many processes, they come round within an audit."""
    key, path, sought = loaded(tmp_path)
    rounds: list[bool] = []
    processes = [subprocess.Popen(["cat"], stdin=subprocess.PIPE)]
    pid = processes[0].pid

    def begins_anew(pids: set[int], *_: object) -> Iterator[Finding]:
        rounds.append(pid in pids)
        if len(rounds) == 1:
            processes[0].communicate()
            processes.append(cat_with(pid))
        yield from ()

    monkeypatch.setattr(audit, "_look_at", begins_anew)
    list(audit._memory([], {path: key}, sought))
    processes[-1].communicate()
    assert rounds == [True, True, False]


def test_a_key_that_is_named_and_told_of_is_none_that_is_not_told_of(tmp_path: Path) -> None:
    key = tmp_path / "www.key"
    make_key(key)
    command = ["openssl", "pkey", "-in", key, "-pubout", "-outform", "DER"]
    public = subprocess.run(command, check=True, capture_output=True).stdout
    keys = [[str(key), "P-256", hashlib.sha256(public).hexdigest()]]
    report = REPORT | {"keys": keys, "keys_in_all": 2}
    with forged(json.dumps(report).encode(), user="root") as pid:
        seen = keyd("audit", "--json", f"--key={key}", f"--directory={tmp_path}")
    told = [one["seen"] for one in json.loads(seen.stdout) if one["subject"] == f"process {pid}"]
    assert "1 of 2 keys it does not tell of: name them with --key" in told


def test_it_knows_itself_by_the_pid_that_is_in_proc() -> None:
    """In another namespace it has pid 1, and so has another process, which is to be searched."""
    program = (
        "import os; from keyd.inspection.audit import _come; others = _come({});"
        "print(os.getpid(), 1 in others, int(os.readlink('/proc/self')) in others)"
    )
    done = subprocess.run(
        ["unshare", "--pid", "--fork", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1 True False\n"


def test_a_user_may_have_a_keyd_with_a_key_that_the_user_can_read(tmp_path: Path) -> None:
    key = tmp_path / "own.key"
    make_key(key)
    command = ["openssl", "pkey", "-in", key, "-pubout", "-outform", "DER"]
    public = subprocess.run(command, check=True, capture_output=True).stdout
    der = base64.b64decode(b"".join(key.read_bytes().splitlines()[1:-1]))
    report = REPORT | {"keys": [[str(key), "P-256", hashlib.sha256(public).hexdigest()]]}
    with forged(json.dumps(report).encode(), der) as pid:
        for owner, verdict in (("root", "broken"), ("nobody", "holds")):
            shutil.chown(key, owner)
            seen = keyd("audit", "--json", f"--key={key}", f"--directory={tmp_path}")
            (found,) = (
                one["verdict"]
                for one in json.loads(seen.stdout)
                if one["subject"] == str(key) and f"in process {pid} " in one["seen"]
            )
            assert found == verdict


def test_a_key_file_that_was_replaced_is_not_taken_for_keyds(listening: Listening) -> None:
    own = listening.key.rename(listening.key.with_name("own"))
    make_key(listening.key)
    try:
        found = verdicts(listening, listening.key.parent)
    finally:
        own.rename(listening.key)
    assert ("is not the key that keyd has any more", "not available") in found["key"]
    assert "memory" not in found


def test_a_client_can_leave_no_descriptor_where_the_kernel_refuses_them(
    listening: Listening,
) -> None:
    """Whoever reads the packet closes it, and may wait for as long as its SO_LINGER says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        try:
            client.setsockopt(socket.SOL_SOCKET, 83, 0)  # SO_PASSRIGHTS, since Linux 6.16
            expected = "Operation not permitted"
        except OSError:
            expected = ""
        client.connect(str(listening.socket))
        try:
            socket.send_fds(client, [b"x"], [client.fileno()])
            refusal = ""
        except OSError as error:
            refusal = error.strerror or ""
        assert refusal == expected
    assert listening.ask() is Status.DONE
