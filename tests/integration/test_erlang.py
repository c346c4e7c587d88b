"""Erlang nodes that know nothing of TLS, over tunnels, as examples/erlang has it.

Three hosts are a cluster, each with titus-py. On a fourth, there is no titus-py and no known key.
"""

import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from keyd.making import generate, self_signed
from titus_py.commands.pin_reader import keys_of_file

from .conftest import Serve
from .erlang_node import Node
from .hosts import EXAMPLES, Network, network, serve_example
from .instance import Instance, eventually
from .peers import connect

HOSTS = {"a": 1, "b": 2, "c": 3}
#: A pair of nodes has a cookie of its own.
COOKIES = {frozenset("ab"): "OfAAndB", frozenset("ac"): "OfAAndC", frozenset("bc"): "OfBAndC"}
READABLE = "octets that nobody may read"
WITHOUT_EPMD = ("-erl_epmd_port", "9100")
WITH_EPMD = ("-kernel", "inet_dist_listen_min", "9100", "inet_dist_listen_max", "9100")


def others(name: str) -> list[str]:
    return [other for other in HOSTS if other != name]


def cookies_of(name: str) -> dict[str, str]:
    return {f"{other}@host{other}": COOKIES[frozenset((name, other))] for other in others(name)}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    with network(4) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those that ``titus-py keys new`` makes, and a stranger's."""
    directory = tmp_path_factory.mktemp("keys")
    for name in [*(f"host{one}{end}" for one in HOSTS for end in ("", "-out")), "stranger"]:
        key = generate("p-256")
        (directory / f"{name}.key").touch(mode=0o600)
        (directory / f"{name}.key").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        (directory / f"{name}.crt").write_bytes(self_signed(name, key, int(time.time())))
    return directory


@pytest.fixture(scope="module")
def pins(keys: Path) -> dict[str, str]:
    found = {}
    for path in keys.glob("*.crt"):
        with path.open("rb") as file:
            ((digest, _, _),) = keys_of_file(file.fileno())
        found[path.stem] = f"sha256:{digest}"
    return found


@pytest.fixture(scope="module")
def instances(
    serve_all: Serve, hosts: Network, keys: Path, pins: dict[str, str]
) -> dict[str, Instance]:
    return {
        name: serve_example(serve_all, hosts, number, f"erlang/host{name}.toml", keys, pins)
        for name, number in HOSTS.items()
    }


@pytest.fixture(scope="module")
def nodes(
    hosts: Network, instances: dict[str, Instance], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Node]]:
    """The cluster, which is a mesh: begun from both sides."""
    directory = tmp_path_factory.mktemp("nodes")
    names = directory / "hosts"
    names.write_text((EXAMPLES / "erlang/hosts").read_text() + "10.77.0.4 hostd\n")
    with ExitStack() as started:
        nodes = {}
        for name, number in HOSTS.items():
            node = Node(hosts, number, name, directory, names, cookies_of(name), *WITHOUT_EPMD)
            started.callback(node.stop)
            nodes[name] = node
        with hosts.captured() as packets:
            begin(nodes)
        # Not even who talks to whom, from the first octet.
        assert len(packets) > 30
        assert not any(b"@host" in packet for packet in packets)
        yield nodes


def begin(nodes: Mapping[str, Node]) -> None:
    for node in nodes.values():
        assert node.ask("is_alive()") == "true"
    assert nodes["a"].ask("net_adm:ping('b@hostb')") == "pong"
    assert nodes["c"].ask("net_adm:ping('a@hosta')") == "pong"
    until_it_is_a_mesh(nodes)


def until_it_is_a_mesh(nodes: Mapping[str, Node]) -> None:
    for name, node in nodes.items():
        expected = [f"{other}@host{other}" for other in others(name)]
        eventually(lambda node=node, expected=expected: mesh_of(node) == expected, "a mesh")


