"""Turns a file, or a few options, into a configuration or into every mistake in it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from titus_py.configuration.across_tables import (
    certificate_mistakes,
    certificates_not_asked_for,
    each_valid,
    empty_directories,
    key_mistakes,
    listed,
    never_matching,
    never_received,
    shared_backends,
    too_many,
    uid_mistakes,
    uid_warnings,
)
from titus_py.configuration.address import IPAddress, UnixAddress
from titus_py.configuration.addresses_in_use import address_mistakes, metrics_warnings
from titus_py.configuration.backend_groups import unreachable_sockets
from titus_py.configuration.client_certificates import client_files, client_mistakes
from titus_py.configuration.client_table import ClientFiles
from titus_py.configuration.descriptors import descriptor_warnings
from titus_py.configuration.explained import explained
from titus_py.configuration.exposure import exposed_files, exposed_sockets
from titus_py.configuration.include import Unreadable, include, read_file
from titus_py.configuration.ineffective import ineffective_settings
from titus_py.configuration.lending import (
    lending_in_company,
    lending_mistakes,
    lending_socket,
    lending_to_more,
    lent_keys,
    lent_to_nobody,
)
from titus_py.configuration.mistake import Mistake, Source, os_reason
from titus_py.configuration.tables import (
    Configuration,
    Credential,
    Credentials,
    LentKey,
    Listen,
    Match,
    Tunnel,
)
from titus_py.configuration.transparency import transparency_mistakes
from titus_py.configuration.tunnels import missing_tables, tunnel_mistakes
from titus_py.configuration.upstreams import unreachable_upstreams

__all__ = ["Loaded", "from_options", "load"]


class Loaded(NamedTuple):
    """A configuration, or every mistake in it.

    ``configuration`` is None exactly if there are mistakes. ``credentials`` are the
    certificates with their keys, each with the places of its settings (``vhost[0].``). They are
    there even if other parts of the file are mistaken, so that their files can be checked too.
    """

    source: Source
    configuration: Configuration | None
    mistakes: list[Mistake]
    warnings: list[Mistake]
    credentials: Mapping[Credential, Sequence[str]]
    #: Likewise, the files that client certificates are judged by.
    client_files: Mapping[ClientFiles, Sequence[str]] = {}
    #: Likewise, the keys that are lent to other hosts.
    lent: Mapping[LentKey, Sequence[str]] = {}


def load(path: str | Path, credentials: Path | None = None) -> Loaded:
    """The configuration in a TOML file. Raises nothing: what is wrong is in ``mistakes``.

    ``credentials`` is the directory with the unit's systemd credentials; None: this process's own.
    """
    source = Source(str(path), Path(path).parent, credentials=credentials or _own_credentials())
    try:
        tables, lines = read_file(path)
        source = source._replace(directory=Path(os.path.abspath(path)).parent)
    except (Unreadable, OSError) as error:
        line, reason = (
            (error.line, error.reason)
            if isinstance(error, Unreadable)
            else (None, os_reason(error))
        )
        return _failed(source._replace(lines={"": line or 0}), "", reason)
    included = include(tables, source._replace(lines=lines))
    loaded = _validated(included.tables, included.source, included.files)
    mistakes = included.mistakes + loaded.mistakes
    return loaded._replace(
        configuration=None if mistakes else loaded.configuration,
        mistakes=mistakes,
        warnings=included.warnings + loaded.warnings,
    )


def _own_credentials() -> Path | None:
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    return None if directory is None else Path(directory)


def from_options(
    listen: Sequence[str],
    backend: str,
    certificate: str,
    key: str,
    credentials: Path | None = None,
) -> Loaded:
    """The configuration that a few command-line options stand for: one virtual host for all.

    Relative paths are relative to the working directory. Raises FileNotFoundError where that
    is gone, and nothing else: what is wrong is in ``mistakes``.
    """
    options = {
        "listen": "--listen",
        "listen.address": "--listen",
        "vhost.backend": "--backend",
        "vhost.certificate": "--cert",
        "vhost.key": "--key",
    }
    tables = {
        "listen": [{"address": address} for address in listen],
        "vhost": [{"backend": backend, "certificate": certificate, "key": key}],
    }
    directory = credentials or _own_credentials()
    return _validated(tables, Source("", Path.cwd(), options, credentials=directory))


def _starts_keyd(tables: dict[str, Any]) -> bool:
    keyd = tables["keyd"]
    return not (isinstance(keyd, dict) and "socket" in keyd)


def _failed(source: Source, key: str, reason: str) -> Loaded:
    return Loaded(source, None, [source.mistake(key, reason)], [], {})


def _validated(content: dict[str, Any], source: Source, included: Sequence[str] = ()) -> Loaded:
    # Absent tables are added, so that their defaults are validated in the same pass.
    tables = {
        "worker": {},
        "limits": {},
        "keyd": {},
        "log": {},
        "metrics": {},
        "service": {},
    } | content
    configuration = None
    mistakes = list(missing_tables(tables, source))
    try:
        configuration = Configuration.model_validate(tables, context=source)
    except ValidationError as error:
        mistakes += [explained(details, source) for details in error.errors(include_url=False)]

    # Checks across several tables are made on the valid ones, whatever is wrong with others.
    listeners = {i: table.address for i, table in each_valid(Listen, tables, "listen", source)}
    vhosts = dict(each_valid(Match, tables, "vhost", source))
    for i, match in vhosts.items():
        if "certificate_dir" in tables["vhost"][i]:
            # Its names are in files that are not read here, and may not be there: it may take any
            # that no other takes.
            vhosts[i] = match.model_copy(update={"sni": (f"{i}.certificate_dir",)})
    mistakes += uid_mistakes(tables, source)
    mistakes += certificate_mistakes(tables, source)
    mistakes += key_mistakes(tables, source)
    mistakes += client_mistakes(tables, source)
    mistakes += certificates_not_asked_for(tables, source)
    mistakes += transparency_mistakes(tables, source)
    mistakes += tunnel_mistakes(tables, source)
    mistakes += lending_mistakes(tables, source)
    mistakes += address_mistakes(tables, listeners, source)
    transparent = any(
        table.transparent for _, table in each_valid(Listen, tables, "listen", source)
    )
    if listeners and len(listeners) == len(tables["listen"]) and not transparent:
        mistakes += never_received(vhosts, listeners.values(), source)
        mistakes += never_matching(vhosts, listeners.values(), source)
    else:
        # To a transparent listener, connections come that were made to any address and port.
        ports = {vhost.local_port or 0 for vhost in vhosts.values()}
        anywhere = [IPAddress("::", port) for port in ports]
        mistakes += never_matching(vhosts, anywhere, source)

    credentials: dict[Credential, list[str]] = {}
    for i, table in each_valid(Credentials, tables, "vhost", source):
        for place, credential in table.credentials.items():
            credentials.setdefault(credential, []).append(f"vhost[{i}].{place}")
        if table.certificate_dir is not None:
            for credential in listed(table.certificate_dir, with_keys=_starts_keyd(tables)):
                credentials.setdefault(credential, []).append(f"vhost[{i}].certificate_dir")
    sockets = {
        f"listen[{i}].address": address
        for i, address in listeners.items()
        if isinstance(address, UnixAddress)
    }
    for i, tunnel in each_valid(Tunnel, tables, "tunnel", source):
        if tunnel.credential is not None:
            credentials.setdefault(tunnel.credential, []).append(f"tunnel[{i}].")
        if isinstance(tunnel.listen, UnixAddress):
            sockets[f"tunnel[{i}].listen"] = tunnel.listen
    mistakes += too_many(tables, credentials, source)
    mistakes += empty_directories(tables, credentials, source)
    of_clients = client_files(tables, source)
    lent = lent_keys(tables, source)
    if (lend := lending_socket(tables, source)) is not None:
        sockets["keyd.lend"] = lend
    warnings = [
        *uid_warnings(tables, source),
        *exposed_files(credentials, lent, of_clients, included, source),
        *exposed_sockets(sockets, source),
        *shared_backends(tables, source),
        *metrics_warnings(tables, source),
    ]
    if configuration is not None:
        warnings += descriptor_warnings(configuration, source)
        warnings += ineffective_settings(configuration, source)
        warnings += unreachable_sockets(configuration, source)
        warnings += unreachable_upstreams(configuration, source)
        warnings += lent_to_nobody(configuration, source)
        warnings += lending_in_company(configuration, source)
        warnings += lending_to_more(configuration, source)
    valid = None if mistakes else configuration
    return Loaded(source, valid, mistakes, warnings, credentials, of_clients, lent)
