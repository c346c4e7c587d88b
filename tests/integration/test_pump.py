"""What happens on one side of a connection is what happens on the other."""

import ctypes
import os
import queue
import random
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from OpenSSL import SSL

from .conftest import Serve
from .instance import Event, Instance, Process, eventually, free_port
from .peers import (
    TIMEOUT,
    Listener,
    TlsClient,
    Truncated,
    receive_all,
    receive_exactly,
    reset,
    was_reset,
)

VERSIONS = pytest.mark.parametrize(
    "version",
    [SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION],
    ids=["TLS 1.2", "TLS 1.3"],
)
MUCH = random.Random(1).randbytes(8 << 20)
HELD_AT_MOST = 256 * 1024


class Pair(NamedTuple):
    """One established connection: the test is the client and the backend."""

    instance: Instance
    client: TlsClient
    backend: socket.socket


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with Listener.tcp() as listener:
        yield listener


@pytest.fixture(scope="module")
def instance(serve_all: Serve, listener: Listener) -> Instance:
    return serve_all(listener.address)


@pytest.fixture
def pair(instance: Instance, listener: Listener) -> Iterator[Pair]:
    yield from connected(instance, listener, SSL.TLS1_3_VERSION)


def connected(instance: Instance, listener: Listener, version: int) -> Iterator[Pair]:
    with TlsClient(instance.port, versions=(version, version)) as client:
        client.handshake()
        with listener.accept() as backend:
            yield Pair(instance, client, backend)


def ended(pair: Pair) -> Event:
    """What the log has of this connection's end."""
    host, port = pair.client.socket.getsockname()[:2]
    return pair.instance.wait_for_event("connection_ended", client=f"{host}:{port}")


def end_of(pair: Pair) -> str:
    """How the log has it that this connection ended."""
    end: str = ended(pair)["end"]
    return end


# --- a clean end of one direction ------------------------------------------------------


@VERSIONS
def test_a_client_that_has_said_all_still_hears_the_backend(
    instance: Instance, listener: Listener, version: int
) -> None:
    for pair in connected(instance, listener, version):
        pair.client.send(b"question")
        pair.client.close_notify()
        assert receive_all(pair.backend) == b"question"
        # TLS 1.2 says that whoever gets a close_notify answers with one at once and drops
        # what it had to send (RFC 5246 §7.2.1). Nobody does, and no data is lost here.

        def answer(backend: socket.socket = pair.backend) -> None:
            backend.sendall(MUCH)
            backend.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=answer)
        sender.start()
        assert pair.client.receive_all() == MUCH
        sender.join()
        assert end_of(pair) == "clean"


@VERSIONS
def test_a_backend_that_has_said_all_still_hears_the_client(
    instance: Instance, listener: Listener, version: int
) -> None:
    for pair in connected(instance, listener, version):
        pair.backend.sendall(b"banner")
        pair.backend.shutdown(socket.SHUT_WR)
        assert pair.client.receive_all() == b"banner"
        sender = threading.Thread(target=pair.client.send, args=[MUCH])
        sender.start()
        assert receive_exactly(pair.backend, len(MUCH)) == MUCH
        sender.join()
        pair.client.close_notify()
        assert receive_all(pair.backend) == b""
        assert end_of(pair) == "clean"


def test_what_a_backend_wrote_before_it_left_arrives(
    instance: Instance, listener: Listener
) -> None:
    for size in (1, 16 * 1024, 300_001, len(MUCH)):
        with TlsClient(instance.port) as client:
            client.handshake()
            backend = listener.accept()
            backend.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(MUCH))

            def write_and_leave(backend: socket.socket = backend, size: int = size) -> None:
                backend.sendall(MUCH[:size])
                backend.close()

            writer = threading.Thread(target=write_and_leave)
            writer.start()
            assert client.receive_all() == MUCH[:size]
            writer.join()


