"""The configuration: what it may say, and every mistake in it at once.

Imported by the supervisor (root) and the command-line tools alone: pydantic is more
than the parent and its workers should carry. It trusts the operator's intent, not the
operator's typing. It never opens a key: what is inside is for ``check`` to ask keyd.
"""
# ruff: noqa: TRY004 -- pydantic makes a mistake of a ValueError, and lets a TypeError through

import difflib
import itertools
import json
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from titus_py.address import (
    Address,
    IPAddress,
    UnixAddress,
    canonical_ip,
    host_name,
    parse_backend,
    parse_listen,
    unix_address,
)
from titus_py.virtual_host import applies_to

__all__ = [
    "Configuration",
    "Credential",
    "Keyd",
    "Listen",
    "Loaded",
    "Log",
    "Mistake",
    "Source",
    "User",
    "VirtualHost",
    "Worker",
    "from_options",
    "load",
    "printable",
]

_MAX_FILE_OCTETS = 4 * 1024 * 1024
_DAY = 86_400.0
#: uid_t is 32 bits wide, and its last value means "leave as it is" to setresuid.
_MAX_UID = 2**32 - 2
_DEFAULT_USER = "199999"
_TLS13_SUITES = (
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_128_CCM_SHA256",
    "TLS_AES_128_CCM_8_SHA256",
)


class Mistake(NamedTuple):
    """One thing that is wrong, or for warnings doubtful, and where the operator finds it.

    ``file`` is empty where the configuration came from command-line options, ``key`` where
    the mistake is about the file as a whole.
    """

    file: str
    key: str
    reason: str

    def __str__(self) -> str:
        return printable(": ".join(part for part in self if part))


def printable(text: str) -> str:
    """One line that any terminal can take, whatever a file or its name holds."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Source(NamedTuple):
    """Where a configuration came from, for naming its mistakes as the operator wrote them."""

    file: str
    directory: Path
    options: Mapping[str, str] = {}

    def mistake(self, key: str, reason: str) -> Mistake:
        return Mistake(self.file, self.name(key), reason)

    def name(self, key: str) -> str:
        return self.options.get(re.sub(r"\[\d+\]", "", key), key)


class User(NamedTuple):
    """A user of the system, or a uid that has no name."""

    name: str
    uid: int
    gid: int


class Credential(NamedTuple):
    """The files of one certificate and its key: absolute paths."""

    certificate: Path
    #: None where a keyd that is not started by titus-py has it.
    key: Path | None
    passphrase_file: Path | None


# --- What a value may look like ------------------------------------------------------------


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a string, not {_described(value)}")
    return value


def _duration(value: object) -> float:
    expected = 'expected a duration such as "10s", "500ms", "2m" or "1h"'
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{expected}, not {_described(value)}")
    if isinstance(value, str):
        parts = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)?", value)
        if parts is None:
            raise ValueError(f"{expected}, not {_described(value)}")
        unit = {"ms": 0.001, "m": 60.0, "h": 3600.0}.get(parts[2], 1.0)
        value = float(parts[1]) * unit
    if not 0.001 <= value <= _DAY:  # also false of a NaN
        raise ValueError("expected a duration from 1ms to 24h")
    return float(value)


def _duration_text(seconds: float) -> str:
    return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"


def _uids(value: object) -> range:
    parts = re.fullmatch(r"([0-9]{1,10})-([0-9]{1,10})", _text(value))
    if parts is None:
        raise ValueError(
            f'expected a range of uids such as "200000-265535", not {_described(value)}'
        )
    first, last = int(parts[1]), int(parts[2])
    if first == 0:
        raise ValueError("uid 0 is root, which no worker may be")
    if not first <= last <= _MAX_UID:
        raise ValueError(
            f"expected the lower uid first and none above {_MAX_UID}, not {_described(value)}"
        )
    return range(first, last + 1)


def _user(value: object) -> User:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"expected a user's name or number, not {_described(value)}")
    if isinstance(value, int) or re.fullmatch(r"[0-9]{1,10}", value):
        user = _user_of_uid(int(value))
    else:
        user = _user_of_name(value)
    if user.uid == 0:
        raise ValueError("keyd cannot be root: give it a user of its own")
    return user


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
        raise ValueError(f"{_described(name)} is no user name")
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ValueError(
            f'no user is named "{name}": create it with '
            f"'useradd --system --no-create-home --shell /usr/sbin/nologin {name}'"
        ) from None
    return User(name, entry.pw_uid, entry.pw_gid)


def _directory(info: ValidationInfo) -> Path:
    return info.context.directory if isinstance(info.context, Source) else Path.cwd()


def _path(value: object, info: ValidationInfo) -> Path:
    """A path, relative to the file's directory, or ``credential:`` and a credential's name."""
    text = _text(value)
    if text.startswith("credential:"):
        return _credential_path(text.removeprefix("credential:"))
    if not text or "\0" in text:
        raise ValueError(f"expected a path, not {_described(value)}")
    return _directory(info) / text


def _credential_path(name: str) -> Path:
    """Where systemd has put a credential (systemd.exec(5), LoadCredential=)."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory is None:
        raise ValueError(
            f"systemd passed no credentials, so there is none named {name!r}: see LoadCredential="
        )
    if not re.fullmatch(r"[A-Za-z0-9_.@:-]{1,255}", name) or name in (".", ".."):
        raise ValueError(f"{_described(name)} is no credential's name")
    return Path(directory, name)


