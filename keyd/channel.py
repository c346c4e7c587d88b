"""One connection's way to keyd: its terms, what was refused, and the answer to a request.

Run by keyd's threads, by one of them at a time for each channel. Who is at the other end is trusted
with nothing.
"""

import socket
import time
from collections.abc import Callable
from contextlib import suppress

from keyd.protocol import Done, Grants, Open, Refusal, Reply, Status

__all__ = ["Channel", "Refused", "reply"]


class Channel:
    """One connection's way to keyd, and what is left of its terms."""

    __slots__ = ("connection", "deadline", "grants", "once", "operations", "record", "socket")

    def __init__(
        self,
        terms: Open,
        grants: Grants,
        endpoint: socket.socket,
        record: Callable[[Refusal | Done], None],
        once: bool,
    ) -> None:
        self.socket = endpoint
        #: Whether it is closed once a request has been answered.
        self.once = once
        self.record = record
        self.connection = terms.connection
        self.deadline = time.monotonic() + terms.lifetime_ms / 1000
        self.operations = terms.operations
        self.grants = grants


class Refused(Exception):
    """A request that is not done; the text says what was asked."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def reply(channel: Channel, answer: Reply) -> None:
    """Send a reply. It is lost if the worker does not read it, or is gone."""
    with suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
        channel.socket.send(answer.encode(), socket.MSG_DONTWAIT)
