"""A throwaway instance: for ``demo``, and for tests of what is around it or in it.

Run as root, by the demo and by tests (``pytest_plugin``). The instance is the real
``titus-py serve``, as a child. Its certificate and authority exist for as long as it does,
and no other process on the machine has its uids.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from titus_py.audit.instance import all_processes
from titus_py.audit.throwaway_authority import ThrowawayAuthority
from titus_py.configuration.uids import GENERATIONS

__all__ = ["PROGRAM", "SPARE", "Event", "TitusInstance"]

#: The program to start; a command and its options follow.
PROGRAM: tuple[str, ...] = (sys.executable, "-I", "-m", "titus_py")

Event = dict[str, Any]

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_MAX, SPARE = 100, 2
#: Where tests run, much else does: an audit may be in a handshake for longer than the usual ten
#: seconds (worker.handshake_timeout).
_HANDSHAKE_TIMEOUT = "60s"
#: The range to take uids from: beyond those that any system gives out (``configuration.uids``).
_FIRST_UID, _LAST_UID = 2_101_000_000, 2_147_000_000
#: Outside what the kernel gives to clients.
_PORTS = range(10_000, 16_000)


class TitusInstance:
    """A running titus-py with a throwaway certificate.

    ``port`` is where it listens, on 127.0.0.1; ``address`` is both. ``ca_file`` is what a
    client has to trust, for the names that were asked for and for 127.0.0.1;
    ``certificate_file`` and ``key_file`` are what it serves with; ``pid`` is its supervisor's.
    """

    def __init__(self, directory: Path, backend: str, key_type: str, names: Sequence[str]) -> None:
        """Start the instance. From now on it has to be stopped, even if it does not listen."""
        self.port = _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.ca_file = directory / "ca.crt"
        self.certificate_file = directory / "site.crt"
        self.key_file = directory / "site.key"
        self._log = directory / "log"
        self._make_certificate(key_type, names)
        configuration = directory / "titus.toml"
        configuration.write_text(self._configuration(directory, backend))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*PROGRAM, "serve", "--config", configuration],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The terminal's Ctrl-C must not reach it: the tests stop it when they are done.
                start_new_session=True,
            )
        self.pid = self._process.pid

    def wait_until_listening(self) -> None:
        """Raises RuntimeError if it has ended, or does not listen in time."""
        deadline = time.monotonic() + _START_SECONDS
        while not self.events("listening"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"titus-py does not listen:\n{self.last_words()}")
            time.sleep(0.01)

    def events(self, name: str | None = None) -> list[Event]:
        """What it has logged so far: all events, or those with this name."""
        lines = self._log.read_text(errors="replace").split("\n")[:-1]
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [event for event in found if name in (None, event["event"])]

    def wait_for_event(self, name: str, seconds: float = 10.0) -> Event:
        """The first event with this name. Raises TimeoutError if there is none in time."""
        deadline = time.monotonic() + seconds
        while not (found := self.events(name)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {name!r} within {seconds:g} s:\n{self.last_words()}")
            time.sleep(0.01)
        return found[0]

    def stop(self) -> int:
        """End it, and every connection; returns its exit code. A test's end does this anyway."""
        # The first SIGTERM lets connections end, the second one ends them.
        signals = (signal.SIGTERM, 0.2), (signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, None)
        for number, seconds in signals:
            if self._process.poll() is None:
                self._process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
        return self._process.wait()

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-10:]) or "(no log)"

    def _configuration(self, directory: Path, backend: str) -> str:
        # And one each for keyd, which has the last, the resolver and what serves the metrics.
        uids = _free_uids(GENERATIONS * (_MAX + SPARE + 1) + 3)
        tables: dict[str, dict[str, object]] = {
            "[worker]": {
                "uids": f"{uids[0]}-{uids[-2]}",
                "max": _MAX,
                "spare": SPARE,
                "handshake_timeout": _HANDSHAKE_TIMEOUT,
                "chroot": str(directory / "empty"),
            },
            "[keyd]": {"user": str(uids[-1])},
            "[log]": {"format": "json"},
            "[[listen]]": {"address": self.address},
            "[[vhost]]": {
                "certificate": str(self.certificate_file),
                "key": str(self.key_file),
                "backend": backend,
            },
        }
        lines = []
        for heading, table in tables.items():
            lines.append(heading)
            # JSON's strings and numbers are TOML's.
            lines += [f"{name} = {json.dumps(value)}" for name, value in table.items()]
        return "\n".join(lines) + "\n"

    def _make_certificate(self, key_type: str, names: Sequence[str]) -> None:
        """Write an authority's certificate, and a certificate and key. Its own key is not kept."""
        authority = ThrowawayAuthority()
        issued = authority.issue(key_type, [*names, "127.0.0.1"])
        self.ca_file.write_bytes(authority.certificate)
        self.certificate_file.write_bytes(issued.certificate)
        self.key_file.touch(mode=0o600)
        self.key_file.write_bytes(issued.key)


def _free_port() -> int:
    """A port on which nothing listens now.

    Of the processes of pytest-xdist, which choose at the same time, each has ports of its own.
    """
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    own = _PORTS
    if number.isdecimal():  # And no name that somebody gave it (--tx popen//id=NAME).
        own = _PORTS[int(number) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    while True:
        port = secrets.choice(own)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue


def _free_uids(count: int) -> range:
    """Uids that no process has, at random: other tests may choose some at the same time."""
    taken = {process.uid for process in all_processes()}
    while True:
        first = _FIRST_UID + secrets.randbelow(_LAST_UID - _FIRST_UID - count)
        uids = range(first, first + count)
        if not taken & set(uids):
            return uids
