"""The pictures, one for each measurement, as SVG and PNG: titus-py in colour, its peers in grey."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.load import quantile
from bench.measurements.signatures import IN_PROCESS, THROUGH_KEYD
from bench.peers import TITUS_PY
from bench.samples import Results

__all__ = ["draw"]

_OWN = "#c1440e"
#: Told apart by their grey, and in bars by their order, which is the legend's.
_GREYS = ("#2f3e46", "#61737c", "#95a5ac", "#c5ced2", "#e0e4e6")
_LOADS = {"light": "20 a second", "half": "half of what it can do"}


def draw(results: Results, directory: Path) -> None:
    # The same figures give the same file, text stays text.
    plt.rcParams |= {
        "svg.hashsalt": "titus-py",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "legend.frameon": False,
    }
    for name, picture in _PICTURES.items():
        if any(sample.measurement == name for sample in results.samples if sample.values):
            figure = picture(results)
            figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
            figure.savefig(directory / f"{name}.png", dpi=130)
            plt.close(figure)


def _colours(peers: Sequence[str]) -> dict[str, str]:
    others = [peer for peer in peers if peer != TITUS_PY]
    return dict(zip(others, _GREYS, strict=False)) | {TITUS_PY: _OWN}


def _proxies(results: Results, measurement: str) -> list[str]:
    return list(
        dict.fromkeys(one.peer for one in results.samples if one.measurement == measurement)
    )


def _panels(count: int, title: str, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """At most two side by side."""
    columns = min(count, 2)
    rows = -(-count // columns)
    size = max(6.0, 4.2 * columns), height * rows
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title, fontweight="bold")
    return figure, list(grid.flat[:count])


def _bars(
    axes: Axes,
    results: Results,
    measurement: str,
    peers: Sequence[str],
    groups: Sequence[tuple[str, str, dict[str, Any]]],
    scale: float = 1.0,
) -> None:
    """A group of bars, one a peer, for each label, value and setting; with the rounds' range."""
    colours = _colours(peers)
    width = 0.8 / len(peers)
    for place, peer in enumerate(peers):
        for group, (_, value, setting) in enumerate(groups):
            summary = results.summary(measurement, peer, value, **setting)
            if summary is None:
                continue
            at = group + (place - (len(peers) - 1) / 2) * width
            median = summary.median * scale
            span = [[median - summary.low * scale], [summary.high * scale - median]]
            axes.bar(at, median, width * 0.92, color=colours[peer], label=peer, yerr=span)
            if peer == TITUS_PY:
                axes.annotate(
                    f"{median:,.0f}" if median >= 10 else f"{median:.2f}",
                    (at, summary.high * scale),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    color=_OWN,
                )
    axes.set_xticks(range(len(groups)), [label for label, _, _ in groups])


def _legend(figure: Figure, axes: Axes) -> None:
    """One entry a peer, below everything."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(reversed(list(zip(labels, handles, strict=True))))
    peers = list(dict.fromkeys(labels))
    figure.legend(
        [entries[peer] for peer in peers], peers, loc="outside lower center", ncols=len(peers)
    )


def _plain_numbers(axis: Axis) -> None:
    """1000, not ten to the power of three."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _handshakes(results: Results) -> Figure:
    keys = [one["key"] for one in results.settings("handshakes", "key")]
    counts = [one["clients"] for one in results.settings("handshakes", "clients")]
    figure, panels = _panels(len(keys), "Full handshakes with a request, a second")
    for axes, key in zip(panels, keys, strict=True):
        groups = [(str(count), "rate", {"key": key, "clients": count}) for count in counts]
        _bars(axes, results, "handshakes", _proxies(results, "handshakes"), groups)
        axes.set(title=key, xlabel="clients at a time")
    _legend(figure, panels[0])
    return figure


def _one_core(results: Results) -> Figure:
    figure, panels = _panels(1, "Full handshakes a second on one processor of its own")
    groups = [(one["key"], "rate", one) for one in results.settings("one-core", "key")]
    _bars(panels[0], results, "one-core", _proxies(results, "one-core"), groups)
    _legend(figure, panels[0])
    return figure


