"""What code in the process that connects to upstreams could do that is not ours: attempted."""

import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

from integration.instance import UIDS
from integration.tokens import scratch

from keyd.linux import seccomp
from keyd.system_calls import CONNECTING

PROGRAM = Path(__file__).with_name("attacking_connector.py")
#: Without the filter, it would meet the empty network namespace.
_BY_NAMESPACE = {"connect to an abstract one": "Connection refused"}
_ALLOWED = "connect to a unix socket"
#: What root itself may lack here: the capability, or a kernel that has it turned on.
_PERHAPS_NOT_ROOTS = {"trace another process", "make a user namespace"}


def test_it_connects_to_unix_sockets_and_can_do_nothing_else() -> None:
    abstract = f"\0{secrets.token_hex(8)}"
    with (
        scratch() as directory,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as without_path,
    ):
        path = directory / "socket"
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen()
        without_path.bind(abstract)
        without_path.listen()
        (directory / "file").write_text("everybody's")
        uid = UIDS.take(1)[0]
        settings = {
            "connector": {
                "paths": [str(path)],
                "user": (uid, uid, []),
                "filter": seccomp.build(CONNECTING).hex(),
            },
            "socket": str(path),
            "abstract": abstract,
            "port": tcp.getsockname()[1],
            "file": str(directory / "file"),
            "other": os.getpid(),
        }
        made = subprocess.run(
            [sys.executable, "-I", PROGRAM],
            input=json.dumps(settings),
            capture_output=True,
            text=True,
            check=True,
            timeout=240,
        )
    found: dict[str, tuple[str, str]] = json.loads(made.stdout)
    assert len(found) > 10
    failed_before = {name for name, (as_root, _) in found.items() if as_root}
    assert failed_before <= _PERHAPS_NOT_ROOTS
    confined = {name: outcome for name, (_, outcome) in found.items()}
    assert confined.pop(_ALLOWED) == ""
    for name, outcome in confined.items():
        assert outcome == _BY_NAMESPACE.get(name, "SIGSYS"), name
