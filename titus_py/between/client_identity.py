"""Who a client is, as its worker says: a message from the worker to the parent.

Encoding and decoding only, no I/O. The worker sends it before its ``Dial``, where its client has
shown a certificate that was accepted. It is the worker's claim: a worker that was taken over can
make up any. The parent decodes it strictly. Imported only where a virtual host asks for client
certificates, and in the supervisor.

    'I' spki(32) complete(1) links(1) certificate(2) names(2) known(2)
    links x (issuer(32) serial(20) spki(32))
    certificate, in DER
    names: kind(1) length(2) text
    known: which of the host's known clients it is, or 65535
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from titus_py.between.client_allow import Allow, Facts
from titus_py.between.messages import Malformed

if TYPE_CHECKING:
    from titus_py.between.known_client import KnownClient

__all__ = [
    "MAX_CERTIFICATE_OCTETS",
    "MAX_IDENTITY_OCTETS",
    "MAX_KNOWN",
    "MAX_LINKS",
    "MAX_NAMES_OCTETS",
    "ClientTerms",
    "Identity",
    "Link",
]

#: A longer certificate is left out: then it cannot be passed on to a backend.
MAX_CERTIFICATE_OCTETS = 16 * 1024
#: How many known clients a virtual host may have.
MAX_KNOWN = 4096
#: How many certificates of the chain there are at most, and how much room for all names.
MAX_LINKS = 8
MAX_NAMES_OCTETS = 8 * 1024
_HEAD = struct.Struct("!c32s?BHHH")
_NOBODY = 65535
_LINK = struct.Struct("!32s20s32s")
_NAME = struct.Struct("!cH")
_KINDS = {"dns": b"d", "uri": b"u", "cn": b"c"}
MAX_IDENTITY_OCTETS = (
    _HEAD.size + MAX_LINKS * _LINK.size + MAX_CERTIFICATE_OCTETS + MAX_NAMES_OCTETS
)


class ClientTerms(NamedTuple):
    """What a virtual host asks of client certificates."""

    required: bool
    #: Certificates that are trusted, and lists of revoked ones: PEM. Without any, the keys in
    #: ``allow`` are all that counts.
    authorities: str
    revocations: str
    #: The fields of ``client_allow.Allow``; None: every certificate of the authorities.
    allow: tuple[tuple[str, ...], ...] | None
    #: Those that it knows one by one. If there are any, ``allow`` has all that these have.
    known: "tuple[KnownClient, ...]" = ()

    @property
    def allowed(self) -> Allow | None:
        return None if self.allow is None else Allow.decode(self.allow)

    def with_texts(self, change: Callable[[Any], Any]) -> "ClientTerms":
        """The same with the texts that may be long changed: to their numbers, and back."""
        authorities, revocations = change(self.authorities), change(self.revocations)
        return self._replace(authorities=authorities, revocations=revocations)

    @classmethod
    def decode(cls, fields: list[Any]) -> "ClientTerms":
        """From the list that JSON makes of it."""
        terms = cls(*fields)
        allow = terms.allow
        known = tuple(_known_clients(terms.known)) if terms.known else ()
        return terms._replace(allow=allow and tuple(map(tuple, allow)), known=known)


class Link(NamedTuple):
    """One certificate of the chain that was verified."""

    #: Which issuer: SHA-256 of its name (``client_certificate.name_id``), 32 octets.
    issuer: bytes
    #: At most 20 octets (RFC 5280 §4.1.2.2).
    serial: int
    #: SHA-256 of the SubjectPublicKeyInfo, 32 octets.
    spki: bytes


class Identity(NamedTuple):
    """What the parent hears of a client's certificate."""

    facts: Facts
    #: The chain that was verified, from the client's own certificate to a trusted one.
    links: tuple[Link, ...]
    #: In DER; empty where it is longer than MAX_CERTIFICATE_OCTETS.
    certificate: bytes
    #: False where there are more names or links than a message holds.
    complete: bool = True
    #: The index of the client, in ``ClientTerms.known``.
    known: int | None = None

    @property
    def fits(self) -> bool:
        """Whether a message holds all of it."""
        held = Identity.decode(self.encode())
        return held.complete and bool(held.certificate)

    def encode(self) -> bytes:
        """The message; what does not fit into it is left out."""
        facts, complete = self.facts, self.complete
        links = b""
        for link in self.links:
            if not 0 <= link.serial < 1 << 160 or len(links) == MAX_LINKS * _LINK.size:
                complete = False
                break
            links += _LINK.pack(link.issuer, link.serial.to_bytes(20), link.spki)
        names = b""
        for kind, letter in _KINDS.items():
            for name in getattr(facts, kind):
                text = name.encode()
                if len(names) + _NAME.size + len(text) > MAX_NAMES_OCTETS:
                    complete = False
                    break
                names += _NAME.pack(letter, len(text)) + text
        certificate = self.certificate
        if len(certificate) > MAX_CERTIFICATE_OCTETS:
            certificate = b""
        spki = bytes.fromhex(facts.spki)
        count = len(links) // _LINK.size
        known = _NOBODY if self.known is None else self.known
        head = _HEAD.pack(b"I", spki, complete, count, len(certificate), len(names), known)
        return head + links + certificate + names

    @classmethod
    def decode(cls, message: bytes) -> "Identity":
        """For the parent, which does not trust the worker. Raises Malformed."""
        try:
            kind, spki, complete, count, certificate_octets, names_octets, known = (
                _HEAD.unpack_from(message)
            )
        except struct.error:
            raise Malformed(f"an identity of {len(message)} octets") from None
        places = [_HEAD.size, count * _LINK.size, certificate_octets, names_octets]
        if (
            kind != b"I"
            or message[33] > 1
            or count > MAX_LINKS
            or certificate_octets > MAX_CERTIFICATE_OCTETS
            or names_octets > MAX_NAMES_OCTETS
            or sum(places) != len(message)
        ):
            raise Malformed(f"an identity of {len(message)} octets, not {sum(places)}")
        links_end = places[0] + places[1]
        certificate_end = links_end + certificate_octets
        links = tuple(
            Link(issuer, int.from_bytes(serial), key)
            for issuer, serial, key in _LINK.iter_unpack(message[places[0] : links_end])
        )
        names = _names(message[certificate_end:])
        return cls(
            Facts(tuple(names[b"d"]), tuple(names[b"u"]), tuple(names[b"c"]), spki.hex()),
            links,
            message[links_end:certificate_end],
            complete,
            None if known == _NOBODY else known,
        )

    def claim(self) -> dict[str, Any]:
        """All but the certificate, as JSON values: for the supervisor (``from_claim``).

        And but ``known``, which is a number of the configuration that serves the client.
        """
        links = [[link.issuer.hex(), f"{link.serial:x}", link.spki.hex()] for link in self.links]
        return {"facts": self.facts, "links": links, "complete": self.complete}

    @classmethod
    def from_claim(cls, claim: dict[str, Any]) -> "Identity":
        """For the supervisor, which has checked the form of a claim (``child_events``)."""
        dns, uri, cn, spki = claim["facts"]
        links = tuple(
            Link(bytes.fromhex(issuer), int(serial, 16), bytes.fromhex(key))
            for issuer, serial, key in claim["links"]
        )
        return cls(Facts(tuple(dns), tuple(uri), tuple(cn), spki), links, b"", claim["complete"])


def _known_clients(fields: Iterable[Sequence[Any]]) -> "Iterator[KnownClient]":
    # Others do not need it in their memory.
    from titus_py.between.known_client import KnownClient

    return map(KnownClient.decode, fields)


def _names(octets: bytes) -> dict[bytes, list[str]]:
    """The names, by the letter of their kind. Raises Malformed."""
    names: dict[bytes, list[str]] = {letter: [] for letter in _KINDS.values()}
    while octets:
        try:
            letter, length = _NAME.unpack_from(octets)
            text = octets[_NAME.size : _NAME.size + length].decode()
        except (struct.error, UnicodeDecodeError):
            raise Malformed("an unreadable name in an identity") from None
        if letter not in names or len(octets) < _NAME.size + length:
            raise Malformed("a name that is cut off, or of an unknown kind, in an identity")
        names[letter].append(text)
        octets = octets[_NAME.size + length :]
    return names
