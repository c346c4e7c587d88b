"""The real fork server, whose workers can be taken over: by the tests, and by nothing else.

Started by ``driven_parent`` in place of ``titus_py.fork_server.life``, with one more argument
before the others: JSON that names which parts of the confinement to leave out. A client takes
the worker over that it gets, with the server name that it asks for: ``STAGE.NUMBER.PARAMETER...``
and ``.attack.test``, where NUMBER is an attempt's in ``attacks`` or a deed's name below, and
STAGE is ``h`` (instead of the handshake: the answer goes out unencrypted) or ``e`` (instead of
the pump). A tunnel's worker is taken over by what its client says first, and its server has the
answer: ``t.NUMBER.PARAMETER...`` and the domain. Everything else is the code that is served with.
"""

import ctypes
import errno
import json
import mmap
import os
import random
import resource
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from OpenSSL import SSL
from OpenSSL._util import lib

from isolation.attacks import ATTEMPTS, Place, call, outcome
from isolation.memory import send_all_memory
from keyd.linux.process import Call
from titus_py.between.hand_over import KEYD_FD, PARENT_FD
from titus_py.between.messages import Dial, Ends, Established, Proxied, TlsFacts
from titus_py.between.report import End
from titus_py.fork_server import confinement
from titus_py.fork_server import life as fork_server
from titus_py.worker import life as worker
from titus_py.worker.client_hello import ClientHelloReader
from titus_py.worker.ends import describe
from titus_py.worker.farewell import stop_resetting
from titus_py.worker.tls import client_hello

__all__ = ["DEEDS", "LAYERS"]

DOMAIN = ".attack.test"
HELLO = client_hello()


class Taken:
    """A worker that is taken over: what it holds, and a way to its client.

    ``context`` is OpenSSL's, of the handshake that is done.
    """

    def __init__(
        self,
        place: Place,
        send: Callable[[bytes], None],
        receive: Callable[[], bytes],
        context: SSL.Context | None = None,
    ) -> None:
        self.place = place
        self.send = send
        self.receive = receive
        self.context = context


# --- what a worker can be made to do --------------------------------------------------------


def nothing(taken: Taken) -> str:
    return "nothing"


def relay(taken: Taken, seconds: str) -> str:
    """After so long, the client's messages to keyd, one by one, and its answers back."""
    stall(taken, seconds)
    client, keyd = taken.place.client, taken.place.keyd
    os.write(client, b"\0\0")
    while True:
        _wait(client, select.POLLIN)
        request = os.read(client, 4096)
        if not request:
            return "over"
        try:
            os.write(keyd, request)
            _wait(keyd, select.POLLIN)
            answer = os.read(keyd, 4096)
        except OSError as error:
            answer = errno.errorcode[error.errno or 0].encode()
        os.write(client, len(answer).to_bytes(2, "big") + answer)


def fuzz(taken: Taken, to: str, seed: str, count: str) -> str:
    """Random and mutated messages, until nobody takes them; counted in the record."""
    descriptor = getattr(taken.place, to)
    source = random.Random(int(seed))
    messages = [random_message(source, to) for _ in range(int(count))]
    for sent, message in enumerate(messages):
        try:
            os.write(descriptor, message)
        except OSError:
            break
        _report.from_client[0] = sent + 1
    return "fuzzed"


def ask_and_stall(taken: Taken, seconds: str) -> str:
    """A request to keyd, whose answer is never read."""
    os.write(taken.place.keyd, bytes((1, 1)) + bytes(100))
    return stall(taken, seconds)


def stall(taken: Taken, seconds: str) -> str:
    """Do nothing at all."""
    select.poll().poll(int(seconds) * 1000)
    return "stalled"


def memory(taken: Taken, own: str) -> str:
    """Everything that can be read, as it is; after something of the client's own has come."""
    held = b"" if taken.place.backend >= 0 else own.encode()
    while own.encode() not in held:
        _wait(taken.place.client, select.POLLIN)
        with suppress(BlockingIOError, SSL.WantReadError):
            held += taken.receive()
    count = send_all_memory(_mappings, taken.place.client)
    return f"memory: {count} octets"


