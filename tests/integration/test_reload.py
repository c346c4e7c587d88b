"""A new configuration, or a new certificate, without anybody noticing who is being served."""

import asyncio
import os
import random
import re
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Rounds
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from titus_py.audit.instance import Role, instance_processes

from .certificates import Certificate
from .conftest import Certificates, Serve
from .instance import PATIENCE, Instance, Process, Uids, eventually, free_port
from .peers import Listener, TlsClient, connect, echo_for_many
from .service import (
    clients_meanwhile,
    edit,
    install,
    name_shown_to_a_new_client,
    problems,
    reload,
    replace,
    serves,
    status,
    talk,
    without_end,
)

COMERS = 50
STAYERS = 50
#: A transfer goes on until it has seen so many reloads.
SPANNED = 5
OCTETS = random.Random(4).randbytes(1 << 20)


def hang_up(instance: Instance, generation: int) -> None:
    """SIGHUP, and wait until that generation serves."""
    instance.signal(signal.SIGHUP)
    instance.wait_for_event("reloaded", generation=generation)


def generation_processes(instance: Instance) -> list[Process]:
    return [process for process in instance.processes() if process.parent == instance.pid]


def no_earlier_generation(instance: Instance) -> None:
    """Old parents and their keyds are gone: two processes are left, beside the workers."""
    of_generations = (Role.PARENT, Role.KEYD)
    eventually(
        lambda: sum(one.role in of_generations for one in instance_processes(instance.pid)) == 2,
        "one parent, one keyd",
    )
    eventually(lambda: len(status(instance)["generations"]) == 1, "one generation")


# --- under load ------------------------------------------------------------------------


