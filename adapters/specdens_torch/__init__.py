"""Curvature of PyTorch models as specdens operators."""

from specdens_torch.gauss_newton import GaussNewton, Residual
from specdens_torch.hessian import Hessian
from specdens_torch.layerwise import layerwise
from specdens_torch.parameters import FlatParameters
from specdens_torch.risk import Risk, gradient, risk_value
from specdens_torch.second_moment import GradientCovariance, GradientSecondMoment
from specdens_torch.tangent_kernel import TangentKernel

__all__ = [
    "FlatParameters",
    "GaussNewton",
    "GradientCovariance",
    "GradientSecondMoment",
    "Hessian",
    "Residual",
    "Risk",
    "TangentKernel",
    "gradient",
    "layerwise",
    "risk_value",
]
