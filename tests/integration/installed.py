"""A program of a test's own with all that it starts: a copy that another version can replace."""

import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree, ignore_patterns

_CHECKOUT = Path(__file__).parents[2]
_PACKAGES = "titus_py", "keyd"
_LAUNCHER = """\
#!{python} -I
import sys
from {package}.__main__ import main

sys.exit(main())
"""


class Installed:
    """Below this directory, as a package has it: a virtual environment, and what is in it."""

    def __init__(self, directory: Path) -> None:
        self.python = python = directory / "bin/python"
        python.parent.mkdir(parents=True)
        python.symlink_to(Path(sys.executable).resolve())
        settings = f"home = {python.resolve().parent}\ninclude-system-site-packages = false\n"
        (directory / "pyvenv.cfg").write_text(settings)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = directory / "lib" / version / "site-packages"
        self.site.mkdir(parents=True)
        for theirs in Path(sysconfig.get_path("purelib")).iterdir():
            if theirs.suffix != ".pth" and not theirs.name.startswith("titus_py-"):
                (self.site / theirs.name).symlink_to(theirs)
        for name in _PACKAGES:
            # With what Python has compiled: whatever is started first would compile all of it.
            unfinished = ignore_patterns("*.pytest-*", "*.pyc.*")
            copytree(_CHECKOUT / name, self.site / name, ignore=unfinished)
        self._metadata = self.site / "titus_py.dist-info/METADATA"
        self._metadata.parent.mkdir()
        self.is_version("1.0")
        self.titus_py, self.keyd = directory / "titus-py", directory / "keyd"
        for launcher, package in ((self.titus_py, "titus_py"), (self.keyd, "keyd")):
            launcher.write_text(_LAUNCHER.format(python=python, package=package))
            launcher.chmod(0o755)

    def is_version(self, version: str) -> None:
        self._metadata.write_text(f"Metadata-Version: 2.1\nName: titus-py\nVersion: {version}\n")

    def has(self, file: str, before: str, after: str) -> None:
        """Another version has this in the place of that."""
        path = self.site / file
        text = path.read_text()
        assert before in text, (file, before)
        # As dpkg does it.
        new = path.with_suffix(".dpkg-new")
        new.write_text(text.replace(before, after))
        new.replace(path)

    @contextmanager
    def without(self, part: str) -> Iterator[None]:
        """A file or directory is not there for a while: as if its package were broken."""
        path = self.site / part
        away = path.rename(path.with_name(f"{path.name}.away"))
        yield
        away.rename(path)
