"""What most tests of an instance with an attacker in it start from."""

from collections.abc import Iterator

import pytest
from integration.certificates import Certificate
from integration.peers import Listener, echo, served_by

from .harness import make_certificate


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def backend() -> Iterator[Listener]:
    """It sends back what it gets."""
    with Listener.tcp() as listener, served_by(listener, echo):
        yield listener
