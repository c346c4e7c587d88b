"""``titus-py demo``: a throwaway instance, a real request, and a look at what protects the key.

Runs as root, since the instance does. It makes the key, and therefore does not search itself.
What it shows was read from /proc while the connection was open. Everything that it makes is
below one temporary directory, or is a child process of its own.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keyd.inspection.key_search import Search, needles, search_all
from keyd.keys import load_private_key
from titus_py.audit.instance import (
    Process,
    Role,
    all_processes,
    connections_to,
    descriptors,
    instance_processes,
    namespaces,
    status,
)
from titus_py.audit.throwaway import SPARE, Event, TitusInstance
from titus_py.supervisor.log import as_text

__all__ = ["demo"]

_COLUMNS = 80
_GREETING = b"Hello from a backend that speaks plain HTTP.\n"
_REQUEST_SECONDS = 20.0
_SETTLE_SECONDS = 3.0
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: The kernel's own pages in every process, some of which cannot be read.
_KERNEL_PAGES = ("[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]")

#: The two speculation features that a process can turn off, as /proc/PID/status names them.
_SPECULATION = ("Speculation_Store_Bypass", "SpeculationIndirectBranch")


class _Failed(Exception):
    """What went wrong, for the person who runs the demo."""


class _Answer(NamedTuple):
    """The answer that curl got, and whether curl verified the certificate."""

    head: str
    body: str
    verified: bool


class _Sight(NamedTuple):
    """What was seen while the connection was open."""

    processes: list[Process]
    searches: dict[int, Search]
    worker: Process
    facts: dict[Role, dict[str, str]]


def demo() -> int:
    """Show a real HTTPS request and what protected the key; returns the exit code.

    0 only if the request succeeded and the key was found in keyd and nowhere else.
    """
    if os.geteuid() != 0:
        print(
            "titus-py: demo must be started as root: it runs the proxy, and looks into the "
            "memory of its processes",
            file=sys.stderr,
        )
        return 1
    if shutil.which("curl") is None:
        print("titus-py: the demo's client is curl, which is not installed", file=sys.stderr)
        return 1
    console = Console(highlight=False)
    console.width = min(console.width, _COLUMNS)
    _hear_interrupts()
    try:
        with ExitStack() as stack:
            try:
                _show(console, stack)
            finally:
                # One that came within ExitStack's own code would keep it from stopping the rest.
                _ignore_interrupts()
    except (_Failed, RuntimeError) as failed:
        console.print(Text(f"\nThe demo failed: {failed}", style="bold red"))
        return 1
    except OSError as error:
        # A process has ended, or root may not look into others here.
        console.print(Text(f"\nThe demo failed: {error}", style="bold red"))
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; nothing is left behind.")
        return 130
    return 0


def _show(console: Console, stack: ExitStack) -> None:
    """The demo, start to end; raises _Failed, OSError."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="titus-py-demo-")))
    backend = stack.enter_context(_Backend.running())
    with _interrupts_later():
        instance = TitusInstance(directory, backend.address, "RSA-2048", ["localhost"])
        stack.callback(instance.stop)
    instance.wait_until_listening()

    url = f"https://localhost:{instance.port}/"
    curl = stack.enter_context(_curl(url, instance.port, instance.ca_file))
    if not backend.arrived.wait(_REQUEST_SECONDS):
        curl.kill()
        said = curl.communicate()[1].strip().splitlines()
        raise _Failed(f"the request did not arrive: {said[-1] if said else 'curl is silent'}")
    sight = _look(instance)
    backend.release.set()
    answer = _answer(curl)
    ended = instance.wait_for_event("connection_ended", _REQUEST_SECONDS)

    _show_request(console, url, answer, ended)
    _show_processes(console, sight)
    _show_protection(console, sight)
    console.print("\n[bold]The connection, in the log[/]")
    when, level, name = (ended.pop(field) for field in ("time", "level", "event"))
    console.print(Text(as_text(when, level, name, ended)), soft_wrap=False)
    problems = _problems(sight)
    if problems:
        raise _Failed("; ".join(problems))
    code = instance.stop()
    if code != 0:
        raise _Failed(f"titus-py serve exited with {code}:\n{instance.last_words()}")
    console.print(
        "\n[bold green]The request succeeded, and the key was found in keyd and nowhere else.[/]"
    )


# --- What it takes --------------------------------------------------------------------------


