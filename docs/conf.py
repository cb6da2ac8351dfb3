"""Settings of the documentation: `sphinx-build -W --keep-going -b html docs docs/_build/html`."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from specdens.version import __version__

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "specdens"
author = "The specdens authors"
copyright = "The specdens authors"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "benchmarks",
    "claims",
    "figure_texts",
    "gallery",
    "math_svg",
    "paper_links",
    "public_names",
    "tree_map",
]
exclude_patterns = ["_build", "_data"]
default_role = "py:obj"  # `name` in a docstring links to the name, where there is one

# The page of an adapter needs its framework. All others build without.
public_packages = ["specdens"]
for framework in ("torch", "jax"):
    if find_spec(framework) and find_spec(f"specdens_{framework}"):
        public_packages.append(f"specdens_{framework}")
    else:
        exclude_patterns.append(f"reference/specdens_{framework}.*")
        suppress_warnings = ["toc.excluded"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_title = f"specdens {release}"
html_show_sourcelink = False
html_show_copyright = False
html_math_renderer = "svg"  # pages need no network and no scripts

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Every page with code is run by the build. A failing cell fails it.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: more threads would only wait
nb_execution_mode = "auto"
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_output_stderr = "remove"  # progress bars
nb_merge_streams = True

autodoc_typehints = "none"  # the Parameters sections name types for readers
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
numpydoc_show_class_members = False
numpydoc_validation_checks = {
    *("GL01", "GL02", "GL03", "GL05", "GL06", "GL07", "GL09", "GL10"),
    *("SS01", "SS02", "SS03", "SS04", "SS05", "YD01", "SA02", "SA03", "SA04"),
    *("PR02", "PR03", "PR05", "PR06", "PR09", "PR10", "RT04", "RT05"),
}
