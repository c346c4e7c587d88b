"""``titus-py rekey --install``: puts answered certificates and their new keys in place.

Run by the administrator, as root. Everything is checked before anything is changed; at every
moment each certificate fits its key (``replaced_pair``); and if the running instance refuses what
is new, the old pairs are put back.
"""

import glob
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from keyd.linux.sealed import sealed_file
from keyd.pem import blocks
from keyd.printable import printable
from titus_py.commands import whole_files
from titus_py.commands.progress import tracked
from titus_py.commands.rekey_targets import Target
from titus_py.commands.reload import reload
from titus_py.configuration import Credential
from titus_py.configuration.checking import Answer, CertificateFacts, ask_keyd_check
from titus_py.configuration.helper import KEYD_CHECK, Helper
from titus_py.configuration.mistake import os_reason
from titus_py.configuration.names import uncovered
from titus_py.supervisor.control_client import find_instances

__all__ = ["install", "say"]


class _Answered(NamedTuple):
    """A certificate that came back, with the pair that it is to replace."""

    target: Target
    facts: CertificateFacts

    @property
    def in_place(self) -> bool:
        """Whether an interrupted run has put it in place already."""
        return self.facts.chain == self.target.facts.chain


class _Kept(NamedTuple):
    """Where the old pair is kept."""

    certificate: Path
    key: Path


def say(text: str) -> None:
    print(printable(f"titus-py rekey: {text}"), file=sys.stderr)


def install(targets: Sequence[Target], mistakes: list[str], dry_run: bool, pid: int | None) -> int:
    """Put in place what was answered, and reload. Returns the exit code, as ``rekey`` does.

    Raises OSError and Unanswered before anything is changed.
    """
    answered = list(_answered(targets, mistakes))
    instances = find_instances()
    if pid is not None and pid not in instances:
        mistakes.append(f"no instance runs as process {pid}")
    elif pid is None and len(instances) > 1:
        mistakes.append(f"several instances are running, as {_listed(instances)}: say --pid")
    if not answered and not mistakes:
        mistakes.append("nothing to install: no certificate has come for a new key")
    for mistake in mistakes:
        say(mistake)
    if mistakes:
        return 2
    if dry_run:
        for one in answered:
            print(printable(f"{_described(one)}: would replace {one.target.certificate}"))
        return 0
    date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    kept: dict[_Answered, _Kept] = {}
    try:
        for one in tracked(answered, "Putting in place"):
            if not one.in_place:
                kept[one] = _keep(one.target, date)
                one.target.place.replace(one.target.new_certificate, one.target.new_key)
                _write_parts(one.target, one.facts.chain)
    except OSError as error:
        say(f"{error.filename or ''}: {os_reason(error)}")
        _undo(kept)
        return 1
    if instances and reload(pid):
        _undo(kept)
        return 1
    for one in answered:
        for path in (one.target.request, one.target.new_certificate, one.target.new_key):
            path.unlink(missing_ok=True)
        print(printable(_described(one) + _old(kept.get(one))))
    if not instances:
        say("no instance is running: they will be served from the next start on")
    return 0


def _answered(targets: Sequence[Target], mistakes: list[str]) -> Iterator[_Answered]:
    """The certificates that have come; those that do not fit are mistakes."""
    come = []
    for target in targets:
        if not target.new_key.exists():
            if target.new_certificate.exists():
                mistakes.append(f"{target.new_certificate}: there is no {target.new_key} for it")
        elif target.new_certificate.exists():
            links = [one for one in (target.new_certificate, target.new_key) if one.is_symlink()]
            mistakes += [f"{one}: is a symbolic link: put the file itself there" for one in links]
            if not links:
                come.append(target)
        else:
            say(f"{target.name}: passed over: its certificate is to be {target.new_certificate}")
    answers = ask_keyd_check(
        Helper(KEYD_CHECK),
        [Credential(one.new_certificate, one.new_key, one.passphrase_file) for one in come],
    )
    for target, answer in zip(come, answers, strict=True):
        found = [problem.reason for problem in answer.mistakes]
        facts = answer.facts()
        if facts is not None:
            found += _unfit(target, answer, facts)
        mistakes += found
        if facts is not None and not found:
            for problem in answer.warnings:
                say(f"warning: {problem.reason}")
            yield _Answered(target, facts)


def _unfit(target: Target, answer: Answer, facts: CertificateFacts) -> Iterator[str]:
    """Why a certificate that fits its key cannot take the old one's place."""
    now = datetime.now(UTC)
    if missing := uncovered(target.facts.names, facts.names):
        yield (
            f"{target.new_certificate} is not for {_listed(missing)}, as the old certificate is: "
            f"it is for {_listed(facts.names) or 'no name'}"
        )
    if answer.not_before is not None and answer.not_before > now:
        yield f"{target.new_certificate} is not valid before {answer.not_before:%Y-%m-%d %H:%M} UTC"
    if facts.not_after < now:
        yield f"{target.new_certificate} expired on {facts.not_after:%Y-%m-%d}"


def _keep(target: Target, date: str) -> _Kept:
    """Give the old files dated names as well; raises OSError."""
    place = target.place
    return _Kept(_dated(place.certificate, date), _dated(place.key, date))


def _dated(path: Path, date: str) -> Path:
    """The file's dated name: one that an interrupted run has given it, or a new one."""
    for other in path.parent.glob(f"{glob.escape(path.name)}.*.old"):
        if other.samefile(path):
            return other
    number = 0
    while True:
        dated = path.with_name(f"{path.name}.{date}{f'-{number}' if number else ''}.old")
        try:
            whole_files.link(path, dated)
            return dated
        except FileExistsError:  # an interrupted run kept the same pair within the same second
            number += 1


def _undo(kept: dict[_Answered, _Kept]) -> None:
    """Put the old pairs back. The new keys, requests and certificates are where they were."""
    for one, old in kept.items():
        try:
            one.target.place.replace(*old)
            _write_parts(one.target, one.target.facts.chain)
        except OSError as error:
            say(f"{one.target.certificate}: not put back: {os_reason(error)}: it is kept as {old}")
            continue
        for path in set(old):
            path.unlink()
    if kept:
        say("the old certificates and keys are in place again")


def _write_parts(target: Target, chain: str) -> None:
    """Where certbot keeps the chain in two parts as well, write these."""
    if target.certificate.name != "fullchain.pem":
        return
    leaf, *others = [block.text for block in blocks(chain.encode())]
    for name, content in (("cert.pem", leaf), ("chain.pem", b"".join(others))):
        path = target.certificate.with_name(name)
        if path.exists():
            with open(sealed_file(name, content), "rb") as file:
                whole_files.copy([file.fileno()], path.resolve(), path.stat())


def _described(one: _Answered) -> str:
    until = f"{one.facts.not_after:%Y-%m-%d}"
    return f"{one.target.name}: a new key, and a certificate valid until {until}"


def _old(kept: _Kept | None) -> str:
    if kept is None:
        return ""
    return f"; the old ones are kept as {_listed(sorted(map(str, set(kept))))}"


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
