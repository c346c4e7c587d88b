"""Another host's keyd, as far as keyd's messages go: it lends keys, on a unix socket."""

import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from keyd.powers import Client, PrivateKey, perform
from keyd.protocol import Reply, Status
from keyd.reference import key_id
from keyd.transcript import Witnessed
from keyd.upstream.messages import (
    MAX_FROM_BORROWER_OCTETS,
    Answer,
    Ask,
    Assembler,
    Greeting,
    decode_from_borrower,
)

__all__ = ["Lender", "lending"]


class Lender:
    """It judges what it is asked, and signs it."""

    def __init__(self, path: Path, keys: Iterable[PrivateKey]) -> None:
        self._keys = {key_id(key.public_key()): key for key in keys}
        self.signed = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o666)
        self._listener.listen()
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        threads = []
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threads.append(threading.Thread(target=self._serve, args=(connection,)))
                threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        assembler = Assembler(MAX_FROM_BORROWER_OCTETS)
        with connection, suppress(OSError):
            connection.sendall(Greeting(frozenset(self._keys)).encode())
            while piece := connection.recv(65536):
                assembler.add(piece)
                for message in assembler.messages():
                    ask = decode_from_borrower(message)
                    if ask is None:
                        continue
                    connection.sendall(Answer(ask.id, self._signed(ask)).encode())

    def _signed(self, ask: Ask) -> Reply:
        witnessed = Witnessed(ask.client_hello)
        transcript_hash = None
        if ask.request.messages:
            transcript_hash = witnessed.transcript_hash(ask.request.messages)
        client, request = Client(witnessed.hello, transcript_hash), ask.request
        key = self._keys[request.key]
        result = perform(
            request.operation, key, request.parameter, request.payload, ask.powers, client
        )
        assert isinstance(result, bytes)
        self.signed += 1
        return Reply(Status.DONE, result)


@contextmanager
def lending(path: Path, keys: Iterable[PrivateKey]) -> Iterator[Lender]:
    """Until the end, also of its connections."""
    with closing(Lender(path, keys)) as lender:
        try:
            yield lender
        finally:
            path.unlink()
