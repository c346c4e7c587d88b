"""A TLS server by pyOpenSSL, with keys that are references and a process per connection.

    tls_server.py CERTIFICATE REFERENCE [CERTIFICATE REFERENCE]...

Prints the ports, one per pair, then writes a line per connection to stderr.
"""

import os
import select
import socket
import sys

from OpenSSL import SSL


def context(certificate: str, reference: str) -> SSL.Context:
    made = SSL.Context(SSL.TLS_SERVER_METHOD)
    made.use_certificate_chain_file(certificate)
    made.use_privatekey_file(reference)
    made.check_privatekey()
    return made


def serve(made: SSL.Context, client: socket.socket) -> str:
    connection = SSL.Connection(made, client)
    connection.set_accept_state()
    try:
        connection.do_handshake()
        # An error left behind by the handshake would make this one fail.
        connection.sendall(b"hello\n")
        connection.shutdown()
    except SSL.Error as error:
        return f"failed {error!r}"
    return f"ok {connection.get_protocol_version_name()} {connection.get_cipher_name()}"


def main() -> None:
    files = sys.argv[1:]
    contexts = {
        socket.create_server(("127.0.0.1", 0)): context(certificate, reference)
        for certificate, reference in zip(files[::2], files[1::2], strict=True)
    }
    print(*(listener.getsockname()[1] for listener in contexts), flush=True)
    while True:
        for listener in select.select(list(contexts), [], [])[0]:
            client, _ = listener.accept()
            child = os.fork()
            if child == 0:
                print(serve(contexts[listener], client), file=sys.stderr, flush=True)
                os._exit(0)
            client.close()
            _, status = os.waitpid(child, 0)
            if status:
                print(f"child ended with {status}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
