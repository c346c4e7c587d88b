"""What one program leaves to the next comes out as it went in, and nothing else is understood."""

import gc
import json
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from keyd.upstream.state import UpstreamState
from titus_py.between.plan import Check, Health, State
from titus_py.configuration import Configuration, Credential, load
from titus_py.configuration.checking import CertificateFacts, Checked
from titus_py.configuration.file_watch import FileWatch
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.succession import (
    CannotTakeOver,
    LeftGeneration,
    Legacy,
    execute,
    inherit,
    leave,
)

CREDENTIAL = Credential(Path("/nowhere/www.crt"), Path("/nowhere/www.key"), None)
FACTS = CertificateFacts(
    chain="-----BEGIN CERTIFICATE-----",
    key_id=bytes(range(224, 256)),
    reference="-----BEGIN",
    subject="CN=www.example.org",
    names=("www.example.org", "ü"),
    not_after=datetime(2030, 1, 1, tzinfo=UTC),
)
CHECK = Check("10.0.0.5:80", Health(1.0, 2.0, 3, 2, None, "+OK"), "v2")
EVERYTHING = """
[worker]
max = 5
spare = 2
uids = "300000-300099"
drain = "1.5s"
require = ["landlock"]
chroot = "/nowhere/empty"
[limits]
connections_per_address = 3
idle_timeout = "2h"
[keyd]
user = "12345"
[log]
format = "json"
[metrics]
address = "unix:metrics.sock"
[service]
reload_on_change = true
[[listen]]
address = ":443"
[[listen]]
address = "127.0.0.1:8443"
[[vhost]]
sni = ["www.example.org", ""]
local_address = "::1"
local_port = 443
certificate = "www.crt"
key = "www.key"
backend = "unix:app.sock"
min_version = "TLSv1.2"
[[vhost]]
certificate = "www.crt"
key = "www.key"
backend = "app.example:80"
ciphersuites = "TLS_AES_128_GCM_SHA256"
"""


@pytest.fixture
def configuration(tmp_path: Path) -> Configuration:
    for name in ("www.crt", "www.key"):
        (tmp_path / name).touch()
    (tmp_path / "titus.toml").write_text(EVERYTHING)
    loaded = load(tmp_path / "titus.toml")
    assert loaded.configuration is not None, loaded.mistakes
    # From here on, its files are of no interest.
    for name in ("www.crt", "www.key", "titus.toml"):
        (tmp_path / name).unlink()
    return loaded.configuration


def generation_of(configuration: Configuration) -> Generation:
    checked = Checked(configuration, [], [], {CREDENTIAL: FACTS}, FileWatch([]))
    generation = Generation(7, checked, {})
    generation.announced = True
    generation.huge_pages, generation.huge_pages_of_code = 3, 7
    generation.keyds_keys = {"00" * 32}
    generation.lacks_keys = True
    generation.tokens = [("web", "ready")]
    generation.upstreams = [UpstreamState("keys.example", "ready", 1, 20, 3)]
    generation.lent = [["web-1", 2, 500, {"expired": 1}]]
    generation.connections = {1 << 50: {"connection": 1 << 50, "client": "[::1]:5", "uid": 9}}
    generation.ended.append({"connection": 5})
    generation.uids = range(300_000, 300_007)
    return generation


def test_a_generation_is_what_it_was(configuration: Configuration) -> None:
    generation = generation_of(configuration)
    octets = leave(generation).model_dump_json()
    found = inherit(LeftGeneration.model_validate_json(octets), {})
    assert found.configuration == configuration
    assert found.certificates == generation.certificates
    for name in (
        "number",
        "connections",
        "ended",
        "uids",
        "keyds_keys",
        "lacks_keys",
        "tokens",
        "upstreams",
        "lent",
        "announced",
        "huge_pages",
        "huge_pages_of_code",
        "started",
    ):
        assert getattr(found, name) == getattr(generation, name)
    assert found.state == generation.state


def test_what_it_does_not_know_it_does_not_take(configuration: Configuration) -> None:
    left: dict[str, Any] = json.loads(leave(generation_of(configuration)).model_dump_json())
    left["configuration"]["worker"]["of_tomorrow"] = 1
    with pytest.raises(CannotTakeOver, match=r"worker\.of_tomorrow .*only a restart"):
        inherit(LeftGeneration.model_validate(left), {}, tried_out=True)


def test_what_checks_have_found_is_what_it_was(configuration: Configuration) -> None:
    left = legacy(leave(generation_of(configuration)))
    assert Legacy.model_validate_json(left.model_dump_json()).states == left.states


def test_a_program_that_cannot_be_executed_leaves_the_signals_as_they_were(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a descriptor is closed by now. Blocked, they could not stop this program."""
    left = legacy(leave(generation_of(configuration)))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    # What other tests have left to the collector is closed now, and not meanwhile.
    gc.collect()
    descriptors = os.listdir("/proc/self/fd")
    for answers in ([], [-1]):
        with pytest.raises(OSError, match=r"No such file|Bad file descriptor"):
            execute(left.model_copy(update={"answers": answers}), {}, signals)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        assert os.listdir("/proc/self/fd") == descriptors


def legacy(generation: LeftGeneration) -> Legacy:
    return Legacy(
        generations=[generation],
        listeners=[],
        held_uids=-1,
        used_uids=[],
        addresses=[],
        states=[(CHECK, State(False, 1.5, "Connection refused"))],
        control=None,
        answers=[],
        later_answers=[],
        asked_again=False,
        program_asked=False,
        metrics=None,
        metrics_address=None,
        counts={},
        log_format="json",
        log_level="info",
        log_lines_lost=0,
        started=datetime(2030, 1, 1, tzinfo=UTC),
        begun=0.0,
    )
