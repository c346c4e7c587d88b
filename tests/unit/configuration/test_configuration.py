"""The configuration file: what it gives, and how each mistake in it is named."""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from titus_py.between.virtual_host import matches, select
from titus_py.configuration import (
    Configuration,
    Credential,
    Keyd,
    Listen,
    Loaded,
    Log,
    Source,
    Valid,
    VirtualHost,
    Worker,
    from_options,
    load,
    toml,
)
from titus_py.configuration.across_tables import too_many
from titus_py.configuration.address import IPAddress, NameAddress, UnixAddress
from titus_py.configuration.loading import _validated as validated
from titus_py.configuration.tables import table_of
from titus_py.configuration.values import _duration as duration
from titus_py.configuration.values import _duration_text as duration_text
from titus_py.configuration.values import _server_name_pattern as server_name_pattern
from titus_py.configuration.values import _uids as uids

Load = Callable[..., Loaded]

LISTEN = '[[listen]]\naddress = "[::]:443"\n'
VHOST = '[[vhost]]\ncertificate = "site.crt"\nkey = "site.key"\nbackend = "127.0.0.1:80"\n'
CHROOT = 'chroot = "{directory}/empty"\n'


@pytest.fixture
def load_text(tmp_path: Path) -> Load:
    """Load a configuration of this text, beside the files site.crt and site.key."""
    (tmp_path / "site.crt").touch()
    (tmp_path / "site.key").touch(mode=0o600)

    def load_text(text: str) -> Loaded:
        path = tmp_path / "titus.toml"
        path.write_text(text.replace("{directory}", str(tmp_path)))
        return load(path)

    return load_text


def told(loaded: Loaded) -> list[str]:
    """The mistakes as they are printed, without the file."""
    assert (loaded.configuration is None) == bool(loaded.mistakes)
    file = re.escape(loaded.source.file)
    return [re.sub(rf"^{file}(:\d+)?: ", "", str(mistake)) for mistake in loaded.mistakes]


def test_the_shortest_configuration_has_the_documented_defaults(load_text: Load) -> None:
    loaded = load_text(LISTEN + VHOST)
    assert told(loaded) == []
    configuration = loaded.configuration
    assert configuration is not None
    directory = loaded.source.directory
    assert configuration.model_dump(mode="json") == {
        "include": [],
        "worker": {
            "uids": "2100000000-2100065535",
            "max": 1000,
            "spare": 16,
            "handshake_timeout": "10s",
            "connect_timeout": "5s",
            "resolve_every": "30s",
            "drain": "30s",
            "require": [],
            "chroot": "/run/titus-py/empty",
            "backend_groups": None,
        },
        "limits": {
            "connections_per_address": None,
            "connections_per_prefix": None,
            "connections_per_second": None,
            "handshakes": None,
            "idle_timeout": "3600s",
            "half_closed_timeout": "60s",
            "keepalive": "60s",
            "lifetime": None,
            "unfinished": {"per_prefix": 500, "every": "600s"},
        },
        "keyd": {
            "socket": None,
            "user": "2099999999",
            "lock_memory": "required",
            "upstream": None,
            "upstream_user": None,
            "lend": None,
            "client": [],
            "token_user": None,
            "token_paths": [],
            "token_environment": [],
            "token_network": False,
        },
        "log": {"format": "text", "level": "info"},
        "metrics": {"address": None},
        "service": {"reload_on_change": False},
        "tunnel": [],
        "listen": [
            {
                "address": "[::]:443",
                "socket_mode": None,
                "socket_user": None,
                "socket_group": None,
                "transparent": False,
                "accept_proxy_from": None,
                "proxy_timeout": None,
                "starttls": None,
            }
        ],
        "vhost": [
            {
                "sni": None,
                "local_address": None,
                "local_port": None,
                "certificate": f"{directory}/site.crt",
                "key": f"{directory}/site.key",
                "passphrase_file": None,
                "certificates": [],
                "certificate_dir": None,
                "backend": "127.0.0.1:80",
                "balance": "round-robin",
                "health": None,
                "send_proxy": None,
                "source_address": None,
                "alpn": None,
                "alpn_required": False,
                "backends": {},
                "min_version": "TLSv1.2",
                "max_version": "TLSv1.3",
                "ciphers": None,
                "ciphersuites": None,
                "groups": None,
                "rsa_key_exchange": False,
                "truncated": "reset",
                "client_certificates": None,
                "client_ca": None,
                "client_crl": None,
                "client": [],
                "client_allow": None,
            }
        ],
    }


def test_everything_said(load_text: Load) -> None:
    loaded = load_text(
        """
        [worker]
        uids = "300000-300035"
        max = 8
        spare = 2
        handshake_timeout = 2.5
        connect_timeout = "500ms"
        drain = "1h"
        """
        + CHROOT
        + """
        [keyd]
        user = 1
        [log]
        format = "json"
        [[listen]]
        address = "192.0.2.5:443"
        [[listen]]
        address = "[::]:8443"
        [[vhost]]
        sni = ["WWW.Example.org.", "*.example.org", ""]
        local_address = "::ffff:192.0.2.5"
        local_port = 443
        certificate = "{directory}/site.crt"
        key = "site.key"
        passphrase_file = "site.key"
        backend = "app.example.org:80"
        min_version = "TLSv1.3"
        max_version = "TLSv1.3"
        ciphers = "ECDHE+AESGCM:!SHA1"
        ciphersuites = "TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
        groups = ["x25519mlkem768", "X25519", "secp256r1", "prime256v1", "P-384"]
        [[vhost]]
        certificate = "site.crt"
        key = "site.key"
        backend = "unix:app.sock"
        rsa_key_exchange = true
        """
    )
    assert told(loaded) == []
    configuration = loaded.configuration
    assert configuration is not None
    worker, (first, second) = configuration.worker, configuration.vhost
    assert worker.uids == range(300_000, 300_036)
    assert (worker.handshake_timeout, worker.connect_timeout, worker.drain) == (2.5, 0.5, 3600.0)
    assert configuration.keyd.user.uid == 1
    assert configuration.listen[1].address == IPAddress("::", 8443)
    assert first.sni == ("www.example.org", "*.example.org", "")
    assert first.local_address == "192.0.2.5"
    assert first.backend == (NameAddress("app.example.org", 80),)
    assert second.backend == (UnixAddress(f"{loaded.source.directory}/app.sock"),)
    assert second.sni is None
    assert list(loaded.credentials.values()) == [["vhost[0]."], ["vhost[1]."]]
    assert hash(configuration) == hash(configuration)


