"""Answers ``keyd check``: certificates, keys, and whether they belong together.

Runs in that short-lived process, for titus-py: JSON in, JSON out. It reads all files first, and has
the processes of tokens started, and then is confined: what is in a certificate may be somebody
else's choice.
"""

import datetime
from collections.abc import Sequence
from typing import Any

import prctl

from keyd.certificates import Findings, KeyFiles, Problem, examine
from keyd.keys import read_ahead
from keyd.parsing import confine_parser
from keyd.reference import key_id, public_key_of, reference_pem
from keyd.system_calls import ASKING_TOKENS

__all__ = ["answer"]


def answer(question: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each entry, ``certificates.Findings``; ``token`` is its key's URI, and the settings."""
    now = datetime.datetime.now(datetime.UTC)
    in_tokens = [entry.pop("token", None) for entry in question]
    asked = [KeyFiles(**entry) for entry in question]
    read = read_ahead(path for files in asked for path in files.paths)
    proof = None
    if any(in_tokens):
        # Imported here: most configurations have no token.
        from keyd.token.proving import Proof

        proof = Proof(in_tokens)
    # Its memory is locked, and that to come as well.
    confine_parser({prctl.CAP_IPC_LOCK}, ASKING_TOKENS if proof else None)
    findings = [examine(files, now, read) for files in asked]
    if proof is not None:
        references = [found.reference for found in findings]
        said = proof.of([reference and public_key_of(reference) for reference in references])
        for found, (mistake, warning) in zip(findings, said, strict=True):
            _add(found, mistake, warning)
        for number, files in enumerate(asked):
            public = proof.public_key(number) if files.certificate is None else None
            if public is not None:
                own_key, reference = key_id(public).hex(), reference_pem(public).decode()
                findings[number] = findings[number]._replace(own_key=own_key, reference=reference)
    return [
        found._asdict()
        | {
            "mistakes": [problem._asdict() for problem in found.mistakes],
            "warnings": [problem._asdict() for problem in found.warnings],
        }
        for found in findings
    ]


def _add(found: Findings, mistake: str, warning: str) -> None:
    if mistake:
        found.mistakes.append(Problem("key", mistake))
    if warning:
        found.warnings.append(Problem("key", warning))
