"""Which tunnels' servers a reload may no longer accept: ``titus-py reload --cut``.

Run by the supervisor. Nobody has kept which key or certificate each server has shown. So if a
tunnel accepts less than before, all of its connections are ended, and are made again by the new
configuration.
"""

from titus_py.between.tunnel_terms import TunnelTerms
from titus_py.configuration import Tunnel
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.planning import tunnel_terms

__all__ = ["stricter_tunnels"]


def stricter_tunnels(earlier: Generation, serving: Generation) -> list[int]:
    """The numbers of tunnels of an earlier generation that accept less now, or are gone."""
    now = {one.listen: terms for one, terms in _terms(serving)}
    found = []
    for number, (tunnel, before) in enumerate(_terms(earlier)):
        after = now.get(tunnel.listen)
        if after is None or (
            (after.authorities and after.authorities != before.authorities)
            or (after.authorities and after.server_name != before.server_name)
            or (after.pins and not (before.pins and set(before.pins) <= set(after.pins)))
            or set(before.connect) - set(after.connect)
        ):
            found.append(number)
    return found


def _terms(generation: Generation) -> list[tuple[Tunnel, TunnelTerms]]:
    """Its tunnels, each with what it is to do."""
    wanted = generation.configuration
    return [(one, tunnel_terms(one, wanted, generation.checked)) for one in wanted.tunnel]