def mesh_of(node: Node) -> list[str]:
    return node.ask("lists:sort(nodes())").strip("[]").split(",")


def calls_in_all_directions(nodes: Mapping[str, Node]) -> None:
    for one, other in product(nodes.values(), repeat=2):
        assert one.ask(f"rpc:call('{other.name}', erlang, node, [])") == other.name


def test_it_is_a_cluster_like_any_other(nodes: dict[str, Node]) -> None:
    calls_in_all_directions(nodes)
    a, b, c = nodes.values()
    assert a.ask("global:register_name(thing, self())") == "yes"
    assert c.ask("node(global:whereis_name(thing))") == "a@hosta"
    # Processes there that answer, and whose end is heard.
    answered = "receive {from, There} -> There after 20000 -> nobody end"
    assert (
        a.ask(f"spawn('b@hostb', erlang, send, [self(), {{from, there}}]), {answered}") == "there"
    )
    heard = "receive {'DOWN', _, process, _, Why} -> Why after 20000 -> nothing end"
    assert b.ask(f"spawn_opt('c@hostc', timer, sleep, [10], [monitor]), {heard}") == "normal"


def test_nothing_can_be_read_on_the_way_and_beside_it_all_can(
    hosts: Network, nodes: dict[str, Node], tmp_path: Path
) -> None:
    """The control is a plain link, to a hidden node; the mesh goes on beside it."""
    names = tmp_path / "hosts"
    names.write_text((EXAMPLES / "erlang/hosts").read_text() + "10.77.0.4 hostd\n")
    a = nodes["a"]
    cookies = {"a@hosta": "OfAAndD"}
    d = Node(hosts, 4, "d", tmp_path, names, cookies, *WITHOUT_EPMD, "-hidden", address="10.77.0.4")
    try:
        assert d.ask("is_alive()") == "true"
        assert a.ask("erlang:set_cookie('d@hostd', 'OfAAndD')") == "true"
        with hosts.captured() as packets:
            assert a.ask("net_adm:ping('d@hostd')") == "pong"
        assert any(b"@host" in packet for packet in packets)

        def echo(other: str) -> list[bytes]:
            with hosts.captured() as packets:
                called = f"rpc:call('{other}', erlang, iolist_to_binary, [\"{READABLE}\"])"
                assert a.ask(called) == f'<<"{READABLE}">>'
            return packets

        assert any(READABLE.encode() in packet for packet in echo("d@hostd"))
        among_the_cluster = echo("b@hostb")
        assert among_the_cluster
        assert not any(READABLE.encode() in packet for packet in among_the_cluster)
        assert all(len(mesh_of(node)) == 2 for node in nodes.values())
        calls_in_all_directions(nodes)
    finally:
        d.stop()


def test_strangers_are_refused(
    hosts: Network, instances: dict[str, Instance], nodes: dict[str, Node], keys: Path,
    pins: dict[str, str],
) -> None:  # fmt: skip
    def connect(*options: str | Path) -> bytes:
        command = ["openssl", "s_client", "-connect", "10.77.0.1:19100", "-quiet", *options]
        done: subprocess.CompletedProcess[bytes] = hosts.on(
            4,
            lambda: subprocess.run(
                command, input=b"hello", capture_output=True, timeout=240, check=False
            ),
        )
        return done.stdout

    listening = instances["a"]
    assert connect() == b""
    assert listening.wait_for_event("handshake_failed")["detail"].startswith("no_certificate")
    assert connect("-cert", keys / "stranger.crt", "-key", keys / "stranger.key") == b""
    refused = listening.wait_for_event("handshake_failed", detail="unknown_key")
    assert refused["certificate_spki"] == pins["stranger"]
    calls_in_all_directions(nodes)


