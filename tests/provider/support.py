"""What the provider's tests run: compilers, a stand-in for keyd, harnesses, TLS peers."""

import hashlib
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from keyd.keys import load_private_key
from keyd.powers import ALL_POWERS, NotTLS, PrivateKey, perform
from keyd.protocol import MAX_REQUEST_OCTETS, Reply, Request, Status

REPOSITORY = Path(__file__).parents[2]
SOURCES = sorted(REPOSITORY.glob("keyd/provider/*.c"))
PROGRAMS = Path(__file__).parent

CFLAGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-fPIC"]
SANITIZE = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
#: Leaks are looked for in the harness, which is all ours; not in the programs of others.
LEAKS_LOOKED_FOR = {"ASAN_OPTIONS": "detect_leaks=1"}
LEAKS_IGNORED = {"ASAN_OPTIONS": "detect_leaks=0"}

PATIENCE = 60.0

TLS13_SERVER = b"\x20" * 64 + b"TLS 1.3, server CertificateVerify\x00"
#: What a server signs in TLS 1.3, and in TLS 1.2 with ECDHE on X25519.
CERTIFICATE_VERIFY = TLS13_SERVER + bytes(range(48))
SERVER_KEY_EXCHANGE = bytes(range(64)) + b"\x03\x00\x1d\x20" + bytes(range(32))


def build(output: Path, *flags: str, compiler: str = "gcc") -> Path:
    """Compile the provider."""
    command = [compiler, *CFLAGS, *flags, "-shared", "-o", str(output), *map(str, SOURCES)]
    subprocess.run(command, check=True)
    return output


def configure(path: Path, module: Path, *settings: str) -> Path:
    """Write an OpenSSL configuration that loads the provider beside ``default``."""
    text = (
        "openssl_conf = init\n[init]\nproviders = providers\n"
        "[providers]\ndefault = default_section\nkeyd = keyd_section\n"
        "[default_section]\nactivate = 1\n"
        f"[keyd_section]\nmodule = {module}\nactivate = 1\n"
    )
    path.write_text(text + "".join(f"{setting}\n" for setting in settings))
    return path


def environment(configuration: Path | None, **more: str) -> dict[str, str]:
    """This process's environment, with another OpenSSL configuration."""
    inherited = {name: value for name, value in os.environ.items() if name != "OPENSSL_CONF"}
    if configuration is not None:
        inherited["OPENSSL_CONF"] = str(configuration)
    inherited["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *sys.path])
    return inherited | more


def preload_sanitizer() -> dict[str, str]:
    """What lets a program without the sanitizer load a provider with it."""
    command = ["gcc", "-print-file-name=libasan.so"]
    library = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return {"LD_PRELOAD": str(Path(library).resolve()), **LEAKS_IGNORED}


def check_sanitizer(report: str) -> None:
    """Fail on anything that a sanitizer had to say."""
    found = re.search(r"(ERROR: \w+Sanitizer|runtime error:|AddressSanitizer)", report)
    assert found is None, report


class Site(NamedTuple):
    """A certificate, its key for keyd, and the reference for everybody else."""

    name: str
    certificate: Path
    key: Path
    reference: Path
    public_key: Path
    key_id: bytes
    type: str
    signature_octets: int


def reference_text(base64_text: bytes) -> bytes:
    return (
        b"-----BEGIN KEYD KEY REFERENCE-----\n"
        + base64_text
        + b"-----END KEYD KEY REFERENCE-----\n"
    )


def spki_hash(spki_pem: bytes) -> bytes:
    """SHA-256 of a PEM public key's DER, as OpenSSL wrote it."""
    command = ["openssl", "pkey", "-pubin", "-outform", "DER"]
    done = subprocess.run(command, check=True, capture_output=True, input=spki_pem)
    return hashlib.sha256(done.stdout).digest()


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the ``with``. Its pipes are unbuffered, for read_line."""
    process: subprocess.Popen[bytes] = subprocess.Popen(command, bufsize=0, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()


def read_line(stream: IO[bytes], patience: float = PATIENCE) -> str:
    """One line, or AssertionError."""
    # Not select(2): whatever else is open here may be more than 1024 descriptors.
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    assert poll.poll(patience * 1000), "no output"
    return stream.readline().decode().rstrip("\n")


# --- in place of keyd ------------------------------------------------------------------


Answer = Callable[[bytes], bytes | None]


def keyds_answer(sites: Iterable[Site]) -> Answer:
    """keyd's own answers, from one that grants everything that it can do."""
    keys: dict[bytes, PrivateKey] = {}
    for site in sites:
        keys[site.key_id] = load_private_key(str(site.key), None)

    def answer(message: bytes) -> bytes:
        request = Request.decode(message)
        try:
            key = keys[request.key]
            payload = perform(
                request.operation, key, request.parameter, request.payload, ALL_POWERS, None
            )
        except NotTLS:
            return Reply(Status.NOT_TLS).encode()
        return Reply(Status.DONE, payload).encode()

    return answer


class Keyd:
    """Stands in for keyd: answers every request with what ``answer`` makes of it.

    Octets are sent, empty ones close the channel, None keeps it open in silence.
    """

    def __init__(self, path: Path, answer: Answer = lambda _: b"") -> None:
        self.path = path
        self.answer = answer
        self.requests: list[bytes] = []
        self._held: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            if self.answer_one(channel):
                channel.close()
            else:
                self._held.append(channel)

    def answer_one(self, channel: socket.socket) -> bool:
        """Read a request and deal with it; false if it was left unanswered."""
        channel.settimeout(PATIENCE)
        request = channel.recv(2 * MAX_REQUEST_OCTETS)
        self.requests.append(request)
        reply = self.answer(request)
        if reply:
            with suppress(BrokenPipeError):
                channel.send(reply)
        return reply is not None

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._listener.close()
        for channel in self._held:
            channel.close()
        self.path.unlink(missing_ok=True)


# --- the provider's callers ---------------------------------------------------------


class Harness:
    """``harness.c``, or the same commands by pyOpenSSL (``harness.py``), under a sanitizer."""

    def __init__(self, process: subprocess.Popen[bytes], report: Path) -> None:
        self.process = process
        self._report = report

    def ask(self, command: str) -> str:
        """Give one command; AssertionError if the harness did not live to tell."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(command.encode() + b"\n")
        outcome = read_line(self.process.stdout)
        assert outcome, f"{command[:200]} ended it: {self._report.read_text()}"
        return outcome

    def load(self, content: bytes, how: str = "pem") -> str:
        return self.ask(f"{how} {content.hex() or '-'}")

    def sign(
        self,
        digest: str,
        message: bytes = CERTIFICATE_VERIFY,
        padding: str = "-",
        salt: str = "-",
        mgf1: str = "-",
    ) -> str:
        return self.ask(f"sign {digest} {padding} {salt} {mgf1} {message.hex() or '-'}")

    def decrypt(self, ciphertext: bytes, version: int = 0x0303, padding: str = "7") -> str:
        return self.ask(f"decrypt {padding} {version} {ciphertext.hex() or '-'}")


@contextmanager
def harness(
    command: Sequence[str],
    configuration: Path,
    report: Path,
    pass_fds: Sequence[int] = (),
    **more: str,
) -> Iterator[Harness]:
    """Run a harness to its end, which has to be a good one."""
    with (
        report.open("w") as errors,
        running(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(configuration, **more),
            pass_fds=pass_fds,
        ) as process,
    ):
        yield Harness(process, report)
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        code = process.wait(PATIENCE)
        check_sanitizer(report.read_text())
        assert code == 0, report.read_text()


StartHarness = Callable[..., AbstractContextManager[Harness]]


#: How the names of signature schemes begin, and what OpenSSL 3.0 calls those.
_ALGORITHMS = {"rsa_pss_": "RSA-PSS", "rsa_pkcs1_": "RSA", "ecdsa_": "ECDSA"}


class Client(NamedTuple):
    """What ``openssl s_client -brief`` found out."""

    code: int
    output: str

    def value(self, name: str) -> str | None:
        found = re.search(rf"^{name}: (.*)$", self.output, re.MULTILINE)
        return found.group(1) if found else None

    @property
    def signature_algorithm(self) -> str | None:
        """Without the hash and the curve: OpenSSL 3.5 names the scheme (RFC 8446 §4.2.3)."""
        said = self.value("Signature type")
        for scheme, algorithm in _ALGORITHMS.items():
            if said is not None and said.startswith(scheme):
                return algorithm
        return said


def connect(port: int, site: Site, *options: str) -> Client:
    """One handshake by the system's OpenSSL, without the provider."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-brief"]
    command += ["-CAfile", str(site.certificate), "-verify_return_error", *options]
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
        env=environment(None),
    )
    return Client(done.returncode, done.stdout.decode(errors="replace"))


