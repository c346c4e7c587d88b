"""What a signature costs whose key another host has: beside one with a key of keyd's own.

Two instances of titus-py run on this machine: one lends its key, by TLS with both ends pinned; the
other one is the way there, a tunnel on a unix socket. The keyd that is measured is one of its own
for each way: with the key; with a connection to the lender's socket itself, introduced as the
lender's parent does; and with one through the tunnel. Each signs for clients on channels, one
request after the other on each: P-256, as for TLS 1.2. Every round measures every way, so that
whatever else the machine does hits all alike; the best round of each counts. Run as root, after
``make bench-quick`` has built ``build/sign``; prints Markdown.

    python -m bench.remote_signatures [--rounds 5] [--seconds 1]
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.load import quantile
from bench.measurements.signatures import times_of
from bench.peers import FIRST_UID
from bench.processes import free_port, running
from keyd.daemon import Keyd
from keyd.keys import load_private_key
from keyd.linux import seccomp
from keyd.powers import Key, rehearse
from keyd.protocol import ANY_NAME, Grant, Open, Power
from keyd.provider import openssl_configuration
from keyd.reference import key_id, reference_pem
from keyd.sites import Sites
from keyd.system_calls import SERVING
from keyd.upstream.broker import Broker
from keyd.upstream.connector import CONNECTED
from titus_py.audit.throwaway_authority import ThrowawayAuthority

OWN, DIRECT, TUNNEL = "a key of its own", "the lender's socket", "a tunnel to the lender"
SIGNERS = (1, 8)
_PROGRAM = Path(__file__).parents[1] / "build/sign"
_MOST, _LIFETIME_MS = 0xFFFF, 600_000
_CLIENT_HELLO = bytes.fromhex("010000290303" + "00" * 32 + "000002c02b0100")
_POWERS = frozenset({Power.SIGN_TLS12})
_BORROWER = "measured"
_PATIENCE_SECONDS = 30.0
#: As keyd has it.
_THREADS = (os.cpu_count() or 1) + 1


class Hosts:
    """The two instances, and what their configurations name."""

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o755)
        self.directory = directory
        authority = ThrowawayAuthority()
        for name in ("site", "lender", "borrower"):
            issued = authority.issue("P-256", ["localhost"])
            (directory / f"{name}.crt").write_bytes(issued.certificate)
            key = directory / f"{name}.key"
            key.touch(0o600)
            key.write_bytes(issued.key)
        self.site = directory / "site.key"
        self.lender, self.tunnel = directory / "lend.sock", directory / "tunnel.sock"

    @contextmanager
    def running(self) -> Iterator[None]:
        port = free_port()
        lending = f"""\
[[listen]]
address = "127.0.0.1:{port}"
[[vhost]]
certificate = "{self.directory}/lender.crt"
key = "{self.directory}/lender.key"
backend = "unix:{self.lender}"
min_version = "TLSv1.3"
client_certificates = "required"
send_proxy = "v2-tls-cert"
[[vhost.client]]
name = "{_BORROWER}"
spki = ["{self._pin("borrower")}"]
[[keyd.client]]
name = "{_BORROWER}"
keys = ["{self.site}"]
operations = ["sign_tls12"]
rate = "1000000/s"
"""
        tunnel = f"""\
