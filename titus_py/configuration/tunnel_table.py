"""The table [[tunnel]]: keys, defaults and descriptions; and whether they fit one another.

Run by the supervisor and the command-line tools. ``docs/reference.py`` writes the reference from
this file, by way of ``tables``.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PlainSerializer, PlainValidator, ValidationInfo

from titus_py.configuration.address import (
    Address,
    IPAddress,
    NameAddress,
    UnixAddress,
    canonical_ip,
    host_name,
)
from titus_py.configuration.certificate_table import Credential, credential_of
from titus_py.configuration.client_allow import public_key_pin
from titus_py.configuration.client_table import ClientFiles
from titus_py.configuration.mistake import Valid, described, text_of
from titus_py.configuration.paths import File, KeyPlace, readable_file
from titus_py.configuration.socket_access import (
    SocketGroup,
    SocketMode,
    SocketUser,
    without_effect,
)
from titus_py.configuration.table import Table
from titus_py.configuration.values import (
    BackendAddresses,
    Boolean,
    Duration,
    ListenAddress,
    Protocols,
    Version,
)

__all__ = ["SYSTEM", "Tunnel", "misfits"]

#: The value of ``ca`` that means the authorities that this system trusts.
SYSTEM = "system"
#: Where Debian, Fedora and Alpine have them, each in one file.
_SYSTEM_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)


def _authorities(value: object, info: ValidationInfo) -> Path | Literal["system"]:
    if value != SYSTEM:
        return readable_file(value, info)
    if _system_file() is None and not isinstance(info.context, Valid):
        raise ValueError("this system has no file of authorities: install ca-certificates")
    return "system"


def _system_file() -> Path | None:
    return next((Path(path) for path in _SYSTEM_FILES if os.access(path, os.R_OK)), None)


def _server_name(value: object) -> str:
    text = text_of(value)
    try:
        return canonical_ip(text)
    except ValueError:
        return host_name(text).removesuffix(".")


def _pins(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(  # noqa: TRY004 -- pydantic makes a mistake of a ValueError alone
            f'expected a list of keys, such as ["sha256:..."], not {described(value)}'
        )
    if not value:
        raise ValueError("an empty list accepts no server: leave it out if ca is all that counts")
    return tuple(dict.fromkeys(public_key_pin(text_of(one)) for one in value))


def _pins_as_written(pins: tuple[str, ...] | None) -> list[str] | None:
    return None if pins is None else [f"sha256:{pin}" for pin in pins]


class Tunnel(Table):
    """[[tunnel]]: plaintext from clients on this machine, carried to a TLS server."""

    listen: ListenAddress = Field(
        description="Where clients connect, without TLS: a numeric address and a port, such as "
        "127.0.0.1:5432; or a unix socket, such as unix:/run/titus-py/db.sock, which is made, and "
        "removed at the end. One that was left by a crash is replaced; nothing else is."
    )
    socket_mode: SocketMode = None
    socket_user: SocketUser = None
    socket_group: SocketGroup = None
    allow_remote: Boolean = Field(
        default=False,
        description="Whether listen may be an address that other machines can connect to. What "
        "they send is not encrypted up to here, and then goes on as this machine's.",
    )
    connect: BackendAddresses = Field(
        description="The TLS server: an address or a name with a port, such as "
        "db.example.com:5432, or a list of several, as for [[vhost]] backend."
    )
    balance: Literal["round-robin", "priority", "least-connections", "source"] = Field(
        default="round-robin",
        description="Which of several servers a connection goes to, as for [[vhost]].",
    )
    connect_timeout: Duration | None = Field(
        default=None,
        description="How long connecting may take, all servers and their addresses together. "
        "Absent: worker.connect_timeout.",
    )
    server_name: Annotated[str, PlainValidator(_server_name)] | None = Field(
        default=None,
        description="The name, or numeric address, that the server's certificate has to be for; a "
        "name is also sent to the server (SNI). Absent: the host of connect. With pins alone, it "
        "is only sent.",
    )
    ca: (
        Annotated[Path | Literal["system"], PlainValidator(_authorities), PlainSerializer(str)]
        | None
    ) = Field(
        default=None,
        description='The authorities whose certificates are accepted: "system", those that this '
        "system trusts; or a file of certificates, in PEM, each of which is trusted. Absent: the "
        "keys in pins are all that counts.",
    )
    pins: (
        Annotated[tuple[str, ...], PlainValidator(_pins), PlainSerializer(_pins_as_written)] | None
    ) = Field(
        default=None,
        description='The servers\' public keys, as SHA-256: ["sha256:..."], of which the server '
        "has to have one. Without ca, whoever has the key is accepted, whatever else the "
        "certificate says: it may be self-signed. With ca, both have to hold.",
    )
    certificate: File | None = Field(
        default=None,
        description="What is shown to a server that asks for a certificate: in PEM, followed by "
        "the rest of its chain. It takes TLS 1.3. Absent: nothing is shown.",
    )
    key: KeyPlace | None = Field(
        default=None,
        description="The certificate's private key in PEM, which only keyd reads, or the URI of a "
        "key in a token, as for [[vhost]]. keyd signs with it as a client alone: no [[vhost]] may "
        "have the same key. Absent where keyd.socket names a keyd that has it already.",
    )
    passphrase_file: File | None = Field(
        default=None, description="A file whose first line is the passphrase of an encrypted key."
    )
    min_version: Version | None = Field(
        default=None,
        description="The lowest TLS version that is accepted. Absent: TLSv1.2, and with a "
        "certificate TLSv1.3.",
    )
    alpn: Protocols | None = Field(
        default=None,
        description='The application protocols that are offered (ALPN), best first: ["h2"]. '
        "Absent: none.",
    )
    starttls: Literal["postgresql"] | None = Field(
        default=None,
        description="The protocol by which the server is first asked for TLS, in the clear: "
        '"postgresql". A client that asks the tunnel for TLS is told that there is none. '
        "Absent: TLS begins at once.",
    )
    send_proxy: Literal["v1", "v2"] | None = Field(
        default=None,
        description="The PROXY header that the server gets before TLS, and must expect: the "
        "client's address and the one it came to. It is not encrypted. Absent: none.",
    )
    drain: Duration | None = Field(
        default=None,
        description="How long connections may go on once titus-py is told to stop or has been "
        "reloaded, for those that never end by themselves. Absent: after a reload, until they "
        "end; when it is to stop, worker.drain.",
    )

    @property
    def verified_name(self) -> str | None:
        """The server's name or numeric address; None if neither setting says one."""
        if self.server_name is not None:
            return self.server_name
        hosts = {_host(address) for address in self.connect}
        return hosts.pop() if len(hosts) == 1 else None

    @property
    def lowest_version(self) -> str:
        """What a client signs in TLS 1.2 has no form that keyd could check."""
        return self.min_version or ("TLSv1.2" if self.certificate is None else "TLSv1.3")

    @property
    def credential(self) -> Credential | None:
        """The files of its certificate, if it has one."""
        if self.certificate is None:
            return None
        return credential_of(self.certificate, self.key, self.passphrase_file)

    @property
    def client_files(self) -> ClientFiles | None:
        """The file with the authorities."""
        if self.ca == SYSTEM:
            system = _system_file()
            return None if system is None else ClientFiles(system, None, "system")
        return None if self.ca is None else ClientFiles(Path(self.ca), None, "servers")


