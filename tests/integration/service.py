"""What an administrator does to a running instance: edit its configuration, have it reload."""

import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from OpenSSL import SSL

from titus_py.supervisor.control_client import ask

from .certificates import Certificate
from .instance import PATIENCE, TITUS_PY, Instance, Table, eventually, toml
from .peers import TlsClient, Truncated

#: How a client learns that it is not served.
FAILS = (SSL.Error, Truncated, ConnectionResetError, BrokenPipeError)


def edit(instance: Instance, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the configuration file, all at once."""
    file = instance.directory / "titus.toml"
    tables: dict[str, Table] = tomllib.loads(file.read_text())
    change(tables)
    replace(file, toml(tables).encode())


def replace(file: Path, octets: bytes) -> None:
    """At no time is there half a file, or none."""
    new = file.with_name(f"{file.name}.new")
    new.touch(mode=0o600)
    new.write_bytes(octets)
    new.replace(file)


def install(certificate: Certificate, directory: Path) -> Certificate:
    """Put a certificate and its key where the configuration looks for them."""
    installed = Certificate(directory / "site.crt", directory / "site.key", certificate.authority)
    replace(installed.key, certificate.key.read_bytes())
    replace(installed.certificate, certificate.certificate.read_bytes())
    return installed


def reload(instance: Instance) -> dict[str, Any]:
    """Over the control socket: the answer."""
    return ask(instance.pid, {"do": "reload"}, PATIENCE)


def status(instance: Instance) -> dict[str, Any]:
    return ask(instance.pid, {"do": "status"}, PATIENCE)


def what_another_user_gets(path: Path) -> str:
    """Of connect(2) to this socket: the name of the exception, or "connected"."""
    script = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "try: s.connect(sys.argv[1])\n"
        "except OSError as error: print(type(error).__name__)\n"
        "else: print('connected')\n"
    )
    said = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", script, path],
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    return said.stdout.strip()


def problems(instance: Instance) -> list[str]:
    """Of a reload that must fail: the reasons, which the log is to have as well."""
    since = len(instance.events())
    answer = reload(instance)
    assert answer["reloaded"] is False
    told: list[str] = answer["problems"]
    instance.wait_for_event("reload_failed", since=since, problem=told[-1])
    logged = [event for event in instance.events()[since:] if event["event"] == "reload_failed"]
    assert [event["problem"] for event in logged] == told
    assert {event["level"] for event in logged} == {"error"}
    return told


def talk(client: TlsClient) -> bool:
    """A few octets to an echoing backend and back."""
    client.send(b"ping")
    return client.receive_exactly(4) == b"ping"


def serves(instance: Instance, port: int | None = None) -> bool:
    with TlsClient(port or instance.port) as client:
        return talk(client.handshake())


@contextmanager
def clients_meanwhile(instance: Instance, count: int) -> Iterator[Callable[[], None]]:
    """So many at a time, one after the other: each is served, however often it comes.

    What this yields waits until some more have been.
    """
    done = threading.Event()
    #: How often each of those who come was.
    served = [0] * count

    def come_again_and_again(number: int) -> None:
        while not done.is_set():
            assert serves(instance)
            served[number] += 1
            done.wait(0.02)

    def wait_for_some() -> None:
        enough = sum(served) + 10
        eventually(lambda: sum(served) > enough, "more clients that are served")

    with ThreadPoolExecutor(count) as pool:
        comers = [pool.submit(come_again_and_again, number) for number in range(count)]
        try:
            yield wait_for_some
        finally:
            done.set()
        for comer in comers:
            comer.result()
        assert all(served)


def name_shown(client: TlsClient) -> str:
    """The first name in the certificate that this client was shown."""
    certificate = client.tls.get_peer_certificate(as_cryptography=True)
    assert certificate is not None
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return str(names.value.get_values_for_type(x509.DNSName)[0])


def name_shown_to_a_new_client(instance: Instance) -> str:
    with TlsClient(instance.port) as client:
        return name_shown(client.handshake())


def without_end(instance: Instance) -> set[int]:
    """The connections that have begun, and of whose end nothing was said."""
    events = instance.events()
    begun = {event["connection"] for event in events if event["event"] == "connection_begun"}
    return begun - {event["connection"] for event in events if "end" in event}


def launcher(
    directory: Path, address: tuple[str, int], receive_buffer: int = 0, interface: str = ""
) -> Path:
    """As systemd starts a service with a socket: bound, as descriptor 3, with its variables.

    Who connects to it has the socket's receive buffer: this many octets, where it is not
    the system's. With an interface, the socket is bound to it (``BindToDevice=``).
    """
    script = directory / "launcher"
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, socket, sys\n"
        f"listener = socket.create_server({address!r})\n"
        f"if {receive_buffer}:\n"
        f"    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, {receive_buffer})\n"
        f"if {interface!r}:\n"
        "    device = socket.SOL_SOCKET, socket.SO_BINDTODEVICE\n"
        f"    listener.setsockopt(*device, {interface.encode()!r})\n"
        "os.dup2(listener.detach(), 4)\n"
        "os.dup2(4, 3)\n"
        "os.environ |= {\n"
        "    'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1', 'LISTEN_FDNAMES': 'https'\n"
        "}\n"
        f"os.execv({str(TITUS_PY)!r}, [{str(TITUS_PY)!r}, *sys.argv[1:]])\n"
    )
    script.chmod(0o755)
    return script
