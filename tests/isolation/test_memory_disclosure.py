"""A worker made to send all of its readable memory to its client: what is in it, what is not."""

import ctypes
import secrets
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
from cryptography.hazmat.primitives import serialization
from integration.certificates import Authority
from integration.instance import Event, Instance, eventually
from integration.peers import TIMEOUT, Listener, TlsClient

from keyd.inspection.key_search import Needle, needles
from keyd.inspection.occurrences import occurrences
from titus_py.between.messages import Fork

from .harness import infected, over_tls

PAST, CONCURRENT = 20, 5
#: How many there are at most, the spares included.
WORKERS, SPARE = 100, 16
#: More than that of what is looked for is in no memory.
MANY = 1_000_000

T = TypeVar("T")


def canary() -> str:
    """Recognized by any part of it that is long enough."""
    return "canary" + secrets.token_hex(20)


@pytest.fixture(scope="module", params=["RSA-2048", "P-256", "Ed25519"])
def instance(
    request: pytest.FixtureRequest, backend: Listener, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Instance, list[Needle]]]:
    directory = tmp_path_factory.mktemp("infected")
    certificate = Authority(directory).issue(request.param)
    key = serialization.load_pem_private_key(certificate.key.read_bytes(), None)
    # Many are forked in a row.
    worker = {"max": WORKERS - SPARE, "spare": SPARE}
    # An interpreter may have its heap below 1 GiB: an address there would be taken for a lower uid.
    with infected(
        directory, certificate, backend.address, high_uids=True, worker=worker
    ) as instance:
        yield instance, needles(key)  # type: ignore[arg-type]


def memory_of_a_worker(instance: Instance, stage: str, own: str) -> tuple[bytes, str]:
    """All of it, and its client; ``own`` is sent to the worker first, in a request or a hello."""
    with TlsClient(instance.port, f"{stage}.memory.{own}.attack.test") as client:
        name = "{}:{}".format(*client.socket.getsockname())
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
    return bytes(octets), name


class Other(NamedTuple):
    """Another client: what it says, and from where."""

    name: str
    body: str
    source: socket.socket


def another(instance: Instance, address: str) -> Other:
    source = socket.socket()
    source.settimeout(TIMEOUT)
    source.bind((address, 0))
    source.connect(("127.0.0.1", instance.port))
    return Other(canary(), canary(), source)


def addresses_unlike(memory: bytes) -> list[str]:
    """Of which nothing in there reminds: a few octets are found by chance."""
    many = {f"127.83.{secrets.randbelow(256)}.{secrets.randbelow(255)}" for _ in range(100)}
    return sorted(many - addresses_in(memory, many))[: PAST + CONCURRENT]


def addresses_in(memory: bytes, addresses: Iterable[str]) -> set[str]:
    """Those that are there: as text, in network order, as a number of this machine's."""
    text = {address.encode(): address for address in addresses}
    packed = {socket.inet_aton(address): address for address in addresses}
    backwards = {octets[::-1]: address for octets, address in packed.items()}
    return found(text, memory) | found(packed, memory) | found(backwards, memory)


def numbers_in(memory: bytes, numbers: Iterable[int]) -> set[int]:
    """Those that are there: as text, in either order of octets, as Python's own integer."""
    text = {str(number).encode(): number for number in numbers}
    packed = {struct.pack("!Q", number): number for number in numbers}
    backwards = {octets[::-1]: number for octets, number in packed.items()}
    integers = {pythons_integer(number): number for number in numbers}
    return (
        found(text, memory)
        | found(packed, memory)
        | found(backwards, memory)
        | found(integers, memory)
    )


def uids_in(memory: bytes, uids: Iterable[int]) -> set[int]:
    """Those that are there: as text, in a message, as a call's argument, as Python's integer.

    The last two only at addresses as they have them: four octets, and zeros, are found by chance.
    """
    text = {str(uid).encode(): uid for uid in uids}
    messages = {struct.pack("=cq", kind, uid): uid for uid in uids for kind in (b"W", b"P", b"E")}
    words = {struct.pack("=q", uid): uid for uid in uids}
    integers = {pythons_integer(uid): uid for uid in uids}
    aligned = {
        uid for forms in (words, integers) for uid, place in hits(forms, memory) if place % 8 == 0
    }
    return found(text, memory) | found(messages, memory) | aligned


def pythons_integer(number: int) -> bytes:
    """An int as it lies in this interpreter's memory, behind what every object begins with.

    How many digits it has, and these, the lowest first: one has 30 bits.
    """
    head = object.__basicsize__
    return ctypes.string_at(id(number) + head, number.__sizeof__() - head)


def keys_in(memory: bytes, secret: list[Needle]) -> set[str]:
    """What of a private key is there, in words."""
    return found({needle.octets: needle.name for needle in secret}, memory)


def found(forms: Mapping[bytes, T], memory: bytes) -> set[T]:
    """Those whose form is there."""
    return {thing for thing, _ in hits(forms, memory)}


def hits(forms: Mapping[bytes, T], memory: bytes) -> Iterator[tuple[T, int]]:
    """Whose form is there, and where."""
    ordered = tuple(sorted(forms, key=len))
    places = occurrences(memory, ordered, MANY)
    assert len(places) < MANY
    # Of those that begin at one place the longest: an address may begin as another does.
    for place, number in dict(places).items():
        yield forms[ordered[number]], place


