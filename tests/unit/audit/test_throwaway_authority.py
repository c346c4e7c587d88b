"""Throwaway certificates are such as strict clients take."""

import subprocess
from pathlib import Path

import pytest

from titus_py.audit.throwaway_authority import KEY_TYPES, ThrowawayAuthority


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_the_strictest_client_takes_them(tmp_path: Path, key_type: str) -> None:
    """Python's default from 3.13 on: X509_V_FLAG_X509_STRICT (RFC 5280)."""
    authority = ThrowawayAuthority()
    issued = authority.issue(key_type, ["www.example.org", "127.0.0.1"])
    root, leaf = tmp_path / "ca.crt", tmp_path / "site.crt"
    root.write_bytes(authority.certificate)
    leaf.write_bytes(issued.certificate)
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", root]
    for name in ("-verify_hostname=www.example.org", "-verify_ip=127.0.0.1"):
        done = subprocess.run(
            [*command, *name.split("="), leaf], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    # The authority's own certificate is held to it as well.
    done = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", root, root],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
