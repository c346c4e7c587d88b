"""What ``test_flow`` looks at, as a program: one thread, and no test runner beside it.

Its arguments: a build of titus_py/worker/flow.c, or nothing for the one that is installed; then
the names of what to do. It prints what came of each, as JSON. A child process plays both peers, and
says in the end what they heard.
"""

import json
import os
import random
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from builds import use_build

if sys.argv[1]:
    use_build("titus_py.worker.flow", sys.argv[1])

from cryptography.hazmat.bindings import _rust
from OpenSSL import SSL
from OpenSSL._util import ffi, lib

from titus_py.worker import flow
from titus_py.worker.pump import Pump

assert not sys.argv[1] or flow.__file__ == sys.argv[1]

#: <linux/tcp.h>: with it, close(2) says nothing to the other end.
_TCP_REPAIR = 19
MUCH = random.Random(1).randbytes(3 << 20)
_NAMES = {
    getattr(flow, name): name
    for name in (
        *("STOOD_STILL", "CLIENT_ENDED", "CLIENT_TRUNCATED", "BACKEND_ENDED"),
        *("ALL_TO_BACKEND", "ALL_TO_CLIENT", "CLIENT_FAILED", "NOT_DECRYPTED", "NOT_ENCRYPTED"),
        *("NOT_FROM_CLIENT", "NOT_TO_CLIENT", "NOT_FROM_BACKEND", "NOT_TO_BACKEND"),
    )
}
flow.use(
    *(
        int(ffi.cast("uintptr_t", ffi.addressof(_rust._openssl.lib, name)))
        for name in ("SSL_read", "SSL_write", "SSL_get_error", "BIO_read", "BIO_write")
    )
)


def context(method: int) -> SSL.Context:
    made = SSL.Context(method)
    made.set_max_proto_version(SSL.TLS1_2_VERSION)
    made.set_cipher_list(b"AECDH-AES128-SHA:@SECLEVEL=0")
    return made


def number() -> memoryview:
    return memoryview(bytearray(8)).cast("Q")


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    """With buffers that hold little."""
    ours = socket.socket()
    with socket.create_server(("127.0.0.1", 0)) as server:
        for one in (ours, server):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        ours.connect(server.getsockname())
        return ours, server.accept()[0]


class Between:
    """A TLS client and a backend in a child, and what passes on between them here."""

    def __init__(
        self,
        play: Callable[[SSL.Connection, socket.socket], object],
        client_pair: Callable[[], tuple[socket.socket, socket.socket]] = _tcp_pair,
    ) -> None:
        client, theirs_client = client_pair()
        self.backend, theirs_backend = _tcp_pair()
        self._said, saying = os.pipe()
        waiting, self._over = os.pipe()
        self._child = os.fork()
        if not self._child:
            try:
                for one in (client, self.backend):
                    one.close()
                os.close(self._over)
                peer = SSL.Connection(context(SSL.TLS_CLIENT_METHOD), theirs_client)
                peer.set_connect_state()
                peer.do_handshake()
                os.write(saying, json.dumps(play(peer, theirs_backend)).encode())
                # Nothing ends before it has been looked at.
                os.read(waiting, 1)
            finally:
                os._exit(0)
        for one in (theirs_client, theirs_backend):
            one.close()
        os.close(saying)
        self.client = client
        self.tls = SSL.Connection(context(SSL.TLS_SERVER_METHOD), client)
        self.tls.set_accept_state()
        self.tls.do_handshake()
        for side in (client, self.backend):
            side.setblocking(False)
        bios = [lib.BIO_new(lib.BIO_s_mem()) for _ in range(2)]
        lib.SSL_set_bio(self.tls._ssl, *bios)
        self._in_memory = tuple(int(ffi.cast("uintptr_t", each)) for each in (self.tls._ssl, *bios))
        #: To the backend, to the client, encrypted.
        self.buffers = [memoryview(bytearray(size)) for size in (1 << 18, 1 << 18, 132 << 10)]
        self.counts = [number() for _ in range(3)]
        self.rests = [buffer[:0] for buffer in self.buffers]
        self.states = [flow.OPEN, flow.OPEN]
        self.allowance = 1 << 40

    def run(self, patience: int = 10_000) -> list[object]:
        """What happened, whether a side was ready, and how much is still to be passed on."""
        up, down, encrypted = zip(self.buffers, self.rests, self.counts, strict=True)
        happened, woken, self.result, self.number, *self.rests, self.allowance = flow.run(
            self._in_memory,
            self.client.fileno(),
            self.backend.fileno(),
            patience,
            (*up, self.states[0]),
            (*down, self.states[1]),
            encrypted,
            self.allowance,
        )
        return [_NAMES[happened], woken, *map(len, self.rests)]

    def why(self) -> str:
        """The exception that pyOpenSSL makes of the call that failed."""
        try:
            self.tls._raise_ssl_error(self.tls._ssl, self.result)
        except SSL.Error as error:
            return type(error).__name__
        return "none"

    def fill_another_backend(self) -> socket.socket:
        """A backend in this process, by a unix socket, that takes nothing."""
        self.backend.close()
        self.backend, theirs = socket.socketpair()
        self.backend.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                self.backend.send(MUCH)
        return theirs

    def heard(self) -> object:
        said = json.loads(os.read(self._said, 65536))
        os.close(self._over)
        os.waitpid(self._child, 0)
        return said

    def counted(self) -> list[int]:
        """From the client, to it, and what is encrypted and not sent."""
        return [count[0] for count in self.counts]