def event_of(instance: Instance, name: str, address: str, since: int) -> Event:
    """What is told with this name of a connection from there, after so many events."""

    def told() -> list[Event]:
        named = [event for event in instance.events()[since:] if event["event"] == name]
        return [event for event in named if event["client"].startswith(f"{address}:")]

    event: Event = eventually(told, f"{name} of a connection from {address}")[-1]
    return event


def memory_from_outside(pid: int) -> Iterator[bytes]:
    """All that a process can write to."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "rw" in line.split()[1] and "[v" not in line:
                start, end = (int(address, 16) for address in line.split()[0].split("-"))
                memory.seek(start)
                yield memory.read(end - start)


@pytest.mark.parametrize("stage", ["h", "e"])
def test_memory_holds_only_what_is_its_clients(
    instance: tuple[Instance, list[Needle]], stage: str
) -> None:
    serving, secret = instance
    others, own = [], canary()
    before, _ = memory_of_a_worker(serving, stage, canary())
    addresses = addresses_unlike(before)
    uids_before = uids_in(before, serving.uids[:WORKERS])
    # The instance may have had clients from these addresses already, in another stage.
    since = len(serving.events())
    with ExitStack() as stack:
        for number, address in enumerate(addresses):
            other = another(serving, address)
            others.append(other)
            octets = other.body.encode() * 200
            if number < PAST:
                assert over_tls(serving, f"{other.name}.test", octets, other.source) == octets
                continue
            client = TlsClient(serving.port, f"{other.name}.test", source=other.source)
            stack.enter_context(client).handshake()
            client.send(octets)
            assert client.receive_exactly(len(octets)) == octets
        # As it is told to keyd, and to no worker.
        numbers = [
            int(event_of(serving, "connection_begun", address, since)["connection"])
            for address in addresses
        ]
        # A worker that was forked when they had all been there.
        for address in addresses[:PAST]:
            event_of(serving, "connection_ended", address, since)
        for _ in range(8):
            over_tls(serving, "localhost", b"one worker later")
        since = len(serving.events())
        memory, client_name = memory_of_a_worker(serving, stage, own)
        # It is told a little later than its worker had the client.
        mine = serving.wait_for_event("connection_begun", since=since, client=client_name)
        begun = serving.events_named("connection_begun")
        # Of connections that are over, of those that there are, of spares.
        workers = serving.confined_workers()
        uids = {event["uid"] for event in begun} | {worker.uid for worker in workers}
        parents = b"".join(memory_from_outside(serving.parent().pid))
        # But for what was there before, and the configuration's first and last one: the fork
        # server's loop holds orders against these two, and its stack is copied.
        uids -= {*uids_before, serving.uids[0], serving.uids[WORKERS - 1]}

    assert len(memory) > 10_000_000
    assert own.encode() in memory
    # What all workers have, to show that the search finds what there is.
    assert b"server CertificateVerify" in memory
    # In a machine's first hour, a number is four octets, and zeros: these are found by chance.
    by_chance = numbers_in(before, [*numbers, mine["connection"]])
    # Not even its own: it would tell how many connections there have been.
    assert not numbers_in(memory, [mine["connection"]]) - by_chance
    # At most its own uid, and no other: not of those, either, that were forked just before it.
    assert uids_in(memory, {*uids, mine["uid"]}) <= {mine["uid"]}

    canaries = {text.encode(): text for other in others for text in (other.name, other.body)}
    assert not found(canaries, memory)
    assert not keys_in(memory, secret)
    assert not addresses_in(memory, addresses)
    assert not numbers_in(memory, numbers) - by_chance
    # The control: the parent, which is not forked any more, knows who is there.
    assert {*addresses[PAST:]} <= addresses_in(parents, addresses)
    assert {*numbers[PAST:]} <= numbers_in(parents, numbers)
    assert uids_in(parents, uids) == uids


def test_no_page_is_shared_and_writable_but_each_workers_report(
    instance: tuple[Instance, list[Needle]],
) -> None:
    """Of workers with a client and without one; and of the fork server, which they come from."""
    serving, _ = instance
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(TlsClient(serving.port, "localhost")).handshake()
        shared = {worker.pid: shared_writable(worker.pid) for worker in serving.confined_workers(3)}
    assert shared_writable(serving.fork_server().pid) == []
    assert len(shared) > 2
    assert {len(found) for found in shared.values()} == {1}
    names, inodes = zip(*(found[0] for found in shared.values()), strict=True)
    assert {*names} == {"/memfd:report"}
    assert len({*inodes}) == len(shared)


def shared_writable(pid: int) -> list[tuple[str, int]]:
    """What is mapped so that a write reaches another process: the names and inodes."""
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return [(line[5], int(line[4])) for line in lines if line[1][1] == "w" and line[1][3] == "s"]


def test_the_search_finds_a_key_that_is_there(
    instance: tuple[Instance, list[Needle]],
) -> None:
    """The control: keyd's own memory has what is looked for."""
    serving, secret = instance
    assert any(keys_in(octets, secret) for octets in memory_from_outside(serving.keyd().pid))


@pytest.mark.parametrize(
    "form",
    [
        lambda uid: str(uid).encode(),
        lambda uid: bytes(3) + Fork(uid).encode(),
        lambda uid: bytes(16) + struct.pack("=q", uid),
        lambda uid: bytes(8) + pythons_integer(uid),
    ],
    ids=["text", "message", "argument", "Python's"],
)
def test_the_search_finds_a_uid_that_is_there(form: Callable[[int], bytes]) -> None:
    """The control, for the forms in which none is found."""
    uids = range(2_100_000_000, 2_100_000_100)
    assert uids_in(form(uids[7]) + bytes(8), uids) == {uids[7]}
