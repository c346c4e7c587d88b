"""What a parent knows of one backend. Run by the parent."""

import time

from titus_py.between.plan import ResolvedAddress

__all__ = ["Backend"]

#: For how long a backend is tried last, after connecting to it has failed.
_LAST_SECONDS = 10.0


class Backend:
    """One backend, by its configured address. Several virtual hosts may have it."""

    __slots__ = ("_failed", "addresses", "connections", "name")

    def __init__(self, name: str, addresses: tuple[ResolvedAddress, ...]) -> None:
        self.name = name
        self.addresses = addresses
        #: How many workers have a connection to it.
        self.connections = 0
        self._failed: float | None = None

    def worked(self) -> None:
        self._failed = None

    def failed(self) -> None:
        """Connecting has failed, for whatever reason."""
        self._failed = time.monotonic()

    @property
    def comes_last(self) -> bool:
        """Whether others are to be tried before this one: it has just failed."""
        return self._failed is not None and time.monotonic() - self._failed < _LAST_SECONDS
