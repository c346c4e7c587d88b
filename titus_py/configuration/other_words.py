"""What other servers call the settings of this one, and settings that only they have.

Run wherever a configuration is read, to explain an unknown key: administrators who come from nginx,
haproxy or stunnel write the words that they know.
"""

from collections.abc import Mapping

__all__ = ["in_other_words"]

#: By table; without "ssl_" before them.
_OURS: Mapping[str, Mapping[str, str]] = {
    "listen": {
        **dict.fromkeys(("accept", "bind", "host", "listen", "port"), "address"),
        **dict.fromkeys(("accept_proxy", "proxy_protocol"), "accept_proxy_from"),
    },
    "vhost": {
        **dict.fromkeys(("domain", "host", "hostname", "server_name", "server_names"), "sni"),
        **dict.fromkeys(("connect", "proxy_pass", "server", "upstream"), "backend"),
        **dict.fromkeys(("cert", "crt", "fullchain"), "certificate"),
        **dict.fromkeys(("certificate_key", "privkey", "private_key"), "key"),
        **dict.fromkeys(("protocols", "min_ver", "tls_version", "version"), "min_version"),
        **dict.fromkeys(("h2", "http2"), "alpn"),
        **dict.fromkeys(("proxy_protocol", "proxy"), "send_proxy"),
        **dict.fromkeys(("client_certificate", "cafile"), "client_ca"),
        **dict.fromkeys(("verify", "verify_client"), "client_certificates"),
        "listen": "address, in a [[listen]] of its own",
        "address": "local_address",
        "port": "local_port",
        "crl": "client_crl",
        "curves": "groups",
        "ecdh_curve": "groups",
    },
    "tunnel": {
        **dict.fromkeys(("accept", "address", "bind"), "listen"),
        **dict.fromkeys(("backend", "server", "upstream"), "connect"),
        **dict.fromkeys(("cert", "crt"), "certificate"),
        **dict.fromkeys(("checkhost", "sni"), "server_name"),
        **dict.fromkeys(("ca_file", "cafile", "trusted_certificate"), "ca"),
        **dict.fromkeys(("pin", "spki"), "pins"),
        "proxy_protocol": "send_proxy",
    },
    "metrics": dict.fromkeys(("bind", "host", "listen", "port", "socket"), "address"),
    "worker": dict.fromkeys(("connections", "max_connections", "maxconn"), "max"),
}

_HTTP = "titus-py knows no HTTP, which is the backend's"
_SESSIONS = "sessions are not resumed, as each worker would have the key for that"
#: Of no table here; without "ssl_" before them.
_NOT_HERE = {
    **dict.fromkeys(("add_header", "headers", "hsts", "location", "redirect", "root"), _HTTP),
    **dict.fromkeys(("forwarded", "x_forwarded_for"), f"{_HTTP}: send_proxy tells it the client"),
    **dict.fromkeys(("session_cache", "session_tickets", "session_timeout"), _SESSIONS),
    **dict.fromkeys(("0rtt", "early_data"), _SESSIONS),
    **dict.fromkeys(("ocsp", "ocsp_stapling", "stapling"), "no answers of OCSP are stapled"),
    **dict.fromkeys(("dhparam", "dhparams"), "there is no DHE, and ECDHE takes no parameters"),
}


def in_other_words(key: str, table: str) -> str | None:
    """What to write instead of another server's word, or why there is nothing; None if unknown."""
    word = key.lower().replace("-", "_").removeprefix("ssl_")
    if ours := _OURS.get(table, {}).get(word):
        return f"here it is {ours}"
    return _NOT_HERE.get(word)
