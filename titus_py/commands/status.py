"""``titus-py status``: what the running instances say of themselves.

Run by the administrator, as root. Each instance is asked on its control socket, and its
answer is trusted. Names and certificates are shown as text that cannot steer a terminal.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from keyd.printable import printable
from titus_py.supervisor.control_client import DIRECTORY, NoAnswer, ask, instances_to_ask

__all__ = ["show", "status"]

_ANSWER_SECONDS = 5.0
_WATCH_SECONDS = 1.0
#: A certificate with at least so many days left is shown in green, or in yellow.
_SOON_DAYS, _NOW_DAYS = 14, 3
#: Columns: more than any table has.
_UNBROKEN = 10_000
#: How many names of a certificate, or a virtual host, are shown.
_NAMES = 3
_STATE_STYLES = {"serving": "green", "starting": "yellow", "retired": "dim"}
_UNITS = ("", "k", "M", "G", "T", "P", "E")


def status(
    as_json: bool = False,
    watch: bool = False,
    pid: int | None = None,
    directory: Path = DIRECTORY,
    console: Console | None = None,
) -> int:
    """Show the running instances, or the one of this process id.

    ``as_json``: an array with an object for each. ``watch``: again each second, until
    interrupted. Returns the exit code: 0, 1 if one does not answer, 2 if there is none.
    """
    running = instances_to_ask("status", pid, directory)
    if not running:
        return 2
    console = console or _standard_output()
    if watch:
        try:
            _watch(console, as_json, running, directory)
        except KeyboardInterrupt:
            return 0
    answers = _ask_all(running, directory)
    if as_json:
        print(_json(answers))
    else:
        console.print(_shown(answers))
    return 1 if any(isinstance(answer, NoAnswer) for answer in answers) else 0


def _standard_output() -> Console:
    """Where it is no terminal, each line of a table is one line, for grep(1) and awk(1)."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _UNBROKEN
    return console


def _watch(console: Console, as_json: bool, running: list[int], directory: Path) -> None:
    """Until interrupted."""
    if as_json:
        while True:
            print(_json(_ask_all(running, directory)), flush=True)
            time.sleep(_WATCH_SECONDS)
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            live.update(_shown(_ask_all(running, directory)), refresh=True)
            time.sleep(_WATCH_SECONDS)


def _ask_all(running: Iterable[int], directory: Path) -> list[dict[str, Any] | NoAnswer]:
    answers: list[dict[str, Any] | NoAnswer] = []
    for pid in running:
        try:
            answers.append(ask(pid, {"do": "status"}, _ANSWER_SECONDS, directory))
        except NoAnswer as error:
            answers.append(error)
    return answers


def _json(answers: Iterable[dict[str, Any] | NoAnswer]) -> str:
    return json.dumps(
        [{"error": str(answer)} if isinstance(answer, NoAnswer) else answer for answer in answers]
    )


def _shown(answers: Iterable[dict[str, Any] | NoAnswer]) -> RenderableType:
    return Group(*map(_one_shown, answers))


def _one_shown(answer: dict[str, Any] | NoAnswer) -> RenderableType:
    if isinstance(answer, NoAnswer):
        return Text(f"titus-py: {answer}", style="bold red")
    try:
        return show(answer)
    except (KeyError, TypeError, ValueError):
        # For example while it is being upgraded.
        version, pid = answer.get("version"), answer.get("pid")
        problem = f"titus-py: process {pid} is of another version, {version}: --json shows it"
        return Text(printable(problem), style="yellow")


def show(answer: Mapping[str, Any]) -> RenderableType:
    """One instance's status, for people."""
    return Group(
        _headline(answer),
        _generations(answer["generations"]),
        *_lost(answer),
        *([_processes(processes)] if (processes := answer.get("processes")) else []),
        *_certificates(
            answer["certificates"],
            answer.get("certificate_dirs", ()),
            answer.get("client_authorities", ()),
        ),
        *([_virtual_hosts(answer["vhosts"], answer["counts"])] if answer["vhosts"] else []),
        *([_tunnels(tunnels)] if (tunnels := answer.get("tunnels")) else []),
        *_tokens(answer.get("tokens", ())),
        *_upstreams(answer.get("upstreams", ())),
        *_lending(answer.get("lending", ()), answer["counts"]),
        _counts(answer["counts"], answer["generations"]),
        *_forking(answer),
        Text(),
    )


def _headline(answer: Mapping[str, Any]) -> Text:
    listeners = ", ".join(answer["listeners"]) or "nothing"
    return Text.assemble(
        ("titus-py ", "bold"),
        (printable(answer["version"]), "bold"),
        f", process {answer['pid']}, up {_long(answer['seconds_up'])}, listening on ",
        (printable(listeners), "bold"),
    )


def _generations(generations: Iterable[Mapping[str, Any]]) -> Table:
    table = _table("generation", "state", "for", "parent", "keyd", "connections")
    for generation in generations:
        state = generation["state"]
        table.add_row(
            str(generation["number"]),
            Text(printable(state), style=_STATE_STYLES.get(state, "")),
            _long(generation["seconds"]),
            _or_dash(generation["parent"]),
            _or_dash(generation["keyd"]),
            str(generation["connections"]),
        )
    return table


