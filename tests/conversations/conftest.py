"""One instance for all of them: conversations end, and it goes on."""

from collections.abc import Iterator

import pytest
from integration.conftest import Certificates, _factory, certificates
from integration.instance import Instance
from integration.peers import Listener, echo, served_by

from .backends import flood

__all__ = ["certificates", "instance"]


@pytest.fixture(scope="session")
def instance(
    certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    """For ``localhost``; another backend, and with the RSA key exchange, for names below it."""
    issued = certificates("RSA-2048", "localhost", "flood.localhost", "rsa.localhost")
    with (
        Listener.tcp() as echoing,
        served_by(echoing, echo),
        Listener.tcp() as flooding,
        served_by(flooding, flood),
    ):
        vhost = {
            "certificate": issued.certificate,
            "key": issued.key,
            "backend": echoing.address,
        }
        for serve in _factory(certificates, tmp_path_factory):
            yield serve(
                vhost=[
                    {**vhost, "sni": ["localhost"]},
                    {**vhost, "sni": ["flood.localhost"], "backend": flooding.address},
                    {**vhost, "sni": ["rsa.localhost"], "rsa_key_exchange": True},
                ],
            )