def _receive(side: socket.socket | SSL.Connection, count: int) -> bytes:
    received = b""
    while len(received) < count and (piece := side.recv(1 << 16)):
        received += piece
    return received


def small_exchanges() -> list[object]:
    def play(client: SSL.Connection, backend: socket.socket) -> int:
        answered = 0
        for at in range(50):
            client.send(b"request %d" % at)
            backend.sendall(b"answer to " + backend.recv(100))
            answered += client.recv(100) == b"answer to request %d" % at
        client.shutdown()
        return answered

    between = Between(play)
    return [between.run(), between.heard(), between.counted()]


def much_both_ways() -> list[object]:
    """More than sockets and buffers take: each side is waited for."""

    def play(client: SSL.Connection, backend: socket.socket) -> list[bool]:
        answering = threading.Thread(target=backend.sendall, args=[MUCH])
        answering.start()
        # A record at a time, in both directions: OpenSSL's object is for one thread.
        sent, back = 0, b""
        forward = b""
        while len(back) < len(MUCH) or len(forward) < len(MUCH):
            if sent < len(MUCH):
                sent += client.send(MUCH[sent : sent + (1 << 14)])
                forward += _receive(backend, min(1 << 14, len(MUCH) - len(forward)))
            if len(back) < len(MUCH):
                back += client.recv(1 << 14)
        answering.join()
        client.shutdown()
        return [back == MUCH, forward == MUCH]

    between = Between(play)
    return [between.run(), between.heard(), between.counted()]


def a_backend_that_takes_nothing() -> list[object]:
    """What could not be sent is there, and goes on later."""

    def play(client: SSL.Connection, backend: socket.socket) -> bool:
        client.sendall(MUCH)
        return _receive(backend, len(MUCH)) == MUCH

    # The client's sendall does not end before all is passed on, and only then is any taken.
    between = Between(play)
    while not between.rests[0]:
        first = between.run(100)
    still = [between.rests[0].tobytes() in MUCH, len(between.rests[0]) > 0]
    return [first[:2], still, between.run(1)[:2]]


def a_clients_end_of_file() -> list[object]:
    between = Between(lambda client, backend: client.sock_shutdown(socket.SHUT_WR))
    return [between.run(), between.run(1)]


