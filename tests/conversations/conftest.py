"""One instance for all of them: conversations end, and it goes on."""

from collections.abc import Iterator

import pytest
from integration.certificates import Certificate
from integration.conftest import Certificates, _factory, certificates
from integration.instance import Instance, free_port
from integration.peers import Listener, echo, served_by
from integration.test_cipher_suites import MOZILLA

from .backends import end_first, flood

__all__ = ["certificates", "instance"]


@pytest.fixture(scope="session")
def certificate(certificates: Certificates) -> Certificate:
    return certificates("RSA-2048", "localhost", "flood.localhost", "ended.localhost")


@pytest.fixture(scope="session")
def rsa_certificate(certificates: Certificates) -> Certificate:
    """Of the virtual host with the RSA key exchange: others must not sign with its key."""
    return certificates("RSA-2048", "rsa.localhost")


@pytest.fixture(scope="session")
def ports() -> dict[str, int]:
    """Of virtual hosts for any name: with the default cipher suites, and with Mozilla's."""
    return {"default": free_port(), "mozilla": free_port()}


@pytest.fixture(scope="session")
def instance(
    certificate: Certificate,
    rsa_certificate: Certificate,
    certificates: Certificates,
    ports: dict[str, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Instance]:
    """For ``localhost``; another backend, and with the RSA key exchange, for names below it."""
    with (
        Listener.tcp() as echoing,
        served_by(echoing, echo),
        Listener.tcp() as flooding,
        served_by(flooding, flood),
        Listener.tcp() as ending,
        served_by(ending, end_first),
    ):
        vhost = {
            "certificate": certificate.certificate,
            "key": certificate.key,
            "backend": echoing.address,
        }
        rsa = {
            "certificate": rsa_certificate.certificate,
            "key": rsa_certificate.key,
            "rsa_key_exchange": True,
        }
        own = free_port()
        for serve in _factory(certificates, tmp_path_factory):
            yield serve(
                listen=[{"address": f"127.0.0.1:{port}"} for port in (own, *ports.values())],
                vhost=[
                    {**vhost, "local_port": ports["default"]},
                    {**vhost, "local_port": ports["mozilla"], "ciphers": MOZILLA},
                    {**vhost, "sni": ["localhost"]},
                    {**vhost, "sni": ["flood.localhost"], "backend": flooding.address},
                    {**vhost, "sni": ["ended.localhost"], "backend": ending.address},
                    {**vhost, "sni": ["rsa.localhost"], **rsa},
                ],
            )
