"""Types for ``tables``: files and directories, as they may be written, and what there must be.

A key may also be in a token, by its URI, or on another host.
"""

import os
import re
import stat
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, PlainSerializer, PlainValidator, ValidationInfo

from keyd.token.uri import SCHEME, BadUri, check_module, parse
from titus_py.configuration.mistake import Source, Valid, described, os_reason, text_of

__all__ = [
    "UPSTREAM",
    "Directory",
    "EmptyDirectory",
    "File",
    "FilePath",
    "KeyPlace",
    "TokenUri",
    "Upstream",
    "directory_of",
    "readable_file",
]


#: What ``key`` says of a key that other hosts have. A file of this name is ``./upstream``.
UPSTREAM = "upstream"


class TokenUri(str):
    """The URI of a key in a token."""

    __slots__ = ()


class Upstream(str):
    """Stands for the place of a key that other hosts have."""

    __slots__ = ()


def directory_of(info: ValidationInfo) -> Path:
    """The directory of the configuration file: what its relative paths are relative to."""
    return info.context.directory if isinstance(info.context, Source) else Path.cwd()


def _path(value: object, info: ValidationInfo) -> Path:
    """A path, relative to the file's directory, or ``credential:`` and a credential's name."""
    text = text_of(value)
    if "-----BEGIN" in text or ("\n" in text and "PRIVATE" in text):
        # The value is not repeated: it would get into every log.
        raise ValueError(
            "expected a path, not what the file holds (if this is a private key, it has been in "
            "this file, and in the memory of a process that is to have none: replace it)"
        )
    if text.startswith("credential:"):
        return _credential_path(text.removeprefix("credential:"), info)
    if not text or "\0" in text:
        raise ValueError(f"expected a path, not {described(value)}")
    return directory_of(info) / text


def _credential_path(name: str, info: ValidationInfo) -> Path:
    """Where systemd has put a credential (systemd.exec(5), LoadCredential=)."""
    directory = info.context.credentials if isinstance(info.context, Source) else None
    if directory is None:
        raise ValueError(
            f"systemd passed no credentials, so there is none named {name!r}: see LoadCredential=; "
            "titus-py check takes --credentials /run/credentials/titus-py.service while that runs"
        )
    if not re.fullmatch(r"[A-Za-z0-9_.@:-]{1,255}", name) or name in (".", ".."):
        raise ValueError(f"{described(name)} is no credential's name")
    return Path(directory, name)


def _readable_file(path: Path, info: ValidationInfo) -> Path:
    if isinstance(info.context, Valid):
        return path
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{path}: {os_reason(error)}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: {'is a directory' if stat.S_ISDIR(mode) else 'is no file'}")
    if not os.access(path, os.R_OK, effective_ids=True):
        raise ValueError(f"{path}: permission denied")
    return path


def readable_file(value: object, info: ValidationInfo) -> Path:
    """For a setting that may be something else than a file's path. Raises ValueError."""
    return _readable_file(_path(value, info), info)


def _key(value: object, info: ValidationInfo) -> Path | TokenUri | Upstream:
    text = text_of(value)
    if text == UPSTREAM:
        return Upstream(text)
    if not text.startswith(SCHEME):
        return _readable_file(_path(value, info), info)
    try:
        uri = parse(text)
        if not isinstance(info.context, Valid):
            check_module(uri.module_path)
    except BadUri as error:
        # The value is not repeated: it may have a PIN in it.
        raise ValueError(f"the URI {error}") from None
    if uri.pin_file is not None:
        _readable_file(Path(uri.pin_file), info)
    return TokenUri(text)


def _readable_directory(path: Path, info: ValidationInfo) -> Path:
    if isinstance(info.context, Valid):
        return path
    try:
        os.listdir(path)
    except OSError as error:
        raise ValueError(f"{path}: {os_reason(error)}") from None
    return path


def _empty_directory(value: object, info: ValidationInfo) -> Path:
    path = value if isinstance(value, Path) else Path(text_of(value))
    if not path.is_absolute() or "\0" in str(path):
        raise ValueError("expected an absolute path")
    if isinstance(info.context, Valid):
        return path
    try:
        status = path.stat()
        entries = os.listdir(path)
    except FileNotFoundError:  # The supervisor makes it.
        return path
    except OSError as error:
        raise ValueError(f"{path}: {os_reason(error)}") from None
    if entries:
        raise ValueError(f"{path}: is not empty, and a worker must find nothing there")
    if status.st_uid != 0 or status.st_mode & 0o022:
        raise ValueError(f"{path}: others than root can write to it: chown root, chmod 755")
    return path


FilePath = Annotated[Path, PlainValidator(_path)]
File = Annotated[Path, PlainValidator(_path), AfterValidator(_readable_file)]
KeyPlace = Annotated[Path | TokenUri | Upstream, PlainValidator(_key), PlainSerializer(str)]
Directory = Annotated[Path, PlainValidator(_path), AfterValidator(_readable_directory)]
EmptyDirectory = Annotated[Path, PlainValidator(_empty_directory)]
