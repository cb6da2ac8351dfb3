"""The house: public names, import purity and direction, first lines and sizes of files."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import specdens
import specdens_jax
import specdens_torch

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("specdens/**/*.py"), *ROOT.glob("adapters/**/*.py")])
#: Names that both adapters have, and those that only one needs.
ADAPTERS = set(
    """
    ClassStructure CorrectedKronecker Fisher FlatParameters GaussNewton GaussianPosterior
    GradientCovariance GradientSecondMoment Hessian KroneckerFactors LayerStructure LinePath
    Residual Risk TangentKernel along_line gradient layerwise next_token_loss pac_bayes
    risk_value token_loss
    """.split()  # noqa: SIM905
)
TORCH = set(
    """
    SpectrumHistory SpectrumRecord SpectrumTracker population_statistics spread_probes
    stability_edge
    """.split()  # noqa: SIM905
)
JAX = {"BinaryCrossEntropy", "CrossEntropy", "SquaredError"}
PUBLIC = set(
    """
    Accuracy Arithmetic Backend Chebyshev Checkpoint EigenResult Estimate FunctionOperator
    Gaussian LinearOperator LorentzDamping Lorentzian Outliers Plan ProbeSampler Progress
    RunState Smoothing Solution SpectralMeasure VectorSpace __version__ apply_function
    aslinearoperator backend_of block_diagonal certificates checkpoint_every congruence density
    diagonal eigsh energy_in fejer from_vectors hierarchy inverse jackson kpm kronecker
    kronecker_structure lanczos lanczos_sigma laws load logdet low_rank on_backend plan power
    principal_angles project_out rademacher restrict shift slq solve spectral_interval sphere
    subspace_overlap testing to_scipy
    trace uniforms undamped
    """.split()  # noqa: SIM905
)

#: A module may import from layers above its own only.
LAYERS = [
    {"backends"},
    {"spaces"},
    {"foreign", "symmetry"},
    {"operators"},
    {"algebra", "probes", "structured"},
    {"methods"},
    {"solvers", "subspaces", "driver", "deflation", "kronecker_structure"},
    {"checkpoint"},
    {"runs"},
    {"estimators", "functions", "eigenpairs"},
    {"krylov_aware", "polynomial", "adaptive", "planning", "model_structure"},
    {"traces"},
    {"selftest"},
    {"__main__"},
]
#: The same for what knows NumPy only; `bands` and whatever builds measures may use these.
HOST_ONLY = [
    {"version", "arguments"},
    {"estimate", "quadrature", "damping", "storage"},
    {"smoothing", "bands", "sharpening"},
    {"interpolation"},
    {"interpretation"},
    {"measure"},
    {"saving", "plotting", "html", "laws", "gram", "certificates", "line_path", "class_parts"},
    {"hierarchy"},
    {"layer_structure"},
]
#: Imported when first needed, by methods of `SpectralMeasure`.
LATE = {"plotting", "saving", "html"}


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
    for package, own in ((specdens_torch, TORCH), (specdens_jax, JAX)):
        assert set(package.__all__) == ADAPTERS | own
        assert all(hasattr(package, name) for name in package.__all__)


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
    host = any(module in layer for layer in HOST_ONLY)
    layers = HOST_ONLY if host else LAYERS
    level = next(i for i, layer in enumerate(layers) if module in layer)
    allowed = set().union(*layers[:level], {module})
    if not host:
        allowed |= set().union(*HOST_ONLY)
    own = {name.split(".")[1] for name in imported(path) if name.startswith("specdens.")}
    assert own - (LATE if module == "measure" else set()) <= allowed


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
