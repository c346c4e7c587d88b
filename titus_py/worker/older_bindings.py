"""Functions of OpenSSL that Debian 13's python3-cryptography has no bindings for.

Run by the fork server and by workers, only with such a cryptography: with another, this is not
imported. The functions are looked up from cryptography's own extension, so that they are from the
copy of OpenSSL that it is linked with. A wheel has its copy hidden inside: there, the import fails
with AttributeError. cffi calls C by address here, which takes no executable page.
"""

import os
from typing import Any

from _cffi_backend import load_library
from cryptography.hazmat.bindings import _rust
from OpenSSL import SSL
from OpenSSL._util import ffi

__all__ = ["group_name", "set_groups_list", "set_msg_callback"]

#: <openssl/ssl.h>: SSL_CTX_set1_groups_list(3) is a macro with this command.
_SET_GROUPS_LIST = 92

_openssl = load_library(_rust.__file__, os.RTLD_NOLOAD | os.RTLD_NOW)
_control = _openssl.load_function(
    ffi.typeof("long (*)(SSL_CTX *, int, long, void *)"), "SSL_CTX_ctrl"
)
_group_name = _openssl.load_function(ffi.typeof("const char *(*)(SSL *)"), "SSL_get0_group_name")
#: SSL_CTX_set_msg_callback(3)
set_msg_callback = _openssl.load_function(
    ffi.typeof("void (*)(SSL_CTX *, void (*)(int, int, int, const void *, size_t, SSL *, void *))"),
    "SSL_CTX_set_msg_callback",
)


def set_groups_list(context: Any, names: bytes) -> int:
    """SSL_CTX_set1_groups_list(3); returns 1 if all names are known. ``context``: an SSL_CTX."""
    done: int = _control(context, _SET_GROUPS_LIST, 0, ffi.new("char[]", names))
    return done


def group_name(connection: SSL.Connection) -> str | None:
    """The group of a handshake that is done (SSL_get0_group_name(3)); None if it had none."""
    name = _group_name(connection._ssl)
    return None if name == ffi.NULL else ffi.string(name).decode()
