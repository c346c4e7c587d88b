from collections.abc import Mapping

NUMBERS: Mapping[str, int]

def make(calls: bytes | bytearray) -> None: ...
def call(name: str, *arguments: int) -> int:
    """Make one of these system calls, with at most six arguments; raises OSError."""

def address(buffer: bytes | bytearray) -> int:
    """Where an object's octets are: as long as it is there, and is not resized."""

def memory(place: int, octets: int) -> memoryview:
    """What is at an address, to be read and written: whether it can be, nobody has checked."""
