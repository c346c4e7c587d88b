"""Reads whom client certificates are trusted from, and the lists of revoked ones.

A short-lived child of ``check``, so that neither the supervisor nor ``titus-py check`` reads files
in which somebody may have left a key. It passes on certificates and lists, and nothing else of the
files. It trusts the supervisor, and knows nothing of any client but numbers.

Standard input is JSON, and so is standard output. Without an argument: a list of questions, and a
list of answers (``_answer``). With the argument ``revoked``: which of some certificates are revoked
(``_revoked``).
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from keyd.chain import UNREADABLE, name_of
from keyd.keys import Read, UnusableKey, read_ahead, why_binary
from keyd.parsing import confine_parser
from keyd.pem import Damaged, blocks
from titus_py.worker.certificate_facts import name_id, public_key_id

__all__ = ["main"]

#: How long before an authority's certificate, or a list of revoked ones, expires to warn of it.
_WARNING = timedelta(days=7)

_Found = TypeVar("_Found", x509.Certificate, x509.CertificateRevocationList)


class _Problem(NamedTuple):
    field: str
    reason: str


def main() -> int:
    """``python -m titus_py.fork_server.client_authorities [revoked]``."""
    question = json.load(sys.stdin)
    if sys.argv[1:] == ["revoked"]:
        confine_parser()
        answer: object = _revoked(question["lists"], question["certificates"])
    else:
        now = datetime.now(UTC)
        asked = [(one["ca"], one["crl"], one["whose"]) for one in question]
        read = read_ahead(path for *files, _ in asked for path in files if path is not None)
        confine_parser()
        answer = [_answer(ca, crl, whose, now, read) for ca, crl, whose in asked]
    json.dump(answer, sys.stdout)
    return 0


def _answer(ca: str, crl: str | None, whose: str, now: datetime, read: Read) -> dict[str, Any]:
    """What is in the two files, and what is wrong with them.

    ``whose`` certificates are trusted by them: "clients", "servers"; "system" for those of servers,
    where the file is the system's, which somebody else keeps.
    """
    mistakes: list[_Problem] = []
    warnings: list[_Problem] = []
    authorities: list[x509.Certificate] = []
    lists: list[x509.CertificateRevocationList] = []
    keys: list[str] = []
    try:
        authorities = _read(read, "client_ca", ca, "CERTIFICATE", x509.load_pem_x509_certificate)
        if whose != "system":
            doubts = _doubts(ca, authorities, whose, now)
            warnings += [_Problem("client_ca", doubt) for doubt in doubts]
        keys = [public_key_id(one).hex() for one in authorities]
        if crl is not None:
            lists = _read(read, "client_crl", crl, "X509 CRL", x509.load_pem_x509_crl)
            warnings += [_Problem("client_crl", doubt) for doubt in _ageing(crl, lists, now)]
            mistakes += [
                _Problem("client_crl", f"{crl}: {reason}") for reason in _gaps(authorities, lists)
            ]
    except UnusableKey as error:
        mistakes.append(_Problem(error.field, error.reason))
    except UNREADABLE as error:
        mistakes.append(_Problem("client_ca", f"{ca}: a certificate cannot be used: {error}"))
    return {
        "mistakes": [problem._asdict() for problem in mistakes],
        "warnings": [problem._asdict() for problem in warnings],
        "authorities": _pem(authorities),
        "revocations": _pem(lists),
        "keys": keys,
        "not_after": min(
            (one.not_valid_after_utc.isoformat() for one in authorities), default=None
        ),
        "next_update": min(
            (one.next_update_utc.isoformat() for one in lists if one.next_update_utc is not None),
            default=None,
        ),
    }


def _read(
    read: Read, field: str, path: str, label: str, load: Callable[[bytes], _Found]
) -> list[_Found]:
    """What a file has under this label, at least one. Raises UnusableKey, also for a key."""
    found = []
    content = read(path, field)
    try:
        for block in blocks(content):
            if "PRIVATE KEY" in block.label:
                raise Damaged(block.line, "a private key, which nobody needs here: take it out")
            if block.label == label:
                try:
                    found.append(load(block.text))
                except UNREADABLE:
                    raise Damaged(block.line, f"a damaged {label}") from None
    except Damaged as error:
        raise UnusableKey(field, f"{path}:{error.line}: {error.reason}") from None
    if not found:
        command = "crl" if "CRL" in label else "x509"
        reason = why_binary(content, command, "-nokeys") or f"holds no PEM {label}"
        raise UnusableKey(field, f"{path} {reason}")
    return found


def _doubts(
    path: str, authorities: Sequence[x509.Certificate], whose: str, now: datetime
) -> Iterator[str]:
    """Certificates of authorities that are out of date, or soon will be, or are of none."""
    for one in authorities:
        what = f"{path}: {name_of(one)}"
        if one.not_valid_before_utc > now:
            yield f"{what} is not valid before {one.not_valid_before_utc:%Y-%m-%d}"
        ends = one.not_valid_after_utc
        yield from _end(what, ends, now, whose)
        if one.issuer != one.subject and not _is_authority(one):
            yield f"{what} is no authority, and stands for itself alone: have its issuer's here"


def _ageing(
    path: str, lists: Sequence[x509.CertificateRevocationList], now: datetime
) -> Iterator[str]:
    """Lists that are out of date, or soon will be."""
    for one in lists:
        if (ends := one.next_update_utc) is not None:
            what = f"{path}: the list of {one.issuer.rfc4514_string()}"
            yield from _end(what, ends, now, "clients")


def _end(what: str, ends: datetime, now: datetime, whose: str) -> Iterator[str]:
    if ends <= now:
        yield f"{what} expired on {ends:%Y-%m-%d}: its {whose} are refused: get the newer one"
    elif ends < now + _WARNING:
        when = f"{ends:%Y-%m-%d %H:%M} UTC"
        yield f"{what} expires on {when}: {whose} will be refused: get the newer one"


def _gaps(
    authorities: Sequence[x509.Certificate], lists: Sequence[x509.CertificateRevocationList]
) -> Iterator[str]:
    """Authorities whose certificates would all be refused for want of a list.

    OpenSSL wants a list for each certificate of a chain, the trusted one's included.
    """
    by_issuer = {name_id(one.issuer): one for one in lists}
    for authority in filter(_is_authority, authorities):
        own = by_issuer.get(name_id(authority.subject))
        if own is None:
            yield f"has no list of {name_of(authority)}: its clients would be refused: append it"
        elif not own.is_signature_valid(authority.public_key()):  # type: ignore[arg-type]
            yield f"the list of {name_of(authority)} is not signed by it"
        if authority.issuer != authority.subject and name_id(authority.issuer) not in by_issuer:
            yield (
                f"has no list of {authority.issuer.rfc4514_string()}, the issuer of "
                f"{name_of(authority)}: its clients would be refused: append it"
            )


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    except x509.ExtensionNotFound:
        return certificate.issuer == certificate.subject
    return extension.value.ca


def _revoked(lists: str, certificates: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each of some certificates, an issuer's id and a number, is on one of these lists."""
    by_issuer: dict[str, list[x509.CertificateRevocationList]] = {}
    for block in blocks(lists.encode()):
        one = x509.load_pem_x509_crl(block.text)
        by_issuer.setdefault(name_id(one.issuer).hex(), []).append(one)
    return [
        any(
            one.get_revoked_certificate_by_serial_number(int(number, 16)) is not None
            for one in by_issuer.get(issuer, ())
        )
        for issuer, number in certificates
    ]


def _pem(found: Sequence[x509.Certificate] | Sequence[x509.CertificateRevocationList]) -> str:
    return "".join(one.public_bytes(Encoding.PEM).decode() for one in found)


if __name__ == "__main__":
    sys.exit(main())
