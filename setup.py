"""The builds in C: all else is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup


def extension(name: str, *sources: str) -> Extension:
    return Extension(
        name,
        sources=sorted(sources),
        depends=glob("keyd/*/*.h") + glob("titus_py/*/*.h"),
        extra_compile_args=[
            "-std=c11",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-O2",
            "-fvisibility=hidden",
            "-fstack-protector-strong",
            "-D_FORTIFY_SOURCE=2",
        ],
        extra_link_args=["-Wl,-z,relro,-z,now,-z,noexecstack,-z,noseparate-code"],
    )


setup(
    ext_modules=[
        extension("keyd.provider.keyd_provider", *glob("keyd/provider/*.c")),
        extension("keyd.linux.calls", "keyd/linux/calls.c"),
        extension("keyd.inspection.occurrences", "keyd/inspection/occurrences.c"),
        extension("keyd.linux.residue", "keyd/linux/residue.c"),
        extension(
            "titus_py.native",
            "titus_py/native.c",
            *glob("titus_py/fork_server/*.c"),
            *glob("titus_py/worker/flow*.c"),
            "titus_py/worker/transcript.c",
        ),
        extension("titus_py.worker.alpn", "titus_py/worker/alpn.c"),
        extension("titus_py.worker.verification", "titus_py/worker/verification.c"),
    ]
)
