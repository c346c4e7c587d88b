"""What carries plaintext between two programs, encrypted: how each is configured, all alike.

Both ends are on this machine, in one process, or tree of processes, for each peer. TLS 1.3 with
X25519 and AES-256-GCM, a certificate at both ends that the other end demands, no tickets,
TCP_NODELAY. Each end knows the other's certificate or key; Erlang knows their authority.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.peers import CONNECTIONS, FIRST_UID, NO_TICKETS, TITUS_PY
from keyd.keys import load_private_key
from keyd.reference import key_id
from titus_py.audit.throwaway_authority import ThrowawayAuthority

__all__ = ["TUNNELS", "Ends", "Keys", "Tunnel", "inet_tls_options", "make_keys"]

_SUITE = "TLS_AES_256_GCM_SHA384"


class Keys(NamedTuple):
    """Certificates for ``localhost``, each with its key beside it as NAME.key."""

    authority: Path
    server: Path
    client: Path


class Ends(NamedTuple):
    """What a tunnel is started with: its own directory; where it accepts, and connects to."""

    directory: Path
    keys: Keys
    port: int
    tls_port: int
    backend_port: int


class Tunnel(NamedTuple):
    """One kind; ``configure`` returns the command that runs both ends in the foreground."""

    name: str
    program: str
    configure: Callable[[Ends], list[str]]


def make_keys(directory: Path) -> Keys:
    authority = ThrowawayAuthority()
    keys = Keys(*(directory / f"{name}.crt" for name in Keys._fields))
    keys.authority.write_bytes(authority.certificate)
    for path in (keys.server, keys.client):
        issued = authority.issue("P-256", ["localhost"])
        path.write_bytes(issued.certificate)
        _key(path).touch(0o600)
        _key(path).write_bytes(issued.key)
    return keys


def _key(certificate: Path) -> Path:
    return certificate.with_suffix(".key")


def _pin(certificate: Path) -> str:
    public = load_private_key(str(_key(certificate)), None).public_key()
    return f"sha256:{key_id(public).hex()}"


def _titus_py(ends: Ends) -> list[str]:
    configuration = ends.directory / "configuration"
    configuration.write_text(
        f"""\
[worker]
uids = "{FIRST_UID}-{FIRST_UID + 13_998}"
max = {CONNECTIONS}
chroot = "{ends.directory}/empty"
[limits]
connections_per_prefix = {CONNECTIONS}
[keyd]
user = {FIRST_UID + 13_999}
[[tunnel]]
listen = "127.0.0.1:{ends.port}"
connect = "127.0.0.1:{ends.tls_port}"
pins = ["{_pin(ends.keys.server)}"]
certificate = "{ends.keys.client}"
key = "{_key(ends.keys.client)}"
min_version = "TLSv1.3"
[[listen]]
address = "127.0.0.1:{ends.tls_port}"
[[vhost]]
certificate = "{ends.keys.server}"
key = "{_key(ends.keys.server)}"
backend = "127.0.0.1:{ends.backend_port}"
min_version = "TLSv1.3"
groups = ["X25519"]
ciphersuites = "{_SUITE}"
client_certificates = "required"
client_allow = {{ spki = ["{_pin(ends.keys.client)}"] }}
"""
    )
    return [sys.executable, "-I", "-m", "titus_py", "serve", "--config", str(configuration)]


def _stunnel(ends: Ends) -> list[str]:
    both = f"""\
sslVersion = TLSv1.3
ciphersuites = {_SUITE}
curves = X25519
sessionResume = no
options = NO_TICKET
verifyPeer = yes
"""
    configuration, openssl = ends.directory / "configuration", ends.directory / "openssl.cnf"
    openssl.write_text(NO_TICKETS)
    configuration.write_text(
        f"""\
foreground = yes
pid =
syslog = no
debug = err
setuid = nobody
setgid = nogroup
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
[out]
client = yes
accept = 127.0.0.1:{ends.port}
connect = 127.0.0.1:{ends.tls_port}
cert = {ends.keys.client}
key = {_key(ends.keys.client)}
CAfile = {ends.keys.server}
{both}
[in]
accept = 127.0.0.1:{ends.tls_port}
connect = 127.0.0.1:{ends.backend_port}
cert = {ends.keys.server}
key = {_key(ends.keys.server)}
CAfile = {ends.keys.client}
{both}"""
    )
    return ["env", f"OPENSSL_CONF={openssl}", "stunnel4", str(configuration)]


def inet_tls_options(keys: Keys, path: Path) -> list[str]:
    """For ``erl``, with which nodes encrypt by themselves, at either end; written to a file."""

    def side(name: str, certificate: Path) -> str:
        files = {"cert": certificate, "key": _key(certificate), "cacert": keys.authority}
        options = [f"{{{kind}file, {json.dumps(os.fspath(file))}}}" for kind, file in files.items()]
        options += ["{verify, verify_peer}", "{versions, ['tlsv1.3']}"]
        options += [f'{{ciphers, ["{_SUITE}"]}}', "{supported_groups, [x25519]}"]
        if name == "server":
            options.append("{fail_if_no_peer_cert, true}")
        return f"{{{name}, [{', '.join(options)}]}}"

    path.write_text(f"[{side('server', keys.server)}, {side('client', keys.client)}].\n")
    return ["-proto_dist", "inet_tls", "-ssl_dist_optfile", str(path)]


TUNNELS = (
    Tunnel(TITUS_PY, sys.executable, _titus_py),
    Tunnel("stunnel", "stunnel4", _stunnel),
)
