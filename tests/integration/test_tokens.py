"""Keys in tokens (PKCS #11): SoftHSM's, served by keyd to itself and to nginx, and what goes wrong.

The module is SoftHSM, or one that is SoftHSM until it is told to fail.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from OpenSSL import SSL

from keyd.inspection.key_search import Needle, needles, search_all
from keyd.linux import landlock
from keyd.powers import PrivateKey
from keyd.protocol import MAX_REPLY_OCTETS, Reply, SignatureScheme, Status
from titus_py.audit.throwaway_authority import ThrowawayAuthority

from .conftest import Serve
from .instance import (
    TITUS_PY,
    UIDS,
    Instance,
    Process,
    Table,
    descendants,
    eventually,
    free_port,
    of_each,
    toml,
)
from .peers import Listener, TlsClient
from .service import PATIENCE, status
from .test_metrics_process import scrape
from .tokens import (
    SOFTHSM,
    USER,
    Hsm,
    Nginx,
    TokenKeyd,
    attempt_unconfined,
    build_shim,
    nginx_asking,
    s_client,
    scratch,
)

#: CKR_PIN_INCORRECT, as the shim writes it.
_PIN_INCORRECT = "0xa0"
RSA, ECDSA = SignatureScheme.rsa_pss_rsae_sha256, SignatureScheme.ecdsa_secp256r1_sha256


class Site(NamedTuple):
    certificate: bytes
    key: PrivateKey


class Served(NamedTuple):
    """A keyd with the tokens ``web`` (SoftHSM) and ``shaky`` (which fails as it is told)."""

    directory: Path
    hsm: Hsm
    rsa: Site
    ecdsa: Site
    shaky: PrivateKey
    keyd: TokenKeyd

    def behave(self, how: str) -> None:
        behaviour = self.hsm.directory / "behaviour"
        new = behaviour.with_suffix(".new")
        new.write_text(how)
        new.chmod(0o644)
        new.rename(behaviour)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    authority = ThrowawayAuthority()

    def site(kind: str, name: str = "localhost") -> Site:
        issued = authority.issue(kind, [name])
        key = load_pem_private_key(issued.key, None)
        return Site(issued.certificate, key)  # type: ignore[arg-type]

    rsa, ecdsa, shaky = site("RSA-2048"), site("P-256"), site("P-256", "shaky")
    with scratch() as directory:
        (directory / "authority.pem").write_bytes(authority.certificate)
        for one_name, one in (("rsa", rsa), ("ecdsa", ecdsa), ("shaky", shaky)):
            (directory / f"{one_name}.crt").write_bytes(one.certificate)
        home = directory / "hsm"
        home.mkdir()
        hsm = Hsm(home)
        hsm.add_token("web", rsa=rsa.key, ecdsa=ecdsa.key)
        hsm.add_token("shaky", key=shaky.key)
        shim = build_shim(directory)
        wrong = directory / "wrong-pin"
        wrong.write_text("not the PIN\n")
        keyd = TokenKeyd(
            directory,
            home,
            [
                hsm.uri("web", "rsa"),
                hsm.uri("web", "ecdsa"),
                hsm.uri("shaky", "key", shim),
                hsm.uri("web", "rsa", shim, wrong),
                hsm.uri("web", "missing"),
                hsm.uri("none", "key"),
            ],
            f"SOFTHSM2_CONF={hsm.configuration}",
            *(f"SHIM_{name.upper()}={home / name}" for name in ("behaviour", "logins", "attempts")),
        )
        try:
            # A token that fails while others begin is tried again a second later.
            for ready in ("web: rsa", "web: ecdsa", "shaky: key"):
                keyd.wait_for(f"token {ready} is ready")
            yield Served(directory, hsm, rsa, ecdsa, shaky.key, keyd)
        finally:
            keyd.close()
    eventually(lambda: not descendants(keyd.process.pid), "tokens' processes end with keyd")


def test_it_says_of_each_token_how_it_is(served: Served) -> None:
    served.keyd.wait_for("token none cannot be used: there is no such token")
    served.keyd.wait_for("token web: missing is not in the token")
    served.keyd.wait_for("token shaky: key is ready")


def test_a_module_that_may_not_read_its_files_is_told_of_with_the_setting(served: Served) -> None:
    with scratch() as directory:
        (elsewhere := directory / "elsewhere").mkdir()
        configuration = f"SOFTHSM2_CONF={served.hsm.configuration}"
        keyd = TokenKeyd(directory, elsewhere, [served.hsm.uri("web", "rsa")], configuration)
        try:
            keyd.wait_for(
                f"token web cannot be used: the module {SOFTHSM} cannot be used: GeneralError: "
                "does it open what token_paths (--token-path) does not name?"
            )
        finally:
            keyd.close()


def test_a_wrong_pin_is_named_and_never_tried_again(served: Served) -> None:
    served.keyd.wait_for("token web cannot be used: its PIN was not taken (PinIncorrect)")
    served.keyd.wait_for("it is not tried again before a reload or a restart")
    # By the end of this it would have been tried again, and again.
    fail_and_come_back(served, "crash")
    fail_and_come_back(served, "crash")
    # SoftHSM fails for another reason at times, where two log in to a token at once. The PIN has
    # then been neither right nor wrong, and is tried again.
    logins = (served.hsm.directory / "logins").read_text().splitlines()
    assert logins.count(_PIN_INCORRECT) == 1, logins


def fail_and_come_back(served: Served, behaviour: str) -> None:
    """One signature fails, and then the token ``shaky`` is ready again, after a second or more."""
    ready = served.keyd.log().count("token shaky: key is ready")
    served.behave(behaviour)
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.FAILED
    served.behave("")
    served.keyd.wait_for("token shaky: key is ready", ready + 1)


@pytest.mark.parametrize("version", ["-tls1_3", "-tls1_2"])
@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_nginx_serves_with_keys_of_a_token(
    served: Served, nginx_with_keyd: Nginx, kind: str, version: str
) -> None:
    s_client(nginx_with_keyd.port, served.directory / "authority.pem", kind, version)


@pytest.fixture(scope="module")
def nginx_with_keyd(served: Served) -> Iterator[Nginx]:
    """A stock nginx whose keys are in the token ``web``."""
    keys = {"rsa": served.rsa.key, "ecdsa": served.ecdsa.key}
    with nginx_asking(served.keyd.socket, served.directory, keys) as nginx:
        yield nginx


@pytest.mark.parametrize(
    ("behaviour", "named"),
    [
        ("crash", "its module ended its process: killed by SIGSEGV"),
        ("exec", "its module ended its process: killed by SIGSYS"),
        ("exit", "its module ended its process: exited with 0"),
        ("pulled", "DeviceRemoved"),
        ("session lost", "SessionHandleInvalid"),
    ],
)
def test_a_token_that_fails_is_named_is_used_again_and_holds_up_no_other(
    served: Served, behaviour: str, named: str
) -> None:
    ready = served.keyd.log().count("token shaky: key is ready")
    served.behave(behaviour)
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.FAILED
    assert served.keyd.ask(served.ecdsa.key, ECDSA).status is Status.DONE
    served.keyd.wait_for(f"token shaky cannot be used: {named}")
    served.behave("")
    served.keyd.wait_for("token shaky: key is ready", ready + 1)
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.DONE


def test_a_token_is_found_though_another_does_not_say_what_it_is(served: Served) -> None:
    """As SoftHSM's does not at times, while somebody logs in to it."""
    ready = served.keyd.log().count("token shaky: key is ready")
    served.behave("crash")
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.FAILED
    served.behave("others fail")
    served.keyd.wait_for("token shaky: key is ready", ready + 1)
    served.behave("")
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.DONE


