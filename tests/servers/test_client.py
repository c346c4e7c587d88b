"""curl with a client certificate whose key is in keyd: it is known to a server, and has no key."""

import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from integration.certificates import Authority, Certificate

from keyd.certificates import load_chain, refer_to
from keyd.inspection.key_search import needles, search
from keyd.protocol import Operation, Reply, Request, SignatureScheme, Status
from keyd.provider import openssl_configuration
from keyd.reference import key_id

from .keyd import PATIENCE, ListeningKeyd

_ANSWER = b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class Server:
    """It wants a certificate of the authority's, and answers once it has been told to."""

    def __init__(self, site: Certificate) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(site.certificate, site.key)
        self._context.load_verify_locations(site.authority)
        self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self.port = self._listener.getsockname()[1]

    def accept(self) -> ssl.SSLSocket:
        """Returns once the client has been verified, and has asked. Raises SSLError."""
        plain, _ = self._listener.accept()
        client = self._context.wrap_socket(plain, server_side=True)
        assert client.recv(1000).startswith(b"GET ")
        return client

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def server(authority: Authority) -> Iterator[Server]:
    made = Server(authority.issue())
    yield made
    made.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def keyd(authority: Authority) -> Iterator[ListeningKeyd]:
    directory = Path(tempfile.mkdtemp(prefix="titus-py-client-"))
    with ListeningKeyd(directory, "root", [directory / "keyd.sock"], ["--as-client"]) as running:
        shutil.copy(authority.issue("P-256", "client.test").key, running.keys / "client.key")
        running.start()
        yield running
    shutil.rmtree(directory)


@contextmanager
def curl(
    server: Server, client: Certificate, key: Path, configuration: Path | None, *options: str
) -> Iterator["subprocess.Popen[str]"]:
    command = ["curl", "--silent", "--show-error", "--max-time", str(PATIENCE), *options]
    command += ["--cert", str(client.certificate), "--key", str(key)]
    command += ["--cacert", str(client.authority), f"https://localhost:{server.port}/"]
    environment = {"PATH": "/usr/bin:/bin"}
    if configuration is not None:
        environment["OPENSSL_CONF"] = str(configuration)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process


@pytest.mark.parametrize("key_is_in_keyd", [False, True], ids=["its own key", "keyd"])
def test_curl_is_known_by_a_key_that_keyd_has(
    server: Server, keyd: ListeningKeyd, authority: Authority, tmp_path: Path, key_is_in_keyd: bool
) -> None:
    client = authority.issue("P-256", "client.test")
    key, configuration = client.key, None
    if key_is_in_keyd:
        key, configuration = referred(client, keyd, tmp_path)
    sought = needles(load_pem_private_key(client.key.read_bytes(), None))  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(server.accept)
        with curl(server, client, key, configuration) as process:
            with accepted.result(PATIENCE) as connection:
                subject = connection.getpeercert()
                assert subject is not None
                assert ("DNS", "client.test") in subject["subjectAltName"]
                # The control: with its own key, it is found.
                assert bool(search(process.pid, sought).hits) != key_is_in_keyd
                connection.sendall(_ANSWER)
                connection.unwrap()
            output, complaint = process.communicate(timeout=PATIENCE)
    assert output == "hello", complaint


def referred(client: Certificate, keyd: ListeningKeyd, directory: Path) -> tuple[Path, Path]:
    """A reference to the client's key, and the configuration by which it is used."""
    reference, configuration = directory / "client.reference", directory / "openssl.cnf"
    certificate = load_chain(str(client.certificate))[0].certificate
    reference.write_text(refer_to(certificate, str(client.certificate))[1])
    configuration.write_text(openssl_configuration(f"socket = {keyd.paths[0]}"))
    return reference, configuration


def test_in_tls_1_2_a_client_gets_nothing_signed(
    server: Server, keyd: ListeningKeyd, authority: Authority, tmp_path: Path
) -> None:
    client = authority.issue("P-256", "client.test")
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(server.accept)
        with curl(server, client, *referred(client, keyd, tmp_path), "--tls-max", "1.2") as process:
            _, complaint = process.communicate(timeout=PATIENCE)
        with pytest.raises(OSError, match=r"EOF|reset|alert"):
            accepted.result(PATIENCE)
    assert process.returncode != 0
    assert "not for keyd" in complaint


@pytest.mark.parametrize(("side", "status"), [("client", "DONE"), ("server", "NOT_GRANTED")])
def test_it_signs_as_a_client_and_as_no_server(
    keyd: ListeningKeyd, authority: Authority, side: str, status: str
) -> None:
    key = load_pem_private_key(authority.issue("P-256", "client.test").key.read_bytes(), None)
    content = b" " * 64 + f"TLS 1.3, {side} CertificateVerify\0".encode() + bytes(32)
    identity = key_id(key.public_key())
    request = Request(
        Operation.SIGN, SignatureScheme.ecdsa_secp256r1_sha256, identity, content
    ).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.settimeout(PATIENCE)
        asking.connect(str(keyd.paths[0]))
        asking.send(request)
        assert Reply.decode(asking.recv(2000)).status is Status[status]
