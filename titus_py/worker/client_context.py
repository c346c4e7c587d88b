"""TLS settings of a client: one OpenSSL context for each tunnel.

Run by the fork server before it forks, and by ``handshake_check``, where the configuration has a
tunnel. The private key in a context is a reference, as in ``tls``: keyd signs.
"""

from collections.abc import Sequence

from OpenSSL import SSL

from titus_py.worker.tls import (
    BUILT_IN_LEVEL,
    VERSIONS,
    Credentials,
    offered_suites,
    set_signature_schemes,
    use_credentials,
)

__all__ = ["make_client_context"]


def make_client_context(
    min_version: str, alpn: Sequence[str] | None, credentials: Credentials | None = None
) -> SSL.Context:
    """A client's context, which verifies nobody yet. Raises SSL.Error."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(VERSIONS[min_version])
    suites = offered_suites(None, rsa_key_exchange=False)
    context.set_cipher_list(":".join([*suites, f"@SECLEVEL={BUILT_IN_LEVEL}"]).encode())
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    if alpn is not None:
        context.set_alpn_protos([name.encode() for name in alpn])
    if credentials is not None:
        set_signature_schemes(context)
        use_credentials(context, credentials)
    return context