def test_what_it_gives_can_be_written_back(load_text: Load) -> None:
    loaded = load_text(LISTEN + VHOST)
    assert loaded.configuration is not None
    written = loaded.configuration.model_dump(mode="json", exclude_none=True)
    assert validated(written, loaded.source).configuration == loaded.configuration


def test_every_key_is_described() -> None:
    for table in (Configuration, Worker, Keyd, Log, Listen, VirtualHost):
        for name, field in table.model_fields.items():
            assert field.description, (table, name)


# --- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        # unknown, missing, of the wrong kind
        ("[wroker]\nmax = 3\n", "wroker: unknown table: did you mean worker?"),
        ("[[vhosts]]\n", "vhosts: unknown table: did you mean vhost?"),
        ("[worker]\nspares = 3\n", "worker.spares: unknown key: did you mean spare?"),
        ("[worker]\nhandshake-timeout = 3\n", "did you mean handshake_timeout?"),
        ("[worker]\nformat = 3\n", "worker.format: unknown key: it belongs in [log]"),
        ('[worker]\nidle_timeout = "1s"\n', "? idle_timeout belongs in [limits]"),
        ("[log]\nsni = []\n", "log.sni: unknown key: it belongs in [[vhost]]"),
        ("[log]\nzzz = {}\n", "log.zzz: unknown table: known here are format"),
        ('[log]\n"a\\nb" = 1\n', 'log."a\\nb": unknown key: known here are format'),
        ("[worker]\nmax = true\n", "worker.max: expected a whole number, not true"),
        ('[worker]\nmax = "9"\n', 'worker.max: expected a whole number, not "9"'),
        ("[worker]\nmax = 0\n", "worker.max: expected 1 or more, not 0"),
        ("[worker]\nmax = 9999999\n", "worker.max: expected 1000000 or less, not 9999999"),
        (f"[worker]\nmax = 0x{'f' * 5000}\n", "worker.max: expected 1000000 or less, not a number"),
        ("[[worker]]\n", "worker: expected a table, [worker], not an array"),
        ('[log]\nformat = "xml"\n', 'log.format: expected "text" or "json", not "xml"'),
        ("[log]\nformat = 1979-05-27\n", "not a date or time"),
        # [worker]
        ('[worker]\ndrain = "10 s"\n', 'worker.drain: expected a duration such as "10s"'),
        ("[worker]\ndrain = false\n", "worker.drain: expected a duration"),
        ("[worker]\ndrain = 0\n", "worker.drain: expected a duration from 1ms to 24h"),
        ("[worker]\ndrain = nan\n", "worker.drain: expected a duration from 1ms to 24h"),
        ('[worker]\ndrain = "25h"\n', "worker.drain: expected a duration from 1ms to 24h"),
        ('[limits]\nkeepalive = "500ms"\n', 'limits.keepalive: expected "off", or a duration from'),
        ('[limits]\nkeepalive = "10h"\n', 'limits.keepalive: expected "off", or a duration from'),
        ("[limits]\nkeepalive = false\n", "limits.keepalive: expected a duration"),
        ("[worker]\nuids = 200000\n", "worker.uids: expected a string, not 200000"),
        ('[worker]\nuids = "1000"\n', "worker.uids: expected a range of uids"),
        ('[worker]\nuids = "0-2000"\n', "worker.uids: uid 0 is root"),
        ('[worker]\nuids = "2000-1000"\n', "worker.uids: expected the lower uid first"),
        ('[worker]\nuids = "1-4294967295"\n', "none above 4294967294"),
        ('[worker]\nuids = "5000-7030"\n', "worker.uids: 2031 uids are too few for max + spare = "
         "1016 workers and their parent, each with one of its own: a reload starts as many again "
         'beside those that serve. Make it "5000-8050"'),
        ("[worker]\nmax = 65000\n", "worker.uids: 65536 uids are too few for max + spare = 65016"),
        ('[worker]\nuids = "2099000000-2100000000"\n', "worker.uids: the range holds 2099999999, "),
        ("[keyd]\nuser = 2100000001\n", "worker.uids: the range holds 2100000001, which is"),
        ('[worker]\nuids = "55000-60001"\n', "worker.uids: 60001 to 60513 are what systemd gives "
         "to users of systemd-homed: nothing else may have a worker's uid"),
        ('[keyd]\nuser = "nobody"\n', "keyd.user: 65534 is what the kernel gives to who has no"),
        ('[worker]\nchroot = "run/empty"\n', "worker.chroot: expected an absolute path"),
        ('[worker]\nchroot = "{directory}"\n', "is not empty"),
        ('[worker]\nchroot = "{directory}/site.crt"\n', "site.crt: not a directory"),
        # [keyd]
        ('[keyd]\nuser = "nosuchuser"\n', "keyd.user: no user is named \"nosuchuser\": create it "
         "with 'useradd --system --no-create-home --shell /usr/sbin/nologin nosuchuser'"),
        ('[keyd]\nuser = "root"\n', "keyd.user: keyd cannot be root"),
        ("[keyd]\nuser = 0\n", "keyd.user: keyd cannot be root"),
        ("[keyd]\nuser = -1\n", "keyd.user: expected a uid from 1"),
        ('[keyd]\nuser = "a; b"\n', 'keyd.user: "a; b" is no user name'),
        ("[keyd]\nuser = 1.5\n", "keyd.user: expected a user's name or number, not 1.5"),
        # [metrics]
        ('[metrics]\naddress = "127.0.0.1:443"\n', "metrics.address: 127.0.0.1:443 overlaps "
         'listen "[::]:443": address (line 4), [::]:443: only one can be bound'),
        ('[metrics]\naddress = ":443"\n', "metrics.address: [::]:443 overlaps"),
        # [[listen]]
        ('[[listen]]\naddress = "x:443"\n', 'listen "x:443": address: \'x\' is a name'),
        ("[[listen]]\naddress = 443\n", "listen: address: expected a string, not 443"),
        ("[[listen]]\n", "listen: address: is missing"),
        ('[[listen]]\naddress = "0.0.0.0:443"\n', 'listen "0.0.0.0:443": address: 0.0.0.0:443 '
         'overlaps listen "[::]:443": address (line 2), [::]:443: only one can be bound, and '
         "[::]:443 is for IPv4, too"),
        ('[[listen]]\naddress = ["0.0.0.0:1", "[::1]:1"]\n', "address: expected one address, not "
         "an array: each has a table of its own"),
    ],
)  # fmt: skip
def test_one_mistake(load_text: Load, text: str, mistake: str) -> None:
    lines = told(
        load_text(text + LISTEN + VHOST if "listen" not in text else LISTEN + text + VHOST)
    )
    assert len(lines) == 1
    assert mistake in lines[0]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ('sni = "www.example.org"', "sni: expected a list of names"),
        ("sni = []", "sni: an empty list matches nothing"),
        ("sni = [3]", "sni: expected a string, not 3"),
        ('sni = ["*"]', 'sni: "*" is no name: leave sni out'),
        ('sni = ["w*.example.org"]', "a wildcard stands for one whole label at the front"),
        ('sni = ["*.*.example.org"]', "a wildcard stands for one whole label at the front"),
        ('sni = ["*."]', "no host name"),
        ('sni = ["192.0.2.5"]', "is an IP address or a slip in one"),
        ('sni = ["*.münchen.de"]', "write 'xn--mnchen-3ya.de'"),
        ('local_address = "::"', "local_address: :: is every address: leave"),
        ('local_address = "localhost"', "expected an IPv4 or IPv6 address, not 'localhost'"),
        ("local_port = 65536", "local_port: expected 65535 or less"),
        (
            "local_port = 80",
            "local_port: can never match: nothing listens on port 80",
        ),
        (
            'passphrase_file = "no"',
            "passphrase_file: {directory}/no: no such file",
        ),
        (
            'passphrase_file = "."',
            "passphrase_file: {directory}: is a directory",
        ),
        ('passphrase_file = "/dev/null"', "/dev/null: is no file"),
        ('passphrase_file = ""', 'passphrase_file: expected a path, not ""'),
        ('passphrase_file = "a\\u0000b"', "passphrase_file: expected a path"),
        ('min_version = "TLSv1.1"', 'expected "TLSv1.2" or "TLSv1.3", not "TLSv1.1"'),
        (
            'min_version = "TLSv1.3"\nmax_version = "TLSv1.2"',
            "max_version: TLSv1.2 is below min_version, TLSv1.3",
        ),
        (
            'min_version = "TLSv1.3"\nrsa_key_exchange = true',
            "rsa_key_exchange: TLS 1.3 has no RSA key exchange",
        ),
        (
            "rsa_key_exchange = 1",
            "rsa_key_exchange: expected true or false, not 1",
        ),
        ('ciphers = ""', "ciphers: expected an OpenSSL cipher list"),
        ("groups = []", "groups: an empty list leaves no handshake"),
        ('groups = "X25519"', 'expected a list of groups, such as ["X25519", "P-256"], not'),
        ('groups = ["x2551"]', "did you mean X25519?"),
        ('groups = ["ffdhe2048"]', '"ffdhe2048" is no group that is served (X25519MLKEM768,'),
        ('groups = ["brainpoolP256r1"]', "no group that is served"),
        ("groups = [29]", "expected a string, not 29"),
        ('alpn = "h2"', 'alpn: expected a list of protocols, such as ["h2", "http/1.1"], not "h2"'),
        ("alpn = []", "alpn: an empty list leaves no protocol: leave alpn out"),
        ("alpn = [2]", "alpn: expected a string, not 2"),
        ('alpn = ["h2", ""]', "alpn: a protocol's name has at least one octet"),
        (f'alpn = ["{"x" * 256}"]', 'x…" has 256 octets: 255 at most'),
        ('alpn = ["h2\\u0000"]', "has a character that is not printable ASCII"),
        ('alpn = ["hö"]', 'alpn: "hö" has a character that is not printable ASCII'),
        ('alpn = ["h2", "h3", "h2"]', 'alpn: "h2" is in the list more than once'),
        ('alpn = ["acme-tls/1"]', 'alpn: "acme-tls/1" is for a certificate authority\'s challenge'),
        (f"alpn = {[str(number) for number in range(256)]}", "256 protocols: expected 255 at most"),
        ("alpn_required = true", "alpn_required: has no effect without alpn"),
        ("alpn_required = 1", "alpn_required: expected true or false, not 1"),
        (
            'alpn = ["h2"]\nbackends = ["127.0.0.1:1"]',
            "backends: expected a table, [vhost.backends], not an array",
        ),
        ('backends.h2 = "127.0.0.1:1"', 'backends: "h2" is none of this host\'s protocols'),
        (
            'alpn = ["h2"]\n[vhost.backends]\n"http/1.1" = "127.0.0.1:1"',
            'backends: "http/1.1" is none of this host\'s protocols: add it to alpn',
        ),
        (
            'alpn = ["h2"]\n[vhost.backends]\nh2 = "127.0.0.1:1"\ntruncated = "unix:/end"',
            "backends: truncated is a setting of [[vhost]]: put it above [vhost.backends]",
        ),
        (
            'alpn = ["http/1.1"]\n[vhost.backends]\n"http/1.1" = "nowhere"',
            "backends.\"http/1.1\": 'nowhere'",
        ),
        ('ciphersuites = "TLS_AES_128"', "did you mean TLS_AES_128_GCM_SHA256?"),
        ('ciphersuites = "DES"', '"DES" is no TLS 1.3 suite (TLS_AES_256_GCM_SHA384,'),
    ],
)
def test_one_mistake_in_a_virtual_host(load_text: Load, text: str, mistake: str) -> None:
    loaded = load_text(LISTEN + VHOST + text + "\n")
    (line,) = told(loaded)
    assert line.startswith("vhost")
    assert mistake.replace("{directory}", str(loaded.source.directory)) in line


