"""The servers, each with the configuration that docs/keyd.md has for it, at other paths."""

import os
import re
import signal
import subprocess
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_GUIDE = Path(__file__).parents[2] / "docs/keyd.md"
_APACHE_MODULES = ("mpm_event", "authz_core", "ssl")


class Site(NamedTuple):
    """What a server is started with: files, of which ``key`` may be a reference; and ports."""

    directory: Path
    certificate: Path
    key: Path
    port: int
    backend_port: int


class Program(NamedTuple):
    """One kind of server. ``configure`` returns the command that runs it in the foreground."""

    name: str
    #: Whom those of its processes run as that shake hands.
    user: str
    configure: Callable[[Site], list[str]]
    reload_signal: signal.Signals = signal.SIGHUP
    #: Certificate and key, or reference, are one file.
    one_file: bool = False
    #: Below which its processes find keyd's socket.
    has_root_of_its_own: bool = False
    #: Whether it runs as its user from the start, and so has to be given its files.
    unprivileged: bool = False

    def start(self, site: Site, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        command = self.configure(site)
        if self.unprivileged:
            identity = [f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups"]
            command = ["setpriv", *identity, *command]
        with (site.directory / "server-log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                cwd=site.directory,
                start_new_session=True,
            )


def _documented(language: str, replaced: Mapping[str, object]) -> str:
    """The guide's example, with these things in it replaced; each of them has to be there."""
    found = re.search(rf"^ *```{language}\n(.*?)^ *```$", _GUIDE.read_text(), re.DOTALL | re.M)
    assert found, f"no example for {language}"
    text = textwrap.dedent(found[1])
    for old, new in replaced.items():
        assert old in text, f"no {old} in the example for {language}"
        text = text.replace(old, str(new))
    return text


def _write(site: Site, name: str, text: str) -> str:
    path = site.directory / name
    path.write_text(text)
    path.chmod(0o644)
    return str(path)


def _nginx(site: Site) -> list[str]:
    server = _documented(
        "nginx",
        {
            "443": f"127.0.0.1:{site.port}",
            "/etc/nginx/www.crt": site.certificate,
            "/etc/nginx/www.reference": site.key,
        },
    )
    path = _write(
        site,
        "nginx.conf",
        f"user www-data;\nworker_processes 2;\npid {site.directory}/nginx.pid;\n"
        f"events {{ }}\nhttp {{\naccess_log off;\n{server}\n}}\n",
    )
    return ["nginx", "-c", path, "-e", "stderr", "-g", "daemon off;"]


def _haproxy(site: Site) -> list[str]:
    text = _documented(
        "haproxy",
        {
            ":443": f"127.0.0.1:{site.port}",
            "/etc/haproxy/www.pem": site.key,
            "/var/lib/haproxy": root_of(site.directory),
            "8080": site.backend_port,
        },
    )
    return ["haproxy", "-W", "-db", "-f", _write(site, "haproxy.cfg", text)]


def root_of(directory: Path) -> Path:
    """The root directory of a server that has one of its own."""
    return directory / "root"


def _stunnel(site: Site) -> list[str]:
    text = _documented(
        "ini",
        {
            "443": f"127.0.0.1:{site.port}",
            "8080": site.backend_port,
            "/etc/stunnel/www.crt": site.certificate,
            "/etc/stunnel/www.reference": site.key,
        },
    )
    head = "syslog = no\npid =\n"
    return ["stunnel4", _write(site, "stunnel.conf", head + text)]


def _apache(site: Site) -> list[str]:
    host = _documented(
        "apache",
        {
            "*:443": f"127.0.0.1:{site.port}",
            "/etc/apache2/www.crt": site.certificate,
            "/etc/apache2/www.reference": site.key,
        },
    )
    modules = "".join(
        f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n"
        for name in _APACHE_MODULES
    )
    text = (
        f"{modules}ServerRoot {site.directory}\nServerName localhost\nPidFile apache.pid\n"
        f"User www-data\nGroup www-data\nErrorLog error-log\nDefaultRuntimeDir {site.directory}\n"
        f"Listen 127.0.0.1:{site.port}\nSSLSessionCache none\n{host}"
    )
    return ["apache2", "-D", "FOREGROUND", "-f", _write(site, "apache.conf", text)]


def _postgresql(site: Site) -> list[str]:
    # Debian 12 has 15, Debian 13 has 17.
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"))
    data = site.directory / "data"
    if not data.exists():
        _as_postgres(site, [programs / "initdb", "--no-sync", "-A", "trust", "-D", data])
    text = _documented(
        "postgresql",
        {
            "/etc/postgresql/www.crt": site.certificate,
            "/etc/postgresql/www.reference": site.key,
        },
    )
    (data / "conf.d").mkdir(exist_ok=True)
    text += f"port = {site.port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\n"
    # All that is shared is searched, in each of its processes.
    text += "shared_buffers = 1MB\nmax_connections = 20\n"
    path = _write(site, "postgresql.conf", text)
    return [str(programs / "postgres"), "-D", str(data), "-c", f"config_file={path}"]


def _as_postgres(site: Site, command: Sequence[str | Path]) -> None:
    subprocess.run(
        command,
        user="postgres",
        group="postgres",
        extra_groups=[],
        cwd=site.directory,
        env={**os.environ, "LC_ALL": "C"},
        check=True,
        capture_output=True,
    )


PROGRAMS = (
    Program("nginx", "www-data", _nginx),
    Program(
        "haproxy",
        "haproxy",
        _haproxy,
        reload_signal=signal.SIGUSR2,
        one_file=True,
        has_root_of_its_own=True,
    ),
    Program("stunnel", "stunnel4", _stunnel, unprivileged=True),
    Program("apache", "www-data", _apache, reload_signal=signal.SIGUSR1),
    Program("postgresql", "postgres", _postgresql, unprivileged=True),
)
