"""Spectra of huge Hermitian operators known only through their products, with their uncertainty."""

from specdens import testing
from specdens.algebra import low_rank, on_backend, project_out, restrict, shift, to_scipy
from specdens.backends import Backend, backend_of
from specdens.checkpoint import Checkpoint, checkpoint_every
from specdens.driver import Progress, RunState
from specdens.estimate import Estimate
from specdens.estimators import lanczos, slq
from specdens.measure import SpectralMeasure, load
from specdens.operators import Arithmetic, FunctionOperator, aslinearoperator
from specdens.probes import ProbeSampler, from_vectors, rademacher, sphere
from specdens.sharpening import Outliers
from specdens.smoothing import Chebyshev, Gaussian, Lorentzian, Smoothing, jackson
from specdens.spaces import LinearOperator, VectorSpace
from specdens.version import __version__

__all__ = [
    "Arithmetic",
    "Backend",
    "Chebyshev",
    "Checkpoint",
    "Estimate",
    "FunctionOperator",
    "Gaussian",
    "LinearOperator",
    "Lorentzian",
    "Outliers",
    "ProbeSampler",
    "Progress",
    "RunState",
    "Smoothing",
    "SpectralMeasure",
    "VectorSpace",
    "__version__",
    "aslinearoperator",
    "backend_of",
    "checkpoint_every",
    "from_vectors",
    "jackson",
    "lanczos",
    "load",
    "low_rank",
    "on_backend",
    "project_out",
    "rademacher",
    "restrict",
    "shift",
    "slq",
    "sphere",
    "testing",
    "to_scipy",
]
