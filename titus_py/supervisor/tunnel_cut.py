"""Which tunnels' servers a reload may no longer accept: ``titus-py reload --cut``.

Run by the supervisor. Nobody has kept which key or certificate each server has shown. So if a
tunnel accepts less than before, all of its connections are ended, and are made again by the new
configuration.
"""

from titus_py.supervisor.generation import Generation

__all__ = ["stricter_tunnels"]


def stricter_tunnels(earlier: Generation, serving: Generation) -> list[int]:
    """The numbers of tunnels of an earlier generation that accept less now, or are gone."""
    now = {tunnel.listen: serving.tunnel_terms(tunnel) for tunnel in serving.configuration.tunnel}
    found = []
    for number, tunnel in enumerate(earlier.configuration.tunnel):
        before, after = earlier.tunnel_terms(tunnel), now.get(tunnel.listen)
        if after is None or (
            (after.authorities and after.authorities != before.authorities)
            or (after.authorities and after.server_name != before.server_name)
            or (after.pins and not (before.pins and set(before.pins) <= set(after.pins)))
            or set(before.connect) - set(after.connect)
        ):
            found.append(number)
    return found
