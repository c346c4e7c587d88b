"""Hundreds of connections at the same time."""

import asyncio
import random
import ssl

from .conftest import Certificates, Serve
from .peers import echo_for_many

COUNT = 500
OCTETS = random.Random(2).randbytes(300_000)


def test_500_connections_at_once_get_every_octet_and_leave_nothing(
    serve: Serve, certificates: Certificates
) -> None:
    certificate = certificates("P-256")
    context = ssl.create_default_context(cafile=str(certificate.authority))
    with echo_for_many() as address:
        # On a busy machine, the last of them waits for long.
        instance = serve(address, worker={"max": 1000, "handshake_timeout": "250s"})
        before = instance.settled_counts()
        most = 0

        async def talk(number: int, everyone: asyncio.Barrier) -> None:
            nonlocal most
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", instance.port, ssl=context, server_hostname="localhost",
                ssl_handshake_timeout=250,
            )  # fmt: skip
            # Each its own octets: an answer to another one would show.
            octets = OCTETS[number * 100 : number * 100 + 200_000]

            async def write() -> None:
                for start in range(0, len(octets), 20_000):
                    writer.write(octets[start : start + 20_000])
                    await writer.drain()

            await everyone.wait()
            writing = asyncio.create_task(write())
            assert await reader.readexactly(len(octets)) == octets
            await writing
            await everyone.wait()
            if number == 0:
                most = len(instance.workers())
            await everyone.wait()
            writer.close()
            await writer.wait_closed()

        async def all_talk() -> None:
            everyone = asyncio.Barrier(COUNT)
            await asyncio.gather(*(talk(number, everyone) for number in range(COUNT)))

        asyncio.run(all_talk())
        assert most >= COUNT
        ends = instance.wait_for_events(COUNT, "connection_ended")
        assert {end["octets_from_client"] for end in ends} == {200_000}
        assert {end["octets_to_client"] for end in ends} == {200_000}
        assert {end["end"] for end in ends} == {"clean"}
        assert len({end["uid"] for end in ends}) >= COUNT
        assert not instance.events_named("handshake_failed")
        assert instance.settled_counts() == before
