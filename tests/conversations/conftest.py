"""One instance for all of them: conversations end, and it goes on."""

import pytest
from integration.conftest import Certificates, Serve, certificates, echoing, serve_all
from integration.instance import Instance
from integration.peers import Listener

__all__ = ["certificates", "echoing", "instance", "serve_all"]


@pytest.fixture(scope="module")
def instance(serve_all: Serve, certificates: Certificates, echoing: Listener) -> Instance:
    """For ``localhost``, and with the RSA key exchange for ``rsa.localhost``."""
    issued = certificates("RSA-2048", "localhost", "rsa.localhost")
    vhost = {"certificate": issued.certificate, "key": issued.key}
    return serve_all(
        echoing.address,
        vhost=[
            {**vhost, "sni": ["localhost"]},
            {**vhost, "sni": ["rsa.localhost"], "rsa_key_exchange": True},
        ],
    )