def a_client_that_hangs_up() -> list[object]:
    """The end of most connections: both sides have ended the client's, and it has spoken last."""

    def play(client: SSL.Connection, backend: socket.socket) -> str:
        client.send(b"the last")
        client.shutdown()
        client.sock_shutdown(socket.SHUT_WR)
        return backend.recv(100).decode()

    between = Between(play)
    between.client.shutdown(socket.SHUT_WR)
    hung_up = select.poll()
    hung_up.register(between.client, 0)
    hung_up.poll(10_000)
    between.states[1] = flow.OVER
    found = between.run()
    between.states[0] = flow.ENDING
    return [found, between.run(), between.heard(), between.counted()]


def nothing_but_a_hang_up() -> list[object]:
    """It keeps nobody waiting longer, although poll(2) tells it whenever it is asked."""

    def play(client: SSL.Connection, backend: socket.socket) -> None:
        client.send(b"the last")
        client.shutdown()
        client.sock_shutdown(socket.SHUT_WR)

    between = Between(play)
    takes_nothing = between.fill_another_backend()
    between.client.shutdown(socket.SHUT_WR)
    between.states[1] = flow.OVER
    # All of it is there.
    hung_up = select.poll()
    hung_up.register(between.client, 0)
    hung_up.poll(10_000)
    found = between.run()
    between.states[0] = flow.ENDING
    again = [between.run(1), between.run(1)]
    takes_nothing.close()
    return [found, *again]


def a_client_that_is_gone_before_it_is_told_the_end() -> list[object]:
    """By a unix socket. Nothing is lost by that: it is the backend that takes nothing."""

    def play(client: SSL.Connection, backend: socket.socket) -> None:
        client.send(b"the last")
        client.shutdown()
        client._socket.close()

    between = Between(play, socket.socketpair)
    between.heard()
    backend = between.fill_another_backend()
    backend.shutdown(socket.SHUT_WR)
    counts = number(), number()
    pump = Pump(10, 1)
    pump.begin(between.tls, between.client, counts, True)
    end, _ = pump.run(between.backend)
    return [end.name, counts[0][0]]


def a_damaged_record() -> list[object]:
    def play(client: SSL.Connection, backend: socket.socket) -> None:
        client.send(b"whole")
        os.write(client.fileno(), b"\x17\x03\x03\x00\x20" + bytes(32))
        backend.recv(100)

    between = Between(play)
    return [between.run(), between.why(), between.heard(), between.counted()]


def a_backends_end_of_file() -> list[object]:
    def play(client: SSL.Connection, backend: socket.socket) -> str:
        backend.sendall(b"the last")
        backend.close()
        return client.recv(100).decode()

    between = Between(play)
    found = between.run()
    between.states[1] = flow.ENDING
    return [found, between.run(), between.heard(), between.counted()]


def what_a_backend_may_still_say() -> list[object]:
    """So much of it, and no more."""

    def play(client: SSL.Connection, backend: socket.socket) -> str:
        backend.sendall(b"the last, and more")
        return client.recv(100).decode()

    between = Between(play)
    between.allowance = 8
    while between.counted() != [0, 8, 0]:
        found = between.run(100)
    return [found[0], between.heard(), between.allowance, len(between.backend.recv(100))]


def a_client_that_is_gone() -> list[object]:
    def play(client: SSL.Connection, backend: socket.socket) -> None:
        client._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client._socket.close()

    between = Between(play)
    found = between.run()
    error = between.client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    between.backend.close()
    return [found, error]


def _vanish(client: SSL.Connection, backend: socket.socket) -> None:
    """As if its machine had been turned off and on: a reset is its only answer."""
    client.send(b"the last")
    client._socket.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
    client._socket.close()


def _end_and_close(client: SSL.Connection, backend: socket.socket) -> None:
    client.send(b"the last")
    client.shutdown()
    client._socket.close()


def _with_an_answer(between: Between) -> socket.socket:
    """A backend whose answer takes more than one send(2), once its client has played."""
    select.select([between._said], [], [])
    between.backend.close()
    between.backend, theirs = socket.socketpair()
    between.backend.setblocking(False)
    theirs.sendall(MUCH[:100_000])
    return theirs


