"""Backend names, looked up again and again, off the supervisor's path.

Run by the supervisor, in a thread: a resolver may take as long as it likes.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterable

from titus_py.between.plan import ResolvedAddress
from titus_py.configuration.address import Address, IPAddress, NameAddress, UnixAddress

__all__ = ["Resolver", "resolve"]

#: getaddrinfo(3) does not tell how long an answer holds.
_INTERVAL_SECONDS = 30.0
#: How many of a backend's addresses are of use. Whoever answers for its name decides how many
#: there are, and all of them go into one message.
_MAX_ADDRESSES = 64


def resolve(backend: Address) -> tuple[ResolvedAddress, ...]:
    """The addresses of a backend, in getaddrinfo(3)'s order; blocks; raises OSError."""
    match backend:
        case UnixAddress(path):
            return ((socket.AF_UNIX, path),)
        case IPAddress():
            return ((backend.family, backend.sockaddr()),)
        case NameAddress(name, port):
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            # A family that is not built in makes for addresses of another shape.
            different = dict.fromkeys(
                (family, address)
                for family, _, _, _, address in found
                if isinstance(address[0], str)
            )
            return tuple(different)[:_MAX_ADDRESSES]


class Resolver:
    """Looks backends up: each at once when it is asked to, and all of them every half minute.

    ``descriptor`` is readable when there is something to ``collect``.
    """

    def __init__(self) -> None:
        self._backends: list[Address] = []
        self._changed = threading.Event()
        self._found: dict[Address, tuple[ResolvedAddress, ...] | OSError] = {}
        self._lock = threading.Lock()
        self.descriptor, self._signal = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        threading.Thread(target=self._run, daemon=True).start()

    def resolve(self, backends: Iterable[Address]) -> None:
        """Look these up from now on, and no others."""
        with self._lock:
            self._backends = list(dict.fromkeys(backends))
        self._changed.set()

    def collect(
        self, take: Callable[[Address, "tuple[ResolvedAddress, ...] | OSError"], None]
    ) -> None:
        """Hand out what has been found, or has failed, since the last time."""
        os.read(self.descriptor, 1)
        with self._lock:
            found, self._found = self._found, {}
        for backend, result in found.items():
            take(backend, result)

    def _run(self) -> None:
        while True:
            self._changed.wait(_INTERVAL_SECONDS)
            self._changed.clear()
            found: dict[Address, tuple[ResolvedAddress, ...] | OSError] = {}
            with self._lock:
                backends = self._backends
            for backend in backends:
                try:
                    found[backend] = resolve(backend)
                except OSError as error:
                    found[backend] = error
            with self._lock:
                news = not self._found
                self._found.update(found)
            if news:
                os.write(self._signal, b"!")