def test_a_backend_of_a_protocol_has_its_own_line(load_text: Load) -> None:
    text = LISTEN + VHOST + 'alpn = ["http/1.1"]\n[vhost.backends]\n"http/1.1" = "nowhere"\n'
    (mistake,) = load_text(text).mistakes
    assert (mistake.key, mistake.line) == ('vhost[0].backends."http/1.1"', 9)


@pytest.mark.filterwarnings("error:Pydantic")
def test_protocols_and_their_backends(load_text: Load) -> None:
    text = 'sni = ["a.example"]\ngroups = ["X25519"]\nalpn = ["h2", "http/1.1"]\n'
    text += 'alpn_required = true\n[vhost.backends]\nh2 = "unix:h2.sock"\n'
    loaded = load_text(LISTEN + VHOST + text)
    assert told(loaded) == []
    assert loaded.warnings == []
    assert loaded.configuration is not None
    (vhost,) = loaded.configuration.vhost
    assert vhost.all_backends == [
        ("backend", IPAddress("127.0.0.1", 80)),
        ("backends.h2", UnixAddress(f"{loaded.source.directory}/h2.sock")),
    ]
    assert vhost.tls.alpn == ("h2", "http/1.1")
    assert vhost.tls.alpn_required
    written = loaded.configuration.model_dump(mode="json", exclude_none=True)
    assert validated(written, loaded.source).configuration == loaded.configuration


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ('alpn = ["h2", "http/1.1"]', "h2, http/1.1: 127.0.0.1:80 gets them all, and is not told"),
        (
            'alpn = ["a", "b", "c"]\nbackends = { a = "x:1", c = "x:1" }',
            "a, c: x:1 gets them all, and is not told which one a client speaks",
        ),
        ('alpn = ["h2"]', None),
        ('alpn = ["h2", "http/1.1"]\nsend_proxy = "v2-tls"', None),
        ('alpn = ["h2", "http/1.1"]\nbackends.h2 = "127.0.0.1:81"', None),
    ],
)
def test_a_backend_that_is_not_told_the_protocol_is_a_warning(
    load_text: Load, text: str, warning: str | None
) -> None:
    loaded = load_text(LISTEN + VHOST + text + "\n")
    assert told(loaded) == []
    assert [one.key for one in loaded.warnings] == (["vhost[0].alpn"] if warning else [])
    if warning:
        assert warning in str(loaded.warnings[0])


