"""The command ``titus-py``: reads its arguments, and calls the module that does the work.

Each command's module is imported only when the command is run. The supervisor, which stays,
has no use for the library that draws the demo's tables.
"""

import gc
import os
import signal
import sys

# Else pydantic would load what any other distribution on this machine has for it, and this is root.
os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
if sys.argv[1:2] == ["serve"]:
    # The imports make no garbage, and there are many.
    gc.disable()
    # Before the imports: they take a third of a second, and by default each of these signals
    # would end the process. SIGHUP waits until the supervisor hears it, and is a reload then.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    # SIGINT ends the process at once: nothing has been started yet that would have to be ended
    # in order, and a traceback would not help.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for _of_no_meaning in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(_of_no_meaning, signal.SIG_IGN)
else:
    # Nor do those of the other commands. Most are over before there is anything to look for.
    gc.set_threshold(50_000)

import argparse
from pathlib import Path
from typing import NoReturn

from keyd.command_line import Parser
from keyd.linux.process import leave, open_standard_streams, run_for_reader
from keyd.linux.systemd import Notifier

__all__ = ["main"]

#: What ``keyd make`` makes.
_KEY_KINDS = ("rsa-2048", "rsa-3072", "rsa-4096", "rsa-8192", "p-256", "p-384", "p-521", "ed25519")
_DEFAULT_CONFIGURATION = Path("/etc/titus-py/titus.toml")
#: Where ``keys new`` puts what it makes.
_KEYS = Path("/etc/titus-py/keys")


def main() -> NoReturn:
    """Run the command that ``sys.argv`` asks for, and end with its exit code (2: usage)."""
    open_standard_streams()
    leave(run_for_reader(_run))


def _run() -> int:
    arguments = _parser().parse_args()
    code: int = arguments.run(arguments)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="titus-py",
        description="Terminate TLS in front of a plaintext backend: a confined process for each "
        "connection, the private key in a process of its own.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="which titus-py this is, with which OpenSSL"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve", help="run the proxy", description="From a configuration file, or from options."
    )
    serve.add_argument("--config", type=Path, metavar="FILE")
    serve.add_argument("--listen", action="append", metavar="ADDR", help="may be repeated")
    serve.add_argument("--backend", metavar="ADDR")
    serve.add_argument("--cert", metavar="FILE", help="PEM, the chain included")
    serve.add_argument("--key", metavar="FILE")
    serve.set_defaults(run=lambda arguments: leave(_serve(arguments)))

    check = commands.add_parser("check", help="name every mistake in a configuration")
    check.add_argument("--config", type=Path, metavar="FILE", default=_DEFAULT_CONFIGURATION)
    check.add_argument(
        "--credentials",
        type=Path,
        metavar="DIRECTORY",
        help="where systemd has put the unit's: /run/credentials/titus-py.service, while it runs",
    )
    check.set_defaults(run=_check)

    status = commands.add_parser("status", help="show what is running, and how it is")
    status.add_argument("--pid", type=int, help="the supervisor of one instance (default: all)")
    status.add_argument("--json", action="store_true", help="for machines")
    status.add_argument("--watch", action="store_true", help="again each second")
    status.set_defaults(run=_status)

    reload = commands.add_parser(
        "reload",
        help="have the configuration and the certificates read anew",
        description="Exit code 0: they are served; 1: they are not, the old ones go on, and why.",
    )
    reload.add_argument("--pid", type=int, help="the supervisor of the instance, if several run")
    also = reload.add_mutually_exclusive_group()
    also.add_argument(
        "--program",
        action="store_true",
        help="have the program itself replaced, too, by the one that is installed now",
    )
    also.add_argument(
        "--cut",
        action="store_true",
        help="end the connections whose client certificate is no longer accepted",
    )
    reload.set_defaults(run=_reload)

    rekey = commands.add_parser(
        "rekey",
        help="make new keys, and requests to have them certified",
        description="Beside each key: NAME.new.key, and NAME.new.csr to be certified. The answer "
        "is put there as NAME.new.crt, and --install puts it in place with its key, and reloads. "
        "Exit code 0: done; 1: something failed; 2: there are mistakes, and nothing was done.",
    )
    rekey.add_argument(
        "asked",
        nargs="+",
        metavar="NAME | DIRECTORY",
        help="a virtual host's name, or a directory (written with a slash) of certificates",
    )
    rekey.add_argument("--config", type=Path, metavar="FILE")
    rekey.add_argument("--kind", choices=_KEY_KINDS, help="of the keys (default: as they are)")
    rekey.add_argument(
        "--install", action="store_true", help="put the certificates that have come in place"
    )
    rekey.add_argument("--dry-run", action="store_true", help="only say what would be done")
    rekey.add_argument("--pid", type=int, help="the supervisor of the instance, if several run")
    rekey.set_defaults(run=_rekey)

    _add_keys(commands.add_parser("keys", help="keys that other hosts know by their pins"))

    demo = commands.add_parser("demo", help="show a real request, and what protects the key")
    demo.set_defaults(run=_demo)

    audit = commands.add_parser(
        "audit",
        help="hold a running instance against its promises",
        description="From outside, as root. Exit code 0: all hold; 1: one does not; 2: there is "
        "no instance, or no way to look. keyd is asked for what it must refuse, which the "
        "instance's log has as audit_refused.",
    )
    audit.add_argument("--pid", type=int, help="the supervisor of one instance (default: all)")
    audit.add_argument("--json", action="store_true", help="for machines")
    audit.add_argument("--quiet", action="store_true", help="only what does not hold")
    audit.add_argument("--html", type=Path, metavar="FILE", help="also write a report to hand on")
    audit.set_defaults(run=_audit)
    return parser


