"""The system call filters of the processes that the supervisor starts. Run by it, once."""

import errno

from keyd.linux import seccomp
from keyd.system_calls import SERVING
from titus_py.metrics.system_calls import SERVING_METRICS
from titus_py.resolver.system_calls import RESOLVING
from titus_py.worker.system_calls import WORKER

__all__ = ["build_filters"]


def build_filters() -> dict[str, str]:
    """By process, each as BPF in hexadecimal."""
    return {
        "worker": seccomp.build(WORKER).hex(),
        "keyd": seccomp.build(SERVING).hex(),
        "resolver": seccomp.build(RESOLVING, errno.ENOSYS).hex(),
        "metrics": seccomp.build(SERVING_METRICS).hex(),
    }
