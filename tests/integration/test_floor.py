"""The floor (bench/floor.c): it serves, and its workers are confined as it says."""

import dataclasses
import os
import re
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bench import peers
from bench.load import Load
from bench.measurements import transfers
from bench.peers import FLOOR, PEERS
from bench.samples import Results
from bench.stage import QUICK, Proxy, Stage
from titus_py.worker.system_calls import WORKER

BENCH = Path(__file__).parents[2] / "bench"
PATIENCE_SECONDS = 60
SPARES = 16


def built(program: str, directory: Path) -> Path:
    target = directory / program
    command = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", target]
    subprocess.run([*command, BENCH / f"{program}.c", "-lssl", "-lcrypto"], check=True)
    return target


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("build")
    for program in ("floor", "load"):
        command = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o"]
        command += [str(directory / program), str(BENCH / f"{program}.c"), "-lssl", "-lcrypto"]
        subprocess.run(command, check=True)
    return directory


@pytest.fixture
def stage(programs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(peers, "FLOOR_PROGRAM", str(programs / "floor"))
    floor = [peer for peer in PEERS if peer.name == FLOOR]
    scope = dataclasses.replace(QUICK, transfer_octets=8 << 20)
    with tempfile.TemporaryDirectory(prefix="titus-py-floor-") as name:
        # Not below pytest's own directory: the backend's nobody reads files here.
        directory = Path(name)
        directory.chmod(0o755)
        yield Stage(directory, Load(programs / "load"), floor, scope, Results())


@pytest.fixture
def floor(stage: Stage) -> Iterator[Proxy]:
    with stage.backend() as backend, stage.proxy(stage.peers[0], "P-256", backend.port) as proxy:
        yield proxy


def connect(port: int) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS))


def workers(floor: Proxy) -> list[int]:
    """Its children but the fork server, zombies included."""
    children = Path(f"/proc/{floor.pid}/task/{floor.pid}/children").read_text().split()
    found = []
    for pid in map(int, children):
        # It may be reaped meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            if field(pid, "Name") == "floor-worker":
                found.append(pid)
    return found


def field(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise KeyError(name)


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_it_serves_whole_answers_to_more_clients_than_it_has_spares(
    stage: Stage, floor: Proxy
) -> None:
    outcome = stage.small("once", floor, clients=2 * SPARES, timeout=PATIENCE_SECONDS)
    assert outcome.clients.done == 2 * SPARES
    assert outcome.clients.failed == outcome.clients.unclean == outcome.tickets == 0
    # Who has served is reaped, and there are as many spares as before.
    assert soon(lambda: len(workers(floor)) == SPARES)


def test_it_passes_long_streams_on_in_both_directions(stage: Stage) -> None:
    transfers.measure(stage)
    assert len(stage.results.samples) == 4
    assert not [sample.failed for sample in stage.results.samples if sample.failed]


def test_its_workers_are_confined_as_it_says(floor: Proxy) -> None:
    with connect(floor.port), connect(floor.port):
        assert soon(lambda: len(workers(floor)) == SPARES + 2)
        # A worker has its filter last of all.
        assert soon(lambda: all(field(pid, "Seccomp") == "2" for pid in workers(floor)))
        confined = workers(floor)
        uids = set()
        for pid in confined:
            (uid,) = set(field(pid, "Uid").split())
            assert set(field(pid, "Gid").split()) == {uid}
            assert int(uid) >= peers.FIRST_UID
            uids.add(uid)
            assert field(pid, "Groups") == ""
            assert {field(pid, f"Cap{name}") for name in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}
            assert field(pid, "NoNewPrivs") == "1"
            assert field(pid, "Seccomp_filters") == "1"
            assert field(pid, "NSpid").split()[1:] == ["1"]
            assert os.listdir(f"/proc/{pid}/root") == []
            # Non-dumpable: what is in /proc about it is root's.
            assert Path(f"/proc/{pid}/stat").stat().st_uid == 0
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert re.search(r"Max open files +8 +8 ", limits)
            assert re.search(r"Max processes +0 +0 ", limits)
        assert len(uids) == len(confined)
        for kind in ("pid", "ipc", "uts"):
            own = {os.readlink(f"/proc/{pid}/ns/{kind}") for pid in (*confined, floor.pid)}
            assert len(own) == len(confined) + 1
        (network,) = {os.readlink(f"/proc/{pid}/ns/net") for pid in confined}
        assert network != os.readlink(f"/proc/{floor.pid}/ns/net")


def test_its_filter_has_the_calls_of_ours() -> None:
    source = (BENCH / "floor.c").read_text()
    listed = re.search(r"allowed\[\] = \{(.*?)\};", source, re.DOTALL)
    assert listed is not None
    calls = [call for call in re.findall(r"^ .*|^#.*", listed[1], re.MULTILINE) if call[0] == " "]
    assert set(re.findall(r"SYS_(\w+)", " ".join(calls))) == set(WORKER)


def test_nothing_of_it_outlives_the_parent(floor: Proxy) -> None:
    with connect(floor.port):
        assert soon(lambda: len(workers(floor)) == SPARES + 1)
        children = Path(f"/proc/{floor.pid}/task/{floor.pid}/children").read_text().split()
        assert len(children) == SPARES + 2
        os.kill(floor.pid, signal.SIGKILL)
        assert soon(lambda: not any(Path(f"/proc/{pid}/ns").exists() for pid in children))