def _readable_file(path: Path) -> Path:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{path}: {_os_reason(error)}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: {'is a directory' if stat.S_ISDIR(mode) else 'is no file'}")
    if not os.access(path, os.R_OK, effective_ids=True):
        raise ValueError(f"{path}: permission denied")
    return path


def _empty_directory(value: object) -> Path:
    path = value if isinstance(value, Path) else Path(_text(value))
    if not path.is_absolute() or "\0" in str(path):
        raise ValueError("expected an absolute path")
    try:
        status = path.stat()
        entries = os.listdir(path)
    except FileNotFoundError:  # The supervisor makes it.
        return path
    except OSError as error:
        raise ValueError(f"{path}: {_os_reason(error)}") from None
    if entries:
        raise ValueError(f"{path}: is not empty, and a worker must find nothing there")
    if status.st_uid != 0 or status.st_mode & 0o022:
        raise ValueError(f"{path}: others than root can write to it: chown root, chmod 755")
    return path


def _listen_address(value: object) -> IPAddress:
    return parse_listen(_text(value))


def _metrics_address(value: object, info: ValidationInfo) -> IPAddress | UnixAddress:
    text = _text(value)
    if text.startswith("unix:"):
        return unix_address(str(_directory(info) / text.removeprefix("unix:")))
    return parse_listen(text)


def _backend_address(value: object, info: ValidationInfo) -> Address:
    address = parse_backend(_text(value))
    if isinstance(address, UnixAddress):
        return unix_address(str(_directory(info) / address.path))
    return address


def _local_address(value: object) -> str:
    host = canonical_ip(_text(value))
    if IPAddress(host, 1).is_wildcard:
        raise ValueError(f"{host} is every address: leave local_address out to mean that")
    return host


def _server_names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(
            f'expected a list of names, such as ["www.example.org"], not {_described(value)}'
        )
    if not value:
        raise ValueError("an empty list matches nothing: leave sni out to take any name")
    return tuple(_server_name_pattern(_text(name)) for name in value)


def _server_name_pattern(text: str) -> str:
    if text == "":
        return text
    if text == "*":
        raise ValueError('"*" is no name: leave sni out to take any name')
    star = "*." if text.startswith("*.") else ""
    if "*" in text.removeprefix(star):
        raise ValueError(
            f"{_described(text)}: a wildcard stands for one whole label at the front, "
            'as in "*.example.org"'
        )
    return star + host_name(text.removeprefix(star)).removesuffix(".")


