"""What keyd adds to a signature: through the provider and keyd, and in the process itself.

Both ways sign.c signs, with the system's OpenSSL: once it has the key, once the reference to it
and a channel to a keyd that is confined as always. keyd itself signs with the OpenSSL that
``cryptography`` brings, another version; so what keyd does is measured by itself, too.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.load import quantile
from bench.measurements.handshakes import KEY_TYPES
from bench.peers import Site
from bench.processes import Failed, running
from bench.stage import Stage
from keyd.keys import load_private_key
from keyd.powers import ALL_POWERS, perform
from keyd.protocol import (
    ANY_NAME,
    MAX_KEYS_OCTETS,
    Grant,
    GrantSet,
    Keys,
    Open,
    Operation,
    SignatureScheme,
)
from keyd.provider import openssl_configuration
from keyd.reference import key_id, reference_pem

__all__ = ["IN_KEYD", "IN_PROCESS", "SIGNERS", "THROUGH_KEYD", "measure", "times_of"]

SIGNERS = (1, 2)
IN_PROCESS = "in the process"
THROUGH_KEYD = "through keyd"
IN_KEYD = "keyd's library"

#: As many operations as a channel's terms can allow.
_MOST = 0xFFFF
_LIFETIME_MS = 600_000
_PATIENCE_SECONDS = 10.0
_SCHEMES = {
    "RSA-2048": SignatureScheme.rsa_pss_rsae_sha256,
    "P-256": SignatureScheme.ecdsa_secp256r1_sha256,
}
#: Of a client of TLS 1.2, and what is signed for it: the parameters of a ServerKeyExchange.
_CLIENT_HELLO = bytes.fromhex("010000290303" + "00" * 32 + "000002c02b0100")
_CONTENT = bytes(64) + b"\x03\x00\x1d\x20" + bytes(32)


class _Ways:
    """The ways to have one key sign; each returns the times of each signer, in microseconds."""

    def __init__(self, stage: Stage, directory: Path, site: Site) -> None:
        self._program = stage.load.program.with_name("sign")
        self._seconds = stage.scope.signatures
        self._directory = directory
        self._site = site
        self._key = load_private_key(str(site.key), None)
        self._id = key_id(self._key.public_key())
        self._reference = directory / "reference"
        self._reference.write_bytes(reference_pem(self._key.public_key()))
        self._control: socket.socket | None = None

    def in_process(self, signers: int) -> list[list[float]]:
        with ExitStack() as stack:
            return times_of(
                [stack.enter_context(self._sign(self._site.key)) for _ in range(signers)]
            )

    def through_keyd(self, signers: int) -> list[list[float]]:
        with ExitStack() as stack:
            return times_of([self._sign_on_a_channel(stack) for _ in range(signers)])

    def in_keyds_library(self, signers: int) -> list[list[float]]:
        def sign() -> list[float]:
            times: list[float] = []
            scheme = _SCHEMES[self._site.key_type]
            now = begun = time.perf_counter()
            while now < begun + self._seconds:
                perform(Operation.SIGN, self._key, scheme, _CONTENT, ALL_POWERS, None)
                before, now = now, time.perf_counter()
                times.append(1e6 * (now - before))
            return times

        with ThreadPoolExecutor(signers) as pool:
            return [task.result() for task in [pool.submit(sign) for _ in range(signers)]]

    @contextmanager
    def keyd(self) -> Iterator[None]:
        """Have one run, as a service of its own, of which this process is the parent."""
        path = self._directory / "control"
        command: list[str | Path] = [sys.executable, "-m", "keyd", "control", "--socket", path]
        command += ["--key", self._site.key, "--user", "nobody"]
        command += ["--chroot", self._directory / "empty"]
        with running(command, self._directory / "log"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as self._control:
                _connect(self._control, path)
                Keys.decode(self._control.recv(MAX_KEYS_OCTETS))
                yield

    def _sign_on_a_channel(self, stack: ExitStack) -> subprocess.Popen[str]:
        """Open a channel as titus-py's parent does, and give the signer its other end."""
        assert self._control is not None
        ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, keyds:
            terms = Open(1, _LIFETIME_MS, _MOST, 0, _CLIENT_HELLO)
            for grants in GrantSet(0, (Grant(0, ANY_NAME, self._id, ALL_POWERS),)).encode():
                self._control.send(grants)
            socket.send_fds(self._control, [terms.encode()], [keyds.fileno()])
            configuration = self._directory / f"openssl-{ours.fileno()}.cnf"
            # An earlier signer with this number may be reading the same.
            if not configuration.exists():
                configuration.write_text(openssl_configuration(f"channel_fd = {ours.fileno()}"))
            environment = os.environ | {"OPENSSL_CONF": str(configuration)}
            signer = self._sign(self._reference, environment, [ours.fileno()])
            return stack.enter_context(signer)

    def _sign(
        self, key: Path, environment: dict[str, str] | None = None, descriptors: Sequence[int] = ()
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self._program, key, str(self._seconds), str(_MOST)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            pass_fds=descriptors,
        )


def measure(stage: Stage) -> None:
    for key_type in KEY_TYPES:
        ways = _Ways(stage, stage.new_directory(), stage.site(key_type))
        to_measure = {IN_PROCESS: ways.in_process, IN_KEYD: ways.in_keyds_library}
        with ExitStack() as stack:
            with stage.noting("signatures", THROUGH_KEYD, {"key": key_type}):
                stack.enter_context(ways.keyd())
                to_measure[THROUGH_KEYD] = ways.through_keyd
            for signers in SIGNERS:
                for _ in range(stage.scope.rounds):
                    for name, sign in to_measure.items():
                        with stage.noting(
                            "signatures", name, {"key": key_type, "signers": signers}
                        ) as sample:
                            times = sign(signers)
                            every = [one for signer in times for one in signer]
                            sample.values = {
                                "rate": sum(1e6 * len(one) / sum(one) for one in times),
                                "median_us": quantile(every, 0.5),
                                "p99_us": quantile(every, 0.99),
                            }


def times_of(signers: Sequence[subprocess.Popen[str]]) -> list[list[float]]:
    """Of each signer, the microseconds of each signature. Raises Failed."""
    found = []
    for signer in signers:
        output, complaint = signer.communicate()
        if signer.returncode:
            raise Failed(complaint.strip().replace("\n", " | "))
        found.append(json.loads(output)["us"])
    return found


def _connect(control: socket.socket, path: Path) -> None:
    """Once keyd listens: it loads and tries the keys first."""
    control.settimeout(_PATIENCE_SECONDS)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            control.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise Failed("keyd does not listen") from None
            time.sleep(0.02)
        else:
            return
