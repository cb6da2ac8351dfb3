"""Checks for anybody's operators, and matrices, spectra and models with known answers."""

from specdens.testing.checks import check_operator
from specdens.testing.closed_forms import (
    SpikedCovariance,
    hidden_layer_residual_eigenvalues,
    spiked_covariance,
)
from specdens.testing.logistic import MultinomialLogisticModel, multinomial_logistic_model
from specdens.testing.matrices import matrix_with_spectrum, spiked_spectrum

__all__ = [
    "MultinomialLogisticModel",
    "SpikedCovariance",
    "check_operator",
    "hidden_layer_residual_eigenvalues",
    "matrix_with_spectrum",
    "multinomial_logistic_model",
    "spiked_covariance",
    "spiked_spectrum",
]
