"""Types for ``tables``: how a single value may be written, and what it becomes."""
# ruff: noqa: TRY004 -- pydantic makes a mistake of a ValueError, and lets a TypeError through

import pwd
import re
from ipaddress import ip_interface, ip_network
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator, ValidationInfo

from keyd.accounts import user_of
from titus_py.between.messages import MAX_PROTOCOLS
from titus_py.configuration.address import (
    Address,
    Bindable,
    IPAddress,
    UnixAddress,
    canonical_ip,
    host_name,
    parse_backend,
    parse_listen,
    unix_address,
)
from titus_py.configuration.mistake import described, nearest, text_of
from titus_py.configuration.paths import directory_of
from titus_py.configuration.uids import DEFAULT_KEYD_UID

__all__ = [
    "ANY_ON_UNIX",
    "BackendAddresses",
    "BackendsByProtocol",
    "Balancers",
    "Boolean",
    "CheckText",
    "CipherList",
    "Ciphersuites",
    "Duration",
    "Groups",
    "Integer",
    "Keepalive",
    "KeydUser",
    "ListenAddress",
    "LocalAddress",
    "Patterns",
    "Protocols",
    "ServerNames",
    "TokenUser",
    "UidRange",
    "UpstreamUser",
    "User",
    "Version",
    "default_keyd_user",
]

#: Whoever may connect to a unix socket: its mode says who that is.
ANY_ON_UNIX = "unix"

_DAY = 86_400.0
_MAX_KEEPALIVE = 32_400.0
#: uid_t is 32 bits wide, and its last value means "leave as it is" to setresuid.
_MAX_UID = 2**32 - 2
_MAX_BACKENDS = 64
_MAX_CHECK_OCTETS = 1024
_TLS13_SUITES = (
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_128_CCM_SHA256",
    "TLS_AES_128_CCM_8_SHA256",
)
#: The groups whose TLS 1.2 parameters keyd signs, and those that only TLS 1.3 has. Each with its
#: other names.
_GROUPS = {
    "X25519MLKEM768": (),
    "SecP256r1MLKEM768": (),
    "SecP384r1MLKEM1024": (),
    "MLKEM512": (),
    "MLKEM768": (),
    "MLKEM1024": (),
    "X25519": (),
    "X448": (),
    "P-256": ("secp256r1", "prime256v1"),
    "P-384": ("secp384r1",),
    "P-521": ("secp521r1",),
}
#: RFC 7301 §3.1.
_MAX_PROTOCOL_OCTETS = 255
_ACME = "acme-tls/1"
_GROUP_OF = {name.lower(): group for group, names in _GROUPS.items() for name in (group, *names)}


class User(NamedTuple):
    """A user of the system, or a uid that has no name."""

    name: str
    uid: int
    gid: int


