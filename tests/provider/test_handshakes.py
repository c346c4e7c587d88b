"""Every signature scheme and key exchange, by both OpenSSLs, with and without sanitizers."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from .support import Keyd, Servers, Site, configure, connect, servers

RSA_SITES = {"rsa": "rsa_pss_rsae", "rsa-pss": "rsa_pss_pss"}
CURVES = {"p256": "secp256r1_sha256", "p384": "secp384r1_sha384", "p521": "secp521r1_sha512"}
DIGESTS = ("SHA256", "SHA384", "SHA512")


class Case(NamedTuple):
    """What the client offers, and what it must be given."""

    site: str
    version: str
    schemes: str
    digest: str | None
    signature: str


def cases() -> Iterator[Case]:
    for site, scheme in RSA_SITES.items():
        for digest in DIGESTS:
            for version in ("1.3", "1.2"):
                name = f"{scheme}_{digest.lower()}"
                yield Case(site, version, name, digest, "RSA-PSS")
    for digest in DIGESTS:
        yield Case("rsa", "1.2", f"RSA+{digest}", digest, "RSA")
    for site, curve in CURVES.items():
        yield Case(site, "1.3", f"ecdsa_{curve}", curve[-6:].upper(), "ECDSA")
        # TLS 1.2 leaves the curve out of it.
        for digest in DIGESTS:
            yield Case(site, "1.2", f"ECDSA+{digest}", digest, "ECDSA")
    for version in ("1.3", "1.2"):
        yield Case("ed25519", version, "ed25519", None, "ed25519")


BUILDS = [(p, s) for p in ("openssl", "pyopenssl") for s in (False, True)]


@pytest.fixture(
    scope="module",
    params=BUILDS,
    ids=lambda build: f"{build[0]}-{'sanitized' if build[1] else 'plain'}",
)
def server(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    sites: dict[str, Site],
    keyd: Keyd,
) -> Iterator[Servers]:
    program, sanitized = request.param
    name = "sanitized_provider_path" if sanitized else "provider_path"
    module = request.getfixturevalue(name)
    more = request.getfixturevalue("sanitizer_preloaded") if sanitized else {}
    directory = tmp_path_factory.mktemp("server")
    configuration = configure(directory / "openssl.cnf", module, f"socket = {keyd.path}")
    with servers(
        program, list(sites.values()), configuration, directory / "log.txt", **more
    ) as running:
        yield running


@pytest.mark.parametrize("case", list(cases()), ids=lambda c: f"{c.site}-{c.version}-{c.schemes}")
def test_signature_scheme(server: Servers, sites: dict[str, Site], case: Case) -> None:
    site = sites[case.site]
    option = "-tls" + case.version.replace(".", "_")

    client = connect(server.port(site), site, option, "-sigalgs", case.schemes)

    assert client.code == 0, client.output
    assert client.value("Protocol version") == f"TLSv{case.version}"
    assert client.value("Verification") == "OK"
    assert client.signature_algorithm == case.signature
    if case.digest is not None:
        assert client.value("Hash used") == case.digest


@pytest.mark.parametrize("cipher", ["AES128-GCM-SHA256", "AES256-SHA"])
def test_rsa_key_exchange(server: Servers, sites: dict[str, Site], cipher: str) -> None:
    site = sites["rsa"]

    client = connect(server.port(site), site, "-tls1_2", "-cipher", cipher)

    assert client.code == 0, client.output
    assert client.value("Ciphersuite") == cipher


@pytest.mark.parametrize("site_name", ["rsa", "p256", "ed25519"])
def test_sha1_is_never_signed(server: Servers, sites: dict[str, Site], site_name: str) -> None:
    site = sites[site_name]
    schemes = "RSA+SHA1:ECDSA+SHA1"

    client = connect(
        server.port(site), site, "-tls1_2", "-sigalgs", schemes, "-cipher", "ALL:@SECLEVEL=0"
    )

    assert client.code != 0
    assert "handshake failure" in client.output
    assert connect(server.port(site), site).code == 0