def test_a_token_that_hangs_holds_up_no_other(served: Served) -> None:
    ready = served.keyd.log().count("token shaky: key is ready")
    served.behave("hang")
    with ExitStack() as channels:
        # More of them than keyd has threads.
        asking = [
            channels.enter_context(served.keyd.asking(served.shaky, ECDSA))
            for _ in range(2 * (os.cpu_count() or 1) + 2)
        ]
        for key, scheme in ((served.ecdsa.key, ECDSA), (served.rsa.key, RSA)):
            assert served.keyd.ask(key, scheme).status is Status.DONE
        assert not select.select(asking, [], [], 0)[0]
        for channel in asking:
            assert Reply.decode(channel.recv(MAX_REPLY_OCTETS)).status is Status.FAILED
    served.behave("")
    served.keyd.wait_for("token shaky cannot be used: its module hung, and was killed")
    served.keyd.wait_for("token shaky: key is ready", ready + 1)
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.DONE


def test_a_mechanism_that_is_missing_is_named_and_costs_one_handshake(served: Served) -> None:
    served.behave("no mechanism")
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.FAILED
    served.keyd.wait_for("refused, FAILED: sign: token shaky: MechanismInvalid")
    served.behave("")
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.DONE


def test_the_module_can_do_nothing_but_sign(served: Served) -> None:
    attempts = served.hsm.directory / "attempts"
    # Of another token, with the same uid: the first one's, which stays.
    (other, *_) = (
        process
        for process, maps in of_each(served.keyd.token_processes(), "maps").items()
        if b"softhsm" in maps and b"shim" not in maps
    )
    attempts.with_suffix(".pid").write_text(str(other.pid))
    attempts.with_suffix(".pid").chmod(0o644)
    served.behave("attempts")
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.DONE
    served.behave("")
    confined = attempts.read_text().splitlines()[-7:]
    attempts.unlink()
    # The control: the same user, in a process that is not confined.
    attempt_unconfined(served.directory / "shim.so", attempts)
    *most, by_signal, host = zip(confined, attempts.read_text().splitlines(), strict=True)
    assert most == [
        ("read: Permission denied", "read: done"),
        ("write: Permission denied", "write: done"),
        ("connect: Permission denied", "connect: Connection refused"),
        ("limits: Function not implemented", "limits: done"),
        ("own limits: done", "own limits: done"),
    ]
    assert by_signal[1] == "signal: done"
    if landlock.version() >= 6:
        assert by_signal[0] == "signal: Operation not permitted"
    # Not every kernel has these sockets, which no network namespace keeps in.
    assert host[0] == "the host: Function not implemented"
    assert host[1] in ("the host: done", "the host: Address family not supported by protocol")