def _cipher_list(text: str) -> str:
    if not re.fullmatch(r"[!-~]+(?: [!-~]+)*", text):
        raise ValueError("expected an OpenSSL cipher list, such as ECDHE+AESGCM:ECDHE+CHACHA20")
    return text


def _ciphersuites(text: str) -> str:
    for suite in text.split(":"):
        if suite not in _TLS13_SUITES:
            nearest = _nearest(suite.upper(), _TLS13_SUITES)
            raise ValueError(
                f"{_described(suite)} is no TLS 1.3 suite"
                + (f": did you mean {nearest}?" if nearest else f" ({', '.join(_TLS13_SUITES)})")
            )
    return text


_Text = Annotated[str, PlainValidator(_text)]
_Integer = Annotated[int, Field(strict=True)]
_Boolean = Annotated[bool, Field(strict=True)]
_Duration = Annotated[float, PlainValidator(_duration), PlainSerializer(_duration_text)]
_File = Annotated[Path, PlainValidator(_path), AfterValidator(_readable_file)]
_Version = Literal["TLSv1.2", "TLSv1.3"]


# --- The tables -----------------------------------------------------------------------------


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Uids(_Table):
    """The part of [worker] that is checked as a whole."""

    max: _Integer = Field(
        default=1000, ge=1, le=1_000_000, description="How many connections may live at once."
    )
    spare: _Integer = Field(
        default=16,
        ge=1,
        le=10_000,
        description="How many workers wait, confined, for a client to come: at most, and at least "
        "half as many.",
    )
    uids: Annotated[
        range, PlainValidator(_uids), PlainSerializer(lambda uids: f"{uids[0]}-{uids[-1]}")
    ] = Field(
        default=range(200_000, 265_536),
        description="The uids of workers, first to last: one per live connection, never shared. "
        "At least max + spare, and used by nothing else on the system.",
    )


class Worker(_Uids):
    """[worker]: the processes that each serve one connection."""

    handshake_timeout: _Duration = Field(
        default=10.0,
        description="How long a client may take from connecting to the handshake's end.",
    )
    connect_timeout: _Duration = Field(
        default=5.0,
        description="How long connecting to the backend may take, all its addresses together.",
    )
    drain: _Duration = Field(
        default=30.0, description="How long connections may go on when titus-py is told to stop."
    )
    require: tuple[Literal["landlock", "speculation"], ...] = Field(
        default=(),
        description="Features that not every kernel has, and without which not to serve: "
        '"landlock", "speculation" (turning indirect-branch and store-bypass speculation off).',
    )
    chroot: Annotated[Path, PlainValidator(_empty_directory)] = Field(
        default=Path("/run/titus-py/empty"),
        validate_default=True,
        description="The empty directory, root's own, that is all a worker sees of the file "
        "system. Made if it does not exist.",
    )


class Limits(_Table):
    """[limits]: how much of the proxy a client may have. Each that was hit is counted."""

    connections_per_address: Annotated[_Integer, Field(ge=1)] | None = Field(
        default=None, description="How many connections one client address may have. Absent: any."
    )
    connections_per_prefix: Annotated[_Integer, Field(ge=1)] | None = Field(
        default=None,
        description="How many connections one IPv6 /64, or IPv4 /24, may have. Absent: any.",
    )
    connections_per_second: Annotated[_Integer, Field(ge=1)] | None = Field(
        default=None,
        description="How many new connections are taken in a second; the others are reset. "
        "Absent: any.",
    )
    handshakes: Annotated[_Integer, Field(ge=1)] | None = Field(
        default=None,
        description="How many connections may wait for a worker or be within their handshake at "
        "once. With one more, who has waited longest is reset; and with so many within their "
        "handshake, a newcomer's worker takes the place of the slowest one. As many as "
        "worker.spare may wait in any case. Absent: half of worker.max, but at least 64.",
    )
    idle_timeout: _Duration | None = Field(
        default=3600.0,
        description="How long a connection may stand still, in both directions.",
    )
    lifetime: _Duration | None = Field(
        default=None, description="How long a connection may last altogether. Absent: as it likes."
    )


