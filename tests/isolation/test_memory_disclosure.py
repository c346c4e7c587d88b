"""A worker made to send all of its readable memory to its client: what is in it, what is not."""

import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from integration.certificates import Authority
from integration.instance import Instance
from integration.peers import Listener, TlsClient, served_by

from titus_py.key_search import Needle, needles

from .harness import infected, over_tls, patient_echo

PAST, CONCURRENT = 20, 5


def canary() -> str:
    """Recognized by any part of it that is long enough."""
    return "canary" + secrets.token_hex(20)


@pytest.fixture(scope="module")
def backend() -> Iterator[Listener]:
    with Listener.tcp() as listener, served_by(listener, patient_echo):
        yield listener


@pytest.fixture(scope="module", params=["RSA-2048", "P-256", "Ed25519"])
def instance(
    request: pytest.FixtureRequest, backend: Listener, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Instance, list[Needle]]]:
    directory = tmp_path_factory.mktemp("infected")
    certificate = Authority(directory).issue(request.param)
    key = serialization.load_pem_private_key(certificate.key.read_bytes(), None)
    with infected(directory, certificate, backend.address) as instance:
        yield instance, needles(key)  # type: ignore[arg-type]


def memory_of_a_worker(instance: Instance, stage: str, own: str) -> bytes:
    """All of it; ``own`` is sent to the worker first, as a request or in the ClientHello."""
    with TlsClient(instance.port, f"{stage}.memory.{own}.attack.test") as client:
        client.socket.settimeout(60)
        if stage == "h":
            client.socket.sendall(client.first_flight())
        else:
            client.handshake()
            client.send(own.encode())
        octets = bytearray()
        try:
            while piece := client.socket.recv(1 << 20):
                octets += piece
        except ConnectionResetError:
            pass
    return bytes(octets)


@pytest.mark.parametrize("stage", ["h", "e"])
def test_memory_holds_only_what_is_its_clients(
    instance: tuple[Instance, list[Needle]], stage: str
) -> None:
    serving, secret = instance
    names, bodies, own = [], [], canary()
    with ExitStack() as stack:
        for number in range(PAST + CONCURRENT):
            names.append(canary())
            bodies.append(canary())
            octets = bodies[-1].encode() * 200
            if number < PAST:
                assert over_tls(serving, f"{names[-1]}.test", octets) == octets
                continue
            client = stack.enter_context(TlsClient(serving.port, f"{names[-1]}.test"))
            client.handshake()
            client.send(octets)
            assert client.receive_exactly(len(octets)) == octets
        # A new spare inherits what the parent knows of all of them.
        serving.wait_for_events(PAST, "connection_ended")
        for _ in range(8):
            over_tls(serving, "localhost", b"one worker later")
        memory = memory_of_a_worker(serving, stage, own)

    assert len(memory) > 10_000_000
    assert own.encode() in memory
    # What all workers have, to show that the search finds what there is.
    assert b"server CertificateVerify" in memory
    found = {name for name in names if name.encode() in memory}
    assert not found, f"other clients' server names: {len(found)}"
    assert not [body for body in bodies if body.encode() in memory]
    assert not [needle for needle in secret if needle.octets in memory]


def test_the_search_finds_a_key_that_is_there(
    instance: tuple[Instance, list[Needle]],
) -> None:
    """The control: keyd's own memory has what is looked for."""
    serving, secret = instance
    keyd = serving.keyd().pid
    found = set()
    with open(f"/proc/{keyd}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{keyd}/maps").read_text().splitlines():
            if "rw" in line.split()[1] and "[v" not in line:
                start, end = (int(address, 16) for address in line.split()[0].split("-"))
                memory.seek(start)
                octets = memory.read(end - start)
                found |= {needle.name for needle in secret if needle.octets in octets}
    assert found
