"""Checks a configuration completely: keys, certificates and handshakes too.

Runs in the supervisor (root) and in ``titus-py check``. Neither may hold a private key or
load a TLS library. So a short-lived child, ``keyd check``, reads the keys and certificates, and
another, ``titus_py.fork_server.handshake_check``, tries what the workers will do with them. Their
answers are trusted like keyd's, once their form is checked.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AwareDatetime, BaseModel, Field, TypeAdapter, ValidationError, model_validator

from keyd.protocol import MAX_HANDED
from titus_py.configuration import Configuration, Credential, Loaded, Mistake, VirtualHost
from titus_py.configuration.across_tables import setting
from titus_py.configuration.certificate_table import load_seconds
from titus_py.configuration.client_certificates import (
    ClientAuthorities,
    read_authorities,
)
from titus_py.configuration.client_table import ClientFiles
from titus_py.configuration.file_watch import FileWatch
from titus_py.configuration.helper import (
    CLIENT_AUTHORITIES,
    HANDSHAKE_CHECK,
    KEYD_CHECK,
    Helper,
    Unanswered,
)
from titus_py.configuration.lending import LentFacts, ask_about_lent_keys, lent_with_its_own
from titus_py.configuration.misnamed import misnamed, misnamed_in_directories, names_shown, some
from titus_py.configuration.mistake import Source
from titus_py.configuration.tables import LentKey
from titus_py.configuration.tokens import settings
from titus_py.configuration.tunnel_keys import keys_for_both, own_pins
from titus_py.configuration.uids_in_use import uids_in_use

__all__ = [
    "Answer",
    "CertificateFacts",
    "Checked",
    "Served",
    "ask_keyd_check",
    "check",
    "names_shown",
]

_TIMEOUT_SECONDS = 30.0


class CertificateFacts(NamedTuple):
    """What is public about a certificate that was checked without a mistake."""

    chain: str  #: PEM: the certificate and the rest of its chain, and nothing else
    key_id: bytes  #: SHA-256 of the SubjectPublicKeyInfo, 32 octets
    reference: str  #: the reference file, PEM, that stands for the key (``keyd.reference``)
    subject: str  #: RFC 4514
    names: tuple[str, ...]  #: DNS names and IP addresses of the subjectAltName
    not_after: datetime
    kind: str = ""  #: of its key, as far as a server can show one of each: RSA, ECDSA or Ed25519


class Checked(NamedTuple):
    """A configuration that can be served, or every mistake in it.

    ``configuration`` is None exactly if there are mistakes. If there are none, ``certificates``
    has an entry for each credential of a virtual host. ``files`` watches the files that were
    read, from before they were read: no later change is missed.
    """

    configuration: Configuration | None
    mistakes: list[Mistake]
    warnings: list[Mistake]
    certificates: dict[Credential, CertificateFacts]
    files: FileWatch
    #: The configuration file; "" if the configuration came from options.
    path: str = ""
    #: What the files of each virtual host's ``client_files`` hold.
    authorities: Mapping[ClientFiles, ClientAuthorities] = {}
    #: At a reload: certificates of a directory whose old version stays, and what is wrong.
    kept: Sequence[tuple[Credential, str]] = ()
    #: Those of them whose key is not in its file any more.
    inherited: frozenset[Credential] = frozenset()
    #: The keys that are lent to other hosts.
    lent: Mapping[LentKey, LentFacts] = {}


class Served(NamedTuple):
    """What is served while a configuration is read for a reload."""

    certificates: Mapping[Credential, CertificateFacts]
    #: Whether the keyd that serves has their keys, and can hand them over.
    keyd_has_keys: bool


_NOTHING_SERVED = Served({}, keyd_has_keys=False)


class _Problem(BaseModel, defer_build=True):
    field: Literal["certificate", "key", "passphrase_file"]
    reason: str


class Answer(BaseModel, defer_build=True):
    """What ``keyd check`` found about one certificate and its key."""

    mistakes: list[_Problem]
    warnings: list[_Problem]
    chain: str | None
    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    reference: str | None
    subject: str
    names: tuple[str, ...]
    not_before: AwareDatetime | None = None
    not_after: AwareDatetime | None
    kind: str = ""
    own_key: str | None = None

    @model_validator(mode="after")
    def _mistakes_or_facts(self) -> Self:
        if not self.mistakes and self.facts() is None:
            raise ValueError("neither mistakes nor facts")
        return self

    def facts(self) -> CertificateFacts | None:
        if self.mistakes or not (self.chain and self.key_id and self.reference and self.not_after):
            return None
        key_id = bytes.fromhex(self.key_id)
        public = self.subject, self.names, self.not_after, self.kind
        return CertificateFacts(self.chain, key_id, self.reference, *public)


_ANSWERS = TypeAdapter(list[Answer])
#: For each virtual host its mistakes and its warnings, each a setting and a reason.
_HANDSHAKES = TypeAdapter(list[tuple[list[tuple[str, str]], list[tuple[str, str]]]])


def check(
    loaded: Loaded,
    keyd_check: Helper | None = None,
    handshake_check: Helper | None = None,
    timeout: float = _TIMEOUT_SECONDS,
    running: bool = False,
    before: Served = _NOTHING_SERVED,
    only_asked: bool = False,
) -> Checked:
    """Check that certificates and keys match and are valid now, and that handshakes are possible.

    Asks helpers, two of which may have been started ahead. Waits for each for up to ``timeout``
    seconds, and longer for many certificates or virtual hosts (``load_seconds``).
    ``running``: the instance itself checks, for a reload; ``before`` is what it serves. Then a bad
    certificate in a ``certificate_dir`` keeps its old version. ``only_asked``: nothing is to be
    started with it. Raises nothing: a helper that fails is a mistake too.
    """
    keyd_check = keyd_check or Helper(KEYD_CHECK)
    handshake_check = handshake_check or Helper(HANDSHAKE_CHECK)
    of_clients = Helper(CLIENT_AUTHORITIES) if loaded.client_files else None
    source = loaded.source
    mistakes, warnings = list(loaded.mistakes), list(loaded.warnings)
    certificates: dict[Credential, CertificateFacts] = {}
    kept: list[tuple[Credential, str]] = []
    inherited: set[Credential] = set()
    watched = [path for one in loaded.client_files for path in one.paths]
    watched += [path for key in loaded.lent for path in key.secrets]
    files = FileWatch.of(loaded.credentials, watched)
    whole = loaded.configuration
    of_tokens = settings(whole.keyd) if whole is not None else None
    try:
        # Each key is read and checked. Decrypting one may be made slow on purpose.
        answers = ask_keyd_check(
            keyd_check, list(loaded.credentials), timeout, of_tokens, _known_by_key(loaded)
        )
        for (credential, places), answer in zip(loaded.credentials.items(), answers, strict=True):
            first, *others = places
            also = _also(source, [place.removesuffix(".") for place in others])
            old = before.certificates.get(credential) if credential.directory is not None else None
            if answer.mistakes and old is not None:
                key_is_there = credential.key is None or answer.own_key == old.key_id.hex()
                if key_is_there or (before.keyd_has_keys and len(inherited) < MAX_HANDED):
                    if not key_is_there:
                        inherited.add(credential)
                    certificates[credential] = old
                    kept += [(credential, problem.reason) for problem in answer.mistakes]
                    continue
            for found, problems in ((mistakes, answer.mistakes), (warnings, answer.warnings)):
                found += [
                    source.mistake(setting(first, problem.field), problem.reason + also)
                    for problem in problems
                ]
            if (facts := answer.facts()) is not None:
                certificates[credential] = facts
    except Unanswered as error:
        reason = f"keys and certificates could not be checked by 'keyd check': {error}"
        mistakes.append(source.mistake("", reason)._replace(unknown=True))
    lent, wrong, doubtful = ask_about_lent_keys(loaded.lent, of_tokens, source, timeout)
    mistakes += wrong
    warnings += doubtful
    warnings += misnamed(loaded, certificates)
    warnings += misnamed_in_directories(loaded, certificates)
    mistakes += _of_one_kind(loaded, certificates)
    mistakes += _decrypted_for_others(loaded, certificates)
    mistakes += _decrypted_elsewhere(loaded, certificates)
    keys = {one: facts.key_id for one, facts in certificates.items()}
    warnings += own_pins(loaded, keys)
    mistakes += keys_for_both(
        loaded,
        keys,
        lambda vhost: _key_ids(vhost, certificates),
        {facts.key_id for facts in lent.values()},
    )
    mistakes += lent_with_its_own(whole, source, lent, lambda vhost: _key_ids(vhost, certificates))
    warnings += _recorded(loaded, certificates)
    authorities, wrong, doubtful = read_authorities(
        loaded.client_files, source, timeout, of_clients
    )
    mistakes += wrong
    warnings += doubtful
    try:
        tried = _try_handshakes(handshake_check, loaded, certificates, timeout)
        mistakes += tried[0]
        warnings += tried[1]
    except Unanswered as error:
        reason = f"it could not be tried whether a handshake is possible: {error}"
        mistakes.append(source.mistake("", reason)._replace(unknown=True))
    in_use = uids_in_use(loaded, running, only_asked)
    for found, more in zip((mistakes, warnings), in_use, strict=True):
        found += more
    configuration = None if mistakes else loaded.configuration
    return Checked(
        configuration,
        mistakes,
        warnings,
        certificates,
        files,
        source.path,
        authorities,
        kept,
        frozenset(inherited),
        lent,
    )


def ask_keyd_check(
    helper: Helper,
    credentials: Sequence[Credential],
    timeout: float = _TIMEOUT_SECONDS,
    of_tokens: Mapping[str, object] | None = None,
    known: Collection[Credential] = (),
) -> list[Answer]:
    """Have these files read and held against each other; an answer for each. Raises Unanswered.

    Tokens are asked for their keys where there are settings for them. Of those that are ``known``,
    peers know the key, and do not ask who has certified it.

    Waits for up to ``timeout`` seconds, and longer for many of them (``load_seconds``).
    """
    if not credentials:
        helper.dismiss()
        return []
    question = [
        {
            "certificate": str(credential.certificate),
            "key": credential.key and str(credential.key),
            "passphrase_file": credential.passphrase_file and str(credential.passphrase_file),
            "token": {"uri": credential.token, "settings": of_tokens}
            if credential.token and of_tokens
            else None,
            "known": credential in known,
        }
        for credential in credentials
    ]
    octets = helper.ask(question, timeout + load_seconds(credentials) / 2)
    try:
        answers = _ANSWERS.validate_json(octets)
    except ValidationError as error:
        raise Unanswered(f"not an answer: {_first_problem(error)}") from None
    if len(answers) != len(credentials):
        raise Unanswered(f"{len(answers)} answers to {len(credentials)} questions")
    return answers


def _known_by_key(loaded: Loaded) -> set[Credential]:
    """The certificates of tunnels, and of virtual hosts that know each client by its key.

    Where it is so at one end, it is so at the other. Before mistakes are mended, each may be one.
    """
    configuration = loaded.configuration
    if configuration is None:
        return set(loaded.credentials)
    known = {tunnel.credential for tunnel in configuration.tunnel if tunnel.credential is not None}
    others: set[Credential] = set()
    for vhost in configuration.vhost:
        by_key = vhost.client_certificates == "required" and vhost.client_ca is None
        (known if by_key else others).update(vhost.credentials.values())
    return known - others


def _of_one_kind(
    loaded: Loaded, certificates: Mapping[Credential, CertificateFacts]
) -> Iterator[Mistake]:
    """Mistakes of virtual hosts with two certificates of which OpenSSL would show only one."""
    vhosts = loaded.configuration.vhost if loaded.configuration is not None else ()
    for number, vhost in enumerate(vhosts):
        first: dict[str, str] = {}
        for place, credential in vhost.credentials.items():
            if (facts := certificates.get(credential)) is None:
                continue
            key = f"vhost[{number}].{place}certificate"
            if (other := first.setdefault(facts.kind, key)) != key:
                yield loaded.source.mistake(
                    key,
                    f"{credential.certificate} is for a key of the same kind ({facts.kind}) as "
                    f"{loaded.source.reference(other)}: there can be one of each kind",
                )


def _decrypted_for_others(
    loaded: Loaded, certificates: Mapping[Credential, CertificateFacts]
) -> Iterator[Mistake]:
    """Mistakes of virtual hosts whose RSA key exchange gives away what is another one's."""
    vhosts = loaded.configuration.vhost if loaded.configuration is not None else ()
    users: dict[bytes, list[int]] = {}
    if any(vhost.rsa_key_exchange for vhost in vhosts):
        for number, vhost in enumerate(vhosts):
            for key_id in _key_ids(vhost, certificates):
                users.setdefault(key_id, []).append(number)
    for number, vhost in enumerate(vhosts):
        if not vhost.rsa_key_exchange:
            continue
        shared = (users[key_id] for key_id in _key_ids(vhost, certificates, "RSA"))
        others = sorted({other for some in shared for other in some} - {number})
        if others:
            used = [loaded.source.reference(f"vhost[{other}]") for other in others]
            yield loaded.source.mistake(
                f"vhost[{number}].rsa_key_exchange",
                f"its key also signs for {some(used)}, whose recorded sessions whoever takes a "
                "worker over could then decrypt, too: give this virtual host a key of its own",
            )


