"""What every integration test starts from."""

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from .certificates import Authority, Certificate
from .instance import Instance, Table, Uids, eventually, free_port
from .peers import Listener, connect, echo, echo_for_many, served_by

Certificates = Callable[..., Certificate]


class Serve(Protocol):
    """Starts an instance and waits until it listens; it is closed with the test."""

    def __call__(
        self,
        backend: str | None = None,
        awaited: str = "listening",
        uids_count: int = Uids.SIZE,
        program: Path | None = None,
        **tables: Any,
    ) -> Instance: ...


@pytest.fixture(scope="session", autouse=True)
def many_descriptors() -> None:
    """Hundreds of connections, both ends of each in this process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """``certificates("RSA-2048", "www.example.org")``: made when first asked for."""
    return Authority(tmp_path_factory.mktemp("authority")).issue


def _certificate(table: Table, certificates: Certificates) -> Table:
    """What a virtual host has if it says nothing of certificates."""
    if "certificates" in table or "certificate_dir" in table:
        return {}
    issued = certificates()
    return {"certificate": issued.certificate, "key": issued.key}


def _factory(certificates: Certificates, directories: pytest.TempPathFactory) -> Iterator[Serve]:
    instances: list[Instance] = []

    def serve(
        backend: str | None = None,
        awaited: str = "listening",
        uids_count: int = Uids.SIZE,
        program: Path | None = None,
        **tables: Any,
    ) -> Instance:
        """One virtual host for all on 127.0.0.1, but for what ``tables`` say."""
        vhost: list[Table] = tables.pop("vhost", [{}])
        complete: Table = {
            "listen": [{"address": f"127.0.0.1:{free_port()}"}],
            "vhost": [
                {"backend": backend, **_certificate(table, certificates), **table}
                for table in vhost
            ],
            **tables,
        }
        instance = Instance.from_tables(
            directories.mktemp("instance"), complete, uids_count, program
        )
        instances.append(instance)
        instance.wait_for_event(awaited)
        return instance

    yield serve
    problems = []
    for instance in instances:
        try:
            instance.close()
        except AssertionError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)


@pytest.fixture
def serve(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    yield from _factory(certificates, tmp_path_factory)


@pytest.fixture(scope="module")
def serve_all(
    certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serve]:
    """As ``serve``, for a module's tests together."""
    yield from _factory(certificates, tmp_path_factory)


def _open_directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where everybody can look for sockets: pytest's own directories are their owner's."""
    yield from _open_directory()


@pytest.fixture(scope="module")
def shared_directory() -> Iterator[Path]:
    """The same for a module's tests together."""
    yield from _open_directory()


@pytest.fixture
def backend() -> Iterator[Listener]:
    """A backend on TCP in the test's own hands."""
    with Listener.tcp() as listener:
        yield listener


@pytest.fixture(scope="module")
def echoing() -> Iterator[Listener]:
    """A backend that sends back what it gets, and ends when its client does."""
    with Listener.tcp() as listener, served_by(listener, echo):
        yield listener


@pytest.fixture(scope="module")
def patient() -> Iterator[str]:
    """The address of such a backend that never lets go of who says nothing."""
    with echo_for_many() as address:
        yield address


@pytest.fixture
def command_line(tmp_path: Path, default_uids: None) -> Iterator[Callable[..., Instance]]:
    """``titus-py serve`` with options alone."""
    instances: list[Instance] = []

    def serve(backend: str, certificate: Certificate) -> Instance:
        port = free_port()
        options = [f"--listen=127.0.0.1:{port}", f"--backend={backend}"]
        options += [f"--cert={certificate.certificate}", f"--key={certificate.key}"]
        instance = Instance(options, tmp_path / f"log-{port}", range(0), port)
        instances.append(instance)
        return instance.wait_until_listening()

    yield serve
    for instance in instances:
        instance.close()


class Nginx:
    """A stock nginx: files of a directory below /, PUT into it below /upload.

    At ``h2_address`` it speaks HTTP/2, without TLS and with no other version of HTTP before it,
    and passes gRPC on to ``grpc_address``.
    """

    def __init__(self, directory: Path) -> None:
        self.files = directory / "files"
        self.uploads = directory / "upload"
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.h2_address, self.grpc_address = (f"127.0.0.1:{free_port()}" for _ in range(2))
        for path in (self.files, self.uploads):
            path.mkdir()
        (self.files / "index.html").write_text("It works.\n")
        configuration = directory / "nginx.conf"
        configuration.write_text(
            f"""\
            user root;
            worker_processes 1;
            error_log {directory}/error.log;
            pid {directory}/nginx.pid;
            events {{ worker_connections 1024; }}
            http {{
                access_log off;
                client_max_body_size 0;
                client_body_temp_path {directory}/body;
                proxy_temp_path {directory}/proxy;
                fastcgi_temp_path {directory}/fastcgi;
                uwsgi_temp_path {directory}/uwsgi;
                scgi_temp_path {directory}/scgi;
                server {{
                    listen 127.0.0.1:{self.port};
                    root {self.files};
                    location /upload/ {{ root {directory}; dav_methods PUT; }}
                }}
                server {{
                    listen {self.h2_address} http2;
                    root {self.files};
                    location /grpc. {{ grpc_pass grpc://{self.grpc_address}; }}
                }}
            }}
            """
        )
        self._process = subprocess.Popen(
            ["nginx", "-c", configuration, "-e", directory / "error.log", "-g", "daemon off;"],
            start_new_session=True,
        )
        eventually(self._answers, "nginx listens")

    def _answers(self) -> bool:
        try:
            connect(self.port).close()
        except ConnectionRefusedError:
            return False
        return True

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(60)


@pytest.fixture(scope="session")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    server = Nginx(tmp_path_factory.mktemp("nginx"))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session", autouse=True)
def root() -> None:
    assert os.geteuid() == 0, "these tests start the proxy as it is started: as root"
