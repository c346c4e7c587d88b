"""What clients may refuse about a certificate's chain, one line each.

Runs in the short-lived ``keyd check``. These are warnings, and keep no server from serving: the
server knows neither its clients nor the authorities that they trust.
"""

import datetime
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from keyd import mldsa

__all__ = ["UNREADABLE", "Located", "doubts", "name_of"]

#: What the library raises for a bad certificate: some of it only when a part of it is read.
UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
#: Warn of certificates that expire sooner than this.
_EXPIRY_WARNING = datetime.timedelta(days=21)


class Located(NamedTuple):
    """A certificate, and the number of the line in its file where it begins."""

    certificate: x509.Certificate
    line: int


def doubts(
    path: str, chain: Sequence[Located], now: datetime.datetime, known: bool = False
) -> Iterator[str]:
    """What clients may refuse about a chain that begins with the server's own certificate.

    ``known``: its peers know its key, and do not ask who has certified it.
    """
    leaf, *others = chain
    yield from _out_of_date(path, leaf.certificate, now)
    for other in others:
        what = f"{path}:{other.line}: the issuer's certificate, {name_of(other.certificate)},"
        yield from _out_of_date(what, other.certificate, now)
    yield from _broken_order(path, chain)
    if not known:
        yield from _unpopular_key(path, leaf.certificate)
        yield from _must_staple(path, leaf.certificate)
        yield from _dead_end(path, leaf.certificate, chain[-1].certificate)


def name_of(certificate: x509.Certificate) -> str:
    """The certificate's subject, as far as it can be read (RFC 4514)."""
    try:
        return certificate.subject.rfc4514_string() or "a certificate without a subject"
    except UNREADABLE:
        return "a certificate with an unreadable subject"


def _out_of_date(what: str, certificate: x509.Certificate, now: datetime.datetime) -> Iterator[str]:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if begins > now:
        yield f"{what} is not valid before {begins:%Y-%m-%d}"
    if ends < now:
        yield f"{what} expired on {ends:%Y-%m-%d}: renew it"
    elif ends < now + _EXPIRY_WARNING:
        yield f"{what} expires on {ends:%Y-%m-%d}: renew it"


def _unpopular_key(path: str, leaf: x509.Certificate) -> Iterator[str]:
    try:
        key = leaf.public_key()
    except UNREADABLE:  # reported elsewhere, as a mistake
        return
    kind = None
    if isinstance(key, ed25519.Ed25519PublicKey):
        kind = "an Ed25519"
    elif isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp521r1":
        kind = "a P-521"
    elif name := mldsa.parameter_set(key):
        kind = f"an {name}"
    if kind:
        yield f"{path} is for {kind} key, which browsers refuse: get one for a P-256 key"


def _must_staple(path: str, leaf: x509.Certificate) -> Iterator[str]:
    """A certificate that demands an answer of OCSP with it (RFC 7633), which no worker has."""
    try:
        features = leaf.extensions.get_extension_for_class(x509.TLSFeature).value
    except (x509.ExtensionNotFound, *UNREADABLE):
        return
    if x509.TLSFeatureType.status_request in features:
        yield (
            f"{path} has must-staple, and nothing is stapled: clients that heed it will refuse: "
            "get one without it"
        )


def _broken_order(path: str, chain: Sequence[Located]) -> Iterator[str]:
    """The first certificate that was not issued by the next one (RFC 5246 §7.4.2)."""
    remedy = "put each certificate before its issuer's, the server's own first"
    for this, following in itertools.pairwise(chain):
        if _issued(this.certificate, following.certificate):
            continue
        name = name_of(this.certificate)
        for other in chain:
            if other is not this and _issued(this.certificate, other.certificate):
                yield (
                    f"{path}: certificates in the wrong order: {name} is followed by line "
                    f"{following.line}, and was issued by line {other.line}: {remedy}"
                )
                return
        yield (
            f"{path}:{following.line}: {name_of(following.certificate)} is not the issuer of "
            f"the certificate before it, {name}: {remedy}, and leave out what is not of its chain"
        )
        return


def _dead_end(path: str, leaf: x509.Certificate, last: x509.Certificate) -> Iterator[str]:
    """A lone leaf that is self-signed, or that says where to get its issuer's certificate."""
    if last is not leaf:
        return
    if _issued(leaf, leaf):
        yield f"{path} is self-signed: clients accept it only where they have been given it"
    elif _names_its_issuers_place(leaf):
        yield (
            f"{path} has no certificate of its issuer, {leaf.issuer.rfc4514_string()}: clients "
            "that do not happen to know it will refuse: append it (the full chain)"
        )


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, TypeError, *UNREADABLE):
        return False
    return True


def _names_its_issuers_place(leaf: x509.Certificate) -> bool:
    """Whether a certificate says where to get its issuer's (RFC 5280 §4.2.2.1).

    Those of every public authority do, and those of few companies' own authorities.
    """
    try:
        access = leaf.extensions.get_extension_for_class(x509.AuthorityInformationAccess)
        leaf.issuer.rfc4514_string()
    except (x509.ExtensionNotFound, *UNREADABLE):
        return False
    method = x509.oid.AuthorityInformationAccessOID.CA_ISSUERS
    return any(description.access_method == method for description in access.value)
