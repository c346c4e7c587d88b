"""The URI of a key in a token (RFC 7512), parsed strictly.

Run by keyd, by ``keyd check`` and by the supervisor, which only wants to know whether it is one. It
is the administrator's: each mistake is named. A PIN does not belong into it.
"""

import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

__all__ = ["SCHEME", "BadUri", "KeyUri", "check_module", "parse"]

SCHEME = "pkcs11:"
#: RFC 7512 §2.3: what a value of the path, and one of the query, may have in it.
_VALUE = re.compile(r"(?:[A-Za-z0-9._~:\[\]@!$'()*+,=&-]|%[0-9A-Fa-f]{2})*", re.ASCII)
_QUERY_VALUE = re.compile(r"(?:[A-Za-z0-9._~:\[\]@!$'()*+,=/?|-]|%[0-9A-Fa-f]{2})*", re.ASCII)
#: What may tell tokens, and keys in a token, apart.
_OF_TOKEN = ("token", "manufacturer", "model", "serial")
_OF_KEY = ("object", "id")
_MAX_CHARACTERS = 2000


class BadUri(ValueError):
    """A URI that cannot be used; the text says why, without any PIN that it has."""


class KeyUri(NamedTuple):
    """A private key in a token. What is None was left out, and matches anything."""

    token: str | None
    manufacturer: str | None
    model: str | None
    serial: str | None
    #: The key's label (CKA_LABEL) and its CKA_ID.
    object: str | None
    id: bytes | None
    #: Absolute paths: the module (a shared object), and the file with the PIN in its first line.
    module_path: str
    pin_file: str | None

    @property
    def place(self) -> tuple[str | None, ...]:
        """The token, and how it is reached: keys with the same place are in one process."""
        return (*self[:4], self.module_path, self.pin_file)

    @property
    def token_name(self) -> str:
        """The token in a few words, for people."""
        return next(filter(None, (self.token, self.serial, self.model, self.manufacturer)), "")

    @property
    def key_name(self) -> str:
        """The key in a few words, for people."""
        return self.object if self.object is not None else f"id {(self.id or b'').hex()}"


def parse(uri: str) -> KeyUri:
    """Parse the URI of a private key; raises BadUri."""
    if not uri.startswith(SCHEME):
        raise BadUri(f"does not begin with {SCHEME}")
    if len(uri) > _MAX_CHARACTERS:
        raise BadUri(f"is longer than {_MAX_CHARACTERS} characters")
    path, question_mark, query = uri.removeprefix(SCHEME).partition("?")
    if re.search(r"(^|[;&?])pin-value=", uri):
        raise BadUri("has a PIN in it (pin-value): put it into a file, and name that (pin-source)")
    found = dict(_attributes(path, ";", _VALUE))
    for name in found:
        if name not in (*_OF_TOKEN, *_OF_KEY, "type"):
            raise BadUri(f"has {name}=, which does not name a key: {_known(_OF_TOKEN, _OF_KEY)} do")
    if found.get("type", b"private") != b"private":
        raise BadUri("has a type= that is not private")
    asked = dict(_attributes(query, "&", _QUERY_VALUE)) if question_mark else {}
    for name in asked:
        if name not in ("module-path", "pin-source"):
            raise BadUri(f"has {name}=, which is not known here: module-path= and pin-source= are")
    if not any(name in found for name in _OF_TOKEN):
        raise BadUri(f"names no token: add token=, or another of {_known(_OF_TOKEN)}")
    if not any(name in found for name in _OF_KEY):
        raise BadUri("names no key in the token: add object= (its label) or id=")
    if "module-path" not in asked:
        raise BadUri("names no module: add ?module-path= with the path of the vendor's .so file")
    label = {name: _text(name, found[name]) for name in (*_OF_TOKEN, "object") if name in found}
    return KeyUri(
        token=label.get("token"),
        manufacturer=label.get("manufacturer"),
        model=label.get("model"),
        serial=label.get("serial"),
        object=label.get("object"),
        id=found.get("id"),
        module_path=_absolute("module-path", _text("module-path", asked["module-path"])),
        pin_file=_pin_file(asked.get("pin-source")),
    )


def check_module(path: str) -> None:
    """Raises BadUri for a module that somebody other than root could have changed."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise BadUri(f"has module-path={path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise BadUri(f"has module-path={path}, which is no regular file")
    if found.st_uid != 0 or found.st_mode & 0o022:
        raise BadUri(f"has module-path={path}, which others than root may write to")


def _attributes(text: str, separator: str, allowed: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    seen = set()
    for attribute in text.split(separator):
        name, equals, value = attribute.partition("=")
        if not equals or not re.fullmatch(r"[a-z][a-z-]*", name):
            raise BadUri(f"is not made of name=value, with '{separator}' between them")
        if name in seen:
            raise BadUri(f"has {name}= twice")
        seen.add(name)
        if not allowed.fullmatch(value):
            raise BadUri(f"has a character in {name}= that is to be written as %XX")
        octets = unquote_to_bytes(value)
        if not octets:
            raise BadUri(f"has an empty {name}=")
        yield name, octets


def _text(name: str, octets: bytes) -> str:
    try:
        text = octets.decode()
    except UnicodeDecodeError:
        raise BadUri(f"has a {name}= that is not UTF-8") from None
    if not text.isprintable():
        raise BadUri(f"has a {name}= with a character that cannot be printed")
    return text


def _absolute(name: str, path: str) -> str:
    if not path.startswith("/"):
        raise BadUri(f"has a {name}= that is not an absolute path")
    return path


def _pin_file(source: bytes | None) -> str | None:
    if source is None:
        return None
    text = _text("pin-source", source)
    if text.startswith("|"):
        raise BadUri("has a pin-source= that is a program: only a file is read, file:/path")
    return _absolute("pin-source", re.sub(r"^file:(//(?=/))?", "", text))


def _known(*names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}=" for group in names for name in group)
