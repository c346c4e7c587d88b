"""What is negotiated by default, and what is not offered at all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from OpenSSL import SSL

from .conftest import Certificates, Serve
from .instance import Instance, free_port
from .peers import Listener, TlsClient, alert_in
from .suites import every_suite

TLS12, TLS13 = SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION
HANDSHAKE_FAILURE, PROTOCOL_VERSION = 40, 70
#: The random of a ServerHello that is a HelloRetryRequest (RFC 8446 §4.1.3).
RETRY_RANDOM = "cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c"
FORWARD_SECRET_AEAD = re.compile(
    r"ECDHE-(RSA|ECDSA)-(AES(128|256)-GCM-SHA(256|384)|CHACHA20-POLY1305)"
)


@pytest.fixture(scope="module")
def instance(serve_all: Serve, certificates: Certificates, echoing: Listener) -> Instance:
    """As configured by default, with a key of each kind that suites tell apart."""
    vhosts = []
    for name, kind, settings in (
        ("rsa.example", "RSA-2048", {}),
        ("ecdsa.example", "P-256", {}),
        ("x448.example", "RSA-2048", {"groups": ["X25519", "X448"]}),
    ):
        certificate = certificates(kind, name)
        vhosts.append(
            {
                "sni": [name],
                "certificate": certificate.certificate,
                "key": certificate.key,
                "backend": echoing.address,
                **settings,
            }
        )
    return serve_all(vhost=vhosts)


def s_client(
    instance: Instance, *options: str, typed: str = "", name: str = "rsa.example"
) -> "subprocess.CompletedProcess[str]":
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{instance.port}"]
    return subprocess.run(
        [*command, "-servername", name, *options],
        input=typed,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


# --- suites, groups, versions ----------------------------------------------------------


def test_only_forward_secret_aead_suites_are_accepted(instance: Instance) -> None:
    accepted = set()
    suites = every_suite("-tls1_2")
    assert {"AES128-SHA", "ECDHE-RSA-AES128-SHA256", "AES128-GCM-SHA256"} <= set(suites)
    weak = [suite for suite in suites if not FORWARD_SECRET_AEAD.fullmatch(suite)]
    for name in ("rsa.example", "ecdsa.example"):
        answer = s_client(
            instance, "-tls1_2", "-cipher", ":".join(weak) + ":@SECLEVEL=0", name=name
        )
        assert "alert handshake failure" in answer.stderr
        for suite in set(suites) - set(weak):
            answer = s_client(instance, "-tls1_2", "-cipher", suite, name=name)
            if answer.returncode == 0:
                accepted.add(suite)
    assert {suite.partition("-")[2].partition("-")[0] for suite in accepted} == {"RSA", "ECDSA"}
    assert len(accepted) == 6


def test_no_signature_is_made_with_sha_1(instance: Instance) -> None:
    for algorithm, name in (("RSA+SHA1", "rsa.example"), ("ECDSA+SHA1", "ecdsa.example")):
        options = ("-tls1_2", "-sigalgs", algorithm, "-cipher", "DEFAULT:@SECLEVEL=0")
        answer = s_client(instance, *options, name=name)
        assert answer.returncode == 1
        assert "alert handshake failure" in answer.stderr


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_older_versions_get_protocol_version(instance: Instance, version: str) -> None:
    earlier, here = len(instance.events()), f"127.0.0.1:{free_port()}"
    answer = s_client(instance, version, "-bind", here, "-cipher", "DEFAULT:@SECLEVEL=0")
    assert answer.returncode == 1
    assert "alert protocol version" in answer.stderr
    event = instance.wait_for_event("handshake_failed", since=earlier, client=here)
    assert (event["end"], event["detail"]) == ("handshake_failed", "unsupported protocol")


def test_the_post_quantum_hybrid_is_what_a_client_that_has_it_gets(instance: Instance) -> None:
    earlier = len(instance.events())
    with TlsClient(instance.port, "rsa.example") as client:
        client.handshake()
        assert client.tls.get_group_name() == "X25519MLKEM768"
        host, port = client.socket.getsockname()
    event = instance.wait_for_event("connection_ended", since=earlier, client=f"{host}:{port}")
    assert event["group"] == "X25519MLKEM768"
    assert event["tls_version"] == "TLSv1.3"


def test_the_hybrid_is_asked_for_where_a_client_guessed_another_group(
    instance: Instance, tmp_path: Path
) -> None:
    """It is first in the server's own order: a HelloRetryRequest (RFC 8446 §4.1.4) for it."""
    configuration = tmp_path / "openssl.cnf"
    configuration.write_text(
        "openssl_conf = init\n[init]\nssl_conf = ssl\n[ssl]\nsystem_default = client\n"
        "[client]\nGroups = X25519:X25519MLKEM768\n"
    )
    client = f"""if True:
        from tests.integration.peers import TlsClient
        client = TlsClient({instance.port}, "rsa.example").handshake()
        print(client.tls.get_group_name(), RETRY in client.received)
    """.replace("RETRY", f"bytes.fromhex({RETRY_RANDOM!r})")
    answer = subprocess.run(
        [sys.executable, "-c", client],
        env={**os.environ, "OPENSSL_CONF": str(configuration)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert answer.stdout == "X25519MLKEM768 True\n", answer.stderr


@pytest.mark.parametrize("group", ["X25519", "P-256", "P-384", "P-521"])
def test_a_client_without_it_gets_a_classic_group(instance: Instance, group: str) -> None:
    for version in ("-tls1_3", "-tls1_2"):
        answer = s_client(instance, version, "-groups", group)
        assert answer.returncode == 0, answer.stderr
        curve = {"P-256": "P-256", "P-384": "P-384", "P-521": "P-521"}.get(group, group)
        # "Server" to OpenSSL 3.0, "Peer" to 3.5.
        assert f"r Temp Key: {'ECDH, ' if '-' in group else ''}{curve}" in (
            answer.stdout.replace("prime256v1", "P-256")
            .replace("secp384r1", "P-384")
            .replace("secp521r1", "P-521")
        )


@pytest.mark.parametrize("version", ["-tls1_3", "-tls1_2"])
def test_x448_is_for_a_virtual_host_that_names_it(instance: Instance, version: str) -> None:
    answer = s_client(instance, version, "-groups", "X448", name="x448.example")
    assert "r Temp Key: X448" in answer.stdout, answer.stderr
    answer = s_client(instance, version, "-groups", "X448")
    assert "alert handshake failure" in answer.stderr


@pytest.mark.parametrize(
    "scheme",
    [
        "rsa_pss_rsae_sha256", "rsa_pss_rsae_sha384", "rsa_pss_rsae_sha512",
        "RSA+SHA256", "RSA+SHA384", "RSA+SHA512",
    ],
)  # fmt: skip
def test_every_scheme_for_an_rsa_key_signs(instance: Instance, scheme: str) -> None:
    answer = s_client(instance, "-tls1_2", "-sigalgs", scheme)
    assert answer.returncode == 0, answer.stderr
    if not scheme.startswith("RSA"):
        answer = s_client(instance, "-tls1_3", "-sigalgs", scheme)
        assert answer.returncode == 0, answer.stderr
        # The second is what OpenSSL 3.5 says: all of the scheme.
        assert re.search(rf"^Peer signature type: (RSA-PSS|{scheme})$", answer.stdout, re.M)


# --- what is left out ------------------------------------------------------------------


def test_no_ticket_is_given_and_no_session_resumed(instance: Instance, tmp_path: Path) -> None:
    for version in ("-tls1_2", "-tls1_3"):
        session = tmp_path / f"session{version}"
        answer = s_client(instance, version, "-msg", "-sess_out", str(session))
        assert answer.returncode == 0
        assert "Finished" in answer.stdout
        assert "NewSessionTicket" not in answer.stdout
        # The client has nothing that it could write down.
        assert not session.exists()


def test_a_client_that_reconnects_begins_anew_each_time(instance: Instance) -> None:
    answer = s_client(instance, "-tls1_2", "-reconnect")
    assert answer.stdout.count("New, TLSv1.2") == 6
    assert "Reused" not in answer.stdout


def test_no_session_has_an_id_to_be_resumed_by(instance: Instance) -> None:
    answer = s_client(instance, "-tls1_2")
    found = re.search(r"Session-ID: (\S*)$", answer.stdout, re.MULTILINE)
    assert found is not None
    assert found[1] == ""
    assert "TLS session ticket" not in answer.stdout


def test_renegotiation_is_refused(instance: Instance) -> None:
    answer = s_client(instance, "-tls1_2", "-msg", typed="R\n")
    assert "RENEGOTIATING" in answer.stderr
    assert "no renegotiation" in answer.stderr
    assert "Alert [length 0002], warning no_renegotiation" in answer.stdout
    assert len(re.findall("<<< .*, ServerHello$", answer.stdout, re.MULTILINE)) == 1


def test_nothing_is_compressed(instance: Instance) -> None:
    for version in ("-tls1_2", "-tls1_3"):
        answer = s_client(instance, version, "-comp")
        assert "Compression: NONE" in answer.stdout


def test_an_sslv3_style_alert_of_the_client_ends_only_its_own_connection(
    instance: Instance,
) -> None:
    with TlsClient(instance.port, "rsa.example", versions=(TLS12, TLS12)) as client:
        with pytest.raises(SSL.Error):
            # No such suite with this key: the server says so.
            TlsClient(
                instance.port,
                "rsa.example",
                versions=(TLS12, TLS12),
                ciphers="ECDHE-ECDSA-AES128-GCM-SHA256",
            ).handshake()
        client.handshake()
        client.send(b"ping")
        assert client.receive_exactly(4) == b"ping"
        assert alert_in(client.received) is None


def test_the_longest_times_that_can_be_set(serve: Serve, echoing: Listener) -> None:
    worker = dict.fromkeys(["handshake_timeout", "connect_timeout", "drain"], "24h")
    limits = dict.fromkeys(["idle_timeout", "lifetime"], "24h")
    instance = serve(echoing.address, worker=worker, limits=limits)
    with TlsClient(instance.port).handshake() as client:
        client.send(b"x")
        assert client.receive_exactly(1) == b"x"
