"""The unix socket on which keyd signs for other hosts: made here, heard by the keyd that serves.

Run by the supervisor, which keeps it as long as a configuration wants it, and hears nothing on it.
"""

import socket
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from keyd.linux.unix_socket import File, refuse_descriptors
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
    """For the next program: a socket's address, its descriptor, its file."""

    address: UnixAddress
    descriptor: int
    file: File


class LendingSocket:
    """While one generation takes over from another, there may be two."""

    def __init__(self, children: Children, event: Event) -> None:
        self._children, self._event = children, event
        self._sockets: dict[UnixAddress, tuple[socket.socket, File]] = {}

    def change(self, generations: Sequence[Generation]) -> None:
        """Listen where the last of these is to lend keys, and no more where none does.

        Raises OSError; then nothing has changed.
        """
        wanted = [generation.configuration.keyd.lend for generation in generations]
        address = wanted[-1]
        if address is not None and address not in self._sockets:
            try:
                self._sockets[address] = socket_files.listen_at(address, _NOBODYS, _BACKLOG)
            except OSError as error:
                raise OSError(f"keyd.lend: {address}: {error.strerror or error}") from None
        self._keep(wanted)

    def close(self) -> None:
        """Listen no more, and remove the file."""
        self._keep(())

    def _keep(self, wanted: Collection[UnixAddress | None]) -> None:
        for address in self._sockets.keys() - wanted:
            listener, file = self._sockets.pop(address)
            listener.close()
            socket_files.remove(address, file)

    @property
    def left(self) -> list[Left]:
        """For the next program (``adopt``)."""
        return [
            Left(address, listener.fileno(), file)
            for address, (listener, file) in self._sockets.items()
        ]

    def adopt(self, left: Iterable[Left]) -> None:
        """Keep what the previous program has left."""
        for address, descriptor, file in left:
            listener = socket.socket(fileno=descriptor)
            # A program of before may not have known of it.
            refuse_descriptors(listener)
            self._sockets[address] = listener, file

    def lend(self, generation: Generation) -> None:
        """Have its keyd hear what comes, if it is to lend keys. It serves from now on."""
        address = generation.configuration.keyd.lend
        self._keep([address])
        if address is None or address not in self._sockets:
            return
        listener, file = self._sockets[address]
        self._let_in(generation, address, file)
        if generation.keyd is not None:
            try:
                self._children.order(generation.keyd, {"do": "lend"}, [listener.fileno()])
            except OSError as error:
                # No descriptor is left. The next keyd is told.
                self._tell(address, error)

    def _let_in(self, generation: Generation, address: UnixAddress, file: File) -> None:
        """Let its parent connect, and no other process: what connects may hold keyd up."""
        access = _NOBODYS
        if generation.configuration.worker.backend_gids is not None:
            # It has no capability for that, and a group of its own.
            access = SocketAccess(0o660, None, generation.uids[-1])
        try:
            if socket_files.is_there(address, file):
                socket_files.update(address, file, access)
        except OSError as error:
            self._tell(address, error)

    def _tell(self, address: UnixAddress, error: OSError) -> None:
        reason = f"keyd.lend: {address}: {error.strerror}"
        self._event("socket_file", level="error", reason=reason)

    def lend_no_more(self, generation: Generation) -> None:
        """Have its keyd answer what it was asked, and leave the rest to the one that serves."""
        if generation.configuration.keyd.lend is not None and generation.keyd is not None:
            self._children.order(generation.keyd, {"do": "lend no more"})
