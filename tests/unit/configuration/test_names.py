"""Whether a certificate is for a name (RFC 9525 §6.3)."""

import pytest

from titus_py.configuration.names import uncovered


@pytest.mark.parametrize(
    ("server_name", "certified"),
    [
        ("www.example.org", "www.example.org"),
        ("www.example.org", "WWW.Example.ORG"),
        ("www.example.org", "*.example.org"),
        ("*.example.org", "*.example.org"),
        ("*.example.org", "*.EXAMPLE.org"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("", "nothing.example"),
    ],
)
def test_covered(server_name: str, certified: str) -> None:
    assert uncovered([server_name], ["other.example", certified]) == []


@pytest.mark.parametrize(
    ("server_name", "certified"),
    [
        ("example.org", "www.example.org"),
        ("example.org", "*.example.org"),
        ("a.www.example.org", "*.example.org"),
        ("*.example.org", "www.example.org"),
        ("*.www.example.org", "*.example.org"),
        ("www.example.org", "w*.example.org"),
        ("www.example.org", "*"),
        ("www.example.org", "www.*.org"),
        ("192.0.2.1.example", "192.0.2.1"),
    ],
)
def test_not_covered(server_name: str, certified: str) -> None:
    assert uncovered(["other.example", server_name], ["other.example", certified]) == [server_name]
