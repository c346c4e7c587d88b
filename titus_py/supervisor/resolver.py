"""Looks up backends' names, again and again, without delaying the supervisor.

Run by the supervisor. A process of its own asks the name servers (``unprivileged``); this says
what it is to ask, and keeps what it has answered. A name server is trusted with where a name's
connections go, and with nothing else.
"""

import itertools
import socket
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain, zip_longest

from titus_py.between.event_loop import EventLoop, Timer
from titus_py.between.lookups import AT_ONCE, MAX_ADDRESSES, Answer, Question
from titus_py.between.plan import ResolvedAddress
from titus_py.between.unprivileged import Malformed
from titus_py.configuration.address import IPAddress, NameAddress, UnixAddress
from titus_py.supervisor.unprivileged import UnprivilegedProcess

__all__ = ["Resolver", "numeric"]

#: The order in which they are tried (RFC 8305 §4).
_FAMILIES = (socket.AF_INET6, socket.AF_INET)
#: Only after these errors is it certain that there is no address of this family.
_NO_ADDRESS = frozenset({socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_ADDRFAMILY})
#: In glibc's words (gai_strerror(3)).
_ERRORS = {
    socket.EAI_ADDRFAMILY: "Address family for hostname not supported",
    socket.EAI_AGAIN: "Temporary failure in name resolution",
    socket.EAI_FAIL: "Non-recoverable failure in name resolution",
    socket.EAI_MEMORY: "Memory allocation failure",
    socket.EAI_NODATA: "No address associated with hostname",
    socket.EAI_NONAME: "Name or service not known",
    socket.EAI_SYSTEM: "System error",
}

#: Names without an address are asked for again after this, and then after twice as long.
_FIRST_PAUSE_SECONDS = 1.0

Addresses = tuple[ResolvedAddress, ...]
_Question = tuple[NameAddress, socket.AddressFamily]


def numeric(backend: IPAddress | UnixAddress) -> Addresses:
    """The address of a backend that has no name; raises OSError for an unknown interface."""
    if isinstance(backend, UnixAddress):
        return ((socket.AF_UNIX, backend.path),)
    return ((backend.family, backend.sockaddr()),)


class Resolver:
    """Looks names up: at once when they are set, and then every so many seconds (``every``).

    A and AAAA are asked for independently, so that a name server that does not answer one of
    them delays nothing. ``take`` is called with the addresses that are known, and again when
    there are more. It is called with an OSError if both lookups fail. After a failed lookup, that
    family's last addresses are kept, unless the error says for certain that there are none.

    A name without any address is asked for sooner, and ``take`` called if there is one then: where
    the machine has just booted, name servers may be there a moment later.
    """

    def __init__(
        self,
        loop: EventLoop,
        process: UnprivilegedProcess,
        take: Callable[[NameAddress, Addresses | OSError], None],
    ) -> None:
        self._loop = loop
        self._process = process
        self._take = take
        self._names: frozenset[NameAddress] = frozenset()
        self._every = 0.0
        #: Questions that wait for others to be answered, and those that the process has.
        self._waiting: dict[socket.AddressFamily, deque[NameAddress]] = {}
        self._asked: dict[int, _Question] = {}
        self._numbers = itertools.cycle(range(1 << 32))
        #: The last good answer to each question, and the errors since names were last asked for.
        self._known: dict[_Question, Addresses] = {}
        self._errors: dict[_Question, OSError] = {}
        self._next: Timer | None = None
        self._soon: Timer | None = None
        self._pause = _FIRST_PAUSE_SECONDS
        #: Names that are asked for again, after a failure that was told.
        self._again: set[NameAddress] = set()
        process.heard = self._hear
        process.changed = self._changed

    def resolve(self, names: Iterable[NameAddress], every: float) -> None:
        """Look these up from now on, and no others: now, and then every so many seconds."""
        self._names = frozenset(names)
        self._known = {key: found for key, found in self._known.items() if key[0] in self._names}
        self._every = every
        self._pause = _FIRST_PAUSE_SECONDS
        self._ask()

    def stop(self) -> None:
        """Look up nothing any more; the process has ended when this returns."""
        self.resolve((), self._every)
        self._process.stop()

    def _ask(self) -> None:
        """Ask for every name, but for those whose answer is still awaited."""
        for timer in (self._next, self._soon):
            if timer is not None:
                timer.cancel()
        self._next = self._soon = None
        self._again.clear()
        if not self._names:
            self._process.dismiss()
            self._asked.clear()
            self._waiting.clear()
            return
        self._next = self._loop.after(self._every, self._ask)
        asked = set(self._asked.values())
        for family in _FAMILIES:
            unasked = (name for name in self._names if (name, family) not in asked)
            self._waiting[family] = deque(unasked)
        self._errors.clear()
        self._send()

    def _ask_again(self) -> None:
        """Ask for the names of which nothing is known, and whose last answers were errors."""
        self._soon = None
        for name in self._names:
            both = [(name, family) for family in _FAMILIES]
            if all(one in self._errors and one not in self._known for one in both):
                self._again.add(name)
                for one in both:
                    del self._errors[one]
                    self._waiting[one[1]].append(name)
        self._send()

    def _send(self) -> None:
        """Ask up to so many of each family: one that gets no answers delays no other."""
        if not self._process.ready:
            self._process.start()
            return
        for family, waiting in self._waiting.items():
            busy = sum(of == family for _, of in self._asked.values())
            for _ in range(min(AT_ONCE - busy, len(waiting))):
                name, number = waiting.popleft(), next(self._numbers)
                self._asked[number] = name, family
                try:
                    self._process.send(Question(number, family, name.name).encode())
                except OSError:
                    # It has others to take (net.core.wmem_default), or is about to be found dead.
                    del self._asked[number]
                    waiting.appendleft(name)
                    break

    def _changed(self) -> None:
        """The process has become ready, or has died: then ask again what it had been asked."""
        for name, family in self._asked.values():
            if name in self._names:
                self._waiting[family].appendleft(name)
        self._asked.clear()
        if self._process.ready:
            self._send()

    def _hear(self, message: bytes) -> None:
        """Take an answer. Raises Malformed."""
        question = self._asked.pop(Answer.number_of(message), None)
        if question is None:
            raise Malformed("an answer to no question")
        name, family = question
        answer = Answer.decode(message, family)
        if name in self._names:
            if answer.error:
                text = _ERRORS.get(answer.error, f"error {answer.error} of getaddrinfo(3)")
                self._learn(question, socket.gaierror(answer.error, text))
            else:
                self._learn(question, _with_port(answer, family, name.port))
        self._send()

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
            if name not in self._again:
                # Any other error tells more than that a family has no address.
                self._take(name, min(errors, key=lambda error: error.errno in _NO_ADDRESS))
            if self._soon is None and self._pause < self._every:
                self._soon = self._loop.after(self._pause, self._ask_again)
                self._pause *= 2
        elif found := _interleaved([self._known.get(one, ()) for one in both]):
            self._take(name, found[:MAX_ADDRESSES])


def _with_port(answer: Answer, family: socket.AddressFamily, port: int) -> Addresses:
    if family == socket.AF_INET6:
        return tuple((family, (host, port, 0, scope)) for host, scope in answer.addresses)
    return tuple((family, (host, port)) for host, _ in answer.addresses)


def _interleaved(families: Iterable[Addresses]) -> Addresses:
    """Alternate families, so that the second address tried is of the other (RFC 8305 §4)."""
    return tuple(one for one in chain.from_iterable(zip_longest(*families)) if one is not None)
