"""Whether OpenSSL knows the cipher suites that a configuration names.

A short-lived child of ``check``, so that neither the supervisor nor ``titus-py check``
loads OpenSSL: standard input has a JSON list of lists of [key, names], standard
output gets, in the same form, [key, reason] for each that is not understood.
"""

import json
import sys

from OpenSSL import SSL

__all__ = ["main"]


def main() -> int:
    """``python -m titus_py.configuration.cipher_check``."""
    problems = []
    for key, names in json.load(sys.stdin):
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        try:
            if key.endswith("ciphersuites"):
                context.set_tls13_ciphersuites(names.encode())
            else:
                context.set_cipher_list(names.encode())
        except SSL.Error:
            problems.append([key, f"OpenSSL finds no cipher suite in {names!r}"])
    json.dump(problems, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
