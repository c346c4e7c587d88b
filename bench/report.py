"""results.md: every measurement as a table; medians of the rounds, and their range.

A figure stands for nothing without its machine, versions and failures: they come along.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.exchanges import LONG_OCTETS, SIZES
from bench.load import quantile
from bench.measurements.latency import LIGHT_RATE
from bench.measurements.signatures import IN_KEYD, IN_PROCESS, THROUGH_KEYD
from bench.measurements.tunnels import INET_TLS, PLAIN
from bench.peers import FLOOR, NGINX, NGINX_WITH_KEYD, TITUS_PY
from bench.samples import Results

__all__ = ["write_report"]

#: From here on, the load may be what was measured.
_LOAD_IS_FULL = 0.9
_MIB = 1 << 20
#: What must not go unsaid, wherever it happened.
_MISHAPS = {
    "failed": "exchanges without a whole answer",
    "newcomer_failed": "newcomers without a whole answer",
    "newcomers_failed": "newcomers without a whole answer",
    "unclean": "answers that did not end with TLS's own end",
    "tickets": "tickets, which none was to send",
}


class _Row(NamedTuple):
    """One line of a table: what it shows, of which measurement and setting."""

    label: str
    value: str
    setting: Mapping[str, Any]
    scale: float = 1.0
    digits: int = 0
    #: The share that does not exceed it, of the times of all rounds; 0: the rounds' median.
    share: float = 0.0


class _Table(NamedTuple):
    title: str
    note: str
    measurement: str
    rows: Callable[[Results], Iterable[_Row]]
    picture: str
    #: Who is held against whom.
    own: str = TITUS_PY
    against: tuple[str, ...] = (FLOOR, NGINX, "stunnel")


def write_report(results: Results, directory: Path) -> Path:
    """Write it beside the pictures, which it shows; returns where."""
    path = directory / "results.md"
    path.write_text("\n".join(_report(results, directory)) + "\n")
    return path


def _report(results: Results, directory: Path) -> Iterable[str]:
    machine = results.machine
    yield "# titus-py and its peers"
    yield ""
    yield (
        f"{machine['date']}: {machine['processor']}, {machine['processors']} processors, "
        f"{machine['memory']}, {machine['kernel']}, {machine['system']}. The load and the "
        "backend ran on the same machine, of whose processors others meanwhile had "
        f"{machine['others']}. Medians, with the lowest and the highest round."
    )
    yield ""
    yield from (f"- {name}: {version}" for name, version in results.versions.items())
    yield from (f"- **{name}: not measured**: {why}" for name, why in results.missing.items())
    for table in _TABLES:
        yield from _render(table, results)
        yield from _picture(table.picture, directory)
    yield from _signatures(results)
    yield from _picture("signatures", directory)
    yield from _failures(results)


def _render(table: _Table, results: Results) -> Iterable[str]:
    rows = list(table.rows(results))
    measured = {
        sample.peer for sample in results.samples if sample.measurement == table.measurement
    }
    peers = [peer for peer in results.peers() if peer in measured]
    if not rows or not peers:
        return
    against = [peer for peer in table.against if peer in peers and table.own in peers]
    yield ""
    yield f"## {table.title}"
    yield ""
    yield table.note
    yield ""
    yield _line(["", *peers, *(f"{table.own} / {peer}" for peer in against)])
    yield "|---|" + "---:|" * (len(peers) + len(against))
    for row in rows:
        medians = {peer: _median(results, table.measurement, peer, row) for peer in peers}
        cells = [_cell(results, table.measurement, peer, row) for peer in peers]
        own = medians.get(table.own)
        ratios = [_ratio(own, medians[peer]) for peer in against]
        yield _line([row.label, *cells, *ratios])


def _picture(name: str, directory: Path) -> Iterable[str]:
    """Where it was drawn."""
    if name and (directory / f"{name}.svg").exists():
        yield ""
        yield f"![{name}]({name}.svg)"


def _median(results: Results, measurement: str, peer: str, row: _Row) -> float | None:
    if row.share:
        times = results.times(measurement, peer, **row.setting)
        return quantile(times, row.share) * row.scale if times else None
    summary = results.summary(measurement, peer, row.value, **row.setting)
    return None if summary is None else summary.median * row.scale


def _cell(results: Results, measurement: str, peer: str, row: _Row) -> str:
    median = _median(results, measurement, peer, row)
    if median is None:
        return "—"
    text = f"{median:,.{row.digits}f}"
    summary = results.summary(measurement, peer, row.value, **row.setting)
    if not row.share and summary and summary.low != summary.high:
        low, high = summary.low * row.scale, summary.high * row.scale
        text += f" ({low:,.{row.digits}f} to {high:,.{row.digits}f})"
    share = results.summary(measurement, peer, "load_cpu_share", **row.setting)
    if row.value == "rate" and share and share.median > _LOAD_IS_FULL:
        text += " †"
    return text


def _ratio(own: float | None, other: float | None) -> str:
    return f"{own / other:.2f}" if own is not None and other else "—"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _handshake_rows(results: Results) -> Iterable[_Row]:
    for setting in results.settings("handshakes", "key", "clients"):
        clients = setting["clients"]
        plural = "client" if clients == 1 else "clients"
        yield _Row(f"{setting['key']}, {clients} {plural}", "rate", setting)


def _handshake_cpu_rows(results: Results) -> Iterable[_Row]:
    for row in _handshake_rows(results):
        yield row._replace(value="cpu_ms", digits=2)


def _with_keyd_rows(results: Results) -> Iterable[_Row]:
    for setting in results.settings("keyd", "key", "clients"):
        plural = "client" if setting["clients"] == 1 else "clients"
        label = f"{setting['key']}, {setting['clients']} {plural}"
        yield _Row(f"{label}, a second", "rate", setting)
        yield _Row(f"{label}, the processor's time, ms", "cpu_ms", setting, digits=2)


def _one_core_rows(results: Results) -> Iterable[_Row]:
    for setting in results.settings("one-core", "key"):
        yield _Row(setting["key"], "rate", setting)


def _latency_rows(results: Results) -> Iterable[_Row]:
    for setting in results.settings("latency", "key", "load"):
        load = f"{LIGHT_RATE:.0f} a second" if setting["load"] == "light" else "half of the most"
        what = f"{setting['key']}, {load}"
        yield _Row(f"{what}: median", "median_ms", setting, digits=1)
        yield _Row(f"{what}: p99", "p99_ms", setting, 1e-3, 1, share=0.99)


def _transfer_rows(results: Results) -> Iterable[_Row]:
    settings = results.settings("transfers", "direction", "streams")
    for value, digits, unit in (("mb_per_second", 0, "MB/s"), ("cpu_per_gib", 2, "CPU s/GiB")):
        for setting in settings:
            label = f"{setting['streams']} {setting['direction']}, {unit}"
            yield _Row(label, value, setting, digits=digits)


def _idle_rows(results: Results) -> Iterable[_Row]:
    yield _Row("with none, MiB (PSS)", "pss", {}, 1 / _MIB, 1)
    counts = [setting for setting in results.settings("idle", "connections") if setting]
    for setting in counts:
        yield _Row(f"each of {setting['connections']:,}, KiB (PSS)", "pss_each", setting, 1 / 1024)
        yield _Row(
            f"each of {setting['connections']:,}, KiB (kernel)", "kernel_each", setting, 1 / 1024
        )
    for setting in counts[-1:]:
        count = f"{setting['connections']:,}"
        yield _Row(f"{count}, % of a processor", "cpu_share", setting, 100, 2)
        yield _Row(f"a newcomer beside {count}, ms", "newcomer_median_ms", setting, 1, 1)


def _burst_rows(results: Results) -> Iterable[_Row]:
    for setting in results.settings("burst", "clients"):
        count = f"{setting['clients']:,} at once"
        yield _Row(f"{count}: median, ms", "median_ms", setting, 1e-3, share=0.5)
        yield _Row(f"{count}: p99, ms", "p99_ms", setting, 1e-3, share=0.99)
        yield _Row(f"{count}: the last, ms", "last_ms", setting)
        yield _Row(f"{count}: failed", "failed", setting)
    for setting in results.settings("burst", "clients")[-1:]:
        count = f"{setting['clients']:,}"
        yield _Row(f"a newcomer beside {count}: median, ms", "newcomer_median_ms", setting)
        yield _Row(f"a newcomer beside {count}: longest, ms", "newcomer_max_ms", setting)
        yield _Row(f"newcomers beside {count}: failed", "newcomers_failed", setting)


def _certificate_rows(results: Results) -> Iterable[_Row]:
    for setting in results.settings("certificates", "certificates"):
        yield _Row("start, s", "start_s", setting, digits=1)
        yield _Row("a handshake, ms", "handshake_ms", setting, digits=1)
        yield _Row("memory, MiB", "pss", setting, 1 / _MIB)
        yield _Row("one renewed, s", "reload_s", setting, digits=1)
        yield _Row("the slowest handshake meanwhile, ms", "slowest_ms", setting)


def _tunnel_rows(results: Results) -> Iterable[_Row]:
    for setting in results.settings("tunnels", "program"):
        yield _Row(setting["program"], "rate", setting)


def _tunnel_time_rows(results: Results) -> Iterable[_Row]:
    for setting in results.settings("tunnels", "program"):
        program = setting["program"]
        yield _Row(f"{program}, a new connection for each", "connection_ms", setting, digits=2)
        for octets in SIZES:
            label = f"{program}, {octets:,} octets"
            yield _Row(label, f"echo_{octets}_ms", setting, digits=3)
        label = f"{program}, {LONG_OCTETS // _MIB} MiB, once"
        yield _Row(label, "long_s", setting, 1000)


_TABLES = (
    _Table(
        "Handshakes a second",
        "Full TLS 1.3 handshakes with one small request each; more is better. †: the load had "
        "nearly all of its one processor, so that the proxy may be able to do more.",
        "handshakes",
        _handshake_rows,
        "",
    ),
    _Table(
        "The processor's time for one of them, ms",
        "Of all processes of the proxy, user and system; less is better.",
        "handshakes",
        _handshake_cpu_rows,
        "handshakes",
    ),
    _Table(
        "Handshakes a second on one processor",
        "32 clients; the proxy has one processor, load and backend have the others.",
        "one-core",
        _one_core_rows,
        "one-core",
    ),
    _Table(
        "Time to the first octet of the answer, ms",
        "From connecting, at a fixed rate of new clients; less is better.",
        "latency",
        _latency_rows,
        "latency",
    ),
    _Table(
        "Long transfers",
        "All of them together. The processor's time is that of the proxy alone.",
        "transfers",
        _transfer_rows,
        "transfers",
    ),
    _Table(
        "A directory of certificates",
        "10,000 of them (1,000 in the quick bench), P-256, one after the other by their names. "
        "Memory is that of all processes of the proxy (PSS). One certificate is then replaced, and "
        "a client asks for it until it is shown.",
        "certificates",
        _certificate_rows,
        "",
    ),
    _Table(
        "Idle connections",
        "What each adds, proportionally shared (PSS), to all processes of the proxy; and to the "
        "kernel's own memory on the whole machine, both ends' sockets included.",
        "idle",
        _idle_rows,
        "idle",
    ),
    _Table(
        "Bursts",
        "Clients at the same moment: time to the first octet of the answer. Beside the larger "
        f"burst, {LIGHT_RATE:.0f} newcomers a second.",
        "burst",
        _burst_rows,
        "burst",
    ),
    _Table(
        "nginx, its key in keyd",
        "Full TLS 1.3 handshakes a second with one small request each, and the processor's time "
        "for one, keyd's included. †: the load had nearly all of its one processor.",
        "keyd",
        _with_keyd_rows,
        "",
        NGINX_WITH_KEYD,
        (NGINX,),
    ),
    _Table(
        "Exchanges a second through a tunnel",
        "One after the other, over one connection: Erlang's rpc:call, or 8 octets that a plain "
        "program sends back; more is better. Both ends are on this machine. Plain: no tunnel.",
        "tunnels",
        _tunnel_rows,
        "",
        against=(PLAIN, "stunnel", INET_TLS),
    ),
    _Table(
        "Time of one exchange through a tunnel, ms",
        "There and back, the medians; less is better.",
        "tunnels",
        _tunnel_time_rows,
        "",
        against=(PLAIN, "stunnel", INET_TLS),
    ),
)


def _signatures(results: Results) -> Iterable[str]:
    settings = [one for one in results.settings("signatures", "key", "signers") if "signers" in one]
    if not settings:
        return
    ways = (IN_PROCESS, THROUGH_KEYD, IN_KEYD)
    yield ""
    yield "## Signatures"
    yield ""
    yield (
        "What keyd adds to a signature: the same program, with the system's OpenSSL, has the key "
        "itself, or asks keyd for each. And the library that keyd signs with, by itself."
    )
    yield ""
    yield _line(["", *ways, f"{THROUGH_KEYD} / {IN_PROCESS}"])
    yield "|---|" + "---:|" * (len(ways) + 1)
    for setting in settings:
        for value, unit in (("median_us", "µs"), ("rate", "a second")):
            row = _Row("", value, setting)
            medians = [_median(results, "signatures", way, row) for way in ways]
            cells = [_cell(results, "signatures", way, row) for way in ways]
            signers = f"{setting['signers']} signer{'s' * (setting['signers'] > 1)}"
            label = f"{setting['key']}, {signers}, {unit}"
            yield _line([label, *cells, _ratio(medians[1], medians[0])])


def _failures(results: Results) -> Iterable[str]:
    lines = list(results.failures())
    counts: dict[str, int] = {}
    for sample in results.samples:
        for name, what in _MISHAPS.items():
            if count := sample.values.get(name):
                where = f"{sample.measurement}, {sample.peer}: {what}"
                counts[where] = counts.get(where, 0) + int(count)
    lines += [f"{where}: {count:,}" for where, count in counts.items()]
    yield ""
    yield "## What failed"
    yield ""
    yield from (f"- {line}" for line in lines) if lines else ["Nothing: every answer was whole."]
