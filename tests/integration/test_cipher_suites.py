"""Suites and groups as a virtual host is set to have them, by real clients."""

import re
import subprocess
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from OpenSSL import SSL

from .conftest import Certificates, Serve
from .instance import Instance, free_port
from .peers import Listener, TlsClient, alert_in
from .suites import every_suite

TLS12, TLS13 = SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION
HANDSHAKE_FAILURE = 40
MOZILLA = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:"
    "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:"
    "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305:"
    "DHE-RSA-AES128-GCM-SHA256:DHE-RSA-AES256-GCM-SHA384:DHE-RSA-CHACHA20-POLY1305"
)
#: A name, the kind of key, and the settings.
HOSTS: dict[str, tuple[str, dict[str, object]]] = {
    "default.example": ("RSA-2048", {}),
    "mozilla.example": ("RSA-2048", {"ciphers": MOZILLA}),
    "high.example": ("RSA-2048", {"ciphers": "HIGH:!aNULL:!MD5"}),
    "all.example": ("P-256", {"ciphers": "ALL"}),
    "ordered.example": (
        "RSA-2048",
        {
            "ciphers": "AES128-SHA:ECDHE-RSA-AES128-SHA:ECDHE-RSA-AES256-GCM-SHA384",
            "ciphersuites": "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384",
            "rsa_key_exchange": True,
        },
    ),
    "rsa.example": ("RSA-2048", {"rsa_key_exchange": True}),
    "groups.example": ("P-256", {"groups": ["P-384", "X25519"]}),
    "hybrid.example": ("P-256", {"groups": ["X25519", "X25519MLKEM768"]}),
}


@pytest.fixture(scope="module")
def instance(serve_all: Serve, certificates: Certificates, echoing: Listener) -> Instance:
    vhosts = []
    for name, (kind, asked) in HOSTS.items():
        issued = certificates(kind, name)
        files = {"certificate": issued.certificate, "key": issued.key}
        vhosts.append({"sni": [name], "backend": echoing.address, **files, **asked})
    return serve_all(vhost=vhosts)


