"""A client's handshake: what the parent has seen of it, and the hash that it leads to.

Run by keyd. The ClientHello comes from the parent, and is hostile in what it says. The messages
after it come from the worker, and may be an attacker's altogether: any of them, in any order. Only
hashes of the ClientHello are kept, so that a long one takes no room while its client is waited for.

RFC 8446 §4.4.1 (the transcript's hash), §4.1.3 (ServerHello, HelloRetryRequest).
"""

import hashlib

from keyd.client_hello import ClientHello, InvalidClientHello, read

__all__ = ["InvalidFlight", "SecondHelloDiffers", "Witnessed"]

_CLIENT_HELLO, _SERVER_HELLO, _MESSAGE_HASH = 1, 2, 254
_ENCRYPTED_EXTENSIONS, _CERTIFICATE, _CERTIFICATE_REQUEST = 8, 11, 13
_RETRIED = (_SERVER_HELLO, _CLIENT_HELLO)
_FLIGHTS = (
    (_SERVER_HELLO, _ENCRYPTED_EXTENSIONS, _CERTIFICATE),
    (_SERVER_HELLO, _ENCRYPTED_EXTENSIONS, _CERTIFICATE_REQUEST, _CERTIFICATE),
)
_MOST_MESSAGES = len(_RETRIED) + max(map(len, _FLIGHTS))
_HEADER_OCTETS = 4
#: Within a ServerHello, after its header: legacy_version, random, legacy_session_id's length.
_RANDOM = slice(_HEADER_OCTETS + 2, _HEADER_OCTETS + 2 + 32)
_SESSION_AT = _RANDOM.stop
#: The random of a ServerHello that is a HelloRetryRequest.
_RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
#: The cipher suites of RFC 8446 §B.4.
_HASHES = {
    b"\x13\x01": "sha256",
    b"\x13\x02": "sha384",
    b"\x13\x03": "sha256",
    b"\x13\x04": "sha256",
    b"\x13\x05": "sha256",
}


_HASH_NAMES = frozenset(_HASHES.values())


class InvalidFlight(ValueError):
    """Messages that no server of ours sends after this client's."""


class SecondHelloDiffers(ValueError):
    """The client's second ClientHello is not its first one's: it may be the client's doing."""


class Witnessed:
    """A ClientHello that the parent has seen. Raises InvalidClientHello."""

    __slots__ = ("_hashes", "hello")

    def __init__(self, message: bytes) -> None:
        self.hello: ClientHello = read(message)
        self._hashes = {name: hashlib.new(name, message) for name in _HASH_NAMES}

    def transcript_hash(self, flight: bytes) -> bytes:
        """The hash up to the Certificate, with which these messages end.

        Raises InvalidFlight, and SecondHelloDiffers.
        """
        messages = _split(flight)
        retried = _kinds(messages[:2]) == _RETRIED
        if _kinds(messages[2:] if retried else messages) not in _FLIGHTS:
            kinds = ", ".join(map(str, _kinds(messages)))
            raise InvalidFlight(f"handshake messages {kinds or 'without any'}")
        name = _hash_name(messages[0], retry=retried)
        transcript = self._hashes[name].copy()
        if retried:
            self._check_second_hello(messages[1])
            if _hash_name(messages[2], retry=False) != name:
                raise InvalidFlight("a ServerHello with another hash than the HelloRetryRequest's")
            first = transcript.digest()
            head = bytes((_MESSAGE_HASH, 0, 0, len(first)))
            transcript = hashlib.new(name, head + first)
        transcript.update(flight)
        return transcript.digest()

    def _check_second_hello(self, message: bytes) -> None:
        try:
            second = read(message)
        except InvalidClientHello as error:
            raise SecondHelloDiffers(f"a second message that is not read: {error}") from None
        if second != self.hello:
            raise SecondHelloDiffers("a second ClientHello with another random, name or version")


def _split(flight: bytes) -> list[bytes]:
    """Messages, each with its header."""
    messages: list[bytes] = []
    at = 0
    while at < len(flight) and len(messages) <= _MOST_MESSAGES:
        body = at + _HEADER_OCTETS
        end = body + int.from_bytes(flight[at + 1 : body], "big")
        if end > len(flight) or body > len(flight):
            raise InvalidFlight("a handshake message that is cut short")
        messages.append(flight[at:end])
        at = end
    return messages


def _kinds(messages: list[bytes]) -> tuple[int, ...]:
    return tuple(message[0] for message in messages)


def _hash_name(server_hello: bytes, retry: bool) -> str:
    """The hash of its cipher suite."""
    if (server_hello[_RANDOM] == _RETRY) is not retry:
        raise InvalidFlight("a HelloRetryRequest out of place, or none in its place")
    suite_at = _SESSION_AT + 1 + sum(server_hello[_SESSION_AT : _SESSION_AT + 1])
    suite = server_hello[suite_at : suite_at + 2]
    if suite not in _HASHES:
        raise InvalidFlight(f"a ServerHello with cipher suite 0x{suite.hex()}")
    return _HASHES[suite]
