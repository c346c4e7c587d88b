"""Checks of [[tunnel]]: whether the settings fit, and whether there is anything to serve at all.

Run by the supervisor (root) and by commands, on the tables that are valid, whatever is wrong with
others.
"""

from collections.abc import Iterator
from typing import Any

from titus_py.configuration.across_tables import each_valid
from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.tunnel_table import Tunnel, misfits

__all__ = ["missing_tables", "tunnel_mistakes"]


def tunnel_mistakes(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    for i, tunnel in each_valid(Tunnel, tables, "tunnel", source):
        for field, reason in misfits(tunnel):
            yield source.mistake(f"tunnel[{i}].{field}", reason)


def missing_tables(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    """An instance has listeners with virtual hosts, or tunnels, or both."""
    for name, other in (("listen", "vhost"), ("vhost", "listen")):
        none = tables.get(name, []) == []
        if none and (tables.get(other) or not tables.get("tunnel")):
            what = " is needed" if name in tables else f" [[{name}]] is needed"
            yield source.mistake(name, f"at least one{what}")
