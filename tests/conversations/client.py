"""A TLS client that says what it is told to, right or wrong, and shows what it gets.

Messages are put together here, octet by octet; records and cryptography are tlslite-ng's, which
has no code in common with OpenSSL. Only AES is not: in Python it would take a hundred times as
long. It checks no certificate.
"""

import socket
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from hashlib import sha256
from types import TracebackType
from typing import Any, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from integration.peers import connect
from tlslite.constants import CipherSuite, GroupName
from tlslite.errors import TLSAbruptCloseError
from tlslite.handshakehashes import HandshakeHashes
from tlslite.keyexchange import ECDHKeyExchange
from tlslite.mathtls import calc_key
from tlslite.messages import Message
from tlslite.recordlayer import RecordLayer
from tlslite.utils.cryptomath import HKDF_expand_label, derive_secret, getRandomBytes, secureHMAC

Version = tuple[int, int]
TLS12: Version = (3, 3)
TLS13: Version = (3, 4)
NAMES = {TLS12: "TLS 1.2", TLS13: "TLS 1.3"}
CCS, ALERT, HANDSHAKE, DATA = 20, 21, 22, 23


#: A ServerHello's random that makes it a HelloRetryRequest (RFC 8446 §4.1.3).
HELLO_RETRY_REQUEST = sha256(b"HelloRetryRequest").digest()


class Handshake(IntEnum):
    """RFC 8446 §4, RFC 5246 §7.4."""

    HELLO_REQUEST = 0
    CLIENT_HELLO = 1
    SERVER_HELLO = 2
    NEW_SESSION_TICKET = 4
    END_OF_EARLY_DATA = 5
    CERTIFICATE = 11
    SERVER_KEY_EXCHANGE = 12
    SERVER_HELLO_DONE = 14
    CERTIFICATE_VERIFY = 15
    CLIENT_KEY_EXCHANGE = 16
    FINISHED = 20
    KEY_UPDATE = 24
    MESSAGE_HASH = 254


class Extension(IntEnum):
    SERVER_NAME = 0
    MAX_FRAGMENT_LENGTH = 1
    STATUS_REQUEST = 5
    SUPPORTED_GROUPS = 10
    EC_POINT_FORMATS = 11
    SIGNATURE_ALGORITHMS = 13
    USE_SRTP = 14
    ALPN = 16
    PADDING = 21
    EXTENDED_MASTER_SECRET = 23
    PRE_SHARED_KEY = 41
    EARLY_DATA = 42
    SUPPORTED_VERSIONS = 43
    COOKIE = 44
    PSK_KEY_EXCHANGE_MODES = 45
    POST_HANDSHAKE_AUTH = 49
    SIGNATURE_ALGORITHMS_CERT = 50
    KEY_SHARE = 51
    GREASE = 0x7A7A
    RENEGOTIATION_INFO = 0xFF01


class Closed(Exception):
    """The other side has ended the connection."""


def vector(length_octets: int, content: bytes) -> bytes:
    return len(content).to_bytes(length_octets, "big") + content


def message(kind: int, body: bytes) -> bytes:
    return bytes((kind,)) + vector(3, body)


def in_pieces(octets: bytes, size: int) -> Iterable[bytes]:
    return (octets[start : start + size] for start in range(0, len(octets), size))


