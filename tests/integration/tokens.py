"""Tokens of SoftHSM's, a keyd that has their keys, and what asks it."""

import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from keyd.powers import PrivateKey
from keyd.protocol import MAX_REPLY_OCTETS, Operation, Reply, Request, SignatureScheme
from keyd.provider import openssl_configuration
from keyd.reference import key_id, reference_pem

from .instance import TITUS_PY, Process, descendants, eventually, free_port

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
#: Whom the tokens' processes run as: a user that needs no other right than to the tokens.
USER = "news"
PIN = "123456"
_CERTIFICATE_VERIFY = b"\x20" * 64 + b"TLS 1.3, server CertificateVerify\x00" + bytes(32)


class Hsm:
    """A directory of SoftHSM's tokens."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.configuration = directory / "softhsm2.conf"
        tokens = directory / "tokens"
        tokens.mkdir()
        self.configuration.write_text(f"directories.tokendir = {tokens}\n")
        self.environment = {"SOFTHSM2_CONF": str(self.configuration)}
        self.pin_file = directory.parent / "pin"
        self.pin_file.write_text(PIN + "\n")
        self.pin_file.chmod(0o600)

    def add_token(self, label: str, **keys: PrivateKey) -> None:
        """A new token with these keys, by their labels."""
        self._util("--init-token", "--free", f"--label={label}", "--so-pin=12345678")
        for number, (name, key) in enumerate(keys.items(), 1):
            pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            with tempfile.NamedTemporaryFile() as file:
                file.write(pem)
                file.flush()
                options = (f"--token={label}", f"--label={name}", f"--id={number:02}")
                self._util(f"--import={file.name}", *options)
        user = pwd.getpwnam(USER)
        for path in (self.directory, *self.directory.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid)

    def uri(
        self, token: str, key: str, module: Path = SOFTHSM, pin_file: Path | None = None
    ) -> str:
        query = f"module-path={module}&pin-source=file:{pin_file or self.pin_file}"
        return f"pkcs11:token={token};object={key}?{query}"

    def _util(self, *options: str) -> None:
        command = ["softhsm2-util", *options, f"--pin={PIN}"]
        subprocess.run(command, check=True, env=self.environment, capture_output=True)


class TokenKeyd:
    """A ``keyd listen`` with keys in tokens. ``options`` are more of its own."""

    def __init__(
        self,
        directory: Path,
        token_path: Path,
        keys: Sequence[str],
        *variables: str,
        options: Sequence[str] = (),
    ) -> None:
        self.socket = directory / "keyd.sock"
        self._log = directory / "keyd.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(TITUS_PY.with_name("keyd"), "listen", f"--socket={self.socket}"),
                    *("--user=nobody", f"--chroot={directory / 'empty'}", f"--token-user={USER}"),
                    *(f"--key={key}" for key in keys),
                    *(f"--token-environment={variable}" for variable in variables),
                    *(f"--token-path={token_path}", *options),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self.wait_for("guards against")
        eventually(self.socket.is_socket, "keyd listens")

    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str, times: int = 1) -> None:
        """Wait until a text has been logged so often."""
        try:
            eventually(lambda: self.log().count(text) >= times, text)
        except AssertionError as error:
            raise AssertionError(f"{error} in:\n{self.log()}") from None

    @contextmanager
    def asking(self, key: PrivateKey, scheme: SignatureScheme) -> Iterator[socket.socket]:
        """A channel on which a CertificateVerify has been asked for."""
        identity = key_id(key.public_key())
        request = Request(Operation.SIGN, scheme, identity, _CERTIFICATE_VERIFY)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
            channel.settimeout(60)
            channel.connect(str(self.socket))
            channel.send(request.encode())
            yield channel

    def ask(self, key: PrivateKey, scheme: SignatureScheme) -> Reply:
        with self.asking(key, scheme) as channel:
            return Reply.decode(channel.recv(MAX_REPLY_OCTETS))

    def token_processes(self) -> list[Process]:
        """Of each token the one that watches, and then of each the one with the module.

        Of a token that cannot be used, the second comes and goes.
        """
        return descendants(self.process.pid)[1:]

    def close(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Nginx(NamedTuple):
    port: int
    pid: int


@contextmanager
def nginx_asking(keyd: Path, directory: Path, keys: Mapping[str, PrivateKey]) -> Iterator[Nginx]:
    """A stock nginx that asks this keyd; its certificates, NAME.crt, are in the directory."""
    port, pairs = free_port(), ""
    for name, key in keys.items():
        (directory / f"{name}.ref").write_bytes(reference_pem(key.public_key()))
        pairs += f"ssl_certificate {directory}/{name}.crt;"
        pairs += f"ssl_certificate_key {directory}/{name}.ref;"
    (directory / "openssl.cnf").write_text(openssl_configuration(f"socket = {keyd}"))
    (directory / "nginx.conf").write_text(
        f"""
        user nobody nogroup;
        daemon off;
        pid {directory}/nginx.pid;
        events {{}}
        http {{
            access_log off;
            server {{
                listen {port} ssl;
                ssl_protocols TLSv1.2 TLSv1.3;
                {pairs}
                return 204;
            }}
        }}
        """
    )
    nginx = subprocess.Popen(
        ["nginx", "-c", directory / "nginx.conf", "-e", directory / "nginx.log"],
        env=os.environ | {"OPENSSL_CONF": str(directory / "openssl.cnf")},
    )
    try:
        eventually((directory / "nginx.pid").exists, "nginx serves")
        yield Nginx(port, nginx.pid)
    finally:
        nginx.terminate()
        nginx.wait()


def s_client(port: int, authority: Path, kind: str, version: str) -> None:
    """A handshake with the certificate of this kind, which has to be right."""
    done = subprocess.run(
        [
            *("openssl", "s_client", "-connect", f"localhost:{port}", version),
            *("-CAfile", authority, "-verify_return_error"),
            *("-sigalgs", "RSA-PSS+SHA256" if kind == "rsa" else "ECDSA+SHA256"),
        ],
        input=b"",
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    expected = rb"rsa.pss" if kind == "rsa" else rb"ecdsa"
    # OpenSSL has other words for it since 3.5.
    assert re.search(rb"(?i)peer signature type: " + expected, done.stdout)


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory that every user may enter."""
    directory = Path(tempfile.mkdtemp(prefix="titus-py-tokens-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def build_shim(directory: Path) -> Path:
    """The module that a test tells how to fail (token_shim.c)."""
    shim = directory / "shim.so"
    source = Path(__file__).with_name("token_shim.c")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wno-cast-function-type", "-Werror"]
    subprocess.run(["gcc", *flags, "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    return shim


def attempt_unconfined(shim: Path, attempts: Path) -> None:
    """The control: the same attempts by the same user, in a process that is not confined."""
    code = f"import ctypes; ctypes.CDLL({json.dumps(str(shim))}).attempt_all()"
    # The system's Python: a virtual environment may be where only root may read.
    subprocess.run(
        ["/usr/bin/python3", "-I", "-c", code],
        check=True,
        user=USER,
        group=pwd.getpwnam(USER).pw_gid,
        env={"SHIM_ATTEMPTS": str(attempts)},
    )