def test_what_a_client_wrote_before_it_left_arrives(instance: Instance, listener: Listener) -> None:
    for size in (1, 16 * 1024, 300_001, len(MUCH)):
        client = TlsClient(instance.port).handshake()
        with listener.accept() as backend:

            def write_and_leave(client: TlsClient = client, size: int = size) -> None:
                client.send(MUCH[:size])
                client.close_notify()
                client.socket.close()

            writer = threading.Thread(target=write_and_leave)
            writer.start()
            assert receive_all(backend) == MUCH[:size]
            writer.join()


def test_octets_are_counted_for_the_log(pair: Pair) -> None:
    pair.client.send(b"x" * 1000)
    receive_exactly(pair.backend, 1000)
    pair.backend.sendall(b"y" * 300_000)
    pair.client.receive_exactly(300_000)
    pair.client.close_notify()
    pair.backend.shutdown(socket.SHUT_WR)
    event = ended(pair)
    assert event["end"] == "clean"
    assert (event["octets_from_client"], event["octets_to_client"]) == (1000, 300_000)


# --- an unclean end --------------------------------------------------------------------


def test_a_clients_reset_is_the_backends_reset(pair: Pair) -> None:
    name = pair.client.socket.getsockname()
    pair.client.send(b"half a requ")
    assert receive_exactly(pair.backend, 11) == b"half a requ"
    pair.client.reset()
    assert was_reset(pair.backend)
    event = pair.instance.wait_for_event("connection_ended", client=f"{name[0]}:{name[1]}")
    assert event["end"] == "client_reset"


@VERSIONS
def test_a_stream_cut_off_without_close_notify_is_the_backends_reset(
    instance: Instance, listener: Listener, version: int
) -> None:
    for pair in connected(instance, listener, version):
        pair.client.send(b"DELETE /everything-befo")
        pair.client.socket.shutdown(socket.SHUT_WR)
        assert was_reset(pair.backend)
        assert end_of(pair) == "client_truncated"


def test_what_came_before_the_truncation_may_arrive_but_no_clean_end_does(
    instance: Instance, listener: Listener
) -> None:
    client = TlsClient(instance.port).handshake()
    with listener.accept() as backend:
        sender = threading.Thread(target=client.send, args=[MUCH])
        sender.start()
        octets = receive_exactly(backend, 1 << 20)
        assert octets == MUCH[: 1 << 20]

        def leave_when_sent() -> None:
            sender.join()
            client.socket.close()

        leaver = threading.Thread(target=leave_when_sent)
        leaver.start()
        assert was_reset(backend)
        leaver.join()


def test_a_backends_reset_is_the_clients_reset_and_no_close_notify(pair: Pair) -> None:
    pair.backend.sendall(b"half an ans")
    assert pair.client.receive_exactly(11) == b"half an ans"
    reset(pair.backend)
    with pytest.raises(ConnectionResetError):
        pair.client.receive()
    assert end_of(pair) == "backend_reset"


def test_a_backends_reset_while_the_client_writes_is_the_clients_reset(pair: Pair) -> None:
    def write_until_it_breaks() -> None:
        while True:
            pair.client.send(MUCH)

    stopper = threading.Timer(0.1, reset, [pair.backend])
    stopper.start()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        write_until_it_breaks()
    stopper.join()
    assert end_of(pair) == "backend_reset"


def test_a_backends_reset_after_the_clients_clean_end_is_the_clients_reset(pair: Pair) -> None:
    pair.client.close_notify()
    assert receive_all(pair.backend) == b""
    pair.backend.sendall(b"half an ans")
    assert pair.client.receive_exactly(11) == b"half an ans"
    reset(pair.backend)
    with pytest.raises(ConnectionResetError):
        pair.client.receive()
    assert end_of(pair) == "backend_reset"


def test_a_killed_worker_is_a_reset_to_both_sides(serve: Serve, backend: Listener) -> None:
    instance = serve(backend.address)
    instance.expected_alarms.add("connection_ended")
    with TlsClient(instance.port) as client:
        client.handshake()
        with backend.accept() as accepted:
            client.send(b"hello")
            assert receive_exactly(accepted, 5) == b"hello"
            worker = the_busy_worker(instance, client.name)
            worker.kill()
            with pytest.raises(ConnectionResetError):
                client.receive()
            assert was_reset(accepted)
    event = instance.wait_for_event("connection_ended", uid=worker.uid)
    assert (event["end"], event["level"]) == ("killed by SIGKILL", "alarm")
    assert event["octets_from_client"] == 5