[[tunnel]]
listen = "unix:{self.tunnel}"
connect = "127.0.0.1:{port}"
certificate = "{self.directory}/borrower.crt"
key = "{self.directory}/borrower.key"
pins = ["{self._pin("lender")}"]
"""
        with (
            self._instance("lender", FIRST_UID, lending, f'lend = "unix:{self.lender}"', port),
            self._instance("borrower", FIRST_UID + 1000, tunnel, "", None),
        ):
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not self.tunnel.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            # For a process that is not the lender's parent.
            self.lender.chmod(0o666)
            yield

    @contextmanager
    def _instance(
        self, name: str, uid: int, tables: str, keyd: str, port: int | None
    ) -> Iterator[None]:
        configuration = self.directory / f"{name}.toml"
        configuration.write_text(
            f'[keyd]\nuser = {uid + 999}\n{keyd}\n[worker]\nuids = "{uid}-{uid + 998}"\n'
            f'max = 100\nchroot = "{self.directory}/empty"\n{tables}'
        )
        command = [sys.executable, "-I", "-m", "titus_py", "serve", "--config", str(configuration)]
        with running(command, self.directory / f"{name}.log", port):
            yield

    def _pin(self, name: str) -> str:
        key = load_private_key(str(self.directory / f"{name}.key"), None)
        return f"sha256:{key_id(key.public_key()).hex()}"

    def connect(self, way: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        if way == DIRECT:
            # The lender hears who has its parent's uid.
            os.seteuid(FIRST_UID + 998)
        try:
            connection.connect(str(self.tunnel if way == TUNNEL else self.lender))
        finally:
            os.seteuid(0)
        if way == DIRECT:
            connection.send(_introduction(_BORROWER.encode()))
        return connection


def _introduction(name: bytes) -> bytes:
    """A PROXY header that has no more than the name of a known client."""
    body = bytes(12) + b"\xe0" + len(name).to_bytes(2, "big") + name
    return b"\r\n\r\n\0\r\nQUIT\n" + b"\x21\x11" + len(body).to_bytes(2, "big") + body


class Measured:
    """A keyd in a child process, by one of the ways, and what signs on channels to it."""

    def __init__(self, hosts: Hosts, way: str, seconds: float) -> None:
        self._seconds, self._directory = seconds, hosts.directory
        key = load_private_key(str(hosts.site), None)
        self._reference = hosts.directory / "reference"
        self._reference.write_bytes(reference_pem(key.public_key()))
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection = None if way == OWN else hosts.connect(way)
        self.pid = os.fork()
        if not self.pid:
            self.ours.close()
            try:
                _serve(key, connection, theirs, self._reference.read_text())
            finally:
                os._exit(1)
        theirs.close()
        if connection is not None:
            connection.close()
        self.ours.recv(1)

    def close(self) -> None:
        self.ours.close()
        os.waitpid(self.pid, 0)

    def times(self, signers: int) -> list[list[float]]:
        """Of each signer, the microseconds of each signature."""
        with ExitStack() as stack:
            return times_of([stack.enter_context(self._sign()) for _ in range(signers)])

    def _sign(self) -> "subprocess.Popen[str]":
        ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, keyds:
            socket.send_fds(self.ours, [b"C"], [keyds.fileno()])
            configuration = self._directory / f"openssl-{ours.fileno()}.cnf"
            # An earlier signer with this number may be reading the same.
            if not configuration.exists():
                configuration.write_text(openssl_configuration(f"channel_fd = {ours.fileno()}"))
            return subprocess.Popen(
                [_PROGRAM, self._reference, str(self._seconds), str(_MOST)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OPENSSL_CONF": str(configuration)},
                pass_fds=[ours.fileno()],
            )


def _serve(
    key: Key,
    connection: socket.socket | None,
    channels: socket.socket,
    reference: str,
) -> None:
    """In the child: a keyd behind its filter, with a channel for each descriptor that comes."""
    identity = key_id(key.public_key())
    keys: dict[bytes, Key] = {identity: key}
    broker = None
    if connection is not None:
        connects, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(connects, [CONNECTED + b"\0"], [connection.fileno()] * 2)
        connection.close()
        broker = Broker(ours, ["measured"], [reference])
        keys = dict(broker.keys)
    rehearse(key)  # type: ignore[arg-type]
    sites = Sites()
    sites.add(Grant(0, ANY_NAME, identity, _POWERS))
    keyd = Keyd(keys, judged_again=() if broker is None else broker.keys)
    terms = Open(1, _LIFETIME_MS, _MOST, 0, _CLIENT_HELLO)

    def hear() -> bool:
        message, descriptors, _, _ = socket.recv_fds(channels, 1, 1)
        if not message:
            os._exit(0)
        kind = socket.AF_UNIX, socket.SOCK_SEQPACKET, 0
        endpoint = socket.socket(*kind, fileno=descriptors[0])
        keyd.open(terms, sites, endpoint, _ignore)
        return False

    keyd.hear_process(channels, hear)
    if broker is not None:
        broker.serve(keyd)

    def ready() -> None:
        channels.send(b"R")

    keyd.serve(_THREADS, seccomp.build(SERVING), ready)


def _ignore(_: object) -> None:
    """Of no interest here."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        hosts = Hosts(Path(directory))
        with hosts.running():
            best = _measure(hosts, options.rounds, options.seconds)
    print("| way | signers | median | a second |\n|---|---|---|---|")
    for (way, signers), (median, rate) in best.items():
        print(f"| {way} | {signers} | {median:.0f} µs | {rate:,.0f} |")
    return 0


def _measure(
    hosts: Hosts, rounds: int, seconds: float
) -> dict[tuple[str, int], tuple[float, float]]:
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for way in (OWN, DIRECT, TUNNEL):
            measured = Measured(hosts, way, seconds)
            try:
                for signers in SIGNERS:
                    begun = time.perf_counter()
                    times = measured.times(signers)
                    elapsed = time.perf_counter() - begun
                    every = [one for signer in times for one in signer]
                    # Several do not begin at once: their start counts.
                    rate = len(every) / (elapsed if signers > 1 else sum(every) / 1e6)
                    found.setdefault((way, signers), []).append((quantile(every, 0.5), rate))
            finally:
                measured.close()
    return {
        one: (min(median for median, _ in values), max(rate for _, rate in values))
        for one, values in found.items()
    }


if __name__ == "__main__":
    sys.exit(main())
