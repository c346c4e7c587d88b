"""A key that is in a file and in a token as well: it is served for as long as it is in either."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from keyd.key_ring import KeyRing
from keyd.powers import KeyElsewhere, Told
from keyd.protocol import Power, SignatureScheme
from keyd.reference import key_id

IN_FILE = ec.generate_private_key(ec.SECP256R1())
ID = key_id(IN_FILE.public_key())
GRANTED = frozenset({Power.SIGN_TLS13})


class InToken(KeyElsewhere):
    def public_key(self) -> ec.EllipticCurvePublicKey:
        return IN_FILE.public_key()

    def ask(self, scheme: SignatureScheme, octets: bytes, told: Told) -> None:
        raise NotImplementedError


IN_TOKEN = InToken()


@pytest.mark.parametrize("order", [(IN_FILE, IN_TOKEN), (IN_TOKEN, IN_FILE)])
def test_the_token_serves_it_once_the_file_is_gone(
    order: tuple[ec.EllipticCurvePrivateKey | KeyElsewhere, ...],
) -> None:
    changes: list[None] = []
    ring = KeyRing(GRANTED, lambda: changes.append(None))
    for key in order:
        ring.take(key)
    assert ring.keys == {ID: IN_FILE}
    ring.drop(ID)
    assert ring.keys == {ID: IN_TOKEN}
    assert ring.grants == {ID: GRANTED}
    assert len(changes) == 3
    ring.take(IN_FILE)
    # A new login.
    ring.take(IN_TOKEN)
    assert ring.keys == {ID: IN_FILE}


def test_without_a_token_it_goes_with_the_file() -> None:
    ring = KeyRing(GRANTED, lambda: None)
    ring.take(IN_FILE)
    ring.drop(ID)
    assert not ring.keys
    assert not ring.grants