def test_every_mistake_at_once(load_text: Load) -> None:
    """Whatever else is wrong with a table, the checks across tables still see the rest of it."""
    loaded = load_text(
        """
        typo = 1
        [worker]
        drain = "never"
        max = 100000
        [[listen]]
        address = ":443"
        [[listen]]
        address = "192.0.2.5:443"
        [[vhost]]
        sni = ["*.example.org"]
        certificate = "no.crt"
        key = "site.key"
        backend = "somewhere"
        [[vhost]]
        sni = ["www.example.org"]
        certificate = "site.crt"
        key = "site.key"
        bakend = "127.0.0.1:80"
        """
    )
    keys = [mistake.key for mistake in loaded.mistakes]
    assert sorted(keys) == [
        "listen[1].address",
        "typo",
        "vhost[0].backend",
        "vhost[0].certificate",
        "vhost[1]",
        "vhost[1].backend",
        "vhost[1].bakend",
        "worker.drain",
        "worker.uids",
    ]
    assert list(loaded.credentials.values()) == [["vhost[1]."]]


@pytest.mark.parametrize("key", ["listen", "vhost"])
def test_at_least_one_of_each(load_text: Load, key: str) -> None:
    rest = LISTEN if key == "vhost" else VHOST
    assert told(load_text(rest)) == [f"{key}: at least one [[{key}]] is needed"]
    assert told(load_text(f"{key} = []\n{rest}")) == [f"{key}: at least one is needed"]
    (line,) = told(load_text(f"{key} = {{}}\n{rest}"))
    assert line == f"{key}: expected tables, each headed [[{key}]], not a table"


def test_a_list_of_variables_is_no_table(load_text: Load) -> None:
    (line,) = told(load_text(f"{LISTEN}{VHOST}[keyd.token_environment]\nA = 'b'\n"))
    assert line.endswith('keyd.token_environment: expected a list, ["…"], not a table')


@pytest.mark.parametrize(
    ("content", "mistake"),
    [
        (b"a = 1\nb = = 2\n", ':2: not valid TOML: expected "text in quotes", a whole number'),
        (b"[worker]\n[worker]\n", ":2: not valid TOML: this table is there already; of those"),
        (b"[[vhost]]\n[vhost]\n", ":2: not valid TOML: this table is there already; of those"),
        (b"[[vhost.client]]\n[[vhost]]\n", ":2: not valid TOML: above this [[vhost]], there"),
        (b"[vhost]\n[[vhost]]\n", ":2: not valid TOML: above this [[vhost]], there is a [vhost]"),
        (b"a = 1\na = 1\n", ":2: not valid TOML: this is there already"),
        (b"a = ", ':1: not valid TOML: expected "text in quotes"'),
        (b"a = 1\nkey = /etc/x.key\n", ':2: not valid TOML: expected "text in quotes"'),
        (b"a = 1\nb = 127.0.0.1:80\n", ":2: not valid TOML: something follows the value: is it"),
        # each kind of string without its end, whatever follows it
        (b'a = 1\nb = "x\nc = 1\n', ":2: not valid TOML: a string has no closing quote"),
        (b"a = 1\nb = 'x\nc = 1\n", ":2: not valid TOML: a string has no closing quote"),
        (b"a = 1\nb = 'x\nc = 'y'\n", ":2: not valid TOML: a string has no closing quote"),
        (b'a = 1\nb = "x', ":2: not valid TOML: a string has no closing quote"),
        (b'a = 1\nb = """x\n\n"\nc = 1\n', ":2: not valid TOML: a string has no closing quote"),
        (b"a = 1\nb = '''x\n\n'\nc = 1\n", ":2: not valid TOML: a string has no closing quote"),
        (b'a = "C:\\x"\n', ":1: not valid TOML: a backslash"),
        (
            b'b = 1\na = ["x" "y"]\n',
            ":2: not valid TOML: a list has no closing bracket",
        ),
        (b"listen: 1\n", ":1: not valid TOML: expected key = value"),
        (b"a = 1\nb = '\xff'\n", ":2: is not UTF-8 text"),
        ("a = 1".encode("utf-16"), ":1: is not UTF-8 text"),
        (b"a = " + b"9" * 5000, ": not valid TOML: an integer too long to read"),
        (b"a = " + b"[" * 100_000, ": not valid TOML: arrays or tables nested too deeply"),
        (b"\n" + b"a." * 100_000 + b"a = 1", ":2: a key of 100001 parts: no setting has so many"),
        (b"[" + b"a." * 32 + b"a]\n", ":1: a key of 33 parts"),
        (b"a = {" + b"a." * 100_000 + b"a = 1}", ":1: a key of 100001 parts"),
        (b"a = [\n{ b = 1, " + b"'a' . \"a\".a. " * 11 + b"a = 1}]", ":2: a key of 34 parts"),
        (b'"a".b = 1\nb = "x', ":2: not valid TOML: a string has no closing quote"),
        (b"#" * 4_194_305, ": is longer than 4194304 octets"),
    ],
)
def test_files_that_are_no_toml(tmp_path: Path, content: bytes, mistake: str) -> None:
    path = tmp_path / "titus.toml"
    path.write_bytes(content)
    loaded = load(path)
    assert loaded.configuration is None
    (line,) = map(str, loaded.mistakes)
    assert line.startswith(f"{path}{mistake}")


