"""What ``titus-py check`` finds outside of the configuration: warnings, not mistakes.

Run by ``titus-py check`` alone: it may ask name servers, and no serving process waits for them.
A backend may be started later; a unit may have been given another sandbox.
"""

import itertools
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from titus_py.commands.taken_addresses import taken_addresses
from titus_py.configuration import Configuration, Loaded, Mistake, Source
from titus_py.configuration.address import NameAddress, UnixAddress
from titus_py.supervisor.control import CONTROL_DIRECTORY

__all__ = ["warnings"]

#: How long all names together may take.
_RESOLVE_SECONDS = 5.0
#: Where ``make install``, the package and administrators put unit files.
_UNITS = ("/usr/lib/systemd/system", "/usr/local/lib/systemd/system", "/etc/systemd/system")
#: Where systemd makes what these settings name, for the unit to write to.
_MADE_BY_SYSTEMD = {
    "RuntimeDirectory": "/run",
    "StateDirectory": "/var/lib",
    "CacheDirectory": "/var/cache",
    "LogsDirectory": "/var/log",
}
#: What the units hide, and by which setting (systemd.exec(5)).
_HIDDEN = {
    "/home": "ProtectHome=",
    "/root": "ProtectHome=",
    "/run/user": "ProtectHome=",
    "/tmp": "PrivateTmp=",  # noqa: S108 -- not used, but warned of
    "/var/tmp": "PrivateTmp=",  # noqa: S108
}


def warnings(loaded: Loaded) -> list[Mistake]:
    """The warnings for a configuration; none if it has mistakes."""
    configuration, source = loaded.configuration, loaded.source
    if configuration is None:
        return []
    return [
        *_what_is_not_there(configuration, source),
        *_unresolved(configuration, source),
        *_hidden_from_the_unit(configuration, source),
        *_kept_from_the_unit(configuration, source),
        *_not_writable_for_the_unit(configuration, source),
        *taken_addresses(configuration, source, _binds_freely(source)),
    ]


