"""How the supervisor stands to the service manager: starting, serving, reloading, stopping.

Run by the supervisor. Without a service manager nothing is sent, and the rest is the same.
"""

from collections.abc import Callable

from keyd.linux.systemd import Notifier
from titus_py.between.event_loop import EventLoop

__all__ = ["Service"]


class Service:
    """``status`` is asked for the one line that ``systemctl status`` shows."""

    def __init__(self, loop: EventLoop, notify: Notifier, status: Callable[[], str]) -> None:
        self._loop = loop
        self._status = status
        self._notify = notify
        #: How often it has been told to stop.
        self.stops = 0
        self.reloading = False
        #: Set once it is over.
        self.exit_code: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What of the environment the service manager is reached by."""
        return self._notify.environment

    def ready(self) -> None:
        """New clients are served; said by the reload itself, where one goes on."""
        if not self.reloading:
            self._notify(ready=1, status=self._status())

    def begin_reload(self) -> None:
        self.reloading = True
        self._notify.reloading()

    def end_reload(self) -> None:
        self.reloading = False
        self._notify(ready=1, status=self._status())

    def stop(self, seconds: float) -> None:
        """Being stopped, which may take so long: longer than the manager may have patience."""
        self._notify(stopping=1, extend_timeout_usec=int(seconds * 1_000_000))

    def give_up(self, why: str) -> None:
        self._notify(status=f"gave up: {why}")
        self.exit_code = 1

    def tell_status(self) -> None:
        self._notify(status=self._status())

    def feed_watchdog(self) -> None:
        """Now, and again and again, where one wants to be fed."""
        if self._notify.watchdog is not None:
            self._notify(watchdog=1)
            self._loop.after(self._notify.watchdog, self.feed_watchdog)