def _decrypted_elsewhere(
    loaded: Loaded, certificates: Mapping[Credential, CertificateFacts]
) -> Iterator[Mistake]:
    """Mistakes of virtual hosts whose RSA key is not keyd's own, and is to decrypt."""
    for number, vhost in enumerate(loaded.configuration.vhost if loaded.configuration else ()):
        for one in vhost.credentials.values() if vhost.rsa_key_exchange else ():
            elsewhere = "in a token" if one.token else one.upstream and "another host's"
            if elsewhere and one in certificates and certificates[one].kind == "RSA":
                yield loaded.source.mistake(
                    f"vhost[{number}].rsa_key_exchange",
                    f"its key is {elsewhere}, which keyd has sign and never decrypt: leave it out",
                )


def _recorded(
    loaded: Loaded, certificates: Mapping[Credential, CertificateFacts]
) -> Iterator[Mistake]:
    """Warnings of virtual hosts whose recorded sessions can be read."""
    vhosts = loaded.configuration.vhost if loaded.configuration is not None else ()
    for number, vhost in enumerate(vhosts):
        if vhost.rsa_key_exchange and _key_ids(vhost, certificates, "RSA"):
            yield loaded.source.mistake(
                f"vhost[{number}].rsa_key_exchange",
                "is not forward-secret: whoever takes workers over reads recorded sessions of this "
                "key, one for each connection that they make. Leave it on only for clients that "
                "know nothing better",
            )


