"""Whether a certificate is for the names of a virtual host, as clients will judge it."""

from collections.abc import Collection, Sequence

__all__ = ["uncovered"]


def uncovered(server_names: Sequence[str], certified: Collection[str]) -> list[str]:
    """The server names that no name of the certificate covers (RFC 9525 §6.3).

    ``certified`` are the names in its subjectAltName. ``*.`` in front stands for exactly one
    label, in both lists. No number of other names covers ``*.example.org``.
    """
    names = {name.lower() for name in certified}
    return [
        name
        for name in server_names
        # "" is for clients that send no name: they connect by an address that is unknown here.
        if name and name not in names and "*." + name.partition(".")[2] not in names
    ]
