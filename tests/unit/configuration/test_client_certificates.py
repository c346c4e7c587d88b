"""What may be asked of client certificates, and the mistakes in it and in its files."""

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from integration.client_authority import DAY, ClientAuthority

from titus_py.between.client_allow import Allow
from titus_py.between.known_client import KnownClient, Rate
from titus_py.configuration import Loaded, load
from titus_py.configuration.client_certificates import (
    ClientAuthorities,
    client_terms,
    read_authorities,
)
from titus_py.configuration.client_table import ClientFiles

Load = Callable[[str], Loaded]

DIGEST = bytes(range(32))
BEGINNING = """\
[[listen]]
address = "[::]:443"
[worker]
uids = "1000000000-1000003999"
chroot = "{directory}/empty"
[[vhost]]
certificate = "site.crt"
key = "site.key"
backend = "127.0.0.1:80"
"""


@pytest.fixture
def load_settings(tmp_path: Path) -> Load:
    """Load a virtual host with these settings, beside the files ca.crt and ca.crl."""
    for name in ("site.crt", "ca.crt", "ca.crl"):
        (tmp_path / name).touch()
    (tmp_path / "site.key").touch(mode=0o600)

    def load_settings(text: str) -> Loaded:
        path = tmp_path / "titus.toml"
        path.write_text(BEGINNING.replace("{directory}", str(tmp_path)) + text)
        return load(path)

    return load_settings


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> ClientAuthority:
    return ClientAuthority(tmp_path_factory.mktemp("authority"))


def test_who_is_let_in(load_settings: Load) -> None:
    loaded = load_settings(
        'client_certificates = "optional"\nclient_ca = "ca.crt"\nclient_crl = "ca.crl"\n'
        'client_allow = { dns = ["*.Example.org"], uri = ["spiffe://x/**"], cn = ["Alice"], '
        f'spki = ["sha256:{DIGEST.hex().upper()}", '
        f'"sha256:{base64.b64encode(DIGEST).decode()}"] }}\n'
    )
    assert loaded.configuration is not None, loaded.mistakes
    (vhost,) = loaded.configuration.vhost
    allow = Allow(("*.example.org",), ("spiffe://x/**",), ("Alice",), (DIGEST.hex(),))
    assert vhost.client_allow == allow
    files = ClientFiles(vhost.client_ca or Path(), vhost.client_crl)
    assert loaded.client_files == {files: ["vhost[0]"]}
    authorities = ClientAuthorities("CA", "CRL", ("00",), datetime.now(UTC))
    terms = client_terms(vhost, {files: authorities})
    assert terms == (False, "CA", "CRL", tuple(allow), ())
    # As another program would read it again.
    assert vhost.model_dump(mode="json")["client_allow"] == {
        "dns": ["*.example.org"],
        "uri": ["spiffe://x/**"],
        "cn": ["Alice"],
        "spki": [f"sha256:{DIGEST.hex()}"],
    }


def test_keys_alone_need_no_authority(load_settings: Load) -> None:
    loaded = load_settings(
        f'client_certificates = "required"\nclient_allow = {{ spki = ["sha256:{DIGEST.hex()}"] }}\n'
    )
    assert loaded.configuration is not None, loaded.mistakes
    terms = client_terms(loaded.configuration.vhost[0], {})
    assert terms == (True, "", "", ((), (), (), (DIGEST.hex(),)), ())


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        ('client_ca = "ca.crt"', "client_ca", "has no effect"),
        ('client_allow = "all"', "client_allow", "has no effect"),
        ('client_certificates = "yes"', "client_certificates", '"required" or "optional"'),
        ('client_certificates = "required"\nclient_ca = "ca.crt"', "client_allow", "is missing"),
        ('client_certificates = "required"\nclient_allow = "all"', "client_ca", "is missing"),
        (
            'client_certificates = "required"\nclient_allow = { dns = ["a.example.org"] }',
            "client_ca",
            "anybody can write any name",
        ),
        (
            'client_certificates = "required"\nclient_crl = "ca.crl"\n'
            f'client_allow = {{ spki = ["sha256:{DIGEST.hex()}"] }}',
            "client_crl",
            "has no effect",
        ),
        ('client_allow = "everybody"', "client_allow", 'or "all"'),
        ("client_allow = []", "client_allow", "expected a table"),
        ("client_allow = {}", "client_allow", "lets nobody in"),
        ("client_allow = { dns = [] }", "client_allow", "lets nobody in"),
        ('client_allow = { dns = "a.example.org" }', "client_allow", "dns: expected a list"),
        ("client_allow = { dns = [1] }", "client_allow", "dns: expected a list"),
        ('client_allow = { cn = [""] }', "client_allow", "nobody's name"),
        ('client_allow = { dns = ["a.*.org"] }', "client_allow", "one whole label"),
        ('client_allow = { dns = ["*"] }', "client_allow", "one whole label"),
        ('client_allow = { dns = ["10.0.0.1"] }', "client_allow", "10.0.0.1"),
        ('client_allow = { spiki = ["x"] }', "client_allow", "did you mean spki?"),
        ('client_allow = { mail = ["x"] }', "client_allow", "known are dns, uri, cn, spki"),
        ('client_allow = { spki = ["sha256:00"] }', "client_allow", "64 hexadecimal"),
        ('client_allow = { spki = ["sha1:00"] }', "client_allow", "titus-py keys pin"),
        ('client_allow = { uri = ["x/y"] }', "client_allow", "is no URI"),
        ('client_allow = { uri = ["spiffe://x/a*"] }', "client_allow", "whole segment"),
        ('client_allow = { uri = ["spiffe://*/a"] }', "client_allow", "whole segment"),
        ('client_allow = { uri = ["spiffe://x/**/a"] }', "client_allow", "whole segment"),
        ('client_allow = { uri = ["spiffe://x/\\u00e9"] }', "client_allow", "printable ASCII"),
        ('client_ca = "no.crt"', "client_ca", "No such file"),
    ],
)
def test_a_mistake_is_named(load_settings: Load, settings: str, key: str, reason: str) -> None:
    loaded = load_settings(settings + "\n")
    assert loaded.configuration is None
    (mistake,) = (text for text in map(str, loaded.mistakes) if f"{key}:" in text)
    assert reason.lower() in mistake.lower()


