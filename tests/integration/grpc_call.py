"""A gRPC server without TLS, and one call that goes to it through TLS: prints the answer.

A program of its own, for its threads. Its arguments: where to serve, where to call, and the file
with the certificate of who signed the callee's.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc


def main(serve_at: str, call: str, authority: str) -> None:
    def echo(request: bytes, context: grpc.ServicerContext) -> bytes:
        return b"echoed: " + request

    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("grpc.Test", handlers)])
    server.add_insecure_port(serve_at)
    server.start()
    credentials = grpc.ssl_channel_credentials(Path(authority).read_bytes())
    # The name that is asked for and verified; no proxy of the environment's is in between.
    options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(f"ipv4:{call}", credentials, options) as channel:
        echoed = channel.unary_unary("/grpc.Test/Echo")(b"hello", timeout=60)
    print(echoed.decode())
    server.stop(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
