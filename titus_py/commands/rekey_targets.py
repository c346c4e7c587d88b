"""Which certificates ``titus-py rekey`` is for, by name or by directory, and their files.

Run by the administrator, as root. The old keys are read by ``keyd check`` alone.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from titus_py.commands.replaced_pair import Place
from titus_py.configuration import Credential, Loaded
from titus_py.configuration.certificate_dir import Pair, pairs
from titus_py.configuration.checking import Answer, CertificateFacts, ask_keyd_check
from titus_py.configuration.exposure import open_directories
from titus_py.configuration.helper import KEYD_CHECK, Helper
from titus_py.configuration.mistake import nearest, os_reason

__all__ = ["Target", "find_targets", "is_directory", "place_of", "selected"]


class Target(NamedTuple):
    """A certificate with its key, and what is public about it."""

    certificate: Path
    key: Path
    passphrase_file: Path | None
    facts: CertificateFacts

    @property
    def name(self) -> str:
        """What people call it: its first name."""
        return self.facts.names[0] if self.facts.names else self.facts.subject

    @property
    def new_key(self) -> Path:
        return self.key.with_name(f"{self.key.stem}.new.key")

    @property
    def request(self) -> Path:
        return self.key.with_name(f"{self.key.stem}.new.csr")

    @property
    def new_certificate(self) -> Path:
        """Where the answer to the request is to be put."""
        return self.key.with_name(f"{self.key.stem}.new.crt")

    @property
    def place(self) -> Place:
        return place_of(self)


def is_directory(asked: str) -> bool:
    """Whether that is a directory rather than a name: a name has no slash."""
    return "/" in asked or asked in (".", "..")


def place_of(one: Credential | Target) -> Place:
    """Where the files are that it is made of. It has a key. Raises OSError."""
    if one.key is None:
        raise ValueError(f"{one.certificate} without a key")
    return Place.of(one.certificate, one.key)


def selected(asked: Sequence[str], loaded: Loaded | None, mistakes: list[str]) -> list[Credential]:
    """The files of the certificates that are asked for; what cannot be found is a mistake."""
    known = list(loaded.credentials) if loaded is not None else []
    found: dict[Credential, None] = {}
    names = [one for one in asked if not is_directory(one)]
    for directory in asked:
        if is_directory(directory):
            found.update(dict.fromkeys(_in_directory(Path(directory), known, mistakes)))
    if names and loaded is not None:
        found.update(dict.fromkeys(_by_name(names, loaded, mistakes)))
    for credential in found:
        if credential.token is not None:
            mistakes.append(
                f"{credential.certificate}: its key is in a token: make the new one there, with "
                "the vendor's tools"
            )
        elif credential.upstream:
            mistakes.append(
                f"{credential.certificate}: its key is another host's: make the new one there, and "
                "lend both until the new certificate is here"
            )
        elif credential.key is None:
            mistakes.append(
                f"{credential.certificate}: its key is in another keyd: make the new one where "
                "that has its files, by their directory"
            )
    # One pair may be asked for by several names, and by links that lead to it.
    by_place: dict[Place, Credential] = {}
    for credential in found:
        if credential.key is not None:
            try:
                by_place.setdefault(place_of(credential), credential)
            except OSError as error:
                mistakes.append(f"{credential.key}: {os_reason(error)}")
    return list(by_place.values())


def find_targets(
    chosen: Sequence[Credential], loaded: Loaded | None, mistakes: list[str]
) -> list[Target]:
    """The certificates with what ``keyd check`` says of them; every mistake in them is named.

    Raises Unanswered.
    """
    answers = ask_keyd_check(Helper(KEYD_CHECK), chosen)
    targets = []
    for credential, answer in zip(chosen, answers, strict=True):
        mistakes += [problem.reason for problem in answer.mistakes]
        facts = answer.facts()
        if facts is not None and credential.key is not None:
            files = credential.certificate, credential.key, credential.passphrase_file
            targets.append(Target(*files, facts))
    known = [one for one in loaded.credentials if one.key is not None] if loaded else []
    mistakes += _shared({*chosen, *known}, chosen)
    mistakes += _same_new_files(targets)
    # Root follows links and makes files there: another user could have it replace any file.
    passed: set[Path] = set()
    for target in targets:
        for path in (target.certificate, target.key):
            mistakes += open_directories(path, passed)
    return targets


def _in_directory(
    directory: Path, known: Iterable[Credential], mistakes: list[str]
) -> Iterator[Credential]:
    """The pairs of a directory, or the one pair that the directory is."""
    directory = Path(os.path.abspath(directory))
    try:
        found = pairs(directory)
        if itself := [
            one for one in pairs(directory.parent) if one.certificate.parent == directory
        ]:
            found = itself
    except OSError as error:
        mistakes.append(f"{directory}: {os_reason(error)}")
        return
    if not found:
        mistakes.append(
            f"{directory}: no certificates are in it: neither NAME/fullchain.pem with "
            "NAME/privkey.pem, nor NAME.pem"
        )
    for pair in found:
        yield _as_configured(pair, known)


def _as_configured(pair: Pair, known: Iterable[Credential]) -> Credential:
    """With the passphrase file that the configuration names for this key."""
    for credential in known:
        if credential.key == pair.key:
            return credential._replace(certificate=pair.certificate)
    return Credential(pair.certificate, pair.key, None)


def _by_name(names: Sequence[str], loaded: Loaded, mistakes: list[str]) -> Iterator[Credential]:
    """Those of the virtual hosts that take such a name, or else those that are for it."""
    by_name: dict[str, list[Credential]] = {}
    vhosts = loaded.configuration.vhost if loaded.configuration is not None else ()
    for vhost in vhosts:
        for name in vhost.sni or ():
            by_name.setdefault(name, []).extend(vhost.credentials.values())
    if any(name.lower() not in by_name for name in names):
        credentials = list(loaded.credentials)
        for credential, answer in zip(
            credentials, ask_keyd_check(Helper(KEYD_CHECK), credentials), strict=True
        ):
            for name in _names(answer):
                if credential not in by_name.setdefault(name, []):
                    by_name[name].append(credential)
    for name in names:
        if name.lower() in by_name:
            yield from by_name[name.lower()]
        else:
            meant = nearest(name.lower(), by_name)
            guess = f": did you mean {meant}?" if meant else " (a directory is written with a /)"
            mistakes.append(
                f"{name}: no virtual host takes this name, no certificate has it{guess}"
            )


def _names(answer: Answer) -> Iterator[str]:
    return (name.lower() for name in answer.names)


def _shared(known: Iterable[Credential], chosen: Sequence[Credential]) -> Iterator[str]:
    """Keys that have several certificates: the others would be without their key."""
    users: dict[Path, set[Path]] = {}
    for credential in known:
        with suppress(OSError):  # keyd check says of a file that it cannot be read
            place = place_of(credential)
            users.setdefault(place.key, set()).add(place.certificate)
    for credential in chosen:
        place = place_of(credential)
        for other in sorted(users[place.key] - {place.certificate}):
            yield (
                f"{credential.key} is also the key of {other}: give each certificate a key of its "
                "own first"
            )


def _same_new_files(targets: Iterable[Target]) -> Iterator[str]:
    """Two keys whose names differ in their ends alone, such as www.key and www.pem."""
    users: dict[Path, Target] = {}
    for target in targets:
        other = users.setdefault(target.new_key, target)
        if other is not target:
            yield f"{target.key} and {other.key} would both be replaced by {target.new_key}"
