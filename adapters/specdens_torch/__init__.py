"""Curvature of PyTorch models as specdens operators."""

from specdens_torch.gauss_newton import GaussNewton, Residual
from specdens_torch.hessian import Hessian
from specdens_torch.parameters import FlatParameters
from specdens_torch.risk import Risk, gradient, risk_value
from specdens_torch.second_moment import GradientCovariance, GradientSecondMoment

__all__ = [
    "FlatParameters",
    "GaussNewton",
    "GradientCovariance",
    "GradientSecondMoment",
    "Hessian",
    "Residual",
    "Risk",
    "gradient",
    "risk_value",
]