class BackendsByProtocol(dict[str, tuple[Address, ...]]):
    """Not changed once it is made, and so with a hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def _duration(value: object) -> float:
    expected = 'expected a duration such as "10s", "500ms", "2m" or "1h"'
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{expected}, not {described(value)}")
    if isinstance(value, str):
        parts = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)?", value)
        if parts is None:
            raise ValueError(f"{expected}, not {described(value)}")
        unit = {"ms": 0.001, "m": 60.0, "h": 3600.0}.get(parts[2], 1.0)
        value = float(parts[1]) * unit
    if not 0.001 <= value <= _DAY:  # also false of a NaN
        raise ValueError("expected a duration from 1ms to 24h")
    return float(value)


def _keepalive(value: object) -> float:
    if value in ("off", "0") or (value == 0 and not isinstance(value, bool)):
        return 0.0
    seconds = _duration(value)
    # What TCP_KEEPIDLE takes, in whole seconds.
    if not 1 <= seconds <= _MAX_KEEPALIVE:
        raise ValueError('expected "off", or a duration from 1s to 9h')
    return seconds


def _keepalive_text(seconds: float) -> str:
    return _duration_text(seconds) if seconds else "off"


def _duration_text(seconds: float) -> str:
    return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"


def _uids(value: object) -> range:
    parts = re.fullmatch(r"([0-9]{1,10})-([0-9]{1,10})", text_of(value))
    if parts is None:
        raise ValueError(
            f'expected a range of uids such as "2100000000-2100065535", not {described(value)}'
        )
    first, last = int(parts[1]), int(parts[2])
    if first == 0:
        raise ValueError("uid 0 is root, which no worker may be")
    if not first <= last <= _MAX_UID:
        raise ValueError(
            f"expected the lower uid first and none above {_MAX_UID}, not {described(value)}"
        )
    return range(first, last + 1)


def _user(value: object) -> User:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"expected a user's name or number, not {described(value)}")
    if isinstance(value, int) or re.fullmatch(r"[0-9]{1,10}", value):
        user = _user_of_uid(int(value))
    else:
        user = _user_of_name(value)
    if user.uid == 0:
        raise ValueError("keyd cannot be root: give it a user of its own")
    return user


def _token_user(value: object) -> User:
    if value in (0, "0", "root"):
        raise ValueError("a token's module cannot be root: give it a user of its own")
    return _user(value)


def _upstream_user(value: object) -> User:
    if value in (0, "0", "root"):
        raise ValueError("what connects to upstreams cannot be root: give it a user of its own")
    return _user(value)


def _user_of_uid(uid: int) -> User:
    if not 0 <= uid <= _MAX_UID:
        raise ValueError(f"expected a uid from 1 to {_MAX_UID}")
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:  # Nothing else runs as a uid without a name: as good as a user of its own.
        return User(str(uid), uid, uid)
    return User(entry.pw_name, uid, entry.pw_gid)


def _user_of_name(name: str) -> User:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}", name):
        raise ValueError(f"{described(name)} is no user name")
    try:
        entry = user_of(name)
    except LookupError as error:
        raise ValueError(str(error)) from None
    return User(name, entry.pw_uid, entry.pw_gid)


def default_keyd_user() -> User:
    return _user(DEFAULT_KEYD_UID)


def _listen_address(value: object, info: ValidationInfo) -> Bindable:
    if isinstance(value, list):
        raise ValueError("expected one address, not an array: each has a table of its own")
    address = parse_listen(text_of(value))
    if isinstance(address, UnixAddress):
        return unix_address(str(directory_of(info) / address.path))
    return address


def _backend_address(value: object, info: ValidationInfo) -> Address:
    address = parse_backend(text_of(value))
    if isinstance(address, UnixAddress):
        return unix_address(str(directory_of(info) / address.path))
    return address


def _backend_addresses(value: object, info: ValidationInfo) -> tuple[Address, ...]:
    if isinstance(value, str):
        return (_backend_address(value, info),)
    if not isinstance(value, list | tuple):
        raise ValueError(
            "expected an address such as 127.0.0.1:8080, or a list of addresses such as "
            f'["10.0.0.5:8080", "10.0.0.6:8080"], not {described(value)}'
        )
    if not 1 <= len(value) <= _MAX_BACKENDS:
        raise ValueError(f"{len(value)} addresses: expected 1 to {_MAX_BACKENDS}")
    addresses = tuple(_backend_address(one, info) for one in value)
    for address in addresses:
        if addresses.count(address) > 1:
            raise ValueError(f"{address} is in the list more than once")
    return addresses


def _backends_as_written(addresses: tuple[Address, ...]) -> str | list[str]:
    one, *others = map(str, addresses)
    return [one, *others] if others else one


def _check_text(value: object) -> str:
    octets = len(text_of(value).encode())
    if not 1 <= octets <= _MAX_CHECK_OCTETS:
        raise ValueError(f"{octets} octets: expected 1 to {_MAX_CHECK_OCTETS}")
    return text_of(value)


def _local_address(value: object) -> str:
    host = canonical_ip(text_of(value))
    if IPAddress(host, 1).is_wildcard:
        raise ValueError(f"{host} is every address: leave local_address out to mean that")
    return host


def _balancers(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(
            f'expected a list of networks, such as ["10.0.0.0/8"], not {described(value)}'
        )
    if not value:
        raise ValueError("an empty list lets nobody connect: leave it out if clients do themselves")
    return tuple(dict.fromkeys(_balancer(text_of(one)) for one in value))


def _balancer(text: str) -> str:
    """A network as ``ip_network`` writes it; of IPv4-mapped networks, the IPv4 network."""
    if text == ANY_ON_UNIX:
        return text
    try:
        interface = ip_interface(text)
    except ValueError:
        raise ValueError(
            f'expected an address or a network such as "10.0.0.0/8", not {described(text)}'
        ) from None
    network = interface.network
    if network.network_address != interface.ip:
        raise ValueError(
            f"{text} is an address within a network: write {network}, or {interface.ip} alone"
        )
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is not None and network.prefixlen >= 96:
        network = ip_network((mapped, network.prefixlen - 96))
    if not network.prefixlen:
        raise ValueError(
            f"{text} is everybody, and any client could say that it is another: name the load "
            "balancers"
        )
    return str(network)


def _server_names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(
            f'expected a list of names, such as ["www.example.org"], not {described(value)}'
        )
    if not value:
        raise ValueError("an empty list matches nothing: leave sni out to take any name")
    return tuple(_server_name_pattern(text_of(name)) for name in value)


def _server_name_pattern(text: str) -> str:
    if text == "":
        return text
    if text == "*":
        raise ValueError('"*" is no name: leave sni out to take any name')
    star = "*." if text.startswith("*.") else ""
    if "*" in text.removeprefix(star):
        raise ValueError(
            f"{described(text)}: a wildcard stands for one whole label at the front, "
            'as in "*.example.org"'
        )
    return star + host_name(text.removeprefix(star)).removesuffix(".")


def _protocols(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(
            f'expected a list of protocols, such as ["h2", "http/1.1"], not {described(value)}'
        )
    if not value:
        raise ValueError("an empty list leaves no protocol: leave alpn out to negotiate none")
    if len(value) > MAX_PROTOCOLS:
        raise ValueError(f"{len(value)} protocols: expected {MAX_PROTOCOLS} at most")
    names = tuple(_protocol(text_of(name)) for name in value)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{described(name)} is in the list more than once")
    return names


def _protocol(name: str) -> str:
    if not name:
        raise ValueError("a protocol's name has at least one octet")
    if not (name.isascii() and name.isprintable()):
        raise ValueError(f"{described(name)} has a character that is not printable ASCII")
    if len(name) > _MAX_PROTOCOL_OCTETS:
        reason = f"{described(name)} has {len(name)} octets: {_MAX_PROTOCOL_OCTETS} at most"
        raise ValueError(reason)
    if name == _ACME:
        raise ValueError(
            f"{described(name)} is for a certificate authority's challenge (RFC 8737), which takes "
            "a certificate made for it: the program that asks for certificates answers it"
        )
    return name


def _patterns(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(
            f'expected a list of files, such as ["conf.d/*.toml"], not {described(value)}'
        )
    for pattern in value:
        if not text_of(pattern) or "\0" in pattern:
            raise ValueError(f"expected a file or a pattern, not {described(pattern)}")
    return tuple(value)


def _cipher_list(text: str) -> str:
    if not re.fullmatch(r"[!-~]+(?: [!-~]+)*", text):
        raise ValueError("expected an OpenSSL cipher list, such as ECDHE+AESGCM:ECDHE+CHACHA20")
    return text


def _ciphersuites(text: str) -> str:
    for suite in text.split(":"):
        if suite not in _TLS13_SUITES:
            meant = nearest(suite.upper(), _TLS13_SUITES)
            raise ValueError(
                f"{described(suite)} is no TLS 1.3 suite"
                + (f": did you mean {meant}?" if meant else f" ({', '.join(_TLS13_SUITES)})")
            )
    return text


def _groups(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(
            f'expected a list of groups, such as ["X25519", "P-256"], not {described(value)}'
        )
    if not value:
        raise ValueError("an empty list leaves no handshake: leave groups out for the default")
    return tuple(dict.fromkeys(_group(text_of(name)) for name in value))


def _group(name: str) -> str:
    group = _GROUP_OF.get(name.lower())
    if group is None:
        meant = nearest(name.lower(), _GROUP_OF)
        raise ValueError(
            f"{described(name)} is no group that is served"
            + (f": did you mean {_GROUP_OF[meant]}?" if meant else f" ({', '.join(_GROUPS)})")
        )
    return group


#: Without it, pydantic warns of each list that it makes of a tuple.
_AsList = PlainSerializer(list, when_used="json")

Integer = Annotated[int, Field(strict=True)]
Boolean = Annotated[bool, Field(strict=True)]
Duration = Annotated[float, PlainValidator(_duration), PlainSerializer(_duration_text)]
Keepalive = Annotated[float, PlainValidator(_keepalive), PlainSerializer(_keepalive_text)]
Version = Literal["TLSv1.2", "TLSv1.3"]
UidRange = Annotated[
    range, PlainValidator(_uids), PlainSerializer(lambda uids: f"{uids[0]}-{uids[-1]}")
]
KeydUser = Annotated[User, PlainValidator(_user), PlainSerializer(lambda user: user.name)]
TokenUser = Annotated[User, PlainValidator(_token_user), PlainSerializer(lambda user: user.name)]
UpstreamUser = Annotated[
    User, PlainValidator(_upstream_user), PlainSerializer(lambda user: user.name)
]
ListenAddress = Annotated[Bindable, PlainValidator(_listen_address), PlainSerializer(str)]
BackendAddresses = Annotated[
    tuple[Address, ...], PlainValidator(_backend_addresses), PlainSerializer(_backends_as_written)
]
Protocols = Annotated[tuple[str, ...], PlainValidator(_protocols), _AsList]
LocalAddress = Annotated[str, PlainValidator(_local_address)]
ServerNames = Annotated[tuple[str, ...], PlainValidator(_server_names), _AsList]
CheckText = Annotated[str, PlainValidator(_check_text)]
Balancers = Annotated[tuple[str, ...], PlainValidator(_balancers), _AsList]
Patterns = Annotated[tuple[str, ...], PlainValidator(_patterns), PlainSerializer(list)]
CipherList = Annotated[str, PlainValidator(text_of), AfterValidator(_cipher_list)]
Ciphersuites = Annotated[str, PlainValidator(text_of), AfterValidator(_ciphersuites)]
Groups = Annotated[tuple[str, ...], PlainValidator(_groups), _AsList]
