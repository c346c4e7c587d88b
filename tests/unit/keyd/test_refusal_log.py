"""The lines for what is refused: a few for each process and user, and all else is counted."""

import re

import pytest

from keyd.linux.unix_socket import Peer
from keyd.protocol import Refusal, Status
from keyd.refusal_log import RefusalLog

_FORKING, _OTHER = 33, 1000


def test_more_processes_do_not_make_more_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log = RefusalLog()
    for process in range(1, 1001):
        for status in (Status.NOT_TLS, Status.MALFORMED, Status.NOT_TLS, Status.NOT_TLS):
            log.note(Refusal(0, status, "no"), Peer(process, _FORKING, _FORKING))
    for _ in range(2):
        log.note(Refusal(0, Status.NOT_TLS, "no"), Peer(2000, _OTHER, _OTHER))
    log.say_rest()
    said = capsys.readouterr().err.splitlines()
    assert sum("(process 2000)" in line for line in said) == 2
    assert len(said) < 50
    counted = {Status.NOT_TLS: 0, Status.MALFORMED: 0}
    for status in counted:
        counted[status] += sum(f"refused, {status.name}: no" in line for line in said)
        for line in said:
            counted[status] += sum(map(int, re.findall(rf"(\d+) {status.name}\b", line)))
    assert counted == {Status.NOT_TLS: 3002, Status.MALFORMED: 1000}
    assert any(f"(other processes of user {_FORKING})" in line for line in said)
    log.say_rest()
    assert not capsys.readouterr().err
    # Another second.
    log.note(Refusal(0, Status.NOT_TLS, "no"), Peer(1000, _FORKING, _FORKING))
    assert capsys.readouterr().err == "keyd: refused, NOT_TLS: no (process 1000)\n"
