"""The values of metrics' labels, as far as they are known beforehand. Run by the supervisor."""

from keyd.protocol import Status
from titus_py.between.report import End

__all__ = [
    "CERTIFICATE_REFUSALS",
    "CHILDREN",
    "DURATION_BOUNDS",
    "ENDS",
    "FAILURES",
    "GROUPS",
    "LENDING_REFUSALS",
    "REFUSALS",
    "SUITES",
    "TUNNEL_FAILURES",
]

#: For connections and workers: from a health check to a day of WebSocket.
DURATION_BOUNDS = (
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
    3.0,
    10.0,
    30.0,
    60.0,
    300.0,
    1800.0,
    3600.0,
    86400.0,
)

SUITES = {
    "TLSv1.3": frozenset(
        {
            "TLS_AES_256_GCM_SHA384",
            "TLS_CHACHA20_POLY1305_SHA256",
            "TLS_AES_128_GCM_SHA256",
            "TLS_AES_128_CCM_SHA256",
            "TLS_AES_128_CCM_8_SHA256",
        }
    ),
    # The suites that keyd can serve: ECDHE, and the RSA key exchange.
    "TLSv1.2": frozenset(
        exchange + cipher
        for exchange in ("ECDHE-ECDSA-", "ECDHE-RSA-", "")
        for cipher in (
            "AES256-GCM-SHA384",
            "AES128-GCM-SHA256",
            "CHACHA20-POLY1305",
            "AES256-CCM",
            "AES128-CCM",
            "AES256-SHA384",
            "AES256-SHA256",
            "AES128-SHA256",
            "AES256-SHA",
            "AES128-SHA",
        )
    ),
}
#: By their names in lower case: OpenSSL's spelling has changed over time.
GROUPS = {
    name.lower(): name
    for name in (
        "X25519MLKEM768",
        "SecP256r1MLKEM768",
        "SecP384r1MLKEM1024",
        "MLKEM512",
        "MLKEM768",
        "MLKEM1024",
        "x25519",
        "x448",
        "secp256r1",
        "secp384r1",
        "secp521r1",
        "ffdhe2048",
        "ffdhe3072",
        "ffdhe4096",
        "ffdhe6144",
        "ffdhe8192",
    )
} | {"prime256v1": "secp256r1", "": "none"}

#: The series that the alert rules watch. They are there from the start, as zero: Prometheus sees
#: no rise in a series that begins with its first count.
ENDS = tuple(end.name.lower() for end in End if end is not End.NONE)
FAILURES = (
    "not_tls",
    "plain_http",
    "bad_proxy_header",
    "proxy_timeout",
    "bad_client_hello",
    "no_virtual_host",
    "no_application_protocol",
    "handshake_failed",
    "handshake_timeout",
    "client_left",
    "worker_failed",
    "client_certificate",
)
#: Why a client's certificate was refused (``titus_py.worker.client_certificate``).
CERTIFICATE_REFUSALS = (
    "no_certificate",
    "expired",
    "not_yet_valid",
    "revoked",
    "unknown_ca",
    "wrong_usage",
    "chain_too_long",
    "too_long",
    "bad_signature",
    "malformed",
    "unknown_key",
    "not_allowed",
    "no_crl",
    "crl_expired",
    "crl_not_yet_valid",
    "bad_crl",
    "rejected",
)
#: Why a tunnel's connection failed before it was established.
TUNNEL_FAILURES = (
    "unreachable",
    "name_mismatch",
    "unknown_ca",
    "expired",
    "not_yet_valid",
    "pin_mismatch",
    "wrong_usage",
    "chain_too_long",
    "bad_signature",
    "malformed",
    "rejected",
    "handshake_failed",
    "handshake_timeout",
    "server_left",
    "starttls_refused",
)
REFUSALS = tuple(status.name.lower() for status in Status if status is not Status.DONE)
#: Why keyd refuses what a host asks that it lends keys to (``keyd.upstream.stream``).
LENDING_REFUSALS = (
    "not_lent",
    "not_granted",
    "not_tls",
    "malformed",
    "exhausted",
    "expired",
    "unwitnessed",
    "failed",
)
CHILDREN = ("keyd", "parent", "fork_server", "resolver", "metrics", "worker")
