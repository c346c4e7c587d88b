"""What transparent connections take of the machine: commands, for the administrator to run.

Printed by ``titus-py check``. Nothing here runs any of them.
"""

from collections.abc import Iterator

from titus_py.configuration import Configuration
from titus_py.configuration.address import IPAddress

__all__ = ["commands"]

#: A mark of packets, and a routing table, that nothing else uses as a rule.
_MARK, _TABLE = 1, 100


def commands(configuration: Configuration) -> Iterator[str]:
    """Lines for a shell; none if the configuration has no transparent connections."""
    if not configuration.has_transparent_sockets:
        return
    yield "# Packets that are marked are for this machine, whatever their address:"
    for version, all_addresses in (("-4", "0.0.0.0/0"), ("-6", "::/0")):
        yield f"ip {version} rule add fwmark {_MARK} lookup {_TABLE}"
        yield f"ip {version} route add local {all_addresses} dev lo table {_TABLE}"
    yield "nft add table inet titus-py"
    hook = "type filter hook prerouting priority mangle; policy accept;"
    yield f"nft 'add chain inet titus-py prerouting {{ {hook} }}'"
    rule = "nft add rule inet titus-py prerouting"
    if any(vhost.source_address for vhost in configuration.vhost):
        yield "# Answers of backends to clients' addresses:"
        yield f"{rule} meta l4proto tcp socket transparent 1 meta mark set {_MARK} accept"
    listeners = configuration.transparent_addresses
    if listeners:
        yield "# Connections to other machines' addresses. dport: the port that clients connect to."
    for address in listeners:
        match, to = _matches(address)
        yield f"{rule} {match}tcp dport {address.port} {to} meta mark set {_MARK} accept"


def _matches(address: IPAddress) -> tuple[str, str]:
    """Which connections a listener can take, and the statement that sends them there."""
    if address.host == "::":
        return "", f"tproxy to :{address.port}"
    if ":" in address.host:
        return "meta nfproto ipv6 ", f"tproxy ip6 to {address}"
    host = "" if address.is_wildcard else address.host
    return "meta nfproto ipv4 ", f"tproxy ip to {host}:{address.port}"
