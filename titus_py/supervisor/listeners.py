"""Listening sockets: bound here, or handed over by the service manager.

Run by the supervisor, which owns them as long as it runs.
"""

import errno
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from titus_py.configuration.address import IPAddress, canonical_ip
from titus_py.parent.dialer import reset_at_close
from titus_py.parent.keepalive import keep_alive

__all__ = ["CannotListen", "Listeners", "listen", "passed_listeners", "set_transparent"]

_BACKLOG = 4096
#: ip(7), ipv6(7). Python does not know the second one.
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75


class CannotListen(Exception):
    """An address that cannot be listened on: which, and why."""


class Listeners:
    """The listening sockets, by address.

    ``passed`` are those from the service manager. They are closed only to stop, so that a later
    configuration can use them again. ``open`` are those that a configuration wants.
    """

    def __init__(
        self, passed: dict[IPAddress, socket.socket], wanted: dict[IPAddress, socket.socket]
    ) -> None:
        self.passed = passed
        self.open = wanted

    def add(
        self,
        addresses: Iterable[IPAddress],
        keepalive: float,
        transparent: Collection[IPAddress] = (),
    ) -> dict[IPAddress, socket.socket]:
        """Listen on the new addresses (``listen``); returns their sockets, not yet in ``open``.

        Raises CannotListen; then none of them is kept.
        """
        new = (address for address in addresses if address not in self.open)
        return listen(new, keepalive, self.passed, transparent, self.open)

    def wanted(self, addresses: Sequence[IPAddress]) -> dict[IPAddress, socket.socket]:
        """The open sockets on these addresses.

        A socket on a part of a wider address is included: to close it would reset the clients in
        its queue.
        """
        return {
            address: listener
            for address, listener in self.open.items()
            if any(wanted.covers(address) for wanted in addresses)
        }

    def unheard(self, addresses: Sequence[IPAddress]) -> list[IPAddress]:
        """The passed sockets' addresses that nobody accepts from: clients would wait for ever."""
        return [address for address in self.passed if address not in addresses]

    def keep(self, addresses: Sequence[IPAddress]) -> None:
        """Close the sockets that are on none of these addresses."""
        wanted = self.wanted(addresses)
        self.close({key: value for key, value in self.open.items() if key not in wanted})

    def close(self, listeners: Mapping[IPAddress, socket.socket]) -> None:
        for address, listener in listeners.items():
            if address not in self.passed:
                listener.close()
            self.open.pop(address, None)

    def close_all(self) -> None:
        """Close all open sockets, to stop: those from the service manager too."""
        for listener in self.open.values():
            listener.close()
        self.open.clear()


def listen(
    addresses: Iterable[IPAddress],
    keepalive: float,
    passed: Mapping[IPAddress, socket.socket],
    transparent: Collection[IPAddress] = (),
    own: Mapping[IPAddress, socket.socket] | None = None,
) -> dict[IPAddress, socket.socket]:
    """A listening socket for each address: one that was passed to us, or else a new one.

    ``keepalive``: after so many seconds of silence, the peer of an accepted connection is asked
    whether it is still there; 0: never. ``transparent`` are the addresses to which connections
    come that were made to other machines' addresses. ``own`` are the sockets that listen already,
    perhaps on wider or narrower addresses.
    Raises CannotListen; then none of the new sockets is kept.
    """
    listeners: dict[IPAddress, socket.socket] = {}
    for address in addresses:
        try:
            listeners[address] = passed.get(address) or _bind(address, transparent, own or {})
            set_transparent(listeners[address], address, transparent)
            _prepare(listeners[address], keepalive)
        except OSError as error:
            for bound, listener in listeners.items():
                if bound not in passed:
                    listener.close()
            reason = f"{error.strerror}" + _why(error, address, passed)
            raise CannotListen(f"cannot listen on {address}: {reason}") from None
    return listeners


def _why(error: OSError, address: IPAddress, passed: Iterable[IPAddress]) -> str:
    """The cause of the error, as the end of its message; "" if it is not known."""
    if error.errno == errno.EADDRINUSE:
        for other in passed:
            if other.covers(address) or address.covers(other):
                return (
                    f" by systemd's titus-py.socket, which listens on {other}: write the "
                    "same address in that unit (ListenStream=) and in [[listen]]"
                )
    if error.errno == errno.EPERM:
        return ": [[listen]] transparent takes CAP_NET_RAW"
    if error.errno == errno.EACCES:
        return ": ports below net.ipv4.ip_unprivileged_port_start take CAP_NET_BIND_SERVICE"
    return ""


def passed_listeners(
    passed: Mapping[str, Iterable[socket.socket]],
) -> dict[IPAddress, socket.socket]:
    """The TCP sockets among those that the service manager passed, by their addresses."""
    found = {}
    for sockets in passed.values():
        for one in sockets:
            if one.family in (socket.AF_INET, socket.AF_INET6):
                host, port = one.getsockname()[:2]
                found[IPAddress(canonical_ip(host), port)] = one
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


def set_transparent(
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
    transparent: Collection[IPAddress],
    own: Mapping[IPAddress, socket.socket],
) -> socket.socket:
    try:
        listener = socket.socket(address.family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT or address.host != "::":
            raise
        # On a kernel without IPv6, "every address" is every IPv4 address.
        return _bind(IPAddress("0.0.0.0", address.port), transparent, own)
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
        set_transparent(listener, address, transparent)
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
