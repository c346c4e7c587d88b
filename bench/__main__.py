"""The command: measure, or show again what was measured. Run as root, from the repository:

    python -m bench [--quick] [--only MEASUREMENT]... [--results DIRECTORY]
    python -m bench --render [--results DIRECTORY]

``make bench`` and ``make bench-quick`` set up what it needs first. Whatever is started ends
with it, and all files but the results are below one temporary directory.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from bench.load import Load
from bench.machine import describe_machine, describe_versions, watch_others
from bench.measurements import MEASUREMENTS
from bench.peers import PEERS
from bench.processes import Failed
from bench.report import write_report
from bench.samples import Results
from bench.stage import FULL, QUICK, Stage
from keyd.linux.credentials import allow_many_descriptors

_HERE = Path(__file__).parent
_RESULTS = _HERE / "results"
_BUILD = _HERE.parent / "build"
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    arguments = _parser().parse_args()
    directory = arguments.results or (_BUILD / "bench-quick" if arguments.quick else _RESULTS)
    raw = directory / "results.json"
    if arguments.render:
        _write(Results.load(raw), directory)
        return 0
    if os.geteuid() != 0:
        print("bench: titus-py has to be started as root", file=sys.stderr)
        return 1
    for number in _STOPPING:
        signal.signal(number, _interrupt)
    allow_many_descriptors()
    try:
        results = _measure(arguments)
    except Failed as failed:
        print(f"bench: {failed}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench: interrupted; nothing is left behind", file=sys.stderr)
        return 130
    directory.mkdir(parents=True, exist_ok=True)
    results.save(raw)
    _write(results, directory)
    return 0


def _interrupt(*_: object) -> None:
    """Once: what is left to be done then is to stop all that runs."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round of each")
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, metavar="MEASUREMENT")
    parser.add_argument("--peer", action="append", choices=[peer.name for peer in PEERS])
    parser.add_argument("--render", action="store_true", help="only write the tables and pictures")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIRECTORY",
        help="where to (default: bench/results, of the quick one build/bench-quick)",
    )
    return parser


def _measure(arguments: argparse.Namespace) -> Results:
    """Raises Failed where nothing at all can be measured."""
    peers = [peer for peer in PEERS if not arguments.peer or peer.name in arguments.peer]
    there = [peer for peer in peers if peer.is_installed]
    scope = QUICK if arguments.quick else FULL
    results = Results(describe_machine(), describe_versions(there))
    results.missing = {
        peer.name: f"{peer.program} is not installed" for peer in peers if peer not in there
    }
    others = watch_others()
    with tempfile.TemporaryDirectory(prefix="titus-py-bench-") as name:
        directory = Path(name)
        # The proxies' own users read their files here; the keys are closed to them.
        directory.chmod(0o755)
        stage = Stage(directory, Load(_BUILD / "load"), there, scope, results)
        for measurement in arguments.only or MEASUREMENTS:
            stage.say(measurement)
            MEASUREMENTS[measurement](stage)
    results.machine["others"] = others()
    return results


def _write(results: Results, directory: Path) -> None:
    for picture in (*directory.glob("*.svg"), *directory.glob("*.png")):
        picture.unlink()
    try:
        from bench.pictures import draw
    except ImportError as error:
        print(f"bench: no pictures: {error}", file=sys.stderr)
    else:
        draw(results, directory)
    report = write_report(results, directory)
    print(report.read_text())
    print(f"This is {report}; beside it are the raw numbers and the pictures.")


if __name__ == "__main__":
    sys.exit(main())
