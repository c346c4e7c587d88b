"""A machine's clock, for a test to step: all of its new programs go by it, and none of ours."""

import struct
import subprocess
from pathlib import Path

from .machine import Machine

_SOURCE = Path(__file__).with_suffix(".c")
_LIBRARY, _OFFSET = "/usr/local/lib/clock.so", "/usr/local/lib/clock.offset"


class SteppedClock:
    """From when it is made until ``remove``, what is started there has this clock.

    A step of the real one would be every machine's. A time namespace has none of its own
    for the time of day; and libfaketime opens its file again and again, which ends a worker.
    """

    offset_file = _OFFSET

    def __init__(self, machine: Machine) -> None:
        library, offset, self._preload = (
            machine.root / path.lstrip("/") for path in (_LIBRARY, _OFFSET, "/etc/ld.so.preload")
        )
        offset.write_bytes(struct.pack("=q", 0))
        subprocess.run(
            ["cc", "-shared", "-fPIC", f'-DOFFSET_FILE="{_OFFSET}"', "-o", library, _SOURCE],
            check=True,
        )
        self._preload.write_text(f"{_LIBRARY}\n")

    def remove(self) -> None:
        self._preload.unlink()
