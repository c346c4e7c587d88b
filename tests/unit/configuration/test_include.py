"""Files that a configuration includes, and how mistakes in them are named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from titus_py.configuration import Loaded, load

HOST = """\
[[vhost]]
sni = ["{}.example"]
certificate = "{}"
key = "site.key"
backend = "127.0.0.1:80"
"""
LISTEN = '[[listen]]\naddress = ":{}"\n'

Load = Callable[..., Loaded]


def host(name: str, certificate: str = "site.crt") -> str:
    return HOST.format(name, certificate)


@pytest.fixture
def load_files(tmp_path: Path) -> Load:
    """Load titus.toml, beside the files site.crt and site.key, and others below conf.d."""

    def load_files(main: str, **files: str) -> Loaded:
        (tmp_path / "site.crt").touch()
        (tmp_path / "site.key").touch(mode=0o600)
        (tmp_path / "conf.d").mkdir()
        for name, text in files.items():
            (tmp_path / "conf.d" / f"{name}.toml").write_text(text)
        (tmp_path / "titus.toml").write_text(main)
        return load(tmp_path / "titus.toml")

    return load_files


INCLUDE = 'include = ["conf.d/*.toml"]\n'


def told(loaded: Loaded, tmp_path: Path) -> list[str]:
    assert (loaded.configuration is None) == bool(loaded.mistakes)
    return [str(mistake).replace(f"{tmp_path}/", "") for mistake in loaded.mistakes]


def test_tables_follow_in_the_order_of_the_files_names(load_files: Load, tmp_path: Path) -> None:
    loaded = load_files(
        INCLUDE + LISTEN.format(443) + host("main"),
        b=host("late"),
        a=host("early") + LISTEN.format(8443) + host("second"),
    )
    assert told(loaded, tmp_path) == []
    assert loaded.warnings == []
    configuration = loaded.configuration
    assert configuration is not None
    names = [vhost.sni for vhost in configuration.vhost]
    assert names == [(f"{name}.example",) for name in ("main", "early", "second", "late")]
    assert [table.address.port for table in configuration.listen] == [443, 8443]
    # A path in an included file is relative to the directory of the one that includes it.
    assert {str(vhost.certificate) for vhost in configuration.vhost} == {f"{tmp_path}/site.crt"}


def test_all_tables_may_be_in_included_files(load_files: Load, tmp_path: Path) -> None:
    assert told(load_files(INCLUDE, a=LISTEN.format(443), b=host("b")), tmp_path) == []


def test_each_mistake_has_its_file_and_line(load_files: Load, tmp_path: Path) -> None:
    loaded = load_files(
        INCLUDE + LISTEN.format(443) + host("main", "gone.crt"),
        a="\n" + host("fine") + host("early", "away.crt"),
        b=LISTEN.format(443) + host("main"),
    )
    assert told(loaded, tmp_path) == [
        'titus.toml:6: vhost "main.example": certificate: gone.crt: no such file or directory',
        'conf.d/a.toml:9: vhost "early.example": certificate: away.crt: no such file or directory',
        'conf.d/b.toml:2: listen ":443": address: [::]:443 overlaps listen ":443": address '
        "(line 3), [::]:443: only one can be bound",
        'conf.d/b.toml:3: vhost "main.example": can never match: all that it could is taken by '
        'vhost "main.example" (line 4)',
    ]


def test_a_mistake_names_the_included_file_that_it_refers_to(
    load_files: Load, tmp_path: Path
) -> None:
    loaded = load_files(INCLUDE + LISTEN.format(443), a="\n" + host("x"), b=host("x"))
    (mistake,) = told(loaded, tmp_path)
    assert mistake.startswith('conf.d/b.toml:1: vhost "x.example": can never match')
    assert mistake.endswith('taken by vhost "x.example" (conf.d/a.toml:2)')


def test_a_file_that_cannot_be_read_leaves_the_others_checked(
    load_files: Load, tmp_path: Path
) -> None:
    loaded = load_files(
        INCLUDE + LISTEN.format(443),
        a="[[vhost]\n",
        b=host("b", "gone.crt"),
        c=f"{host('c')}[worker]\nmax = 5\n",
        d='include = ["more.toml"]\n',
    )
    found = told(loaded, tmp_path)
    assert found[0].startswith("conf.d/a.toml:1: not valid TOML: ")
    reason = "an included file has only tables headed [[listen]], [[vhost]] and [[tunnel]]"
    assert found[1:3] == [
        f"conf.d/c.toml:6: worker: {reason}",
        f"conf.d/d.toml:1: include: {reason}",
    ]
    assert found[3].startswith('conf.d/b.toml:3: vhost "b.example": certificate: gone.crt: no such')
    assert len(found) == 4


def test_no_file_that_matches_is_worth_a_warning(load_files: Load, tmp_path: Path) -> None:
    main = 'include = ["conf.d/*.toml", "titus.d/*"]\n' + LISTEN.format(443) + host("main")
    loaded = load_files(main)
    assert told(loaded, tmp_path) == []
    assert [str(warning).replace(f"{tmp_path}/", "") for warning in loaded.warnings] == [
        "titus.toml:1: include: conf.d/*.toml: no file matches",
        "titus.toml:1: include: titus.d/*: no file matches",
    ]


def test_a_file_is_read_once(load_files: Load, tmp_path: Path) -> None:
    main = 'include = ["conf.d/a.toml", "conf.d/*.toml"]\n' + LISTEN.format(443)
    loaded = load_files(main, a=host("a"), b=host("b"))
    assert told(loaded, tmp_path) == []
    assert loaded.configuration is not None
    assert len(loaded.configuration.vhost) == 2


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ('"conf.d"', 'expected a list of files, such as ["conf.d/*.toml"], not "conf.d"'),
        ("[1]", "expected a string, not 1"),
        ('[""]', 'expected a file or a pattern, not ""'),
    ],
)
def test_how_files_are_not_included(
    load_files: Load, tmp_path: Path, setting: str, reason: str
) -> None:
    loaded = load_files(f"include = {setting}\n" + LISTEN.format(443) + host("main"))
    assert told(loaded, tmp_path) == [f"titus.toml:1: include: {reason}"]
