"""What was measured: one sample for each proxy, setting and round; nothing is averaged here."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Results", "Sample", "Summary"]


@dataclass
class Sample:
    """One run. ``times`` are in microseconds, where what counts is their distribution."""

    measurement: str
    peer: str
    setting: dict[str, Any]
    values: dict[str, float] = field(default_factory=dict)
    times: list[int] = field(default_factory=list)
    failed: str = ""


@dataclass
class Summary:
    """A value over the rounds."""

    median: float
    low: float
    high: float


@dataclass
class Results:
    """A whole run: where, with what, and every sample. ``missing``: who was not there, and why."""

    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def select(self, measurement: str, peer: str, **setting: object) -> list[Sample]:
        """Those rounds that did not fail."""
        return [
            sample
            for sample in self.samples
            if sample.measurement == measurement
            and sample.peer == peer
            and not sample.failed
            and setting.items() <= sample.setting.items()
        ]

    def summary(self, measurement: str, peer: str, value: str, **setting: object) -> Summary | None:
        """Nothing if there is no such sample."""
        samples = self.select(measurement, peer, **setting)
        values = [sample.values[value] for sample in samples if value in sample.values]
        if not values:
            return None
        return Summary(statistics.median(values), min(values), max(values))

    def times(self, measurement: str, peer: str, **setting: object) -> list[int]:
        """Of all rounds together, in order of size."""
        samples = self.select(measurement, peer, **setting)
        return sorted(time for sample in samples for time in sample.times)

    def peers(self) -> list[str]:
        """Those that were measured, in the order in which they were."""
        return list(dict.fromkeys(sample.peer for sample in self.samples))

    def settings(self, measurement: str, *names: str) -> list[dict[str, Any]]:
        """The different settings of a measurement, in order."""
        found: list[dict[str, Any]] = []
        for sample in self.samples:
            setting = {name: sample.setting[name] for name in names if name in sample.setting}
            if sample.measurement == measurement and setting not in found:
                found.append(setting)
        return found

    def failures(self) -> Iterable[str]:
        for sample in self.samples:
            if sample.failed:
                setting = ", ".join(f"{name} {value}" for name, value in sample.setting.items())
                yield f"{sample.measurement} ({setting}), {sample.peer}: {sample.failed}"

    def save(self, path: Path) -> None:
        content = asdict(self)
        samples = content.pop("samples")
        # One line a sample: it can be looked at, and compared.
        lines = ",\n".join(json.dumps(sample, separators=(",", ":")) for sample in samples)
        head = json.dumps(content, indent=1)[:-2]
        path.write_text(f'{head},\n "samples": [\n{lines}\n]\n}}\n')

    @classmethod
    def load(cls, path: Path) -> "Results":
        content = json.loads(path.read_text())
        samples = [Sample(**sample) for sample in content.pop("samples")]
        return cls(**content, samples=samples)
