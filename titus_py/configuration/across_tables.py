"""Checks across several tables: made on the valid ones, whatever is wrong with others."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from keyd.protocol import MAX_KEYS
from titus_py.between.messages import MAX_VHOSTS
from titus_py.configuration.address import Address, Bindable, IPAddress, NameAddress
from titus_py.configuration.certificate_dir import pairs
from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.paths import UPSTREAM
from titus_py.configuration.tables import (
    Backend,
    Credential,
    Credentials,
    Keyd,
    KeydSocket,
    Match,
    Metrics,
    Table,
    Tunnel,
    Uids,
)
from titus_py.configuration.tokens import token_mistakes
from titus_py.configuration.uids import (
    DEFAULT_UIDS,
    GENERATIONS,
    handed_out,
    unmapped,
    users_and_groups,
)
from titus_py.configuration.upstreams import upstream_mistakes

__all__ = [
    "certificate_mistakes",
    "certificates_not_asked_for",
    "each_valid",
    "empty_directories",
    "key_mistakes",
    "listed",
    "never_matching",
    "never_received",
    "setting",
    "shared_backends",
    "too_many",
    "uid_mistakes",
    "uid_warnings",
]

_AnyTable = TypeVar("_AnyTable", bound=Table)


def each_valid(
    model: type[_AnyTable], tables: dict[str, Any], name: str, source: Source
) -> Iterator[tuple[int, _AnyTable]]:
    """The tables of an array that are valid as far as ``model`` reads them, with their indices."""
    array = tables.get(name)
    if isinstance(array, list):
        for index, table in enumerate(array):
            if (part := valid_part(model, table, source)) is not None:
                yield index, part


def valid_part(model: type[_AnyTable], table: object, source: Source) -> _AnyTable | None:
    if not isinstance(table, dict):
        return None
    known = {key: value for key, value in table.items() if key in model.model_fields}
    try:
        return model.model_validate(known, context=source)
    except ValidationError:
        return None


def uid_mistakes(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    worker = valid_part(Uids, tables["worker"], source)
    keyd = valid_part(Keyd, tables["keyd"], source)
    if worker:
        yield from _worker_uid_mistakes(worker, _others(tables, source), source)
    if worker and keyd and keyd.user.uid in worker.uids:
        yield source.mistake(
            "worker.uids",
            f"the range holds {keyd.user.uid}, which is keyd.user: no worker may run as keyd does",
        )
    if keyd and keyd.socket is None:
        yield from _keyd_uid_mistakes(keyd, source)
    if keyd and (user := keyd.token_user):
        if user.uid == keyd.user.uid:
            yield source.mistake("keyd.token_user", "is keyd.user: a module must not run as keyd")
        if worker and user.uid in worker.uids:
            yield source.mistake("keyd.token_user", "is among worker.uids: set another one")
    if keyd and (user := keyd.upstream_user):
        of_keyd = {keyd.user.uid: "user", keyd.token_user and keyd.token_user.uid: "token_user"}
        if other := of_keyd.get(user.uid):
            yield source.mistake("keyd.upstream_user", f"is keyd.{other}: set one of its own")
        if worker and user.uid in worker.uids:
            yield source.mistake("keyd.upstream_user", "is among worker.uids: set another one")


def _worker_uid_mistakes(worker: Uids, others: Sequence[str], source: Source) -> Iterator[Mistake]:
    if lack := _lack_of_uids(worker, 2, others):
        yield source.mistake("worker.uids", lack)
    if reason := unmapped(worker.uids):
        yield source.mistake("worker.uids", f'{reason}: set a range within, such as "20000-39999"')
    for owner in (*users_and_groups(worker.uids), *handed_out(worker.uids)):
        yield source.mistake(
            "worker.uids",
            f"{owner}: nothing else may have a worker's uid. Free there, as a rule: "
            f"{DEFAULT_UIDS[0]} to {DEFAULT_UIDS[-1]}",
        )


def _keyd_uid_mistakes(keyd: Keyd, source: Source) -> Iterator[Mistake]:
    uid = range(keyd.user.uid, keyd.user.uid + 1)
    if reason := unmapped(uid):
        yield source.mistake("keyd.user", f"{reason}: set one within, such as 19999")
    for owner in handed_out(uid):
        yield source.mistake("keyd.user", f"{owner}: nothing else may run as keyd does")


def uid_warnings(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    worker = valid_part(Uids, tables["worker"], source)
    others = _others(tables, source)
    if (
        worker
        and not _lack_of_uids(worker, 2, others)
        and (lack := _lack_of_uids(worker, GENERATIONS, others))
    ):
        yield source.mistake("worker.uids", lack)


def _others(tables: dict[str, Any], source: Source) -> list[str]:
    """The processes beside the workers that have one uid each."""
    names = any(
        isinstance(backend, NameAddress)
        for _, vhost in each_valid(Backend, tables, "vhost", source)
        for _, backend in vhost.all_backends
    ) or any(
        isinstance(server, NameAddress)
        for _, tunnel in each_valid(Tunnel, tables, "tunnel", source)
        for server in tunnel.connect
    )
    metrics = valid_part(Metrics, tables["metrics"], source)
    found = ["the resolver, for names of backends"] if names else []
    return [*found, "what serves the metrics"] if metrics and metrics.address else found


def _lack_of_uids(worker: Uids, generations: int, others: Sequence[str]) -> str | None:
    """What to report if so many generations have too few uids; None if there are enough.

    ``others`` are processes with one of them each.
    """
    each = worker.max + worker.spare + 1
    if len(worker.uids) >= generations * each + len(others):
        return None
    first = worker.uids[0]
    what = {
        2: "a reload starts as many again beside those that serve",
        3: "once a reload has left connections behind, another one has to wait for their end",
    }[generations]
    also = f" (and {', and '.join(others)})" if others else ""
    return (
        f"{len(worker.uids)} uids are too few for max + spare = {each - 1} workers and their "
        f"parent, each with one of its own{also}: {what}. "
        f'Make it "{first}-{first + GENERATIONS * each + len(others) - 1}"'
    )


def key_mistakes(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    """Either titus-py starts a keyd, which needs every key, or another keyd has them all."""
    keyd = valid_part(KeydSocket, tables["keyd"], source)
    if keyd is None:
        return
    whole = valid_part(Keyd, tables["keyd"], source)
    if whole is not None and whole.socket is not None and whole.upstream is not None:
        yield source.mistake(
            "keyd.upstream",
            f"does not go with keyd.socket: the keyd at {whole.socket} has its own keys, and only "
            "a keyd that titus-py starts asks other hosts",
        )
    for place, table in _with_certificate(tables):
        if keyd.socket is None:
            yield from token_mistakes(place, table, whole, source)
            yield from upstream_mistakes(place, table, whole, source)
        if keyd.socket is None and "key" not in table:
            yield source.mistake(f"{place}.key", "is missing")
        elif keyd.socket is not None:
            for field in ("key", "passphrase_file"):
                if field in table:
                    why = "not for this program to read"
                    if table[field] == UPSTREAM:
                        why = "no other host's: only a keyd that titus-py starts asks other hosts"
                    yield source.mistake(
                        f"{place}.{field}", f"is {why}: the keyd at {keyd.socket} has the keys"
                    )


def certificate_mistakes(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    """A virtual host has one certificate, or tables with several of them."""
    for i, vhost in _tables(tables.get("vhost")):
        if vhost.get("certificate_dir") is not None:
            reason = "does not go with certificate_dir, which has names, certificates and keys"
            for field in ("sni", "certificate", "key", "passphrase_file", "certificates"):
                if vhost.get(field):
                    yield source.mistake(f"vhost[{i}].{field}", reason)
        elif vhost.get("certificates"):
            reason = "goes into one of the tables [[vhost.certificates]]"
            for field in ("certificate", "key", "passphrase_file"):
                if vhost.get(field) is not None:
                    yield source.mistake(f"vhost[{i}].{field}", reason)
        elif "certificate" not in vhost:
            yield source.mistake(f"vhost[{i}].certificate", "is missing")


def listed(directory: Path, with_keys: bool) -> list[Credential]:
    """The credentials of a ``certificate_dir``; none if it cannot be read."""
    try:
        found = pairs(directory)
    except OSError:  # It has gone since it was found.
        return []
    return [
        Credential(pair.certificate, pair.key if with_keys else None, None, directory)
        for pair in found
    ]


def empty_directories(
    tables: dict[str, Any], credentials: Collection[Credential], source: Source
) -> Iterator[Mistake]:
    """Directories without a certificate."""
    found = {credential.directory for credential in credentials}
    for i, vhost in each_valid(Credentials, tables, "vhost", source):
        directory = vhost.certificate_dir
        if directory is not None and directory not in found:
            yield source.mistake(
                f"vhost[{i}].certificate_dir",
                f"{directory}: holds no certificate: neither a subdirectory with fullchain.pem and "
                "privkey.pem nor a file NAME.pem",
            )


def setting(place: str, field: str) -> str:
    """The key of a credential's field, in a place of ``Loaded.credentials``."""
    return place if place.endswith(".certificate_dir") else place + field


