"""A worker that hangs before it has a client does not take a spare's place for good."""

from pathlib import Path

from integration.certificates import Certificate
from integration.peers import Listener

from .harness import infected, one_more_connection


def test_it_is_killed_and_another_one_serves(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    with infected(
        tmp_path,
        certificate,
        backend.address,
        ["ready"],
        worker={"spare": 1, "handshake_timeout": "60s"},
    ) as instance:
        one_more_connection(instance)
        alarm = instance.wait_for_event("worker_failed")
        assert (alarm["how"], alarm["why"]) == ("killed by SIGKILL", "hung before it had a client")
        assert alarm["level"] == "alarm"
        one_more_connection(instance)
