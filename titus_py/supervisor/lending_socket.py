"""The unix socket on which keyd signs for other hosts: made here, heard by the keyd that serves.

Run by the supervisor, which keeps it as long as a configuration wants it, and hears nothing on it.
"""

import socket
from typing import NamedTuple

from keyd.linux.unix_socket import File
from titus_py.configuration import Configuration
from titus_py.configuration.address import UnixAddress
from titus_py.configuration.socket_access import SocketAccess
from titus_py.supervisor import socket_files
from titus_py.supervisor.children import Children
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.record import Event

__all__ = ["Left", "LendingSocket"]

_BACKLOG = 128
#: Only root can connect, and the parent where it has the capability for that.
_NOBODYS = SocketAccess(0o600)


class Left(NamedTuple):
    """For the next program: the socket's address, its descriptor, its file."""

    address: UnixAddress
    descriptor: int
    file: File


class LendingSocket:
    def __init__(self, children: Children, event: Event) -> None:
        self._children, self._event = children, event
        self._address: UnixAddress | None = None
        self._listener: socket.socket | None = None
        self._file: File = (0, 0, 0)

    def change(self, configuration: Configuration) -> None:
        """Listen only where this configuration says. Raises OSError; then nothing has changed."""
        address = configuration.keyd.lend
        if address == self._address:
            return
        new = None
        if address is not None:
            try:
                new = socket_files.listen_at(address, _NOBODYS, _BACKLOG)
            except OSError as error:
                raise OSError(f"keyd.lend: {address}: {error.strerror or error}") from None
        self.close()
        self._address = address
        if new is not None:
            self._listener, self._file = new

    def close(self) -> None:
        """Listen no more, and remove the file."""
        if self._address is not None and self._listener is not None:
            self._listener.close()
            socket_files.remove(self._address, self._file)
        self._address = self._listener = None

    @property
    def left(self) -> Left | None:
        """For the next program (``adopt``)."""
        if self._address is None or self._listener is None:
            return None
        return Left(self._address, self._listener.fileno(), self._file)

    def adopt(self, left: Left | None) -> None:
        """Keep what the previous program has left."""
        if left is not None:
            self._address, self._file = left.address, left.file
            self._listener = socket.socket(fileno=left.descriptor)

    def lend(self, generation: Generation) -> None:
        """Have its keyd hear what comes, if it is to lend keys."""
        if generation.configuration.keyd.lend is None or self._listener is None:
            return
        self._let_in(generation)
        if generation.keyd is not None:
            self._children.order(generation.keyd, {"do": "lend"}, [self._listener.fileno()])

    def _let_in(self, generation: Generation) -> None:
        """Let its parent connect, and no other process: what connects may hold keyd up."""
        access = _NOBODYS
        if generation.configuration.worker.backend_gids is not None:
            # It has no capability for that, and a group of its own.
            access = SocketAccess(0o660, None, generation.uids[-1])
        try:
            if self._address is not None and socket_files.is_there(self._address, self._file):
                socket_files.update(self._address, self._file, access)
        except OSError as error:
            reason = f"keyd.lend: {self._address}: {error.strerror}"
            self._event("socket_file", level="error", reason=reason)

    def lend_no_more(self, generation: Generation) -> None:
        """Have its keyd answer what it was asked, and leave the rest to the one that serves."""
        if generation.configuration.keyd.lend is not None and generation.keyd is not None:
            self._children.order(generation.keyd, {"do": "lend no more"})
