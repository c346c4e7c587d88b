"""Modules in C, each from a build of its own, for programs that tests start."""

import importlib
import importlib.machinery
import importlib.util
import sys

__all__ = ["use_build"]


def use_build(name: str, build: str) -> None:
    """Have this file be the module of this name, for whoever imports it from now on."""
    package, _, own_name = name.rpartition(".")
    # First: with the package come those that are installed.
    within = importlib.import_module(package)
    loader = importlib.machinery.ExtensionFileLoader(name, build)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    assert module.__file__ == build
    sys.modules[name] = module
    setattr(within, own_name, module)
