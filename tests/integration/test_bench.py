"""The bench's machinery, not how fast anything is."""

import dataclasses
import subprocess
from pathlib import Path

import pytest

from bench import exchanges
from bench.directories import SERVERS
from bench.load import Load
from bench.measurements import certificates, tunnels
from bench.peers import FLOOR, PEERS, TITUS_PY
from bench.processes import Failed, free_port
from bench.report import write_report
from bench.samples import Results, Sample
from bench.stage import QUICK, Stage

SOURCES = Path(__file__).parents[2] / "bench"
MACHINE = ("date", "processor", "processors", "memory", "kernel", "system", "others")


def build(directory: Path, name: str) -> Path:
    program, source = directory / name, SOURCES / f"{name}.c"
    command = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, source]
    subprocess.run([*command, "-lssl", "-lcrypto"], check=True)
    return program


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    program = build(tmp_path, "load")
    directory = tmp_path / "stage"
    directory.mkdir()
    return Stage(directory, Load(program), PEERS[:1], QUICK, Results())


def test_every_answer_is_whole_and_counted(stage: Stage) -> None:
    with stage.backend() as backend, stage.proxy(PEERS[0], "P-256", backend.port) as proxy:
        before = proxy.cpu()
        closed = stage.small("closed", proxy, clients=2, seconds=1)
        once = stage.small("once", proxy, clients=5, rate=20)
        rate = stage.small("rate", proxy, rate=10, seconds=0.5)
        used = proxy.cpu() - before
    # However busy the machine is: what is counted is whole.
    assert closed.clients.done >= 2
    assert (once.clients.done, rate.clients.done) == (5, 5)
    for outcome in (closed, once, rate):
        for group in (outcome.clients, outcome.newcomers):
            assert group.failed == group.unclean == 0, group.failures
            assert len(group.first_us) == len(group.end_us) == group.done
        assert outcome.tickets == 0
    # Workers that have ended are counted, too.
    assert used > 0


def test_an_answer_of_another_length_is_a_failure(stage: Stage) -> None:
    with stage.backend() as backend, stage.proxy(PEERS[0], "P-256", backend.port) as proxy:
        outcome = stage.load.run("once", proxy.port, clients=2, path="/small", length=99)
        upload = stage.load.run("once", backend.sink_port, clients=1, upload=1, timeout=1)
    assert outcome.clients.done == 0
    assert outcome.clients.failures["answer"] == 2
    # The sink speaks no TLS.
    assert upload.clients.failed == 1


def test_the_report_says_what_was_found_what_failed_and_who_was_missing(tmp_path: Path) -> None:
    def sample(peer: str, rate: float, failed: str = "") -> Sample:
        values = {} if failed else {"rate": rate, "failed": 0}
        return Sample("handshakes", peer, {"key": "P-256", "clients": 4}, values, failed=failed)

    machine = dict.fromkeys(MACHINE, "a machine")
    results = Results(machine, {"nginx": "1.2.3"}, {"hitch": "hitch is not installed"})
    for rate in (100.0, 150.0, 120.0):
        results.samples += [sample(TITUS_PY, rate), sample(FLOOR, 1.6 * rate)]
        results.samples.append(sample("nginx", 2 * rate))
    results.samples.append(sample("stunnel", 0, "ended at once"))
    results.save(tmp_path / "results.json")
    report = write_report(Results.load(tmp_path / "results.json"), tmp_path).read_text()
    assert "| titus-py / floor | titus-py / nginx | titus-py / stunnel |" in report
    row = "| P-256, 4 clients | 120 (100 to 150) | 192 (160 to 240) | 240 (200 to 300) | — "
    assert f"{row}| 0.62 | 0.50 | — |" in report
    assert "**hitch: not measured**: hitch is not installed" in report
    assert "handshakes (key P-256, clients 4), stunnel: ended at once" in report


def test_a_directory_of_certificates_is_served_by_each_that_is_compared(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "_HANDSHAKES", 2)
    peers = [peer for peer in PEERS if peer.name in SERVERS]
    few = dataclasses.replace(QUICK, certificates=3)
    certificates.measure(dataclasses.replace(stage, peers=peers, scope=few))
    found = {sample.peer: sample for sample in stage.results.samples}
    assert set(found) == {"titus-py", "nginx", "haproxy"}
    for sample in found.values():
        assert not sample.failed
        assert all(value > 0 for value in sample.values.values())


def test_programs_talk_through_each_tunnel_that_is_compared(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Octets come back equal, or the sample fails: those of sizes about TLS's records, too."""
    build(tmp_path, "echo")
    sizes = (16_383, 16_384, 16_385, 65_535, 65_536, 65_537)
    monkeypatch.setattr(exchanges, "SIZES", sizes)
    monkeypatch.setattr(tunnels, "SIZES", sizes)
    monkeypatch.setattr(exchanges, "LONG_OCTETS", 1 << 20)
    tunnels.measure(dataclasses.replace(stage, scope=dataclasses.replace(QUICK, tunnels=0.05)))
    assert not stage.results.missing
    assert not list(stage.results.failures())
    through = {(one.setting["program"], one.peer) for one in stage.results.samples}
    both = {(name, peer) for name in ("Erlang", "echo") for peer in ("plain", TITUS_PY, "stunnel")}
    assert through == both | {("Erlang", "inet_tls")}
    for sample in stage.results.samples:
        assert len(sample.values) == 3 + len(sizes)
        assert all(value > 0 for value in sample.values.values())
    stage.results.machine = dict.fromkeys(MACHINE, "a machine")
    report = write_report(stage.results, tmp_path).read_text()
    assert "| titus-py / plain | titus-py / stunnel | titus-py / inet_tls |" in report


def test_a_program_whose_server_is_not_there_has_failed(tmp_path: Path) -> None:
    echo = exchanges.Echo(build(tmp_path, "echo"))
    with pytest.raises(Failed, match=r"echo ended with 2: .*Connection refused"):
        echo.run(free_port(), 0.05)
