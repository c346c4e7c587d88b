"""The supervisor's state, as the service manager is told: starting, serving, reloading, stopping.

Run by the supervisor. Without a service manager, nothing is sent; all else is the same.
"""

from collections.abc import Callable

from keyd.linux.systemd import Notifier
from titus_py.between.event_loop import EventLoop

__all__ = ["Service"]


class Service:
    """``status`` returns the line that ``systemctl status`` shows."""

    def __init__(self, loop: EventLoop, notify: Notifier, status: Callable[[], str]) -> None:
        self._loop = loop
        self._status = status
        self._notify = notify
        #: How many times the supervisor has been told to stop.
        self.stops = 0
        self.reloading = False
        #: Set when the supervisor has to end.
        self.exit_code: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables by which the service manager is reached."""
        return self._notify.environment

    def ready(self) -> None:
        """Tell that new clients are served. During a reload, ``end_reload`` tells it."""
        if not self.reloading:
            self._notify(ready=1, status=self._status())

    def begin_reload(self) -> None:
        self.reloading = True
        self._notify.reloading()

    def end_reload(self) -> None:
        self.reloading = False
        self._notify(ready=1, status=self._status())

    def stop(self, seconds: float) -> None:
        """Tell that we stop, and how long that may take: the manager might not wait as long."""
        self._notify(stopping=1, extend_timeout_usec=int(seconds * 1_000_000))

    def give_up(self, why: str) -> None:
        self._notify(status=f"gave up: {why}")
        self.end(1)

    def not_started(self, why: str, code: int) -> None:
        self._notify(status=f"not started: {why}")
        self.end(code)

    def end(self, code: int) -> None:
        """It is over. The first exit code counts."""
        if self.exit_code is None:
            self.exit_code = code

    @property
    def ends(self) -> bool:
        """Whether nothing is to be started any more."""
        return bool(self.stops) or self.exit_code is not None

    def tell_status(self) -> None:
        self._notify(status=self._status())

    def feed_watchdog(self) -> None:
        """Tell the watchdog, if there is one, that we are alive: now and regularly."""
        if self._notify.watchdog is not None:
            self._notify(watchdog=1)
            self._loop.after(self._notify.watchdog, self.feed_watchdog)
