"""Servers and a load balancer that speak the PROXY protocol: nginx and haproxy, as they are."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .instance import eventually, free_port
from .peers import connect

__all__ = ["NGINX_SAYS", "Server", "haproxy_in_front", "haproxy_server", "nginx_server"]

#: What the servers below say of the header that they got.
NGINX_SAYS = (
    "$proxy_protocol_addr $proxy_protocol_port "
    "$proxy_protocol_server_addr $proxy_protocol_server_port"
)


class Server:
    """A backend; ``address`` is as a configuration has it."""

    def __init__(self, port: int, unix: Path | None = None) -> None:
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self.unix = f"unix:{unix}"


@contextmanager
def _running(program: list[object], port: int) -> Iterator[None]:
    process = subprocess.Popen(program, start_new_session=True)

    def listens() -> bool:
        assert process.poll() is None, f"{program[0]} has ended"
        try:
            connect(port).close()
        except ConnectionRefusedError:
            return False
        return True

    try:
        eventually(listens, f"{program[0]} listens")
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def nginx_server(directory: Path) -> Iterator[Server]:
    """An nginx that tells each client what the PROXY header said."""
    server = Server(free_port(), directory / "nginx.sock")
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
            client_body_temp_path {directory}/body;
            proxy_temp_path {directory}/proxy;
            fastcgi_temp_path {directory}/fastcgi;
            uwsgi_temp_path {directory}/uwsgi;
            scgi_temp_path {directory}/scgi;
            server {{
                listen {server.address} proxy_protocol;
                listen {server.unix} proxy_protocol;
                return 200 "{NGINX_SAYS}";
            }}
        }}
        """
    )
    options = ["-c", configuration, "-e", directory / "error.log", "-g", "daemon off;"]
    with _running(["nginx", *options], server.port):
        yield server


@contextmanager
def haproxy_server(directory: Path) -> Iterator[Server]:
    """A haproxy that tells each client what the PROXY header said, and the name in it."""
    server = Server(free_port(), directory / "haproxy.sock")
    says = "%[src] %[src_port] %[dst] %[dst_port] %[fc_pp_authority]"
    with _haproxy(
        directory,
        f"""\
        frontend front
            bind {server.address} accept-proxy
            bind {server.unix.removeprefix("unix:")} accept-proxy
            http-request return status 200 content-type text/plain lf-string "{says}"
        """,
        server.port,
    ):
        yield server


@contextmanager
def haproxy_in_front(directory: Path, to: int, how: str) -> Iterator[int]:
    """A load balancer that passes TCP on, with a header; yields its port."""
    port = free_port()
    with _haproxy(
        directory,
        f"""\
        listen balancer
            mode tcp
            bind :::{port} v4v6
            server titus 127.0.0.1:{to} {how}
        """,
        port,
    ):
        yield port


@contextmanager
def _haproxy(directory: Path, sections: str, port: int) -> Iterator[None]:
    configuration = directory / f"haproxy-{port}.cfg"
    configuration.write_text(
        f"""\
        global
            maxconn 200
        defaults
            mode http
            timeout connect 10s
            timeout client 60s
            timeout server 60s
{sections}
"""
    )
    with _running(["haproxy", "-db", "-q", "-f", configuration], port):
        yield
