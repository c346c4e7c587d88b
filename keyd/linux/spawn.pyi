from collections.abc import Mapping

NUMBERS: Mapping[str, int]

def spawn(flags: int, calls: bytes) -> tuple[int, int, int, int]: ...