def _key_ids(
    vhost: VirtualHost, certificates: Mapping[Credential, CertificateFacts], kind: str = ""
) -> set[bytes]:
    """A virtual host's keys, or those of one kind."""
    own = [certificates[one] for one in vhost.credentials.values() if one in certificates]
    if vhost.certificate_dir is not None:
        own += [
            facts
            for credential, facts in certificates.items()
            if credential.directory == vhost.certificate_dir
        ]
    return {facts.key_id for facts in own if kind in ("", facts.kind)}


def _try_handshakes(
    helper: Helper,
    loaded: Loaded,
    certificates: Mapping[Credential, CertificateFacts],
    timeout: float,
) -> tuple[list[Mistake], list[Mistake]]:
    """The mistakes and the warnings that handshakes show. Raises Unanswered."""
    if loaded.configuration is None:
        helper.dismiss()
        return [], []
    vhosts = loaded.configuration.vhost
    places = [f"vhost[{number}]" for number in range(len(vhosts))]
    question: list[dict[str, object]] = [
        {"certificates": list(_shown(vhost, certificates)), "settings": vhost.tls}
        for vhost in vhosts
    ]
    for number, tunnel in enumerate(loaded.configuration.tunnel):
        facts = certificates.get(tunnel.credential) if tunnel.credential is not None else None
        if facts is not None:
            places.append(f"tunnel[{number}]")
            question.append({"certificates": [_as_shown("", str(tunnel.certificate), facts)]})
    octets = helper.ask(question, timeout + max(len(places), load_seconds(certificates)) / 2)
    try:
        answers = _HANDSHAKES.validate_json(octets)
    except ValidationError as error:
        raise Unanswered(f"not an answer: {_first_problem(error)}") from None
    if len(answers) != len(places):
        raise Unanswered(f"{len(answers)} answers to {len(places)} questions")
    by_place = dict(zip(places, answers, strict=True))
    return (
        _for_all_alike(loaded.source, {place: wrong for place, (wrong, _) in by_place.items()}),
        _for_all_alike(loaded.source, {place: doubt for place, (_, doubt) in by_place.items()}),
    )


