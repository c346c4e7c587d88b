"""The search for many needles at once, beside one that looks at every place for each."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyd.inspection.occurrences import occurrences

#: Few different octets, so that needles are found, lie in each other and overlap.
FEW = st.lists(st.sampled_from([0, 1, 255]), max_size=60).map(bytes)
NEEDLES = st.lists(FEW.filter(bool), max_size=6).map(tuple)


def slowly(octets: bytes, needles: tuple[bytes, ...]) -> list[tuple[int, int]]:
    return [
        (place, number)
        for place in range(len(octets))
        for number, needle in enumerate(needles)
        if octets.startswith(needle, place)
    ]


@given(FEW, NEEDLES, FEW)
def test_it_finds_what_there_is(before: bytes, needles: tuple[bytes, ...], after: bytes) -> None:
    octets = before + b"".join(needles) + after
    assert occurrences(octets, needles, 100_000) == slowly(octets, needles)


@given(st.binary(max_size=300), st.integers(2, 300), st.integers(0, 300))
def test_a_needle_of_any_length_is_found_at_either_end(
    content: bytes, length: int, position: int
) -> None:
    needle = bytes(number % 251 for number in range(length))
    octets = content[:position] + needle + content[position:]
    assert occurrences(octets, (needle,), 9) == slowly(octets, (needle,))
    assert occurrences(octets[:-1], (needle,), 9) == slowly(octets[:-1], (needle,))


@given(st.integers(2, 300), st.integers(0, 5000), st.integers(0, 5000))
def test_no_step_passes_a_needle_by(length: int, before: int, after: int) -> None:
    """Many steps that are whole lead there, and are taken together."""
    needle = bytes(1 + number % 251 for number in range(length))
    found = occurrences(bytes(before) + needle + bytes(after), (needle,), 9)
    assert found == [(before, 0)]


@given(FEW, NEEDLES, st.integers(1, 5))
def test_one_that_is_everywhere_hides_no_other(
    before: bytes, needles: tuple[bytes, ...], most: int
) -> None:
    octets = before + b"".join(needles)
    found = slowly(octets, needles)
    first = {number: [one for one in found if one[1] == number][:most] for _, number in found}
    assert occurrences(octets, needles, most) == sorted(
        one for few in first.values() for one in few
    )


def test_so_many_of_each_and_no_more() -> None:
    assert occurrences(b"aaaa", (b"a",), 3) == [(0, 0), (1, 0), (2, 0)]
    assert occurrences(b"aaaab", (b"a", b"b", b"a"), 1) == [(0, 0), (0, 2), (4, 1)]
    assert occurrences(bytearray(b"xyz"), (), 3) == []


@pytest.mark.parametrize(("needles", "most"), [((b"",), 1), ((b"a", b""), 1), ((b"a",), 0)])
def test_what_makes_no_sense_is_refused(needles: tuple[bytes, ...], most: int) -> None:
    with pytest.raises(ValueError, match=r"empty needle|no room"):
        occurrences(b"abc", needles, most)


def test_thousands_that_begin_alike_take_little_longer() -> None:
    """Somebody may have made them so, and filled memory with what they begin with."""

    def seconds(needles: tuple[bytes, ...]) -> float:
        before = time.process_time()
        assert not occurrences(bytes(4_000_000), needles, 9)
        return time.process_time() - before

    few, many = (
        tuple(bytes(8) + b"later" + number.to_bytes(8, "big") for number in range(count))
        for count in (60, 6000)
    )
    # Compared one by one, they would take a hundred times as long.
    assert min(seconds(many) for _ in range(3)) < 10 * min(seconds(few) for _ in range(3))


def test_a_needle_that_is_no_octets_is_refused() -> None:
    with pytest.raises(TypeError):
        occurrences(b"abc", ("a",), 1)  # type: ignore[arg-type]
