"""What is asked of client certificates: whether the settings fit, and what their files hold.

Run by the supervisor (root) and by ``titus-py check``. A short-lived child reads the files
(``titus_py.fork_server.client_authorities``). Its answers are trusted, once their form is checked.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from typing import Any, Literal, NamedTuple, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from titus_py.between.client_allow import Allow
from titus_py.between.client_identity import ClientTerms
from titus_py.configuration.across_tables import each_valid
from titus_py.configuration.client_table import ClientCertificates, ClientFiles
from titus_py.configuration.helper import CLIENT_AUTHORITIES, Helper, Unanswered
from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.tunnel_table import Tunnel

__all__ = [
    "ClientAuthorities",
    "client_files",
    "client_mistakes",
    "client_terms",
    "read_authorities",
]


class ClientAuthorities(NamedTuple):
    """What the files of a ``ClientFiles`` hold, in PEM, and nothing else of them."""

    authorities: str
    revocations: str
    #: SHA-256 of the public keys of the authorities, in hexadecimal.
    keys: tuple[str, ...]
    #: When the first of the authorities' certificates expires, and the first of the lists.
    not_after: datetime
    next_update: datetime | None = None


class _Problem(BaseModel, defer_build=True):
    field: Literal["client_ca", "client_crl"]
    reason: str


class _Answer(BaseModel, defer_build=True):
    mistakes: list[_Problem]
    warnings: list[_Problem]
    authorities: str
    revocations: str
    keys: tuple[str, ...]
    not_after: AwareDatetime | None
    next_update: AwareDatetime | None

    @model_validator(mode="after")
    def _mistakes_or_authorities(self) -> Self:
        if not self.mistakes and self.found() is None:
            raise ValueError("neither mistakes nor authorities")
        return self

    def found(self) -> ClientAuthorities | None:
        if self.mistakes or not (self.authorities and self.keys and self.not_after):
            return None
        ends = self.not_after, self.next_update
        return ClientAuthorities(self.authorities, self.revocations, self.keys, *ends)


#: Built when it is first used: most configurations have nothing to ask.
_ANSWERS = TypeAdapter(list[_Answer], config=ConfigDict(defer_build=True))


def client_mistakes(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    """Settings that do not fit one another, of virtual hosts that are valid otherwise."""
    for i, vhost in each_valid(ClientCertificates, tables, "vhost", source):
        for field, reason in _misfits(vhost):
            yield source.mistake(f"vhost[{i}].{field}", reason)


def _misfits(vhost: ClientCertificates) -> Iterator[tuple[str, str]]:
    allow = vhost.client_allow
    if vhost.client_certificates is None:
        for field in ("client_ca", "client_crl", "client_allow"):
            if getattr(vhost, field) is not None:
                yield field, 'has no effect: set client_certificates to "required" or "optional"'
        if vhost.client:
            yield "client", 'has no effect: set client_certificates to "required" or "optional"'
        return
    if vhost.client and allow is not None:
        yield (
            "client_allow",
            "does not go with [[vhost.client]], which says who is let in: make a client of each "
            "that it names",
        )
    elif vhost.client:
        yield from _nameless_without_authority(vhost)
    elif allow is None:
        yield (
            "client_allow",
            'is missing: say who is let in, as in { dns = ["*.example.org"] }, or "all"; or have a '
            "[[vhost.client]] for each",
        )
    elif vhost.client_ca is None and allow == "all":
        yield "client_ca", 'is missing: with client_allow = "all", it says whose certificates'
    elif vhost.client_ca is None and isinstance(allow, Allow) and any(allow[:3]):
        yield (
            "client_ca",
            "is missing: anybody can write any name into a certificate; only keys (spki) are "
            "known without an authority",
        )
    if vhost.client_crl is not None and vhost.client_ca is None:
        yield "client_crl", "has no effect without client_ca: the keys that are listed are let in"


def _nameless_without_authority(vhost: ClientCertificates) -> Iterator[tuple[str, str]]:
    """Clients that are known by a name, which anybody could have."""
    for i, client in enumerate(vhost.client):
        if vhost.client_ca is None and any(client.allow[:3]):
            yield (
                f"client[{i}]",
                "client_ca is missing: anybody can write any name into a certificate; only keys "
                "(spki) are known without an authority",
            )


def read_authorities(
    files: Mapping[ClientFiles, Sequence[str]],
    source: Source,
    timeout: float,
    helper: Helper | None = None,
) -> tuple[dict[ClientFiles, ClientAuthorities], list[Mistake], list[Mistake]]:
    """What is in the files, the mistakes, and the warnings. Each has the virtual hosts' places.

    The helper may have been started ahead.
    """
    if not files:
        return {}, [], []
    question = [
        {"ca": str(one.ca), "crl": one.crl and str(one.crl), "whose": one.whose} for one in files
    ]
    try:
        octets = (helper or Helper(CLIENT_AUTHORITIES)).ask(question, timeout)
        answers = _ANSWERS.validate_json(octets)
        if len(answers) != len(files):
            raise Unanswered(f"{len(answers)} answers to {len(files)} questions")
    except (Unanswered, ValidationError) as error:
        settings = dict.fromkeys(one.setting("client_ca") for one in files)
        reason = f"the files of {' and '.join(settings)} could not be read: {error}"
        return {}, [source.mistake("", reason)._replace(unknown=True)], []
    found: dict[ClientFiles, ClientAuthorities] = {}
    mistakes: list[Mistake] = []
    warnings: list[Mistake] = []
    for (one, (place, *_)), answer in zip(files.items(), answers, strict=True):
        for problems, to in ((answer.mistakes, mistakes), (answer.warnings, warnings)):
            to += [
                source.mistake(f"{place}.{one.setting(each.field)}", each.reason)
                for each in problems
            ]
        if (authorities := answer.found()) is not None:
            found[one] = authorities
    return found, mistakes, warnings


def client_terms(
    vhost: ClientCertificates, authorities: Mapping[ClientFiles, ClientAuthorities]
) -> ClientTerms | None:
    """What a worker asks of this virtual host's clients; None if nothing."""
    if vhost.client_certificates is None:
        return None
    files = vhost.client_files
    found = authorities[files] if files is not None else None
    allow = vhost.client_allow
    if vhost.client:
        # All that any of them has.
        allows = [client.allow for client in vhost.client]
        allow = Allow(*(tuple(chain.from_iterable(some)) for some in zip(*allows, strict=True)))
    return ClientTerms(
        vhost.client_certificates == "required",
        found.authorities if found is not None else "",
        found.revocations if found is not None else "",
        tuple(allow) if isinstance(allow, Allow) else None,
        tuple(client.plan for client in vhost.client),
    )


def client_files(tables: dict[str, Any], source: Source) -> dict[ClientFiles, list[str]]:
    """The files that are to be read, with the places of their virtual hosts and tunnels."""
    places: dict[ClientFiles, list[str]] = {}
    for i, vhost in each_valid(ClientCertificates, tables, "vhost", source):
        if (files := vhost.client_files) is not None:
            places.setdefault(files, []).append(f"vhost[{i}]")
    for i, tunnel in each_valid(Tunnel, tables, "tunnel", source):
        if (files := tunnel.client_files) is not None:
            places.setdefault(files, []).append(f"tunnel[{i}]")
    return places