def test_a_byte_order_mark_is_no_mistake(load_text: Load) -> None:
    loaded = load_text("\ufeff" + LISTEN + VHOST + "typo = 1\n")
    assert [(mistake.key, mistake.line) for mistake in loaded.mistakes] == [("vhost[0].typo", 7)]


def test_each_mistake_has_its_line_and_its_host(load_text: Load) -> None:
    """Also where the key is not there, and below strings and lists that look like headings."""
    loaded = load_text(
        """
        [worker]
        uids = \"\"\"
        [[vhost]]
        \\"\\"\\" "\"\"\"
        require = [ # ]
            "landlock]",
            'speculation',
        ]
        [[listen]]  # [[listen]]
        address = "127.0.0.1"
        [[vhost]]
        sni = ["www.example.org", "example.org"]
        certificate = "site.crt"
        key = "site.key"
        backend = "127.0.0.1:80"
        typo = 1
        [[ vhost ]]
        certificate = "no.crt"
        key = "site.key"
        [metrics]
        "address" = 3
        """
    )
    found = [str(mistake).removeprefix(f"{loaded.source.file}:") for mistake in loaded.mistakes]
    assert sorted(re.match(r"(?:[^:]*: ){2}(?:[a-z]+ ?)*", text)[0].strip() for text in found) == [
        '11: listen "127.0.0.1": address',
        '17: vhost "www.example.org": typo',
        "18: vhost for any name: backend",
        "19: vhost for any name: certificate",
        "22: metrics.address: expected a string",
        "3: worker.uids: expected a range of uids such as",
        "6: worker.require[0]: expected",
    ]


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ('["root"]', "root's group reaches what is root's: give the sockets another one"),
        ("[0]", "root's group reaches what is root's: give the sockets another one"),
        ('["no such group"]', 'no group is named "no such group"'),
        ('"www-data"', "expected a list of groups, not"),
        ("[4294967295]", "expected a gid from 1 to 4294967294"),
        ("[true]", "expected a group's name or number, not true"),
    ],
)
def test_groups_of_backends(load_text: Load, groups: str, reason: str) -> None:
    (mistake,) = told(load_text(f"{LISTEN}{VHOST}[worker]\nbackend_groups = {groups}\n"))
    assert mistake.partition(": ")[2].startswith(reason)


def test_a_socket_that_no_group_reaches_is_warned_of(load_text: Load) -> None:
    gid = 2_000_000_013
    text = f"{LISTEN}{VHOST}[worker]\nbackend_groups = [{gid}]\n"
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        path = Path(directory, "app.sock")
        text = text.replace("127.0.0.1:80", f"unix:{path}")

        def barriers() -> list[str]:
            return [warning.reason.partition(" keeps ")[0] for warning in load_text(text).warnings]

        Path(directory).chmod(0o755)
        assert barriers() == [], "it may come later"
        path.touch()
        path.chmod(0o660)
        assert barriers() == [str(path)]
        os.chown(path, -1, gid)
        assert barriers() == []
        path.chmod(0o606)
        assert barriers() == [str(path)], "of the group, and so none of the others"
        path.chmod(0o660)
        Path(directory).chmod(0o750)
        assert barriers() == [directory]
        os.chown(directory, -1, gid)
        assert barriers() == []


_keys = st.text(alphabet="abc", min_size=1, max_size=3)
_strings = st.text(alphabet="a\"'[]{}#=,. \\\n", max_size=12)


def _string(text: str, kind: str) -> str:
    """In one of TOML's four forms, or in the one that can hold anything."""
    if kind == "'''" and kind not in text and not text.endswith("'"):
        return f"'''\n{text}'''"
    if kind == "'" and not set("'\n") & set(text):
        return f"'{text}'"
    if kind == '"""':
        text = text.replace("\\", r"\\")
        if kind in text or text.endswith('"'):
            text = text.replace('"', r"\"")
        return f'"""\n{text}"""'
    return json.dumps(text)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            _keys,
            st.lists(
                st.tuples(
                    _keys, st.lists(_strings, min_size=1, max_size=3), st.sampled_from("'\"\0\1")
                ),
                max_size=3,
                unique_by=lambda pair: pair[0],
            ),
        ),
        max_size=4,
    )
)
def test_lines_are_those_that_the_keys_are_on(
    arrays: list[tuple[str, list[tuple[str, list[str], str]]]],
) -> None:
    text, lines, counts = "", {}, dict[str, int]()
    for name, pairs in arrays:
        count = counts[name] = counts.get(name, 0) + 1
        lines[f"{name}[{count - 1}]"] = text.count("\n") + 1
        text += f' [[{name}]] # "\n'
        for key, values, kind in pairs:
            lines[f"{name}[{count - 1}].{key}"] = text.count("\n") + 1
            kinds = {"\0": "'''", "\1": '"""'}
            strings = [_string(value, kinds.get(kind, kind)) for value in values]
            listed = "[\n" + ",\n".join(strings) + "]"
            text += f"{key} = {strings[0] if len(strings) == 1 else listed} # ']\n"
    document = toml.read(text.encode())
    assert document.lines == lines
    for name, pairs in arrays:
        assert {key: values[0] if len(values) == 1 else values for key, values, _ in pairs} in (
            document.tables[name]
        )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    no_file = tmp_path / "no.toml"
    assert str(load(no_file).mistakes[0]) == f"{no_file}: no such file or directory"
    assert str(load(tmp_path).mistakes[0]) == f"{tmp_path}: is a directory"
    assert str(load("a\0b").mistakes[0]) == r"a\x00b: a file name cannot hold a NUL character"