def mappings(taken: Taken) -> str:
    return _mappings


def overwrite(taken: Taken) -> str:
    """All code on huge pages, as far as it can be made to be written to: a page of each mapping.

    It stays so until the client says something, or leaves.
    """
    count = 0
    for line in _mappings.splitlines():
        if "/memfd:code" in line:
            page = int(line.split()[0].split("-")[1], 16) - mmap.PAGESIZE
            call("mprotect", page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
            ctypes.memset(page, 0xCC, mmap.PAGESIZE)
            count += 1
    taken.send(b"%d;" % count)
    _wait(taken.place.client, select.POLLIN)
    return "overwritten"


def crash(taken: Taken) -> str:
    ctypes.string_at(8)
    return "alive"


def leave_silently(taken: Taken) -> str:
    os._exit(0)


def use_up_memory(taken: Taken) -> str:
    held = []
    while True:
        held.append(bytearray(1 << 20))


def spread_out(taken: Taken, count: str) -> str:
    """Memory that costs three times what it looks like: one page in each GiB, with its tables.

    So many, or as many as can be had. Kept until the client says something, or leaves.
    """
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    pages = []
    with suppress(OSError):
        for number in range(1, int(count) + 1):
            place = (number + 1024) << 30
            writable = mmap.PROT_READ | mmap.PROT_WRITE
            pages.append(call("mmap", place, mmap.PAGESIZE, writable, private, -1, 0))
            ctypes.memset(pages[-1], 1, 1)
    for page in pages[-256:]:
        # Our own code goes on needing some.
        call("munmap", page, mmap.PAGESIZE)
    taken.send(b".")
    _wait(taken.place.client, select.POLLIN)
    return "spread out"


def leave_a_child(taken: Taken) -> str:
    """A child that would live on: with the client's connection, whose end shows its own."""
    if not os.fork():
        os.setsid()
        taken.send(b"a child is alive; ")
        while True:
            time.sleep(60)
    time.sleep(0.2)
    os._exit(0)


def burst(taken: Taken, to: str, *parts: str) -> str:
    """These messages (hexadecimal), one after the other, and what the answer is."""
    for part in parts:
        os.write(getattr(taken.place, to), bytes.fromhex(part))
    stall(taken, "5")
    return "alive"


def at_a_word(taken: Taken, then: str, *parts: str) -> str:
    """Once its client says so: these messages (hexadecimal) to the parent, and then this."""
    taken.send(b".")
    _wait(taken.place.client, select.POLLIN)
    taken.receive()
    for part in parts:
        os.write(taken.place.parent, bytes.fromhex(part))
    if then == "defy":
        call("chdir", b"/")
    elif then == "crash":
        crash(taken)
    _wait(taken.place.client, select.POLLIN)
    return then


def impersonate(taken: Taken, *names: str) -> str:
    """Claim certificates with these names, which nobody has shown, and ask for the backend."""
    from titus_py.between.client_allow import Facts
    from titus_py.between.client_identity import Identity, Link

    for name in names:
        facts = Facts((f"{name}.example.org",), (), (name,), "00" * 32)
        identity = Identity(facts, (Link(bytes(32), 1, bytes(32)),), b"no certificate")
        os.write(taken.place.parent, identity.encode())
    os.write(taken.place.parent, Dial(1, None).encode())
    return stall(taken, "5")


def claim(taken: Taken, vhost: str, known: str) -> str:
    """Claim to be a known client of this virtual host, with no certificate at all; and dial."""
    from titus_py.between.client_allow import Facts
    from titus_py.between.client_identity import Identity

    nobody = Facts((), (), (), "00" * 32)
    os.write(taken.place.parent, Identity(nobody, (), b"", known=int(known)).encode())
    os.write(taken.place.parent, Dial(int(vhost), None).encode())
    return stall(taken, "5")


def shake_hands_again(taken: Taken) -> str:
    """With a client of its own: OpenSSL needs the private key, and the provider asks for it."""
    connection = SSL.Connection(taken.context)
    connection.set_accept_state()
    connection.bio_write(HELLO)
    try:
        connection.do_handshake()
    except SSL.Error as error:
        return describe(error)
    return "signed"


def _wait(descriptor: int, events: int) -> None:
    poll = select.poll()
    poll.register(descriptor, events)
    poll.poll()


DEEDS: dict[str, Callable[..., str]] = {
    "claim": claim,
    "nothing": nothing,
    "relay": relay,
    "fuzz": fuzz,
    "stall": stall,
    "ask": ask_and_stall,
    "memory": memory,
    "mappings": mappings,
    "overwrite": overwrite,
    "crash": crash,
    "leave": leave_silently,
    "useup": use_up_memory,
    "spread": spread_out,
    "child": leave_a_child,
    "burst": burst,
    "word": at_a_word,
    "impersonate": impersonate,
    "again": shake_hands_again,
}


def random_message(source: random.Random, to: str) -> bytes:
    """Anything, or what looks like a message to begin with, changed here and there."""
    if source.random() < 0.4:
        return source.randbytes(source.choice([1, 2, 3, 4, 5, 36, 37, 100, 1060, 1061, 2000]))
    if to == "parent":
        said = [message.encode() for message in _MESSAGES]
        message = bytearray(source.choice([b"R", *said, b"C", b"B", IDENTITY]))
    else:
        scheme = source.choice([0x0403, 0x0804, 0x0401, 0x0807, 0x0303])
        message = bytearray(
            bytes((1, source.choice([1, 1, 1, 2, 0, 3])))
            + scheme.to_bytes(2, "big")
            + source.choice([_KEY, bytes(32)])
            + source.choice(_PAYLOADS)
        )
    for _ in range(source.choice([0, 1, 1, 2, 8])):
        at = source.randrange(len(message))
        match source.randrange(4):
            case 0:
                message[at] = source.randrange(256)
            case 1:
                message[at] ^= 1 << source.randrange(8)
            case 2:
                del message[at:]
                message += source.randbytes(source.randrange(1, 8))
            case 3:
                message[at:at] = source.randbytes(source.randrange(1, 64))
    return bytes(message)


_MESSAGES = [
    Dial(0, None),
    Dial(0, 0),
    Dial(1, None),
    Dial(65535, None),
    Dial(0, None, TlsFacts("TLSv1.3", "TLS_AES_256_GCM_SHA384", "localhost")),
    Proxied(Ends("192.0.2.1", 5, "2001:db8::1", 443)),
    Proxied(None),
    Established(),
]
#: With one link, no certificate, and one name (``between.client_identity``).
IDENTITY = b"I" + bytes(32) + b"\1\1\0\0\0\x08\xff\xff" + bytes(84) + b"c\0\5alice"
_KEY = bytes(32)
_PAYLOADS = [
    b" " * 64 + b"TLS 1.3, server CertificateVerify\0" + bytes(32),
    bytes(64) + b"\3\0\x1d\x20" + bytes(32),
    bytes(64) + b"\3\0\x17\x41\4" + bytes(64),
    bytes(256),
]


# --- the parts of the confinement that can be left out --------------------------------------


def _nothing(*_: object) -> None:
    pass


def _without_calls(name: str, *first: int) -> None:
    """Leave these out of what each worker calls: those whose arguments begin like this."""
    worker_calls = fork_server.worker_calls

    def fewer(*arguments: Any) -> Sequence[Call]:
        return [
            call
            for call in worker_calls(*arguments)
            if call.name != name or call.arguments[: len(first)] != first
        ]

    fork_server.worker_calls = fewer  # type: ignore[assignment]


def _without_filter() -> None:
    _without_calls("seccomp")


def _without_landlock() -> None:
    confinement.landlock.restrict_self = _nothing
    _without_calls("landlock_restrict_self")


def _without_chroot() -> None:
    confinement.enter_empty_root = _nothing  # type: ignore[attr-defined]


def _without_network() -> None:
    confinement.leave_namespaces = _nothing  # type: ignore[attr-defined]


def _without_namespaces() -> None:
    fork_server.WORKER_NAMESPACES = 0  # type: ignore[attr-defined]


def _without_become() -> None:
    """Still root, with the capabilities that the fork server has."""
    _without_calls("setresuid")
    _without_calls("setresgid")


def _without_limit(name: str) -> Callable[[], None]:
    """Whether the fork server sets it, or the worker, or both."""
    number = getattr(resource, name)

    def leave_out() -> None:
        set_limits = confinement.limit  # type: ignore[attr-defined]

        def limit(limits: dict[int, int]) -> None:
            set_limits({which: most for which, most in limits.items() if which != number})

        confinement.limit = limit  # type: ignore[attr-defined]
        _without_calls("prlimit64", 0, number)

    return leave_out


def _without_oom() -> None:
    """To the kernel, one process is as good as another when memory runs out."""

    class NoCalls:
        as_workers = as_fork_server = b""

        def __init__(self, descriptor: int) -> None:
            pass

    fork_server.OutOfMemory = NoCalls  # type: ignore[attr-defined]


def _without_parting() -> None:
    """The channel's descriptor is closed, and its number the backend's."""
    fork_server.parting_calls = lambda: [Call("close_range", (KEYD_FD, KEYD_FD))]
    take = worker._take_backend

    def instead(parent: socket.socket) -> socket.socket:
        backend = take(parent)
        os.dup2(backend.fileno(), KEYD_FD)
        return backend

    worker._take_backend = instead  # type: ignore[assignment]


def _without_header() -> None:
    fork_server._proxy_header_reader = lambda plan: None


def _without_reseed() -> None:
    worker.reseed = _nothing  # type: ignore[attr-defined]


def _without_ready() -> None:
    """The first worker hangs before it says that it is ready."""
    forked, reseed = mmap.mmap(-1, mmap.PAGESIZE), worker.reseed  # type: ignore[attr-defined]

    def hang() -> None:
        forked[0] += 1
        if forked[0] == 1:
            select.poll().poll()
        reseed()

    worker.reseed = hang  # type: ignore[attr-defined]


#: ``dialer``, ``once`` and ``process one`` are the parent's (see ``driven_parent``); and there is
#: ``preload PATH``.
LAYERS: dict[str, Callable[[], None]] = {
    "filter": _without_filter,
    "landlock": _without_landlock,
    "chroot": _without_chroot,
    "network": _without_network,
    "namespaces": _without_namespaces,
    "become": _without_become,
    "nproc": _without_limit("RLIMIT_NPROC"),
    "as": _without_limit("RLIMIT_AS"),
    "nofile": _without_limit("RLIMIT_NOFILE"),
    "reseed": _without_reseed,
    "parting": _without_parting,
    "oom": _without_oom,
    "header": _without_header,
    "ready": _without_ready,
}


# --- taking over ----------------------------------------------------------------------------

_mappings = ""
_report: Any = None


def _ordered(name: str | None, stage: str) -> list[str] | None:
    """The order in a server name, if there is one for this stage."""
    if not name or not name.endswith(DOMAIN):
        return None
    words = name.removesuffix(DOMAIN).split(".")
    return words[1:] if words[0] == stage else None


def _obey(words: list[str], taken: Taken) -> str:
    what, *parameters = words
    if what.isdigit():
        numbers = [int(word) for word in parameters]
        return outcome(ATTEMPTS[int(what)].code, taken.place, numbers)
    return DEEDS[what](taken, *parameters)


def _infect() -> None:
    confine, shake_hands, run = (
        fork_server.confine_fork_server,
        worker._shake_hands,
        worker.Pump.run,  # type: ignore[attr-defined]
    )

    def confine_and_remember(chroot: str, parent: int) -> None:
        global _mappings
        # Every worker's, but for its report. As an attacker could find out by probing (see
        # ``memory``).
        _mappings = Path("/proc/self/maps").read_text()
        confine(chroot, parent)

    def instead_of_handshake(connection: object, peer: socket.socket, *terms: object) -> None:
        hello = ClientHelloReader().feed(peer.recv(65536, socket.MSG_PEEK))
        words = _ordered(hello.server_name, "h") if hello else None
        if words is None:
            shake_hands(connection, peer, *terms)
            return
        peer.recv(65536)
        place = Place(PARENT_FD, KEYD_FD, peer.fileno(), report=_report.address)
        taken = Taken(
            place, lambda octets: _send(peer, peer.fileno(), octets), lambda: peer.recv(65536)
        )
        result = _obey(words, taken)
        # To the client, or to whom it is connected now: so into the record, too.
        raise worker._Over(End.HANDSHAKE_FAILED, f"taken over: {result}", result.encode())

    def instead_of_pump(
        self: worker.Pump,  # type: ignore[name-defined]
        backend: socket.socket,
    ) -> tuple[End, str]:
        words = _ordered((self._client.get_servername() or b"").decode(), "e")
        if words is None:
            return run(self, backend)
        client = self._client_socket.fileno()
        # OpenSSL writes to memory by now.
        lib.SSL_set_fd(self._client._ssl, client)
        place = Place(PARENT_FD, KEYD_FD, client, backend.fileno(), report=_report.address)

        def send(octets: bytes) -> None:
            _send(self._client, client, octets)

        context = self._client.get_context()
        result = _obey(words, Taken(place, send, lambda: self._client.recv(65536), context))
        send(result.encode())
        self._client.shutdown()
        for side in (self._client_socket, backend):
            stop_resetting(side)
            side.close()
        return End.CLEAN, f"taken over: {result}"

    class Remembered(fork_server.ReportWriter):  # type: ignore[name-defined]
        def __init__(self) -> None:
            global _report
            super().__init__()
            _report = self

    fork_server.ReportWriter = Remembered  # type: ignore[attr-defined]
    fork_server.confine_fork_server = confine_and_remember
    worker._shake_hands = instead_of_handshake  # type: ignore[assignment]
    worker.Pump.run = instead_of_pump  # type: ignore[attr-defined, method-assign]


def _infect_tunnels() -> None:
    """For the sake of the rehearsal, connections by unix sockets are left alone."""
    make = fork_server._conduits

    def conduits(plan: Any) -> Any:
        made = make(plan)
        for conduit in made:
            serve = conduit.serve

            def instead(
                terms: Any,
                pump: Any,
                parent: socket.socket,
                keyed: bool,
                client: socket.socket,
                server: socket.socket,
                serve: Callable[..., tuple[End, str]] = serve,
            ) -> tuple[End, str]:
                _wait(client.fileno(), select.POLLIN)
                words = _ordered(client.recv(256, socket.MSG_PEEK).decode(errors="replace"), "t")
                if words is None:
                    return serve(terms, pump, parent, keyed, client, server)
                # Who takes it over is at the other end.
                keyd = KEYD_FD if keyed else -1
                place = Place(PARENT_FD, keyd, server.fileno(), client.fileno(), _report.address)
                result = _obey(words, Taken(place, server.send, lambda: server.recv(65536)))  # type: ignore[arg-type]
                _send(server, server.fileno(), result.encode())
                stop_resetting(server)
                return End.HANDSHAKE_FAILED, f"taken over: {result}"

            conduit.serve = instead
        return made

    fork_server._conduits = conduits  # type: ignore[assignment]


def _send(way: socket.socket | SSL.Connection, descriptor: int, octets: bytes) -> None:
    """All of it, on a socket that does not block."""
    view = memoryview(octets)
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    while view:
        poll.poll()
        try:
            view = view[way.send(view[:16384]) :]
        except (BlockingIOError, SSL.WantWriteError):
            continue


def _preload(library: str) -> None:
    """Begin again with this library before all others (ld.so(8)), if that was not done yet."""
    if os.environ.get("LD_PRELOAD") != library:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "LD_PRELOAD": library})


def main() -> NoReturn:
    without = json.loads(sys.argv.pop(1))
    for layer in without:
        if layer.startswith("preload "):
            _preload(layer.removeprefix("preload "))
    for layer in without:
        if layer in LAYERS:
            LAYERS[layer]()
    _infect()
    _infect_tunnels()
    sys.exit(fork_server.main())


if __name__ == "__main__":
    main()
