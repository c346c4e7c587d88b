"""Another host's program at a titus-py that lends keys, perhaps not the one that ought to be there.

It speaks the format by itself, so that it can say what no keyd of ours would.
"""

import os
import select
import subprocess
from pathlib import Path
from typing import Any, Self

from OpenSSL import SSL

from keyd.protocol import Operation, Power, Reply, Request, SignatureScheme
from keyd.upstream.messages import (
    HEARD,
    MAX_FROM_LENDER_OCTETS,
    Answer,
    Ask,
    Assembler,
    Greeting,
    decode_from_lender,
)

from .client_authority import ClientCertificate
from .hellos import certificate_verify, client_hello, flight
from .peers import TlsClient, Truncated

__all__ = ["Borrowing", "signing"]

_HELLO, _FLIGHT = client_hello(), flight()


def signing(key: bytes, number: int = 1, **changed: Any) -> Ask:
    """What is asked for a handshake of TLS 1.3, with a P-256 key."""
    request = Request(
        Operation.SIGN,
        SignatureScheme.ecdsa_secp256r1_sha256,
        key,
        certificate_verify(_HELLO, _FLIGHT),
        messages=_FLIGHT,
    )
    ask = Ask(number, 60_000, frozenset({Power.SIGN_TLS13}), _HELLO, request)
    return ask._replace(**changed)


class Borrowing:
    """A stream to a lender, from its TLS handshake on. Raises what a TlsClient raises."""

    def __init__(self, port: int, certificate: ClientCertificate, name: str = "localhost") -> None:
        files: tuple[Path, Path] = certificate.chain, certificate.key
        self.client = TlsClient(port, name, certificate=files)
        self._assembler = Assembler(MAX_FROM_LENDER_OCTETS)

    def begin(self) -> Greeting:
        self.client.handshake()
        greeting = self.hear()
        assert isinstance(greeting, Greeting)
        return greeting

    def hear(self) -> Greeting | Answer | None:
        """The next message; None at the end."""
        while True:
            for message in self._assembler.messages():
                return decode_from_lender(message)
            if not (octets := self.client.receive()):
                return None
            self._assembler.add(octets)

    def answer(self) -> Answer:
        """The next one: a lender that has been quiet repeats its greeting."""
        while isinstance(said := self.hear(), Greeting):
            continue
        assert said is not None
        return said

    def stay_until_it_ends(self, program: "subprocess.Popen[str]") -> None:
        """Say of each greeting that it was heard: a lender ends the stream of a silent borrower."""
        ended = os.pidfd_open(program.pid)
        try:
            while ended not in select.select([self.client.socket, ended], [], [])[0]:
                assert isinstance(self.hear(), Greeting)
                self.client.send(HEARD)
        finally:
            os.close(ended)

    def ends(self) -> bool:
        """Whether it ends, in one way or another, with nothing more than greetings before."""
        try:
            while isinstance(said := self.hear(), Greeting):
                continue
        except (SSL.Error, Truncated, ConnectionResetError, BrokenPipeError):
            return True
        return said is None

    def ask(self, ask: Ask) -> Reply:
        self.client.send(ask.encode())
        answer = self.answer()
        assert answer.id == ask.id
        return answer.reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.socket.close()
