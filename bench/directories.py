"""A directory of many certificates, and how the proxies that can are told to serve all of it.

Each file NAME.pem has a certificate, its chain and its key: a ``certificate_dir`` of titus-py's, a
``crt`` of haproxy's. nginx gets a server for each, within ``http``: its ``stream`` of Debian 12
tells no names apart.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.peers import BACKLOG, CONNECTIONS, FIRST_UID, WORKERS
from titus_py.audit.throwaway_authority import ThrowawayAuthority

__all__ = ["SERVERS", "Directory", "Server"]

KEY_TYPE = "P-256"


class Directory:
    """So many certificates, for the names host0.example, host1.example, and so on."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.count = count
        self._authority = ThrowawayAuthority()
        path.mkdir()
        for number in range(count):
            self.issue(number)

    def name(self, number: int) -> str:
        return f"host{number}.example"

    def issue(self, number: int) -> None:
        """A new certificate with a new key, in place of what was there."""
        issued = self._authority.issue(KEY_TYPE, [self.name(number)])
        file, new = self.path / f"{self.name(number)}.pem", self.path / ".new"
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as output:
            output.write(issued.certificate + self._authority.certificate + issued.key)
        new.rename(file)


class Server(NamedTuple):
    """One kind of proxy; ``reload`` is the signal that has it read the directory again.

    ``configure`` returns its configuration: of a directory, for a port and a backend's port.
    """

    command: tuple[str, ...]
    reload: str
    configure: Callable[[Directory, Path, int, int], str]


def _titus_py(certificates: Directory, own: Path, port: int, backend_port: int) -> str:
    return f"""\
[worker]
uids = "{FIRST_UID}-{FIRST_UID + 13_998}"
max = {CONNECTIONS}
chroot = "{own}/empty"
[limits]
connections_per_prefix = {CONNECTIONS}
[keyd]
user = {FIRST_UID + 13_999}
[[listen]]
address = "127.0.0.1:{port}"
[[vhost]]
certificate_dir = "{certificates.path}"
backend = "127.0.0.1:{backend_port}"
min_version = "TLSv1.3"
"""


def _nginx(certificates: Directory, own: Path, port: int, backend_port: int) -> str:
    servers = "\n".join(
        f"    server {{ listen 127.0.0.1:{port} ssl; server_name {certificates.name(number)}; "
        f"ssl_certificate {file}; ssl_certificate_key {file}; "
        f"location / {{ proxy_pass http://127.0.0.1:{backend_port}; }} }}"
        for number in range(certificates.count)
        for file in (certificates.path / f"{certificates.name(number)}.pem",)
    )
    return f"""\
user nobody nogroup;
worker_processes {WORKERS};
pid {own}/pid;
error_log {own}/log error;
events {{ worker_connections {2 * CONNECTIONS}; }}
http {{
    access_log off;
    server_names_hash_max_size 65536;
    server_names_hash_bucket_size 128;
    ssl_protocols TLSv1.3;
    ssl_session_cache off;
    ssl_session_tickets off;
{servers}
}}
"""


def _haproxy(certificates: Directory, own: Path, port: int, backend_port: int) -> str:
    del own
    return f"""\
global
    nbthread {WORKERS}
    maxconn {CONNECTIONS}
    user nobody
    group nogroup
    tune.ssl.cachesize 0
defaults
    mode tcp
    backlog {BACKLOG}
    timeout connect 10s
    timeout client 60s
    timeout server 60s
listen tls
    bind 127.0.0.1:{port} ssl crt {certificates.path} ssl-min-ver TLSv1.3 no-tls-tickets
    server backend 127.0.0.1:{backend_port}
"""


_SERVE = (sys.executable, "-I", "-m", "titus_py", "serve", "--config")
#: By the names of ``peers``; the configuration's path follows the command.
SERVERS = {
    "titus-py": Server(_SERVE, "SIGHUP", _titus_py),
    "nginx": Server(("nginx", "-g", "daemon off;", "-c"), "SIGHUP", _nginx),
    "haproxy": Server(("haproxy", "-W", "-f"), "SIGUSR2", _haproxy),
}
