"""Warns of public names that no reference page documents, so that a build with -W fails."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

_logger = logging.getLogger(__name__)


def names_of(module: ModuleType) -> list[str]:
    """Return the names a module lists, or else the functions and classes it defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module.__name__
    ]


def public_names(package: str) -> Iterator[str]:
    """Give the full names of all that is public, that of public submodules included."""
    module = importlib.import_module(package)
    for name in names_of(module):
        full = f"{package}.{name}"
        yield full
        if isinstance(getattr(module, name), ModuleType):
            yield from public_names(full)


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    python = env.domains["py"].data
    for package in app.config.public_packages:
        for name in public_names(package):
            if name not in python["objects"] and name not in python["modules"]:
                _logger.warning("%s is public, but no reference page documents it", name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Check the packages listed in ``public_packages`` when all pages have been read."""
    app.add_config_value("public_packages", [], "env", list)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
