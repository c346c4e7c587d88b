"""A worker writes to the code on huge pages, which all workers run: only its own changes."""

import re
from pathlib import Path

from integration.certificates import Certificate
from integration.peers import Listener, TlsClient

from .harness import infected, one_more_connection

_CODE = re.compile("^([0-9a-f]+)-([0-9a-f]+) .*/memfd:code", re.MULTILINE)


def code_of(pid: int) -> list[bytes]:
    """What is on huge pages of it, as root sees it."""
    places = _CODE.findall(Path(f"/proc/{pid}/maps").read_text())
    found = []
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        for start, stop in places:
            memory.seek(int(start, 16))
            found.append(memory.read(int(stop, 16) - int(start, 16)))
    return found


def test_a_worker_changes_no_code_but_its_own(
    certificate: Certificate, backend: Listener, tmp_path: Path
) -> None:
    with infected(tmp_path, certificate, backend.address, lasting=True) as instance:
        fork_server = instance.fork_server().pid
        before = code_of(fork_server)
        with TlsClient(instance.port, "e.overwrite.attack.test") as attacker:
            attacker.handshake()
            assert attacker.receive() == b"%d;" % len(before) != b"0;"
            codes = [code_of(worker.pid) for worker in instance.confined_workers(2)]
            assert [code == before for code in codes].count(False) == 1
            assert code_of(fork_server) == before
        one_more_connection(instance)
