"""Randomness after fork: what a client sees without any key, randoms, key shares, session ids.

OpenSSL knows a fork by a changed process id. Each worker is process 1 of its own namespace,
and its fork server never is, wherever it is started: so OpenSSL notices. That is a
consequence of how processes are made here, which may change; the reseed shall not depend on it.
"""

import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Rounds
from integration.certificates import Certificate
from integration.instance import Instance, Process, descendants
from integration.peers import Listener, connect

from .harness import infected


class Seen(NamedTuple):
    """What a server sends that must never come twice."""

    random: bytes
    share: bytes
    session: bytes


def _vector(size: int, *content: bytes) -> bytes:
    octets = b"".join(content)
    return len(octets).to_bytes(size, "big") + octets


def client_hello(version: int) -> bytes:
    """A ClientHello for X25519 and TLS 1.2 or 1.3 (RFC 8446 §4.1.2), always the same."""
    extensions = {
        10: _vector(2, b"\0\x1d\0\x17"),  # supported_groups
        11: _vector(1, b"\0"),  # ec_point_formats
        13: _vector(2, b"\4\3\x08\4"),  # signature_algorithms
    }
    if version == 0x0304:
        extensions[43] = _vector(1, b"\3\4")  # supported_versions
        extensions[51] = _vector(2, b"\0\x1d", _vector(2, b"\x09" + bytes(31)))  # key_share
    encoded = b"".join(
        number.to_bytes(2, "big") + _vector(2, content) for number, content in extensions.items()
    )
    suites = b"\x13\1" if version == 0x0304 else b"\xc0\x2b\0\xff"
    body = b"\3\3" + bytes(32) + _vector(1) + _vector(2, suites) + b"\1\0" + _vector(2, encoded)
    return b"\x16\3\1" + _vector(2, b"\1" + _vector(3, body))


HELLOS = {0x0303: client_hello(0x0303), 0x0304: client_hello(0x0304)}


def _messages(server: socket.socket, wanted: int) -> dict[int, bytes]:
    """Handshake messages by their type, until the wanted one has come."""
    stream, handshake, found = b"", b"", {}
    while wanted not in found:
        piece = server.recv(65536)
        assert piece, "ended early"
        stream += piece
        while len(stream) >= 5 and len(stream) >= 5 + int.from_bytes(stream[3:5], "big"):
            length = int.from_bytes(stream[3:5], "big")
            assert stream[0] in (20, 22, 23), f"an alert: {stream[5:7].hex()}"
            handshake += stream[5 : 5 + length] if stream[0] == 22 else b""
            stream = stream[5 + length :]
        while len(handshake) >= 4 and len(handshake) >= 4 + int.from_bytes(handshake[1:4], "big"):
            length = int.from_bytes(handshake[1:4], "big")
            found[handshake[0]] = handshake[4 : 4 + length]
            handshake = handshake[4 + length :]
    return found


def hello_from(port: int, version: int) -> Seen:
    """Connect, and read as far as the server's key share."""
    with connect(port) as server:
        server.sendall(HELLOS[version])
        found = _messages(server, 2 if version == 0x0304 else 12)
    hello = found[2]
    session = hello[35 : 35 + hello[34]]
    if version == 0x0303:
        exchange = found[12]
        assert exchange[:4] == b"\3\0\x1d\x20"
        return Seen(hello[2:34], exchange[4:36], session)
    extensions = hello[35 + hello[34] + 5 :]
    while extensions[:2] != b"\0\x33":
        extensions = extensions[4 + int.from_bytes(extensions[2:4], "big") :]
    return Seen(hello[2:34], extensions[8:40], session)


def duplicates(instance: Instance, connections: int) -> dict[str, int]:
    """How many of what was seen had been seen before."""
    versions = [0x0303, 0x0304] * (connections // 2)
    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(lambda version: hello_from(instance.port, version), versions))
    columns = {
        "randoms": [one.random for one in seen],
        "key shares": [one.share for one in seen],
        # Empty where the server does not resume: nothing to be distinct.
        "session ids": [one.session for one in seen if one.session],
    }
    return {name: len(values) - len(set(values)) for name, values in columns.items()}


def _own_process_id(process: Process) -> int:
    """As the process itself is told: in its own, innermost namespace."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("\nNSpid:")[2].partition("\n")[0].split()[-1])


@pytest.fixture(scope="module")
def one_process_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library with a getpid(2) by which OpenSSL cannot tell one process from another."""
    directory = tmp_path_factory.mktemp("getpid")
    (directory / "getpid.c").write_text("int getpid(void);\nint getpid(void) { return 1; }\n")
    command = ["gcc", "-shared", "-fPIC", "-o", "getpid.so", "getpid.c"]
    subprocess.run(command, cwd=directory, check=True)
    return f"preload {directory}/getpid.so"


Start = Callable[..., AbstractContextManager[Instance]]


@pytest.fixture
def start(certificate: Certificate, backend: Listener, tmp_path: Path) -> Start:
    """An instance, without these, whose parent is process 1 of its namespace."""

    @contextmanager
    def start(*without: str) -> Iterator[Instance]:
        layers = ["process one", *without]
        with infected(tmp_path, certificate, backend.address, layers) as instance:
            _, parent, *children = descendants(instance.parent().pid)
            server, *workers = sorted(children, key=lambda child: (child.started, child.pid))
            assert {_own_process_id(process) for process in (parent, *workers)} == {1}
            # Process 1 could not make its siblings.
            assert _own_process_id(server) > 1
            yield instance

    return start


NEVER = {"randoms": 0, "key shares": 0, "session ids": 0}


@pytest.fixture(scope="module")
def connections(rounds: Rounds) -> int:
    """Without the reseed, most of a hundred have what another one had: see the control."""
    return rounds(enough=200, full=2000)


def test_nothing_random_comes_twice(start: Start, connections: int) -> None:
    with start() as instance:
        assert duplicates(instance, connections) == NEVER


def test_not_even_where_openssl_does_not_notice(
    start: Start, one_process_id: str, connections: int
) -> None:
    with start(one_process_id) as instance:
        assert duplicates(instance, connections) == NEVER


def test_without_the_reseed_it_does(start: Start, one_process_id: str) -> None:
    """The control: it is the reseed that the other test depends on."""
    with start(one_process_id, "reseed") as instance:
        found = duplicates(instance, 100)
    assert found["randoms"] > 50
    assert found["key shares"] > 50


def test_openssl_notices_by_itself(start: Start) -> None:
    """Where nobody hides it: that would be enough, too."""
    with start("reseed") as instance:
        assert duplicates(instance, 100) == NEVER
