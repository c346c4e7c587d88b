def use_one_heap() -> None:
    """Have no mapping made for a large block, from now on: all comes from the heap."""

def extend(room: int, boundary: int) -> tuple[int, int]:
    """Allocate at least ``room`` octets, up to a multiple of ``boundary``: the heap's end then.

    Returns where that begins and ends; zeros where the heap cannot be extended.
    """

def give_room(place: int) -> None:
    """Free what ``extend`` has allocated there: what is allocated next comes from it."""

def fill_holes(first: int = 0, last: int = 0) -> None:
    """Collect garbage, and allocate blocks of each size until they come from the end of the heap.

    What is free between these addresses is left free, too. Do this last before forking: what is
    freed later is a hole again.
    """

def give_back() -> None:
    """Unmap what is free of the heap, where the C library can do that (malloc_trim(3))."""
