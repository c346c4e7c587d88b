"""Addresses as the operator writes them (ADDR on the command line and in the file).

Imported by the supervisor (root) and the command-line tools. Text in, values out: nothing here
resolves, binds or connects.
"""

import errno
import os
import re
import socket
from typing import NamedTuple

__all__ = [
    "Address",
    "Bindable",
    "IPAddress",
    "NameAddress",
    "UnixAddress",
    "canonical_ip",
    "host_name",
    "parse_backend",
    "parse_listen",
    "unix_address",
]

_LISTEN_FORMS = "127.0.0.1:8443, [::1]:8443, :8443 (every address) or unix:/run/app.sock"
_BACKEND_FORMS = "127.0.0.1:8080, [::1]:8080, name:8080 or unix:/run/app.sock"
#: Linux's sun_path holds 108 octets, the last of them NUL.
_UNIX_PATH_OCTETS = 107

_HOST_PORT = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*):(?P<port>[^:]*)", re.DOTALL)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PORT = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
_IP_CHARACTERS = re.compile(r"[0-9A-Fa-f:.]+")
_INTERFACE = re.compile(r"(?![0-9]+\Z)[!-~]{1,15}")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LABEL_SEPARATORS = re.compile("[.\u3002\uff0e\uff61]")  # RFC 3490 §3.1


class IPAddress(NamedTuple):
    """A numeric address and a TCP port.

    ``host`` is as ``canonical_ip`` gives it. ``::`` means every address of both
    families (a dual-stack socket), ``0.0.0.0`` every IPv4 address.
    """

    host: str
    port: int

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def is_wildcard(self) -> bool:
        return self.host in ("::", "0.0.0.0")

    @property
    def is_loopback(self) -> bool:
        return self.host == "::1" or self.host.startswith("127.")

    def covers(self, other: "Bindable") -> bool:
        """Whether a socket bound here receives everything that ``other`` would."""
        if isinstance(other, UnixAddress) or self.port != other.port:
            return False
        if self.host == "0.0.0.0":
            return other.family == socket.AF_INET
        return self.host in ("::", other.host)

    def sockaddr(self) -> tuple[str, int] | tuple[str, int, int, int]:
        """What ``bind`` and ``connect`` take.

        Raises OSError where a link-local address names an interface that is not there.
        """
        if self.family == socket.AF_INET:
            return self.host, self.port
        host, _, interface = self.host.partition("%")
        try:
            index = socket.if_nametoindex(interface) if interface else 0
        except OSError:
            # Python's own has neither a number nor the name.
            raise OSError(errno.ENODEV, f"no interface is named {interface!r}") from None
        return host, self.port, 0, index

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class NameAddress(NamedTuple):
    """A host name, yet to be resolved, and a TCP port."""

    name: str
    port: int

    def __str__(self) -> str:
        return f"{self.name}:{self.port}"


class UnixAddress(NamedTuple):
    """A unix stream socket in the file system."""

    path: str

    def covers(self, other: "Bindable") -> bool:
        """Whether it is the same: a unix socket has one path."""
        return self == other

    def leads_to(self, other: "UnixAddress") -> bool:
        """Whether connecting here is connecting there, as the paths are now: by links, too."""
        return self == other or os.path.realpath(self.path) == os.path.realpath(other.path)

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = IPAddress | NameAddress | UnixAddress
#: What bind(2) takes.
Bindable = IPAddress | UnixAddress


def parse_listen(text: str) -> Bindable:
    """An address to listen on. Raises ValueError, saying what was expected."""
    if text.startswith("*:"):
        raise ValueError(f"{text!r} is written without the star: expected {_LISTEN_FORMS}")
    match _parse(text, _LISTEN_FORMS):
        case NameAddress(name):
            # A name can have several addresses, and they can change while we run.
            raise ValueError(
                f"{name!r} is a name, and a listening address is numeric: expected {_LISTEN_FORMS}"
            )
        case address:
            return address


def parse_backend(text: str) -> Address:
    """An address to connect to. Raises ValueError, saying what was expected."""
    address = _parse(text, _BACKEND_FORMS)
    if isinstance(address, IPAddress) and address.is_wildcard:
        raise ValueError(
            f"{text!r} means every address, and a backend is one: expected {_BACKEND_FORMS}"
        )
    return address


