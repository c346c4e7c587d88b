"""curl and the openssl command, in front of nginx, as an administrator would start it."""

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Rounds

from titus_py.audit.throwaway_authority import KEY_TYPES

from .certificates import Certificate
from .conftest import Certificates, Nginx, Serve
from .instance import Instance

CommandLine = Callable[..., Instance]

REQUEST = b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"
RSA_SUITES = "AES128-GCM-SHA256:AES256-GCM-SHA384"


def curl(instance: Instance, certificate: Certificate, path: str, *options: str) -> list[str]:
    return [
        "curl", "--silent", "--show-error", "--fail", "--http1.1", "--noproxy", "*",
        "--cacert", str(certificate.authority),
        "--resolve", f"localhost:{instance.port}:127.0.0.1",
        *options, f"https://localhost:{instance.port}{path}",
    ]  # fmt: skip


class Every(NamedTuple):
    """An instance that serves each kind of key to who asks for its name, and who certified it."""

    instance: Instance
    authority: Path


#: Of these kinds, there is one with the RSA key exchange, too.
DECRYPTING = ["RSA-2048", "RSA-4096"]


def name_of(kind: str, decrypts: bool = False) -> str:
    return f"{kind.lower()}.{'decrypting' if decrypts else 'signing'}.test"


@pytest.fixture(scope="module")
def every(serve_all: Serve, nginx: Nginx, certificates: Certificates) -> Every:
    hosts = []
    for kind, decrypts in [(kind, False) for kind in KEY_TYPES] + [
        (kind, True) for kind in DECRYPTING
    ]:
        name = name_of(kind, decrypts)
        certificate = certificates(kind, name)
        vhost = {"certificate": certificate.certificate, "key": certificate.key, "sni": [name]}
        hosts.append(vhost | ({"rsa_key_exchange": True} if decrypts else {}))
    return Every(serve_all(nginx.address, vhost=hosts), certificate.authority)


def s_client(every: Every, name: str, *options: str) -> "subprocess.CompletedProcess[bytes]":
    command = [
        "openssl", "s_client", "-connect", f"127.0.0.1:{every.instance.port}",
        "-servername", name, "-verify_hostname", name,
        "-CAfile", str(every.authority), "-verify_return_error", "-ign_eof", *options,
    ]  # fmt: skip
    return subprocess.run(command, input=REQUEST, capture_output=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory, rounds: Rounds) -> Iterator[Path]:
    """No two pages of it alike: AES in counter mode over zeros.

    It is many times what all buffers on the way hold, and makes 4,000 TLS records.
    """
    size = rounds(enough=1 << 26, full=1 << 30)
    path = tmp_path_factory.mktemp("large") / "octets"
    command = f"head -c {size} /dev/zero | openssl enc -aes-128-ctr -K 01 -iv 02 -out {path}"
    subprocess.run(["sh", "-c", command], check=True, capture_output=True, timeout=240)
    yield path
    path.unlink()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_curl_gets_a_page_over_http_1_1(
    command_line: CommandLine, nginx: Nginx, certificates: Certificates
) -> None:
    certificate = certificates("RSA-2048")
    instance = command_line(nginx.address, certificate)
    command = curl(instance, certificate, "/", "--write-out", "%{http_version}")
    answer = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (answer.stdout, answer.stderr) == ("It works.\n1.1", "")


def test_a_large_file_comes_down_and_goes_up_unchanged(
    command_line: CommandLine, nginx: Nginx, certificates: Certificates, large_file: Path
) -> None:
    certificate = certificates("P-256")
    instance = command_line(nginx.address, certificate)
    size, expected = large_file.stat().st_size, digest(large_file)
    served = nginx.files / "large"
    served.symlink_to(large_file)

    with subprocess.Popen(
        curl(instance, certificate, "/large"), stdout=subprocess.PIPE
    ) as download:
        assert download.stdout is not None
        received = hashlib.sha256()
        octets = 0
        while piece := download.stdout.read(1 << 20):
            received.update(piece)
            octets += len(piece)
    assert (download.returncode, octets, received.hexdigest()) == (0, size, expected)

    uploaded = nginx.uploads / "large"
    command = curl(instance, certificate, "/upload/large", "--upload-file", str(large_file))
    subprocess.run(command, check=True, timeout=120)
    assert (uploaded.stat().st_size, digest(uploaded)) == (size, expected)
    uploaded.unlink()


@pytest.mark.parametrize("kind", KEY_TYPES)
def test_s_client_talks_tls_1_3_and_1_2_with_each_kind_of_key(kind: str, every: Every) -> None:
    for version, option in (("TLSv1.3", "-tls1_3"), ("TLSv1.2", "-tls1_2")):
        answer = s_client(every, name_of(kind), option)
        output = answer.stdout.decode()
        assert answer.returncode == 0, answer.stderr.decode()
        assert "It works." in output
        assert f"New, {version}, Cipher is " in output
        assert "Verify return code: 0 (ok)" in output
        if version == "TLSv1.2":
            assert "Cipher is ECDHE-" in output


@pytest.mark.parametrize("kind", DECRYPTING)
def test_the_rsa_key_exchange_works_where_it_is_turned_on(kind: str, every: Every) -> None:
    name = name_of(kind, decrypts=True)
    for suite in RSA_SUITES.split(":"):
        answer = s_client(every, name, "-tls1_2", "-cipher", suite)
        assert answer.returncode == 0, answer.stderr.decode()
        assert b"It works." in answer.stdout
        assert f"New, TLSv1.2, Cipher is {suite}" in answer.stdout.decode()
    # It is for clients that know nothing better.
    assert b"Cipher is ECDHE-" in s_client(every, name, "-tls1_2").stdout
    assert b"TLSv1.3" in s_client(every, name).stdout


def test_the_rsa_key_exchange_is_refused_where_it_is_not_turned_on(every: Every) -> None:
    name = name_of("RSA-2048")
    answer = s_client(every, name, "-tls1_2", "-cipher", RSA_SUITES)
    assert answer.returncode == 1
    assert b"alert handshake failure" in answer.stderr
    event = every.instance.wait_for_event("handshake_failed", server_name=name)
    assert (event["end"], event["detail"]) == ("handshake_failed", "no shared cipher")