def agreed(instance: Instance, name: str, *options: str) -> str | None:
    """The suite that openssl's client gets; None where the server has sent handshake_failure."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{instance.port}"]
    client = subprocess.run(
        [*command, "-servername", name, *options],
        input="",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if client.returncode:
        assert "alert handshake failure" in client.stderr, client.stderr
        return None
    found = re.search(r"Cipher is (\S+)$", client.stdout, re.MULTILINE)
    assert found is not None
    return found[1]


# --- only what can be completed --------------------------------------------------------


@pytest.mark.parametrize("name", ["mozilla.example", "high.example", "all.example"])
def test_a_suite_is_either_completed_or_not_offered(instance: Instance, name: str) -> None:
    """No client gets internal_error, and none rings an alarm (``Instance.close`` looks)."""
    suites = every_suite("-tls1_2")
    assert {"DHE-RSA-AES128-GCM-SHA256", "AES128-SHA", "ADH-AES128-SHA"} <= set(suites)
    left = [suite for suite in suites if not suite.startswith("ECDHE-")]
    assert agreed(instance, name, "-tls1_2", "-cipher", ":".join(left) + ":@SECLEVEL=0") is None
    while suite := agreed(instance, name, "-tls1_2", "-cipher", ":".join(suites) + ":@SECLEVEL=0"):
        assert suite.startswith("ECDHE-")
        suites.remove(suite)
    assert suites


@pytest.mark.parametrize("name", ["default.example", "all.example"])
@pytest.mark.parametrize("scheme", ["SHA224", "SHA1"])
def test_a_scheme_that_keyd_does_not_sign_with_is_not_agreed_upon(
    instance: Instance, name: str, scheme: str
) -> None:
    schemes = f"RSA+{scheme}:ECDSA+{scheme}"
    options = ("-tls1_2", "-sigalgs", schemes, "-cipher", "DEFAULT:@SECLEVEL=0")
    assert agreed(instance, name, *options) is None


@pytest.mark.parametrize(
    ("group", "version"),
    [
        ("curveSM2", TLS12), ("curveSM2", TLS13), ("curveSM2MLKEM768", TLS13),
        ("brainpoolP256r1", TLS12), ("brainpoolP256r1tls13", TLS13),
        ("ffdhe2048", TLS12), ("ffdhe2048", TLS13), ("ffdhe3072", TLS13),
    ],
)  # fmt: skip
def test_a_group_that_keyd_signs_no_parameters_of_is_not_agreed_upon(
    instance: Instance, group: str, version: int
) -> None:
    versions = version, version
    with TlsClient(instance.port, "high.example", versions=versions, groups=[group]) as client:
        with pytest.raises(SSL.Error):
            client.handshake()
        assert alert_in(client.received) == HANDSHAKE_FAILURE


#: What this library's clients may offer, for the proxy to choose from.
EVERY_GROUP = [
    "X25519MLKEM768", "SecP256r1MLKEM768", "SecP384r1MLKEM1024", "MLKEM768", "X25519", "X448",
    "P-256", "P-384", "P-521", "brainpoolP256r1", "brainpoolP256r1tls13", "ffdhe2048", "curveSM2",
    "curveSM2MLKEM768",
]  # fmt: skip


def some(values: Sequence[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=6, unique=True)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(HOSTS)),
    suites=some([*every_suite("-tls1_2"), "ECDHE", "kRSA", "ALL"]),
    groups=some(EVERY_GROUP),
    versions=st.sampled_from([(TLS12, TLS12), (TLS13, TLS13), (TLS12, TLS13)]),
)
def test_whatever_a_client_offers_it_gets_a_handshake_or_handshake_failure(
    instance: Instance, name: str, suites: list[str], groups: list[str], versions: tuple[int, int]
) -> None:
    """And rings no alarm. (A client that finds nothing to offer does not get so far.)"""
    ciphers = ":".join(suites) + ":ECDHE-RSA-AES128-GCM-SHA256:@SECLEVEL=0"
    with TlsClient(instance.port, name, None, versions, ciphers, groups=groups) as client:
        try:
            client.handshake()
        except SSL.Error:
            assert alert_in(client.received) in (HANDSHAKE_FAILURE, None)
            assert alert_in(client.received) or not client.received


# --- in this order ---------------------------------------------------------------------


def test_the_servers_order_holds(instance: Instance) -> None:
    suites = ["ECDHE-RSA-AES256-GCM-SHA384", "ECDHE-RSA-AES128-SHA", "AES128-SHA"]
    expected = ["ECDHE-RSA-AES128-SHA", "ECDHE-RSA-AES256-GCM-SHA384", "AES128-SHA"]
    for order in (suites, suites[::-1]):
        asked, answered = list(order), []
        while asked:
            options = ("-tls1_2", "-cipher", ":".join(asked))
            suite = agreed(instance, "ordered.example", *options)
            assert suite is not None
            answered.append(suite)
            asked.remove(suite)
        assert answered == expected
    for tls13 in ("TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"):
        suite = agreed(instance, "ordered.example", "-tls1_3", "-ciphersuites", tls13)
        assert suite == tls13.rpartition(":")[2]


@pytest.mark.parametrize("name", ["rsa.example", "ordered.example"])
def test_the_rsa_key_exchange_is_for_who_knows_nothing_better(
    instance: Instance, name: str
) -> None:
    """RFC 9325 §4.1."""
    ciphers = "AES128-GCM-SHA256:AES128-SHA:ECDHE-RSA-AES256-GCM-SHA384"
    suite = agreed(instance, name, "-tls1_2", "-cipher", ciphers)
    assert suite == "ECDHE-RSA-AES256-GCM-SHA384"
    rsa = "AES128-SHA" if name == "ordered.example" else "AES128-GCM-SHA256"
    assert agreed(instance, name, "-tls1_2", "-cipher", f"{rsa}:@SECLEVEL=0") == rsa


def test_a_client_that_would_rather_have_chacha_gets_it(instance: Instance) -> None:
    aes, chacha = "ECDHE-RSA-AES256-GCM-SHA384", "ECDHE-RSA-CHACHA20-POLY1305"
    for ciphers in (f"{aes}:{chacha}", f"{chacha}:{aes}"):
        first = ciphers.partition(":")[0]
        assert agreed(instance, "default.example", "-tls1_2", "-cipher", ciphers) == first


def test_curl_gets_the_servers_choice(instance: Instance) -> None:
    for ciphers in ("AES128-SHA:ECDHE-RSA-AES128-SHA", "ECDHE-RSA-AES128-SHA:AES128-SHA"):
        command = ["curl", "-sSvk", "--http0.9", "--max-time", "60", "--tls-max", "1.2"]
        command += ["--resolve", f"ordered.example:{instance.port}:127.0.0.1"]
        with subprocess.Popen(
            [*command, "--ciphers", ciphers, f"https://ordered.example:{instance.port}/"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as client:
            assert client.stderr is not None
            using = next((line for line in client.stderr if "SSL connection using" in line), "")
            # Its backend, an echo, does not end the connection.
            client.kill()
        assert "SSL connection using TLSv1.2 / ECDHE-RSA-AES128-SHA" in using


# --- groups ----------------------------------------------------------------------------


def group_of(instance: Instance, name: str, *groups: str, version: str = "TLSv1.3") -> str | None:
    """What a client that can do these has agreed upon, by the proxy's own word."""
    option = "-" + version.lower().replace("v", "").replace(".", "_")
    before, here = len(instance.events()), f"127.0.0.1:{free_port()}"
    suite = agreed(instance, name, option, "-bind", here, "-groups", ":".join(groups))
    if suite is None:
        return None
    event = instance.wait_for_event("connection_ended", since=before, client=here)
    group: str = event["group"]
    return group


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_only_the_groups_of_the_setting_are_agreed_upon(instance: Instance, version: str) -> None:
    for group in ("X25519", "P-384"):
        name = {"P-384": "secp384r1", "X25519": "x25519"}[group]
        # Of TLS 1.2 certificates, too, have to be in one of the client's groups.
        found = group_of(instance, "groups.example", group, "P-256", version=version)
        assert found is not None
        assert found.lower() == name
    assert group_of(instance, "groups.example", "P-256", "P-521", "X448", version=version) is None


