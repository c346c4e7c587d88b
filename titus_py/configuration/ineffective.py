"""Settings that are valid, and cannot do what they say: each is a warning.

Run by the supervisor and by the commands. What shows only with OpenSSL, or with a certificate, is
found elsewhere (``fork_server.handshake_check``).
"""

from collections.abc import Iterator

from titus_py.configuration.address import Address
from titus_py.configuration.limits_table import default_per_prefix
from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.tables import Configuration, VirtualHost
from titus_py.configuration.upstreams import unasked_upstreams

__all__ = ["ineffective_settings"]


def ineffective_settings(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    for i, vhost in enumerate(configuration.vhost):
        for setting, reason in (*_of_other_versions(vhost), *_of_several_backends(vhost)):
            yield source.mistake(f"vhost[{i}].{setting}", f"has no effect: {reason}")
    yield from _reached_by_others(configuration, source)
    yield from _never_reached(configuration, source)
    yield from _of_another_keyd(configuration, source)
    yield from unasked_upstreams(configuration, source)


def _of_other_versions(vhost: VirtualHost) -> Iterator[tuple[str, str]]:
    ciphers = vhost.ciphers
    # A security level holds for certificates and groups as well.
    if vhost.min_version == "TLSv1.3" and ciphers is not None and "@SECLEVEL" not in ciphers:
        yield (
            "ciphers",
            "these are suites of TLS 1.2, and min_version is TLSv1.3. Those of TLS 1.3 go into "
            "ciphersuites",
        )
    if vhost.max_version == "TLSv1.2" and vhost.ciphersuites is not None:
        yield "ciphersuites", "these are suites of TLS 1.3, and max_version is TLSv1.2"


def _of_several_backends(vhost: VirtualHost) -> Iterator[tuple[str, str]]:
    if "balance" in vhost.model_fields_set and all(
        len(backends) == 1 for backends in (vhost.backend, *vhost.backends.values())
    ):
        yield "balance", "there is one backend. Several are a list"


def _reached_by_others(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    """Backends to which anybody comes by another virtual host, and can name the same site there.

    What a client tells the backend (HTTP's Host) need not be what it has told TLS, and browsers
    send requests for one name on a connection for another (RFC 9113 section 9.1.1). Where a port or
    an address of this machine tells virtual hosts apart, the network may keep clients from one.
    """
    anybodys: dict[Address, int] = {}
    for i, vhost in enumerate(configuration.vhost):
        told = (vhost.send_proxy or "").startswith("v2-tls")
        if vhost.client_certificates != "required" and not told and vhost.by_name_alone:
            for _, backend in vhost.all_backends:
                anybodys.setdefault(backend, i)
    for i, vhost in enumerate(configuration.vhost):
        if vhost.client_certificates != "required" or not vhost.by_name_alone:
            continue
        for key, backend in vhost.all_backends:
            if (other := anybodys.get(backend)) is not None:
                yield source.mistake(
                    f"vhost[{i}].{key}",
                    f"{backend} is also for {source.reference(f'vhost[{other}]')}, which lets in "
                    "clients without a certificate: if it serves several sites, they can ask it "
                    "for this one's. Give each a backend of its own, or set send_proxy = "
                    '"v2-tls" and have the backend look',
                )
                break


def _never_reached(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    limits, most = configuration.limits, configuration.worker.max
    per_address = limits.connections_per_address
    per_prefix = limits.connections_per_prefix or default_per_prefix(most)
    if per_address is not None and per_address > per_prefix:
        default = limits.connections_per_prefix is None
        why = " (a quarter of worker.max, where it is not set)" if default else ""
        yield source.mistake(
            "limits.connections_per_address",
            f"{per_address} are never reached: connections_per_prefix is {per_prefix}{why}, and "
            "counts those of one address, too",
        )
    if limits.handshakes is not None and limits.handshakes > most:
        yield source.mistake(
            "limits.handshakes",
            f"{limits.handshakes} cannot be within their handshake at once: worker.max is {most}, "
            "and a flood of handshakes may take every worker",
        )


def _of_another_keyd(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    keyd = configuration.keyd
    options = {
        "user": "--user",
        "lock_memory": "--lock-memory",
        "token_user": "--token-user",
        "token_paths": "--token-path",
        "token_environment": "--token-environment",
        "token_network": "--token-network",
    }
    for setting, option in options.items():
        if keyd.socket is not None and setting in keyd.model_fields_set:
            yield source.mistake(
                f"keyd.{setting}",
                f"has no effect: the keyd at {keyd.socket} is not started by titus-py, and has its "
                f"own {option}",
            )
