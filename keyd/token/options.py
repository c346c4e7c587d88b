"""What a keyd of its own is told of keys in tokens by its options, and starting their processes.

Run by ``keyd listen`` and ``keyd control``, before they read a key. What they start is ``keyd
token``.
"""

import argparse
import os
from collections.abc import Callable

from keyd.linux import seccomp
from keyd.system_calls import NOT_FOR_MODULES, unknown_to_modules
from keyd.token.keys import Token, TokenKey, rehearse_verifying
from keyd.token.starting import Settings, user_named
from keyd.token.starting import start as start_processes
from keyd.token.uri import SCHEME, BadUri, KeyUri, parse
from keyd.words import say

__all__ = ["SCHEME", "pin_files", "start"]


def pin_files(arguments: argparse.Namespace) -> frozenset[str]:
    """The files of the tokens' PINs; raises LookupError for a mistake."""
    return frozenset(uri.pin_file for uri in _uris(arguments) if uri.pin_file is not None)


def _uris(arguments: argparse.Namespace) -> list[KeyUri]:
    uris = []
    for text in arguments.key:
        if text.startswith(SCHEME):
            try:
                uris.append(parse(text))
            except BadUri as error:
                # Without its query, which may have a PIN in it that does not belong there.
                raise LookupError(f"--key {text.partition('?')[0]} {error}") from None
    return uris


def start(arguments: argparse.Namespace, found: Callable[[TokenKey], None]) -> list[Token]:
    """Start the processes of the tokens whose keys are named; raises LookupError for a mistake.

    ``found`` gets each key that can be used from then on.
    """
    uris = _uris(arguments)
    if not uris:
        return []
    user = None
    if os.geteuid() == 0:
        if arguments.token_user is None:
            raise LookupError("a key in a token, and no --token-user for the vendor's module")
        user = user_named(arguments.token_user)
    environment = dict(variable.partition("=")[::2] for variable in arguments.token_environment)
    failing = unknown_to_modules(arguments.token_network)
    program = seccomp.build_forbidding(NOT_FOR_MODULES, failing).hex()
    paths = tuple(arguments.token_path)
    settings = Settings(user, paths, environment, arguments.token_network, program, True)
    rehearse_verifying()
    try:
        return start_processes([(uri, None) for uri in uris], settings, say, found)
    except BadUri as error:
        raise LookupError(f"--key: a URI {error}") from None
