"""Curvature of PyTorch models as specdens operators."""

from specdens.layer_structure import LayerStructure
from specdens.line_path import LinePath
from specdens_torch.class_structure import ClassStructure
from specdens_torch.fisher import Fisher
from specdens_torch.gauss_newton import GaussNewton, Residual
from specdens_torch.hessian import Hessian
from specdens_torch.history import SpectrumHistory, SpectrumRecord
from specdens_torch.kronecker_factors import CorrectedKronecker, KroneckerFactors
from specdens_torch.language import next_token_loss, token_loss
from specdens_torch.layerwise import layerwise
from specdens_torch.pac_bayes import pac_bayes
from specdens_torch.parameters import FlatParameters
from specdens_torch.paths import along_line, population_statistics
from specdens_torch.posterior import GaussianPosterior
from specdens_torch.risk import Risk
from specdens_torch.second_moment import GradientCovariance, GradientSecondMoment
from specdens_torch.spreading import spread_probes
from specdens_torch.tangent_kernel import TangentKernel
from specdens_torch.tracking import SpectrumTracker, stability_edge
from specdens_torch.values import gradient, risk_value

__all__ = [
    "ClassStructure",
    "CorrectedKronecker",
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
    "SpectrumHistory",
    "SpectrumRecord",
    "SpectrumTracker",
    "TangentKernel",
    "along_line",
    "gradient",
    "layerwise",
    "next_token_loss",
    "pac_bayes",
    "population_statistics",
    "risk_value",
    "spread_probes",
    "stability_edge",
    "token_loss",
]