class _Backend(ThreadingHTTPServer):
    """Answers any request once ``release`` is set; the first request sets ``arrived``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Greeter)
        self.arrived = threading.Event()
        self.release = threading.Event()
        self.address = f"127.0.0.1:{self.server_address[1]}"

    @classmethod
    @contextmanager
    def running(cls) -> Iterator["_Backend"]:
        with cls() as backend:
            threading.Thread(target=backend.serve_forever, daemon=True).start()
            try:
                yield backend
            finally:
                backend.release.set()
                backend.shutdown()

    def handle_error(self, *_: object) -> None:
        """Print nothing: if the connection was reset, curl or the log says so."""


class _Greeter(BaseHTTPRequestHandler):
    server: _Backend
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.arrived.set()
        # The connection stays open while its worker is looked at.
        self.server.release.wait(_REQUEST_SECONDS)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(_GREETING)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(_GREETING)

    def log_message(self, format: str, *_: object) -> None:
        """Print nothing to standard error."""
        del format


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Delay interrupts, without ignoring or blocking them: child processes would inherit that."""
    noted: list[int] = []
    for number in _INTERRUPTS:
        signal.signal(number, lambda number, _: noted.append(number))
    try:
        yield
    finally:
        _hear_interrupts()
    if noted:
        _interrupt()


def _hear_interrupts() -> None:
    for number in _INTERRUPTS:
        signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    """Only the first one counts: what it has begun, a second one must not cut short."""
    _ignore_interrupts()
    raise KeyboardInterrupt


