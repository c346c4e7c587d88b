"""Reads ``client_allow``: which client certificates a virtual host lets in.

Run by the supervisor and by commands. The values are the administrator's.
"""

import base64
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

from pydantic import PlainSerializer, PlainValidator

from titus_py.between.client_allow import Allow
from titus_py.configuration.address import host_name
from titus_py.configuration.mistake import described, nearest

__all__ = ["ClientAllow", "CommonNames", "DnsNames", "PublicKeys", "Uris", "public_key_pin"]

_EXAMPLE = '{ dns = ["*.example.org"] }'


def _client_allow(value: object) -> Allow | Literal["all"]:
    if value == "all":
        return "all"
    read: dict[str, tuple[str, ...]] = {}
    for kind, patterns in _table(value).items():
        if kind not in _PATTERNS:
            meant = nearest(kind.lower(), _PATTERNS)
            hint = f"did you mean {meant}?" if meant else f"known are {', '.join(_PATTERNS)}"
            raise ValueError(f"{kind} is nothing to go by: {hint}")
        read[kind] = _read(kind, patterns)
    if not any(read.values()):
        raise ValueError('it lets nobody in: name somebody, or say "all"')
    return Allow(**read)


def _read(kind: str, value: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(_PATTERNS[kind], _texts(kind, value))))


def _table(value: object) -> dict[str, object]:
    if isinstance(value, dict):
        return value
    raise ValueError(f'expected a table such as {_EXAMPLE}, or "all", not {described(value)}')


def _texts(kind: str, value: object) -> list[str]:
    if not (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)):
        raise ValueError(f"{kind}: expected a list of texts, not {described(value)}")
    if "" in value:
        raise ValueError(f"{kind}: an empty text is nobody's name")
    return list(value)


def _dns(text: str) -> str:
    star = "*." if text.startswith("*.") else ""
    if "*" in text.removeprefix(star):
        raise ValueError(
            f"dns: {described(text)}: a wildcard stands for one whole label at the front, "
            'as in "*.example.org"'
        )
    return star + host_name(text.removeprefix(star)).removesuffix(".")


def _uri(text: str) -> str:
    scheme, separator, rest = text.partition(":")
    segments = rest.split("/")
    if not (separator and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme)):
        raise ValueError(
            f'uri: {described(text)} is no URI, which begins with a scheme, as in "spiffe://"'
        )
    if not (text.isascii() and text.isprintable() and " " not in text):
        raise ValueError(f"uri: {described(text)}: a URI is of printable ASCII, without spaces")
    host = 2 if rest.startswith("//") else 0
    for number, segment in enumerate(segments):
        last = number == len(segments) - 1
        star = segment == "*" or (segment == "**" and last)
        if "*" in segment and not (star and number > host):
            raise ValueError(
                f'uri: {described(text)}: "*" stands for one whole segment of the path, "**" at '
                'the end for all that follow, as in "spiffe://example.org/**"'
            )
    return text


def public_key_pin(text: str) -> str:
    """A key as ``sha256:`` and hexadecimal or base64 has it: hexadecimal. Raises ValueError.

    It is the SHA-256 of the SubjectPublicKeyInfo (RFC 7469 §2.4).
    """
    algorithm, _, digest = text.partition(":")
    if algorithm == "sha256":
        if re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            return digest.lower()
        try:
            octets = base64.b64decode(digest, validate=True)
        except ValueError:  # also where it is not ASCII: the dots of an abridged example
            octets = b""
        if len(octets) == 32:
            return octets.hex()
    raise ValueError(
        f"{described(text)} is no public key's hash: expected sha256: and 64 hexadecimal digits, "
        "or base64, as 'titus-py keys pin FILE' says of a certificate"
    )


def _spki(text: str) -> str:
    try:
        return public_key_pin(text)
    except ValueError as error:
        raise ValueError(f"spki: {error}") from None


_PATTERNS: dict[str, Callable[[str], str]] = {
    "dns": _dns,
    "uri": _uri,
    "cn": lambda text: text,
    "spki": _spki,
}


def _as_in_a_file(allow: Allow | Literal["all"]) -> dict[str, list[str]] | str:
    if allow == "all" or not isinstance(allow, Allow):
        return "all"
    patterns = {kind: list(found) for kind, found in allow._asdict().items() if found}
    if "spki" in patterns:
        patterns["spki"] = [f"sha256:{digest}" for digest in patterns["spki"]]
    return patterns


ClientAllow = Annotated[
    Allow | Literal["all"], PlainValidator(_client_allow), PlainSerializer(_as_in_a_file)
]
_AsList = PlainSerializer(list)
#: Each kind on its own, as in a [[vhost.client]].
DnsNames = Annotated[tuple[str, ...], PlainValidator(partial(_read, "dns")), _AsList]
Uris = Annotated[tuple[str, ...], PlainValidator(partial(_read, "uri")), _AsList]
CommonNames = Annotated[tuple[str, ...], PlainValidator(partial(_read, "cn")), _AsList]
PublicKeys = Annotated[
    tuple[str, ...],
    PlainValidator(partial(_read, "spki")),
    PlainSerializer(lambda digests: [f"sha256:{digest}" for digest in digests]),
]