class Servers:
    """TLS servers for some sites, and what they wrote."""

    def __init__(self, ports: dict[str, int], log: Path) -> None:
        self._ports = ports
        self._log = log

    def port(self, site: Site) -> int:
        return self._ports[site.name]

    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until it is in the log."""
        end = time.monotonic() + PATIENCE
        while text not in self.log():
            assert time.monotonic() < end, f"no {text!r} in {self.log()!r}"
            time.sleep(0.02)


@contextmanager
def servers(
    program: str, sites: Sequence[Site], configuration: Path, log: Path, **more: str
) -> Iterator[Servers]:
    """Run ``openssl s_server`` or pyOpenSSL (``tls_server.py``) with keys that are references."""
    run = _s_servers if program == "openssl" else _pyopenssl_server
    log.write_text("")
    with run(sites, log, environment(configuration, **more)) as (processes, ports):
        yield Servers(ports, log)
        for process in processes:
            assert process.poll() is None, log.read_text()
    check_sanitizer(log.read_text())


_Running = tuple[list[subprocess.Popen[bytes]], dict[str, int]]


@contextmanager
def _s_servers(sites: Sequence[Site], log: Path, env: dict[str, str]) -> Iterator[_Running]:
    if not sites:
        yield [], {}
        return
    site = sites[0]
    command = ["openssl", "s_server", "-accept", "127.0.0.1:0", "-www"]
    command += ["-cert", str(site.certificate), "-key", str(site.reference)]
    with (
        log.open("a") as errors,
        running(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=env
        ) as process,
    ):
        assert process.stdout is not None
        with _s_servers(sites[1:], log, env) as (others, ports):
            line = read_line(process.stdout)
            while not line.startswith("ACCEPT"):
                assert line or process.poll() is None, log.read_text()
                line = read_line(process.stdout)
            port = int(line.rsplit(":", 1)[1])
            yield [process, *others], {site.name: port, **ports}


@contextmanager
def _pyopenssl_server(sites: Sequence[Site], log: Path, env: dict[str, str]) -> Iterator[_Running]:
    files = [str(path) for site in sites for path in (site.certificate, site.reference)]
    command = [sys.executable, str(PROGRAMS / "tls_server.py"), *files]
    with (
        log.open("a") as errors,
        running(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=env
        ) as process,
    ):
        assert process.stdout is not None
        line = read_line(process.stdout)
        assert line, log.read_text()
        ports = [int(port) for port in line.split()]
        yield [process], {site.name: port for site, port in zip(sites, ports, strict=True)}


def have(program: str) -> bool:
    return shutil.which(program) is not None
