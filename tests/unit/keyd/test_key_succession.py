"""Keys that a keyd hands to its successor: those that it was asked for, and to nobody else."""

import json
import socket
from collections.abc import Collection

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from keyd.daemon import Keyd
from keyd.linux.descriptors import send_descriptors
from keyd.orders import Orders
from keyd.powers import PrivateKey
from keyd.protocol import MAX_HANDED
from keyd.reference import key_id
from keyd.succession import hand_over, inherited, receive

KEYS: dict[bytes, PrivateKey] = {
    key_id(key.public_key()): key
    for key in (
        ec.generate_private_key(ec.SECP256R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    )
}
IDS = [key.hex() for key in KEYS]


def order(keys: Collection[str]) -> bytes:
    return json.dumps({"do": "hand over", "keys": list(keys)}).encode()


def handed(asked: Collection[str], wanted: Collection[str]) -> list[str]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    hand_over(KEYS, asked, ours.detach())
    return [key_id(key.public_key()).hex() for key in inherited(receive(theirs.detach()), wanted)]


@pytest.mark.parametrize("asked", [IDS, IDS[:1], [], ["00" * 32, IDS[2]]])
def test_keys_come_as_they_were_asked_for(asked: list[str]) -> None:
    assert handed(asked, IDS) == [key for key in asked if key in IDS]


def test_a_key_that_is_not_expected_is_not_taken() -> None:
    assert handed(IDS, IDS[1:2]) == IDS[1:2]


@pytest.mark.parametrize("octets", [b"no key", b"\x30\x00"])
def test_what_is_no_key_keeps_the_successor_from_nothing(octets: bytes) -> None:
    """A predecessor may have been taken over."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.send(octets)
        hand_over(KEYS, IDS, ours.detach())
        found = inherited(receive(theirs.detach()), IDS)
        assert [key_id(key.public_key()).hex() for key in found] == IDS


def test_no_more_is_received_than_is_handed_over() -> None:
    """Not even of one that was taken over and goes on sending."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        for _ in range(MAX_HANDED + 1):
            ours.send(b"again")
        assert len(receive(theirs.detach())) == MAX_HANDED


def test_a_predecessor_that_has_ended_hands_over_nothing() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    assert receive(theirs.detach()) == []


def test_there_is_room_for_as_many_of_the_longest_as_are_handed_over() -> None:
    """Before the successor reads: PKCS #8 of an RSA key with 8192 bits has 4,700 octets or so."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for _ in range(MAX_HANDED):
            ours.send(bytes(4800), socket.MSG_DONTWAIT)


@pytest.mark.parametrize("of", ["supervisor", "parent"])
def test_only_the_supervisor_is_obeyed(of: str, capsys: pytest.CaptureFixture[str]) -> None:
    keyd = Keyd(KEYS)
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if of == "supervisor":
        keyd.hear_process(ours, Orders(ours, KEYS, {}).hear)
    else:
        keyd.hear_parent(ours, gone=lambda: None)
    hear = keyd._sources[ours.fileno()].hear
    successor, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, successor:
        with end:
            send_descriptors(theirs, order(IDS[:1]), [end.fileno()])
        hear()
        assert bool(successor.recv(1 << 16)) == (of == "supervisor")
    assert ("closing the connection to a parent" in capsys.readouterr().err) == (of == "parent")