class _KeydSocket(_Table):
    """The part of [keyd] that the virtual hosts' keys depend on."""

    socket: Annotated[Path, PlainValidator(_path)] | None = Field(
        default=None,
        description="The control socket of a keyd that is a service of its own and has the keys "
        "(keyd control). Absent: titus-py starts a keyd itself, and no [[vhost]] goes without "
        "a key.",
    )


class Keyd(_KeydSocket):
    """[keyd]: the process that holds the private keys."""

    user: Annotated[User, PlainValidator(_user), PlainSerializer(lambda user: user.name)] = Field(
        default_factory=lambda: _user(_DEFAULT_USER),
        description="The user that keyd runs as, by name or number: one that nothing else "
        "runs as, and none of the workers' uids.",
    )


class Log(_Table):
    """[log]: what is written to standard error."""

    format: Literal["text", "json"] = Field(
        default="text", description="One line an event, for people (text) or for programs (json)."
    )


class Metrics(_Table):
    """[metrics]: numbers for Prometheus."""

    address: (
        Annotated[IPAddress | UnixAddress, PlainValidator(_metrics_address), PlainSerializer(str)]
        | None
    ) = Field(
        default=None,
        description="Where to serve them: 127.0.0.1:9443, or unix:/run/titus-py/metrics.sock. "
        "Absent: nowhere.",
    )


class Service(_Table):
    """[service]: how titus-py itself is run."""

    reload_on_change: _Boolean = Field(
        default=False,
        description="Reload by itself when a certificate or key file has changed, some seconds "
        "after it last did.",
    )


class Listen(_Table):
    """[[listen]]: an address to accept connections on."""

    address: Annotated[IPAddress, PlainValidator(_listen_address), PlainSerializer(str)] = Field(
        description="A numeric address and a port: 192.0.2.5:443, [2001:db8::5]:443, or "
        "every address of both families as [::]:443 or :443."
    )


class _Match(_Table):
    """The part of [[vhost]] that says which connections it takes."""

    sni: Annotated[tuple[str, ...], PlainValidator(_server_names)] | None = Field(
        default=None,
        description='The server names that it takes: "www.example.org", "*.example.org" (one '
        'label in the star\'s place), "" (no name sent). Absent: any, and none.',
    )
    local_address: Annotated[str, PlainValidator(_local_address)] | None = Field(
        default=None, description="The local IP address that it takes connections to. Absent: any."
    )
    local_port: Annotated[_Integer, Field(ge=1, le=65535)] | None = Field(
        default=None, description="The local port that it takes connections to. Absent: any."
    )

    def receives(self, endpoint: IPAddress) -> bool:
        """Whether connections to this local address and port can be for this virtual host."""
        return applies_to(self.local_address, self.local_port, endpoint.host, endpoint.port)


class _Credentials(_Table):
    """The part of [[vhost]] that names what it shows to clients."""

    certificate: _File = Field(
        description="The certificate in PEM, followed by the rest of its chain."
    )
    key: _File | None = Field(
        default=None,
        description="The certificate's private key in PEM. Only keyd reads it. Absent where "
        "keyd.socket names a keyd that has it already.",
    )
    passphrase_file: _File | None = Field(
        default=None, description="A file whose first line is the passphrase of an encrypted key."
    )

    @property
    def credential(self) -> Credential:
        return Credential(self.certificate, self.key, self.passphrase_file)


