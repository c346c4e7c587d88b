"""Which keys are for a client: those of the virtual host that its server name selects.

A set may also have keys to sign with as a client: those are for whatever its server is.

Run by keyd, on what its parent has announced, and on a name that a client chose. The rule is the
worker's (``titus_py.between.virtual_host``), and a test holds the two together. Here it is looked
up, since a directory has thousands of names.
"""

from keyd.protocol import ANY_NAME, Grant, Grants, Malformed, Power

__all__ = ["Sites"]

_NOTHING: Grants = {}


class Sites:
    """The virtual hosts of one set of grants."""

    def __init__(self) -> None:
        #: By name, as ``Grant`` has it: the virtual host that has it, and its grants.
        self._sites: dict[str, tuple[int, dict[bytes, frozenset[Power]]]] = {}
        #: Whether its keys sign as a client; None: there are none yet.
        self.as_client: bool | None = None

    def add(self, grant: Grant) -> None:
        """Raises Malformed for a virtual host that comes after one with a higher number.

        And for keys of a server and of a client in one set.
        """
        as_client = Power.SIGN_TLS13_CLIENT in grant.powers
        if self.as_client not in (None, as_client) or (as_client and len(grant.powers) > 1):
            raise Malformed("a set of grants for a server and for a client")
        self.as_client = as_client
        site, grants = self._sites.setdefault(grant.name, (grant.site, {}))
        if grant.site < site:
            raise Malformed(f"grants for virtual host {grant.site} after those for {site}")
        # Of several virtual hosts with one name, the first is always taken.
        if grant.site == site:
            grants[grant.key] = grants.get(grant.key, frozenset()) | grant.powers

    def has(self, grant: Grant) -> bool:
        """Whether adding this would change nothing."""
        site, grants = self._sites.get(grant.name, (None, _NOTHING))
        if site is None or grant.site < site:
            return False
        return grant.site > site or grant.powers <= grants.get(grant.key, frozenset())

    def select(self, server_name: str | None) -> Grants:
        """The grants of the virtual host with this name (RFC 6066 §3); None: none was sent.

        Case and a trailing dot do not matter. A name that is there as it is comes before a
        wildcard of the same virtual host.
        """
        names = [ANY_NAME]
        if server_name is None:
            names.append("")
        elif server_name.isascii() and (name := server_name.removesuffix(".").lower()):
            label, dot, parent = name.partition(".")
            names = [name, f"*.{parent}", ANY_NAME] if label and dot else [name, ANY_NAME]
        found = [self._sites[name] for name in names if name in self._sites]
        return min(found, key=lambda one: one[0])[1] if found else _NOTHING
