"""ADDR, as text and as value: the standard library's ipaddress is the second opinion."""

import ipaddress
import itertools
import os
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from integration.namespaces import ip, new_namespace, within

from titus_py.configuration.address import (
    IPAddress,
    NameAddress,
    UnixAddress,
    canonical_ip,
    host_name,
    parse_backend,
    parse_listen,
    unix_address,
)

PORTS = st.integers(1, 65535)
LABELS = st.from_regex(r"[a-z]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=4).map(".".join)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", IPAddress("127.0.0.1", 8080)),
        ("0.0.0.0:443", IPAddress("0.0.0.0", 443)),
        ("[::1]:8080", IPAddress("::1", 8080)),
        ("[2001:DB8:0:0::5]:1", IPAddress("2001:db8::5", 1)),
        (":8443", IPAddress("::", 8443)),
        ("[::]:65535", IPAddress("::", 65535)),
        ("[::ffff:192.0.2.5]:443", IPAddress("192.0.2.5", 443)),
        ("[fe80::1%eth0]:443", IPAddress("fe80::1%eth0", 443)),
    ],
)
def test_listening_addresses(text: str, address: IPAddress) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", IPAddress("127.0.0.1", 8080)),
        ("App.Example.org:80", NameAddress("app.example.org", 80)),
        ("db.example.org.:80", NameAddress("db.example.org.", 80)),
        ("app_1:80", NameAddress("app_1", 80)),
        ("unix:/run/app.sock", UnixAddress("/run/app.sock")),
        ("unix:run/a:b", UnixAddress("run/a:b")),
    ],
)
def test_backend_addresses(text: str, address: object) -> None:
    assert parse_backend(text) == address


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no address with a port"),
        ("8443", "no address with a port"),
        ("127.0.0.1", "no address with a port"),
        ("[::1]", "no address with a port"),
        ("[::1:80", "no address with a port"),
        ("[[::1]]:80", "no address with a port"),
        ("::1:8080", "in brackets"),
        ("http://127.0.0.1:8080", "without http:// and without a path"),
        ("https://www.example.org/", "without https:// and without a path"),
        ("[127.0.0.1]:80", "brackets are for IPv6"),
        ("127.0.0.1:", "a port from 1 to 65535"),
        ("127.0.0.1:0", "a port from 1 to 65535"),
        ("127.0.0.1:65536", "a port from 1 to 65535"),
        ("127.0.0.1:+80", "a port from 1 to 65535"),
        ("127.0.0.1:٨٠", "a port from 1 to 65535"),
        ("127.0.0.1:80\n", "a port from 1 to 65535"),
        ("127.0.0.300:80", "an IP address or a slip in one"),
        ("127.1:80", "an IP address or a slip in one"),
        ("0x7f000001:80", "an IP address or a slip in one"),
        ("[::g]:80", "expected an IPv4 or IPv6 address"),
        ("[::1%lo]:80", "only link-local"),
        ("[fe80::1]:80", "the name of its interface"),
        ("[fe80::1%2]:80", "the name of its interface"),
        ("[::1\0]:80", "expected an IPv4 or IPv6 address"),
        ("a b:80", "no host name"),
        ("-a.example:80", "no host name"),
        ("a..example:80", "no host name"),
        ("*.example.org:80", "no host name"),
    ],
)
def test_neither_to_listen_nor_to_connect(text: str, reason: str) -> None:
    for parse in (parse_listen, parse_backend):
        with pytest.raises(ValueError, match=reason):
            parse(text)


def test_every_address_is_written_without_a_star() -> None:
    with pytest.raises(ValueError, match=r"'\*:443' is written without the star: .* :8443 \(every"):
        parse_listen("*:443")


def test_a_name_is_no_address_to_listen_on() -> None:
    reason = "'localhost' is a name, and a listening address is numeric"
    with pytest.raises(ValueError, match=f"{reason}.*expected 127.0.0.1:8443"):
        parse_listen("localhost:443")


