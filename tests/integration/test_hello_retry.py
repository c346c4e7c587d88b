"""Two ClientHellos: keyd hears of the second from the worker, and holds it against the first."""

import subprocess

import pytest

from .client_authority import ClientAuthority
from .conftest import Certificates, Nginx, Serve
from .instance import Instance
from .test_real_clients import Every, s_client

SHA256, SHA384 = "TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"
#: The client's guess is not the virtual host's only group.
GROUPS = ("-groups", "P-256:P-384")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> ClientAuthority:
    return ClientAuthority(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def instance(serve_all: Serve, nginx: Nginx, authority: ClientAuthority) -> Instance:
    vhost = {
        "groups": ["P-384"],
        "client_certificates": "optional",
        "client_ca": authority.file,
        "client_allow": "all",
    }
    return serve_all(nginx.address, vhost=[vhost])


@pytest.mark.parametrize("suite", [SHA256, SHA384])
@pytest.mark.parametrize("known", [False, True], ids=["", "with a certificate"])
def test_the_openssl_command_is_served(
    instance: Instance,
    certificates: Certificates,
    authority: ClientAuthority,
    suite: str,
    known: bool,
) -> None:
    more = authority.issue("alice").options if known else []
    options = ["-tls1_3", "-msg", "-ciphersuites", suite, *GROUPS, *map(str, more)]
    answer = s_client(Every(instance, certificates().authority), "localhost", *options)
    assert answer.stdout.count(b"], ClientHello") == 2, answer.stdout
    assert b"It works." in answer.stdout
    assert suite.encode() in answer.stdout


def test_curl_is_served(instance: Instance, certificates: Certificates) -> None:
    page = subprocess.run(
        ["curl", "--silent", "--tlsv1.3", "--curves", "P-256:P-384", "--cacert",
         certificates().authority, "--resolve", f"localhost:{instance.port}:127.0.0.1",
         f"https://localhost:{instance.port}/"],
        check=True, capture_output=True, timeout=240,
    ).stdout  # fmt: skip
    assert page == b"It works.\n"