def _lost(answer: Mapping[str, Any]) -> Iterator[Text]:
    """What cannot be started again, because the program that is installed cannot be started."""
    if reason := answer.get("lost_because"):
        lost = f"lost, and not started again: {answer['lost']}: {reason}"
        yield Text(printable(lost), style="bold red")


def _processes(processes: Iterable[Mapping[str, Any]]) -> Table:
    """Those that no generation has of its own."""
    table = _table("process", "state", "for", "pid")
    for one in processes:
        seconds, ready = one["seconds"], one["state"] == "ready"
        table.add_row(
            _text(one["process"]),
            Text(printable(one["state"]), style="green" if ready else "yellow"),
            "-" if seconds is None else _long(seconds),
            _or_dash(one["pid"]),
        )
    return table


def _certificates(
    certificates: Iterable[Mapping[str, Any]],
    directories: Iterable[Mapping[str, Any]],
    of_clients: Iterable[Mapping[str, Any]],
) -> Iterator[Table]:
    table = _table("certificate", "days left", "expires", "names", "file")
    for certificate in certificates:
        table.add_row(
            _text(certificate["subject"]),
            _days(certificate["days_left"]),
            certificate["not_after"][:10],
            _text(_some(certificate["names"])),
            _text(certificate["file"]),
        )
    for one in directories:
        # Of thousands, the one that expires first.
        table.add_row(
            f"{one['certificates']} certificates",
            _days(one["days_left"]),
            one["not_after"][:10],
            _text(f"in {one['directory']}"),
            _text(one["first"]),
        )
    for one in of_clients:
        days, ends = _days(one["days_left"]), one["not_after"][:10]
        table.add_row(one["setting"], days, ends, "", _text(one["file"]))
    if table.row_count:
        yield table


def _days(left: float) -> Text:
    style = "green" if left >= _SOON_DAYS else "yellow" if left >= _NOW_DAYS else "bold red"
    return Text(f"{left:.0f}", style=style)


def _virtual_hosts(vhosts: Iterable[Mapping[str, Any]], counts: Mapping[str, Any]) -> Table:
    table = _table("virtual host", "at", "backend", "which is")
    for vhost in vhosts:
        names = vhost["names"]
        shown = "any name" if names is None else _some([name or "no name" for name in names])
        if directory := vhost.get("certificate_dir"):
            shown = f"names in {directory}"
        at = _at(vhost["local_address"], vhost["local_port"])
        how = _introduced(vhost["send_proxy"])
        if vhost.get("source_address"):
            how += ", transparent"
        table.add_row(_text(shown), _text(at), *_backend(vhost, how))
        for one in vhost["health"]:
            down = f"down since {one['since']}, {one['reason']}"
            state = _text("up" if one["up"] else down)
            state.stylize("green" if one["up"] else "bold red")
            table.add_row("", "", _text(f"  {one['backend']}"), state)
        for one in vhost["backends"]:
            table.add_row(_text(f"  {one['protocol']}"), "", *_backend(one, how))
        for one in vhost.get("clients", ()):
            has = _text(f"{one['live']} live ").append_text(_refused(one["name"], counts))
            table.add_row(_text(f"  client {one['name']}"), "", _text(one["backend"]), has)
    return table


def _tunnels(tunnels: Iterable[Mapping[str, Any]]) -> Table:
    table = _table("tunnel from", "to", "which is", "verified by")
    for tunnel in tunnels:
        addresses = _text(", ".join(tunnel["addresses"])) if tunnel["addresses"] else None
        by = [f"ca {tunnel['ca']}, {tunnel['server_name']}"] if tunnel["ca"] else []
        pins = tunnel["pins"]
        by += [f"{pins} pin{'s' * (pins > 1)}"] if pins else []
        table.add_row(
            _text(tunnel["listen"]),
            _text(tunnel["connect"]),
            addresses or Text("not resolved", style="red"),
            _text("; ".join(by)),
        )
    return table


def _refused(name: str, counts: Mapping[str, Any]) -> Text:
    """How many connections of a known client were refused by its own limits."""
    by = {
        what: count
        for key, what in (("clients_too_many", "too many"), ("clients_too_fast", "too fast"))
        if (count := counts.get(key, {}).get(name))
    }
    return Text(f"refused: {_listed(by)}" if by else "", style="yellow")


