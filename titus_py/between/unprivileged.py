"""What every process without privilege says to the supervisor that started it.

The resolver and the metrics server read the network, and may be controlled by what they read. So
each has a uid of its own and no capability, and the supervisor decodes strictly what they say. One
message is one SOCK_SEQPACKET packet.
"""

__all__ = ["ALIVE", "READY", "Malformed"]

#: Once: confined, and ready to work.
READY = b"R"
#: Every few seconds.
ALIVE = b"A"


class Malformed(ValueError):
    """A message that neither of the two sends while it runs our code."""
