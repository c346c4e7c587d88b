"""Checks of addresses: that no two settings share one, and who can come to each.

Run by the supervisor (root) and by commands, on the tables that are valid, whatever is wrong with
others.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from titus_py.configuration.across_tables import each_valid, valid_part
from titus_py.configuration.address import Address, Bindable, IPAddress, UnixAddress
from titus_py.configuration.listen_table import misfits
from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.tables import Backend, KeydSocket, Lending, Listen, Metrics, Tunnel

__all__ = ["address_mistakes", "metrics_warnings"]


def address_mistakes(
    tables: dict[str, Any], listeners: Mapping[int, Bindable], source: Source
) -> Iterator[Mistake]:
    tunnels = dict(each_valid(Tunnel, tables, "tunnel", source))
    bound: dict[str, Bindable] = {
        f"listen[{i}].address": address for i, address in listeners.items()
    }
    bound |= {f"tunnel[{i}].listen": tunnel.listen for i, tunnel in tunnels.items()}
    yield from _overlaps(bound, source)
    for i, table in each_valid(Listen, tables, "listen", source):
        for field, reason in misfits(table):
            yield source.mistake(f"listen[{i}].{field}", reason)
    backends = [
        (f"vhost[{i}].{setting}", backend)
        for i, vhost in each_valid(Backend, tables, "vhost", source)
        for setting, backend in vhost.all_backends
    ]
    servers = [
        (f"tunnel[{i}].connect", server)
        for i, tunnel in tunnels.items()
        for server in tunnel.connect
    ]
    metrics = valid_part(Metrics, tables["metrics"], source)
    address = metrics.address if metrics else None
    if address is not None:
        yield from _shared_metrics(address, bound, [*backends, *servers], source)
    yield from _looping(listeners, backends, source)
    yield from _to_a_tunnel(tunnels, servers, source)
    keyd = valid_part(KeydSocket, tables["keyd"], source)
    if keyd is not None and keyd.socket is not None:
        socket = UnixAddress(str(keyd.socket))
        for key, other in (("metrics.address", address), *bound.items(), *backends, *servers):
            if other == socket:
                yield source.mistake(key, f"{other} is keyd.socket, where keyd listens")
    lending = valid_part(Lending, tables["keyd"], source)
    if lending is not None and lending.lend is not None:
        for key, other in (("metrics.address", address), *bound.items()):
            if other == lending.lend:
                yield source.mistake(key, f"{other} is keyd.lend, too")


def metrics_warnings(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    """The metrics are neither encrypted nor kept from anybody who can connect to them."""
    metrics = valid_part(Metrics, tables["metrics"], source)
    address = metrics.address if metrics else None
    if isinstance(address, IPAddress) and not address.is_loopback:
        yield source.mistake(
            "metrics.address",
            f"{address}: other machines can connect, and anybody who does gets the metrics, in "
            f"plain text: set 127.0.0.1:{address.port} or unix:/run/titus-py/metrics.sock, or let "
            "a firewall admit only the machine that reads them",
        )


def _overlaps(bound: Mapping[str, Bindable], source: Source) -> Iterator[Mistake]:
    """``bound`` is by the keys of the settings."""
    # By port, or path: there may be thousands, and only those that share one overlap.
    before: dict[int | str, dict[str, Bindable]] = {}
    for key, address in bound.items():
        place = address.path if isinstance(address, UnixAddress) else address.port
        alike = before.setdefault(place, {})
        for other, earlier in alike.items():
            if earlier.covers(address) or address.covers(earlier):
                where = f"{source.reference(other)}, {earlier}"
                reason = f"{address} overlaps {where}: only one can be bound"
                yield source.mistake(key, reason + _both_families(address, earlier))
                break
        alike[key] = address


def _both_families(*addresses: Bindable) -> str:
    """The end of a message to those whose other servers take an address for each family."""
    inet6 = next((one for one in addresses if getattr(one, "host", "") == "::"), None)
    inet = any(getattr(one, "host", "") == "0.0.0.0" for one in addresses)
    return f", and {inet6} is for IPv4, too" if inet6 and inet else ""


def _shared_metrics(
    metrics: Bindable,
    bound: Mapping[str, Bindable],
    backends: list[tuple[str, Address]],
    source: Source,
) -> Iterator[Mistake]:
    for key, listener in bound.items():
        if listener.covers(metrics) or metrics.covers(listener):
            where = source.reference(key)
            reason = f"{metrics} overlaps {where}, {listener}: only one can be bound"
            yield source.mistake("metrics.address", reason)
    for key, backend in backends:
        if backend == metrics:
            yield source.mistake("metrics.address", f"{metrics} is {source.reference(key)}, too")
            return
        if _receives(metrics, backend):
            where = source.reference(key)
            reason = f"{metrics} overlaps {where}, {backend}: only one can be bound"
            yield source.mistake("metrics.address", reason)
            return


def _looping(
    listeners: Mapping[int, Bindable], backends: list[tuple[str, Address]], source: Source
) -> Iterator[Mistake]:
    """Backends that are listeners: each connection to one would make another, without end."""
    for key, backend in backends:
        for i, listener in listeners.items():
            if _receives(listener, backend):
                where = source.reference(f"listen[{i}].address")
                yield source.mistake(
                    key,
                    f"{backend} is {where}: the plaintext would come back here, as from a client",
                )
                break


def _to_a_tunnel(
    tunnels: Mapping[int, Tunnel], servers: list[tuple[str, Address]], source: Source
) -> Iterator[Mistake]:
    """Servers that are tunnels' clients' side, where nobody speaks TLS."""
    for key, server in servers:
        for i, tunnel in tunnels.items():
            if _receives(tunnel.listen, server):
                where = source.reference(f"tunnel[{i}].listen")
                yield source.mistake(key, f"{server} is {where}, which speaks no TLS")
                break


def _receives(listener: Address, backend: Address) -> bool:
    """Whether a connection to ``backend`` surely comes to this machine's ``listener``.

    Which addresses the machine has is not known: a wildcard is one of them where it is loopback.
    """
    if listener == backend:
        return True
    if not (isinstance(listener, IPAddress) and isinstance(backend, IPAddress)):
        return False
    return listener.is_wildcard and backend.is_loopback and listener.covers(backend)
