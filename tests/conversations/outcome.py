"""What comes of a conversation: an alert's description, or one of two words."""

from collections.abc import Callable

from tlslite.constants import AlertDescription

from .client import DATA, Alerted, Client, Closed

__all__ = ["CLOSED", "SERVED", "outcome"]

#: It goes on: data comes back from the backend.
SERVED = "served"
#: The connection ended without an alert.
CLOSED = "closed"


def outcome(client: Client, converse: Callable[[Client], object]) -> str:
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
