"""The blocks of a PEM file: all of them, or an error that says where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyd.pem import Damaged, blocks

BODY = b"QUJD\n" * 3
ONE = b"-----BEGIN CERTIFICATE-----\n" + BODY + b"-----END CERTIFICATE-----\n"
KEY = b"-----BEGIN PRIVATE KEY-----\n" + BODY + b"-----END PRIVATE KEY-----\n"


def damage(content: bytes) -> tuple[int, str]:
    with pytest.raises(Damaged) as caught:
        list(blocks(content))
    return caught.value.line, caught.value.reason


@pytest.mark.parametrize("around", [b"", b"\n", b"subject=/O=M\xfcller\n\0 ", b"--- chain ---\n"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_whole_blocks_whatever_is_around_them(around: bytes, end: bytes) -> None:
    whole = [one.replace(b"\n", end or b"\n") for one in (ONE, KEY, ONE)]
    content = b"".join(around + one for one in whole)
    found = list(blocks(content if end else content.removesuffix(b"\n")))
    labels = ["CERTIFICATE", "PRIVATE KEY", "CERTIFICATE"]
    assert [block.label for block in found] == labels
    assert [block.text.strip() for block in found] == [one.strip() for one in whole]
    before = around.count(b"\n")
    lines = [1 + before, 1 + 5 + 2 * before, 1 + 10 + 3 * before]
    assert [block.line for block in found] == lines


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (ONE + ONE[:-26], 6, "no end of the CERTIFICATE that begins here: the file is cut off"),
        (ONE[:-26] + ONE, 1, "no end of the CERTIFICATE that begins here"),
        (ONE[:-26] + KEY, 1, "no end of the CERTIFICATE that begins here"),
        (ONE + ONE.removeprefix(b"-----BEGIN CERTIFICATE-----"), 10, "an end without a beginning"),
        (ONE[:-26] + KEY[-26:], 5, "an end of PRIVATE KEY within a CERTIFICATE"),
        (ONE + ONE[1:], 6, "a malformed BEGIN line"),
        (ONE.replace(b"TE-----\nQ", b"TE----\nQ"), 1, "a malformed BEGIN line"),
        (ONE.replace(b"--END", b"-- END"), 5, "a malformed END line"),
        (ONE + b"-----BEGIN", 6, "a malformed BEGIN line"),
        (ONE + b"-----BEGIN -----\n", 6, "a malformed BEGIN line"),
        (ONE + b"-----BEG", 6, "a line that is cut off"),
        (ONE + b"--", 6, "a line that is cut off"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused(content: bytes, line: int, reason: str) -> None:
    found = damage(content)
    assert found[0] == line
    assert found[1].startswith(reason)


@given(st.integers(1, len(ONE + KEY + ONE) - 1))
def test_a_file_that_is_cut_off_anywhere_is_refused_or_holds_whole_blocks(length: int) -> None:
    """Between two of them, nothing shows: the chain may."""
    content = (ONE + KEY + ONE)[:length]
    whole = len(content.rstrip(b"\n")) in {
        len(one) - 1 for one in (ONE, ONE + KEY, ONE + KEY + ONE)
    }
    if whole:
        assert list(blocks(content))
    else:
        damage(content)
