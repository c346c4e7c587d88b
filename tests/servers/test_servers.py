"""Stock servers whose keys are in keyd: they serve, renew, survive its restart, without them.

One test for each, which starts it twice: with its key, as a control, and with a reference.
"""

import http.server
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from integration.certificates import Authority, Certificate
from integration.instance import descendants, eventually, free_port

from keyd.certificates import load_chain, refer_to
from keyd.inspection.key_search import Hit, needles, search_all
from keyd.provider import openssl_configuration, provider_path

from .keyd import PATIENCE, ListeningKeyd
from .programs import PROGRAMS, Program, Site, root_of

#: SSLRequest (PostgreSQL, "Message Formats"): length and code.
_SSL_REQUEST = struct.pack("!II", 8, 80877103)
_LOAD_CLIENTS = 4
VERSIONS = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}


class Running(NamedTuple):
    """A server, and what its clients and its administrator need."""

    program: Program
    site: Site
    process: "subprocess.Popen[bytes]"
    authority: Path

    def connect(self, version: ssl.TLSVersion | None = None) -> ssl.SSLSocket:
        """A handshake with a certificate of the authority's; raises OSError."""
        context = ssl.create_default_context(cafile=str(self.authority))
        if version is not None:
            context.minimum_version = context.maximum_version = version
        plain = socket.create_connection(("127.0.0.1", self.site.port), PATIENCE)
        try:
            if self.program.name == "postgresql":
                plain.sendall(_SSL_REQUEST)
                if plain.recv(1) != b"S":
                    raise ConnectionError("no TLS")
            return context.wrap_socket(plain, server_hostname="localhost")
        except BaseException:
            plain.close()
            raise

    def shows(self, certificate: Certificate) -> bool:
        """Whether it is what a new client is shown."""
        try:
            with self.connect() as client:
                shown = client.getpeercert(binary_form=True)
        except OSError:
            return False
        assert shown is not None
        return ssl.DER_cert_to_PEM_cert(shown) in certificate.certificate.read_text()

    def log(self) -> str:
        return (self.site.directory / "server-log").read_text()

    def found(self, *keys: Path) -> list[Hit]:
        """Where in its processes' memory these keys are."""
        sought = [
            needle
            for key in keys
            for needle in needles(load_pem_private_key(key.read_bytes(), None))  # type: ignore[arg-type]
        ]
        # Somebody is connected meanwhile: the process that shook hands is among them.
        with self.connect():
            pids = [process.pid for process in descendants(self.process.pid)]
            return [hit for searched in search_all(pids, sought) for hit in searched.hits]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def backend() -> Iterator[int]:
    """The port of what some of them pass requests on to."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that every user may enter, as servers that give up root have to."""
    path = Path(tempfile.mkdtemp(prefix="titus-py-servers-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextmanager
def running(program: Program, site: Site, authority: Path, **environment: str) -> Iterator[Running]:
    if program.unprivileged:
        shutil.chown(site.directory, program.user)
    process = program.start(site, environment)
    server = Running(program, site, process, authority)
    try:

        def serves() -> bool:
            assert process.poll() is None, server.log()
            with suppress(OSError), server.connect():
                return True
            return False

        try:
            eventually(serves, f"{program.name} serves", PATIENCE)
        except AssertionError as error:
            raise AssertionError(server.log()) from error
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)


def install(program: Program, site: Site, certificate: Path, key: bytes) -> None:
    """Put a certificate, and its key or the reference, where the server looks for them."""
    octets = certificate.read_bytes()
    for path, content in (
        (site.certificate, octets),
        (site.key, octets + key if program.one_file else key),
    ):
        new = path.with_name("new")
        new.touch(mode=0o600)
        new.write_bytes(content)
        if program.unprivileged:
            shutil.chown(new, program.user)
        elif b"PRIVATE KEY" not in content:
            new.chmod(0o644)
        new.replace(path)


def reference_of(certificate: Path) -> bytes:
    return refer_to(load_chain(str(certificate))[0].certificate, str(certificate))[1].encode()


def make_site(directory: Path, backend: int) -> Site:
    root_of(directory).mkdir()
    return Site(directory, directory / "www.crt", directory / "www.key", free_port(), backend)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_server_whose_key_is_in_keyd(
    program: Program, authority: Authority, backend: int, directory: Path
) -> None:
    old, new = authority.issue("RSA-2048"), authority.issue("P-256")
    site = make_site(directory, backend)
    path = directory / "keyd.sock"
    paths = [path]
    if program.has_root_of_its_own:
        paths.append(root_of(directory) / path.relative_to("/"))
    configuration = directory / "openssl.cnf"
    # Where each server's user can read it, as where it is installed.
    provider = shutil.copy(provider_path(), directory / "provider.so")
    loading = openssl_configuration(f"socket = {path}")
    configuration.write_text(loading.replace(provider_path(), str(provider)))
    # The control of the search: without keyd, the key is found.
    install(program, site, old.certificate, old.key.read_bytes())
    with running(program, site, old.authority) as server:
        assert server.found(old.key)
    with ListeningKeyd(directory, program.user, paths) as keyd:
        shutil.copy(old.key, keyd.keys / "www.key")
        keyd.start()
        install(program, site, old.certificate, reference_of(old.certificate))
        with running(program, site, old.authority, OPENSSL_CONF=str(configuration)) as server:
            for name, version in VERSIONS.items():
                with server.connect(version) as client:
                    assert client.version() == name
            _is_served_by_its_own_client(server)
            _keeps_a_connection_for_each_process(server, keyd)
            assert server.shows(old)
            assert not server.found(old.key)
            _is_renewed(server, keyd, old, new)
            assert not server.found(old.key, new.key)
            _lives_through_restarts(server, keyd)


def _is_served_by_its_own_client(server: Running) -> None:
    """Not only by a handshake: curl gets a page, psql an answer."""
    port, trusted = server.site.port, server.authority
    if server.program.name == "postgresql":
        words = f"host=localhost port={port} user=postgres"
        words += f" sslmode=verify-full sslrootcert={trusted}"
        query = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"
        command = ["psql", "--no-align", "--tuples-only", f"--command={query}", words]
        expected = {"t"}
    else:
        command = ["curl", "--silent", "--show-error", "--output", "/dev/null", "--write-out"]
        command += ["%{http_code}", "--cacert", str(trusted), f"https://localhost:{port}/"]
        # nginx and Apache have a page only where one has been put.
        expected = {"200", "403", "404"}
    seen = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert seen.stdout.strip() in expected, seen.stderr + server.log()


def _keeps_a_connection_for_each_process(server: Running, keyd: ListeningKeyd) -> None:
    """And not for each handshake, or for each thread."""
    with _clients(server) as failures:
        pass
    assert not failures

    def kept() -> bool:
        with server.connect():
            return 0 < keyd.connections() <= len(descendants(server.process.pid))

    eventually(kept, "each process keeps one connection", PATIENCE)


def _is_renewed(server: Running, keyd: ListeningKeyd, old: Certificate, new: Certificate) -> None:
    """With a new key, as docs/keyd.md has it: at no time is a client without service."""
    with _clients(server) as failures:
        shutil.copy(new.key, keyd.keys / "new.key")
        keyd.end()
        keyd.start()
        install(server.program, server.site, new.certificate, reference_of(new.certificate))
        server.process.send_signal(server.program.reload_signal)
        eventually(lambda: server.shows(new), f"it has reloaded: {server.log()}", PATIENCE)
        (keyd.keys / "www.key").unlink()
        keyd.end()
        keyd.start()
        eventually(lambda: server.shows(new), "it serves", PATIENCE)
    assert not failures


def _lives_through_restarts(server: Running, keyd: ListeningKeyd) -> None:
    """keyd is told to end, and is killed: whoever tries again is served."""
    with _clients(server) as failures:
        for number in (signal.SIGTERM, signal.SIGKILL):
            keyd.end(number)
            keyd.start()
            with server.connect():
                pass
    assert not failures


@contextmanager
def _clients(server: Running) -> Iterator[list[str]]:
    """Some clients, one handshake after the other, each tried again; who is given up is listed."""
    over = threading.Event()
    given_up: list[str] = []
    served = [0] * _LOAD_CLIENTS

    def come(client: int) -> None:
        while not over.is_set():
            problem = _try_again(server.connect)
            if problem:
                given_up.append(problem)
            else:
                served[client] += 1
            # It is not the load that counts: the machine has others to serve.
            time.sleep(0.02)

    with ThreadPoolExecutor(_LOAD_CLIENTS) as pool:
        clients = [pool.submit(come, client) for client in range(_LOAD_CLIENTS)]
        try:
            eventually(lambda: all(served), "all clients are served", PATIENCE)
            yield given_up
        finally:
            over.set()
            for client in clients:
                client.result(PATIENCE)


def _try_again(connect: Callable[[], ssl.SSLSocket]) -> str:
    """Up to ten times; returns what is wrong if none of it was of any use."""
    problem = ""
    for attempt in range(10):
        try:
            with connect():
                return ""
        except OSError as error:
            problem = str(error)
            time.sleep(0.05 * attempt)
    return problem
