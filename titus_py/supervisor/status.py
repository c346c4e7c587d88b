"""The state of the instance, for ``titus-py status``, the metrics and the service manager.

Run by the supervisor.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version

from titus_py.between.plan import Check, address_text
from titus_py.configuration import Credential, VirtualHost
from titus_py.configuration.address import Address
from titus_py.configuration.checking import CertificateFacts
from titus_py.configuration.client_certificates import ClientAuthorities
from titus_py.configuration.client_table import ClientFiles
from titus_py.configuration.known_client_table import Client
from titus_py.fork_server import immortal
from titus_py.supervisor.backends import Backends
from titus_py.supervisor.generations import Generations
from titus_py.supervisor.keyd_service import KeydService
from titus_py.supervisor.listeners import Listeners
from titus_py.supervisor.lost import Lost
from titus_py.supervisor.record import Record
from titus_py.supervisor.service import Service
from titus_py.supervisor.unprivileged import UnprivilegedProcess

__all__ = ["Status"]


def _directories(
    certificates: Mapping[Credential, CertificateFacts], now: datetime
) -> list[dict[str, object]]:
    """Each ``certificate_dir``: how many certificates it has, and which of them expires first."""
    found: dict[str, list[tuple[datetime, str]]] = {}
    for credential, facts in certificates.items():
        if credential.directory is not None:
            ends = found.setdefault(str(credential.directory), [])
            ends.append((facts.not_after, str(credential.certificate)))
    return [
        {
            "directory": directory,
            "certificates": len(ends),
            "first": file,
            "not_after": not_after.isoformat(),
            "days_left": (not_after - now).days,
        }
        for directory, ends in found.items()
        for not_after, file in (min(ends),)
    ]


def _client_files(
    authorities: Mapping[ClientFiles, ClientAuthorities], now: datetime
) -> list[dict[str, object]]:
    """What client certificates are judged by, and when the first of each file expires."""
    ends = {
        (files.setting(setting), str(path)): when
        for files, found in authorities.items()
        if files.whose != "system"
        for setting, path, when in (
            ("client_ca", files.ca, found.not_after),
            ("client_crl", files.crl, found.next_update),
        )
        if when is not None
    }
    return [
        {
            "setting": setting,
            "file": file,
            "not_after": when.isoformat(),
            "days_left": (when - now).days,
        }
        for (setting, file), when in ends.items()
    ]


def _client(client: Client, live: Counter[str]) -> dict[str, object]:
    """A known client, what it has and may have; how much it was refused is among the counts."""
    rate = client.model_dump(include={"rate"})["rate"]
    return {
        "name": client.name,
        "backend": ", ".join(map(str, client.backend or ())),
        "live": live[client.name],
        "connections": client.connections,
        "rate": rate,
    }


def _live(generations: Generations) -> Counter[str]:
    """How many connections each known client has, by its name."""
    return Counter(
        begun["client_name"]
        for generation in generations
        for begun in generation.connections.values()
        if "client_name" in begun
    )


def _lending(generations: Generations) -> list[dict[str, object]]:
    """Each host that keys are lent to, what it may have, and its streams; the rest is counted."""
    streams: Counter[str] = Counter()
    for generation in generations:
        for name, count, *_ in generation.lent:
            streams[name] += count
    return [
        {
            "client": client.name,
            "keys": len(client.keys),
            "operations": client.operations,
            "rate": client.model_dump(include={"rate"})["rate"],
            "streams": streams[client.name],
        }
        for client in generations.serving.configuration.keyd.client
    ]


class Status:
    """``started`` and ``begun`` are when the instance started, by the calendar and by the
    monotonic clock.
    """

    def __init__(
        self,
        record: Record,
        service: Service,
        generations: Generations,
        listeners: Listeners,
        backends: Backends,
        keyd_service: KeydService,
        unprivileged: Iterable[UnprivilegedProcess],
        lost: Lost,
    ) -> None:
        self._record = record
        self._service = service
        self._generations = generations
        self._listeners = listeners
        self._backends = backends
        self._keyd_service = keyd_service
        self._unprivileged = unprivileged
        self._lost = lost
        self.version = version("titus-py")
        self.started, self.begun = datetime.now(UTC), time.monotonic()

    def line(self) -> str:
        """For ``systemctl status``."""
        if self._service.stops:
            return "stopping"
        connections = sum(len(generation.connections) for generation in self._generations)
        counts = self._record.metrics.counts()
        waits = self._waits_for()
        return (
            f"{connections} connections now, {counts['accepted']} so far; "
            f"generation {self._generations.serving.number}"
            + (f"; waits for {waits}" if waits else "")
        )

    def _waits_for(self) -> str:
        """What keeps new clients from being served, if anything does."""
        if self._lost.reason:
            return f"{self._lost.names}: {self._lost.reason}"
        serving = self._generations.serving
        waits = {child.name for child in serving.starting}
        if serving.keyd is None and serving.configuration.keyd.socket is None:
            waits.add("keyd")
        return self._keyd_service.waits_for() or " and ".join(sorted(waits))

    def _addresses_of(self, backends: Iterable[Address]) -> list[str]:
        known = self._backends.addresses
        return [address_text(one) for backend in backends for _, one in known.get(backend, ())]

    def _health_of(self, vhost: VirtualHost) -> list[dict[str, object]]:
        """What checks have found of a virtual host's backends; nothing if there are none."""
        if vhost.health is None:
            return []
        found = []
        for backend in dict.fromkeys(str(backend) for _, backend in vhost.all_backends):
            check = Check(backend, vhost.health.plan, vhost.send_proxy)
            state = self._backends.states.get(check)
            since = state and datetime.fromtimestamp(state.since, UTC)
            found.append(
                {
                    "backend": backend,
                    "up": state is None or state.up,
                    "since": since and since.isoformat(timespec="seconds"),
                    "reason": state and state.reason,
                }
            )
        return found

    def all(self) -> dict[str, object]:
        """For ``titus-py status`` and the metrics."""
        serving = self._generations.serving
        now = datetime.now(UTC)
        credentials = [one for one in serving.certificates if one.directory is None]
        live = _live(self._generations)
        positions = {credential: position for position, credential in enumerate(credentials)}
        return {
            "version": self.version,
            "pid": os.getpid(),
            "started": self.started.isoformat(),
            "seconds_up": round(time.monotonic() - self.begun),
            "listeners": [str(address) for address in self._listeners.open],
            "generations": [
                {
                    "number": generation.number,
                    "state": generation.state,
                    "since": generation.started.isoformat(),
                    "seconds": round(time.monotonic() - generation.begun),
                    "parent": generation.parent and generation.parent.pid,
                    "keyd": generation.keyd and generation.keyd.pid,
                    "connections": len(generation.connections),
                    "spares": generation.spares,
                    "workers_that_stay": generation.stay,
                    "huge_pages": generation.huge_pages,
                    "huge_pages_of_code": generation.huge_pages_of_code,
                }
                for generation in self._generations
            ],
            "lost": self._lost.names,
            "lost_because": self._lost.reason,
            "processes": [one.status for one in self._unprivileged if one.status is not None],
            "vhosts": [
                {
                    "names": vhost.sni,
                    "local_address": vhost.local_address,
                    "local_port": vhost.local_port,
                    "backend": ", ".join(map(str, vhost.backend)),
                    "balance": vhost.balance if len(vhost.backend) > 1 else None,
                    "send_proxy": vhost.send_proxy,
                    "source_address": vhost.source_address,
                    "addresses": self._addresses_of(vhost.backend),
                    "alpn": vhost.alpn,
                    "backends": [
                        {
                            "protocol": protocol,
                            "backend": ", ".join(map(str, backends)),
                            "addresses": self._addresses_of(backends),
                        }
                        for protocol, backends in vhost.backends.items()
                    ],
                    "clients": [_client(one, live) for one in vhost.client],
                    "health": self._health_of(vhost),
                    "certificates": [positions[one] for one in vhost.credentials.values()],
                    "certificate_dir": vhost.certificate_dir and str(vhost.certificate_dir),
                }
                for vhost in serving.configuration.vhost
            ],
            "tunnels": [
                {
                    "listen": str(tunnel.listen),
                    "connect": ", ".join(map(str, tunnel.connect)),
                    "balance": tunnel.balance if len(tunnel.connect) > 1 else None,
                    "addresses": self._addresses_of(tunnel.connect),
                    "server_name": tunnel.verified_name,
                    "ca": tunnel.ca and str(tunnel.ca),
                    "pins": len(tunnel.pins or ()),
                }
                for tunnel in serving.configuration.tunnel
            ],
            "certificates": [
                {
                    "file": str(credential.certificate),
                    "subject": facts.subject,
                    "names": facts.names,
                    "not_after": facts.not_after.isoformat(),
                    "days_left": (facts.not_after - now).days,
                }
                for credential in credentials
                for facts in (serving.certificates[credential],)
            ],
            "client_authorities": _client_files(serving.checked.authorities, now),
            "tokens": [{"token": token, "state": state} for token, state in serving.tokens],
            "upstreams": [one._asdict() for one in serving.upstreams],
            "lending": _lending(self._generations),
            "certificate_dirs": _directories(serving.certificates, now),
            "certificates_kept": len({credential for credential, _ in serving.checked.kept}),
            "max_connections": serving.configuration.worker.max,
            "log_lines_lost": self._record.log.lost,
            "immortal_objects": immortal.AVAILABLE,
            "counts": self._record.metrics.counts(),
        }
