"""Spectra of huge Hermitian operators known only through their products, with their uncertainty."""

from specdens import certificates, hierarchy, kronecker_structure, laws, testing
from specdens.adaptive import density
from specdens.algebra import low_rank, on_backend, project_out, restrict, shift, to_scipy
from specdens.backends import Backend, backend_of
from specdens.checkpoint import Checkpoint, checkpoint_every
from specdens.damping import LorentzDamping, fejer, jackson, lanczos_sigma, undamped
from specdens.driver import Progress, RunState
from specdens.eigenpairs import EigenResult, eigsh, spectral_interval
from specdens.estimate import Accuracy, Estimate
from specdens.estimators import lanczos, slq
from specdens.functions import apply_function
from specdens.measure import SpectralMeasure
from specdens.operators import Arithmetic, FunctionOperator, aslinearoperator
from specdens.planning import Plan, plan
from specdens.polynomial import kpm
from specdens.probes import ProbeSampler, from_vectors, rademacher, sphere, uniforms
from specdens.saving import load
from specdens.sharpening import Outliers
from specdens.smoothing import Chebyshev, Gaussian, Lorentzian, Smoothing
from specdens.solvers import Solution, inverse, solve
from specdens.spaces import LinearOperator, VectorSpace
from specdens.structured import block_diagonal, congruence, kronecker, power
from specdens.subspaces import energy_in, principal_angles, subspace_overlap
from specdens.traces import diagonal, logdet, trace
from specdens.version import __version__

__all__ = [
    "Accuracy",
    "Arithmetic",
    "Backend",
    "Chebyshev",
    "Checkpoint",
    "EigenResult",
    "Estimate",
    "FunctionOperator",
    "Gaussian",
    "LinearOperator",
    "LorentzDamping",
    "Lorentzian",
    "Outliers",
    "Plan",
    "ProbeSampler",
    "Progress",
    "RunState",
    "Smoothing",
    "Solution",
    "SpectralMeasure",
    "VectorSpace",
    "__version__",
    "apply_function",
    "aslinearoperator",
    "backend_of",
    "block_diagonal",
    "certificates",
    "checkpoint_every",
    "congruence",
    "density",
    "diagonal",
    "eigsh",
    "energy_in",
    "fejer",
    "from_vectors",
    "hierarchy",
    "inverse",
    "jackson",
    "kpm",
    "kronecker",
    "kronecker_structure",
    "lanczos",
    "lanczos_sigma",
    "laws",
    "load",
    "logdet",
    "low_rank",
    "on_backend",
    "plan",
    "power",
    "principal_angles",
    "project_out",
    "rademacher",
    "restrict",
    "shift",
    "slq",
    "solve",
    "spectral_interval",
    "sphere",
    "subspace_overlap",
    "testing",
    "to_scipy",
    "trace",
    "undamped",
    "uniforms",
]
