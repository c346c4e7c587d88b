"""Settings that are valid, and cannot do what they say, are warned of."""

from pathlib import Path

import pytest

from titus_py.configuration import load

FILE = """\
[[listen]]
address = ":443"
[[vhost]]
certificate = "site.crt"
key = "site.key"
backend = "127.0.0.1:80"
"""


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        (
            'min_version = "TLSv1.3"\nciphers = "ECDHE+AESGCM"',
            "vhost[0].ciphers",
            "has no effect: these are suites of TLS 1.2, and min_version is TLSv1.3. "
            "Those of TLS 1.3 go into ciphersuites",
        ),
        # The security level holds for certificates and groups, too.
        ('min_version = "TLSv1.3"\nciphers = "DEFAULT:@SECLEVEL=3"', None, ""),
        ('ciphers = "ECDHE+AESGCM"', None, ""),
        (
            'max_version = "TLSv1.2"\nciphersuites = "TLS_AES_128_GCM_SHA256"',
            "vhost[0].ciphersuites",
            "has no effect: these are suites of TLS 1.3, and max_version is TLSv1.2",
        ),
        ('min_version = "TLSv1.3"\nciphersuites = "TLS_AES_128_GCM_SHA256"', None, ""),
        (
            'balance = "source"',
            "vhost[0].balance",
            "has no effect: there is one backend. Several are a list",
        ),
        ('alpn = ["h2"]\nbalance = "source"\nbackends.h2 = "x:1"', "vhost[0].balance", None),
        ('alpn = ["h2"]\nbalance = "source"\nbackends.h2 = ["x:1", "y:1"]', None, ""),
        (
            "[limits]\nconnections_per_address = 300",
            "limits.connections_per_address",
            "300 are never reached: connections_per_prefix is 250 (a quarter of worker.max, where "
            "it is not set), and counts those of one address, too",
        ),
        (
            "[limits]\nconnections_per_address = 300\nconnections_per_prefix = 299",
            "limits.connections_per_address",
            "300 are never reached: connections_per_prefix is 299, and counts those of one "
            "address, too",
        ),
        ("[limits]\nconnections_per_address = 250", None, ""),
        ("[limits]\nconnections_per_address = 300\nconnections_per_prefix = 300", None, ""),
        (
            "[limits]\nhandshakes = 1001",
            "limits.handshakes",
            "1001 cannot be within their handshake at once: worker.max is 1000, and a flood of "
            "handshakes may take every worker",
        ),
        ("[limits]\nhandshakes = 1000", None, ""),
    ],
)
def test_what_has_no_effect(tmp_path: Path, text: str, key: str | None, reason: str | None) -> None:
    (tmp_path / "site.crt").touch()
    (tmp_path / "site.key").touch(mode=0o600)
    (tmp_path / "titus.toml").write_text(f"{FILE}{text}\n")
    loaded = load(tmp_path / "titus.toml")
    assert loaded.mistakes == []
    assert [one.key for one in loaded.warnings] == ([key] if key else [])
    if key and reason is not None:
        (warning,) = loaded.warnings
        assert warning.reason == reason
        assert warning.line == 7 + text.count("\n", 0, text.index(key.rpartition(".")[2] + " ="))


def test_settings_of_a_keyd_that_titus_py_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "site.crt").touch()
    keyd = '[keyd]\nsocket = "keyd.sock"\nuser = 1234567890\nlock_memory = "try"\n'
    (tmp_path / "titus.toml").write_text(FILE.replace('key = "site.key"', "") + keyd)
    loaded = load(tmp_path / "titus.toml")
    assert loaded.mistakes == []
    reason = (
        "has no effect: the keyd at {}/keyd.sock is not started by titus-py, and has its own {}"
    )
    assert [(one.key, one.reason) for one in loaded.warnings] == [
        ("keyd.user", reason.format(tmp_path, "--user")),
        ("keyd.lock_memory", reason.format(tmp_path, "--lock-memory")),
    ]


@pytest.mark.parametrize(
    ("settings", "of_others", "warned"),
    [
        ("", "", "backend"),
        ('alpn = ["h2"]\nbackends.h2 = "127.0.0.1:80"\n', "", "backends.h2"),
        ("", 'client_certificates = "optional"\nclient_allow.spki = ["{pin}"]', "backend"),
        ("", 'client_certificates = "required"\nclient_allow.spki = ["{pin}"]', None),
        ("", 'send_proxy = "v2-tls"', None),
        ("", "local_port = 8443", None),
        ("local_address = '::1'\n", "", None),
    ],
)
def test_a_backend_that_others_reach_without_a_certificate(
    tmp_path: Path, settings: str, of_others: str, warned: str | None
) -> None:
    (tmp_path / "site.crt").touch()
    (tmp_path / "site.key").touch(mode=0o600)
    pin = f"sha256:{'0a' * 32}"
    backend = "127.0.0.1:81" if "backends" in settings else "127.0.0.1:80"
    required = (
        '[[listen]]\naddress = ":443"\n[[listen]]\naddress = ":8443"\n'
        '[[vhost]]\nsni = ["admin.test"]\n'
        f'certificate = "site.crt"\nkey = "site.key"\nbackend = "{backend}"\n'
        f'client_certificates = "required"\nclient_allow = {{ spki = ["{pin}"] }}\n{settings}'
    )
    others = FILE.partition(':443"\n')[2] + of_others.format(pin=pin)
    (tmp_path / "titus.toml").write_text(f"{required}{others}\n")
    loaded = load(tmp_path / "titus.toml")
    assert loaded.mistakes == []
    assert [one.key for one in loaded.warnings] == ([f"vhost[0].{warned}"] if warned else [])
    for warning in loaded.warnings:
        assert "127.0.0.1:80 is also for vhost for any name" in warning.reason
