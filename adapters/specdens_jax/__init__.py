"""Curvature of JAX models as specdens operators: the names and meanings of `specdens_torch`."""

from specdens.layer_structure import LayerStructure
from specdens.line_path import LinePath
from specdens_jax.class_structure import ClassStructure
from specdens_jax.fisher import Fisher
from specdens_jax.gauss_newton import GaussNewton, Residual
from specdens_jax.hessian import Hessian
from specdens_jax.kronecker_factors import CorrectedKronecker, KroneckerFactors
from specdens_jax.layerwise import layerwise
from specdens_jax.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    SquaredError,
    next_token_loss,
    token_loss,
)
from specdens_jax.pac_bayes import pac_bayes
from specdens_jax.parameters import FlatParameters
from specdens_jax.paths import along_line
from specdens_jax.posterior import GaussianPosterior
from specdens_jax.risk import Risk, gradient, risk_value
from specdens_jax.second_moment import GradientCovariance, GradientSecondMoment
from specdens_jax.tangent_kernel import TangentKernel

__all__ = [
    "BinaryCrossEntropy",
    "ClassStructure",
    "CorrectedKronecker",
    "CrossEntropy",
    "Fisher",
    "FlatParameters",
    "GaussNewton",
    "GaussianPosterior",
    "GradientCovariance",
    "GradientSecondMoment",
    "Hessian",
    "KroneckerFactors",
    "LayerStructure",
    "LinePath",
    "Residual",
    "Risk",
    "SquaredError",
    "TangentKernel",
    "along_line",
    "gradient",
    "layerwise",
    "next_token_loss",
    "pac_bayes",
    "risk_value",
    "token_loss",
]
