"""Values in DER (X.690 §10), as far as keys and certificates take it: their bounds, and no more.

Run wherever keys and certificates are read. What is not DER is a ValueError.
"""

from collections.abc import Iterator

__all__ = [
    "BIT_STRING",
    "INTEGER",
    "OCTET_STRING",
    "SEQUENCE",
    "content",
    "head",
    "length",
    "members",
    "tlv",
]

SEQUENCE, INTEGER, BIT_STRING, OCTET_STRING = 0x30, 0x02, 0x03, 0x04


def members(der: bytes | memoryview) -> Iterator[bytes]:
    """The values within a constructed one, whole."""
    rest = content(der)
    while rest:
        end = length(rest)
        yield rest[:end]  # type: ignore[misc]
        rest = rest[end:]


def content(der: bytes | memoryview) -> bytes | memoryview:
    """Of the first value, without its tag and length."""
    return der[head(der) : length(der)]


def head(der: bytes | memoryview) -> int:
    """How many octets the tag and the length of the first value have, which may be cut off."""
    if len(der) < 2:
        raise ValueError("not DER")
    return 2 if der[1] < 0x80 else 2 + (der[1] & 0x7F)


def length(der: bytes | memoryview) -> int:
    """Of the first value, its tag and length included."""
    start = head(der)
    following = der[1]
    if following >= 0x80:
        following = int.from_bytes(der[2:start], "big")
        if not 1 <= start - 2 <= 4:
            raise ValueError("not DER")
    if len(der) < start + following:
        raise ValueError("not DER")
    return start + following


def tlv(tag: int, value: bytes) -> bytes:
    """A value with this tag and content."""
    if len(value) < 0x80:
        return bytes((tag, len(value))) + value
    octets = len(value).to_bytes((len(value).bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(octets))) + octets + value