def unix_address(path: str) -> UnixAddress:
    """The unix socket at this path. Raises ValueError where no socket can be there."""
    if not path:
        raise ValueError("expected a path after unix:, such as unix:/run/app.sock")
    if path.startswith("@"):
        raise ValueError("abstract unix sockets are not supported: expected a path")
    if "\0" in path:
        raise ValueError("a path cannot hold a NUL character")
    octets = len(os.fsencode(path))
    if octets > _UNIX_PATH_OCTETS:
        raise ValueError(
            f"a unix socket's path of {octets} octets (at most {_UNIX_PATH_OCTETS} are possible)"
        )
    return UnixAddress(path)


def canonical_ip(text: str) -> str:
    """The one form of a numeric IP address, so that equal addresses are equal strings.

    IPv4-mapped IPv6 addresses (RFC 4291 §2.5.5.2) become the IPv4 address that they
    stand for; link-local ones keep their interface, by its name. Raises ValueError.
    """
    number, percent, interface = text.partition("%")
    family = socket.AF_INET6 if ":" in number else socket.AF_INET
    try:
        # inet_pton raises another exception for a NUL than for other bad text.
        packed = socket.inet_pton(family, number if _IP_CHARACTERS.fullmatch(number) else "")
    except OSError:
        raise ValueError(f"expected an IPv4 or IPv6 address, not {text!r}") from None
    if family == socket.AF_INET6 and packed.startswith(b"\0" * 10 + b"\xff\xff"):
        family, packed = socket.AF_INET, packed[12:]
    canonical = socket.inet_ntop(family, packed)
    link_local = packed[0] == 0xFE and packed[1] & 0xC0 == 0x80 and len(packed) == 16
    if link_local and not _INTERFACE.fullmatch(interface):
        raise ValueError(
            f"a link-local address needs the name of its interface, such as {canonical}%eth0"
        )
    if percent and not link_local:
        raise ValueError(f"{text!r} names an interface, which only link-local addresses have")
    return canonical + percent + interface


def host_name(text: str) -> str:
    """A DNS name in lower case, a trailing dot kept. Raises ValueError, also for IP addresses."""
    if not text.isascii():
        raise ValueError(f"{text!r} is not ASCII{_a_label_hint(text)}")
    name = text.lower()
    labels = name.removesuffix(".").split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(
            f"{text!r} is no host name: expected labels of letters, digits and "
            "hyphens, such as www.example.org"
        )
    # Every resolver takes a name that ends in a number for an IPv4 address.
    if _NUMERIC_LABEL.fullmatch(labels[-1]):
        raise ValueError(f"{text!r} ends in a number, so it is an IP address or a slip in one")
    return name


def _parse(text: str, forms: str) -> Address:
    if text.startswith("unix:"):
        return unix_address(text.removeprefix("unix:"))
    if url := _URL.match(text):
        raise ValueError(
            f"{text!r} is a URL, and an address is without {url[0]} and without a path: "
            f"expected {forms}"
        )
    parts = _HOST_PORT.fullmatch(text)
    if parts is None:
        if text.count(":") > 1 and "[" not in text:
            raise ValueError(f"{text!r}: an IPv6 address goes in brackets, as in [::1]:8080")
        raise ValueError(f"{text!r} is no address with a port: expected {forms}")
    host, digits = parts["host"], parts["port"]
    if not _PORT.fullmatch(digits) or (port := int(digits)) > 65535:
        raise ValueError(f"{text!r}: expected a port from 1 to 65535, not {digits!r}")
    if not host:
        return IPAddress("::", port)
    if host.startswith("["):
        if ":" not in host:
            raise ValueError(f"{text!r}: brackets are for IPv6 addresses, as in [::1]:8080")
        return IPAddress(canonical_ip(host[1:-1]), port)
    try:
        return IPAddress(canonical_ip(host), port)
    except ValueError:
        return NameAddress(host_name(host), port)


def _a_label_hint(text: str) -> str:
    """How to write an internationalized name in ASCII (RFC 5891 §4.4), if there is a way."""
    # Imported only to explain a mistake: it takes a megabyte.
    from unicodedata import normalize

    try:
        labels = [
            label
            if label.isascii()
            else "xn--" + normalize("NFC", label.lower()).encode("punycode").decode()
            for label in _LABEL_SEPARATORS.split(text)
        ]
        return f": write {host_name('.'.join(labels))!r}"
    except ValueError:
        return ": expected a host name, such as www.example.org"