def test_the_key_is_in_no_process_but_the_tokens(served: Served, nginx_with_keyd: Nginx) -> None:
    sought = [*needles(served.rsa.key), *needles(served.ecdsa.key)]
    for key, scheme in ((served.ecdsa.key, ECDSA), (served.rsa.key, RSA)):
        assert served.keyd.ask(key, scheme).status is Status.DONE
    keyd, nginx = descendants(served.keyd.process.pid), descendants(nginx_with_keyd.pid)
    # keyd itself, and those that watch: of web twice, shaky and none.
    assert {*keyd[:5], *nginx[:2]} <= {*found_in_none_but_the_tokens([*keyd, *nginx], sought)}
    # The control: the same search finds the same keys in a process that has them.
    with holder(served.rsa.key) as pid:
        assert search_all([pid], sought)[0].hits


def test_a_key_of_a_file_as_well_is_the_tokens_once_the_file_is_gone(served: Served) -> None:
    hsm = served.hsm
    with scratch() as directory:
        file = directory / "keys" / "site.key"
        file.parent.mkdir(mode=0o700)
        form = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        file.write_bytes(served.ecdsa.key.private_bytes(*form))
        variable = f"SOFTHSM2_CONF={hsm.configuration}"
        option = f"--key-directory={file.parent}"
        keyd = TokenKeyd(
            directory, hsm.directory, [hsm.uri("web", "ecdsa")], variable, options=[option]
        )
        try:
            keyd.wait_for("token web: ecdsa is ready")
            assert keyd.ask(served.ecdsa.key, ECDSA).status is Status.DONE
            file.unlink()
            keyd.process.send_signal(signal.SIGHUP)
            keyd.wait_for("keys read again: 0")
            assert keyd.ask(served.ecdsa.key, ECDSA).status is Status.DONE
        finally:
            keyd.close()


def found_in_none_but_the_tokens(
    processes: list[Process], sought: Sequence[Needle]
) -> list[Process]:
    """In no process without a token's module are the keys. Those were searched to the end."""
    maps = of_each(processes, "maps")
    without = [one for one in maps if b"softhsm" not in maps[one]]
    assert len(without) < len(maps)
    searched = search_all([one.pid for one in without], sought)
    for found in searched:
        assert not found.hits, [str(hit) for hit in found.hits]
    return [one for one, found in zip(without, searched, strict=True) if not found.ended]