def _ignore_interrupts() -> None:
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _curl(url: str, port: int, authority: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [
        "curl", "--disable", "--silent", "--show-error", "--verbose", "--include", "--http1.1",
        "--noproxy", "*", "--max-time", str(_REQUEST_SECONDS), "--cacert", str(authority),
        "--resolve", f"localhost:{port}:127.0.0.1", url,
    ]  # fmt: skip
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as curl:
        try:
            yield curl
        finally:
            curl.kill()


def _answer(curl: "subprocess.Popen[str]") -> _Answer:
    output, said = curl.communicate(timeout=_REQUEST_SECONDS + 5)
    if curl.returncode != 0:
        raise _Failed(f"curl exited with {curl.returncode}: {said.strip().splitlines()[-1]}")
    head, _, body = output.partition("\n\n")
    if body.encode() != _GREETING:
        raise _Failed(f"the answer is not what the backend sent: {body!r}")
    return _Answer(head.partition("\n")[0], body.strip(), "SSL certificate verify ok" in said)


# --- What is to be seen ---------------------------------------------------------------------


def _look(instance: TitusInstance) -> _Sight:
    processes = _settled(instance.pid)
    serving = connections_to(instance.port, processes)
    if len(serving) != 1:
        raise _Failed(f"the connection is held by {len(serving)} processes, and one was expected")
    worker = next(iter(serving))
    pids = [process.pid for process in processes]
    key = load_private_key(str(instance.key_file), None)
    searches = {found.pid: found for found in search_all(pids, needles(key))}
    keyd = next((process for process in processes if process.role is Role.KEYD), None)
    if keyd is None:
        raise _Failed("there is no keyd")
    facts = {Role.WORKER: _facts(worker), Role.KEYD: _facts(keyd)}
    return _Sight(processes, searches, worker, facts)


def _settled(supervisor: int) -> list[Process]:
    """The instance's processes, once each worker has confined itself, or after a while anyway.

    A worker has just been forked to replace the one that took the connection.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        processes = instance_processes(supervisor)
        workers = [process for process in processes if process.role is Role.WORKER]
        settled = len(workers) == SPARE + 1 and all(worker.uid for worker in workers)
        if settled or time.monotonic() > deadline:
            return processes
        time.sleep(0.02)


def _facts(process: Process) -> dict[str, str]:
    """What confines this process, as /proc has it now; what does not is left out."""
    pid, uid = process.pid, process.uid
    fields = status(pid)
    facts = {}
    others = {other.uid for other in all_processes() if other.pid != pid}
    if set(fields["Uid"].split()) == {str(uid)} and uid and uid not in others:
        facts["User id"] = f"{uid}, no other process's"
    if not fields["Groups"]:
        facts["Other groups"] = "none"
    root = Path(f"/proc/{pid}/root")
    if not os.listdir(root):
        owner = root.stat()
        writable = owner.st_mode & 0o022 or owner.st_uid == uid
        facts["Root directory"] = "empty" if writable else "empty, not writable"
    ours = namespaces("self")
    apart = {kind for kind, name in namespaces(pid).items() if ours.get(kind) != name}
    if apart:
        facts["Namespaces apart"] = ", ".join(sorted(apart))
    if "pid" in apart and _alone(pid):
        facts["Processes in sight"] = "itself"
    if "net" in apart:
        facts["Network interfaces"] = ", ".join(_interfaces(pid)) or "none"
    capabilities = {name: int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")}
    if not capabilities["CapEff"] and not capabilities["CapPrm"]:
        facts["Capabilities"] = "none" if capabilities["CapBnd"] else "none, none to regain"
    if fields["NoNewPrivs"] == "1":
        facts["New privileges"] = "never"
    if fields.get("Seccomp") == "2":
        facts["System calls"] = "filtered (seccomp)"
    # Files in /proc/PID belong to the process's user, unless it is non-dumpable (proc(5)).
    if uid and os.stat(f"/proc/{pid}/status").st_uid == 0:
        facts["Its memory"] = "no dump, no ptrace"
    resident, locked = (int(fields[name].split()[0]) for name in ("VmRSS", "VmLck"))
    if 0 < resident <= locked:
        facts["Swapped out"] = "never (memory locked)"
    if all("force" in fields.get(name, "") for name in _SPECULATION):
        facts["Speculation"] = "off, for good"
    zero = _limits_of_zero(pid)
    if zero:
        facts["Limits of zero"] = ", ".join(zero)
    if not Path(f"/proc/{pid}/environ").read_bytes().strip(b"\0"):
        facts["Environment"] = "empty"
    return facts | {"Open descriptors": _described_descriptors(pid)}


def _alone(pid: int) -> bool:
    """Whether no other visible process is in this process's pid namespace."""
    mine = os.readlink(f"/proc/{pid}/ns/pid")
    depth = len(status(pid)["NSpid"].split())
    for other in all_processes():
        with suppress(FileNotFoundError, ProcessLookupError):
            # Processes in fewer namespaces are certainly not in this one, and root may not look
            # into all of them.
            if other.pid == pid or len(status(other.pid)["NSpid"].split()) < depth:
                continue
            try:
                if os.readlink(f"/proc/{other.pid}/ns/pid") == mine:
                    return False
            except PermissionError:
                return False
    return True


def _interfaces(pid: int) -> list[str]:
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    return [line.partition(":")[0].strip() for line in lines]


def _limits_of_zero(pid: int) -> list[str]:
    """The resources of which the process can have none (hard limits; getrlimit(2))."""
    names = {
        "Max processes": "processes",
        "Max open files": "new files",
        "Max file size": "file size",
        "Max core file size": "core",
    }
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return [
        shown
        for name, shown in names.items()
        if any(
            line.startswith(name) and line.removeprefix(name).split()[1] == "0" for line in limits
        )
    ]


def _described_descriptors(pid: int) -> str:
    kinds = Counter(
        "sockets" if name.startswith("socket:") else name.partition(" ")[0].partition(":")[0]
        for name in descriptors(pid).values()
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def _problems(sight: _Sight) -> Sequence[str]:
    """What keeps the demo from saying that the key is in keyd and nowhere else."""
    problems = []
    for process in sight.processes:
        search = sight.searches[process.pid]
        who = f"{process.role} {process.pid}"
        unread = [part for part in search.skipped if part.mapping not in _KERNEL_PAGES]
        if process.role is Role.KEYD:
            if not search.hits:
                problems.append(f"the key was not found in {who}, which signed with it")
        elif search.hits:
            problems.append(f"the key was found in {who}: {search.hits[0]}")
        elif search.ended:
            problems.append(f"{who} ended while it was being searched")
        elif unread:
            problems.append(f"{unread[0].mapping} of {who} could not be searched")
    return problems


# --- How it is shown ------------------------------------------------------------------------


def _show_request(console: Console, url: str, answer: _Answer, ended: Event) -> None:
    names = ("tls_version", "cipher_suite", "group")
    tls = ", ".join(ended[name] for name in names if name in ended)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("Request", f"curl --cacert ca.crt {url}")
    table.add_row("TLS", tls + (", certificate verified" if answer.verified else ""))
    table.add_row("Answer", f"{answer.head.strip()}: {answer.body}")
    console.print("[bold]A real request, through the proxy[/]")
    console.print(table)


def _show_processes(console: Console, sight: _Sight) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Process")
    table.add_column("PID", justify="right")
    table.add_column("uid", justify="right")
    table.add_column("Private key in its memory?", overflow="fold")
    for process in sight.processes:
        search = sight.searches[process.pid]
        name = str(process.role)
        if process.role is Role.WORKER:
            name += ": this connection" if process == sight.worker else ": waiting for a client"
        if search.hits:
            parts = dict.fromkeys(hit.needle.partition(",")[0] for hit in search.hits)
            key = Text(f"yes: {', '.join(sorted(parts))}", style="bold yellow")
        else:
            key = Text(f"no ({search.octets / 1e6:.0f} MB searched)", style="green")
        table.add_row(name, str(process.pid), str(process.uid), key)
    console.print("\n[bold]Its processes, while the connection was open[/]")
    console.print(table)


def _show_protection(console: Console, sight: _Sight) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", style="dim")
    table.add_column("This connection's worker", overflow="fold")
    table.add_column("keyd", overflow="fold")
    worker, keyd = sight.facts[Role.WORKER], sight.facts[Role.KEYD]
    for label in dict.fromkeys([*worker, *keyd]):
        table.add_row(label, worker.get(label, "-"), keyd.get(label, "-"))
    console.print("[bold]What held them back, as /proc showed it[/]")
    console.print(table)
