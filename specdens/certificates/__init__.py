r"""PAC-Bayes certificates: how wrong a randomized classifier can be on data nobody has seen.

**Theorem.** Let :math:`P` be a distribution over classifiers chosen before n independent examples
are seen. With probability :math:`1 - \delta` over them, all distributions :math:`Q` satisfy

.. math:: \mathrm{kl}(\hat e(Q) \,\|\, e(Q)) \le \frac{\mathrm{KL}(Q \| P) + \ln(n/\delta)}{n - 1},

where :math:`\hat e` and :math:`e` are the expected errors of a classifier drawn from :math:`Q`, on
the examples and on new ones, and kl is the divergence of two coins (Langford and Seeger 2001, as
used by Dziugaite and Roy 2017, arXiv 1703.11008).

**Prior.** :math:`P = N(w_0, \lambda I)` with :math:`\lambda = b\, e^{-j/c}` for a positive integer
j. A union bound gives each j the share :math:`6 / (\pi^2 j^2)` of :math:`\delta`, so j may be
chosen after seeing the data, at the cost of :math:`2 \ln j`.

**Posterior.** :math:`Q = N(w, U \operatorname{diag}(s^2) U^\top)`. The prior is isotropic and KL
does not change under rotations about it, so the basis U, too, may depend on the data.

**Sampling.** :math:`\hat e(Q)` is estimated from m drawn classifiers, and bounded by Chernoff's
inequality in its kl form with another probability of failure.
"""

from specdens.certificates.binary import binary_kl, kl_inverse
from specdens.certificates.bounds import (
    Certificate,
    PacBayesResult,
    certificate,
    monte_carlo_upper,
    pac_bayes_bound,
)
from specdens.certificates.gaussian import PriorGrid, gaussian_kl

__all__ = [
    "Certificate",
    "PacBayesResult",
    "PriorGrid",
    "binary_kl",
    "certificate",
    "gaussian_kl",
    "kl_inverse",
    "monte_carlo_upper",
    "pac_bayes_bound",
]