def test_a_file_that_this_user_may_not_read(
    load_text: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may read everything, so the system's answer is put in its mouth.
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    lines = told(load_text(LISTEN + VHOST))
    assert [line.rpartition(": ")[2] for line in lines] == ["permission denied"] * 2


# --- warnings, the chroot -------------------------------------------------------------------


def test_a_key_that_others_can_read_is_warned_of(load_text: Load, tmp_path: Path) -> None:
    (tmp_path / "pass").touch(mode=0o600)
    text = LISTEN + VHOST + 'passphrase_file = "pass"\n'
    assert load_text(text).warnings == []
    (tmp_path / "site.key").chmod(0o640)
    (tmp_path / "pass").chmod(0o602)
    loaded = load_text(text)
    assert loaded.configuration is not None
    assert [(warning.key, warning.reason.partition(": ")[2]) for warning in loaded.warnings] == [
        ("vhost[0].key", "others than its owner can read or write it (mode 0640): chmod 600"),
        ("vhost[0].passphrase_file", "others than its owner can read or write it (mode 0602): "
         "chmod 600"),
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="the files are to be root's")
@pytest.mark.parametrize(
    ("what", "mode", "uid", "reason"),
    [
        ("secrets", 0o755, 0, ""),
        # Others can make files there, but not replace root's.
        ("secrets", 0o1777, 0, ""),
        ("secrets", 0o775, 0, "(uid 0's, mode 0775): chown root, chmod go-w"),
        ("secrets", 0o755, 9999, "(uid 9999's, mode 0755): chown root, chmod go-w"),
        ("secrets/key", 0o600, 9999, "uid 9999 owns it, and can read or write it: chown root"),
    ],
)
def test_a_key_that_another_user_can_replace_is_warned_of(
    load_text: Load, tmp_path: Path, what: str, mode: int, uid: int, reason: str
) -> None:
    """Also where it is reached by a link in a directory that is root's."""
    (tmp_path / "secrets").mkdir()
    (tmp_path / "site.key").rename(tmp_path / "secrets" / "key")
    (tmp_path / "site.key").symlink_to(tmp_path / "secrets" / "key")
    (tmp_path / what).chmod(mode)
    os.chown(tmp_path / what, uid, 0)
    loaded = load_text(LISTEN + VHOST)
    assert loaded.configuration is not None
    if reason:
        (warning,) = loaded.warnings
        assert warning.key == "vhost[0].key"
        assert warning.reason.endswith(reason)
    else:
        assert loaded.warnings == []


@pytest.mark.skipif(os.geteuid() != 0, reason="the file is to be root's")
def test_a_configuration_that_another_user_can_write_is_warned_of(
    load_text: Load, tmp_path: Path
) -> None:
    load_text(LISTEN + VHOST)
    (path,) = tmp_path.glob("*.toml")
    path.chmod(0o664)
    (warning,) = load(path).warnings
    assert warning.reason == f"{path}: others than its owner can write it (mode 0664): chmod go-w"


@pytest.mark.skipif(os.geteuid() != 0, reason="the directory is to be root's")
@pytest.mark.parametrize(
    ("mode", "uid", "fine"),
    [(0o755, 0, True), (0o775, 0, False), (0o757, 0, False), (0o755, 9999, False)],
)
def test_the_chroot_is_roots_alone(
    load_text: Load, tmp_path: Path, mode: int, uid: int, fine: bool
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    empty.chmod(mode)
    os.chown(empty, uid, 0)
    lines = told(load_text("[worker]\n" + CHROOT + LISTEN + VHOST))
    assert fine == (lines == [])
    assert fine or "others than root can write to it" in lines[0]


# --- options --------------------------------------------------------------------------------


def test_options_stand_for_a_file(
    load_text: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = load_text(LISTEN + VHOST).configuration
    monkeypatch.chdir(tmp_path)
    loaded = from_options(["[::]:443"], "127.0.0.1:80", "site.crt", "site.key")
    assert loaded.configuration == written


def test_mistakes_in_options_name_the_option(tmp_path: Path) -> None:
    loaded = from_options([":443", "x", "0.0.0.0:443"], "y", "/no.crt", str(tmp_path))
    assert loaded.configuration is None
    lines = [str(mistake) for mistake in loaded.mistakes]
    assert sorted(line.partition(": ")[0] for line in lines) == [
        "--backend", "--cert", "--key", "--listen", "--listen"
    ]  # fmt: skip
    assert "--cert: /no.crt: no such file or directory" in lines
    overlap = "--listen: 0.0.0.0:443 overlaps --listen, [::]:443: only one can be bound"
    assert f"{overlap}, and [::]:443 is for IPv4, too" in lines
    assert str(from_options([], "a:1", "/", "/").mistakes[0]) == "--listen: at least one is needed"


# --- which virtual host ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "server_name", "matched"),
    [
        ("www.example.org", "www.example.org", True),
        ("www.example.org", "WWW.EXAMPLE.ORG.", True),
        ("www.example.org", "example.org", False),
        ("www.example.org", None, False),
        ("*.example.org", "www.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "a.www.example.org", False),
        ("*.example.org", ".example.org", False),
        ("*.example.org", "*.example.org", True),
        ("www.example.org", "www.example.org..", False),
        ("k.example", "\u212a.example", False),
        ("", None, True),
        ("", "", False),
        ("", ".", False),
    ],
)
def test_matches(pattern: str, server_name: str | None, matched: bool) -> None:
    assert matches(pattern, server_name) is matched


def test_the_first_that_matches_is_selected() -> None:
    patterns = [("a.example",), ("", "*.example"), None]
    names = ["a.example", "b.example", None, "other"]
    assert [select(patterns, name) for name in names] == [0, 1, 1, 2]
    assert select(patterns[:2], "other") is None
    assert select([], None) is None


#: With a name for each pattern that no other of them has.
NAMES = ["a.x", "b.x", "c.x", "a.y", "b.y", "a.a.x", "other", None]
PATTERNS = ["a.x", "b.x", "*.x", "*.y", "a.y", "*.a.x", ""]
HOSTS = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1", "2001:db8::2"]
WILDCARDS = {"::": HOSTS, "0.0.0.0": HOSTS[:3]}

vhost_tables = st.fixed_dictionaries(
    {},
    optional={
        "sni": st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3),
        "local_address": st.sampled_from([HOSTS[0], HOSTS[1], HOSTS[3]]),
        "local_port": st.sampled_from([1, 2]),
    },
)
listen_tables = st.builds(
    lambda host, port: {"address": str(IPAddress(host, port))},
    st.sampled_from(["::", "0.0.0.0", *HOSTS[:2], HOSTS[3]]),
    st.sampled_from([1, 2, 3]),
)


@settings(max_examples=400)
@given(
    st.lists(vhost_tables, min_size=1, max_size=5), st.lists(listen_tables, min_size=1, max_size=3)
)
@example([{"sni": ["a.x"]}, {"sni": ["b.x"]}, {"sni": ["a.x", "b.x"]}], [{"address": ":1"}])
@example([{"local_port": 1}, {"local_port": 2}, {}], [{"address": ":1"}, {"address": ":2"}])
def test_a_virtual_host_that_never_comes_first_is_a_mistake_and_no_other(
    vhosts: list[dict[str, Any]], listens: list[dict[str, Any]]
) -> None:
    """Held against a trial of every connection of a small world, the first match taken."""
    ends = set()
    for table in listens:
        host, _, port = table["address"].rpartition(":")
        host = host.strip("[]") or "::"
        ends |= {(end, int(port)) for end in WILDCARDS.get(host, [host])}
    chosen = set()
    for (host, port), name in itertools.product(ends, NAMES):
        here = [
            i
            for i, vhost in enumerate(vhosts)
            if vhost.get("local_address", host) == host and vhost.get("local_port", port) == port
        ]
        patterns = [tuple(vhosts[i]["sni"]) if "sni" in vhosts[i] else None for i in here]
        first = select(patterns, name)
        if first is not None:
            chosen.add(here[first])

    loaded = validated({"listen": listens, "vhost": vhosts}, Source("f", Path("/")))
    reported = [
        int(mistake.key[len("vhost[") :].partition("]")[0])
        for mistake in loaded.mistakes
        if mistake.reason.startswith("can never match")
    ]
    assert len(reported) == len(set(reported))
    assert set(reported) == set(range(len(vhosts))) - chosen


def test_thousands_of_virtual_hosts_are_checked_in_moments(load_text: Load) -> None:
    vhosts = "".join(f'{VHOST}sni = ["h{i}.example", "*.h{i}.example"]\n' for i in range(1500))
    assert told(load_text(LISTEN + vhosts + VHOST)) == []


def test_metrics_are_not_where_a_backend_is(load_text: Load) -> None:
    metrics = '[metrics]\naddress = "unix:app.sock"\n'
    vhost = VHOST.replace("127.0.0.1:80", "unix:app.sock") + 'sni = ["www.example.org"]\n'
    (line,) = told(load_text(metrics + LISTEN + vhost))
    assert line.startswith("metrics.address: unix:/")
    assert line.endswith('app.sock is vhost "www.example.org": backend (line 8), too')


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("127.0.0.2:9443", False),
        ("[::1]:9443", False),
        ("unix:/run/metrics.sock", False),
        ("192.0.2.1:9443", True),
        ("[2001:db8::1]:9443", True),
        (":9443", True),
    ],
)
def test_metrics_for_other_machines_are_warned_of(
    load_text: Load, address: str, warned: bool
) -> None:
    loaded = load_text(f'[metrics]\naddress = "{address}"\n{LISTEN}{VHOST}')
    assert loaded.configuration is not None
    assert [one.key for one in loaded.warnings if "other machines can connect" in one.reason] == [
        "metrics.address"
    ] * warned


