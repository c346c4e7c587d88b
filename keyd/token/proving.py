"""Whether the keys of a configuration are in their tokens, and those of their certificates.

Runs in ``keyd check``. It starts the processes that keyd would start, while it still may, and hears
them once it is confined. They end with it.
"""

from collections.abc import Sequence
from typing import Any

from keyd.token.keys import PublicKey, Token, TokenKey, hear_first, rehearse_verifying
from keyd.token.starting import Settings, start
from keyd.token.uri import BadUri, parse

__all__ = ["Proof"]


class Proof:
    """``asked`` are, for each certificate, None, or its key's ``uri`` and the ``settings``.

    All that is asked of one token, one process is asked: a wrong PIN is tried once.
    """

    def __init__(self, asked: Sequence[dict[str, Any] | None]) -> None:
        self._tokens: list[Token] = []
        #: By number of the certificate.
        self._keys: dict[int, tuple[Token, TokenKey]] = {}
        self._failure = ""
        self._asked = [number for number, one in enumerate(asked) if one]
        told = [one for one in asked if one]
        rehearse_verifying()
        try:
            uris = [parse(one["uri"]) for one in told]
            settings = Settings.from_json(told[0]["settings"])
            self._tokens = start([(uri, None) for uri in uris], settings)
        except (BadUri, OSError) as error:
            self._failure = f"its token cannot be asked: {error}"
            return
        places: dict[tuple[str | None, ...], list[int]] = {}
        for number, uri in zip(self._asked, uris, strict=True):
            places.setdefault(uri.place, []).append(number)
        for token, numbers in zip(self._tokens, places.values(), strict=True):
            for number, key in zip(numbers, token.keys, strict=True):
                self._keys[number] = token, key

    def of(self, public_keys: Sequence[PublicKey | str | None]) -> list[tuple[str, str]]:
        """For each certificate, whose public key this is: a mistake and a warning, or nothing.

        A token that is not there now is no mistake: it is served once it is.
        """
        for number, (_, key) in self._keys.items():
            public = public_keys[number]
            if isinstance(public, PublicKey):
                key.public = public
        hear_first(self._tokens)
        return [self._said(number) for number in range(len(public_keys))]

    def public_key(self, number: int) -> PublicKey | None:
        """What the token has said that it is, once ``of`` has been called."""
        found = self._keys.get(number)
        return found[1].public if found is not None else None

    def _said(self, number: int) -> tuple[str, str]:
        if number not in self._keys:
            return self._failure if number in self._asked else "", ""
        token, key = self._keys[number]
        if token.down and token.lasting:
            return f"{token.name} {token.down}", ""
        if token.down:
            return "", f"{token.name} {token.down}: served once it can be"
        return f"{token.name}: {key.name} {key.unusable}" if key.unusable else "", ""
