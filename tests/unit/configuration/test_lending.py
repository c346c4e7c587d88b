"""[keyd] lend and [[keyd.client]]: what they may say, and what goes with them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from integration.certificates import Authority

from keyd.protocol import Power, mask_of
from keyd.reference import key_id
from titus_py.configuration import Loaded, load
from titus_py.configuration.checking import check
from titus_py.configuration.lending import ask_about_lent_keys, told
from titus_py.configuration.tables import LentKey

KEY = ec.generate_private_key(ec.SECP256R1())
PIN = "sha256:" + "0a" * 32
VHOST = {
    "certificate": '"site.crt"',
    "key": '"site.key"',
    "backend": '"unix:lend.sock"',
    "client_certificates": '"required"',
    "min_version": '"TLSv1.3"',
    "send_proxy": '"v2-tls-cert"',
}
KNOWN = f'[[vhost.client]]\nname = "a"\nspki = ["{PIN}"]\n'
LEND = '[keyd]\nlend = "unix:lend.sock"\n'
CLIENT = '[[keyd.client]]\nname = "a"\nkeys = ["lent.key"]\n'
Files = Callable[..., Loaded]


def pem(key: ec.EllipticCurvePrivateKey | ed448.Ed448PrivateKey, phrase: bytes = b"") -> bytes:
    protection = BestAvailableEncryption(phrase) if phrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Load a configuration with one virtual host, with these settings of it changed."""
    for name, content in (("site.crt", b""), ("site.key", b""), ("lent.key", pem(KEY))):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)

    def load_file(keyd: str, known: str = KNOWN, top: str = "", **changed: str | None) -> Loaded:
        settings = {**VHOST, **changed}
        vhost = "\n".join(f"{key} = {value}" for key, value in settings.items() if value)
        text = f'{top}\n[[listen]]\naddress = ":443"\n[[vhost]]\n{vhost}\n{known}\n{keyd}'
        (tmp_path / "titus.toml").write_text(text)
        return load(tmp_path / "titus.toml")

    return load_file


def said(loaded: Loaded) -> list[str]:
    return [f"{mistake.key}: {mistake.reason}" for mistake in loaded.mistakes]


def test_what_keyd_is_told(files: Files, tmp_path: Path) -> None:
    loaded = files(LEND + CLIENT)
    assert said(loaded) == []
    key = LentKey(tmp_path / "lent.key", None)
    assert loaded.lent == {key: ["keyd.client[0].keys"]}
    facts, mistakes, warnings = ask_about_lent_keys(loaded.lent, None, loaded.source, 30)
    assert (mistakes, warnings) == ([], [])
    assert facts[key].key_id == key_id(KEY.public_key())
    assert loaded.configuration is not None
    uids = loaded.configuration.worker.uids
    powers = mask_of(frozenset({Power.SIGN_TLS13, Power.SIGN_TLS12_MARKED}))
    assert told(loaded.configuration, facts) == {
        "uids": [uids[0], uids[-1]],
        "clients": [
            {"name": "a", "grants": {facts[key].key_id.hex(): powers}, "most": 1000, "seconds": 1}
        ],
    }


def test_as_a_successor_reads_it(files: Files) -> None:
    loaded = files(LEND + CLIENT + 'operations = ["sign_tls13"]\nrate = "5/h"\n')
    assert loaded.configuration is not None
    dumped = loaded.configuration.model_dump(mode="json", exclude_defaults=True)
    assert type(loaded.configuration).model_validate(dumped) == loaded.configuration


def test_without_it_nothing_is_told(files: Files) -> None:
    loaded = files("", backend='"127.0.0.1:80"')
    assert said(loaded) == []
    assert loaded.lent == {}
    assert loaded.configuration is not None
    assert told(loaded.configuration, {}) is None