def _latency(results: Results) -> Figure:
    settings = results.settings("latency", "key", "load")
    peers = _proxies(results, "latency")
    colours = _colours(peers)
    figure, panels = _panels(len(settings), "Time to the first octet, ms: median, and 99 %", 2.4)
    for axes, setting in zip(panels, settings, strict=True):
        for place, peer in enumerate(peers):
            times = [time / 1000 for time in results.times("latency", peer, **setting)]
            summary = results.summary("latency", peer, "median_ms", **setting)
            if times and summary is not None:
                # As in the table: the rounds' median, and 99 % of all.
                ends = summary.median, quantile(times, 0.99)
                axes.plot(ends, (place, place), color=colours[peer], linewidth=3)
                axes.plot(ends[0], place, "o", color=colours[peer], markersize=8)
                axes.annotate(f"{ends[0]:.1f}", (ends[0], place), (0, 7), ha="center",
                              textcoords="offset points")  # fmt: skip
        axes.set_yticks(range(len(peers)), peers)
        axes.set_ylim(len(peers) - 0.5, -0.7)
        axes.set_xlim(0)
        axes.set_title(f"{setting['key']}, {_LOADS[setting['load']]}")
    return figure


def _transfers(results: Results) -> Figure:
    settings = results.settings("transfers", "direction", "streams")
    figure, panels = _panels(2, "Long transfers")
    for axes, value, title in zip(
        panels, ("mb_per_second", "cpu_per_gib"),
        ("MB a second", "the processor's seconds a GiB"), strict=True,
    ):  # fmt: skip
        groups = [(f"{one['streams']} {one['direction']}", value, one) for one in settings]
        _bars(axes, results, "transfers", _proxies(results, "transfers"), groups)
        axes.set_title(title)
    _legend(figure, panels[0])
    return figure


def _idle(results: Results) -> Figure:
    counts = [one for one in results.settings("idle", "connections") if one]
    figure, panels = _panels(
        2, "What an idle connection adds, KiB (each line ten times the one below)"
    )
    for axes, value, title in zip(
        panels, ("pss_each", "kernel_each"),
        ("memory of the processes (PSS)", "the kernel's own memory"), strict=True,
    ):  # fmt: skip
        groups = [(f"of {one['connections']:,}", value, one) for one in counts]
        _bars(axes, results, "idle", _proxies(results, "idle"), groups, 1 / 1024)
        axes.set_yscale("log")
        axes.set_ylim(1)
        _plain_numbers(axes.yaxis)
        axes.set_title(title)
    _legend(figure, panels[0])
    return figure


def _burst(results: Results) -> Figure:
    settings = results.settings("burst", "clients")
    peers = _proxies(results, "burst")
    colours = _colours(peers)
    figure, panels = _panels(len(settings), "At the same moment: who has the first octet by then")
    for axes, setting in zip(panels, settings, strict=True):
        for peer in peers:
            times = [time / 1000 for time in results.times("burst", peer, **setting)]
            # Those who got no answer are missing at the top.
            failed = sum(one.values["failed"] for one in results.select("burst", peer, **setting))
            shares = [100 * (number + 1) / (len(times) + failed) for number in range(len(times))]
            axes.plot(times, shares, color=colours[peer], label=peer, linewidth=2)
        axes.set(
            title=f"{setting['clients']:,} clients", xlabel="ms since they came",
            ylabel="% of them", xscale="log", ylim=(0, 101),
        )  # fmt: skip
        _plain_numbers(axes.xaxis)
    _legend(figure, panels[0])
    return figure


def _signatures(results: Results) -> Figure:
    keys = [one["key"] for one in results.settings("signatures", "key")]
    figure, panels = _panels(len(keys), "A signature, µs: what keyd adds")
    for axes, key in zip(panels, keys, strict=True):
        for place, (way, colour) in enumerate(((IN_PROCESS, _GREYS[2]), (THROUGH_KEYD, _OWN))):
            summary = results.summary("signatures", way, "median_us", key=key, signers=1)
            if summary is not None:
                axes.bar(place, summary.median, 0.6, color=colour)
                axes.annotate(f"{summary.median:.0f}", (place, summary.median), (0, 2), ha="center",
                              textcoords="offset points")  # fmt: skip
        axes.set_xticks(range(2), (IN_PROCESS, THROUGH_KEYD))
        axes.set_title(key)
    return figure


_PICTURES: dict[str, Callable[[Results], Figure]] = {
    "handshakes": _handshakes,
    "one-core": _one_core,
    "latency": _latency,
    "transfers": _transfers,
    "idle": _idle,
    "burst": _burst,
    "signatures": _signatures,
}
