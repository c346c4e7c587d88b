"""In which order a virtual host's backends are tried for a client. Run by the parent."""

from collections.abc import Callable, Sequence
from zlib import crc32

from titus_py.parent.backend import Backend

__all__ = ["Balance"]

_64_BITS = (1 << 64) - 1


class Balance:
    """The backends of one virtual host. ``how`` is its ``balance``."""

    def __init__(self, how: str, backends: Sequence[Backend]) -> None:
        self.backends = backends
        self._turn = 0
        self._arrange: Callable[[str], list[Backend]] = {
            "round-robin": self._in_turn,
            "priority": self._as_listed,
            "least-connections": self._by_connections,
            "source": self._by_source,
        }[how]

    def order(self, client: str) -> list[Backend]:
        """The backends that are up, the one to try first first.

        ``client`` is the client's address. Backends to which connecting has just failed come last.
        """
        if len(self.backends) == 1:
            arranged = list(self.backends)
        else:
            arranged = sorted(self._arrange(client), key=lambda backend: backend.comes_last)
        return [backend for backend in arranged if backend.up]

    def _as_listed(self, _: str) -> list[Backend]:
        return list(self.backends)

    def _in_turn(self, _: str) -> list[Backend]:
        first, self._turn = self._turn, (self._turn + 1) % len(self.backends)
        return [*self.backends[first:], *self.backends[:first]]

    def _by_connections(self, client: str) -> list[Backend]:
        """Those with the fewest connections first; in turn, where they have the same number."""
        return sorted(self._in_turn(client), key=lambda backend: backend.connections)

    def _by_source(self, client: str) -> list[Backend]:
        """By a hash of client and backend (rendezvous hashing), the same in every parent.

        When a backend fails, only its own clients go elsewhere, and not all to the same one.
        """
        of_client = crc32(client.encode()) << 32
        return sorted(
            self.backends, key=lambda backend: _mixed(of_client | crc32(backend.name.encode()))
        )


def _mixed(number: int) -> int:
    """A number of 64 bits, each of which depends on all of the argument's (MurmurHash3's end).

    CRC-32 alone would not do: it is linear, so that all clients would agree on too much. hashlib
    would load OpenSSL, and hash() differs from one process to the next.
    """
    number ^= number >> 33
    number = number * 0xFF51AFD7ED558CCD & _64_BITS
    number ^= number >> 33
    number = number * 0xC4CEB9FE1A85EC53 & _64_BITS
    return number ^ number >> 33