def test_both_virtual_hosts_are_named(load_text: Load) -> None:
    hosts = ['sni = ["a.x"]', 'sni = ["b.x", "c.x"]', 'sni = ["C.x", "a.x"]']
    assert told(load_text(LISTEN + "".join(f"{VHOST}{host}\n" for host in hosts))) == [
        'vhost "C.x": can never match: all that it could is taken by vhost "a.x" (line 3), '
        'vhost "b.x" (line 8)'
    ]


# --- parsers --------------------------------------------------------------------------------


@given(st.integers(1, 86_400_000))
def test_durations_print_as_they_parse(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert duration(duration_text(seconds)) == pytest.approx(seconds)
    assert duration(f"{milliseconds}ms") == pytest.approx(seconds)
    assert duration(seconds) == seconds


@given(st.text() | st.from_regex(r"\d+(\.\d+)?[a-z]{0,2}") | st.floats() | st.integers())
def test_a_duration_is_within_a_day_or_a_mistake(value: object) -> None:
    try:
        seconds = duration(value)
    except ValueError:
        return
    assert 0.001 <= seconds <= 86_400


@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_uids_are_a_range_without_root(first: int, last: int) -> None:
    try:
        parsed = uids(f"{first}-{last}")
    except ValueError:
        assert first == 0 or first > last or last > 2**32 - 2
    else:
        assert (parsed[0], parsed[-1]) == (first, last)


@given(st.text())
def test_a_server_name_pattern_matches_itself(text: str) -> None:
    try:
        pattern = server_name_pattern(text)
    except ValueError:
        return
    assert matches(pattern, pattern.replace("*", "a") or None)
    assert server_name_pattern(pattern) == pattern


KEYS = list(Configuration.model_fields)
values: st.SearchStrategy[Any] = st.recursive(
    st.none().map(lambda _: True)
    | st.integers()
    | st.floats()
    | st.text()
    | st.dates()
    | st.sampled_from(["10s", "1-2", ":443", "unix:/a", "*.a", "site.key", "TLSv1.2"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = [
    name
    for field in Configuration.model_fields.values()
    if (table := table_of(field)) is not None
    for name in table.model_fields
]
tables = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), values, max_size=6)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5),
                       values | tables | st.lists(tables, max_size=3), max_size=5))  # fmt: skip
def test_any_content_is_a_configuration_or_mistakes(content: dict[str, Any]) -> None:
    loaded = validated(content, Source("titus.toml", Path("/nowhere")))
    assert (loaded.configuration is None) == bool(loaded.mistakes)
    for mistake in loaded.mistakes:
        assert mistake.reason
        assert str(mistake).isprintable()
        assert "Input should" not in mistake.reason


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary() | st.text(alphabet='[]="\n# aworke\\', max_size=60).map(str.encode))
def test_any_file_is_a_configuration_or_mistakes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "titus.toml"
    path.write_bytes(content)
    loaded = load(path)
    assert loaded.configuration is None
    assert loaded.mistakes


def test_only_who_may_needs_pydantic() -> None:
    """The parent and the worker import this, too, and so must get little with it."""
    names = subprocess.run(
        [sys.executable, "-c", "import sys, titus_py.between.virtual_host\nprint(*sys.modules)"],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[3],
    ).stdout.split()  # fmt: skip
    assert not {"pydantic", "dataclasses", "unicodedata", "inspect"} & set(names)


