"""The proxies: how each is configured, all alike, and which Debian packages bring it.

TLS 1.3 only, no tickets and no resumption, the same certificate and backend, two workers
where a proxy has such a knob, a user of its own for those, the largest backlog, room for a
few thousand connections. titus-py keeps its defaults beside that: its full confinement. The floor
(floor.c) has that confinement and nothing else.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from keyd.keys import load_private_key
from keyd.provider import openssl_configuration
from keyd.reference import reference_pem

__all__ = [
    "BACKLOG",
    "CONNECTIONS",
    "FIRST_UID",
    "FLOOR",
    "NGINX",
    "NGINX_WITH_KEYD",
    "NO_TICKETS",
    "PEERS",
    "TITUS_PY",
    "WITH_KEYD",
    "WORKERS",
    "Peer",
    "Setting",
    "Site",
    "make_site",
    "version_of_package",
]

TITUS_PY = "titus-py"
FLOOR = "floor"
NGINX = "nginx"
NGINX_WITH_KEYD = "nginx with keyd"
#: Built by ``make build/floor``.
FLOOR_PROGRAM = str(Path(__file__).parents[1] / "build" / "floor")
WORKERS = 2
BACKLOG = 4096
CONNECTIONS = 4096
_IDLE_SECONDS = 600
#: titus-py's users: far beyond what anybody gives out.
FIRST_UID = 1_500_000_000 + os.getpid() % 10_000 * 20_000

#: Whom keyd becomes beside nginx, whose workers are nobody.
_KEYD_USER = "daemon"

_KEYS = {
    "RSA-2048": ["-newkey", "rsa:2048"],
    "P-256": ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
}


#: For every context: what "tickets off" leaves in TLS 1.3 are tickets that name a session.
NO_TICKETS = """\
openssl_conf = init
[init]
ssl_conf = tls
[tls]
system_default = defaults
[defaults]
NumTickets = 0
"""


class Site(NamedTuple):
    """A certificate for ``localhost``, and its key; ``both`` is one after the other."""

    key_type: str
    certificate: Path
    key: Path
    both: Path


class Setting(NamedTuple):
    """What one proxy is started with; ``directory`` is its own."""

    directory: Path
    site: Site
    port: int
    backend_port: int


class Peer(NamedTuple):
    """One kind of proxy; ``configure`` returns the command that runs it in the foreground."""

    name: str
    program: str
    packages: tuple[str, ...]
    configure: Callable[[Setting], list[str]]

    def environment(self, setting: Setting) -> dict[str, str] | None:
        """Without tickets, also where a proxy has no way to say so; titus-py sends none."""
        if self.name == TITUS_PY:
            return None
        path = setting.directory / "openssl.cnf"
        if self.name == NGINX_WITH_KEYD:
            path.write_text(openssl_configuration(f"socket = {_socket(setting)}", "NumTickets = 0"))
        else:
            path.write_text(NO_TICKETS)
        return os.environ | {"OPENSSL_CONF": str(path)}

    @property
    def is_installed(self) -> bool:
        return shutil.which(self.program) is not None


def make_site(directory: Path, key_type: str) -> Site:
    site = Site(key_type, *(directory / f"{key_type}.{end}" for end in ("crt", "key", "pem")))
    command = ["openssl", "req", "-x509", *_KEYS[key_type], "-nodes", "-days", "30"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(site.key), "-out", str(site.certificate)]
    subprocess.run(command, check=True, capture_output=True)
    site.both.touch(0o600)
    site.both.write_bytes(site.key.read_bytes() + site.certificate.read_bytes())
    return site


def version_of_package(package: str) -> str:
    query = ["dpkg-query", "--show", "--showformat=${Version}", package]
    return subprocess.run(query, check=False, capture_output=True, text=True).stdout


def _titus_py(setting: Setting) -> list[str]:
    tables: dict[str, dict[str, object]] = {
        "[worker]": {
            "uids": f"{FIRST_UID}-{FIRST_UID + 13_998}",
            "max": CONNECTIONS,
            "chroot": str(setting.directory / "empty"),
        },
        # The load comes from one address.
        "[limits]": {"connections_per_prefix": CONNECTIONS},
        "[keyd]": {"user": str(FIRST_UID + 13_999)},
        "[[listen]]": {"address": f"127.0.0.1:{setting.port}"},
        "[[vhost]]": {
            "certificate": str(setting.site.certificate),
            "key": str(setting.site.key),
            "backend": f"127.0.0.1:{setting.backend_port}",
            "min_version": "TLSv1.3",
        },
    }
    lines = []
    for heading, table in tables.items():
        # JSON's strings and numbers are TOML's.
        lines += [heading, *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    configuration = _write(setting, "\n".join(lines) + "\n")
    return [sys.executable, "-I", "-m", "titus_py", "serve", "--config", configuration]


def _floor(setting: Setting) -> list[str]:
    empty = setting.directory / "empty"
    empty.mkdir()
    site, first_uid = setting.site, FIRST_UID + 14_000
    ports = str(setting.port), str(setting.backend_port)
    return [FLOOR_PROGRAM, *ports, str(site.certificate), str(site.key), str(empty), str(first_uid)]


def _nginx(setting: Setting) -> list[str]:
    return _nginx_with(setting, setting.site.key, WORKERS)


def _nginx_with_keyd(setting: Setting) -> list[str]:
    """keyd is a child of nginx's, so that what it uses is counted with nginx."""
    reference, path = setting.directory / "reference", _socket(setting)
    public = load_private_key(str(setting.site.key), None).public_key()
    reference.write_bytes(reference_pem(public))
    command: list[str | Path] = [sys.executable, "-I", "-m", "keyd", "listen", "--socket", path]
    command += ["--key", setting.site.key, "--user", str(_KEYD_USER), "--group", "nogroup"]
    command += ["--chroot", setting.directory / "empty"]
    script = f"{shlex.join(map(str, command))} & while ! test -S {path}; do sleep 0.05; done; "
    # As docs/keyd.md has it: one of them can wait for keyd, and another one has the processor.
    nginx = _nginx_with(setting, reference, 2 * WORKERS)
    return ["sh", "-c", f"{script}exec {shlex.join(nginx)}"]