def _host(address: Address) -> str | None:
    """What a server's certificate is to be for, if connecting to it says so."""
    return address.name if isinstance(address, NameAddress) else None


def misfits(tunnel: Tunnel) -> Iterator[tuple[str, str]]:
    """Settings of a valid table that do not fit one another, and why."""
    if isinstance(tunnel.listen, UnixAddress):
        yield from _misfits_of_unix(tunnel)
    else:
        yield from _misfits_of_ip(tunnel, tunnel.listen)
    if tunnel.ca is None and tunnel.pins is None:
        yield (
            "ca",
            'is missing, and so is pins: the server is always verified. Set ca = "system" for a '
            "certificate of a public authority, a file with your own authority, or pins with the "
            "server's key",
        )
    elif tunnel.ca is not None and tunnel.verified_name is None:
        several = len(tunnel.connect) > 1
        what = "connect has several hosts" if several else f"connect is {tunnel.connect[0]}"
        yield "server_name", f"is missing: {what}, and the certificate has to be for one name"
    if tunnel.certificate is None:
        for field in ("key", "passphrase_file"):
            if getattr(tunnel, field) is not None:
                yield field, "has no effect without certificate, which is shown to the server"
    elif tunnel.lowest_version != "TLSv1.3":
        yield (
            "min_version",
            "with a certificate, only TLSv1.3: what a client signs in TLS 1.2 has no form that "
            "keyd could check",
        )


def _misfits_of_unix(tunnel: Tunnel) -> Iterator[tuple[str, str]]:
    if tunnel.allow_remote:
        yield "allow_remote", f"has no effect on {tunnel.listen}: only this machine can connect"
    if tunnel.send_proxy is not None:
        yield "send_proxy", f"a client of {tunnel.listen} has no address that it could send"


def _misfits_of_ip(tunnel: Tunnel, listen: IPAddress) -> Iterator[tuple[str, str]]:
    if not listen.is_loopback and not tunnel.allow_remote:
        yield (
            "listen",
            f"{listen}: other machines can connect, and what they send goes on as this "
            f"machine's: set {_on_loopback(listen)}, or allow_remote = true",
        )
    yield from without_effect(tunnel, listen)


def _on_loopback(address: IPAddress) -> IPAddress:
    return IPAddress(
        "::1" if ":" in address.host and address.host != "::" else "127.0.0.1", address.port
    )
