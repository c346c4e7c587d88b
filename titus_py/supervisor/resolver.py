"""Looks up backends' names, again and again, without delaying the supervisor.

Run by the supervisor. Each question has a thread, which may wait as long as the name servers
take. Everything else runs in the event loop. A name server is trusted with where a name's
connections go, and with nothing else.
"""

import errno
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path

from titus_py.between.event_loop import EventLoop
from titus_py.between.plan import ResolvedAddress
from titus_py.configuration.address import IPAddress, NameAddress, UnixAddress

__all__ = ["Resolver", "numeric"]

#: How often to ask again: getaddrinfo(3) does not tell how long an answer is valid.
_INTERVAL_SECONDS = 30.0
#: How many of a backend's addresses are used. A name server decides how many there are, and all
#: of them go into one message.
_MAX_ADDRESSES = 64
#: How many names are looked up at a time, for each family.
_AT_ONCE = 8
#: The order in which they are tried (RFC 8305 §4).
_FAMILIES = (socket.AF_INET6, socket.AF_INET)
#: Only after these errors is it certain that there is no address of this family.
_NO_ADDRESS = frozenset({socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_ADDRFAMILY})
_HOSTS = Path("/etc/hosts")

Addresses = tuple[ResolvedAddress, ...]
_Question = tuple[NameAddress, socket.AddressFamily]


def numeric(backend: IPAddress | UnixAddress) -> Addresses:
    """The address of a backend that has no name; raises OSError for an unknown interface."""
    if isinstance(backend, UnixAddress):
        return ((socket.AF_UNIX, backend.path),)
    return ((backend.family, backend.sockaddr()),)


class Resolver:
    """Looks names up: at once when they are set, and then every half minute.

    A and AAAA are asked for independently, so that a name server that does not answer one of
    them delays nothing. ``take`` is called with the addresses that are known, and again when
    there are more. It is called with an OSError if both lookups fail. After a failed lookup, that
    family's last addresses are kept, unless the error says for certain that there are none.
    """

    def __init__(
        self, loop: EventLoop, take: Callable[[NameAddress, Addresses | OSError], None]
    ) -> None:
        self._loop = loop
        self._take = take
        self._names: frozenset[NameAddress] = frozenset()
        #: Questions that wait for a thread, and those that have one.
        self._waiting: dict[socket.AddressFamily, deque[NameAddress]] = {}
        self._asked: set[_Question] = set()
        #: The last good answer to each question, and the errors since names were last asked for.
        self._known: dict[_Question, Addresses] = {}
        self._errors: dict[_Question, OSError] = {}
        #: The threads' answers, and the pipe by which they wake the event loop.
        self._answers: deque[tuple[_Question, Addresses | OSError]] = deque()
        self._readable, self._signal = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        loop.watch(self._readable, self._hear)
        loop.after(_INTERVAL_SECONDS, self._ask_again)

    def resolve(self, names: Iterable[NameAddress]) -> None:
        """Look these up from now on, and no others."""
        self._names = frozenset(names)
        self._known = {key: found for key, found in self._known.items() if key[0] in self._names}
        self._ask()

    def _ask_again(self) -> None:
        self._loop.after(_INTERVAL_SECONDS, self._ask_again)
        self._ask()

    def _ask(self) -> None:
        """Ask for every name, but for those whose answer is still awaited."""
        for family in _FAMILIES:
            unasked = (name for name in self._names if (name, family) not in self._asked)
            self._waiting[family] = deque(unasked)
        self._errors.clear()
        self._start_threads()

    def _start_threads(self) -> None:
        """Start up to so many for each family: one that gets no answers delays no other."""
        for family, waiting in self._waiting.items():
            busy = sum(of == family for _, of in self._asked)
            for _ in range(min(_AT_ONCE - busy, len(waiting))):
                question = waiting.popleft(), family
                self._asked.add(question)
                try:
                    threading.Thread(target=self._answer, args=(question,), daemon=True).start()
                except RuntimeError as error:  # the limit on processes is reached
                    self._note(question, OSError(errno.EAGAIN, str(error)))

    def _answer(self, question: _Question) -> None:
        """Runs in a thread of its own."""
        try:
            self._note(question, _look_up(*question))
        except OSError as error:
            self._note(question, error)

    def _note(self, question: _Question, answer: Addresses | OSError) -> None:
        self._answers.append((question, answer))
        # A full pipe wakes the event loop anyway.
        with suppress(BlockingIOError):
            os.write(self._signal, b"!")

    def _hear(self) -> None:
        os.read(self._readable, 4096)
        while self._answers:
            question, answer = self._answers.popleft()
            self._asked.discard(question)
            if question[0] in self._names:
                self._learn(question, answer)
        self._start_threads()

    def _learn(self, question: _Question, answer: Addresses | OSError) -> None:
        name = question[0]
        if isinstance(answer, OSError):
            self._errors[question] = answer
            if answer.errno in _NO_ADDRESS:
                self._known.pop(question, None)
        else:
            self._known[question] = answer
        both = [(name, family) for family in _FAMILIES]
        errors = [self._errors[one] for one in both if one in self._errors]
        if len(errors) == len(both):
            # Any other error tells more than that a family has no address.
            self._take(name, min(errors, key=lambda error: error.errno in _NO_ADDRESS))
        elif found := _interleaved([self._known.get(one, ()) for one in both]):
            self._take(name, found[:_MAX_ADDRESSES])


def _look_up(backend: NameAddress, family: socket.AddressFamily) -> Addresses:
    """A name's addresses of one family, at least one. Blocks. Raises OSError."""
    # A name in /etc/hosts is asked for without a family. Otherwise a name with only an IPv4
    # address there would be looked up in the DNS too, and its connections would go there.
    asked = socket.AF_UNSPEC if _is_in_hosts_file(backend.name) else family
    answers = socket.getaddrinfo(backend.name, backend.port, asked, socket.SOCK_STREAM)
    # If Python was built without IPv6, such an address is a tuple of another form.
    found = dict.fromkeys(
        (of, address) for of, _, _, _, address in answers if isinstance(address[0], str)
    )
    if addresses := tuple(one for one in found if one[0] == family):
        return addresses
    raise socket.gaierror(socket.EAI_NODATA, "No address associated with hostname")


def _is_in_hosts_file(name: str) -> bool:
    """Whether hosts(5) has the name. A line is an address and its names; # begins a comment."""
    try:
        lines = _HOSTS.read_text(errors="replace").lower().splitlines()
    except OSError:
        return False
    return any(name.lower() in line.partition("#")[0].split()[1:] for line in lines)


def _interleaved(families: Iterable[Addresses]) -> Addresses:
    """Alternate families, so that the second address tried is of the other (RFC 8305 §4)."""
    return tuple(one for one in chain.from_iterable(zip_longest(*families)) if one is not None)
