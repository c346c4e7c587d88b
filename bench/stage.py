"""Where measurements happen: proxies side by side, rounds in turn, and how long each takes."""

import socket
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.backend import SMALL, SMALL_OCTETS, Backend, serving
from bench.load import Load, Outcome
from bench.peers import Peer, Setting, Site, make_site
from bench.processes import Failed, cpu_seconds, free_port, running
from bench.samples import Results, Sample

__all__ = ["FULL", "QUICK", "Proxy", "Scope", "Stage"]

#: So that what one run left to be done is done before the next.
_REST_SECONDS = 0.05
_HANDSHAKE_SECONDS = 10.0


@dataclass(frozen=True)
class Scope:
    """How much is measured; times in seconds, for each proxy in each round."""

    rounds: int
    handshakes: float
    light: float
    half: float
    transfer_octets: int
    idle_rounds: int
    idle_counts: tuple[int, ...]
    idle_cpu: float
    signatures: float
    tunnels: float
    bursts: int
    large_bursts: int
    latency_keys: tuple[str, ...]
    certificates: int


FULL = Scope(
    rounds=3,
    handshakes=1.5,
    light=3.0,
    half=2.0,
    transfer_octets=512 << 20,
    idle_rounds=2,
    idle_counts=(100, 1000),
    idle_cpu=5.0,
    signatures=1.0,
    tunnels=0.8,
    bursts=5,
    large_bursts=3,
    latency_keys=("RSA-2048", "P-256"),
    certificates=10_000,
)
QUICK = Scope(
    rounds=1,
    handshakes=0.5,
    light=1.0,
    half=1.0,
    transfer_octets=128 << 20,
    idle_rounds=1,
    idle_counts=(100, 1000),
    idle_cpu=0.5,
    signatures=0.3,
    tunnels=0.3,
    bursts=1,
    large_bursts=1,
    latency_keys=("P-256",),
    certificates=1000,
)


@dataclass
class Proxy:
    """One that runs."""

    name: str
    port: int
    pid: int

    def cpu(self) -> float:
        time.sleep(_REST_SECONDS)
        return cpu_seconds(self.pid)


@dataclass
class Stage:
    """All that a measurement needs, and where its samples go."""

    directory: Path
    load: Load
    peers: Sequence[Peer]
    scope: Scope
    results: Results
    _sites: dict[str, Site] = field(default_factory=dict)
    _settings: int = 0

    def site(self, key_type: str) -> Site:
        if key_type not in self._sites:
            self._sites[key_type] = make_site(self.directory, key_type)
        return self._sites[key_type]

    def new_directory(self) -> Path:
        self._settings += 1
        directory = self.directory / str(self._settings)
        directory.mkdir()
        return directory

    @contextmanager
    def backend(self, cpus: set[int] | None = None) -> Iterator[Backend]:
        with serving(self.new_directory(), {self.scope.transfer_octets}, cpus) as backend:
            yield backend

    @contextmanager
    def proxy(
        self, peer: Peer, key_type: str, backend_port: int, cpus: set[int] | None = None
    ) -> Iterator[Proxy]:
        """Raises Failed if it does not start."""
        setting = Setting(self.new_directory(), self.site(key_type), free_port(), backend_port)
        log, environment = setting.directory / "log", peer.environment(setting)
        with running(peer.configure(setting), log, setting.port, cpus, environment) as pid:
            _shake_hands(setting.port)
            yield Proxy(peer.name, setting.port, pid)

    @contextmanager
    def proxies(
        self,
        measurement: str,
        key_type: str,
        backend_port: int,
        cpus: set[int] | None = None,
        peers: Sequence[Peer] = (),
    ) -> Iterator[list[Proxy]]:
        """All of them, or these, each idle while another is measured.

        One that fails to start is noted.
        """
        with ExitStack() as stack:
            started = []
            for peer in peers or self.peers:
                with self.noting(measurement, peer.name, {"key": key_type}):
                    proxy = self.proxy(peer, key_type, backend_port, cpus)
                    started.append(stack.enter_context(proxy))
            yield started

    @contextmanager
    def noting(self, measurement: str, peer: str, setting: dict[str, object]) -> Iterator[Sample]:
        """A sample to be filled; if what fills it fails, the sample says so, and all goes on."""
        sample = Sample(measurement, peer, setting)
        try:
            yield sample
        except Failed as failed:
            sample.failed = str(failed)
            self.say(f"{measurement}, {peer}: {failed}")
        if sample.failed or sample.values:
            self.results.samples.append(sample)

    def small(self, mode: str, proxy: Proxy, load: Load | None = None, **options: float) -> Outcome:
        """The load, with the small answer."""
        load = load or self.load
        return load.run(mode, proxy.port, path=SMALL, length=SMALL_OCTETS, **options)

    def say(self, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def _shake_hands(port: int) -> None:
    """Who listens may not serve yet: what is measured begins when it does. Raises Failed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection(("127.0.0.1", port), _HANDSHAKE_SECONDS) as plain,
            context.wrap_socket(plain),
        ):
            pass
    except OSError as error:
        raise Failed(f"does not serve: {error}") from error