@contextmanager
def holder(key: PrivateKey) -> Iterator[int]:
    """A process that has a key in its memory: its pid."""
    program = (
        "import sys; from cryptography.hazmat.primitives.serialization import load_pem_private_key;"
        "key = load_pem_private_key(sys.stdin.buffer.read(), None); print(flush=True);"
        "import time; time.sleep(60)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        process.stdin.close()
        process.stdout.readline()
        yield process.pid
        process.kill()


# --- titus-py with keys in tokens ------------------------------------------------------------


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def site(served: Served, serve_all: Serve, echoing: Listener, metrics_port: int) -> Instance:
    """One virtual host with two keys in the token ``web``, and one whose token is ``shaky``."""
    hsm = served.hsm
    instance = serve_all(
        echoing.address,
        metrics={"address": f"127.0.0.1:{metrics_port}"},
        keyd={
            "user": str(UIDS.take(2)[0]),
            "token_user": USER,
            "token_paths": [str(hsm.directory)],
            "token_environment": [
                f"SOFTHSM2_CONF={hsm.configuration}",
                f"SHIM_BEHAVIOUR={hsm.directory / 'behaviour'}",
            ],
        },
        vhost=[
            {
                "sni": ["shaky"],
                "certificate": str(served.directory / "shaky.crt"),
                "key": hsm.uri("shaky", "key", served.directory / "shim.so"),
            },
            {
                "certificates": [
                    {
                        "certificate": str(served.directory / f"{kind}.crt"),
                        "key": hsm.uri("web", kind),
                    }
                    for kind in ("rsa", "ecdsa")
                ]
            },
        ],
    )
    tokens_are_ready(instance)
    return instance


def tokens_are_ready(site: Instance) -> None:
    """Both. One that fails while the other begins (see above) is tried again a second later."""
    ready = [{"token": token, "state": "ready"} for token in ("shaky", "web")]

    def told() -> bool:
        return sorted(status(site)["tokens"], key=lambda one: str(one["token"])) == ready

    eventually(told, "the tokens are ready")


@pytest.mark.parametrize("version", ["-tls1_3", "-tls1_2"])
@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_titus_py_serves_with_keys_of_a_token(
    served: Served, site: Instance, kind: str, version: str
) -> None:
    s_client(site.port, served.directory / "authority.pem", kind, version)


def test_the_key_is_in_no_process_of_titus_pys_but_the_tokens(
    served: Served, site: Instance
) -> None:
    s_client(site.port, served.directory / "authority.pem", "rsa", "-tls1_3")
    sought = [*needles(served.rsa.key), *needles(served.ecdsa.key)]
    # Of each token the one that watches, too.
    of_tokens = [one for one in site.processes() if one.parent == site.keyd().pid]
    assert len(of_tokens) == 2
    staying = {site.supervisor(), site.parent(), site.fork_server(), site.keyd(), *of_tokens}
    # A worker may end meanwhile.
    assert staying < {*found_in_none_but_the_tokens(site.processes(), sought)}


def test_a_token_that_fails_is_in_the_log_and_in_the_status(
    served: Served, site: Instance, capfd: pytest.CaptureFixture[str]
) -> None:
    site.wait_for_event("token_ready", token="shaky")
    tokens_are_ready(site)
    since = len(site.events())
    served.behave("pulled")
    with pytest.raises(SSL.Error):
        TlsClient(site.port, "shaky").handshake()
    told = site.wait_for_event("token_unusable", since=since, token="shaky")
    assert (told["level"], told["reason"]) == ("error", "cannot be used: DeviceRemoved")
    refused = site.wait_for_event("keyd_refused", since=since, status="failed")
    assert refused["level"] == "error"
    assert "DeviceRemoved" in refused["attempted"]
    s_client(site.port, served.directory / "authority.pem", "ecdsa", "-tls1_3")
    since = len(site.events())
    served.behave("")
    site.wait_for_event("token_ready", since=since, token="shaky")
    TlsClient(site.port, "shaky").handshake()
    assert {"token": "shaky", "state": "ready"} in status(site)["tokens"]


def test_the_metrics_have_what_each_token_did(
    served: Served, site: Instance, metrics_port: int
) -> None:
    def counts(text: str, labels: str = "") -> Mapping[str, int]:
        pattern = rf'token_(\w+)\{{{labels}token="shaky"(?:,result="(\w+)")?\}} (\d+)'
        found = re.findall(pattern, text)
        return {f"{name} {result}".strip(): int(count) for name, result, count in found}

    def of_keyd() -> Mapping[str, int]:
        command = [TITUS_PY.with_name("keyd"), "status", "--metrics"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return counts(text, f'socket="{served.keyd.socket}",user="[^"]*",')

    def of_titus() -> Mapping[str, int]:
        return counts(scrape(("127.0.0.1", metrics_port)))

    def ready(now: Callable[[], Mapping[str, int]], count: int) -> None:
        """What each says is up to a second old, and other tests pull it out, too."""
        eventually(lambda: now()["ready"] == count, f"{count} ready", PATIENCE)

    for now in (of_keyd, of_titus):
        ready(now, 1)
    before, at_titus = of_keyd(), of_titus()
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.DONE
    TlsClient(site.port, "shaky").handshake()
    served.behave("pulled")
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.FAILED
    with pytest.raises(SSL.Error):
        TlsClient(site.port, "shaky").handshake()
    for now in (of_titus, of_keyd):
        ready(now, 0)
    served.behave("")
    for now, then in ((of_titus, at_titus), (of_keyd, before)):
        ready(now, 1)
        seen = now()
        for name in ("operations_total done", "operations_total failed", "logins_total"):
            assert seen[name] > then.get(name, 0)


def test_keyds_audit_knows_keys_in_tokens(served: Served, tmp_path: Path) -> None:
    """It does not look for a file that has the key's name; a token that is gone is shown, too."""

    def of_shaky() -> set[tuple[str, str, str]]:
        command = [TITUS_PY.with_name("keyd"), "audit", "--json", f"--directory={tmp_path}"]
        audit = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        found = [
            (one["check"], one["subject"], one["seen"], one["verdict"])
            for one in json.loads(audit.stdout)
        ]
        return {
            (check, seen, verdict)
            for check, subject, seen, verdict in found
            if subject == "token shaky: key" or seen.startswith("shaky: ")
        }

    in_it = ("key", "is in a token, and not looked for", "holds")
    eventually(lambda: {in_it, ("token", "shaky: ready", "holds")} <= of_shaky(), "ready", PATIENCE)
    served.behave("pulled")
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.FAILED
    eventually(
        lambda: any(seen.startswith("shaky: cannot be used: ") for _, seen, _ in of_shaky()),
        "it is down",
        PATIENCE,
    )
    assert in_it in of_shaky()
    ready = served.keyd.log().count("token shaky: key is ready")
    served.behave("")
    served.keyd.wait_for("token shaky: key is ready", ready + 1)


def test_the_audit_knows_tokens_processes(site: Instance) -> None:
    command = [TITUS_PY, "audit", f"--pid={site.pid}", "--json"]
    audit = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    (report,) = json.loads(audit.stdout)
    of_tokens = [one for one in report["findings"] if one["process"]["role"] == "token's process"]
    assert {one["check"] for one in of_tokens} >= {
        "capabilities",
        "no_new_privs",
        "hidden",
        "filter",
    }
    assert not [one for one in report["findings"] if one["verdict"] == "broken"]


def test_a_tokens_process_that_is_killed_comes_back_with_another_keyd(
    served: Served, site: Instance
) -> None:
    """Both of its processes: keyd can start neither again."""
    keyd, since = site.keyd(), len(site.events())
    of_tokens = [one for one in site.processes() if one.parent == keyd.pid]
    assert len(of_tokens) == 2
    of_tokens[0].kill()
    site.wait_for_event("token_unusable", since=since)
    site.wait_for_event("reloaded", since=since)
    assert site.keyd() != keyd
    tokens_are_ready(site)
    for kind in ("rsa", "ecdsa"):
        s_client(site.port, served.directory / "authority.pem", kind, "-tls1_3")
    TlsClient(site.port, "shaky").handshake()


def test_check_asks_the_tokens_and_names_every_mistake_at_once(
    served: Served, tmp_path: Path
) -> None:
    hsm = served.hsm
    (tmp_path / "wrong").write_text("not the PIN\n")
    asked = (
        {"key": hsm.uri("web", "rsa"), "rsa_key_exchange": True},
        {"key": hsm.uri("web", "ecdsa"), "local_port": 1},
        {"key": hsm.uri("web", "nothing"), "local_port": 2},
        {"key": hsm.uri("web", "rsa", pin_file=tmp_path / "wrong"), "local_port": 3},
        {"key": hsm.uri("pulled", "rsa"), "local_port": 4},
    )
    ended = check(served, tmp_path, *asked)
    for _ in range(3):
        # SoftHSM writes to a token at each login, and reads all tokens where it looks for one. Two
        # at once make it fail at times, for another reason: a warning then, since it may pass.
        passing = r"warning: .*token (web .*|pulled .*GeneralError.*): served once it can be"
        if not re.search(passing, ended.stderr):
            break
        ended = check(served, tmp_path, *asked)
    assert ended.returncode == 2
    for said in (
        "rsa_key_exchange: its key is in a token, which keyd has sign and never decrypt",
        "key: token web: ecdsa is not the key of its certificate",
        "key: token web: nothing is not in the token",
        "key: token web cannot be used: its PIN was not taken (PinIncorrect)",
        # A warning: it is served once the token is there.
        "key: token pulled cannot be used: there is no such token: served once it can be",
    ):
        assert said in ended.stderr, ended.stderr
    (hidden,) = [line for line in ended.stderr.splitlines() if "pulled" in line]
    assert "warning" in hidden


def test_check_names_mistakes_in_uris_and_what_goes_with_them(
    served: Served, tmp_path: Path
) -> None:
    hsm = served.hsm
    writable = tmp_path / "module.so"
    writable.touch()
    writable.chmod(0o666)
    ended = check(
        served,
        tmp_path,
        {"key": hsm.uri("web", "rsa"), "passphrase_file": str(hsm.pin_file)},
        {"key": hsm.uri("web", "rsa") + "&pin-value=471147", "local_port": 1},
        {"key": hsm.uri("web", "rsa", Path("/nowhere.so")), "local_port": 2},
        {"key": hsm.uri("web", "rsa", writable), "local_port": 3},
        {"key": hsm.uri("web", "rsa", pin_file=tmp_path / "none"), "local_port": 4},
        with_user=False,
    )
    assert ended.returncode == 2
    assert "471147" not in ended.stderr
    for said in (
        "keyd.token_user: is missing",
        "passphrase_file: does not go with a key in a token",
        "key: the URI has a PIN in it",
        "key: the URI has module-path=/nowhere.so: No such file",
        "which others than root may write to",
        f"key: {tmp_path}/none: ",
    ):
        assert said in ended.stderr


def check(
    served: Served, directory: Path, *vhosts: Table, with_user: bool = True
) -> "subprocess.CompletedProcess[str]":
    """``titus-py check`` of virtual hosts with the RSA certificate and these keys."""
    uids, ports = UIDS.take(), [1, 2, 3, 4]
    of_tokens = {
        "token_paths": [str(served.hsm.directory)],
        "token_environment": [f"SOFTHSM2_CONF={served.hsm.configuration}"],
        **({"token_user": USER} if with_user else {}),
    }
    certificate = str(served.directory / "rsa.crt")
    tables = {
        "worker": {"uids": f"{uids[0]}-{uids[-2]}", "chroot": directory / "empty"},
        "keyd": {"user": str(uids[-1]), **of_tokens},
        "listen": [{"address": f"127.0.0.1:{port}"} for port in (free_port(), *ports)],
        "vhost": [
            {"certificate": certificate, "backend": "127.0.0.1:9", **vhost}
            # The one for all ports comes last.
            for vhost in (*vhosts[1:], vhosts[0])
        ],
    }
    file = directory / "titus.toml"
    file.write_text(toml(tables))
    words = [TITUS_PY, "check", "--config", file]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
