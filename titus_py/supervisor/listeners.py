"""Listening sockets: bound here, or handed over by the service manager.

Run by the supervisor, which owns them as long as it runs.
"""

import errno
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from keyd.linux.unix_socket import File, refuse_descriptors
from titus_py.between.closing import without_waiting
from titus_py.configuration import Configuration
from titus_py.configuration.address import Bindable, IPAddress, UnixAddress, canonical_ip
from titus_py.configuration.socket_access import SocketAccess
from titus_py.parent.dialer import reset_at_close
from titus_py.parent.keepalive import keep_alive
from titus_py.supervisor import socket_files

__all__ = ["CannotListen", "Listeners", "Wishes", "listen", "passed_listeners"]

_BACKLOG = 4096
#: ip(7), ipv6(7). Python does not know the second one.
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75


class CannotListen(Exception):
    """An address that cannot be listened on: which, and why."""


class Wishes(NamedTuple):
    """How a configuration wants its sockets.

    ``keepalive``: after so many seconds of silence, the peer of an accepted connection is asked
    whether it is still there; 0: never. ``transparent`` are the addresses to which connections
    come that were made to other machines' addresses. ``access``: who may connect to unix sockets.
    """

    keepalive: float = 0.0
    transparent: Collection[IPAddress] = ()
    access: Mapping[Bindable, SocketAccess] = {}

    @classmethod
    def of(cls, configuration: Configuration) -> "Wishes":
        return cls(
            configuration.limits.keepalive,
            configuration.transparent_addresses,
            configuration.socket_access,
        )


class Listeners:
    """The listening sockets, by address.

    ``passed`` are those from the service manager. They are closed only to stop, so that a later
    configuration can use them again. ``open`` are those that a configuration wants. ``files`` are
    those of unix sockets that were made here.
    """

    def __init__(
        self,
        passed: dict[Bindable, socket.socket],
        wanted: dict[Bindable, socket.socket],
        files: dict[Bindable, File],
    ) -> None:
        self.passed = passed
        self.open = wanted
        self.files = files

    def add(self, addresses: Iterable[Bindable], wishes: Wishes) -> dict[Bindable, socket.socket]:
        """Listen on the new addresses (``listen``); returns their sockets, not yet in ``open``.

        Raises CannotListen; then none of them is kept.
        """
        new = [address for address in addresses if address not in self.open]
        sockets, files = listen(new, wishes, self.passed, self.open)
        self.files |= files
        return sockets

    def settle(self, addresses: Sequence[Bindable], wishes: Wishes) -> Iterator[str]:
        """Have the open sockets as the configuration that serves wants them.

        Yields what is wrong with the file of one of them.
        """
        for address, listener in self.wanted(addresses).items():
            if isinstance(address, IPAddress):
                keep_alive(listener, wishes.keepalive)
                _set_transparent(listener, address, wishes.transparent)
                continue
            # Also one that was passed, or that the previous program has made.
            refuse_descriptors(listener)
            if address in self.files:
                try:
                    socket_files.update(address, self.files[address], wishes.access[address])
                except (FileNotFoundError, FileExistsError):
                    yield f"{address}: its file is gone: restart titus-py"
                except OSError as error:
                    yield f"{address}: {error.strerror}"

    def wanted(self, addresses: Sequence[Bindable]) -> dict[Bindable, socket.socket]:
        """The open sockets on these addresses.

        A socket on a part of a wider address is included: to close it would reset the clients in
        its queue.
        """
        return {
            address: listener
            for address, listener in self.open.items()
            if any(wanted.covers(address) for wanted in addresses)
        }

    def unheard(self, addresses: Sequence[Bindable]) -> list[Bindable]:
        """The passed sockets' addresses that nobody accepts from: clients would wait for ever."""
        return [address for address in self.passed if address not in addresses]

    def keep(self, addresses: Sequence[Bindable]) -> None:
        """Close the sockets that are on none of these addresses."""
        wanted = self.wanted(addresses)
        self.close({key: value for key, value in self.open.items() if key not in wanted})

    def close(self, listeners: Mapping[Bindable, socket.socket]) -> None:
        for address, listener in listeners.items():
            if address not in self.passed:
                _close(address, listener)
            self._remove_file(address)
            self.open.pop(address, None)

    def close_all(self) -> None:
        """Close all open sockets, to stop: those from the service manager too."""
        for address, listener in self.open.items():
            _close(address, listener)
            self._remove_file(address)
        self.open.clear()

    def _remove_file(self, address: Bindable) -> None:
        file = self.files.pop(address, None)
        if file is not None and isinstance(address, UnixAddress):
            socket_files.remove(address, file)


def _close(address: Bindable, listener: socket.socket) -> None:
    if isinstance(address, IPAddress):
        listener.close()
        return
    # Unless a parent has it still, its clients in the queue end with it.
    with without_waiting():
        listener.close()


