"""Thousands of certificates in a directory: starting, handshakes, memory, and one that is renewed.

Each proxy runs alone. What is measured ends with a handshake for a name whose certificate is the
one that is in the directory then.
"""

import os
import signal
import socket
import ssl
import statistics
import time
from contextlib import suppress
from pathlib import Path

from bench.directories import SERVERS, Directory, Server
from bench.processes import Failed, free_port, pss_octets, running
from bench.stage import Stage

__all__ = ["measure"]

_PATIENCE_SECONDS = 300.0
_PAUSE_SECONDS = 0.02
_HANDSHAKES = 100
_MILLISECONDS = 1000


def measure(stage: Stage) -> None:
    certificates = Directory(stage.new_directory() / "certificates", stage.scope.certificates)
    with stage.backend() as backend:
        for peer in stage.peers:
            if (server := SERVERS.get(peer.name)) is None:
                continue
            setting: dict[str, object] = {"certificates": certificates.count}
            with stage.noting("certificates", peer.name, setting) as sample:
                own = stage.new_directory()
                sample.values = _one(server, certificates, own, backend.port)


def _one(server: Server, certificates: Directory, own: Path, backend: int) -> dict[str, float]:
    port, last = free_port(), certificates.name(certificates.count - 1)
    configuration = own / "configuration"
    configuration.write_text(server.configure(certificates, own, port, backend))
    begun = time.monotonic()
    with running([*server.command, str(configuration)], own / "log") as pid:
        before = _wait(port, last, b"", begun)
        started = time.monotonic() - begun
        names = [
            certificates.name(number * certificates.count // _HANDSHAKES)
            for number in range(_HANDSHAKES)
        ]
        handshakes = []
        for name in names:
            handshakes.append(_shake_hands(port, name)[0])
            time.sleep(_PAUSE_SECONDS)
        pss = pss_octets(pid)
        certificates.issue(certificates.count - 1)
        begun = time.monotonic()
        os.kill(pid, getattr(signal, server.reload))
        slowest: list[float] = []
        _wait(port, last, before, begun, slowest)
        reloaded = time.monotonic() - begun
    return {
        "start_s": started,
        "handshake_ms": statistics.median(handshakes) * _MILLISECONDS,
        "pss": pss,
        "reload_s": reloaded,
        "slowest_ms": max(slowest) * _MILLISECONDS,
    }


def _wait(
    port: int, name: str, before: bytes, begun: float, times: list[float] | None = None
) -> bytes:
    """Until another certificate than ``before`` is shown for a name; returns it. Raises Failed.

    ``times`` are those of the handshakes meanwhile, none of which may fail then.
    """
    while time.monotonic() - begun < _PATIENCE_SECONDS:
        try:
            seconds, shown = _shake_hands(port, name)
        except OSError as error:
            if times is not None:
                raise Failed(f"a client was not served within a reload: {error}") from error
        else:
            if times is not None:
                times.append(seconds)
            if shown != before:
                return shown
        time.sleep(_PAUSE_SECONDS)
    raise Failed(f"not within {_PATIENCE_SECONDS:g} s")


def _shake_hands(port: int, name: str) -> tuple[float, bytes]:
    """How long connecting and the handshake took, and the certificate. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    begun = time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", port), _PATIENCE_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=name) as tls,
    ):
        seconds = time.monotonic() - begun
        shown = tls.getpeercert(binary_form=True) or b""
        with suppress(OSError):
            tls.unwrap()
    return seconds, shown
