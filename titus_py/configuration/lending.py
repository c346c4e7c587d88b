"""Lending keys to other hosts: what goes with that in a configuration, and what keyd is told.

Run by the supervisor and by the commands. None of them reads a key: ``keyd check`` does.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from keyd.protocol import mask_of
from keyd.upstream.messages import MAX_BORROWERS, MAX_LENT_KEYS
from titus_py.configuration.across_tables import each_valid, valid_part
from titus_py.configuration.address import Address, UnixAddress
from titus_py.configuration.helper import KEYD_CHECK, Helper, Unanswered
from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.paths import TokenUri
from titus_py.configuration.tables import (
    Backend,
    ClientCertificates,
    Configuration,
    Keyd,
    KeydSocket,
    Lending,
    LentKey,
    Tunnel,
    VirtualHost,
)

__all__ = [
    "LentFacts",
    "ask_about_lent_keys",
    "lending_in_company",
    "lending_mistakes",
    "lending_socket",
    "lending_to_more",
    "lent_keys",
    "lent_to_nobody",
    "lent_with_its_own",
    "told",
]


class LentFacts(NamedTuple):
    """What is public about a key that is lent."""

    key_id: bytes
    #: For a key in a token (``keyd.reference``).
    reference: str


def lending_socket(tables: dict[str, Any], source: Source) -> UnixAddress | None:
    """Where keyd signs for other hosts, if it does."""
    lending = valid_part(Lending, tables["keyd"], source)
    return lending.lend if lending is not None else None


def lent_keys(tables: dict[str, Any], source: Source) -> dict[LentKey, list[str]]:
    """The keys that are lent, each with the places of its setting."""
    found: dict[LentKey, list[str]] = {}
    lending = valid_part(Lending, tables["keyd"], source)
    for i, client in enumerate(lending.client if lending else ()):
        for key in client.lent:
            found.setdefault(key, []).append(f"keyd.client[{i}].keys")
    return found


def lending_mistakes(tables: dict[str, Any], source: Source) -> Iterator[Mistake]:
    lending = valid_part(Lending, tables["keyd"], source)
    if lending is None:
        return
    if lending.lend is None:
        if lending.client:
            yield source.mistake(
                "keyd.lend", "is missing: without it, no host of [[keyd.client]] reaches keyd"
            )
        return
    if not lending.client:
        yield source.mistake(
            "keyd.client", "is missing: say whom keyd is to sign for, each in a [[keyd.client]]"
        )
    if len(lending.client) > MAX_BORROWERS:
        yield source.mistake("keyd.client", f"more than {MAX_BORROWERS}: split them among hosts")
    keyd = valid_part(KeydSocket, tables["keyd"], source)
    if keyd is not None and keyd.socket is not None:
        yield source.mistake(
            "keyd.lend",
            f"does not go with keyd.socket: only a keyd that titus-py starts lends keys, and the "
            f"one at {keyd.socket} is not",
        )
    yield from _mistakes_of_clients(lending, valid_part(Keyd, tables["keyd"], source), source)
    yield from _mistakes_of_vhosts(lending, tables, source)
    for i, tunnel in each_valid(Tunnel, tables, "tunnel", source):
        if any(_leads(server, lending.lend) for server in tunnel.connect):
            yield source.mistake(
                f"tunnel[{i}].connect",
                "is keyd.lend, and what a tunnel carries is its client's: keyd believes whoever "
                "connects there which host has come",
            )


def _mistakes_of_clients(lending: Lending, keyd: Keyd | None, source: Source) -> Iterator[Mistake]:
    for i, client in enumerate(lending.client):
        place = f"keyd.client[{i}]"
        in_tokens = [isinstance(key, TokenUri) for key in client.keys]
        if any(in_tokens) and keyd is not None and keyd.token_user is None:
            yield source.mistake(
                "keyd.token_user",
                f"is missing: a key of {source.reference(place)} is in a token, whose module needs "
                "a user to run as",
            )
        if client.passphrase_file is not None and all(in_tokens):
            yield source.mistake(
                f"{place}.passphrase_file",
                "does not go with keys in tokens: a PIN's file is named in the URI (pin-source=)",
            )
        if len(client.keys) > MAX_LENT_KEYS:
            yield source.mistake(f"{place}.keys", f"more than {MAX_LENT_KEYS} keys")


def _mistakes_of_vhosts(
    lending: Lending, tables: dict[str, Any], source: Source
) -> Iterator[Mistake]:
    """Of the way from other hosts to keyd: a virtual host that knows them."""
    names: set[str] = set()
    leading = False
    certificates = dict(each_valid(ClientCertificates, tables, "vhost", source))
    for i, vhost in each_valid(Backend, tables, "vhost", source):
        setting = _leading(vhost, lending.lend)
        if setting is None:
            continue
        leading = True
        names |= {client.name for client in vhost.client}
        where = f"vhost[{i}]"
        if vhost.send_proxy != "v2-tls-cert":
            yield source.mistake(
                f"{where}.send_proxy",
                f'has to be "v2-tls-cert": {where}.{setting} is keyd.lend, and keyd learns by '
                "it which client has come",
            )
        asked = certificates.get(i)
        if not vhost.client or (asked and asked.client_certificates != "required"):
            yield source.mistake(
                f"{where}.client_certificates",
                f'has to be "required", with a [[vhost.client]] for each host: '
                f"{where}.{setting} is keyd.lend",
            )
    if not leading:
        yield source.mistake("keyd.lend", f"{lending.lend}: is the backend of no [[vhost]]")
        return
    for i, client in enumerate(lending.client):
        if client.name not in names:
            yield source.mistake(
                f"keyd.client[{i}].name",
                f"{client.name}: no [[vhost.client]] of a virtual host whose backend is keyd.lend "
                "has this name",
            )


def lent_to_nobody(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    """Warnings of clients that are let in by a virtual host, and by keyd are not."""
    known = {client.name for client in configuration.keyd.client}
    for i, vhost in enumerate(configuration.vhost):
        for j, client in enumerate(vhost.client):
            if client.name not in known and any(
                _leads(one, configuration.keyd.lend) for one in client.backend or vhost.backend
            ):
                yield source.mistake(
                    f"vhost[{i}].client[{j}].name",
                    f"{client.name}: no [[keyd.client]] has this name, so keyd hears nothing of it",
                )


def lending_in_company(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    """Warnings of virtual hosts that lead to keyd.lend, and that other clients can reach.

    Which host has come is its worker's word, and a worker may serve what its local address allows.
    """
    lend = configuration.keyd.lend
    leads = {i: _leading(vhost, lend) is not None for i, vhost in enumerate(configuration.vhost)}
    for i, vhost in enumerate(configuration.vhost):
        company = [
            f"vhost[{j}]"
            for j, other in enumerate(configuration.vhost)
            if not leads[j] and leads[i] and _meet(vhost, other)
        ]
        if company:
            yield source.mistake(
                f"vhost[{i}].backend",
                f"clients of {' and '.join(company[:3])} come to the same address: one that takes "
                "its worker over has keyd sign as any of these hosts: give this virtual host an "
                "address or a port of its own (local_address, local_port), and let a firewall "
                "admit these hosts alone",
            )


def _leads(backend: Address, lend: UnixAddress | None) -> bool:
    """Whether connections there come to keyd, by whatever path: what they carry, keyd believes."""
    return isinstance(backend, UnixAddress) and lend is not None and backend.leads_to(lend)


def _leading(vhost: Backend, lend: UnixAddress | None) -> str | None:
    """Which setting of this virtual host leads to keyd.lend: the first, if any does."""
    return next((key for key, backend in vhost.all_backends if _leads(backend, lend)), None)


def lending_to_more(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    """Warnings of what lets more come to keyd.lend than the hosts that keys are lent to.

    Such a host shows a certificate of its own, by a tunnel, which keyd signs for in TLS 1.3 alone.
    """
    for i, vhost in enumerate(configuration.vhost):
        setting = _leading(vhost, configuration.keyd.lend)
        if setting is None:
            continue
        leads = f"{source.reference(f'vhost[{i}].{setting}')} is keyd.lend"
        if vhost.min_version != "TLSv1.3":
            yield source.mistake(
                f"vhost[{i}].min_version",
                f"{leads}, and a titus-py that borrows keys speaks TLS 1.3 alone: TLS 1.2 is of "
                'use to attackers: set "TLSv1.3"',
            )
        for j, client in enumerate(vhost.client):
            if client.dns or client.uri or client.cn:
                yield source.mistake(
                    f"vhost[{i}].client[{j}]",
                    f"{client.name}: {leads}, and whoever has an authority of client_ca vouch for "
                    "this client's name has keyd sign as this client: know it by its key alone "
                    "(spki)",
                )


def _meet(one: VirtualHost, other: VirtualHost) -> bool:
    """Whether a connection may be for either of the two, by where it comes to."""
    return all(
        mine is None or theirs is None or mine == theirs
        for mine, theirs in (
            (one.local_address, other.local_address),
            (one.local_port, other.local_port),
        )
    )


def lent_with_its_own(
    configuration: Configuration | None,
    source: Source,
    lent: Mapping[LentKey, LentFacts],
    key_ids: Callable[[VirtualHost], Collection[bytes]],
) -> Iterator[Mistake]:
    """The key by which other hosts know this one is not lent to any of them."""
    if configuration is None:
        return
    own = {
        key_id: f"vhost[{i}]"
        for i, vhost in enumerate(configuration.vhost)
        if _leading(vhost, configuration.keyd.lend) is not None
        for key_id in key_ids(vhost)
    }
    for i, client in enumerate(configuration.keyd.client):
        for key in client.lent:
            if key in lent and lent[key].key_id in own:
                yield source.mistake(
                    f"keyd.client[{i}].keys",
                    f"{key.token or key.key} is the key of "
                    f"{source.reference(own[lent[key].key_id])}, by which other hosts know this "
                    "one: a host that has it signed with could pass for this one: lend the keys "
                    "of sites alone",
                )


def told(
    configuration: Configuration, lent: Mapping[LentKey, LentFacts]
) -> dict[str, object] | None:
    """What keyd is told, for ``keyd.upstream.lender``; None where nothing is lent."""
    if configuration.keyd.lend is None:
        return None
    uids = configuration.worker.uids
    return {
        "uids": [uids[0], uids[-1]],
        "clients": [
            {
                "name": client.name,
                "grants": {lent[key].key_id.hex(): mask_of(client.powers) for key in client.lent},
                "most": client.rate.most,
                "seconds": client.rate.seconds,
            }
            for client in configuration.keyd.client
        ],
    }


# --- asking keyd check -------------------------------------------------------------


class _Problem(BaseModel, defer_build=True):
    field: str
    reason: str


class _Answer(BaseModel, defer_build=True):
    mistakes: list[_Problem]
    warnings: list[_Problem]
    own_key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    reference: str | None


#: Built when it is first used: most configurations have nothing to ask.
_ANSWERS = TypeAdapter(list[_Answer], config=ConfigDict(defer_build=True))
_EACH_SECONDS = 1.0


def ask_about_lent_keys(
    lent: Mapping[LentKey, Sequence[str]],
    of_tokens: Mapping[str, object] | None,
    source: Source,
    timeout: float,
) -> tuple[dict[LentKey, LentFacts], list[Mistake], list[Mistake]]:
    """What is known of them, mistakes and warnings."""
    facts: dict[LentKey, LentFacts] = {}
    mistakes: list[Mistake] = []
    warnings: list[Mistake] = []
    if not lent:
        return facts, mistakes, warnings
    question = [
        {
            "certificate": None,
            "key": one.key and str(one.key),
            "passphrase_file": one.passphrase_file and str(one.passphrase_file),
            "token": {"uri": one.token, "settings": of_tokens} if one.token and of_tokens else None,
        }
        for one in lent
    ]
    try:
        octets = Helper(KEYD_CHECK).ask(question, timeout + _EACH_SECONDS * len(lent))
        answers = _ANSWERS.validate_json(octets)
        if len(answers) != len(lent):
            raise Unanswered(f"{len(answers)} answers to {len(lent)} questions")
    except (ValidationError, Unanswered) as error:
        reason = f"keys could not be checked by 'keyd check': {error}"
        mistakes.append(source.mistake("keyd.client", reason)._replace(unknown=True))
        return facts, mistakes, warnings
    for (key, places), answer in zip(lent.items(), answers, strict=True):
        for found, problems in ((mistakes, answer.mistakes), (warnings, answer.warnings)):
            for problem in problems:
                place = places[0]
                if problem.field == "passphrase_file":
                    place = f"{place.removesuffix('keys')}passphrase_file"
                found.append(source.mistake(place, problem.reason))
        if answer.own_key is not None:
            facts[key] = LentFacts(bytes.fromhex(answer.own_key), answer.reference or "")
        elif not answer.mistakes and (key.token is None or of_tokens is not None):
            mistakes.append(
                source.mistake(
                    places[0],
                    "a key in a token that is not there now: which key it is has to be known "
                    "before it is lent",
                )
            )
    return facts, mistakes, warnings
