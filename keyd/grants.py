"""What one parent has announced that its channels may be granted.

Run by keyd's threads, one parent's messages by one of them at a time. A parent is trusted with its
terms; a set that channels were opened with does not change any more.
"""

from keyd.protocol import Grants, GrantSet, Malformed
from keyd.sites import Sites

__all__ = ["GrantSets"]


class GrantSets:
    """The sets of grants that one parent has announced, by number."""

    def __init__(self) -> None:
        self._sets: dict[int, Sites] = {}
        self._in_use: set[int] = set()

    def add(self, announced: GrantSet) -> None:
        """Raises Malformed for more in a set that channels have been opened with."""
        known = self._sets.setdefault(announced.number, Sites())
        if announced.number in self._in_use and not all(map(known.has, announced.grants)):
            raise Malformed(f"more grants for set {announced.number}, which is in use")
        for grant in announced.grants:
            known.add(grant)

    def use(self, number: int) -> Sites | Grants:
        """A set for a channel; raises Malformed for one that was not announced.

        Keys to sign with as a client do not depend on a ClientHello that somebody has seen: the
        worker itself sends it.
        """
        if number not in self._sets:
            raise Malformed(f"an open with set {number}, which was not announced")
        self._in_use.add(number)
        sites = self._sets[number]
        return sites.select(None) if sites.as_client else sites