class Load:
    """Clients that come, say something and go; and clients that stay."""

    def __init__(self, port: int, authority: Path) -> None:
        self._port = port
        self._context = ssl.create_default_context(cafile=str(authority))
        self.reloads = 0
        self.over = False
        self.served = 0
        self.octets = 0
        self.transfers = 0
        self.failures: list[str] = []
        self.late: list[str] = []

    async def come_and_go(self, number: int) -> None:
        """New connections, one after the other; each has its octets to compare."""
        chance = random.Random(number)
        while not self.over:
            reloads = self.reloads
            reader, writer = await self._open()
            shown = int(self._name(writer).partition(".")[0].removeprefix("reload-"))
            if shown < reloads:
                self.late.append(f"certificate {shown} after reload {reloads}")
            await self._exchange(reader, writer, chance.randrange(len(OCTETS) - 5000), 5000)
            await self._close(reader, writer)
            self.served += 1
            await asyncio.sleep(chance.uniform(0.5, 1.5))

    async def stay(self, number: int) -> None:
        """Transfers that span many reloads, slowly, each to its end."""
        chance = random.Random(1000 + number)
        # Not all of them leave with the same reload.
        spanned = 1 + number % SPANNED
        while not self.over:
            begun, steps = self.reloads, 0
            reader, writer = await self._open()
            name = self._name(writer)
            while self.reloads < begun + spanned and not self.over:
                steps += 1
                await self._exchange(reader, writer, chance.randrange(len(OCTETS) - 40000), 40000)
                await asyncio.sleep(chance.uniform(0.1, 0.3))
            assert self._name(writer) == name
            await self._close(reader, writer)
            self.transfers += 1
            spanned = SPANNED

    async def noted(self, client: Callable[[int], Awaitable[None]], number: int) -> None:
        while not self.over:
            try:
                await client(number)
            except (OSError, EOFError, AssertionError) as error:
                self.failures.append(f"{client.__name__} {number}: {error!r}")
                await asyncio.sleep(1)

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(
            "127.0.0.1", self._port, ssl=self._context, server_hostname="localhost",
            ssl_handshake_timeout=PATIENCE,
        )  # fmt: skip

    def _name(self, writer: asyncio.StreamWriter) -> str:
        certificate = writer.get_extra_info("peercert")
        return str(certificate["subjectAltName"][1][1])

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, start: int, length: int
    ) -> None:
        octets = OCTETS[start : start + length]
        writer.write(octets)
        async with asyncio.timeout(PATIENCE):
            assert await reader.readexactly(length) == octets, "other octets came back"
        self.octets += length

    async def _close(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        async with asyncio.timeout(PATIENCE):
            await writer.wait_closed()


def test_reloads_under_load_fail_nobody(
    serve: Serve, certificates: Certificates, tmp_path: Path, rounds: Rounds
) -> None:
    """Twice as many as the longest transfer spans: each sees its end, and uids are used again."""
    reloads = rounds(enough=2 * SPANNED, full=50)

    def certificate_of(number: int) -> Certificate:
        return certificates("P-256", "localhost", f"reload-{number}.test")

    site = install(certificate_of(0), tmp_path)
    with echo_for_many() as address:
        instance = serve(
            address,
            uids_count=6000,
            vhost=[{"certificate": site.certificate, "key": site.key}],
            worker={"max": 180, "spare": 8, "handshake_timeout": "60s"},
            limits={"handshakes": 180},
        )
        before = instance.settled_counts(8)
        load = Load(instance.port, site.authority)
        durations: list[float] = []
        most_generations = 0

        async def reload_again_and_again() -> None:
            nonlocal most_generations
            for number in range(1, reloads + 1):
                changed = number % 2 == 1
                if changed:
                    install(certificate_of(number), tmp_path)
                started = time.monotonic()
                if number % 4 < 2:
                    await asyncio.to_thread(hang_up, instance, number + 1)
                else:
                    answer = await asyncio.to_thread(reload, instance)
                    assert answer == {"reloaded": True, "generation": number + 1}
                durations.append(time.monotonic() - started)
                if changed:
                    load.reloads = number
                told = await asyncio.to_thread(status, instance)
                most_generations = max(most_generations, len(told["generations"]))

        async def everybody() -> None:
            clients = [load.noted(load.come_and_go, number) for number in range(COMERS)]
            clients += [load.noted(load.stay, number) for number in range(STAYERS)]
            tasks = [asyncio.create_task(client) for client in clients]
            try:
                await reload_again_and_again()
            finally:
                load.over = True
                await asyncio.wait(tasks, timeout=PATIENCE)
            assert all(task.done() for task in tasks)

        started = time.monotonic()
        asyncio.run(everybody())
        print(
            f"{reloads} reloads in {time.monotonic() - started:.0f} s, the slowest "
            f"{max(durations):.1f} s; up to {most_generations} generations at once; "
            f"{load.served} connections, {load.transfers} long transfers, {load.octets} octets; "
            f"{len(load.failures)} failures"
        )
        assert not load.failures
        assert not load.late
        assert load.served > COMERS
        assert load.transfers >= STAYERS
        assert most_generations > 3

        no_earlier_generation(instance)
        eventually(lambda: not without_end(instance), "an end of each connection")
        assert {end["end"] for end in instance.events_named("connection_ended")} == {"clean"}
        assert not instance.events_named("handshake_failed")
        assert not instance.events_named("reload_failed")
        assert instance.settled_counts(8) == before


# --- what a reload takes over -------------------------------------------------------------


def test_established_connections_go_on_and_new_ones_see_the_new_certificate(
    serve: Serve, certificates: Certificates, echoing: Listener, tmp_path: Path
) -> None:
    site = install(certificates("P-256", "before.test"), tmp_path)
    instance = serve(echoing.address, vhost=[{"certificate": site.certificate, "key": site.key}])
    before = instance.settled_counts()
    old = generation_processes(instance)
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        install(certificates("RSA-2048", "after.test"), tmp_path)
        assert name_shown_to_a_new_client(instance) == "before.test"
        answer = reload(instance)
        assert answer == {"reloaded": True, "generation": 2}
        assert name_shown_to_a_new_client(instance) == "after.test"
        told = status(instance)
        assert [generation["state"] for generation in told["generations"]] == ["retired", "serving"]
        assert [certificate["names"] for certificate in told["certificates"]] == [["after.test"]]
        assert talk(client)
        assert {*old} < {*generation_processes(instance)}
    no_earlier_generation(instance)
    assert not {*old} & {*instance.processes()}
    assert instance.settled_counts() == before


def test_nothing_but_the_reason_comes_of_a_bad_configuration(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    processes = generation_processes(instance)
    good = (instance.directory / "titus.toml").read_bytes()
    descriptors = instance.supervisor().descriptors

    def break_it(tables: dict[str, Any]) -> None:
        tables["worker"]["maximum"] = 3
        tables["listen"][0]["address"] = "localhost"
        tables["vhost"][0]["certificate"] = "/nonexistent.crt"
        tables["log"]["format"] = "text"

    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        edit(instance, break_it)
        reasons = problems(instance)
        assert len(reasons) == 3
        file = str(instance.directory / "titus.toml")
        for reason, (key, word) in zip(
            sorted(reasons, key=lambda reason: reason.split(": ")[1]),
            [
                ('listen "localhost": address', "localhost"),
                ("vhost for any name: certificate", "no such file"),
                ("worker.maximum", "unknown key"),
            ],
            strict=True,
        ):
            assert re.match(rf"{re.escape(file)}:\d+: {key}: ", reason)
            assert word in reason
        replace(instance.directory / "titus.toml", b"[worker\n")
        assert "not valid TOML" in problems(instance)[0]
        (instance.directory / "titus.toml").unlink()
        assert problems(instance) == [f"{file}: no such file or directory"]
        assert generation_processes(instance) == processes
        assert serves(instance)
        assert talk(client)
        replace(instance.directory / "titus.toml", good)
        assert reload(instance)["reloaded"]
        assert talk(client)
    no_earlier_generation(instance)
    eventually(lambda: instance.supervisor().descriptors == descriptors, "descriptors as before")


def test_a_key_that_is_not_the_certificates_changes_nothing(
    serve: Serve, certificates: Certificates, echoing: Listener, tmp_path: Path
) -> None:
    site = install(certificates("P-256", "before.test"), tmp_path)
    instance = serve(echoing.address, vhost=[{"certificate": site.certificate, "key": site.key}])
    replace(site.key, certificates("P-256", "after.test").key.read_bytes())
    (reason,) = problems(instance)
    assert "vhost for any name: key: " in reason
    assert name_shown_to_a_new_client(instance) == "before.test"


def test_addresses_come_and_go_with_a_reload(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    descriptors = instance.supervisor().descriptors
    first, second, third = instance.port, free_port(), free_port()

    def listen_on(*ports: int) -> None:
        def change(tables: dict[str, Any]) -> None:
            tables["listen"] = [{"address": f"127.0.0.1:{port}"} for port in ports]

        edit(instance, change)
        assert reload(instance)["reloaded"]

    with TlsClient(first) as early:
        assert talk(early.handshake())
        listen_on(first, second, third)
        assert all(serves(instance, port) for port in (first, second, third))
        assert len(status(instance)["listeners"]) == 3
        with TlsClient(second) as late:
            assert talk(late.handshake())
            listen_on(third)
            assert refused(first)
            assert refused(second)
            assert serves(instance, third)
            assert talk(early)
            assert talk(late)
    no_earlier_generation(instance)
    instance.wait_for_event("listening", generation=3)
    heard = [event["address"] for event in instance.events_named("listening", generation=3)]
    assert heard == [f"127.0.0.1:{third}"]
    eventually(lambda: instance.supervisor().descriptors == descriptors, "descriptors as before")


def test_a_reload_may_make_an_address_wider_or_narrower(serve: Serve, echoing: Listener) -> None:
    """Nobody who connects meanwhile, to what is served before and after, is turned away."""
    # Room for every generation: the one that has just ended gives its uids back a little later.
    instance = serve(echoing.address, uids_count=6000)
    descriptors = instance.supervisor().descriptors
    narrow = f"127.0.0.1:{instance.port}"
    with TlsClient(instance.port) as stayer:
        assert talk(stayer.handshake())
        with clients_meanwhile(instance, 2):
            for host in ("0.0.0.0", "[::]", "127.0.0.1", "[::]", "0.0.0.0", "127.0.0.1"):
                address = f"{host}:{instance.port}"
                edit(instance, lambda tables, to=address: tables["listen"][0].update(address=to))
                assert reload(instance)["reloaded"]
                assert address in status(instance)["listeners"]
                if address == narrow:
                    assert refused(instance.port, "127.0.0.2")
                else:
                    assert not refused(instance.port, "127.0.0.2")
                with socket.socket() as another, pytest.raises(OSError, match="in use"):
                    another.bind(("127.0.0.1", instance.port))
        assert talk(stayer)
    assert status(instance)["listeners"] == [narrow]
    no_earlier_generation(instance)
    eventually(lambda: instance.supervisor().descriptors == descriptors, "descriptors as before")


def refused(port: int, host: str = "127.0.0.1") -> bool:
    try:
        connect(port, host).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        return False
    return False


def test_a_reload_is_refused_where_an_added_address_is_in_use(
    serve: Serve, echoing: Listener
) -> None:
    instance = serve(echoing.address)
    processes, descriptors = generation_processes(instance), instance.supervisor().descriptors

    def add(tables: dict[str, Any]) -> None:
        tables["listen"] += [{"address": f"127.0.0.1:{port}"} for port in (free, taken)]
        tables["log"]["format"] = "text"

    with Listener.tcp() as another:
        free, taken = free_port(), another.port
        edit(instance, add)
        why = "Address already in use: 'ss -ltnp' shows by whom"
        reason = f"cannot listen on 127.0.0.1:{taken}: {why}"
        assert problems(instance) == [reason]
    assert refused(free)
    assert generation_processes(instance) == processes
    eventually(lambda: instance.supervisor().descriptors == descriptors, "descriptors as before")
    assert serves(instance)
    assert status(instance)["listeners"] == [f"127.0.0.1:{instance.port}"]


def test_a_reload_is_refused_where_earlier_connections_have_all_uids(
    serve: Serve, echoing: Listener
) -> None:
    # Room for two parents and no more.
    instance = serve(echoing.address, worker={"max": Uids.SIZE // 2 - 20, "spare": 4})
    before = instance.settled_counts()
    free = free_port()
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        assert reload(instance)["reloaded"]
        edit(instance, lambda tables: tables["listen"].append({"address": f"127.0.0.1:{free}"}))
        (reason,) = problems(instance)
        assert reason.startswith("worker.uids: connections of earlier generations")
        assert refused(free)
        assert talk(client)
        assert serves(instance)
    no_earlier_generation(instance)
    assert instance.settled_counts() == before

    def succeeds() -> bool:
        # The uids become free when no process has them: that is looked at once a second.
        return bool(reload(instance)["reloaded"])

    eventually(succeeds, "uids for a third generation")
    assert serves(instance, free)


def test_a_reload_that_is_asked_for_during_another_one_follows_it(
    serve: Serve, certificates: Certificates, echoing: Listener, tmp_path: Path
) -> None:
    site = install(certificates("P-256", "before.test"), tmp_path)
    after = certificates("P-256", "after.test")
    instance = serve(echoing.address, vhost=[{"certificate": site.certificate, "key": site.key}])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as impatient:
        impatient.connect(f"/run/titus-py/{instance.pid}.control")
        impatient.send(b'{"do": "reload"}')
        instance.wait_for_event("reloading")
        # Its certificate may have been read already.
        install(after, tmp_path)
        for _ in range(5):
            os.kill(instance.pid, signal.SIGHUP)
        impatient.settimeout(PATIENCE)
        assert b'"reloaded": true' in impatient.recv(4096)
    eventually(lambda: len(instance.events_named("reloaded")) == 2, "two reloads")
    assert name_shown_to_a_new_client(instance) == "after.test"
    time.sleep(0.5)
    assert len(instance.events_named("reloading")) == 2, "as many as it takes, not one for each"
    no_earlier_generation(instance)


def new_keyd(instance: Instance) -> int | None:
    """The latest generation's keyd, where there is more than one generation."""
    generations = status(instance)["generations"]
    return generations[-1]["keyd"] if len(generations) > 1 else None


def test_a_new_generation_that_does_not_start_is_abandoned(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    instance.expected_alarms |= {"keyd_died", "parent_died"}
    processes = generation_processes(instance)
    descriptors = instance.supervisor().descriptors
    free = free_port()
    edit(instance, lambda tables: tables["listen"].append({"address": f"127.0.0.1:{free}"}))
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        instance.signal(signal.SIGHUP)
        keyd = eventually(lambda: new_keyd(instance), "a second generation")
        next(process for process in instance.processes() if process.pid == keyd).kill()
        reason = instance.wait_for_event("reload_failed")["problem"]
        assert reason == "keyd or the parent did not start: see the lines above"
        assert refused(free)
        eventually(lambda: generation_processes(instance) == processes, "the end of the others")
        assert talk(client)
        assert serves(instance)
        eventually(
            lambda: instance.supervisor().descriptors == descriptors, "descriptors as before"
        )
        assert reload(instance)["reloaded"]
        assert serves(instance, free)


def test_an_abandoned_generation_leaves_no_narrower_address_behind(
    serve: Serve, echoing: Listener
) -> None:
    """Clients would be given to it, and nobody would hear them."""
    port = free_port()
    instance = serve(echoing.address, listen=[{"address": f"0.0.0.0:{port}"}])
    instance.expected_alarms |= {"keyd_died", "parent_died"}
    edit(instance, lambda tables: tables["listen"][0].update(address=f"127.0.0.1:{port}"))
    instance.signal(signal.SIGHUP)
    keyd = eventually(lambda: new_keyd(instance), "a second generation")
    next(process for process in instance.processes() if process.pid == keyd).kill()
    instance.wait_for_event("reload_failed")
    assert all(serves(instance, port) for _ in range(3))


def test_the_log_may_be_told_to_leave_the_quiet_events_out(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)

    def level(name: str) -> None:
        edit(instance, lambda tables: tables["log"].update(level=name))
        assert reload(instance)["reloaded"]

    level("warning")
    assert serves(instance)
    eventually(lambda: status(instance)["counts"]["handshakes"] == 1, "a connection counted")
    edit(instance, lambda tables: tables["log"].update(level="loud"))
    assert len(problems(instance)) == 1
    instance.wait_for_event("reload_failed")
    names = [event["event"] for event in instance.events()]
    louder = {*names[names.index("reloading") + 1 :]}
    assert louder - {"not_available"} == {"reload_failed"}
    since = len(names)
    level("info")
    assert serves(instance)
    # Of the connection before, only the end can come as late as now.
    begun = instance.wait_for_event("connection_begun", since=since)
    instance.wait_for_event("connection_ended", since=since, client=begun["client"])


def test_an_empty_directory_that_cannot_be_made_is_named(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    edit(instance, lambda tables: tables["worker"].update(chroot="/proc/self/fdinfo/no/such"))
    [problem] = problems(instance)
    assert problem.startswith("worker.chroot: /proc/self/fdinfo/no/such: ")
    assert serves(instance)


def test_more_keys_than_a_message_holds_are_loaded(
    serve: Serve, echoing: Listener, certificates: Certificates
) -> None:
    """What keyd says of them has one length, whatever their number."""
    instance = serve(echoing.address)
    issued = [certificates("P-256", f"n{number}.example") for number in range(1000)]
    vhosts = [
        {
            "sni": [f"n{number}.example"],
            "certificate": str(one.certificate),
            "key": str(one.key),
            "backend": echoing.address,
        }
        for number, one in enumerate(issued)
    ]
    edit(instance, lambda tables: tables["vhost"][0].update(sni=["localhost"]))
    edit(instance, lambda tables: tables["vhost"].extend(vhosts))
    assert reload(instance)["reloaded"]
    last = issued[-1].authority
    with TlsClient(instance.port, "n999.example", authority=last) as client:
        assert talk(client.handshake())


def test_a_keyd_that_dies_while_it_starts_is_no_reason_to_abandon_who_serves(
    serve: Serve, echoing: Listener
) -> None:
    """There is an earlier generation, with a connection: it has retired, and cannot serve."""
    instance = serve(echoing.address)
    instance.expected_alarms |= {"keyd_died"}
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        assert reload(instance)["reloaded"]
        instance.wait_for_event("reloaded")
        instance.keyd().kill()
        died = instance.wait_for_event("keyd_died")["pid"]
        second = eventually(lambda: {new_keyd(instance)} - {died, None}, "another keyd").pop()
        next(process for process in instance.processes() if process.pid == second).kill()
        instance.wait_for_event("keyd_died", pid=second)
        assert serves(instance)
        assert talk(client)
        assert status(instance)["generations"][1]["state"] == "serving"
        assert not instance.events_named("reload_failed")


def test_nobody_comes_to_a_generation_that_is_not_ready(serve: Serve, echoing: Listener) -> None:
    """Or they would be lost with it, should it be abandoned."""
    instance = serve(echoing.address)
    instance.expected_alarms |= {"keyd_died", "parent_died"}
    instance.signal(signal.SIGHUP)
    pid = eventually(lambda: new_keyd(instance), "a second generation")
    keyd = next(process for process in instance.processes() if process.pid == pid)
    keyd.kill(signal.SIGSTOP)
    instance.wait_for_event("parent_started", generation=2)
    # As long as it takes to have workers who could take a client.
    time.sleep(0.5)
    clients = [TlsClient(instance.port) for _ in range(20)]
    try:
        assert all(talk(client.handshake()) for client in clients)
        keyd.kill()
        instance.wait_for_event("reload_failed")
        assert all(talk(client) for client in clients)
    finally:
        for client in clients:
            client.socket.close()
    assert serves(instance)


# --- by itself ----------------------------------------------------------------------------


def test_a_keyd_that_finds_other_keys_leads_to_a_reload(
    serve: Serve, certificates: Certificates, echoing: Listener, tmp_path: Path
) -> None:
    site = install(certificates("P-256", "before.test"), tmp_path)
    instance = serve(echoing.address, vhost=[{"certificate": site.certificate, "key": site.key}])
    instance.expected_alarms.add("keyd_died")
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        install(certificates("P-256", "after.test"), tmp_path)
        assert name_shown_to_a_new_client(instance) == "before.test"
        instance.keyd().kill()
        instance.wait_for_event("keys_changed", action="reloading")
        instance.wait_for_event("reloaded")
        assert name_shown_to_a_new_client(instance) == "after.test"
        assert talk(client)
    no_earlier_generation(instance)


def test_a_renewed_certificate_is_noticed_once_all_of_it_is_there(
    serve: Serve, certificates: Certificates, echoing: Listener, tmp_path: Path
) -> None:
    """As certbot does it: numbered files in an archive, links to them that are swapped."""
    archive, lives = tmp_path / "archive", tmp_path / "live"
    archive.mkdir()
    lives.mkdir()

    def renew(number: int, certificate: Certificate) -> None:
        for name, content in (
            ("privkey", certificate.key),
            ("cert", certificate.certificate),
            ("fullchain", certificate.certificate),
        ):
            file = archive / f"{name}{number}.pem"
            file.touch(mode=0o600)
            file.write_bytes(content.read_bytes())
        for name in ("cert", "privkey", "fullchain"):
            link = lives / f"{name}.pem"
            link.unlink(missing_ok=True)
            link.symlink_to(f"../archive/{name}{number}.pem")
            # Slower than it would be: whoever looked in between would find a mistake.
            time.sleep(0.3)

    renew(1, certificates("P-256", "before.test"))
    vhost = {"certificate": lives / "fullchain.pem", "key": lives / "privkey.pem"}
    instance = serve(echoing.address, vhost=[vhost], service={"reload_on_change": True})
    with TlsClient(instance.port) as client:
        assert talk(client.handshake())
        renew(2, certificates("P-256", "after.test"))
        instance.wait_for_event("files_changed", action="reloading")
        instance.wait_for_event("reloaded")
        assert name_shown_to_a_new_client(instance) == "after.test"
        assert talk(client)
        time.sleep(4)
    assert len(instance.events_named("files_changed")) == 1
    assert len(instance.events_named("reloaded")) == 1
    assert not instance.events_named("reload_failed")
    no_earlier_generation(instance)


def test_a_chain_that_is_being_written_is_not_taken(
    serve: Serve, certificates: Certificates, echoing: Listener, tmp_path: Path
) -> None:
    """Neither when it is noticed nor when somebody asks for it: only all of it is."""
    site = install(certificates("P-256", "before.test"), tmp_path)
    vhost = {"certificate": site.certificate, "key": site.key}
    instance = serve(echoing.address, vhost=[vhost], service={"reload_on_change": True})

    def chain() -> list[bytes]:
        with TlsClient(instance.port) as client:
            shown = client.handshake().tls.get_peer_cert_chain(as_cryptography=True) or []
            return [certificate.public_bytes(Encoding.PEM) for certificate in shown]

    leaf, issuer = site.certificate.read_bytes(), site.authority.read_bytes()
    assert chain() == [leaf]
    site.certificate.write_bytes(leaf + issuer[:-30])
    instance.wait_for_event("files_changed")
    problem = instance.wait_for_event("reload_failed")["problem"]
    where = f"{site.certificate}:{leaf.count(10) + 1}: "
    assert f"{where}no end of the CERTIFICATE that begins here: the file is cut off" in problem
    assert problems(instance) == [problem]
    assert chain() == [leaf]
    site.certificate.write_bytes(leaf + issuer)
    instance.wait_for_event("reloaded")
    assert chain() == [leaf, issuer]


def test_a_new_passphrase_is_a_change(
    serve: Serve, certificates: Certificates, echoing: Listener, tmp_path: Path
) -> None:
    site = install(certificates("P-256"), tmp_path)
    passphrase = tmp_path / "passphrase"

    def encrypt(words: bytes) -> None:
        key = load_pem_private_key(certificates("P-256").key.read_bytes(), None)
        encryption = BestAvailableEncryption(words)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        replace(passphrase, words)
        replace(site.key, pem)

    encrypt(b"the first")
    vhost = {"certificate": site.certificate, "key": site.key, "passphrase_file": passphrase}
    instance = serve(echoing.address, vhost=[vhost], service={"reload_on_change": True})
    encrypt(b"the second")
    instance.wait_for_event("reloaded")
    since = len(instance.events())
    # The file alone.
    replace(passphrase, b"the second\n")
    instance.wait_for_event("reloaded", since=since)
    assert serves(instance)


def test_files_that_change_are_left_alone_unless_asked_for(
    serve: Serve, certificates: Certificates, echoing: Listener, tmp_path: Path
) -> None:
    site = install(certificates("P-256", "before.test"), tmp_path)
    instance = serve(echoing.address, vhost=[{"certificate": site.certificate, "key": site.key}])
    install(certificates("P-256", "after.test"), tmp_path)
    time.sleep(7)
    assert name_shown_to_a_new_client(instance) == "before.test"
    assert not instance.events_named("reloading")