def test_a_damaged_record_is_the_backends_reset(pair: Pair) -> None:
    pair.client.socket.sendall(b"\x17\x03\x03\x00\x20" + b"not what the key would make of it")
    assert was_reset(pair.backend)
    assert end_of(pair) == "client_protocol_error"


# --- pressure --------------------------------------------------------------------------


def tcp_queues(port: int, peer_port: int) -> tuple[int, int]:
    """What waits in the kernel at this end of a connection: to be sent, to be read."""

    def found() -> tuple[int, int] | None:
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, _, queues, *_ = line.split()
            ports = int(local.rpartition(":")[2], 16), int(remote.rpartition(":")[2], 16)
            if ports == (port, peer_port):
                sent, received = queues.split(":")
                return int(sent, 16), int(received, 16)
        # The kernel shows the list a page at a time: one may be missing when others go.
        return None

    queues: tuple[int, int] = eventually(found, f"a connection from port {port} to {peer_port}")
    return queues


def established_sockets(pid: int) -> int:
    """How many TCP connections a process has; none where it has ended."""
    inodes = {
        line.split()[9]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "01"
    }
    count = 0
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            link = os.readlink(f"/proc/{pid}/fd/{number}")
            count += link.removeprefix("socket:[").removesuffix("]") in inodes
    except OSError:
        return 0
    return count


def the_busy_worker(instance: Instance, client: str) -> Process:
    """The one that has this client, as the log has it, and a backend."""
    uid = instance.wait_for_event("connection_begun", client=client)["uid"]
    worker = instance.worker_of(uid)
    eventually(lambda: established_sockets(worker.pid) == 2, "a worker with two connections")
    return worker


def until_it_stands(measure: Callable[[], object]) -> None:
    """Wait until this has been the same for so long that a busy machine is not the reason."""
    last, since = measure(), time.monotonic()
    while time.monotonic() < since + 1:
        time.sleep(0.05)
        if last != (last := measure()):
            since = time.monotonic()


def push_until_it_stands(side: socket.socket) -> int:
    """Write until nothing more is taken for a while; returns how many octets were."""
    side.setblocking(False)
    pushed = 0
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 0.5:
        try:
            pushed += side.send(MUCH[pushed % len(MUCH) :][: 1 << 18])
            quiet_since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.005)
    side.settimeout(TIMEOUT)
    return pushed


def small_buffers(listener: Listener) -> None:
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)


def test_a_client_that_does_not_read_stops_the_backend_with_little_held(
    instance: Instance, listener: Listener
) -> None:
    with TlsClient(instance.port, receive_buffer=65536) as client:
        client.handshake()
        with listener.accept() as accepted:
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            pushed = push_until_it_stands(accepted)
            _, backend_port = accepted.getsockname()
            worker_port = accepted.getpeername()[1]
            client_port = client.socket.getsockname()[1]
            in_kernel = (
                tcp_queues(backend_port, worker_port)[0]
                + tcp_queues(worker_port, backend_port)[1]
                + tcp_queues(instance.port, client_port)[0]
                + tcp_queues(client_port, instance.port)[1]
            )
            # What was received and not acknowledged yet is in two queues; the kernel's share
            # on the client's side is encrypted, 22 octets more for each record of 16 KiB.
            assert pushed > 65536
            assert pushed - in_kernel <= HELD_AT_MOST
            # Nothing of it is lost.
            assert client.receive_exactly(pushed)[: len(MUCH)] == MUCH[:pushed]


