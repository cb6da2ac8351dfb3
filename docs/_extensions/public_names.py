"""Warns of public names that no reference page documents, so that a build with -W fails."""

from __future__ import annotations

import importlib
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

_logger = logging.getLogger(__name__)


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    documented = env.domains["py"].data["objects"]
    for package in app.config.public_packages:
        for name in importlib.import_module(package).__all__:
            full = f"{package}.{name}"
            if full not in documented and full not in env.domains["py"].data["modules"]:
                _logger.warning("%s is public, but no reference page documents it", full)


def setup(app: Sphinx) -> dict[str, Any]:
    """Check the packages listed in ``public_packages`` when all pages have been read."""
    app.add_config_value("public_packages", [], "env", list)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