def read(ca: Path, crl: Path | None = None) -> tuple[list[str], list[str]]:
    """The mistakes and the warnings about two files, by the real child."""
    source = load(ca.parent / "no.toml").source
    files = ClientFiles(ca, crl)
    found, mistakes, warnings = read_authorities({files: ["vhost[0]"]}, source, 30)
    assert (files in found) == (not mistakes)
    return [str(mistake) for mistake in mistakes], [str(warning) for warning in warnings]


def test_the_files_are_read_and_only_certificates_are_taken(authority: ClientAuthority) -> None:
    files = ClientFiles(authority.file, authority.crl())
    source = load(authority.file.parent / "no.toml").source
    found, mistakes, warnings = read_authorities({files: ["vhost[0]"]}, source, 30)
    assert (mistakes, warnings) == ([], [])
    assert found[files].authorities == authority.file.read_text()
    assert files.crl is not None
    assert found[files].revocations == files.crl.read_text()
    assert len(found[files].keys) == 1
    assert found[files].not_after == authority.certificate.not_valid_after_utc
    assert found[files].next_update is not None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no PEM CERTIFICATE"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "damaged"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n", "cut off"),
        ("{key}", "a private key, which nobody needs here"),
    ],
)
def test_what_is_no_authority_is_a_mistake(
    authority: ClientAuthority, tmp_path: Path, content: str, reason: str
) -> None:
    ca = tmp_path / "ca.crt"
    ca.write_text(content.replace("{key}", authority.issue().key.read_text()))
    (mistake,), _ = read(ca)
    assert "client_ca" in mistake
    assert reason in mistake


def test_a_client_for_an_authority_is_warned_of(authority: ClientAuthority) -> None:
    """Its file is beside the authority's, and all other clients would be refused."""
    mistakes, (warning,) = read(authority.issue("alice").chain)
    assert mistakes == []
    assert "client_ca" in warning
    assert "CN=alice,O=Example is no authority" in warning


def test_an_authority_without_a_list_is_a_mistake(
    authority: ClientAuthority, tmp_path: Path
) -> None:
    """Its clients would all be refused: not one by one in the night, but now."""
    other = ClientAuthority(tmp_path, "other authority")
    both = tmp_path / "both.crt"
    both.write_bytes(authority.file.read_bytes() + other.file.read_bytes())
    (mistake,), _ = read(both, other.crl())
    assert "has no list of CN=client authority" in mistake
    below = ClientAuthority(tmp_path, "below", above=other)
    (mistake,), _ = read(below.file, below.crl(name="below.crl"))
    assert "has no list of CN=other authority" in mistake


def test_a_list_of_a_namesake_is_a_mistake(authority: ClientAuthority, tmp_path: Path) -> None:
    (mistake,), _ = read(authority.file, ClientAuthority(tmp_path).crl())
    assert "is not signed by it" in mistake


def test_what_is_in_der_is_a_mistake_with_its_remedy(
    authority: ClientAuthority, tmp_path: Path
) -> None:
    def in_der(path: Path) -> Path:
        pem = path.read_text().splitlines()
        made = path.with_suffix(".der")
        made.write_bytes(base64.b64decode("".join(pem[1:-1])))
        return made

    (mistake,), _ = read(authority.file, in_der(authority.crl()))
    assert "client_crl" in mistake
    assert "'openssl crl -inform DER" in mistake
    (mistake,), _ = read(in_der(authority.file))
    assert "client_ca" in mistake
    assert "'openssl x509 -inform DER" in mistake


@pytest.mark.parametrize(
    ("ends", "warned"),
    [(-DAY, "expired on"), (6 * DAY, "expires on"), (8 * DAY, None)],
)
def test_a_list_that_ends_is_warned_of(
    authority: ClientAuthority, ends: timedelta, warned: str | None
) -> None:
    mistakes, warnings = read(authority.file, authority.crl(ends=ends))
    assert mistakes == []
    assert [warned in warning for warning in warnings if warned] == ([True] if warned else [])


