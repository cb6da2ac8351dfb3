"""Curvature of JAX models as specdens operators: the names and meanings of `specdens_torch`."""

from specdens_jax.fisher import Fisher
from specdens_jax.gauss_newton import GaussNewton, Residual
from specdens_jax.hessian import Hessian
from specdens_jax.layerwise import layerwise
from specdens_jax.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    SquaredError,
    next_token_loss,
    token_loss,
)
from specdens_jax.parameters import FlatParameters
from specdens_jax.risk import Risk, gradient, risk_value
from specdens_jax.second_moment import GradientCovariance, GradientSecondMoment
from specdens_jax.tangent_kernel import TangentKernel

__all__ = [
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Fisher",
    "FlatParameters",
    "GaussNewton",
    "GradientCovariance",
    "GradientSecondMoment",
    "Hessian",
    "Residual",
    "Risk",
    "SquaredError",
    "TangentKernel",
    "gradient",
    "layerwise",
    "next_token_loss",
    "risk_value",
    "token_loss",
]