def test_no_call_waits_for_a_timer(nodes: dict[str, Node]) -> None:
    """A socket without TCP_NODELAY costs 40 ms where what is sent follows what was not answered.

    Both ways: there are four sockets that send. The sizes are about those of TLS's records.
    """
    for one, other in (("a", "b"), ("b", "a")):
        name = nodes[other].name
        for size in (8, 16383, 16384, 16385, 65535, 65536, 65537):
            timed = f"""Sent = binary:copy(<<7>>, {size}),
                Times = [begin
                    {{nobody, '{name}'}} ! unanswered,
                    timer:sleep(2),
                    element(1, timer:tc(fun() ->
                        Sent = rpc:call('{name}', erlang, iolist_to_binary, [Sent]) end))
                end || _ <- lists:seq(1, 9)],
                lists:nth(5, lists:sort(Times))"""
            # The machine may have other things to do: a timer would be there each time.
            assert any(int(nodes[one].ask(timed)) < 20_000 for _ in range(20)), size


def test_64_mib_come_back_equal(nodes: dict[str, Node]) -> None:
    sent = "Sent = binary:copy(rand:bytes(65536), 1024)"
    back = "rpc:call('c@hostc', erlang, iolist_to_binary, [Sent])"
    assert nodes["a"].ask(f"{sent}, {back} =:= Sent") == "true"


def test_idleness_is_no_end_and_the_end_of_one_is_heard(
    serve_all: Serve, hosts: Network, instances: dict[str, Instance], nodes: dict[str, Node],
    keys: Path, pins: dict[str, str],
) -> None:  # fmt: skip
    """12 s: longer than net_ticktime, after which a node that says nothing is down."""
    a = nodes["a"]
    assert a.ask("net_kernel:monitor_nodes(true)") == "ok"
    heard = "receive {nodedown, Node} -> Node after %d -> nothing end"
    assert a.ask(heard % 12_000) == "nothing"
    instances["b"].close()
    assert a.ask(heard % 20_000) == "b@hostb"
    assert mesh_of(a) == ["c@hostc"]
    # Whoever tries meanwhile is refused at once, and the first call after its return works.
    assert a.ask("net_adm:ping('b@hostb')") == "pang"
    assert instances["a"].wait_for_event("tunnel_failed", end="unreachable")
    # The other tests may come in any order.
    instances["b"] = serve_example(serve_all, hosts, 2, "erlang/hostb.toml", keys, pins)
    assert a.ask("rpc:call('b@hostb', erlang, node, [])") == "b@hostb"
    until_it_is_a_mesh(nodes)


def listens(host: str) -> bool:
    try:
        connect(4369, host).close()
    except ConnectionRefusedError:
        return False
    return True


def test_with_epmd(serve: Serve, keys: Path, pins: dict[str, str], tmp_path: Path) -> None:
    with network(3) as hosts, ExitStack() as started:
        nodes = {}
        for name, number in HOSTS.items():
            serve_example(serve, hosts, number, f"erlang-with-epmd/host{name}.toml", keys, pins)
            where = {"ERL_EPMD_ADDRESS": f"127.0.1.{number}"}
            epmd = hosts.on(
                number,
                lambda where=where: subprocess.Popen(
                    ["epmd"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=where
                ),
            )
            started.callback(epmd.wait)
            started.callback(epmd.kill)
            # A node that finds none is none.
            hosts.on(number, partial(eventually, partial(listens, f"127.0.1.{number}"), "epmd"))
        names = EXAMPLES / "erlang-with-epmd/hosts"
        for name, number in HOSTS.items():
            where = {"ERL_EPMD_ADDRESS": f"127.0.1.{number}"}
            node = Node(hosts, number, name, tmp_path, names, cookies_of(name), *WITH_EPMD, **where)
            started.callback(node.stop)
            nodes[name] = node
        begin(nodes)
        calls_in_all_directions(nodes)
        # epmd's answer ends with its connection.
        assert nodes["a"].ask('erl_epmd:port_please("b", {127,0,1,2})').startswith("{port,9100,")
