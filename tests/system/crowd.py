"""Clients that come one after the other, and one that stays: crowd.py CERTIFICATE OVER.

Until there is a file OVER. Then it writes, as JSON, how many were served, what happened to the
others, and whether the one that stayed was. There are about a hundred in a second: some come at
every moment of what is done meanwhile, and it still has a processor.
"""

import json
import socket
import ssl
import sys
import threading
import time
from pathlib import Path

CERTIFICATE, OVER = sys.argv[1:]
PAUSE = 0.03
REQUEST = b"GET / HTTP/1.0\r\n\r\n"

# That certificate alone, whatever takes its place meanwhile.
context = ssl.create_default_context(cafile=CERTIFICATE)
served = 0
failures = []


def connect() -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", 443), 60)
    return context.wrap_socket(plain, server_hostname="www.example.org")


def answer(client: ssl.SSLSocket) -> bool:
    octets = b""
    while received := client.recv(4096):
        octets += received
    return octets.endswith(b"It works.\n")


def come_and_go() -> None:
    global served
    while not Path(OVER).exists():
        try:
            with connect() as client:
                client.sendall(REQUEST)
                if not answer(client):
                    raise EOFError("half an answer")
            served += 1
        except (OSError, EOFError) as error:
            failures.append(repr(error))
        time.sleep(PAUSE)


with connect() as stayer:
    # Half a request: the backend waits for the rest of it.
    stayer.sendall(REQUEST[:7])
    comers = [threading.Thread(target=come_and_go) for _ in range(4)]
    for comer in comers:
        comer.start()
    print("here we are", flush=True)
    for comer in comers:
        comer.join()
    stayer.sendall(REQUEST[7:])
    stayed = answer(stayer)
print(json.dumps({"served": served, "failures": failures, "stayed": stayed}))
