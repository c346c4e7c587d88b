"""curl and the openssl command, in front of nginx, as an administrator would start it."""

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Rounds

from titus_py.audit.throwaway_authority import KEY_TYPES

from .certificates import Certificate
from .conftest import Certificates, Nginx, Serve
from .instance import Instance

CommandLine = Callable[..., Instance]

SERVED = ["RSA-2048", "RSA-4096", "P-256", "P-384", "Ed25519"]
REQUEST = b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"
RSA_SUITES = "AES128-GCM-SHA256:AES256-GCM-SHA384"


def curl(instance: Instance, certificate: Certificate, path: str, *options: str) -> list[str]:
    return [
        "curl", "--silent", "--show-error", "--fail", "--http1.1", "--noproxy", "*",
        "--cacert", str(certificate.authority),
        "--resolve", f"localhost:{instance.port}:127.0.0.1",
        *options, f"https://localhost:{instance.port}{path}",
    ]  # fmt: skip


def s_client(
    instance: Instance, certificate: Certificate, *options: str
) -> "subprocess.CompletedProcess[bytes]":
    command = [
        "openssl", "s_client", "-connect", f"127.0.0.1:{instance.port}",
        "-servername", "localhost", "-verify_hostname", "localhost",
        "-CAfile", str(certificate.authority), "-verify_return_error", "-ign_eof", *options,
    ]  # fmt: skip
    return subprocess.run(command, input=REQUEST, capture_output=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory, rounds: Rounds) -> Iterator[Path]:
    """No two pages of it alike: AES in counter mode over zeros.

    It is many times what all buffers on the way hold, and makes 4,000 TLS records.
    """
    size = rounds(enough=1 << 26, full=1 << 30)
    path = tmp_path_factory.mktemp("large") / "octets"
    command = f"head -c {size} /dev/zero | openssl enc -aes-128-ctr -K 01 -iv 02 -out {path}"
    subprocess.run(["sh", "-c", command], check=True, capture_output=True, timeout=60)
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
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
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


@pytest.mark.parametrize("kind", SERVED)
def test_s_client_talks_tls_1_3_and_1_2_with_each_kind_of_key(
    kind: str, command_line: CommandLine, nginx: Nginx, certificates: Certificates
) -> None:
    certificate = certificates(kind)
    instance = command_line(nginx.address, certificate)
    for version, option in (("TLSv1.3", "-tls1_3"), ("TLSv1.2", "-tls1_2")):
        answer = s_client(instance, certificate, option)
        output = answer.stdout.decode()
        assert answer.returncode == 0, answer.stderr.decode()
        assert "It works." in output
        assert f"New, {version}, Cipher is " in output
        assert "Verify return code: 0 (ok)" in output
        if version == "TLSv1.2":
            assert "Cipher is ECDHE-" in output


def test_s_client_talks_tls_with_a_p_521_key(
    serve: Serve, nginx: Nginx, certificates: Certificates
) -> None:
    certificate = certificates("P-521")
    vhost = {"certificate": certificate.certificate, "key": certificate.key}
    instance = serve(nginx.address, vhost=[vhost])
    for option in ("-tls1_3", "-tls1_2"):
        assert b"It works." in s_client(instance, certificate, option).stdout


@pytest.mark.parametrize("kind", ["RSA-2048", "RSA-4096"])
def test_the_rsa_key_exchange_works_where_it_is_turned_on(
    kind: str, serve: Serve, nginx: Nginx, certificates: Certificates
) -> None:
    certificate = certificates(kind)
    vhost = {
        "certificate": certificate.certificate,
        "key": certificate.key,
        "rsa_key_exchange": True,
    }
    instance = serve(nginx.address, vhost=[vhost])
    for suite in RSA_SUITES.split(":"):
        answer = s_client(instance, certificate, "-tls1_2", "-cipher", suite)
        assert answer.returncode == 0, answer.stderr.decode()
        assert b"It works." in answer.stdout
        assert f"New, TLSv1.2, Cipher is {suite}" in answer.stdout.decode()
    # It is for clients that know nothing better.
    assert b"Cipher is ECDHE-" in s_client(instance, certificate, "-tls1_2").stdout
    assert b"TLSv1.3" in s_client(instance, certificate).stdout


def test_the_rsa_key_exchange_is_refused_where_it_is_not_turned_on(
    serve: Serve, nginx: Nginx, certificates: Certificates
) -> None:
    certificate = certificates("RSA-2048")
    vhost = {"certificate": certificate.certificate, "key": certificate.key}
    instance = serve(nginx.address, vhost=[vhost])
    answer = s_client(instance, certificate, "-tls1_2", "-cipher", RSA_SUITES)
    assert answer.returncode == 1
    assert b"alert handshake failure" in answer.stderr
    event = instance.wait_for_event("handshake_failed")
    assert (event["end"], event["detail"]) == ("handshake_failed", "no shared cipher")


def test_every_kind_of_key_is_tried() -> None:
    assert {*SERVED, "P-521"} == set(KEY_TYPES)