def _what_is_not_there(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    made_at_start = configuration.keyd.lend
    for i, vhost in enumerate(configuration.vhost):
        for setting, backend in vhost.all_backends:
            if backend == made_at_start or not isinstance(backend, UnixAddress):
                continue
            if not Path(backend.path).is_socket():
                reason = f"no socket is at {backend.path}: does the backend run?"
                yield source.mistake(f"vhost[{i}].{setting}", reason)
    for i, tunnel in enumerate(configuration.tunnel):
        for server in tunnel.connect:
            if isinstance(server, UnixAddress) and not Path(server.path).is_socket():
                reason = f"no socket is at {server.path}: does the server run?"
                yield source.mistake(f"tunnel[{i}].connect", reason)
    for setting, path in _sockets_for_clients(configuration):
        if path.parent != CONTROL_DIRECTORY and not path.parent.is_dir():
            reason = f"there is no directory {path.parent}: does the unit make it"
            yield source.mistake(setting, f"{reason} (RuntimeDirectory=)?")


def _sockets_for_clients(configuration: Configuration) -> Iterator[tuple[str, Path]]:
    """Those that titus-py makes, each with the setting that says where."""
    addresses = [
        (f"listen[{i}].address", one.address) for i, one in enumerate(configuration.listen)
    ]
    addresses += [(f"tunnel[{i}].listen", one.listen) for i, one in enumerate(configuration.tunnel)]
    rest = (
        ("metrics.address", configuration.metrics.address),
        ("keyd.lend", configuration.keyd.lend),
    )
    for setting, address in (*addresses, *rest):
        if isinstance(address, UnixAddress):
            yield setting, Path(address.path)


def _unresolved(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    users: dict[NameAddress, list[str]] = {}
    for i, vhost in enumerate(configuration.vhost):
        for setting, backend in vhost.all_backends:
            if isinstance(backend, NameAddress):
                users.setdefault(backend, []).append(f"vhost[{i}].{setting}")
    for i, tunnel in enumerate(configuration.tunnel):
        for server in tunnel.connect:
            if isinstance(server, NameAddress):
                users.setdefault(server, []).append(f"tunnel[{i}].connect")
    why = _looked_up(list(users))
    for backend, (first, *others) in users.items():
        if reason := why.get(backend, f"no answer within {_RESOLVE_SECONDS:g} s"):
            also = f" (also {', '.join(map(source.reference, others))})" if others else ""
            text = f"{backend.name} cannot be resolved: {reason}{also}"
            yield source.mistake(first, text)


def _looked_up(backends: Sequence[NameAddress]) -> dict[NameAddress, str]:
    """Why a name has no address, or "" if it has one; names that take too long are left out."""
    found: dict[NameAddress, str] = {}

    def look_up(backend: NameAddress) -> None:
        try:
            socket.getaddrinfo(backend.name, backend.port, type=socket.SOCK_STREAM)
        except OSError as error:
            found[backend] = error.strerror or str(error)
        else:
            found[backend] = ""

    threads = [threading.Thread(target=look_up, args=[one], daemon=True) for one in backends]
    for thread in threads:
        thread.start()
    until = time.monotonic() + _RESOLVE_SECONDS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return found.copy()


def _hidden_from_the_unit(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    """Paths that the unit hides from titus-py, and not from ``check``, which runs outside of it."""
    unit = _unit_of(source)
    if unit is None:
        return
    paths = [("keyd.socket", configuration.keyd.socket), *_sockets_for_clients(configuration)]
    for i, client in enumerate(configuration.keyd.client):
        paths += [(f"keyd.client[{i}].keys", key) for lent in client.lent for key in lent.secrets]
    for i, vhost in enumerate(configuration.vhost):
        for place, credential in vhost.credentials.items():
            for field, path in credential._asdict().items():
                paths.append((f"vhost[{i}].{place}{field}", path))
        paths.append((f"vhost[{i}].certificate_dir", vhost.certificate_dir))
        for setting, backend in vhost.all_backends:
            if isinstance(backend, UnixAddress):
                paths.append((f"vhost[{i}].{setting}", Path(backend.path)))
    for i, tunnel in enumerate(configuration.tunnel):
        for field in ("certificate", "key", "passphrase_file", "ca"):
            paths.append((f"tunnel[{i}].{field}", getattr(tunnel, field)))
        for server in tunnel.connect:
            if isinstance(server, UnixAddress):
                paths.append((f"tunnel[{i}].connect", Path(server.path)))
    for key, path in paths:
        for directory, setting in _HIDDEN.items():
            if isinstance(path, Path) and path.resolve().is_relative_to(directory):
                reason = f"{path} is hidden from {unit} by {setting}: put it elsewhere"
                yield source.mistake(key, f"{reason}, or change that with 'systemctl edit'")


def _kept_from_the_unit(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    """The capability that the unit here leaves out, since few need it: a restart would fail."""
    unit = _unit_of(source)
    listeners, vhosts = enumerate(configuration.listen), enumerate(configuration.vhost)
    takes = [f"listen[{i}].transparent" for i, listen in listeners if listen.transparent]
    takes += [f"vhost[{i}].source_address" for i, vhost in vhosts if vhost.source_address]
    if unit is None or not takes:
        return
    bounds = [line for line in _unit_lines(unit) if line.startswith("CapabilityBoundingSet=")]
    if bounds and not any("CAP_NET_RAW" in line for line in bounds):
        edit = f"'systemctl edit {unit}', with CapabilityBoundingSet=CAP_NET_RAW in [Service]"
        reason = f"takes CAP_NET_RAW, which {unit} does not have: {edit}, and restart it"
        yield source.mistake(takes[0], reason)


def _not_writable_for_the_unit(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    """Sockets that titus-py makes where the unit lets it write nothing: a start would fail."""
    unit = _unit_of(source)
    if unit is None:
        return
    settings = [line.partition("=")[::2] for line in _unit_lines(unit)]
    # A drop-in may take it back.
    if {value for name, value in settings if name == "ProtectSystem"} != {"strict"}:
        return
    writable = [Path("/dev")]
    for name, paths in settings:
        if (root := _MADE_BY_SYSTEMD.get(name)) is not None:
            writable += [Path(root, one.partition(":")[0]) for one in paths.split()]
        elif name == "ReadWritePaths":
            writable += [Path(one.lstrip("-+")) for one in paths.split()]
        elif name == "BindPaths":
            for one in paths.split():
                # From where, to where, and how.
                here, _, there = one.lstrip("-").partition(":")
                writable.append(Path(there.partition(":")[0] or here))
    by_systemd = set(_unit_lines(_socket_of(unit)))
    for setting, path in _sockets_for_clients(configuration):
        known = f"ListenStream={path}" in by_systemd or any("%" in str(one) for one in writable)
        places = path, path.parent.resolve() / path.name
        if not known and not any(one.is_relative_to(of) for one in places for of in writable):
            edit = f"'systemctl edit {unit}', with ReadWritePaths={path.parent} in [Service]"
            reason = f"{path.parent} cannot be written to by {unit} (ProtectSystem=): {edit}"
            yield source.mistake(
                setting, f"{reason}, and restart it; or set a path in /run/titus-py"
            )


def _binds_freely(source: Source) -> bool:
    """Whether the socket unit listens on addresses that are not here yet (systemd.socket(5))."""
    unit = _unit_of(source)
    lines = _unit_lines(_socket_of(unit)) if unit else ()
    return any(re.fullmatch("FreeBind=(1|yes|true|on)", line, re.IGNORECASE) for line in lines)


def _socket_of(unit: str) -> str:
    return unit.removesuffix(".service") + ".socket"


def _unit_lines(unit: str) -> Iterator[str]:
    """What a unit's file and its drop-ins say, wherever they are: in no particular order."""
    stem, _, kind = unit.rpartition(".")
    name, _, instance = stem.partition("@")
    template = f"{name}@.{kind}" if instance else unit
    for directory in map(Path, _UNITS):
        drop_ins = (directory.glob(f"{one}.d/*.conf") for one in {template, unit})
        for file in (directory / template, *itertools.chain.from_iterable(drop_ins)):
            with suppress(OSError):
                yield from file.read_text(errors="replace").splitlines()


def _unit_of(source: Source) -> str | None:
    """The unit that serves this file, if there is one, by the places of both."""
    file = Path(source.path)
    if file.parent.name != "titus-py" or file.suffix != ".toml":
        return None
    name = "titus-py" if file.stem == "titus" else f"titus-py@{file.stem}"
    template = f"{name.partition('@')[0]}{'@' if '@' in name else ''}.service"
    installed = any(Path(directory, template).exists() for directory in _UNITS)
    return f"{name}.service" if installed else None