def _with_certificate(tables: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tables that name a certificate and its key, and where they are."""
    for i, vhost in _tables(tables.get("vhost")):
        if not (vhost.get("certificates") or vhost.get("certificate_dir")):
            yield f"vhost[{i}]", vhost
        for j, table in _tables(vhost.get("certificates")):
            yield f"vhost[{i}].certificates[{j}]", table
    for i, tunnel in _tables(tables.get("tunnel")):
        if "certificate" in tunnel:
            yield f"tunnel[{i}]", tunnel


def _tables(value: object) -> Iterator[tuple[int, dict[str, Any]]]:
    """The tables of an array, with their indices; what is no table is a mistake already."""
    for index, table in enumerate(value if isinstance(value, list) else []):
        if isinstance(table, dict):
            yield index, table


def too_many(
    tables: dict[str, Any], credentials: Collection[Credential], source: Source
) -> Iterator[Mistake]:
    """More than one message can name: see ``titus_py.between.messages``, ``keyd.protocol``."""
    keys = {credential.key or credential.certificate for credential in credentials}
    vhosts = tables.get("vhost")
    if isinstance(vhosts, list) and len(vhosts) > MAX_VHOSTS:
        yield source.mistake("vhost", f"more than {MAX_VHOSTS} tables: split them among instances")
    if len(keys) > MAX_KEYS:
        reason = f"more than {MAX_KEYS} different keys: split them among instances"
        yield source.mistake("vhost", reason)


def shared_backends(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    """Warnings of backends that are not told which of several protocols a client speaks."""
    for i, vhost in each_valid(Backend, tables, "vhost", source):
        if (vhost.send_proxy or "").startswith("v2-tls"):
            continue
        protocols: dict[Address, list[str]] = {}
        for protocol in vhost.alpn or ():
            for backend in vhost.backends.get(protocol, vhost.backend):
                protocols.setdefault(backend, []).append(protocol)
        for backend, several in protocols.items():
            if len(several) > 1:
                yield source.mistake(
                    f"vhost[{i}].alpn",
                    f"{', '.join(several)}: {backend} gets them all, and is not told which one a "
                    "client speaks: if it cannot tell, name a backend for each "
                    'in [vhost.backends], or set send_proxy = "v2-tls"',
                )


def never_received(
    vhosts: Mapping[int, Match], listeners: Collection[Bindable], source: Source
) -> Iterator[Mistake]:
    endpoints = _endpoints(vhosts, listeners)
    ports = {listener.port for listener in listeners if isinstance(listener, IPAddress)}
    for i, vhost in vhosts.items():
        port = vhost.local_port
        if port is not None and port not in ports:
            yield source.mistake(
                f"vhost[{i}].local_port", f"can never match: nothing listens on port {port}"
            )
        elif not any(map(vhost.receives, endpoints)):
            where = f"{vhost.local_address}, port {port}" if port else f"{vhost.local_address}"
            yield source.mistake(
                f"vhost[{i}].local_address", f"can never match: nothing listens on {where}"
            )


def never_matching(
    vhosts: Mapping[int, Match], listeners: Collection[Bindable], source: Source
) -> Iterator[Mistake]:
    """The virtual hosts that never match, because earlier ones take everything.

    Each kind of connection that the virtual hosts can tell apart is tried once.
    """
    endpoints = _endpoints(vhosts, listeners)
    takers = _takers(vhosts)
    names: dict[int, list[str | None]] = {j: [] for j in vhosts}
    for name, indices in takers.items():
        for j in indices:
            names[j].append(name)
    for j, vhost in vhosts.items():
        first_takers = set()
        for endpoint, name in itertools.product(filter(vhost.receives, endpoints), names[j]):
            first = next(i for i in takers[name] if vhosts[i].receives(endpoint))
            if first == j:
                break
            first_takers.add(first)
        else:
            if first_takers:  # If empty, nothing listens there: ``never_received`` reports it.
                earlier = ", ".join(source.reference(f"vhost[{i}]") for i in sorted(first_takers))
                yield source.mistake(
                    f"vhost[{j}]", f"can never match: all that it could is taken by {earlier}"
                )


def _endpoints(vhosts: Mapping[int, Match], listeners: Collection[Bindable]) -> list[Bindable]:
    """The local addresses and ports that connections can arrive at.

    A wildcard listener is itself included: it stands for an address that no virtual host names.
    """
    named = {vhost.local_address for vhost in vhosts.values() if vhost.local_address is not None}
    return list(listeners) + [
        endpoint
        for listener in listeners
        if isinstance(listener, IPAddress) and listener.is_wildcard
        for host in sorted(named)
        if listener.covers(endpoint := IPAddress(host, listener.port))
    ]


def _takers(vhosts: Mapping[int, Match]) -> dict[str | None, list[int]]:
    """The virtual hosts, in order, that take each kind of server name that patterns tell apart.

    ``?`` stands for a label that no pattern has, None for no server name. The result agrees with
    ``virtual_host.matches``, but does not try each of thousands of patterns.
    """
    by_pattern: dict[str | None, list[int]] = {}
    for i, vhost in vhosts.items():
        for pattern in (None,) if vhost.sni is None else set(vhost.sni):
            by_pattern.setdefault(pattern, []).append(i)
    takers = {}
    kinds = sorted(pattern.replace("*", "?") for pattern in by_pattern if pattern)
    for name in ("?", None, *kinds):
        fitting = ("",) if name is None else (name, "*." + name.partition(".")[2])
        takers[name] = sorted({i for p in (None, *fitting) for i in by_pattern.get(p, ())})
    return takers


def certificates_not_asked_for(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    """Backends that are to be told of certificates that no client is asked for."""
    for i, vhost in each_valid(Backend, tables, "vhost", source):
        if vhost.send_proxy == "v2-tls-cert" and "client_certificates" not in tables["vhost"][i]:
            yield source.mistake(
                f"vhost[{i}].send_proxy",
                'no client is asked for a certificate: set client_certificates, or "v2-tls"',
            )
