"""The house: public names, import purity and direction, first lines and sizes of files."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import specdens
import specdens_torch

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("specdens/**/*.py"), *ROOT.glob("adapters/**/*.py")])
PUBLIC = set(
    """
    Arithmetic Backend Chebyshev Checkpoint Estimate FunctionOperator Gaussian LinearOperator
    Lorentzian Outliers ProbeSampler Progress RunState Smoothing SpectralMeasure VectorSpace
    __version__ aslinearoperator backend_of checkpoint_every from_vectors jackson lanczos load
    low_rank on_backend project_out rademacher restrict shift slq sphere testing to_scipy
    """.split()  # noqa: SIM905
)

#: A module may import from its own layer's left only.
LAYERS = [
    {"backends"},
    {"spaces"},
    {"operators"},
    {"algebra", "probes"},
    {"methods"},
    {"driver"},
    {"checkpoint"},
    {"estimators"},
]
HOST_ONLY = [
    {"version", "estimate", "quadrature", "smoothing", "storage"},
    {"bands", "sharpening"},
    {"measure"},
    {"plotting"},
]


def imported(path):
    """Return the modules that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_public_names_are_the_contract():
    assert set(specdens.__all__) == PUBLIC
    assert all(hasattr(specdens, name) for name in PUBLIC)
    assert sorted(specdens_torch.__all__) == [
        "FlatParameters", "Hessian", "Risk", "gradient", "risk_value",
    ]  # fmt: skip


def test_importing_specdens_imports_no_framework():
    code = (
        "import sys, specdens; print([m for m in ('torch', 'jax', 'cupy', 'matplotlib',"
        " 'array_api_strict') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("specdens/**/*.py")), ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    module = path.relative_to(ROOT / "specdens").parts[0].removesuffix(".py")
    if module in ("__init__", "testing"):
        return  # the two that stand above all others
    order = [*HOST_ONLY[:1], *LAYERS]
    host = any(module in layer for layer in HOST_ONLY)
    layers = HOST_ONLY if host else order
    level = next(i for i, layer in enumerate(layers) if module in layer)
    allowed = set().union(*layers[:level], {module}, layers[0])
    if module == "estimators":
        allowed |= set().union(*HOST_ONLY)
    own = {name.split(".")[1] for name in imported(path) if name.startswith("specdens.")}
    if host and module == "measure":
        own -= {"plotting"}  # imported when the first figure is drawn
    assert own <= allowed


@pytest.mark.parametrize("path", sorted(ROOT.glob("specdens/**/*.py")), ids=lambda p: p.stem)
def test_only_backends_name_a_framework(path):
    frameworks = {"torch", "jax", "cupy", "array_api_strict"}
    found = {name.split(".")[0] for name in imported(path)} & frameworks
    assert not found or path.parent.name == "backends"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_files_say_what_they_are_for_and_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert text.count("\n") <= 400


@pytest.mark.slow
def test_a_wheel_holds_the_three_packages_and_nothing_else(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        names = set(archive.namelist())
    packages = {name for name in tops if not name.endswith(".dist-info")}
    assert packages == {"specdens", "specdens_torch", "specdens_jax"}
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("specdens/**/*.py")} <= names
