"""An audit for an auditor: one HTML file with nothing outside itself.

Written by ``titus-py audit --html``. Whatever comes from the instance is escaped.
"""

from collections.abc import Iterator, Sequence
from html import escape

from titus_py.audit.finding import Finding, Verdict
from titus_py.audit.groups import Group, Row, grouped
from titus_py.audit.run import UNSEEN, Audit

__all__ = ["as_html"]

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --faint: #59636e; --line: #d8dee4; --wash: #f6f8fa;
  --good: #1a7f37; --bad: #cf222e; --bad-wash: #ffebe9; --doubt: #8a5a00; --doubt-wash: #fff8e1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1318; --ink: #e6edf3; --faint: #95a1ad; --line: #2d343c; --wash: #171c22;
    --good: #4cc26a; --bad: #ff7b72; --bad-wash: #3a1618; --doubt: #e3b341; --doubt-wash: #2f2710;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 76rem;
  background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.kicker { color: var(--faint); margin: .25rem 0 1.4rem; }
.result {
  border: 1px solid var(--line); border-left: .5rem solid var(--good); border-radius: .4rem;
  padding: 1rem 1.25rem; background: var(--wash);
}
.result.broken { border-left-color: var(--bad); background: var(--bad-wash); }
.result strong { display: block; font-size: 1.3rem; color: var(--good); }
.result.broken strong { color: var(--bad); }
.counts { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin-top: .3rem; }
.counts b { font-variant-numeric: tabular-nums; }
dl.facts {
  display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 1.4rem 0 0;
}
dl.facts dt { color: var(--faint); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .8rem 0; }
summary {
  padding: .6rem .9rem; cursor: pointer; background: var(--wash); border-radius: .4rem;
  display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem 1rem;
}
summary::before { content: "\\25b8"; color: var(--faint); }
details[open] > summary::before { content: "\\25be"; }
details[open] > summary { border-bottom: 1px solid var(--line); border-radius: .4rem .4rem 0 0; }
summary .title { font-weight: 600; }
summary .tally { color: var(--faint); margin-left: auto; }
details.broken { border-color: var(--bad); }
details.broken > summary { background: var(--bad-wash); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; min-width: 46rem; table-layout: fixed; }
th, td {
  text-align: left; vertical-align: top; padding: .45rem .9rem; overflow-wrap: break-word;
  border-top: 1px solid var(--line);
}
thead th { border-top: 0; font-weight: 600; font-size: .85rem; color: var(--faint); }
th.verdict, td.verdict { width: 8.5rem; }
td.how { color: var(--faint); font-size: .9rem; }
td .check { display: block; color: var(--faint); font: .8rem ui-monospace, monospace; }
.mark { white-space: nowrap; font-weight: 600; }
.mark.holds { color: var(--good); }
.mark.broken {
  color: #fff; background: #cf222e; padding: .1rem .5rem; border-radius: .25rem;
}
.mark.not-available { color: var(--doubt); }
tr.broken td { background: var(--bad-wash); }
tr.not-available td { background: var(--doubt-wash); }
ul.failures { list-style: none; padding: 0; margin: 0; }
ul.failures li {
  border: 1px solid var(--bad); border-left-width: .5rem; border-radius: .4rem;
  background: var(--bad-wash); padding: .7rem 1rem; margin: .6rem 0;
}
ul.failures p { margin: .15rem 0; overflow-wrap: anywhere; }
footer { color: var(--faint); margin-top: 2.5rem; border-top: 1px solid var(--line); }
@media print { details { break-inside: avoid-page; } body { max-width: none; padding: 0; } }
"""

_WORDS = {
    Verdict.HOLDS: "✓ holds",
    Verdict.BROKEN: "✗ BROKEN",
    Verdict.NOT_AVAILABLE: "○ not available",
}
_TALLIES = (
    (Verdict.BROKEN, "broken"),
    (Verdict.NOT_AVAILABLE, "not available"),
    (Verdict.HOLDS, "hold"),
)


def as_html(audits: Sequence[Audit]) -> str:
    parts = "\n".join(part for audit in audits for part in _audit(audit))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>titus-py audit</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"{parts}\n</body>\n</html>\n"
    )


def _audit(audit: Audit) -> Iterator[str]:
    host, broken = audit.host, audit.having(Verdict.BROKEN)
    yield "<header>"
    yield f"<h1>Audit of titus-py on {escape(host.name)}</h1>"
    yield (
        '<p class="kicker">A running instance held against its promises, from outside, '
        f"{audit.at:%Y-%m-%d %H:%M:%S} UTC</p>"
    )
    yield from _result(audit)
    yield '<dl class="facts">'
    for name, value in (
        ("Instance", f"supervisor {audit.supervisor}, listening on {', '.join(audit.listening)}"),
        ("Configuration", audit.source),
        ("Host", f"{host.name}, {host.machine}"),
        ("Kernel", host.kernel),
        ("Versions", f"titus-py {host.titus_py}, Python {host.python}"),
        ("Took", f"{audit.seconds:.1f} s"),
    ):
        yield f"<dt>{name}</dt><dd>{escape(value)}</dd>"
    yield "</dl>\n</header>"
    if broken:
        yield "<h2>What does not hold</h2>"
        yield '<ul class="failures">'
        yield from map(_failure, broken)
        yield "</ul>"
    yield "<h2>Every check, by process</h2>"
    for group in grouped(audit.findings, by_stage=True):
        yield from _group(group)
    yield "<footer>"
    yield "<h2>What no audit from outside can show</h2>"
    yield "<ul>" + "".join(f"<li>{escape(thing)}</li>" for thing in UNSEEN) + "</ul>"
    yield (
        "<p>What keyd refused to this audit is in the instance's log as "
        "<code>audit_refused</code>, of a number that no client's connection has.</p>\n</footer>"
    )


def _result(audit: Audit) -> Iterator[str]:
    counts = {verdict: len(audit.having(verdict)) for verdict in Verdict}
    kind = "holds" if audit.holds else "broken"
    words = "All promises hold" if audit.holds else "Not all promises hold"
    yield f'<div class="result {kind}"><strong>{words}</strong>'
    yield '<div class="counts">'
    yield f"<span><b>{counts[Verdict.HOLDS]}</b> checks hold</span>"
    yield f"<span><b>{counts[Verdict.BROKEN]}</b> broken</span>"
    yield f"<span><b>{counts[Verdict.NOT_AVAILABLE]}</b> not available here</span>"
    yield "</div></div>"


def _failure(finding: Finding) -> str:
    return (
        f"<li><p><strong>{escape(str(finding.subject))}: {escape(finding.seen)}</strong></p>"
        f"<p>Promised: {escape(finding.promised)}.</p>"
        f'<p class="kicker">Check {escape(finding.check)}: {escape(finding.how)}</p></li>'
    )


def _group(group: Group) -> Iterator[str]:
    verdicts = [row.finding.verdict for row in group.rows]
    tally = ", ".join(
        f"{count} {word}" for verdict, word in _TALLIES if (count := verdicts.count(verdict))
    )
    yield f"<details open{' class=broken' if group.broken else ''}>"
    yield (
        f'<summary><span class="title">{escape(group.title)}</span>'
        f'<span class="tally">{tally}</span></summary>'
    )
    yield (
        '<div class="wide"><table><thead><tr><th class="verdict">Verdict</th>'
        "<th>What was promised</th><th>What was seen</th><th>How it was looked at</th>"
        "</tr></thead><tbody>"
    )
    yield from map(_row, group.rows)
    yield "</tbody></table></div></details>"


def _row(row: Row) -> str:
    finding = row.finding
    kind = finding.verdict.replace(" ", "-")
    seen = finding.seen + (f" ({row.processes} workers alike)" if row.processes > 1 else "")
    if finding.verdict is not Verdict.HOLDS and finding.subject.stage:
        # The group has several processes: say which one this is about.
        seen = f"{finding.subject}: {seen}"
    return (
        f'<tr class="{kind}"><td class="verdict"><span class="mark {kind}">'
        f"{_WORDS[finding.verdict]}</span></td>"
        f'<td>{escape(finding.promised)}<span class="check">{escape(finding.check)}</span></td>'
        f'<td>{escape(seen)}</td><td class="how">{escape(finding.how)}</td></tr>'
    )
