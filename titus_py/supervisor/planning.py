"""A configuration, boiled down to what its parent is to do: the plan.

Run by the supervisor. The certificates are those that were checked, even if the files have changed
since. The files are not read here: they may also hold a private key, so only keyd and ``keyd
check`` do that.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from keyd.linux import seccomp
from titus_py import configuration
from titus_py.between import certificate_index
from titus_py.between.plan import (
    Certificate,
    Check,
    Limits,
    Listener,
    Plan,
    ResolvedAddress,
    State,
    VirtualHost,
)
from titus_py.between.tunnel_terms import TunnelTerms
from titus_py.configuration.address import Bindable, UnixAddress
from titus_py.configuration.checking import CertificateFacts, Checked, names_shown
from titus_py.configuration.client_certificates import client_terms
from titus_py.configuration.limits_table import default_handshakes, default_per_prefix
from titus_py.parent.system_calls import FAILING, parent_calls

__all__ = ["plan_of", "tunnel_terms"]

#: How long a load balancer may take for its PROXY header.
_PROXY_SECONDS = 5.0


def plan_of(
    wanted: configuration.Configuration,
    checked: Checked,
    uids: Sequence[int],
    listeners: Mapping[Bindable, socket.socket],
    addresses: Mapping[str, tuple[ResolvedAddress, ...]],
    states: Mapping[Check, State | None],
    worker_filter: str,
) -> Plan:
    """The plan for a configuration and what checking it has found. Raises OSError.

    ``addresses`` are those of its backends, by name; ``states``, what is known of those that are
    checked.
    """
    worker, limits = wanted.worker, wanted.limits
    with ExitStack() as opened:
        plan = Plan(
            listeners=tuple(_listener(wanted, *one) for one in listeners.items()),
            vhosts=tuple(_virtual_host(vhost, checked, opened) for vhost in wanted.vhost),
            tunnels=tuple(tunnel_terms(tunnel, wanted, checked) for tunnel in wanted.tunnel),
            addresses=dict(addresses),
            checks=tuple(states),
            states=tuple(states.values()),
            first_uid=uids[0],
            last_uid=uids[-2],
            max_workers=worker.max,
            spare_workers=worker.spare,
            handshake_timeout=worker.handshake_timeout,
            connect_timeout=worker.connect_timeout,
            limits=Limits(
                limits.connections_per_address,
                limits.connections_per_prefix or default_per_prefix(worker.max),
                limits.connections_per_second,
                limits.handshakes or default_handshakes(worker.max),
                limits.idle_timeout,
                limits.half_closed_timeout,
                limits.keepalive,
                limits.lifetime,
                limits.unfinished.per_prefix,
                limits.unfinished.every,
            ),
            chroot=str(worker.chroot),
            required=worker.require,
            worker_filter=worker_filter,
            parent_uid=uids[-1],
            parent_filter="",
            backend_groups=worker.backend_gids,
        )
        calls = parent_calls(
            plan.connects_to_unix_sockets, plan.binds_clients_addresses, plan.has_unix_clients
        )
        plan = plan._replace(parent_filter=seccomp.build(calls, failing=FAILING).hex())
        # From here on, they are the plan's.
        opened.pop_all()
    return plan


def tunnel_terms(
    tunnel: configuration.Tunnel, wanted: configuration.Configuration, checked: Checked
) -> TunnelTerms:
    """What a tunnel of a configuration is to do."""
    files, own = tunnel.client_files, tunnel.credential
    authorities = "" if files is None else checked.authorities[files].authorities
    return TunnelTerms(
        connect=tuple(map(str, tunnel.connect)),
        balance=tunnel.balance,
        connect_timeout=tunnel.connect_timeout or wanted.worker.connect_timeout,
        server_name=tunnel.verified_name,
        authorities=authorities,
        pins=tunnel.pins or (),
        min_version=tunnel.lowest_version,
        alpn=tunnel.alpn,
        send_proxy=tunnel.send_proxy,
        drain=tunnel.drain,
        starttls=tunnel.starttls is not None,
        for_keyd=tunnel.listen in (wanted.keyd.upstream or ()),
        certificate=own and _certificate(checked.certificates[own]),
    )


def _listener(
    wanted: configuration.Configuration, address: Bindable, listener: socket.socket
) -> Listener:
    """A socket on this address, which may be a part of the address that is configured."""
    unix = isinstance(address, UnixAddress)
    for number, tunnel in enumerate(wanted.tunnel):
        if tunnel.listen.covers(address):
            return Listener(listener.fileno(), (), 0.0, number, unix=unix)
    table = next(table for table in wanted.listen if table.address.covers(address))
    # The header's time is a part of the handshake's.
    proxy_timeout = min(table.proxy_timeout or _PROXY_SECONDS, wanted.worker.handshake_timeout)
    balancers, starttls = table.accept_proxy_from or (), table.starttls is not None
    return Listener(listener.fileno(), balancers, proxy_timeout, starttls=starttls, unix=unix)


def _virtual_host(
    vhost: configuration.VirtualHost, checked: Checked, opened: ExitStack
) -> VirtualHost:
    shown = [checked.certificates[one] for one in vhost.credentials.values()]
    index = _write_index(vhost, checked)
    if index is not None:
        opened.callback(os.close, index)
    return VirtualHost(
        server_names=vhost.sni,
        local_address=vhost.local_address,
        local_port=vhost.local_port,
        certificates=tuple(map(_certificate, shown)),
        certificate_index=index,
        backend=tuple(map(str, vhost.backend)),
        backends={
            protocol: tuple(map(str, backends)) for protocol, backends in vhost.backends.items()
        },
        balance=vhost.balance,
        health=None if vhost.health is None else vhost.health.plan,
        tls=vhost.tls,
        truncated=vhost.truncated,
        send_proxy=vhost.send_proxy,
        source_address=vhost.source_address,
        clients=client_terms(vhost, checked.authorities),
    )


def _write_index(vhost: configuration.VirtualHost, checked: Checked) -> int | None:
    """The certificates of its directory, if it has one: a descriptor."""
    if vhost.certificate_dir is None:
        return None
    names = names_shown(vhost, checked.certificates)
    numbers = {one: number for number, one in enumerate(dict.fromkeys(names.values()))}
    return certificate_index.write(
        [_certificate(checked.certificates[one]) for one in numbers],
        {name: numbers[one] for name, one in names.items()},
    )


def _certificate(facts: CertificateFacts) -> Certificate:
    return Certificate(facts.chain, facts.reference, facts.key_id.hex())