def listen(
    addresses: Iterable[Bindable],
    wishes: Wishes,
    passed: Mapping[Bindable, socket.socket],
    own: Mapping[Bindable, socket.socket] | None = None,
) -> tuple[dict[Bindable, socket.socket], dict[Bindable, File]]:
    """A listening socket for each address: one that was passed to us, or else a new one.

    ``own`` are the sockets that listen already, perhaps on wider or narrower addresses. Beside one
    that was passed, none is made: the next start could not do that. Returns the files that were
    made for unix sockets, too.
    Raises CannotListen; then none of the new sockets is kept.
    """
    for address, access in wishes.access.items():
        if address in passed and access.is_set:
            raise CannotListen(
                f"cannot listen on {address}: systemd's titus-py.socket has made it: set "
                "SocketMode=, SocketUser= and SocketGroup= there, and leave socket_mode, "
                "socket_user and socket_group out here"
            )
    found = Listeners(dict(passed), {}, {})
    made_here = {address: one for address, one in (own or {}).items() if address not in passed}
    for address in addresses:
        try:
            if isinstance(address, IPAddress):
                found.open[address] = passed.get(address) or _bind(address, wishes, made_here)
                _set_transparent(found.open[address], address, wishes.transparent)
                _prepare(found.open[address], wishes.keepalive)
            elif address in passed:
                found.open[address] = passed[address]
            else:
                access = wishes.access[address]
                made = socket_files.listen_at(address, access, _BACKLOG)
                found.open[address], found.files[address] = made
        except OSError as error:
            found.close(dict(found.open))
            reason = f"{error.strerror}" + _why(error, address, passed)
            raise CannotListen(f"cannot listen on {address}: {reason}") from None
    return found.open, found.files


def _why(error: OSError, address: Bindable, passed: Iterable[Bindable]) -> str:
    """The cause of the error, as the end of its message; "" if it is not known."""
    if error.errno == errno.EADDRINUSE:
        for other in passed:
            if other.covers(address) or address.covers(other):
                return (
                    f" by systemd's titus-py.socket, which listens on {other}: write the "
                    "same address in that unit (ListenStream=) and in [[listen]]"
                )
    if isinstance(address, UnixAddress):
        return _why_not_at(error)
    if error.errno == errno.EADDRINUSE:
        return ": 'ss -ltnp' shows by whom"
    if error.errno == errno.EADDRNOTAVAIL:
        return ": no interface of this machine has it"
    if error.errno == errno.EPERM:
        return ": [[listen]] transparent takes CAP_NET_RAW"
    if error.errno == errno.EACCES:
        return ": ports below net.ipv4.ip_unprivileged_port_start take CAP_NET_BIND_SERVICE"
    return ""


def _why_not_at(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return (
            ": its directory has to be there: make it, or name it in the unit (RuntimeDirectory=)"
        )
    if error.errno == errno.EROFS:
        return ": name its directory in the unit (ReadWritePaths=), or set a path in /run/titus-py"
    if error.errno == errno.EPERM:
        return ": socket_user takes CAP_CHOWN"
    return ""


def passed_listeners(
    passed: Mapping[str, Iterable[socket.socket]],
) -> dict[Bindable, socket.socket]:
    """The TCP and unix stream sockets that the service manager passed, by their addresses."""
    found: dict[Bindable, socket.socket] = {}
    for one in (one for sockets in passed.values() for one in sockets):
        name = one.getsockname()
        if one.family in (socket.AF_INET, socket.AF_INET6):
            found[IPAddress(canonical_ip(name[0]), name[1])] = one
        elif one.family == socket.AF_UNIX and one.type == socket.SOCK_STREAM:
            # Python has an abstract name, which is no path, as bytes.
            found |= {UnixAddress(name): one} if isinstance(name, str) and name else {}
    return found


@contextmanager
def _sharing(listeners: list[socket.socket]) -> Iterator[None]:
    """Meanwhile, let another socket that wants to share their port bind to it (socket(7)).

    The kernel remembers this for the port, and lets only our user, root, share it.
    """
    for listener in listeners:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        yield
    finally:
        for listener in listeners:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)


def _set_transparent(
    listener: socket.socket, address: IPAddress, transparent: Iterable[IPAddress]
) -> None:
    """Let it accept connections that were made to other machines' addresses (TPROXY), or not.

    ``address`` may be a part of an address among ``transparent``. Raises OSError.
    """
    wanted = any(one.covers(address) for one in transparent)
    level, option = socket.IPPROTO_IP, _IP_TRANSPARENT
    if listener.family == socket.AF_INET6:
        level, option = socket.IPPROTO_IPV6, _IPV6_TRANSPARENT
    if bool(listener.getsockopt(level, option)) != wanted:
        listener.setsockopt(level, option, wanted)


def _bind(
    address: IPAddress,
    wishes: Wishes,
    own: Mapping[Bindable, socket.socket],
) -> socket.socket:
    try:
        listener = socket.socket(address.family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT or address.host != "::":
            raise
        # On a kernel without IPv6, "every address" is every IPv4 address.
        return _bind(IPAddress("0.0.0.0", address.port), wishes, own)
    overlapping = [
        listening
        for other, listening in own.items()
        if other.covers(address) or address.covers(other)
    ]
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            # "::" is every address of both families. Any other address is only itself.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host != "::")
        # Before it is bound: the address may be another machine's.
        _set_transparent(listener, address, wishes.transparent)
        with _sharing([listener, *overlapping] if overlapping else []):
            listener.bind(address.sockaddr())
            listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _prepare(listener: socket.socket, keepalive: float) -> None:
    """Set the options that accepted connections inherit."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(listener, keepalive)
    reset_at_close(listener)
