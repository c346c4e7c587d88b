"""The cipher suites that there are."""

import subprocess

__all__ = ["every_suite"]


def every_suite(version: str) -> list[str]:
    """All that the openssl command knows, however weak."""
    listed = subprocess.run(
        ["openssl", "ciphers", "-s", version, "ALL:COMPLEMENTOFALL:@SECLEVEL=0"],
        capture_output=True,
        text=True,
        check=True,
    )
    return listed.stdout.strip().split(":")
