"""The provider's build: all else is in pyproject.toml."""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "keyd.provider.keyd_provider",
            sources=sorted(glob("keyd/provider/*.c")),
            depends=glob("keyd/provider/*.h"),
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
            extra_link_args=["-Wl,-z,relro,-z,now,-z,noexecstack"],
        )
    ]
)