KEY_TEXT = (
    "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC\n-----END PRIVATE KEY-----\n"
)


@pytest.mark.parametrize("key", ["key", "certificate", "passphrase_file"])
@pytest.mark.parametrize("text", [KEY_TEXT, KEY_TEXT.replace("\n", " ")])
def test_what_a_file_holds_in_the_place_of_its_path_is_not_repeated(
    load_text: Load, key: str, text: str
) -> None:
    """It would be in every log."""
    tables = {"certificate": "site.crt", "key": "site.key", "backend": "127.0.0.1:80"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in (tables | {key: text}).items()]
    loaded = load_text("\n".join(["[[listen]]", 'address = ":443"', "[[vhost]]", *lines]))
    [mistake] = [one for one in loaded.mistakes if one.key == f"vhost[0].{key}"]
    assert "not what the file holds" in mistake.reason
    assert not any(line in str(mistake) for line in text.splitlines())


@pytest.mark.parametrize(("number", "said"), [(4096, []), (4097, ["more than 4096 tables"])])
def test_more_virtual_hosts_than_a_message_names_are_a_mistake(
    load_text: Load, number: int, said: list[str]
) -> None:
    loaded = load_text("[[vhost]]\n" * number)
    reasons = [one.reason for one in loaded.mistakes if one.key == "vhost"]
    assert [reason.partition(":")[0] for reason in reasons] == said


@pytest.mark.parametrize(
    ("number", "said"), [(20_000, []), (20_001, ["more than 20000 different keys"])]
)
def test_more_keys_than_a_message_names_are_a_mistake(number: int, said: list[str]) -> None:
    credentials = [Credential(Path("site.crt"), Path(f"{key}.key"), None) for key in range(number)]
    found = too_many({"vhost": []}, credentials, Source("", Path()))
    assert [mistake.reason.partition(":")[0] for mistake in found] == said


@pytest.mark.parametrize("off", ['"off"', '"0"', "0"])
def test_keepalive_can_be_turned_off(load_text: Load, off: str) -> None:
    configuration = load_text(f"{LISTEN}[limits]\nkeepalive = {off}\n{VHOST}").configuration
    assert configuration is not None
    assert configuration.limits.keepalive == 0
    assert configuration.model_dump(mode="json")["limits"]["keepalive"] == "off"


def test_several_backends(load_text: Load) -> None:
    loaded = load_text(
        LISTEN
        + VHOST.replace('"127.0.0.1:80"', '["10.0.0.5:80", "app.example:80", "unix:a.sock"]')
        + 'balance = "source"\n'
    )
    assert told(loaded) == []
    assert loaded.configuration is not None
    (vhost,) = loaded.configuration.vhost
    assert list(map(str, vhost.backend)) == [
        "10.0.0.5:80",
        "app.example:80",
        f"unix:{loaded.source.directory}/a.sock",
    ]
    dumped = loaded.configuration.model_dump(mode="json", exclude_defaults=True)
    assert Configuration.model_validate(dumped, context=Valid()) == loaded.configuration


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[]", "0 addresses: expected 1 to 64"),
        (json.dumps([f"10.0.0.1:{n}" for n in range(1, 66)]), "65 addresses: expected 1 to 64"),
        ('["10.0.0.5:80", "10.0.0.5:80"]', "10.0.0.5:80 is in the list more than once"),
        ('["10.0.0.5:80", 80]', "expected a string, not 80"),
        ("80", "expected an address such as 127.0.0.1:8080, or a list of addresses such as"),
    ],
)
def test_what_is_no_list_of_backends(load_text: Load, value: str, reason: str) -> None:
    [mistake] = load_text(LISTEN + VHOST.replace('"127.0.0.1:80"', value)).mistakes
    assert mistake.key == "vhost[0].backend"
    assert mistake.reason.startswith(reason)


def test_health_checks(load_text: Load) -> None:
    text = LISTEN + VHOST + '[vhost.health]\nevery = "1s"\nsend = "PING\\r\\n"\nexpect = "+PONG"\n'
    loaded = load_text(text)
    assert told(loaded) == []
    assert loaded.configuration is not None
    health = loaded.configuration.vhost[0].health
    assert health is not None
    assert health.plan == (1.0, 2.0, 3, 2, "PING\r\n", "+PONG")
    dumped = loaded.configuration.model_dump(mode="json", exclude_defaults=True)
    assert Configuration.model_validate(dumped, context=Valid()) == loaded.configuration


@pytest.mark.parametrize(
    ("line", "key", "reason"),
    [
        ('every = "99ms"', "every", "expected a duration from 100ms to 24h"),
        ("fall = 0", "fall", "expected 1 or more, not 0"),
        ('rise = "2"', "rise", 'expected a whole number, not "2"'),
        ('send = "PING"', "expect", "is missing: without it"),
        ('expect = ""', "expect", "0 octets: expected 1 to 1024"),
        (f'expect = "{"x" * 1025}"', "expect", "1025 octets: expected 1 to 1024"),
        ("expect = 1", "expect", "expected a string, not 1"),
        ('often = "1s"', "often", "unknown key: known here are every, timeout, fall"),
    ],
)
def test_mistakes_in_health_checks(load_text: Load, line: str, key: str, reason: str) -> None:
    [mistake] = load_text(LISTEN + VHOST + f"[vhost.health]\n{line}\n").mistakes
    assert mistake.key == f"vhost[0].health.{key}"
    assert mistake.reason.startswith(reason)


@pytest.mark.parametrize("backend", ["127.0.0.1:80", "app.example:80"])
@pytest.mark.parametrize("metrics", ["", '[metrics]\naddress = "127.0.0.1:9443"\n'])
def test_the_resolver_and_the_metrics_take_one_uid_each(
    load_text: Load, backend: str, metrics: str
) -> None:
    text = '[worker]\nmax = 10\nspare = 2\nuids = "300000-300025"\n' + LISTEN
    text += VHOST.replace("127.0.0.1:80", backend) + metrics
    more = ("app" in backend) + bool(metrics)
    for last in range(300025, 300028):
        mistakes = load_text(text.replace("300025", str(last))).mistakes
        assert [mistake.key for mistake in mistakes] == ["worker.uids"] * (last < 300025 + more)