def _tokens(tokens: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Where keys are in tokens."""
    if not tokens:
        return []
    table = _table("token", "state")
    for one in tokens:
        state = _text(one["state"])
        state.stylize("green" if one["state"] == "ready" else "bold red")
        table.add_row(_text(one["token"]), state)
    return [table]


def _upstreams(upstreams: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Where keys are other hosts'."""
    if not upstreams:
        return []
    table = _table("upstream", "state", "asked now", "signed", "failed")
    for one in upstreams:
        state = _text(one["state"])
        state.stylize("green" if one["state"] == "ready" else "bold red")
        counts = (str(one[count]) for count in ("in_flight", "done", "failed"))
        table.add_row(_text(one["upstream"]), state, *counts)
    return [table]


def _lending(hosts: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> list[Table]:
    """Where keys are lent to other hosts."""
    if not hosts:
        return []
    table = _table("keys lent to", "streams", "keys", "at most", "done", "refused")
    for one in hosts:
        prefix = f"{one['client']} "
        refused = {
            of.removeprefix(prefix): count
            for of, count in counts.get("lending_refused", {}).items()
            if of.startswith(prefix)
        }
        table.add_row(
            _text(one["client"]),
            Text(str(one["streams"]), style="green" if one["streams"] else "yellow"),
            str(one["keys"]),
            _text(one["rate"]),
            str(counts.get("lent", {}).get(one["client"], 0)),
            Text(_listed(refused), style="yellow"),
        )
    return [table]


def _backend(of: Mapping[str, Any], how: str) -> tuple[Text, Text]:
    """As it is configured and how it is connected to, and its addresses."""
    addresses = _text(", ".join(of["addresses"])) if of["addresses"] else None
    return _text(of["backend"] + how), addresses or Text("not resolved", style="red")


def _counts(counts: Mapping[str, Any], generations: Sequence[Mapping[str, Any]]) -> Table:
    live = sum(generation["connections"] for generation in generations)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("connections", f"{live} now, {counts['accepted']} accepted")
    table.add_row("handshakes", _tally(counts["handshakes"], "failed", counts["failed"]))
    if counts["certificates_refused"]:
        table.add_row("client certificates refused", _listed(counts["certificates_refused"]))
    if failures := counts.get("tunnel_failures"):
        table.add_row("tunnels' failures", Text(_listed(failures), style="yellow"))
    if counts["protocols"]:
        table.add_row("protocols", _listed(counts["protocols"]))
    table.add_row(
        "octets",
        f"{_short(counts['octets_from_clients'])} from clients, "
        f"{_short(counts['octets_to_clients'])} to clients",
    )
    operations = counts["signed"] + counts["decrypted"]
    table.add_row("key operations", _tally(operations, "refused", counts["refused"]))
    reloads = counts["reloads"]
    table.add_row("reloads", f"{reloads['ok']}, {reloads['failed']} failed")
    for name, label, style in (
        ("unfinished", "signed for, unfinished", "yellow"),
        ("limited", "limits hit", "yellow"),
        ("deaths", "died", "bold red"),
        ("alarms", "alarms", "bold red"),
    ):
        if counts[name]:
            table.add_row(label, Text(_listed(counts[name]), style=style))
    if stay := sum(generation.get("workers_that_stay", 0) for generation in generations):
        table.add_row("workers that do not end", Text(str(stay), style="yellow"))
    if counts["events_lost"]:
        table.add_row("events lost", Text(str(counts["events_lost"]), style="bold red"))
    return table


def _forking(answer: Mapping[str, Any]) -> Iterator[Text]:
    """What makes a fork cheaper, and may be missing."""
    if answer.get("immortal_objects"):
        yield Text("workers share immortal objects")
    else:
        missing = "workers share no immortal objects, which Python 3.12 and 3.13 have"
        yield Text(missing, style="dim")
    for generation in answer["generations"]:
        for key, of in ("huge_pages", "memory"), ("huge_pages_of_code", "code"):
            pages = generation.get(key)
            if generation["state"] != "serving" or pages is None:
                continue
            if pages:
                yield Text(f"workers share {pages} huge page{'s' if pages > 1 else ''} of {of}")
            else:
                missing = f"workers share no huge pages of {of}: the kernel made none"
                yield Text(f"{missing} (Linux 6.1 and later can)", style="dim")


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for heading in headings:
        number = heading in ("days left", "connections")
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table


def _some(names: Sequence[str]) -> str:
    """The first few: --json has them all."""
    more = len(names) - _NAMES
    shown = ", ".join(names[:_NAMES] if more > 1 else names)
    return f"{shown}, … and {more} more" if more > 1 else shown


def _tally(total: int, what: str, by: Mapping[str, int]) -> str:
    failed = sum(by.values())
    return f"{total}, {failed} {what}" + (f" ({_listed(by)})" if failed else "")


def _listed(by: Mapping[str, int]) -> str:
    return printable(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in by.items()))


def _text(text: str) -> Text:
    return Text(printable(text))


def _at(address: str | None, port: int | None) -> str:
    host = f"[{address}]" if address and ":" in address else address or "*"
    return f"{host}:{port or '*'}"


def _introduced(send_proxy: str | None) -> str:
    return f", PROXY {send_proxy}" if send_proxy else ""


def _or_dash(pid: int | None) -> str:
    return "-" if pid is None else str(pid)


def _short(octets: float) -> str:
    for unit in _UNITS:
        if octets < 1000 or unit == _UNITS[-1]:
            break
        octets /= 1000
    return f"{octets:.3g} {unit}B"


def _long(seconds: int) -> str:
    """A duration in words, with seconds if it is shorter than an hour."""
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
