"""``titus-py audit``: a running instance held against its promises, from outside.

Run as root, beside the instance and not as a part of it. It trusts the kernel (/proc),
and the configuration that the supervisor was started with. What the instance's processes
could say of themselves is not asked, but for keyd's answers, which are what is tested.

Three rules. A check is data: what was promised, how it is looked at, what was seen, and
whether that holds. What is looked at is a process as it is, never what our own code says
that it did. Nothing is changed: one connection is opened, and keyd is asked on a channel
of our own for what it must refuse, which the supervisor is told of beforehand (the log
has that as ``audit_refused``).
"""

from titus_py.audit.finding import Finding, Subject, Verdict
from titus_py.audit.run import Audit, audit
from titus_py.audit.target import CannotAudit, LivesElsewhere, Target, find_supervisors, find_target

__all__ = [
    "Audit",
    "CannotAudit",
    "Finding",
    "LivesElsewhere",
    "Subject",
    "Target",
    "Verdict",
    "audit",
    "find_supervisors",
    "find_target",
]
