"""The Python that the package was made with is gone: another release's may have its place."""

from .administrator import Administrator


def is_told(admin: Administrator) -> None:
    """Whatever is started says so. Who runs goes on, and is as before once it is there again."""
    python = admin.types("readlink /usr/lib/titus-py/bin/python").strip()
    before = admin.property("titus-py", "MainPID")
    # What is for Python is none of the shell's business, also where that only looks (lintian does).
    admin.types("sh -n /usr/sbin/titus-py && sh -n /usr/sbin/keyd")
    admin.types(f"mv {python} {python}.away")
    for command in ("titus-py check", "keyd status", "titus-py reload"):
        seen = admin.types(command, fails=True)
        program = command.split()[0]
        assert f"{program}: {python} is not there, with which titus-py was installed" in seen
    admin.types("systemctl reload titus-py", fails=True)
    assert f"{python} is not there" in admin.status("titus-py")
    admin.requests()
    admin.types(f"mv {python}.away {python} && systemctl reload titus-py")
    admin.requests()
    assert admin.property("titus-py", "MainPID") == before