class _Segments:
    """A socket of which each send is a segment, of ``size`` octets at most where that is set."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self.size: int | None = None

    def send(self, octets: bytes) -> int:
        for piece in in_pieces(octets, self.size or len(octets)):
            self._socket.sendall(piece)
        return len(octets)

    def recv(self, length: int) -> bytes:
        return self._socket.recv(length)


class _AesGcm:
    """As tlslite-ng wants a cipher to be."""

    name, isAEAD, isBlockCipher, nonceLength, tagLength = "aes128gcm", True, False, 12, 16

    def __init__(self, key: bytearray) -> None:
        self._cipher = AESGCM(bytes(key))

    def seal(self, nonce: bytearray, plaintext: bytearray, data: bytearray) -> bytearray:
        return bytearray(self._cipher.encrypt(bytes(nonce), bytes(plaintext), bytes(data)))

    def open(self, nonce: bytearray, ciphertext: bytearray, data: bytearray) -> bytearray | None:
        try:
            return bytearray(self._cipher.decrypt(bytes(nonce), bytes(ciphertext), bytes(data)))
        except InvalidTag:
            return None


class _Records(RecordLayer):
    @staticmethod
    def _getCipherSettings(suite: int) -> tuple[int, int, Callable[..., _AesGcm]]:
        key_octets, iv_octets, _ = RecordLayer._getCipherSettings(suite)
        return key_octets, iv_octets, lambda key, _: _AesGcm(key)


class Client:
    """One connection, of one version of TLS.

    ``fragment`` is how much of a message of the handshake goes into one record at most,
    ``segments.size`` how much of a record into one segment. The steps of a handshake are
    ``start`` and ``finish``; what a test does differently it does between, or instead.
    """

    def __init__(
        self,
        port: int,
        version: Version,
        suite: int | None = None,
        server_name: bytes = b"localhost",
        receive_buffer: int | None = None,
        source: socket.socket | None = None,
    ) -> None:
        self.socket = source or connect(port, receive_buffer=receive_buffer)
        self.server_name = server_name
        self.segments = _Segments(self.socket)
        self.version = version
        self.suite = suite or (
            CipherSuite.TLS_AES_128_GCM_SHA256
            if version == TLS13
            else CipherSuite.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
        )
        self.fragment = 1 << 14
        self.random = getRandomBytes(32)
        self.server_random = b""
        self.session_id = bytes(getRandomBytes(32))
        self.transcript = HandshakeHashes()
        self._records = _Records(self.segments)
        self._records.version = TLS12
        self._key_exchange = ECDHKeyExchange(GroupName.x25519, version)
        self._private = self._key_exchange.get_random_private_key()
        self.share = bytes(self._key_exchange.calc_public_value(self._private))
        #: What came of the handshake's messages and was not looked at yet.
        self._heard = bytearray()
        self._secrets: dict[str, Any] = {}
        #: KeyUpdates of the server's.
        self.updates_heard = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()

    # --- records --------------------------------------------------------------------------

    def record(self, kind: int, content: bytes) -> None:
        """One record, protected as far as the handshake has come."""
        for _ in self._records.sendRecord(Message(kind, bytearray(content))):
            pass

    def raw(self, octets: bytes) -> None:
        """Octets as they are."""
        self.segments.send(octets)

    def plain(self, kind: int, content: bytes) -> None:
        """A record without protection, whatever there is."""
        self.raw(bytes((kind, 3, 3)) + vector(2, content))

    def pad(self, octets: int) -> None:
        """Give the next records so many octets of padding (RFC 8446 §5.4)."""
        self._records.padding_cb = lambda *_: bytearray(octets)

    def hear_record(self) -> tuple[int, bytes]:
        """The next record. Raises Closed."""
        try:
            # What is no pair would be that there is nothing yet: the socket is a blocking one.
            header, parser = next(self._records.recvRecord())
        except (TLSAbruptCloseError, ConnectionResetError, BrokenPipeError):
            raise Closed from None
        return header.type, bytes(parser.bytes)

    # --- messages of the handshake --------------------------------------------------------

    def say(self, octets: bytes) -> None:
        """A message, in as many records as it takes."""
        self.transcript.update(bytearray(octets))
        self.say_nothing_of(octets)

    def say_nothing_of(self, octets: bytes) -> None:
        """The same, of which the transcript is not told: KeyUpdate, and what is no message."""
        for piece in in_pieces(octets, self.fragment):
            self.record(HANDSHAKE, piece)

    def hear(self) -> tuple[int, bytes]:
        """The next message's type and body. Raises Alerted, Closed."""
        while len(self._heard) < 4 or len(self._heard) < 4 + int.from_bytes(self._heard[1:4]):
            kind, content = self.hear_record()
            if kind == ALERT:
                raise Alerted(content)
            if kind == HANDSHAKE:
                self._heard += content
        length = 4 + int.from_bytes(self._heard[1:4])
        octets = bytes(self._heard[:length])
        del self._heard[:length]
        if octets[0] != Handshake.KEY_UPDATE:
            self.transcript.update(bytearray(octets))
        return octets[0], octets[4:]

    def hear_until(self, kind: Handshake) -> dict[int, bytes]:
        """Messages up to this one."""
        heard: dict[int, bytes] = {}
        while kind not in heard:
            name, body = self.hear()
            heard[name] = body
        return heard

    # --- the handshake --------------------------------------------------------------------

    def extensions(self) -> dict[int, bytes]:
        """Those of a ClientHello that is as it should be."""
        common = {
            Extension.SERVER_NAME: vector(2, b"\0" + vector(2, self.server_name)),
            Extension.SUPPORTED_GROUPS: vector(2, b"\x00\x1d\x00\x17"),
            Extension.SIGNATURE_ALGORITHMS: vector(2, b"\x08\x04\x04\x03\x04\x01"),
        }
        if self.version == TLS12:
            return common | {
                Extension.EC_POINT_FORMATS: vector(1, b"\0"),
                Extension.RENEGOTIATION_INFO: b"\0",
            }
        return common | {
            Extension.SUPPORTED_VERSIONS: vector(1, b"\3\4"),
            Extension.PSK_KEY_EXCHANGE_MODES: vector(1, b"\1"),
            Extension.KEY_SHARE: vector(2, b"\x00\x1d" + vector(2, self.share)),
        }

    @staticmethod
    def encoded(extensions: Mapping[int, bytes | None]) -> bytes:
        return b"".join(
            kind.to_bytes(2, "big") + vector(2, body)
            for kind, body in extensions.items()
            if body is not None
        )

    def hello(
        self,
        changed: Mapping[int, bytes | None] | None = None,
        version: bytes = b"\3\3",
        suites: bytes | None = None,
        compression: bytes = b"\0",
        extensions: bytes | None = None,
        session: bytes | None = None,
        behind: bytes = b"",
    ) -> bytes:
        """A ClientHello: ``changed`` replaces extensions, adds some, or takes some out (None).

        What has a length comes without it.
        """
        if suites is None:
            suites = self.suite.to_bytes(2, "big")
        if extensions is None:
            extensions = self.encoded({**self.extensions(), **(changed or {})})
        session = self.session_id if session is None else session
        body = version + bytes(self.random) + vector(1, session) + vector(2, suites)
        body += vector(1, compression) + vector(2, extensions) + behind
        return message(Handshake.CLIENT_HELLO, body)

    def start(self, hello: bytes | None = None) -> None:
        """To where the client is to answer: as far as the server's first flight goes."""
        self.say(self.hello() if hello is None else hello)
        self.hear_first_flight()

    def start_twice(
        self, hello: bytes | None = None, between: Callable[[], object] = lambda: None
    ) -> None:
        """The same, where the server asks for another key share (RFC 8446 §4.1.4)."""
        self.say(self.hello({Extension.KEY_SHARE: vector(2, b"")}))
        first = bytes(self.transcript.digest("sha256"))
        self.transcript = HandshakeHashes()
        self.transcript.update(bytearray(message(Handshake.MESSAGE_HASH, first)))
        _, body = self._expect(Handshake.SERVER_HELLO)
        assert body[2:34] == HELLO_RETRY_REQUEST
        between()
        self.start(hello)

    def hear_first_flight(self) -> None:
        _, body = self._expect(Handshake.SERVER_HELLO)
        self.server_random = body[2:34]
        if self.version == TLS12:
            heard = self.hear_until(Handshake.SERVER_HELLO_DONE)
            exchange = heard.get(Handshake.SERVER_KEY_EXCHANGE, b"")
            self._secrets["peer"] = exchange[4 : 4 + exchange[3]] if exchange else b""
            return
        # The only extensions: supported_versions, and key_share, whose last 32 octets are the key.
        extensions = body[35 + body[34] + 5 :]
        shared = self._key_exchange.calc_shared_key(self._private, bytearray(_share(extensions)))
        nothing = bytearray(32)
        early = secureHMAC(nothing, nothing, "sha256")
        self._secrets["handshake"] = secureHMAC(
            derive_secret(early, bytearray(b"derived"), None, "sha256"), shared, "sha256"
        )
        self._take_keys("handshake", b"c hs traffic", b"s hs traffic")
        self._records.tls13record = True
        self._records.version = TLS13
        self._records.changeReadState()
        self.hear_until(Handshake.FINISHED)
        self._records.changeWriteState()
        # From here on the server has other keys, and the client has, with its Finished.
        self._secrets["finishing"] = self._secrets["client"]
        derived = derive_secret(self._secrets["handshake"], bytearray(b"derived"), None, "sha256")
        self._secrets["main"] = secureHMAC(derived, nothing, "sha256")
        self._take_keys("main", b"c ap traffic", b"s ap traffic")
        self._records.changeReadState()

    def _expect(self, kind: Handshake) -> tuple[int, bytes]:
        heard = self.hear()
        assert heard[0] == kind, f"message {heard[0]} instead of {kind}"
        return heard

    def _take_keys(self, secret: str, of_client: bytes, of_server: bytes) -> None:
        for side, label in (("client", of_client), ("server", of_server)):
            self._secrets[side] = derive_secret(
                self._secrets[secret], bytearray(label), self.transcript, "sha256"
            )
        self._records.calcTLS1_3PendingState(
            self.suite, self._secrets["client"], self._secrets["server"], None
        )

    def finished(self) -> bytes:
        """The client's Finished, as it has to be now."""
        if self.version == TLS12:
            verify = calc_key(
                TLS12, self._secrets["master"], self.suite, b"client finished",
                handshake_hashes=self.transcript, output_length=12,
            )  # fmt: skip
        else:
            key = HKDF_expand_label(
                self._secrets["finishing"], bytearray(b"finished"), b"", 32, "sha256"
            )
            verify = secureHMAC(key, self.transcript.digest("sha256"), "sha256")
        return message(Handshake.FINISHED, bytes(verify))

    def finish(self) -> None:
        """The client's last flight, and in TLS 1.2 the server's."""
        if self.version == TLS12:
            self.exchange_keys()
            self.change_cipher()
            self.say(self.finished())
            self.hear_last_flight()
            return
        self.say(self.finished())
        self.change_keys()

    def change_keys(self) -> None:
        """What a Finished says, in TLS 1.3."""
        self._records.changeWriteState()

    def hear_last_flight(self) -> None:
        """TLS 1.2's ChangeCipherSpec and Finished of the server."""
        kind, content = self.hear_record()
        if kind == ALERT:
            raise Alerted(content)
        assert kind == CCS
        self._records.changeReadState()
        self.hear_until(Handshake.FINISHED)

    def exchange_keys(self, exchange: bytes | None = None, premaster: bytes | None = None) -> None:
        """TLS 1.2's ClientKeyExchange: for ECDHE, unless another is given, with its secret."""
        if exchange is None:
            exchange = vector(1, self.share)
        self.say(message(Handshake.CLIENT_KEY_EXCHANGE, exchange))
        if premaster is None:
            premaster = self._key_exchange.calc_shared_key(
                self._private, bytearray(self._secrets["peer"])
            )
        self._secrets["master"] = calc_key(
            TLS12, bytearray(premaster), self.suite, b"master secret",
            client_random=self.random, server_random=bytearray(self.server_random),
            output_length=48,
        )  # fmt: skip

    def change_cipher(self) -> None:
        """TLS 1.2's ChangeCipherSpec, with what it says."""
        self.record(CCS, b"\1")
        self._records.calcPendingStates(
            self.suite, self._secrets["master"], self.random, bytearray(self.server_random), None
        )
        self._records.changeWriteState()

    # --- afterwards -----------------------------------------------------------------------

    def shake_hands(self) -> Self:
        self.start()
        self.finish()
        return self

    def update_keys(self, request: int = 0) -> None:
        """A KeyUpdate, whole (RFC 8446 §4.6.3), and what it says."""
        self.say_nothing_of(message(Handshake.KEY_UPDATE, bytes((request,))))
        self.change_write_key()

    def change_write_key(self) -> None:
        self._secrets["client"], _ = self._records.calcTLS1_3KeyUpdate_reciever(
            self.suite, self._secrets["client"], self._secrets["server"]
        )

    def receive(self, length: int) -> bytes:
        """So many octets of data; a KeyUpdate among them is taken, and counted."""
        data = bytearray()
        while len(data) < length:
            kind, content = self.hear_record()
            if kind == ALERT:
                raise Alerted(content)
            if kind == HANDSHAKE and content[:4] == b"\x18\0\0\1":
                self._secrets["server"] = self._records.calcTLS1_3KeyUpdate_sender(
                    self.suite, self._secrets["client"], self._secrets["server"]
                )[1]
                self.updates_heard += 1
            if kind == DATA:
                data += content
        return bytes(data)


class Alerted(Exception):
    """The server sent an alert (RFC 8446 §6)."""

    def __init__(self, content: bytes) -> None:
        self.level, self.description = content
        super().__init__(self.level, self.description)


def _share(extensions: bytes) -> bytes:
    """The server's key share, among a ServerHello's extensions."""
    while extensions:
        kind, length = int.from_bytes(extensions[:2]), int.from_bytes(extensions[2:4])
        if kind == Extension.KEY_SHARE:
            return extensions[8 : 4 + length]
        extensions = extensions[4 + length :]
    raise AssertionError("a ServerHello without a key share")
