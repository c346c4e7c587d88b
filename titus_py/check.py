"""Checking a configuration to the end: also what only the keys' own process may look at.

Runs in the supervisor (root) and in ``titus-py check``. Neither may hold a private key or
load a TLS library, so a short-lived child, ``keyd check``, reads the keys and
certificates. Its answer is trusted as keyd is, once it has the right form.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AwareDatetime, BaseModel, Field, TypeAdapter, ValidationError, model_validator

from titus_py.configuration import Configuration, Credential, Loaded, Mistake, load, printable

__all__ = ["CertificateFacts", "Checked", "check", "check_main", "report"]

#: Isolated: neither the working directory nor the environment decides what reads the keys.
_KEYD_CHECK = (sys.executable, "-I", "-m", "keyd", "check")
_CIPHER_CHECK = (sys.executable, "-I", "-m", "titus_py.cipher_check")
_TIMEOUT_SECONDS = 30.0


class CertificateFacts(NamedTuple):
    """What is public about a certificate whose key was found to belong to it."""

    key_id: bytes  #: SHA-256 of the SubjectPublicKeyInfo, 32 octets
    reference: str  #: the reference file, PEM, that stands for the key (``keyd.reference``)
    subject: str  #: RFC 4514
    names: tuple[str, ...]  #: DNS names and IP addresses of the subjectAltName
    not_after: datetime


class Checked(NamedTuple):
    """A configuration that can be served, or every mistake in it.

    ``configuration`` is None exactly if there are mistakes; if there are none, ``certificates``
    has an entry for each virtual host's ``credential``.
    """

    configuration: Configuration | None
    mistakes: list[Mistake]
    warnings: list[Mistake]
    certificates: dict[Credential, CertificateFacts]


class _Problem(BaseModel):
    field: Literal["certificate", "key", "passphrase_file"]
    reason: str


class _Answer(BaseModel):
    mistakes: list[_Problem]
    warnings: list[_Problem]
    key_id: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    reference: str | None
    subject: str
    names: tuple[str, ...]
    not_after: AwareDatetime | None

    @model_validator(mode="after")
    def _mistakes_or_facts(self) -> Self:
        if not self.mistakes and self.facts() is None:
            raise ValueError("neither mistakes nor facts")
        return self

    def facts(self) -> CertificateFacts | None:
        if self.mistakes or not (self.key_id and self.reference and self.not_after):
            return None
        key_id = bytes.fromhex(self.key_id)
        return CertificateFacts(key_id, self.reference, self.subject, self.names, self.not_after)


_ANSWERS = TypeAdapter(list[_Answer])
_PROBLEMS = TypeAdapter(list[tuple[str, str]])


class _Unanswered(Exception):
    """keyd's child failed; the text says how."""


def check(
    loaded: Loaded,
    command: Sequence[str] = _KEYD_CHECK,
    timeout: float = _TIMEOUT_SECONDS,
) -> Checked:
    """Hold every certificate and key of a configuration against each other and the clock.

    Asks a child process, and waits for it for up to ``timeout`` seconds. Raises nothing: a
    child that fails is a mistake too.
    """
    source = loaded.source
    mistakes, warnings = list(loaded.mistakes), list(loaded.warnings)
    certificates = {}
    try:
        answers = _ask(list(loaded.credentials), command, timeout)
        for (credential, vhosts), answer in zip(loaded.credentials.items(), answers, strict=True):
            first, *others = vhosts
            also = f" (also {', '.join(others)})" if others else ""
            for found, problems in ((mistakes, answer.mistakes), (warnings, answer.warnings)):
                found += [
                    source.mistake(f"{first}.{problem.field}", problem.reason + also)
                    for problem in problems
                ]
            if (facts := answer.facts()) is not None:
                certificates[credential] = facts
    except _Unanswered as error:
        reason = f"keys and certificates could not be checked by 'keyd check': {error}"
        mistakes.append(source.mistake("", reason))
    try:
        mistakes += [source.mistake(key, reason) for key, reason in _ask_ciphers(loaded, timeout)]
    except _Unanswered as error:
        mistakes.append(source.mistake("", f"cipher suites could not be checked: {error}"))
    configuration = None if mistakes else loaded.configuration
    return Checked(configuration, mistakes, warnings, certificates)


def report(checked: Checked) -> None:
    """Every mistake and warning to standard error, one a line."""
    for mistake in checked.mistakes:
        print(mistake, file=sys.stderr)
    for warning in checked.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def check_main(path: str | Path) -> int:
    """The command ``titus-py check``. Returns its exit code: 0, or 2 if there are mistakes."""
    checked = check(load(path))
    report(checked)
    if checked.configuration is None:
        return 2
    print(f"{printable(str(path))}: configuration is fine")
    return 0


def _ask(credentials: list[Credential], command: Sequence[str], timeout: float) -> list[_Answer]:
    if not credentials:
        return []
    question = [
        {field: path and str(path) for field, path in credential._asdict().items()}
        for credential in credentials
    ]
    octets = _ask_child(command, question, timeout)
    try:
        answers = _ANSWERS.validate_json(octets)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise _Unanswered(f"not an answer: {problem['loc']}, {problem['msg']}") from None
    if len(answers) != len(credentials):
        raise _Unanswered(f"{len(answers)} answers to {len(credentials)} questions")
    return answers


def _ask_ciphers(loaded: Loaded, timeout: float) -> list[tuple[str, str]]:
    """Each setting of cipher suites that OpenSSL does not understand, and why."""
    if loaded.configuration is None:
        return []
    question = [
        (f"vhost[{number}].{key}", names)
        for number, vhost in enumerate(loaded.configuration.vhost)
        for key, names in (("ciphers", vhost.ciphers), ("ciphersuites", vhost.ciphersuites))
        if names is not None
    ]
    if not question:
        return []
    try:
        return _PROBLEMS.validate_json(_ask_child(_CIPHER_CHECK, question, timeout))
    except ValidationError as error:
        raise _Unanswered(f"not an answer: {error}") from None


def _ask_child(command: Sequence[str], question: object, timeout: float) -> bytes:
    """JSON to its standard input; what it writes to its standard output."""
    try:
        child = subprocess.run(
            command,
            input=json.dumps(question).encode(),
            capture_output=True,
            timeout=timeout,
            env={},  # Above all no OPENSSL_CONF, which could have it load anything.
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _Unanswered(f"no answer within {timeout:g} s") from None
    except OSError as error:
        raise _Unanswered(f"{command[0]}: {error.strerror}") from None
    if child.returncode:
        last_words = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        code = child.returncode
        ending = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
        raise _Unanswered(f"{ending}: {last_words or 'no message'}")
    return child.stdout