def _shown(
    vhost: VirtualHost, certificates: Mapping[Credential, CertificateFacts]
) -> Iterator[dict[str, str]]:
    """The certificates of a virtual host that nothing is wrong with, for a handshake check."""
    for place, credential in vhost.credentials.items():
        if (facts := certificates.get(credential)) is not None:
            yield _as_shown(place, str(credential.certificate), facts)
    for credential, facts in certificates.items():
        if vhost.certificate_dir is not None and credential.directory == vhost.certificate_dir:
            yield {
                "setting": "certificate_dir",
                "file": str(credential.certificate),
                "chain": facts.chain,
                "reference": facts.reference,
            }


def _as_shown(place: str, file: str, facts: CertificateFacts) -> dict[str, str]:
    return {
        "setting": f"{place}certificate",
        "file": file,
        "chain": facts.chain,
        "reference": facts.reference,
    }


def _for_all_alike(source: Source, found: Mapping[str, Sequence[tuple[str, str]]]) -> list[Mistake]:
    """One line for each problem, even if many virtual hosts have it. ``found`` is by place."""
    alike: dict[tuple[str, str], list[str]] = {}
    for place, problems in found.items():
        for problem in problems:
            alike.setdefault(problem, []).append(place)
    return [
        source.mistake(f"{first}.{setting}", reason + _also(source, others))
        for (setting, reason), (first, *others) in alike.items()
    ]


def _also(source: Source, vhosts: Sequence[str]) -> str:
    """The other virtual hosts that a mistake concerns, as the end of its message."""
    return f" (also {some(list(map(source.reference, vhosts)))})" if vhosts else ""


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    return f"{problem['loc']}, {problem['msg']}"
