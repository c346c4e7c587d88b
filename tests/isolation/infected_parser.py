"""The real checkers of files, with somebody else's code in them, where a file's hole would be.

``python -I infected_parser.py CHECKER SETTINGS``: one of ``CHECKERS``, and JSON. The question comes
on standard input, as it does from ``check``. In place of an answer, it says what came of each
attempt.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parent))

from infected_resolver import outcomes

from keyd import parsing
from keyd.linux import seccomp

__all__ = ["main"]


def _keyd_check(attack: Callable[..., NoReturn]) -> Callable[[], int]:
    from keyd import __main__, certificates

    certificates.examine = attack
    sys.argv[1:] = ["check"]
    return __main__.main


def _handshake_check(attack: Callable[..., NoReturn]) -> Callable[[], int]:
    from titus_py.fork_server import handshake_check

    handshake_check._cipher_mistakes = attack
    return handshake_check.main


def _client_authorities(attack: Callable[..., NoReturn]) -> Callable[[], int]:
    from titus_py.fork_server import client_authorities

    client_authorities._answer = attack
    sys.argv[1:] = []
    return client_authorities.main


def _revocations(attack: Callable[..., NoReturn]) -> Callable[[], int]:
    from titus_py.fork_server import client_authorities

    client_authorities._revoked = attack
    sys.argv[1:] = ["revoked"]
    return client_authorities.main


_CHECKERS = {
    "keyd check": _keyd_check,
    "handshake check": _handshake_check,
    "client authorities": _client_authorities,
    "revocations": _revocations,
}


def _fail(*_: object) -> NoReturn:
    raise OSError("no filter")


def main() -> None:
    checker, settings = sys.argv[1], json.loads(sys.argv[2])
    if settings["confinement"] == "none":
        parsing.confine_parser = lambda *_, **__: None
    elif settings["confinement"] == "fails":
        seccomp.install = _fail

    def attack(*_: Any) -> NoReturn:
        found = outcomes(settings, aside=settings["confinement"] == "none")
        os.write(1, json.dumps(found).encode())
        os._exit(0)

    sys.exit(_CHECKERS[checker](attack)())


if __name__ == "__main__":
    main()
