"""What is behind every proxy: nginx, which answers, and a sink, which swallows."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.processes import free_port, running
from bench.sink import COMMAND

__all__ = ["SMALL", "SMALL_OCTETS", "Backend", "large", "serving"]

SMALL = "/small"
SMALL_OCTETS = 100


class Backend(NamedTuple):
    """Where they listen, on 127.0.0.1: plain HTTP."""

    port: int
    sink_port: int


def large(octets: int) -> str:
    """The path of a file of this length."""
    return f"/{octets}"


@contextmanager
def serving(directory: Path, lengths: set[int], cpus: set[int] | None) -> Iterator[Backend]:
    """Have both; the files of these lengths can be asked for. Raises Failed."""
    files = directory / "files"
    files.mkdir()
    for length in lengths:
        # Without a block on the disk: what is read is the page cache.
        with (files / str(length)).open("wb") as file:
            file.truncate(length)
    backend = Backend(free_port(), free_port())
    configuration = directory / "configuration"
    configuration.write_text(
        f"""\
user nobody nogroup;
worker_processes 1;
pid {directory}/pid;
error_log {directory}/log error;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_timeout 0;
    client_header_timeout 10m;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{backend.port} backlog=4096;
        root {files};
        location = {SMALL} {{ return 200 "{"x" * SMALL_OCTETS}"; }}
    }}
}}
"""
    )
    log = directory / "log"
    nginx = ["nginx", "-c", str(configuration), "-e", str(log), "-g", "daemon off;"]
    with ExitStack() as stack:
        stack.enter_context(running(nginx, log, backend.port, cpus))
        sink = [*COMMAND, str(backend.sink_port)]
        stack.enter_context(running(sink, log, backend.sink_port, cpus))
        yield backend
