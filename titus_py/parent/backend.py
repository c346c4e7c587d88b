"""What a parent knows of one backend. Run by the parent."""

import time

from titus_py.between.plan import Check, ResolvedAddress, State

__all__ = ["Backend"]

#: For how long a backend is tried last, after connecting to it has failed.
_LAST_SECONDS = 10.0


class Backend:
    """One backend, by its configured address, and how it is checked.

    Several virtual hosts may have it.
    """

    __slots__ = ("_failed", "addresses", "check", "connections", "name", "state")

    def __init__(
        self,
        name: str,
        addresses: tuple[ResolvedAddress, ...],
        check: Check | None = None,
        state: State | None = None,
    ) -> None:
        self.name = name
        self.addresses = addresses
        #: None if it is not checked.
        self.check = check
        #: What the checks have found; None if that is not known yet.
        self.state = state
        #: How many workers have a connection to it.
        self.connections = 0
        self._failed: float | None = None

    @property
    def up(self) -> bool:
        """Whether it may get connections: as far as the checks know, if there are any."""
        return self.state is None or self.state.up

    def worked(self) -> None:
        self._failed = None

    def failed(self) -> None:
        """Connecting has failed, for whatever reason."""
        self._failed = time.monotonic()

    @property
    def comes_last(self) -> bool:
        """Whether others are to be tried before this one: it has just failed."""
        return self._failed is not None and time.monotonic() - self._failed < _LAST_SECONDS
