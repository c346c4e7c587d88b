"""The blocks of a PEM file (RFC 7468): each of them is whole, or the file is refused.

Runs in the short-lived ``keyd check`` and ``keyd reference``. Libraries skip a block that has no
end or another label: of a file that is cut off, or is being written, they read the beginning.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Block", "Damaged", "blocks"]

#: What is meant to be the first or last line of a block, correctly written or not.
_BOUNDARY = re.compile(rb"(-{3,}|-{5,} )(BEGIN|END)\b ?([^\r\n-]*)(-*)")
#: The start of such a line at the end of the file.
_CUT_OFF = re.compile(rb"^(?:-{1,5}|-----B(?:E(?:GI?)?)?)\Z", re.MULTILINE)


class Block(NamedTuple):
    """A block's label, the number of its first line, and its text from that line to its last."""

    label: str
    line: int
    text: bytes


class Damaged(ValueError):
    """The file is no sequence of whole blocks; ``line`` is where that shows."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


def blocks(content: bytes) -> Iterator[Block]:
    """The blocks of a file, in order; any text may be around them. Raises Damaged."""
    open_block: tuple[str, int, int] | None = None  # label, line, offset
    for found in _BOUNDARY.finditer(content):
        line = _line(content, found.start())
        label = found[3].decode("ascii", "replace")
        if not (found[1] == found[4] == b"-----" and label):
            raise Damaged(line, f"a malformed {found[2].decode()} line")
        if found[2] == b"BEGIN":
            if open_block is not None:
                raise Damaged(open_block[1], f"no end of the {open_block[0]} that begins here")
            open_block = label, line, found.start()
        elif open_block is None:
            raise Damaged(line, f"an end without a beginning: {label}")
        elif open_block[0] != label:
            raise Damaged(line, f"an end of {label} within a {open_block[0]}")
        else:
            yield Block(label, open_block[1], content[open_block[2] : found.end()] + b"\n")
            open_block = None
    if open_block is not None:
        raise Damaged(
            open_block[1],
            f"no end of the {open_block[0]} that begins here: the file is cut off, or is being "
            "written",
        )
    if cut := _CUT_OFF.search(content):
        reason = "a line that is cut off: is the file being written?"
        raise Damaged(_line(content, cut.start()), reason)


def _line(content: bytes, offset: int) -> int:
    return content.count(b"\n", 0, offset) + 1