def _socket(setting: Setting) -> Path:
    return setting.directory / "keyd.sock"


def _nginx_with(setting: Setting, key: Path, workers: int) -> list[str]:
    configuration = _write(
        setting,
        f"""\
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
user nobody nogroup;
worker_processes {workers};
pid {setting.directory}/pid;
error_log {setting.directory}/log error;
events {{ worker_connections {2 * CONNECTIONS}; }}
stream {{
    server {{
        listen 127.0.0.1:{setting.port} ssl backlog={BACKLOG};
        ssl_certificate {setting.site.certificate};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.3;
        ssl_session_cache off;
        ssl_session_tickets off;
        proxy_timeout {_IDLE_SECONDS}s;
        proxy_pass 127.0.0.1:{setting.backend_port};
    }}
}}
""",
    )
    return ["nginx", "-c", configuration, "-e", f"{setting.directory}/log", "-g", "daemon off;"]


def _haproxy(setting: Setting) -> list[str]:
    configuration = _write(
        setting,
        f"""\
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
    timeout client {_IDLE_SECONDS}s
    timeout server {_IDLE_SECONDS}s
listen tls
    bind 127.0.0.1:{setting.port} ssl crt {setting.site.both} ssl-min-ver TLSv1.3 no-tls-tickets
    server backend 127.0.0.1:{setting.backend_port}
""",
    )
    return ["haproxy", "-db", "-f", configuration]


def _stunnel(setting: Setting) -> list[str]:
    # A thread for each connection: it has no number of workers.
    configuration = _write(
        setting,
        f"""\
foreground = yes
pid =
syslog = no
debug = err
setuid = nobody
setgid = nogroup
[tls]
accept = 127.0.0.1:{setting.port}
connect = 127.0.0.1:{setting.backend_port}
cert = {setting.site.certificate}
key = {setting.site.key}
sslVersion = TLSv1.3
sessionResume = no
options = NO_TICKET
TIMEOUTidle = {_IDLE_SECONDS}
""",
    )
    return ["stunnel4", configuration]


def _hitch(setting: Setting) -> list[str]:
    configuration = _write(
        setting,
        f"""\
frontend = "[127.0.0.1]:{setting.port}"
backend = "[127.0.0.1]:{setting.backend_port}"
pem-file = "{setting.site.both}"
tls-protos = TLSv1.3
workers = {WORKERS}
backlog = {BACKLOG}
user = "nobody"
group = "nogroup"
daemon = off
log-level = 0
""",
    )
    return ["hitch", f"--config={configuration}"]


def _write(setting: Setting, text: str) -> str:
    path = setting.directory / "configuration"
    path.write_text(text)
    return str(path)


_NGINX_PACKAGES = ("nginx-light", "libnginx-mod-stream")
#: nginx, with its key and without: a measurement of their own.
WITH_KEYD = (
    Peer(NGINX, "nginx", _NGINX_PACKAGES, _nginx),
    Peer(NGINX_WITH_KEYD, "nginx", _NGINX_PACKAGES, _nginx_with_keyd),
)
PEERS = (
    Peer(TITUS_PY, sys.executable, (), _titus_py),
    Peer(FLOOR, FLOOR_PROGRAM, (), _floor),
    Peer(NGINX, "nginx", _NGINX_PACKAGES, _nginx),
    Peer("haproxy", "haproxy", ("haproxy",), _haproxy),
    Peer("stunnel", "stunnel4", ("stunnel4",), _stunnel),
    Peer("hitch", "hitch", ("hitch",), _hitch),
)
