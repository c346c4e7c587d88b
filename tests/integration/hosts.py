"""Hosts on one network, each a network namespace; and the examples' configurations on them."""

import os
import re
import socket
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .conftest import Serve
from .instance import Instance
from .namespaces import ip, new_namespace, within

__all__ = ["EXAMPLES", "Network", "network", "serve_example"]

EXAMPLES = Path(__file__).parents[2] / "examples"
_ETH_P_ALL = 3
#: <asm-generic/socket.h>; Python does not know it.
_SO_RCVBUFFORCE = 33
_BUFFER_OCTETS = 8 << 20


class Network:
    """Hosts with the addresses 10.77.0.1, 10.77.0.2, and so on, and the switch between them."""

    def __init__(self, switch: int, hosts: list[int]) -> None:
        self._switch = switch
        self._hosts = hosts

    def on(self, number: int, do: Callable[[], Any]) -> Any:
        """Do something on a host, which is numbered from 1. Processes that it starts stay there."""
        return within(self._hosts[number - 1], do)

    @contextmanager
    def captured(self) -> Iterator[list[bytes]]:
        """What passes the switch meanwhile: its packets are in the list when this has ended."""

        def listen() -> socket.socket:
            capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
            capture.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_OCTETS)
            return capture

        packets: list[bytes] = []
        with within(self._switch, listen) as capture:
            yield packets
            capture.setblocking(False)
            try:
                while True:
                    packets.append(capture.recv(65536))
            except BlockingIOError:
                pass


@contextmanager
def network(count: int) -> Iterator[Network]:
    with ExitStack() as opened:

        def host() -> int:
            namespace = new_namespace()
            opened.callback(os.close, namespace)
            return namespace

        switch, hosts = host(), [host() for _ in range(count)]

        def connect(number: int) -> None:
            """A cable from the switch to a host."""
            port = f"port{number}"
            there = f"/proc/{os.getpid()}/fd/{hosts[number - 1]}"
            ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", there)
            ip("link", "set", port, "master", "switch", "up")

        def address(number: int) -> None:
            ip("link", "set", "lo", "up")
            ip("address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("link", "set", "eth0", "up")

        within(switch, lambda: ip("link", "add", "switch", "type", "bridge"))
        within(switch, lambda: ip("link", "set", "switch", "up"))
        for number in range(1, count + 1):
            within(switch, lambda number=number: connect(number))
            within(hosts[number - 1], lambda number=number: address(number))
        yield Network(switch, hosts)


def serve_example(
    serve: Serve,
    hosts: Network,
    number: int,
    file: str,
    keys: Path,
    pins: Mapping[str, str],
    others: Mapping[str, str] = {},
    keyd_user: str | None = None,
) -> Instance:
    """Serve an example's file on a host, as its page says, with keys in this directory.

    ``others`` are what stands in its place here: files, users.
    """
    text = (EXAMPLES / file).read_text()
    for here, in_its_place in {"/etc/titus-py/keys": str(keys), **others}.items():
        text = text.replace(here, in_its_place)
    text = re.sub(r"PIN-OF-([a-z0-9-]+)", lambda found: pins[found[1]], text)
    tables: dict[str, Any] = {"listen": [], "vhost": [], **tomllib.loads(text)}
    if keyd_user is not None:
        tables["keyd"]["user"] = keyd_user
    instance: Instance = hosts.on(number, lambda: serve(**tables))
    return instance