def test_the_groups_order_is_the_servers(instance: Instance) -> None:
    for groups in (("X25519", "P-384", "P-256"), ("P-384", "X25519", "P-256")):
        found = group_of(instance, "groups.example", *groups, version="TLSv1.2")
        assert found == "secp384r1"


def test_a_client_is_not_asked_again_for_a_group_no_better_than_its_own(
    instance: Instance,
) -> None:
    found = group_of(instance, "groups.example", "X25519", "P-384")
    assert found is not None
    assert found.lower() == "x25519"


@pytest.mark.parametrize(
    ("name", "groups", "expected"),
    [
        ("default.example", ["X25519", "X25519MLKEM768"], "X25519MLKEM768"),
        ("default.example", ["X25519", "SecP256r1MLKEM768"], "SecP256r1MLKEM768"),
        ("hybrid.example", ["X25519MLKEM768", "X25519"], "x25519"),
        ("hybrid.example", ["X25519", "X25519MLKEM768"], "x25519"),
    ],
)
def test_a_post_quantum_group_comes_where_the_setting_puts_it(
    instance: Instance, name: str, groups: list[str], expected: str
) -> None:
    """Whatever a client has guessed: it is asked again (RFC 8446 §4.1.4)."""
    with TlsClient(instance.port, name, groups=groups) as client:
        client.handshake()
        assert client.tls.get_group_name() == expected
