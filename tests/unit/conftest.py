"""What all unit tests keep to."""

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def threads_ended() -> Iterator[None]:
    """A test ends its threads: others fork, and a child has locks as it finds them.

    It does not answer for those that were there before, such as a shared fixture's.
    """
    before = threading.enumerate()
    yield
    for thread in threading.enumerate():
        if thread not in before:
            thread.join(60)
            assert not thread.is_alive(), f"{thread.name} is left"
