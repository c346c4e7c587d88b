"""What comes of a conversation: an alert's description, or one of two words."""

from collections.abc import Callable
from typing import NamedTuple

from tlslite.constants import AlertDescription

from .client import DATA, NAMES, Alerted, Client, Closed, Version

__all__ = ["CLOSED", "SERVED", "Conversation", "Converse", "after_the_handshake", "outcome"]

Converse = Callable[[Client], object]

#: It goes on: data comes back from the backend.
SERVED = "served"
#: The connection ended without an alert.
CLOSED = "closed"


class Conversation(NamedTuple):
    """What a client says, and what is to come of it, by which section of RFC 8446 or of another.

    A remark says where OpenSSL does something else than the RFC would have.
    """

    what: str
    version: Version
    section: str
    expected: str
    converse: Converse
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.what} ({NAMES[self.version]})"


def after_the_handshake(*records: tuple[int, bytes]) -> Converse:
    """A connection as it should be, and then these records."""

    def converse(client: Client) -> None:
        client.shake_hands()
        for kind, content in records:
            client.record(kind, content)

    return converse


def outcome(client: Client, converse: Converse) -> str:
    """Have this conversation and say how it ended, an alert by its name."""
    try:
        try:
            converse(client)
            client.record(DATA, b"ping")
            if client.receive(4) == b"ping":
                return SERVED
        except (BrokenPipeError, ConnectionResetError):
            # It was ended while the client was talking: what was said before that?
            while True:
                client.hear()
    except Alerted as alert:
        return str(AlertDescription.toRepr(alert.description))
    except Closed:
        pass
    return CLOSED