def a_client_that_is_gone_while_it_is_sent_to() -> list[object]:
    """The first send(2) is answered by a reset, and the second one fails."""
    # Where the kernel is busy, the answer may come later: then poll(2) tells.
    found = ["CLIENT_FAILED"]
    while found[0] == "CLIENT_FAILED":
        between = Between(_vanish)
        theirs = _with_an_answer(between)
        found = between.run()
    from_client, to_client, _ = between.counted()
    sent = 0 < to_client < 100_000
    return [found[:2], between.number, theirs.recv(100).decode(), from_client, sent]


def the_same_after_its_end() -> list[object]:
    """It reads nothing any more: EPIPE."""
    found: list[object] = ["CLIENT_FAILED"]
    while found[0] == "CLIENT_FAILED":
        between = Between(_end_and_close)
        theirs = _with_an_answer(between)
        ended = between.run()
        between.states[0] = flow.ENDING
        found = between.run()
    return [ended[0], found[:2], between.number, theirs.recv(100).decode()]


def one_that_hears_nothing_any_more() -> list[object]:
    """By a unix socket, of which poll(2) tells nothing then."""
    between = Between(
        lambda client, backend: client.sock_shutdown(socket.SHUT_RD), socket.socketpair
    )
    with _with_an_answer(between):
        return [between.run()[:2], between.number, between.counted()[:2]]


def what_becomes_of_a_connection_whose_client_is_gone() -> list[object]:
    """What it had sent arrives."""
    between = Between(_vanish)
    theirs = _with_an_answer(between)
    counts = number(), number()
    pump = Pump(10, 1)
    pump.begin(between.tls, between.client, counts, True)
    end, detail = pump.run(between.backend)
    return [end.name, detail, theirs.recv(100).decode(), counts[0][0]]


def a_backends_reset() -> list[object]:
    def play(client: SSL.Connection, backend: socket.socket) -> str:
        backend.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        backend.close()
        with suppress(SSL.Error):
            client.recv(100)
        return "no octet"

    between = Between(play)
    found = between.run()
    between.client.close()
    return [found, between.number]


def nobody_says_anything() -> list[object]:
    def play(client: SSL.Connection, backend: socket.socket) -> None:
        client.send(b"once")
        backend.recv(100)
        with suppress(SSL.Error):
            client.recv(100)

    between = Between(play)
    while between.counted() != [4, 0, 0]:
        first = between.run(100)
    found: list[object] = [first, between.run(1)]
    between.client.close()
    return found


def a_direction_that_has_ended() -> list[object]:
    """It is not read any more; the other one goes on."""

    def play(client: SSL.Connection, backend: socket.socket) -> str:
        client.send(b"not to be read")
        backend.sendall(b"answer")
        return client.recv(100).decode()

    between = Between(play)
    between.states[0] = flow.OVER
    while between.counted() != [0, 6, 0]:
        found = between.run(100)
    return [found[0], between.heard(), between.counted()]


def what_is_no_buffer() -> list[object]:
    between = Between(lambda client, backend: None)
    found: list[object] = []
    small, elsewhere = memoryview(bytearray(65_535)), memoryview(bytearray(1 << 18))
    for which in range(3):
        for attribute, wrong in (
            ("buffers", small),
            ("rests", elsewhere[:1]),
            ("counts", memoryview(bytearray(4))),
        ):
            good = getattr(between, attribute)
            setattr(between, attribute, [*good[:which], wrong, *good[which + 1 :]])
            try:
                between.run(1)
            except ValueError as error:
                found.append(str(error))
            setattr(between, attribute, good)
    between.heard()
    return [found, between.run()[0] in ("CLIENT_TRUNCATED", "BACKEND_ENDED")]


print(json.dumps({thing: globals()[thing]() for thing in sys.argv[2:]}))