@pytest.mark.parametrize("text", [":80", "0.0.0.0:80", "[::]:80"])
def test_a_backend_is_one_address(text: str) -> None:
    with pytest.raises(ValueError, match="means every address"):
        parse_backend(text)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("", "a path"), ("@name", "abstract"), ("/a\0b", "NUL"), ("/" + "ü" * 54, "109 octets")],
)
def test_where_no_unix_socket_can_be(path: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_backend(f"unix:{path}")


def test_the_longest_unix_path_is_the_one_that_can_be_bound() -> None:
    path = "/tmp/" + "x" * 102
    assert unix_address(path).path == path
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(FileNotFoundError):
        client.connect(path)
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(OSError, match="too long"):
        client.connect(path + "xx")


@pytest.mark.parametrize(
    ("name", "a_label"),
    [("münchen.de", "xn--mnchen-3ya.de"), ("Straße.DE", "xn--strae-oqa.de")],
)
def test_a_name_that_is_not_ascii_is_told_its_a_label(name: str, a_label: str) -> None:
    with pytest.raises(ValueError, match=f"write '{a_label}'"):
        host_name(name)


@given(st.ip_addresses(), PORTS)
def test_numeric_addresses_as_ipaddress_sees_them(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    if ip.is_link_local and ip.version == 6:
        with pytest.raises(ValueError, match="interface"):
            canonical_ip(str(ip))
        return
    canonical = canonical_ip(ip.exploded)
    assert ipaddress.ip_address(canonical) == (mapped or ip)
    address = IPAddress(canonical, port)
    assert parse_listen(str(address)) == address
    assert address.family == (socket.AF_INET if ":" not in canonical else socket.AF_INET6)


@given(NAMES, PORTS)
def test_names_print_as_they_parse(name: str, port: int) -> None:
    address = NameAddress(name, port)
    assert parse_backend(str(address)) == address


@given(st.text())
@example("\ud800:1")
@example("unix:\ud800")
@example("[%]:1")
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    for parse in (parse_listen, parse_backend):
        try:
            address = parse(text)
        except ValueError:
            continue
        assert parse(str(address)) == address


@given(st.text(alphabet="0123456789abcdef:.[]%x-*", max_size=30))
def test_what_looks_like_an_address_too(text: str) -> None:
    test_any_text_is_an_address_or_a_value_error.hypothesis.inner_test(text)  # type: ignore[attr-defined]


def test_a_wildcard_covers_its_family_and_the_dual_stack_one_covers_all() -> None:
    every, every_v4 = IPAddress("::", 443), IPAddress("0.0.0.0", 443)
    v4, v6 = IPAddress("192.0.2.5", 443), IPAddress("2001:db8::5", 443)
    assert [every.covers(a) for a in (every, every_v4, v4, v6)] == [True] * 4
    assert [every_v4.covers(a) for a in (every, every_v4, v4, v6)] == [False, True, True, False]
    assert [v4.covers(a) for a in (every, every_v4, v4, v6)] == [False, False, True, False]
    assert not every.covers(IPAddress("::", 444))


def test_the_kernel_agrees_on_what_covers_what() -> None:
    """In a network where nobody else has a port: it may be free on one address alone."""
    hosts = ["::", "0.0.0.0", "127.0.0.1", "127.0.0.2", "::1"]

    def overlap(first: str, second: str) -> tuple[bool, bool]:
        """What the kernel says, and what we say."""
        with socket.socket(IPAddress(first, 1).family) as one:
            one.bind((first, 0))
            one.listen()
            a, b = (IPAddress(host, one.getsockname()[1]) for host in (first, second))
            with socket.socket(b.family) as two:
                try:
                    two.bind(b.sockaddr())
                    refused = False
                except OSError:
                    refused = True
            return refused, a.covers(b) or b.covers(a)

    def look() -> dict[tuple[str, str], tuple[bool, bool]]:
        ip("link", "set", "lo", "up")
        return {pair: overlap(*pair) for pair in itertools.product(hosts, repeat=2)}

    namespace = new_namespace()
    try:
        found = within(namespace, look)
    finally:
        os.close(namespace)
    assert len(found) == len(hosts) ** 2
    assert not {pair: seen for pair, seen in found.items() if seen[0] != seen[1]}


def test_sockaddr_finds_the_interface() -> None:
    assert IPAddress("127.0.0.1", 1).sockaddr() == ("127.0.0.1", 1)
    assert IPAddress("::1", 1).sockaddr() == ("::1", 1, 0, 0)
    lo = socket.if_nametoindex("lo")
    assert IPAddress("fe80::1%lo", 1).sockaddr() == ("fe80::1", 1, 0, lo)
    with pytest.raises(OSError, match="no interface is named 'nosuch0'"):
        IPAddress("fe80::1%nosuch0", 1).sockaddr()
