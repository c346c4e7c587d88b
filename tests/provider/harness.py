"""The ``pem`` and ``private`` commands of harness.c, for the OpenSSL within ``cryptography``."""

import sys

from OpenSSL import crypto


def main() -> None:
    key = None
    for line in sys.stdin:
        command, *arguments = line.split()
        try:
            if command == "pem":
                content = bytes.fromhex(arguments[0].removeprefix("-"))
                key = crypto.load_privatekey(crypto.FILETYPE_PEM, content, b"")
                print(f"ok {key.type()} {key.bits()}", flush=True)
            elif key is None:
                print("failed no key", flush=True)
            else:
                for kind in (crypto.FILETYPE_PEM, crypto.FILETYPE_ASN1, crypto.FILETYPE_TEXT):
                    crypto.dump_privatekey(kind, key)
                    print("leaked by dump_privatekey", flush=True)
        except (crypto.Error, TypeError, ValueError) as error:
            print(f"failed {error!r}", flush=True)


if __name__ == "__main__":
    main()