class VirtualHost(_Credentials, _Match):
    """[[vhost]]: whom a connection is for. The first that matches is taken."""

    backend: Annotated[Address, PlainValidator(_backend_address), PlainSerializer(str)] = Field(
        description="Where the plaintext goes: 127.0.0.1:8080, [::1]:8080, name:8080 or "
        "unix:/run/app.sock."
    )
    min_version: _Version = Field(
        default="TLSv1.2", description="The lowest TLS version that is accepted."
    )
    max_version: _Version = Field(
        default="TLSv1.3", description="The highest TLS version that is offered."
    )
    ciphers: Annotated[_Text, AfterValidator(_cipher_list)] | None = Field(
        default=None,
        description="The TLS 1.2 suites, as an OpenSSL cipher list. "
        "Absent: the forward-secret ones with authenticated encryption.",
    )
    ciphersuites: Annotated[_Text, AfterValidator(_ciphersuites)] | None = Field(
        default=None, description="The TLS 1.3 suites, colons between. Absent: OpenSSL's default."
    )
    rsa_key_exchange: _Boolean = Field(
        default=False,
        description="Also accept TLS 1.2's RSA key exchange, which is not forward-secret: "
        "for clients that know nothing better.",
    )

    @field_validator("max_version")
    @classmethod
    def _not_below_min_version(cls, value: str, info: ValidationInfo) -> str:
        if value < info.data.get("min_version", value):
            raise ValueError(f"{value} is below min_version, {info.data['min_version']}")
        return value

    @field_validator("rsa_key_exchange")
    @classmethod
    def _only_with_tls12(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("min_version") == "TLSv1.3":
            raise ValueError("TLS 1.3 has no RSA key exchange: set min_version to TLSv1.2")
        return value


_Element = TypeVar("_Element")
_AnyTable = TypeVar("_AnyTable", bound=_Table)


def _not_empty(value: tuple[_Element, ...]) -> tuple[_Element, ...]:
    if not value:
        raise ValueError("at least one is needed")
    return value


class Configuration(_Table):
    """The whole file. Immutable for the life of the processes that are started with it."""

    worker: Worker = Field(default_factory=Worker, description="The processes for connections.")
    limits: Limits = Field(
        default_factory=Limits, description="How much of the proxy a client may have."
    )
    keyd: Keyd = Field(default_factory=Keyd, description="The process that holds the keys.")
    log: Log = Field(default_factory=Log, description="What is written to standard error.")
    metrics: Metrics = Field(default_factory=Metrics, description="Numbers for Prometheus.")
    service: Service = Field(default_factory=Service, description="How titus-py itself is run.")
    listen: Annotated[tuple[Listen, ...], AfterValidator(_not_empty)] = Field(
        description="The addresses to accept connections on: one table each."
    )
    vhost: Annotated[tuple[VirtualHost, ...], AfterValidator(_not_empty)] = Field(
        description="The virtual hosts, the first that matches taken: one table each."
    )


class Loaded(NamedTuple):
    """A configuration, or every mistake in it.

    ``configuration`` is None exactly if there are mistakes. ``credentials`` are the
    certificates with their keys, each with the virtual hosts (``vhost[0]``) that use it: also
    where other parts of the file are mistaken, so that these files too can be checked at once.
    """

    source: Source
    configuration: Configuration | None
    mistakes: list[Mistake]
    warnings: list[Mistake]
    credentials: Mapping[Credential, Sequence[str]]


# --- Loading --------------------------------------------------------------------------------


def load(path: str | Path) -> Loaded:
    """The configuration in a TOML file. Raises nothing: what is wrong is in ``mistakes``."""
    source = Source(str(path), Path(path).parent)
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_OCTETS + 1)
        source = source._replace(directory=Path(os.path.abspath(path)).parent)
    except OSError as error:
        return _failed(source, "", _os_reason(error))
    except ValueError:
        return _failed(source, "", "a file name cannot hold a NUL character")
    if len(content) > _MAX_FILE_OCTETS:
        return _failed(source, "", f"is longer than {_MAX_FILE_OCTETS} octets")
    try:
        tables = tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _failed(source, f"line {line}", "is not UTF-8 text")
    except tomllib.TOMLDecodeError as error:
        reason, _, place = str(error).removesuffix(")").rpartition(" (at ")
        return _failed(source, place, f"not valid TOML: {reason}")
    except ValueError:  # int(), of thousands of digits
        return _failed(source, "", "not valid TOML: an integer too long to read")
    except RecursionError:
        return _failed(source, "", "not valid TOML: arrays or tables nested too deeply")
    return _validated(tables, source)


