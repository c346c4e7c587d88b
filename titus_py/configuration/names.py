"""Whether a certificate is for the names that a virtual host takes: as clients will judge it."""

from collections.abc import Collection, Sequence

__all__ = ["uncovered"]


def uncovered(server_names: Sequence[str], certified: Collection[str]) -> list[str]:
    """Those server names that no name of the certificate stands for (RFC 9525 §6.3).

    ``certified`` are those of its subjectAltName. ``*.`` in front stands for exactly one label, and
    in both alike: ``*.example.org`` is not covered by any number of names.
    """
    names = {name.lower() for name in certified}
    return [
        name
        for name in server_names
        # None sent (""): then the client has connected by address, which nobody can tell here.
        if name and name not in names and "*." + name.partition(".")[2] not in names
    ]
