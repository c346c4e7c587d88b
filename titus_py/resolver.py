"""Backend names, looked up again and again, off the supervisor's path.

Run by the supervisor, in a thread: a resolver may take as long as it likes.
"""

import os
import socket
import threading
from collections.abc import Callable, Sequence

from titus_py.address import Address, IPAddress, NameAddress, UnixAddress
from titus_py.dialer import ResolvedAddress

__all__ = ["Resolver", "resolve"]

#: getaddrinfo(3) does not tell how long an answer holds.
_INTERVAL_SECONDS = 30.0


def resolve(backend: Address) -> tuple[ResolvedAddress, ...]:
    """All addresses of a backend, in getaddrinfo(3)'s order; blocks; raises OSError."""
    match backend:
        case UnixAddress(path):
            return ((socket.AF_UNIX, path),)
        case IPAddress():
            return ((backend.family, backend.sockaddr()),)
        case NameAddress(name, port):
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
            # A family that is not built in makes for addresses of another shape.
            return tuple(
                dict.fromkeys(
                    (family, address)
                    for family, _, _, _, address in found
                    if isinstance(address[0], str)
                )
            )


class Resolver:
    """Looks each backend up at once and then every half minute.

    ``descriptor`` is readable when there is something to ``collect``.
    """

    def __init__(self, backends: Sequence[Address]) -> None:
        self._backends = list(dict.fromkeys(backends))
        self._found: dict[Address, tuple[ResolvedAddress, ...] | OSError] = {}
        self._lock = threading.Lock()
        self.descriptor, self._signal = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        threading.Thread(target=self._run, daemon=True).start()

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
        pause = threading.Event()
        while True:
            found: dict[Address, tuple[ResolvedAddress, ...] | OSError] = {}
            for backend in self._backends:
                try:
                    found[backend] = resolve(backend)
                except OSError as error:
                    found[backend] = error
            with self._lock:
                news = not self._found
                self._found.update(found)
            if news:
                os.write(self._signal, b"!")
            pause.wait(_INTERVAL_SECONDS)
