"""PAC-Bayes bounds on the error of a trained classifier, in a basis of the user's choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specdens.arguments import checked_seed, shown
from specdens.certificates import PacBayesResult, PriorGrid, certificate
from specdens.certificates.checks import check_counts, check_delta, check_positive, check_refresh
from specdens.certificates.fitting import Objective, Schedule, smallest_scale
from specdens_jax.classifier import Classifier, check_prior
from specdens_jax.posterior import (
    Bases,
    GaussianPosterior,
    choose_bases,
    coordinates_of,
    rotated,
    seed_key,
    transferred,
)
from specdens_jax.risk import Risk, check_risk
from specdens_jax.sharding import on_automatic_axes, on_callers_axes

BasisChoice = str | Mapping[str, Any] | Callable[[Risk], Mapping[str, Any]]
_DECAY, _EPSILON = 0.9, 1e-8  # of RMSprop


@on_automatic_axes
def pac_bayes(
    risk: Risk,
    prior_mean: Any,
    *,
    basis: BasisChoice = "standard",
    refresh_every: int | None = None,
    epochs: int = 300,
    learning_rate: float = 1e-2,
    drops: Sequence[int] | None = None,
    batch_size: int = 100,
    seed: int = 0,
    num_monte_carlo: int = 2000,
    grid: PriorGrid | None = None,
    delta: float = 0.01,
    prior_scale: float = math.exp(-3),
) -> PacBayesResult:
    r"""Bound the error on new data of a randomized classifier that is fitted for the purpose.

    The classifier draws its parameters anew for every prediction, from
    :math:`N(w, Q \operatorname{diag}(s^2) Q^\top)`. Its mean w, which begins at the parameters of
    the risk, its scales s and the prior's variance :math:`\lambda` minimize the surrogate

    .. math:: \hat L(w + Q(s \circ \varepsilon)) + \sqrt{\frac{\mathrm{KL} + 2 \ln(c \ln(b/\lambda))
              + \ln(\pi^2 n / (6\delta))}{2(n-1)}}

    by RMSprop, with :math:`\hat L` the logistic loss over ln 2, or the cross-entropy over the
    logarithm of the number of classes. The bound itself is for the fraction of errors: see
    `specdens.certificates`. Of the risk, the model, the data and the parameters matter; its loss
    enters through the curvature that a basis is made of.

    Parameters
    ----------
    risk : Risk
        Of a classifier on its training data: one logit and labels +-1 or 0/1, or a logit for each
        class and integer labels. Leaves that do not vary must not have learned from these data.
    prior_mean : array of shape (n,) or pytree
        The parameters before training, as a flat vector or like ``risk.params``. A pytree also
        shows whether anything else was trained.
    basis : str, mapping or callable
        ``"standard"``: independent parameters. ``"kronecker"``: for each leaf that is a matrix,
        the eigenvectors of both factors of its layer, see `KroneckerFactors`; the standard basis
        elsewhere. ``"exact"``: the eigenvectors of the Gauss-Newton matrix's diagonal block of
        each leaf, which is formed. Or your own, by the leaf's name: an orthogonal matrix, or a
        pair (U, V) for their Kronecker product, U of the order of the leaf's first axis and V of
        the product of the others (None for the identity); or a function from the risk to such a
        mapping.
    refresh_every : int, optional
        Epochs after which the basis is made anew at the present mean. The scales become those of
        the same covariance along the new basis.
    epochs : int
    learning_rate : float
        Of RMSprop, the same for means, logarithms of scales and of the prior's.
    drops : sequence of int, optional
        Epochs at which the learning rate falls to a tenth, by default a third and two thirds of
        all.
    batch_size : int
        Examples for one step, which draws the parameters once.
    seed : int
        Determines the result, with the data's order.
    num_monte_carlo : int
        Classifiers drawn for the final bound, each evaluated on all examples.
    grid : PriorGrid, optional
        Variances that the prior may have, and the probability that the bound fails.
    delta : float
        Probability that the drawn classifiers mislead.
    prior_scale : float
        Standard deviation of the prior to begin with.

    Returns
    -------
    PacBayesResult
        ``bound``, ``certificate``, ``posterior`` (a `GaussianPosterior`) and ``history``.

    Raises
    ------
    ValueError
        If the bound would not hold or not be defined: `prior_mean` equals the trained parameters,
        other leaves have learned from the data, labels are no classes, a basis is not orthonormal.
        Or if an option is out of range, or the optimization diverges.
    TypeError
        If `risk` is not a `Risk`, `grid` no `PriorGrid`, or a basis or another option is of
        another type.

    Notes
    -----
    The examples must be independent, and the prior fixed before they were seen; no program can
    check that. The basis may depend on the data, because the prior is isotropic. Q is a constant
    in the gradient, though it depends on w: this makes the minimum worse, not the bound invalid.
    All data are held in memory.

    References
    ----------
    Dziugaite, Roy (2017), Computing nonvacuous generalization bounds for deep (stochastic) neural
    networks with many more parameters than training data, arXiv 1703.11008.
    Wu, Zhu, Wu, Wang, Ge (2020), Dissecting Hessian, arXiv 2010.04261 (the bases; their
    refreshed scales keep their index instead).

    Examples
    --------
    >>> from specdens_jax import BinaryCrossEntropy
    >>> x = jnp.linspace(-1, 1, 400)
    >>> w = jnp.ones(())  # trained from zero
    >>> risk = Risk(lambda w, x: w * x, BinaryCrossEntropy(), w, (x, (x > 0) * 1.0))
    >>> result = pac_bayes(risk, jnp.zeros(()), epochs=30, learning_rate=0.1)
    >>> round(result.bound, 1), result.empirical_error < 0.1
    (0.2, True)
    >>> round(result.confidence, 3)
    0.965
    """
    check_risk(risk)
    seed = checked_seed(seed)
    check_positive("prior_scale", prior_scale)
    check_delta("delta", delta)
    check_counts(num_monte_carlo=num_monte_carlo)
    schedule = Schedule(epochs, learning_rate, batch_size, drops, refresh_every)
    check_refresh(basis, refresh_every)
    grid = PriorGrid() if grid is None else grid
    if not isinstance(grid, PriorGrid):
        msg = f"grid={shown(grid)} must be a PriorGrid, or None for the usual one."
        raise TypeError(msg)
    prior = check_prior(risk, prior_mean)
    training = _Training(Classifier.of(risk), prior, grid, basis, prior_scale, seed)
    history = schedule.run(training.epoch, training.refresh)
    posterior = training.posterior()
    draws = (posterior.mean + posterior.noise(training.normal()) for _ in range(num_monte_carlo))
    found = certificate(
        training.classifier.errors(draws),
        np.asarray(posterior.mean, dtype=np.float64),
        np.asarray(posterior.scales, dtype=np.float64),
        np.asarray(prior, dtype=np.float64),
        math.exp(2 * float(training.variables.log_prior)),
        training.classifier.num_examples,
        grid=grid,
        delta=delta,
    )
    arrays = on_callers_axes((posterior.mean, posterior.bases, posterior.scales))
    return PacBayesResult(found, GaussianPosterior(risk.parameters, *arrays), history)


class _Variables(NamedTuple):
    """What is optimized."""

    mean: jax.Array  # (n,)
    log_scales: jax.Array  # (n,), along the bases
    log_prior: jax.Array  # logarithm of the prior's standard deviation


class _Training:
    """The posterior and the prior's scale on their way to the minimum."""

    def __init__(
        self,
        classifier: Classifier,
        prior: jax.Array,
        grid: PriorGrid,
        basis: BasisChoice,
        prior_scale: float,
        seed: int,
    ) -> None:
        self.classifier, self.prior, self.basis = classifier, prior, basis
        self.objective = Objective(grid, classifier.num_examples)
        self.parameters, self._key = classifier.risk.parameters, seed_key(seed)
        mean = self.parameters.ravel(classifier.risk.params).astype(prior.dtype)
        self.bases = choose_bases(classifier.risk, basis)
        floor = smallest_scale(float(jnp.sqrt(jnp.square(mean).mean())))
        lengths = jnp.abs(coordinates_of(self.parameters, self.bases, mean))
        log_prior = jnp.asarray(self.objective.first_log_prior(prior_scale), dtype=prior.dtype)
        self.variables = _Variables(mean, jnp.log(jnp.maximum(lengths, floor)), log_prior)
        self.squares = jax.tree.map(jnp.zeros_like, self.variables)
        key = "pac_bayes", grid, *classifier.kind
        self._step = classifier.risk.kernel(key, lambda: jax.jit(self._stepped))

    def epoch(self, rate: float, batch_size: int) -> np.ndarray:
        """Take a step for each batch, and return averages of what the objective was made of."""
        classifier, number = self.classifier, self.classifier.num_examples
        order = np.asarray(jax.random.permutation(self._new_key(), number))
        fixed = self.prior, classifier.risk.constants
        total = np.zeros(4)
        for start in range(0, number, batch_size):
            chosen = order[start : start + batch_size]
            data = classifier.inputs, classifier.labels
            batch = jax.tree.map(lambda leaf, rows=chosen: leaf[rows], data)
            state = self.variables, self.squares
            (self.variables, self.squares), row = self._step(
                state, fixed, self.bases, self.normal(), batch, rate
            )
            total += np.asarray(row, dtype=np.float64) * (len(chosen) / number)
        return total

    def refresh(self) -> None:
        """Make the basis anew; average what RMSprop knows, as coordinates have other meanings."""
        mean, log_scales, _ = self.variables
        risk = self.classifier.risk
        varying = [block[0] for block in self.parameters.blocks(mean[None, :])]
        bases = choose_bases(risk.at(self.parameters.merge(varying, risk.constants)), self.basis)
        scales = transferred(self.parameters, self.bases, jnp.exp(log_scales), bases)
        self.variables = self.variables._replace(log_scales=jnp.log(scales))
        same = jnp.full_like(scales, self.squares.log_scales.mean())
        self.squares, self.bases = self.squares._replace(log_scales=same), bases

    def posterior(self) -> GaussianPosterior:
        """Return what the variables stand for now."""
        mean, log_scales, _ = self.variables
        return GaussianPosterior(self.parameters, mean, self.bases, jnp.exp(log_scales))

    def normal(self) -> jax.Array:
        """Return new standard normal numbers of shape (n,)."""
        return jax.random.normal(self._new_key(), self.prior.shape, self.prior.dtype)

    def _new_key(self) -> jax.Array:
        self._key, own = jax.random.split(self._key)
        return own

    def _stepped(
        self, state: Any, fixed: Any, bases: Bases, normal: jax.Array, batch: Any, rate: jax.Array
    ) -> tuple[Any, jax.Array]:
        """Take one step of RMSprop, and return what the objective was made of.

        It is compiled for all priors and parameters: of `self` it reads no arrays.
        """
        (variables, squares), most = state, self.objective.largest_log_prior
        objective = jax.grad(self._objective, has_aux=True)
        slopes, row = objective(variables, fixed, bases, normal, batch)
        squares = jax.tree.map(lambda s, g: _DECAY * s + (1 - _DECAY) * g * g, squares, slopes)
        moved = _Variables(
            *jax.tree.map(
                lambda x, g, s: x - rate * g / (jnp.sqrt(s) + _EPSILON), variables, slopes, squares
            )
        )
        return (moved._replace(log_prior=jnp.minimum(moved.log_prior, most)), squares), row

    def _objective(
        self, variables: _Variables, fixed: Any, bases: Bases, normal: jax.Array, batch: Any
    ) -> tuple[jax.Array, jax.Array]:
        (mean, log_scales, log_prior), (prior, constants) = variables, fixed
        noise = rotated(self.parameters, bases, jnp.exp(log_scales) * normal)
        surrogate = self.classifier.surrogate(mean + noise, constants, *batch)
        kl = self.objective.divergence(mean, log_scales, log_prior, prior)
        value = surrogate + self.objective.complexity(kl, log_prior)
        return value, jnp.stack([surrogate, kl, jnp.exp(2 * log_prior), value])
