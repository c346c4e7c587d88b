"""Checks of [[vhost]] source_address: whether the answers of its backends could come back."""

import socket
from collections.abc import Iterator
from typing import Any

from titus_py.configuration.across_tables import each_valid
from titus_py.configuration.address import IPAddress, UnixAddress
from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.tables import Backend, Listen

__all__ = ["transparency_mistakes"]


def transparency_mistakes(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    """A backend that is to see its clients' addresses is on another machine, of their family."""
    families = _client_families(tables, source)
    for i, vhost in each_valid(Backend, tables, "vhost", source):
        if vhost.source_address is None:
            continue
        reached: dict[str, bool] = {}
        for setting, backend in vhost.all_backends:
            # A loopback address is another mistake.
            fits = not isinstance(backend, IPAddress) or (
                backend.family in families or backend.is_loopback
            )
            reached[setting] = reached.get(setting, False) or fits
        for setting in (setting for setting, any_fits in reached.items() if not any_fits):
            yield source.mistake(
                f"vhost[{i}].{setting}",
                "no client's address can be used to connect to it: IPv4 clients need a backend "
                "with an IPv4 address, IPv6 clients one with an IPv6 address",
            )
        for setting, backend in vhost.all_backends:
            if isinstance(backend, UnixAddress) or (
                isinstance(backend, IPAddress) and backend.is_loopback
            ):
                yield source.mistake(
                    f"vhost[{i}].{setting}",
                    f'{backend} is on this machine, and source_address = "client" takes a backend '
                    "whose answers to the client's address come back through this machine: use "
                    "send_proxy instead, or a backend on another machine",
                )


def _client_families(tables: dict[str, Any], source: Source) -> set[socket.AddressFamily]:
    """Of which families clients can be; both where that is not known."""
    families: set[socket.AddressFamily] = set()
    listeners = [table for _, table in each_valid(Listen, tables, "listen", source)]
    for table in listeners:
        address = table.address
        any_family = table.accept_proxy_from is not None
        if isinstance(address, IPAddress):
            families.add(address.family)
            any_family = any_family or address.host == "::"
        if any_family:
            families |= {socket.AF_INET, socket.AF_INET6}
    all_are_valid = bool(listeners) and len(listeners) == len(tables["listen"])
    return families if all_are_valid else {socket.AF_INET, socket.AF_INET6}