def from_options(listen: Sequence[str], backend: str, certificate: str, key: str) -> Loaded:
    """The configuration that a few command-line options stand for: one virtual host for all.

    Relative paths are relative to the working directory. Raises FileNotFoundError where that
    is gone, and nothing else: what is wrong is in ``mistakes``.
    """
    options = {
        "listen": "--listen",
        "listen.address": "--listen",
        "vhost.backend": "--backend",
        "vhost.certificate": "--cert",
        "vhost.key": "--key",
    }
    tables = {
        "listen": [{"address": address} for address in listen],
        "vhost": [{"backend": backend, "certificate": certificate, "key": key}],
    }
    return _validated(tables, Source("", Path.cwd(), options))


def _failed(source: Source, key: str, reason: str) -> Loaded:
    return Loaded(source, None, [source.mistake(key, reason)], [], {})


def _validated(content: dict[str, Any], source: Source) -> Loaded:
    # Their defaults too are to be validated, and in the same pass.
    tables = {
        "worker": {},
        "limits": {},
        "keyd": {},
        "log": {},
        "metrics": {},
        "service": {},
    } | content
    configuration = None
    mistakes = []
    try:
        configuration = Configuration.model_validate(tables, context=source)
    except ValidationError as error:
        mistakes = [_mistake(details, source) for details in error.errors(include_url=False)]

    # What concerns several tables is checked on those that hold, whatever is wrong with others.
    listeners = {i: table.address for i, table in _each(Listen, tables, "listen", source)}
    vhosts = dict(_each(_Match, tables, "vhost", source))
    mistakes += _uid_mistakes(tables, source)
    mistakes += _key_mistakes(tables, source)
    mistakes += _overlaps(listeners, source)
    if listeners and len(listeners) == len(tables["listen"]):
        mistakes += _never_received(vhosts, listeners.values(), source)
        mistakes += _never_matching(vhosts, listeners.values(), source)
    else:
        ports = {vhost.local_port or 0 for vhost in vhosts.values()}
        anywhere = [IPAddress("::", port) for port in ports]
        mistakes += _never_matching(vhosts, anywhere, source)

    credentials: dict[Credential, list[str]] = {}
    for i, table in _each(_Credentials, tables, "vhost", source):
        credentials.setdefault(table.credential, []).append(f"vhost[{i}]")
    warnings = list(_exposed_files(credentials, source))
    return Loaded(source, None if mistakes else configuration, mistakes, warnings, credentials)


def _each(
    model: type[_AnyTable], tables: dict[str, Any], name: str, source: Source
) -> Iterator[tuple[int, _AnyTable]]:
    """Those tables of an array that hold as far as ``model`` reads them, with their indices."""
    array = tables.get(name)
    if isinstance(array, list):
        for index, table in enumerate(array):
            if (part := _part(model, table, source)) is not None:
                yield index, part


def _part(model: type[_AnyTable], table: object, source: Source) -> _AnyTable | None:
    if not isinstance(table, dict):
        return None
    known = {key: value for key, value in table.items() if key in model.model_fields}
    try:
        return model.model_validate(known, context=source)
    except ValidationError:
        return None


# --- What concerns several tables -----------------------------------------------------------


