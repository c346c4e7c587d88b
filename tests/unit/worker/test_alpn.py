"""The protocol that a client and a virtual host agree on: chosen in C, within OpenSSL."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL

from titus_py.worker.tls import negotiate_protocol

NO_APPLICATION_PROTOCOL = 120

#: Few enough to be alike, and such as are the beginning of others.
NAMES = st.lists(
    st.text("ab", min_size=1, max_size=3) | st.sampled_from(["a" * 255, "a" * 254]),
    min_size=1,
    max_size=6,
    unique=True,
).map(tuple)


def anonymous(method: int) -> SSL.Context:
    """For either side, without a certificate."""
    context = SSL.Context(method)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    context.set_cipher_list(b"AECDH-AES128-SHA:@SECLEVEL=0")
    return context


def negotiated(ours: tuple[str, ...], offered: tuple[str, ...]) -> tuple[str, str]:
    """What each side takes it to be. Raises SSL.Error, the server's."""
    server_context, client_context = map(anonymous, (SSL.TLS_SERVER_METHOD, SSL.TLS_CLIENT_METHOD))
    negotiate_protocol(server_context, [name.encode() for name in ours])
    if offered:
        client_context.set_alpn_protos([name.encode() for name in offered])
    server, client = SSL.Connection(server_context), SSL.Connection(client_context)
    server.set_accept_state()
    client.set_connect_state()
    for side, other in ((client, server), (server, client), (client, server), (server, client)):
        try:
            side.do_handshake()
        except SSL.WantReadError:
            pass
        except SSL.Error:
            if side is server:
                assert server.bio_read(7)[-1] == NO_APPLICATION_PROTOCOL
            raise
        other.bio_write(side.bio_read(1 << 16))
    client.do_handshake()
    names = [side.get_alpn_proto_negotiated().decode() for side in (server, client)]
    return names[0], names[1]


@settings(deadline=None, max_examples=50)
@given(NAMES, NAMES)
def test_the_servers_order_holds(ours: tuple[str, ...], offered: tuple[str, ...]) -> None:
    expected = next((name for name in ours if name in offered), None)
    if expected is not None:
        assert negotiated(ours, offered) == (expected, expected)
        return
    with pytest.raises(SSL.Error) as caught:
        negotiated(ours, offered)
    assert [reason for _, _, reason in caught.value.args[0]] == ["no application protocol"]


def test_a_client_that_offers_nothing_negotiates_nothing() -> None:
    assert negotiated(("h2",), ()) == ("", "")
