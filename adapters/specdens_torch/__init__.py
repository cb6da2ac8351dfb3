"""Curvature of PyTorch models as specdens operators."""

from specdens_torch.hessian import Hessian
from specdens_torch.parameters import FlatParameters
from specdens_torch.risk import Risk, gradient, risk_value

__all__ = ["FlatParameters", "Hessian", "Risk", "gradient", "risk_value"]