def test_a_backend_that_does_not_read_stops_the_client_with_little_held(
    serve: Serve, backend: Listener
) -> None:
    small_buffers(backend)
    instance = serve(backend.address)
    size = 64 << 20
    with TlsClient(instance.port) as client:
        client.handshake()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        with backend.accept() as accepted:
            client_port = client.socket.getsockname()[1]
            _, backend_port = accepted.getsockname()
            worker_port = accepted.getpeername()[1]
            before_any = client.octets_sent

            def write() -> None:
                for _ in range(size // len(MUCH)):
                    client.send(MUCH)

            def passed_on() -> int:
                sent = tcp_queues(worker_port, backend_port)[0]
                return sent + tcp_queues(backend_port, worker_port)[1]

            def taken_in() -> int:
                # What sendall is about to send is in neither: at most one record of it.
                waiting = tcp_queues(client_port, instance.port)[0]
                waiting += tcp_queues(instance.port, client_port)[1]
                return client.octets_sent - before_any - waiting

            writer = threading.Thread(target=write)
            writer.start()
            until_it_stands(lambda: (taken_in(), passed_on()))
            assert writer.is_alive(), "it all fits into buffers"
            # The client's octets are encrypted: 22 more for each record of 16 KiB. (What was
            # received and not acknowledged yet is in two queues: it can be too few, too.)
            overhead = taken_in() // 16384 * 22 + 16384 + 22
            assert taken_in() > 65536
            assert taken_in() - passed_on() <= HELD_AT_MOST + overhead

            busy = the_busy_worker(instance, client.name)
            memory = anonymous_memory(busy.pid)
            received = bytearray()
            while len(received) < size:
                received += receive_exactly(accepted, min(1 << 20, size - len(received)))
                # What is held, what is being put together, and Python's own ups and downs.
                assert anonymous_memory(busy.pid) < memory + 4 * HELD_AT_MOST
            assert received == MUCH * (size // len(MUCH))
            writer.join()


def anonymous_memory(pid: int) -> int:
    """What a process holds that is neither a file nor shared, in octets."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def test_both_sides_send_without_reading_and_lose_nothing_once_they_read(
    serve: Serve, backend: Listener
) -> None:
    """Far more than all buffers hold, so that everything stands still both ways."""
    small_buffers(backend)
    instance = serve(backend.address)
    times = 8
    with TlsClient(instance.port, receive_buffer=65536) as client:
        client.handshake()
        with backend.accept() as accepted:

            def client_sends() -> None:
                for _ in range(times):
                    client.send(MUCH)

            def backend_sends() -> None:
                for _ in range(times):
                    accepted.sendall(MUCH)

            arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()

            def client_reads() -> None:
                # In the end, it leaves without close_notify, and is reset.
                with suppress(ConnectionResetError):
                    while octets := client.socket.recv(65536):
                        arrived.put(octets)

            senders = [threading.Thread(target=send) for send in (client_sends, backend_sends)]
            for sender in senders:
                sender.start()
            client_port = client.socket.getsockname()[1]
            until_it_stands(lambda: tcp_queues(client_port, instance.port))
            assert all(sender.is_alive() for sender in senders), "it all fits into buffers"

            # Both read now. A kernel that drops a packet, since what has arrived is not read, drops
            # the acknowledgement in it as well (seen with Linux 6.18): then, neither direction goes
            # on until this one is read.
            reader = threading.Thread(target=client_reads)
            reader.start()
            assert receive_exactly(accepted, times * len(MUCH)) == MUCH * times
            senders[0].join(TIMEOUT)
            # Decrypted here, and not as it arrives: OpenSSL is used by one thread at a time.
            received = bytearray()
            while len(received) < times * len(MUCH):
                client.tls.bio_write(arrived.get(timeout=TIMEOUT))
                with suppress(SSL.WantReadError):
                    while True:
                        received += client.tls.recv(65536)
            assert received == MUCH * times
            senders[1].join(TIMEOUT)
            assert not any(sender.is_alive() for sender in senders)
            client.socket.shutdown(socket.SHUT_RDWR)
            reader.join()


# --- the rest --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_front_of_echo(serve_all: Serve, echoing: Listener) -> Instance:
    return serve_all(echoing.address)


def test_keys_are_updated_in_mid_stream(in_front_of_echo: Instance) -> None:
    instance = in_front_of_echo
    here = f"127.0.0.1:{free_port()}"
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{instance.port}", "-tls1_3", "-msg"]
    command += ["-bind", here]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        output = transcript = ""

        def read_until(text: str) -> None:
            nonlocal output
            assert client.stdout is not None
            while text not in output:
                piece = os.read(client.stdout.fileno(), 65536).decode(errors="replace")
                assert piece, output
                output += piece

        guard = threading.Timer(60, client.kill)
        guard.start()
        try:
            # "K" updates the client's keys and asks the server for new ones.
            for letter, line in (("", "before"), ("K", "between"), ("k", "after")):
                for typed in filter(None, (letter, line)):
                    output = ""
                    client.stdin.write(typed.encode() + b"\n")
                    client.stdin.flush()
                    read_until("KeyUpdate\n" if typed == letter else f"\n{line}\n")
                    transcript += output
            client.stdin.close()
            client.wait(TIMEOUT)
        finally:
            guard.cancel()
            client.kill()
    assert transcript.count(">>> TLS 1.3, Handshake [length 0005], KeyUpdate") == 2
    assert transcript.count("<<< TLS 1.3, Handshake [length 0005], KeyUpdate") == 1
    end = instance.wait_for_event("connection_ended", client=here)["end"]
    assert end in ("clean", "client_truncated")


def test_the_end_of_the_handshake_is_acknowledged_at_once(in_front_of_echo: Instance) -> None:
    """Without it, a client that holds small segments back until then would wait 40 ms, always."""
    instance = in_front_of_echo
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    waited: list[float] = []
    # Once is enough: it would never be as short. On a busy machine it may take some.
    while len(waited) < 100 and min(waited, default=1) >= 0.02:
        with (
            socket.create_connection(("127.0.0.1", instance.port)) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as client,
        ):
            assert not client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            begun = time.monotonic()
            client.sendall(b"request")
            assert client.recv(16) == b"request"
            waited.append(time.monotonic() - begun)
    assert min(waited) < 0.02


def test_small_writes_are_not_delayed_on_either_side(
    instance: Instance, listener: Listener
) -> None:
    """TCP_NODELAY, as the kernel has it for the worker's own sockets."""
    with TlsClient(instance.port) as client:
        client.handshake()
        with listener.accept():
            worker = the_busy_worker(instance, client.name)
            options = [
                borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                for borrowed in sockets_of(worker.pid)
                if borrowed.family == socket.AF_INET
            ]
            assert [bool(option) for option in options] == [True, True]


def sockets_of(pid: int) -> Iterator[socket.socket]:
    """Another process's sockets, by pidfd_getfd(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    for number in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{number}").startswith("socket:"):
            borrowed = libc.syscall(438, pidfd, int(number), 0)
            assert borrowed >= 0, os.strerror(ctypes.get_errno())
            with socket.socket(fileno=borrowed) as side:
                yield side
    os.close(pidfd)


def test_an_idle_connection_outlives_the_handshake_timeout(serve: Serve, backend: Listener) -> None:
    instance = serve(backend.address, worker={"handshake_timeout": "2s"})
    with TlsClient(instance.port) as client:
        client.handshake()
        with backend.accept() as accepted:
            # The parent looks after workers that do not keep to the timeout, 2 s later.
            time.sleep(4.3)
            client.send(b"still there?")
            assert receive_exactly(accepted, 12) == b"still there?"
            accepted.sendall(b"yes")
            assert client.receive_exactly(3) == b"yes"


def test_a_worker_that_only_waits_uses_no_processor(pair: Pair) -> None:
    """Half-closed both ways round: a hang-up must not wake the pump again and again."""
    worker = the_busy_worker(pair.instance, pair.client.name)
    pair.client.close_notify()
    pair.client.socket.shutdown(socket.SHUT_WR)
    assert receive_all(pair.backend) == b""
    before = processor_ticks(worker.pid)
    time.sleep(0.5)
    assert processor_ticks(worker.pid) - before <= 2


def processor_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_truncated_client_can_tell(serve: Serve, backend: Listener) -> None:
    """The control of all the above: TlsClient does tell a FIN from a close_notify."""
    del serve
    with TlsClient(backend.port) as client:
        with backend.accept() as accepted:
            accepted.shutdown(socket.SHUT_WR)
            with pytest.raises(Truncated):
                client.handshake()
