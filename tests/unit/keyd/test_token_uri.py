"""The URI of a key in a token (RFC 7512): what is taken, and what is named as a mistake."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyd.token.uri import BadUri, parse

MODULE = "?module-path=/usr/lib/m.so"


def test_a_whole_uri() -> None:
    uri = parse(
        "pkcs11:token=web%20one;manufacturer=SoftHSM%20project;model=v2;serial=0f;object=site;"
        "id=%01%ff;type=private?module-path=/usr/lib/m.so&pin-source=file:/etc/titus-py/web.pin"
    )
    assert uri == (
        *("web one", "SoftHSM project", "v2", "0f", "site", b"\x01\xff"),
        *("/usr/lib/m.so", "/etc/titus-py/web.pin"),
    )
    assert uri.place == (*uri[:4], *uri[-2:])


def test_the_shortest() -> None:
    uri = parse(f"pkcs11:serial=1;id=%01{MODULE}")
    assert (uri.token, uri.serial, uri.object, uri.id) == (None, "1", None, b"\x01")
    assert (uri.pin_file, uri.token_name, uri.key_name) == (None, "1", "id 01")


@pytest.mark.parametrize("source", ["file:/a/pin", "file:///a/pin", "/a/pin"])
def test_ways_to_write_the_file_of_the_pin(source: str) -> None:
    assert parse(f"pkcs11:token=a;object=b{MODULE}&pin-source={source}").pin_file == "/a/pin"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        (f"token=a;object=b{MODULE}", "does not begin with pkcs11:"),
        (f"pkcs11:token=a;object=b{MODULE}&pin-value=1234", "has a PIN in it"),
        (f"pkcs11:token=a;object=b;pin-value=1234{MODULE}", "has a PIN in it"),
        (f"pkcs11:object=b{MODULE}", "names no token"),
        (f"pkcs11:token=a{MODULE}", "names no key in the token"),
        ("pkcs11:token=a;object=b", "names no module"),
        ("pkcs11:token=a;object=b?module-path=m.so", "not an absolute path"),
        ("pkcs11:token=a;object=b?module-name=m", "has module-name="),
        (f"pkcs11:token=a;object=b{MODULE}&pin-source=%7c/bin/pin", "is a program"),
        (f"pkcs11:token=a;object=b{MODULE}&pin-source=pin", "not an absolute path"),
        (f"pkcs11:token=a;object=b;type=cert{MODULE}", "not private"),
        (f"pkcs11:token=a;object=b;slot-id=1{MODULE}", "has slot-id="),
        (f"pkcs11:token=a;token=b;object=b{MODULE}", "twice"),
        (f"pkcs11:token=a;object={MODULE}", "empty object="),
        (f"pkcs11:token=a b;object=b{MODULE}", "written as %XX"),
        (f"pkcs11:token=a;object=%ff{MODULE}", "not UTF-8"),
        (f"pkcs11:token=a%0ab;object=b{MODULE}", "cannot be printed"),
        (f"pkcs11:token=a;object{MODULE}", "name=value"),
        (f"pkcs11:token={'a' * 2000};object=b{MODULE}", "longer than"),
    ],
)
def test_a_mistake_is_named_and_no_pin_with_it(uri: str, reason: str) -> None:
    with pytest.raises(BadUri, match=re.escape(reason)) as raised:
        parse(uri)
    assert "1234" not in str(raised.value)


@given(st.text())
def test_whatever_follows_the_scheme_is_parsed_or_refused(text: str) -> None:
    try:
        uri = parse("pkcs11:" + text)
    except BadUri:
        return
    assert uri.module_path.startswith("/")
