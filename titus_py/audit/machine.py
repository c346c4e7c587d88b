"""An audit for machines: JSON, with these field names, which stay.

Written by ``titus-py audit --json`` as an array of audits, one for each instance:

``format``      1, until a field changes its meaning
``result``      ``"holds"`` or ``"broken"``
``at``          when, RFC 3339, UTC; ``seconds``: how long it took
``instance``    ``supervisor`` (pid), ``configuration`` (a path, or ``the command line``),
                ``listening`` (addresses)
``host``        ``name``, ``kernel``, ``machine``, ``python``, ``titus_py`` (versions)
``summary``     how many findings are ``holds``, ``broken``, ``not_available``
``findings``    each with ``check`` (its name), ``process`` (``role``, ``pid``, ``uid``,
                ``stage``), ``promised``, ``how``, ``seen``, and
                ``verdict``: ``"holds"``, ``"broken"`` or ``"not available"``
``unseen``      what no audit from outside can show
"""

import json
from collections.abc import Sequence

from titus_py.audit.finding import Verdict
from titus_py.audit.run import UNSEEN, Audit

__all__ = ["as_json"]

FORMAT = 1


def as_json(audits: Sequence[Audit]) -> str:
    return json.dumps([_audit(one) for one in audits], indent=2, ensure_ascii=False)


def _audit(audit: Audit) -> dict[str, object]:
    return {
        "format": FORMAT,
        "result": Verdict.HOLDS if audit.holds else Verdict.BROKEN,
        "at": audit.at.isoformat(timespec="seconds").replace("+00:00", "Z"),
        "seconds": audit.seconds,
        "instance": {
            "supervisor": audit.supervisor,
            "configuration": audit.source,
            "listening": audit.listening,
        },
        "host": audit.host._asdict(),
        "summary": {verdict.replace(" ", "_"): len(audit.having(verdict)) for verdict in Verdict},
        "findings": [
            {
                "check": finding.check,
                "process": finding.subject._asdict(),
                "promised": finding.promised,
                "how": finding.how,
                "seen": finding.seen,
                "verdict": finding.verdict,
            }
            for finding in audit.findings
        ],
        "unseen": UNSEEN,
    }
