"""The OpenSSL provider (C, beside this file) and the configuration that loads it."""

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES

__all__ = ["lasting_path", "openssl_configuration", "provider_path"]

_DIRECTORY = os.path.dirname(__file__)


def provider_path() -> str:
    """The file that the package's build made of the provider; raises FileNotFoundError."""
    for suffix in EXTENSION_SUFFIXES:
        path = os.path.join(_DIRECTORY, f"keyd_provider{suffix}")
        if os.path.exists(path):
            return path
    raise FileNotFoundError(f"no provider in {_DIRECTORY}: install the package to build it")


def lasting_path() -> str:
    """What an administrator's configuration names the provider by.

    The link that packaging/install makes stays the same where Python's version, which is part of
    the file's path, does not. An installation by other means has none.
    """
    link = os.path.join(sys.prefix, "keyd_provider.so")
    return link if os.path.exists(link) else provider_path()


def openssl_configuration(channel: str, tls_commands: str = "", module: str | None = None) -> str:
    """An OpenSSL configuration (config(5)) that loads the provider beside ``default``.

    ``channel`` says how keyd is reached: ``socket = PATH`` or ``channel_fd = N``, one
    setting a line. ``tls_commands`` are SSL_CONF_cmd(3) settings for every context. ``module`` is
    the provider's file, by default the package's own.
    """
    return f"""\
openssl_conf = openssl_init

[openssl_init]
providers = providers
ssl_conf = tls

[providers]
default = default_provider
keyd = keyd_provider

[default_provider]
activate = 1

[keyd_provider]
module = {module or provider_path()}
activate = 1
{channel}

[tls]
system_default = tls_commands

[tls_commands]
{tls_commands}
"""