@pytest.mark.parametrize(
    ("ends", "warned"),
    [(-DAY, "expired on"), (6 * DAY, "expires on"), (8 * DAY, None)],
)
def test_an_authority_that_ends_is_warned_of(
    tmp_path: Path, ends: timedelta, warned: str | None
) -> None:
    mistakes, warnings = read(ClientAuthority(tmp_path, ends=ends).file)
    assert mistakes == []
    assert [warned in warning for warning in warnings if warned] == ([True] if warned else [])


OTHER = f"sha256:{'11' * 32}"
PIN = f"sha256:{DIGEST.hex()}"
REQUIRED = 'client_certificates = "required"\n'


def test_known_clients(load_settings: Load) -> None:
    loaded = load_settings(
        'client_certificates = "required"\nclient_ca = "ca.crt"\n'
        f'[[vhost.client]]\nname = "web-1"\nspki = ["{PIN}", "{OTHER}"]\n'
        'backend = ["10.0.0.5:5432", "10.0.0.6:5432"]\nconnections = 20\nrate = "600/m"\n'
        '[[vhost.client]]\nname = "others"\ndns = ["*.example.org"]\n'
    )
    assert loaded.configuration is not None, loaded.mistakes
    (vhost,) = loaded.configuration.vhost
    files = ClientFiles(vhost.client_ca or Path(), None)
    authorities = ClientAuthorities("CA", "", ("00",), datetime.now(UTC))
    terms = client_terms(vhost, {files: authorities})
    assert terms is not None
    keys = DIGEST.hex(), "11" * 32
    # Whoever is one of them is let in.
    assert terms.allowed == Allow(dns=("*.example.org",), spki=keys)
    backend = ("10.0.0.5:5432", "10.0.0.6:5432")
    assert terms.known == (
        KnownClient("web-1", Allow(spki=keys), backend, 20, Rate(600, 60)),
        KnownClient("others", Allow(dns=("*.example.org",)), (), None, None),
    )
    assert {setting for setting, _ in vhost.all_backends} == {"backend", "client[0].backend"}
    # As another program would read it again.
    again = type(loaded.configuration).model_validate(loaded.configuration.model_dump(mode="json"))
    assert again.vhost[0].client == vhost.client


@pytest.mark.parametrize(
    ("clients", "key", "reason"),
    [
        (['name = "a"'], "client", "a is nobody"),
        ([f'name = "a"\nspki = ["{PIN}"]'] * 2, "client", "two clients of the name a"),
        (
            [f'name = "{name}"\nspki = ["{PIN}"]' for name in "ab"],
            "client",
            "a and b have the same public key",
        ),
        ([f'name = "a b"\nspki = ["{PIN}"]'], "client[0].name", "letters, digits"),
        ([f'spki = ["{PIN}"]'], "client[0].name", "is missing"),
        (['name = "a"\nspki = ["sha256:00"]'], "client[0].spki", "no public key's hash"),
        (['name = "a"\nspki = ["sha256:5e1f…"]'], "client[0].spki", "no public key's hash"),
        (['name = "a"\nspki = "x"'], "client[0].spki", "expected a list of texts"),
        (['name = "a"\ndns = ["x.example.org"]'], "client[0]", "client_ca is missing"),
        ([f'name = "a"\nspki = ["{PIN}"]\nrate = 50'], "client[0].rate", '"50/s"'),
        ([f'name = "a"\nspki = ["{PIN}"]\nrate = "0/s"'], "client[0].rate", '"50/s"'),
        ([f'name = "a"\nspki = ["{PIN}"]\nrate = "5/d"'], "client[0].rate", '"50/s"'),
        ([f'name = "a"\nspki = ["{PIN}"]\nconnections = 0'], "client[0].connections", "1 or more"),
        ([f'name = "a"\nspki = ["{PIN}"]\nbackend = "x"'], "client[0].backend", "no address"),
        ([f'name = "a"\nspki = ["{PIN}"]\nkey = "x"'], "client[0].key", "unknown key"),
    ],
)
def test_mistakes_in_known_clients(
    load_settings: Load, clients: list[str], key: str, reason: str
) -> None:
    tables = "".join(f"[[vhost.client]]\n{one}\n" for one in clients)
    loaded = load_settings(REQUIRED + tables)
    assert loaded.configuration is None
    assert [(one.key, reason in one.reason) for one in loaded.mistakes] == [
        (f"vhost[0].{key}", True)
    ]


@pytest.mark.parametrize(
    ("settings", "key", "reason"),
    [
        ("", "client", "has no effect: set client_certificates"),
        (
            f'{REQUIRED}client_allow = {{ spki = ["{OTHER}"] }}\n',
            "client_allow",
            "does not go with",
        ),
    ],
)
def test_known_clients_beside_other_settings(
    load_settings: Load, settings: str, key: str, reason: str
) -> None:
    loaded = load_settings(f'{settings}[[vhost.client]]\nname = "a"\nspki = ["{PIN}"]\n')
    assert [(one.key, reason in one.reason) for one in loaded.mistakes] == [
        (f"vhost[0].{key}", True)
    ]
