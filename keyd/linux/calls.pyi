from collections.abc import Mapping

NUMBERS: Mapping[str, int]

def make(calls: bytes | bytearray) -> None: ...