@pytest.mark.parametrize(
    ("keyd", "changed", "expected"),
    [
        (CLIENT, {"backend": '"127.0.0.1:80"'}, "keyd.lend: is missing: without it"),
        (LEND, {}, "keyd.client: is missing: say whom keyd is to sign for"),
        (
            LEND + CLIENT,
            {"backend": '"127.0.0.1:80"'},
            "keyd.lend: unix:",
        ),
        (LEND + CLIENT, {"send_proxy": '"v2-tls"'}, 'vhost[0].send_proxy: has to be "v2-tls-cert"'),
        (LEND + CLIENT, {"send_proxy": None}, 'vhost[0].send_proxy: has to be "v2-tls-cert"'),
        (
            LEND + CLIENT.replace('"a"', '"b"'),
            {},
            "keyd.client[0].name: b: no [[vhost.client]] of a virtual host",
        ),
        (LEND + CLIENT + CLIENT, {}, "keyd.client: there are two clients of the name a"),
        (LEND + CLIENT.replace("lent", "none"), {}, "keyd.client[0].keys[0]: "),
        (LEND + CLIENT.replace('["lent.key"]', "[]"), {}, "keyd.client[0].keys: an empty list"),
        (LEND + CLIENT + 'operations = ["decrypt"]', {}, "keyd.client[0].operations[0]: expected "),
        (LEND + CLIENT.replace("lent.key", "upstream"), {}, "keyd.client[0].keys: only keys of"),
        (LEND + CLIENT + "rate = 200", {}, "keyd.client[0].rate: expected so many a second"),
        (LEND + CLIENT + "keyz = 1", {}, "keyd.client[0].keyz: unknown key: did you mean keys"),
        ('[keyd]\nlend = "127.0.0.1:80"\n' + CLIENT, {}, 'keyd.lend: "127.0.0.1:80" is no unix'),
        (
            LEND + CLIENT.replace("lent.key", "pkcs11:token=t;object=o?module-path=/bin/sh"),
            {},
            "keyd.token_user: is missing: a key of ",
        ),
        (
            '[[tunnel]]\nlisten = "unix:lend.sock"\nconnect = "a.test:1"\nca = "system"\n'
            + LEND
            + CLIENT,
            {},
            "tunnel[0].listen: unix:",
        ),
        (
            '[metrics]\naddress = "unix:lend.sock"\n' + LEND + CLIENT,
            {},
            "metrics.address: unix:",
        ),
    ],
)
def test_mistakes(files: Files, keyd: str, changed: dict[str, str | None], expected: str) -> None:
    mistakes = said(files(keyd, **changed))
    assert any(mistake.startswith(expected) for mistake in mistakes), mistakes


