"""Servers and a load balancer that speak the PROXY protocol: nginx and haproxy, as they are."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .instance import eventually, free_port
from .peers import connect

__all__ = ["Server", "haproxy_in_front", "haproxy_server", "nginx_in_front", "nginx_server"]

_ADDRESSES = {
    "nginx": "$proxy_protocol_addr $proxy_protocol_port "
    "$proxy_protocol_server_addr $proxy_protocol_server_port",
    "haproxy": "%[src] %[src_port] %[dst] %[dst_port]",
}
#: What they know of the TLVs, from which version on: what it is, and their word for it.
_FACTS = {
    "nginx": [
        ((1, 23, 2), "name", "$proxy_protocol_tlv_authority"),
        ((1, 23, 2), "version", "$proxy_protocol_tlv_ssl_version"),
        ((1, 23, 2), "cipher", "$proxy_protocol_tlv_ssl_cipher"),
        ((1, 23, 2), "cn", "$proxy_protocol_tlv_ssl_cn"),
    ],
    "haproxy": [
        ((2, 2), "name", "%[fc_pp_authority]"),
        ((2, 9), "tls", "%[fc_pp_tlv(0x20),hex]"),
    ],
}


class Server:
    """A backend that tells each client what the PROXY header said of it.

    ``address`` and ``unix`` are as a configuration has them; ``answer`` is what it says, and
    ``facts`` are the names of the words after the four for the addresses.
    """

    def __init__(self, program: str, directory: Path) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.unix = f"unix:{directory / program}.sock"
        known = [fact for fact in _FACTS[program] if fact[0] <= _version(program)]
        self.facts = [name for _, name, _ in known]
        self.answer = " ".join([_ADDRESSES[program], *(f"[{word}]" for _, _, word in known)])

    def told(self, answer: str) -> tuple[list[str], dict[str, str]]:
        """The addresses and ports, and the facts that it knows: empty if it was not told."""
        words = answer.split()
        return words[:4], dict(zip(self.facts, (word[1:-1] for word in words[4:]), strict=True))


def _version(program: str) -> tuple[int, ...]:
    done = subprocess.run([program, "-v"], check=True, capture_output=True, text=True)
    numbers = re.search(r"version:? (?:nginx/)?(\d+(?:\.\d+)+)", done.stdout + done.stderr)
    assert numbers is not None
    return tuple(map(int, numbers[1].split(".")))


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
        process.wait(60)


@contextmanager
def nginx_server(directory: Path) -> Iterator[Server]:
    """nginx, which understands the header of connections to both its sockets."""
    server = Server("nginx", directory)
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
                return 200 "{server.answer}";
            }}
        }}
        """
    )
    options = ["-c", configuration, "-e", directory / "error.log", "-g", "daemon off;"]
    with _running(["nginx", *options], server.port):
        yield server


@contextmanager
def haproxy_server(directory: Path) -> Iterator[Server]:
    """haproxy, likewise."""
    server = Server("haproxy", directory)
    with _haproxy(
        directory,
        f"""\
        frontend front
            bind {server.address} accept-proxy
            bind {server.unix.removeprefix("unix:")} accept-proxy
            http-request return status 200 content-type text/plain lf-string "{server.answer}"
        """,
        server.port,
    ):
        yield server


@contextmanager
def haproxy_in_front(directory: Path, to: int | Path, how: str) -> Iterator[int]:
    """A load balancer that passes TCP on, to a port or a unix socket, with a header.

    Yields its port.
    """
    server = f"unix@{to}" if isinstance(to, Path) else f"127.0.0.1:{to}"
    port = free_port()
    with _haproxy(
        directory,
        f"""\
        listen balancer
            mode tcp
            bind :::{port} v4v6
            server titus {server} {how}
        """,
        port,
    ):
        yield port


@contextmanager
def nginx_in_front(directory: Path, to: Path) -> Iterator[int]:
    """The same with nginx's stream, to a unix socket; its header is a line."""
    port = free_port()
    configuration = directory / "nginx-stream.conf"
    configuration.write_text(
        f"""\
        load_module /usr/lib/nginx/modules/ngx_stream_module.so;
        user root;
        worker_processes 1;
        error_log {directory}/error.log;
        pid {directory}/nginx.pid;
        events {{ worker_connections 1024; }}
        stream {{
            server {{
                listen 127.0.0.1:{port};
                proxy_pass unix:{to};
                proxy_protocol on;
            }}
        }}
        """
    )
    options = ["-c", configuration, "-e", directory / "error.log", "-g", "daemon off;"]
    with _running(["nginx", *options], port):
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
