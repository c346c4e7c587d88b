"""Checks of [[vhost]] source_address: whether the answers of its backends could come back."""

from collections.abc import Iterator
from typing import Any

from titus_py.configuration.across_tables import each_valid
from titus_py.configuration.address import IPAddress, UnixAddress
from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.tables import Backend

__all__ = ["transparency_mistakes"]


def transparency_mistakes(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    """A backend that is to see its clients' addresses has to be on another machine."""
    for i, vhost in each_valid(Backend, tables, "vhost", source):
        if vhost.source_address is None:
            continue
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
