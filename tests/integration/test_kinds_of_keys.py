"""Certificates for keys of rarer kinds: served by titus-py to the openssl command."""

import subprocess
from pathlib import Path

import pytest

from .conftest import Serve
from .peers import Listener

BOUND = ["rsa_pss_keygen_md:sha384", "rsa_pss_keygen_mgf1_md:sha384", "rsa_pss_keygen_saltlen:48"]


def make(directory: Path, *parameters: str) -> dict[str, str]:
    """A self-signed certificate for an RSA key that is bound to PSS, as [[vhost]] names it."""
    files = {"certificate": str(directory / "site.crt"), "key": str(directory / "site.key")}
    options = [word for one in ("rsa_keygen_bits:2048", *parameters) for word in ("-pkeyopt", one)]
    command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=localhost", "-newkey", "rsa-pss"]
    names = ["-addext", "subjectAltName=DNS:localhost"]
    paths = ["-keyout", files["key"], "-out", files["certificate"]]
    subprocess.run([*command, *options, *names, *paths], check=True, capture_output=True)
    return files


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize(("parameters", "digest"), [([], "SHA256"), (BOUND, "SHA384")])
def test_a_key_that_is_bound_to_pss(
    serve: Serve,
    echoing: Listener,
    tmp_path: Path,
    parameters: list[str],
    digest: str,
    version: str,
) -> None:
    """It signs with the first digest that the client offers and the key is not kept from."""
    files = make(tmp_path, *parameters)
    instance = serve(echoing.address, vhost=[files])
    command = ["openssl", "s_client", "-connect", f"localhost:{instance.port}", version]
    verified = ["-CAfile", files["certificate"], "-verify_return_error"]
    schemes = ["-sigalgs", "rsa_pss_pss_sha256:rsa_pss_pss_sha384:RSA-PSS+SHA384:RSA-PSS+SHA256"]
    done = subprocess.run(
        [*command, *verified, *schemes], input=b"", capture_output=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"Peer signing digest: {digest}".encode() in done.stdout
    assert b"Peer signature type: RSA-PSS" in done.stdout
