"""``titus-py audit``: check from outside whether a running instance keeps its promises.

Run as root, beside the instance and not as a part of it. It trusts the kernel (/proc),
and the configuration that the supervisor was started with. It does not ask the instance's
processes about themselves, except for keyd's answers, which are what is tested.

Three rules. A check is data: what was promised, how it is looked at, what was seen, and
whether that holds. A check looks at a process as it is, never at what our own code says
that it did. Nothing is changed: the audit opens one connection, and asks keyd, on channels
of its own, for what keyd must refuse. It announces this to the supervisor beforehand (the
log has the refusals as ``audit_refused``).

``run`` makes an audit, of what ``target`` finds. Two of the audit's processes load this package,
and little else of it: ``client`` and ``key_holder``. So it imports nothing.
"""