def _uid_mistakes(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    worker = _part(_Uids, tables["worker"], source)
    keyd = _part(Keyd, tables["keyd"], source)
    if worker and len(worker.uids) < worker.max + worker.spare:
        yield source.mistake(
            "worker.uids",
            f"{len(worker.uids)} uids are too few for max + spare = "
            f"{worker.max + worker.spare} workers, each with one of its own",
        )
    if worker and keyd and keyd.user.uid in worker.uids:
        yield source.mistake(
            "worker.uids",
            f"the range holds {keyd.user.uid}, which is keyd.user: no worker may run as keyd does",
        )


def _key_mistakes(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    """Either titus-py starts a keyd, which needs every key, or another keyd has them all."""
    keyd = _part(_KeydSocket, tables["keyd"], source)
    vhosts = tables.get("vhost")
    if keyd is None or not isinstance(vhosts, list):
        return
    for i, vhost in enumerate(vhosts):
        if isinstance(vhost, dict) and keyd.socket is None and "key" not in vhost:
            yield source.mistake(f"vhost[{i}].key", "is missing")
        elif isinstance(vhost, dict) and keyd.socket is not None:
            for field in ("key", "passphrase_file"):
                if field in vhost:
                    yield source.mistake(
                        f"vhost[{i}].{field}",
                        f"is not for this program to read: the keyd at {keyd.socket} has the keys",
                    )


def _overlaps(listeners: Mapping[int, IPAddress], source: Source) -> Iterator[Mistake]:
    for j, address in listeners.items():
        for i, earlier in listeners.items():
            if i < j and (earlier.covers(address) or address.covers(earlier)):
                key = f"listen[{i}].address"
                yield source.mistake(
                    f"listen[{j}].address",
                    f"{address} overlaps {source.name(key)}, {earlier}: only one can be bound",
                )
                break


def _never_received(
    vhosts: Mapping[int, _Match], listeners: Collection[IPAddress], source: Source
) -> Iterator[Mistake]:
    endpoints = _endpoints(vhosts, listeners)
    ports = {listener.port for listener in listeners}
    for i, vhost in vhosts.items():
        port = vhost.local_port
        if port is not None and port not in ports:
            yield source.mistake(
                f"vhost[{i}].local_port", f"can never match: nothing listens on port {port}"
            )
        elif not any(map(vhost.receives, endpoints)):
            where = f"{vhost.local_address}, port {port}" if port else f"{vhost.local_address}"
            yield source.mistake(
                f"vhost[{i}].local_address", f"can never match: nothing listens on {where}"
            )


def _never_matching(
    vhosts: Mapping[int, _Match], listeners: Collection[IPAddress], source: Source
) -> Iterator[Mistake]:
    """The virtual hosts to which earlier ones leave nothing.

    Of all connections that the virtual hosts can tell apart, each kind is tried once.
    """
    endpoints = _endpoints(vhosts, listeners)
    takers = _takers(vhosts)
    names: dict[int, list[str | None]] = {j: [] for j in vhosts}
    for name, indices in takers.items():
        for j in indices:
            names[j].append(name)
    for j, vhost in vhosts.items():
        first_takers = set()
        for endpoint, name in itertools.product(filter(vhost.receives, endpoints), names[j]):
            first = next(i for i in takers[name] if vhosts[i].receives(endpoint))
            if first == j:
                break
            first_takers.add(first)
        else:
            if first_takers:  # None: nothing listens there, which is said elsewhere.
                earlier = ", ".join(f"vhost[{i}]" for i in sorted(first_takers))
                yield source.mistake(
                    f"vhost[{j}]", f"can never match: all that it could is taken by {earlier}"
                )


def _endpoints(vhosts: Mapping[int, _Match], listeners: Collection[IPAddress]) -> list[IPAddress]:
    """The local addresses and ports that connections can arrive at.

    A wildcard listener also stands for itself: for an address that no virtual host names.
    """
    named = {vhost.local_address for vhost in vhosts.values() if vhost.local_address is not None}
    return list(listeners) + [
        endpoint
        for listener in listeners
        if listener.is_wildcard
        for host in sorted(named)
        if listener.covers(endpoint := IPAddress(host, listener.port))
    ]


def _takers(vhosts: Mapping[int, _Match]) -> dict[str | None, list[int]]:
    """For a server name of each kind that patterns can tell apart, who takes it, in order.

    ``?`` stands for a label that no pattern has, None for no server name. What
    ``virtual_host.matches`` says of one pattern, this says of thousands without trying each.
    """
    by_pattern: dict[str | None, list[int]] = {}
    for i, vhost in vhosts.items():
        for pattern in (None,) if vhost.sni is None else set(vhost.sni):
            by_pattern.setdefault(pattern, []).append(i)
    takers = {}
    kinds = sorted(pattern.replace("*", "?") for pattern in by_pattern if pattern)
    for name in ("?", None, *kinds):
        fitting = ("",) if name is None else (name, "*." + name.partition(".")[2])
        takers[name] = sorted({i for p in (None, *fitting) for i in by_pattern.get(p, ())})
    return takers


def _exposed_files(
    credentials: Mapping[Credential, list[str]], source: Source
) -> Iterator[Mistake]:
    warned = set()
    for credential, (vhost, *_) in credentials.items():
        for field in ("key", "passphrase_file"):
            path = getattr(credential, field)
            if path is None or path in warned:
                continue
            warned.add(path)
            try:
                mode = stat.S_IMODE(path.stat().st_mode)
            except OSError:  # Gone since it was found. Whoever opens it will say so.
                continue
            if mode & 0o066:
                yield source.mistake(
                    f"{vhost}.{field}",
                    f"{path}: others than its owner can read or write it "
                    f"(mode {mode:04o}): chmod 600",
                )


# --- Saying it plainly ----------------------------------------------------------------------


def _mistake(details: ErrorDetails, source: Source) -> Mistake:
    location = details["loc"]
    key = ""
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
        else:
            name = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part)
            key += f".{name}" if key else name
    unknown = details["type"] == "extra_forbidden"
    return source.mistake(key, _unknown_key(details) if unknown else _reason(details, key))


def _unknown_key(details: ErrorDetails) -> str:
    *path, key = map(str, details["loc"])
    table = _TABLES[path[0]] if path else Configuration
    is_table = isinstance(details["input"], dict) or (
        isinstance(details["input"], list) and dict in map(type, details["input"])
    )
    kind = "table" if is_table else "key"
    nearest = _nearest(key.lower().replace("-", "_"), table.model_fields)
    homes = [_heading(name) for name, model in _TABLES.items() if key in model.model_fields]
    if homes and not (path and nearest):
        return f"unknown {kind}: it belongs in {' or '.join(homes)}"
    if nearest:
        return f"unknown {kind}: did you mean {nearest}?"
    return f"unknown {kind}: known here are {', '.join(table.model_fields)}"


def _reason(details: ErrorDetails, key: str) -> str:
    found = _described(details["input"])
    limits = details.get("ctx", {})
    match details["type"]:
        case "value_error":
            return str(limits["error"])
        case "missing":
            return f"at least one {_heading(key)} is needed" if key in _TABLES else "is missing"
        case "tuple_type":
            return f"expected tables, each headed {_heading(key)}, not {found}"
        case "model_type":
            return f"expected a table, {_heading(key.partition('[')[0])}, not {found}"
        case "literal_error":
            return f"expected {limits['expected']}, not {found}".replace("'", '"')
        case "int_type":
            return f"expected a whole number, not {found}"
        case "bool_type":
            return f"expected true or false, not {found}"
        case "greater_than_equal":
            return f"expected {limits['ge']} or more, not {found}"
        case "less_than_equal":
            return f"expected {limits['le']} or less, not {found}"
    return details["msg"]


def _heading(table: str) -> str:
    return f"[[{table}]]" if table in ("listen", "vhost") else f"[{table}]"


def _described(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 60 else value[:60] + "…", ensure_ascii=False)
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number that large"  # and perhaps too large for str()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return "an array"
    if isinstance(value, dict):
        return "a table"
    return "a date or time"


def _nearest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def _os_reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason[0].lower() + reason[1:]


_TABLES: Mapping[str, type[_Table]] = {
    "worker": Worker,
    "limits": Limits,
    "keyd": Keyd,
    "log": Log,
    "metrics": Metrics,
    "service": Service,
    "listen": Listen,
    "vhost": VirtualHost,
}
