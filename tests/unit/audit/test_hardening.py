"""What programs were built with, seen in real ones."""

import subprocess
from pathlib import Path

import pytest

from titus_py.audit.hardening import has_stack_protector, is_position_independent

SOURCE = """
#include <string.h>
int copy(char *to, const char *from) { char on_stack[64]; strcpy(on_stack, from);
    strcpy(to, on_stack); return on_stack[3]; }
int main(int count, char **words) { char to[64]; return copy(to, words[0]); }
"""


def built(directory: Path, *options: str) -> Path:
    (directory / "it.c").write_text(SOURCE)
    subprocess.run(["gcc", *options, "-o", "it", "it.c"], cwd=directory, check=True)
    return directory / "it"


@pytest.mark.parametrize(("option", "independent"), [("-pie", True), ("-no-pie", False)])
def test_position_independence_is_the_linkers(
    tmp_path: Path, option: str, independent: bool
) -> None:
    program = built(tmp_path, "-fPIE", option)
    assert is_position_independent(program.read_bytes()[:64]) is independent
    assert not is_position_independent(b"#!/bin/sh\n")


@pytest.mark.parametrize(
    ("option", "protected"), [("-fstack-protector-all", True), ("-fno-stack-protector", False)]
)
@pytest.mark.parametrize("kind", ["program", "stripped library"])
def test_a_stack_protector_leaves_its_name(
    tmp_path: Path, kind: str, option: str, protected: bool
) -> None:
    # Start files of a program have none of their own.
    options = ("-shared", "-fPIC", "-s") if kind == "stripped library" else ()
    assert has_stack_protector(built(tmp_path, option, *options)) is protected