@pytest.mark.parametrize("path", ["link/lend.sock", "run/../run/lend.sock", "other.sock"])
@pytest.mark.parametrize("kind", ["vhost", "tunnel"])
def test_keyd_is_reached_by_no_other_path(
    files: Files, tmp_path: Path, path: str, kind: str
) -> None:
    """Whoever comes that way says who they are themselves. /var/run is often a link to /run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "other.sock").symlink_to("run/lend.sock")
    other = {
        "vhost": 'sni = ["other"]\ncertificate = "site.crt"\nkey = "site.key"\nbackend',
        "tunnel": f'listen = "127.0.0.1:1"\npins = ["{PIN}"]\nconnect',
    }[kind]
    keyd = '[keyd]\nlend = "unix:run/lend.sock"\n' + CLIENT
    added = f'[[{kind}]]\n{other} = "unix:{path}"\n'
    loaded = files(keyd, KNOWN + added, backend='"unix:run/lend.sock"')
    place = {"vhost": "vhost[1].send_proxy: has to be", "tunnel": "tunnel[0].connect: is keyd.lend"}
    assert any(line.startswith(place[kind]) for line in said(loaded))


def test_who_is_not_known_by_its_key_is_no_client(files: Files) -> None:
    mistakes = said(files(LEND + CLIENT, known="", client_certificates=None))
    assert any(one.startswith("vhost[0].client_certificates: has to be") for one in mistakes)


def test_with_a_keyd_that_is_a_service_of_its_own(files: Files) -> None:
    mistakes = said(files(LEND + 'socket = "/run/keyd"\n' + CLIENT, key=None))
    assert any(one.startswith("keyd.lend: does not go with keyd.socket") for one in mistakes)


def test_a_client_that_keyd_does_not_hear(files: Files) -> None:
    loaded = files(LEND + CLIENT, known=KNOWN + KNOWN.replace('"a"', '"b"').replace("0a", "0b"))
    warnings = [f"{one.key}: {one.reason}" for one in loaded.warnings]
    assert (
        "vhost[0].client[1].name: b: no [[keyd.client]] has this name, so keyd hears nothing"
        in ("\n".join(warnings))
    )


@pytest.mark.parametrize(
    ("own", "others", "warned"),
    [
        ("", "", True),
        ("", "local_port = 443", True),
        ("local_port = 443", 'local_address = "192.0.2.1"', True),
        ("local_port = 8443", "local_port = 443", False),
        ('local_address = "192.0.2.1"', 'local_address = "192.0.2.2"', False),
    ],
)
def test_a_virtual_host_that_others_clients_can_reach(
    files: Files, own: str, others: str, warned: bool
) -> None:
    vhost = '[[vhost]]\nsni = ["www.example.org"]\ncertificate = "site.crt"\n' + (
        f'key = "site.key"\nbackend = "127.0.0.1:80"\n{others}\n'
    )
    listen = '[[listen]]\naddress = ":8443"\n'
    name = '["keys.example.org"]'
    loaded = files(LEND + CLIENT, known=f"{own}\n{KNOWN}{vhost}", top=listen, sni=name)
    assert not loaded.mistakes
    found = [one.reason for one in loaded.warnings if one.key == "vhost[0].backend"]
    assert [one.partition(":")[0] for one in found] == (
        ["clients of vhost[1] come to the same address"] if warned else []
    )


@pytest.mark.parametrize(
    ("version", "known", "expected"),
    [
        ('"TLSv1.3"', KNOWN, []),
        ('"TLSv1.2"', KNOWN, ["vhost[0].min_version: vhost for any name: backend (line "]),
        (None, KNOWN, ["vhost[0].min_version: vhost for any name: backend (line "]),
        (
            '"TLSv1.3"',
            KNOWN + 'dns = ["a.test"]\n',
            ["vhost[0].client[0]: a: vhost for any name: backend (line "],
        ),
    ],
)
def test_more_is_let_in_than_who_borrows(
    files: Files, tmp_path: Path, version: str | None, known: str, expected: list[str]
) -> None:
    (tmp_path / "ca.crt").write_bytes(b"")
    ca = '"ca.crt"' if "dns" in known else None
    loaded = files(LEND + CLIENT, known=known, min_version=version, client_ca=ca)
    assert said(loaded) == []
    found = [f"{one.key}: {one.reason}" for one in loaded.warnings if "keyd.lend" in one.reason]
    assert len(found) == len(expected), found
    assert all(map(str.startswith, found, expected)), found
    # Elsewhere, nothing is said of either.
    loaded = files("", known=known, min_version=version, client_ca=ca, backend='"127.0.0.1:80"')
    assert not [one for one in loaded.warnings if "keyd.lend" in one.reason]


def test_the_key_by_which_other_hosts_know_this_one_is_not_lent(
    files: Files, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    own, site = authority.issue("P-256", "keys-1"), authority.issue("P-256", "site.test")
    pair = {"certificate": f'"{own.certificate}"', "key": f'"{own.key}"'}
    client = CLIENT.replace('["lent.key"]', f'["{site.key}", "{own.key}"]')
    # Whose uids the default ones are on this machine is not the question.
    uids = '[worker]\nuids = "3000000000-3000009999"\n'
    (mistake,) = check(files(LEND + client + uids, **pair)).mistakes
    assert mistake.key == "keyd.client[0].keys"
    assert mistake.reason.startswith(f"{own.key} is the key of vhost for any name (line ")
    client = CLIENT.replace("lent.key", str(site.key))
    assert not check(files(LEND + client + uids, **pair)).mistakes


def test_what_is_wrong_with_a_key_is_said_of_its_setting(files: Files, tmp_path: Path) -> None:
    """And others can read it: a warning."""
    (tmp_path / "lent.key").write_bytes(pem(ed448.Ed448PrivateKey.generate()))
    (tmp_path / "lent.key").chmod(0o644)
    checked = check(files(LEND + CLIENT))
    (of_the_key,) = [one for one in checked.mistakes if one.key == "keyd.client[0].keys"]
    assert "Ed448" in of_the_key.reason
    exposed = [one.reason for one in checked.warnings if one.key == "keyd.client[0].keys"]
    assert any("others than its owner can read or write it" in reason for reason in exposed)


@pytest.mark.parametrize(("phrase", "is_right"), [("secret", True), ("wrong", False)])
def test_a_key_that_is_encrypted(files: Files, tmp_path: Path, phrase: str, is_right: bool) -> None:
    (tmp_path / "lent.key").write_bytes(pem(KEY, b"secret"))
    (tmp_path / "phrase").write_text(phrase + "\n")
    loaded = files(LEND + CLIENT + 'passphrase_file = "phrase"')
    facts, mistakes, _ = ask_about_lent_keys(loaded.lent, None, loaded.source, 30)
    assert bool(facts) is is_right
    assert bool(mistakes) is not is_right