def _add_keys(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    new = commands.add_parser(
        "new",
        help="make a key, and a certificate that it signs itself",
        description="Writes NAME.key and NAME.crt, and prints the key's pin, and what to do with "
        "it. Exit code 0: done; 1: something failed; 2: a mistake, and nothing was done.",
    )
    new.add_argument("name", metavar="NAME", help="a host's, or a name as good as one: web-1")
    new.add_argument("--directory", type=Path, default=_KEYS, help=f"where (default: {_KEYS})")
    new.add_argument(
        "--type", choices=_KEY_KINDS, default="p-256", help="of the key (default: p-256)"
    )
    new.add_argument("--force", action="store_true", help="replace files that are there")
    new.add_argument("--config", type=Path, metavar="FILE")
    new.set_defaults(run=_keys_new)

    pin = commands.add_parser(
        "pin",
        help="print the pin of a key",
        description="Of the first certificate or public key of a file (PEM or DER), or of the "
        "certificate that a TLS server shows, whoever that is. Standard output has the pin alone. "
        "Exit code 0: done; 1: something failed; 2: a mistake.",
    )
    pin.add_argument("asked", metavar="FILE | HOST:PORT")
    pin.add_argument("--server-name", metavar="NAME", help="to ask the server for (default: HOST)")
    pin.add_argument(
        "--starttls",
        choices=["postgresql"],
        help="the protocol by which the server is first asked for TLS, in the clear",
    )
    pin.add_argument(
        "--timeout", type=_seconds, default=10.0, metavar="SECONDS", help="default: 10"
    )
    pin.set_defaults(run=_keys_pin)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 3600:
        raise ValueError(text)
    return seconds


class _Version(argparse.Action):
    """Prints the versions of titus-py and of the workers' OpenSSL, which is loaded for that."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        from OpenSSL import SSL

        print(f"titus-py {version('titus-py')}")
        print(SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode())
        parser.exit()


def _serve(arguments: argparse.Namespace) -> int:
    options = (arguments.listen, arguments.backend, arguments.cert, arguments.key)
    if any(options) and (arguments.config is not None or not all(options)):
        print(
            "titus-py serve: either --config, or all of --listen, --backend, --cert and --key",
            file=sys.stderr,
        )
        return 2

    if os.geteuid() != 0:
        print(
            "titus-py: serve must be started as root: it gives each connection's process a uid "
            "and namespaces of its own, and everything else up",
            file=sys.stderr,
        )
        return 2

    # The supervisor loads no OpenSSL. hashlib would load one, but also works without it.
    sys.modules["_hashlib"] = None  # type: ignore[assignment]
    from titus_py.configuration.helper import HANDSHAKE_CHECK, KEYD_CHECK, Helper

    # The helpers start now, because loading takes them as long as it takes this process.
    helpers = Helper(KEYD_CHECK), Helper(HANDSHAKE_CHECK)
    from titus_py.commands.check import lacks, report
    from titus_py.configuration import Loaded, from_options, load
    from titus_py.configuration.checking import check
    from titus_py.supervisor import succession
    from titus_py.supervisor.life import serve, take_over

    # What is imported stays: it is never looked through.
    gc.freeze()
    gc.enable()

    def read() -> Loaded:
        if any(options):
            return from_options(*options)
        return load(arguments.config or _DEFAULT_CONFIGURATION)

    try:
        legacy = succession.inherited()
        tried_out = succession.rehearse()
    except succession.CannotTakeOver as error:
        for helper in helpers:
            helper.dismiss()
        print(f"the new program cannot take over: {error}", file=sys.stderr)
        return 2
    except succession.CannotStart as error:
        for helper in helpers:
            helper.dismiss()
        print(error, file=sys.stderr)
        return 1
    if legacy is not None or (tried_out is not None and tried_out.urgent):
        for helper in helpers:
            helper.dismiss()
        if legacy is None:
            return 0
        return take_over(legacy, lambda before: check(read(), running=True, before=before))
    loaded = read()
    if lacks(loaded):
        for helper in helpers:
            helper.dismiss()
        return 2
    checked = check(loaded, *helpers, running=tried_out is not None)
    if checked.mistakes:
        report(checked)
        Notifier()(status=f"not started: {checked.mistakes[0]}")
        # If nothing is known to be wrong, it may be right the next time: a service manager starts
        # it again. Who has it tried out is told all that it says.
        again = tried_out is None and all(mistake.unknown for mistake in checked.mistakes)
        return 1 if again else 2
    if tried_out is not None:
        return 0
    return serve(checked, lambda before: check(read(), running=True, before=before))


def _check(arguments: argparse.Namespace) -> int:
    from titus_py.commands.check import check_main

    return check_main(arguments.config, arguments.credentials)


def _status(arguments: argparse.Namespace) -> int:
    from titus_py.commands.status import status

    return status(arguments.json, arguments.watch, arguments.pid)


def _reload(arguments: argparse.Namespace) -> int:
    from titus_py.commands.reload import reload

    return reload(arguments.pid, arguments.program, arguments.cut)


def _rekey(arguments: argparse.Namespace) -> int:
    from titus_py.commands.rekey import rekey

    return rekey(
        arguments.asked,
        arguments.config,
        arguments.kind,
        arguments.install,
        arguments.dry_run,
        arguments.pid,
    )


def _keys_new(arguments: argparse.Namespace) -> int:
    from titus_py.commands.keys_new import new

    of = arguments
    return new(of.name, of.directory, of.type, of.force, of.config)


def _keys_pin(arguments: argparse.Namespace) -> int:
    from titus_py.commands.keys_pin import pin

    of = arguments
    return pin(of.asked, of.server_name, of.timeout, of.starttls)


def _demo(arguments: argparse.Namespace) -> int:
    from titus_py.commands.demo import demo

    del arguments
    return demo()


def _audit(arguments: argparse.Namespace) -> int:
    from titus_py.commands.audit import audit_main

    return audit_main(arguments.pid, arguments.json, arguments.html, arguments.quiet)


if __name__ == "__main__":
    main()
