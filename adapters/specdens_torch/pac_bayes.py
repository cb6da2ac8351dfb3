"""PAC-Bayes bounds on the error of a trained classifier, in a basis of the user's choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdens.certificates import Certificate, PacBayesResult, PriorGrid, certificate
from specdens.certificates.checks import check_counts, check_delta, check_positive, check_refresh
from specdens.certificates.fitting import Objective, Schedule, smallest_scale
from specdens_torch.classifier import Classifier, check_prior
from specdens_torch.curvature_bases import choose_bases
from specdens_torch.posterior import (
    Bases,
    GaussianPosterior,
    normal_numbers,
    rotated_noise,
    transferred,
)
from specdens_torch.risk import Risk, check_risk
from specdens_torch.state import left_as_it_was

BasisChoice = str | Mapping[str, Any] | Callable[[Risk], Mapping[str, Any]]


def pac_bayes(
    risk: Risk,
    prior_mean: Tensor | Mapping[str, Tensor],
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
    num_eigenvectors: int = 50,
) -> PacBayesResult:
    r"""Bound the error on new data of a randomized classifier that is fitted for the purpose.

    The classifier draws its parameters anew for every prediction, from
    :math:`N(w, Q \operatorname{diag}(s^2) Q^\top)`. Its mean w, which begins at the model's present
    parameters, its scales s and the prior's variance :math:`\lambda` minimize the surrogate

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
        class and integer labels. Parameters that do not vary must not have learned from these
        data.
    prior_mean : tensor of shape (n,) or state dict
        The parameters before training, as a flat vector (``risk.parameters.ravel()``) or a copy of
        ``model.state_dict()``. A state dict also shows whether anything else was trained.
    basis : str, mapping or callable
        ``"standard"``: independent parameters. ``"kronecker"``: for the weight of a linear layer
        or convolution, the eigenvectors of :math:`E[M] \otimes E[xx^\top]`, and of :math:`E[M]`
        for its bias, see `KroneckerFactors`; the standard basis elsewhere. ``"exact"``: the
        eigenvectors of the Gauss-Newton matrix's diagonal block of each parameter. Or your own, by
        parameter: a matrix with orthonormal columns, or a pair (U, V) for their Kronecker product
        (None for the identity); or a function from the risk to such a mapping.
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
    num_eigenvectors : int
        Leading eigenvectors for a parameter of more than 2,000 entries in the exact basis; the
        directions orthogonal to them share one scale.

    Returns
    -------
    PacBayesResult
        ``bound``, ``certificate``, ``posterior`` (a `GaussianPosterior`) and ``history``.

    Raises
    ------
    ValueError
        If the bound would not hold or not be defined: `prior_mean` equals the trained parameters,
        other parameters or running statistics have learned from the data, examples are left out of
        a pass, the model is not deterministic (see `Risk`), labels are no classes, a basis is not
        orthonormal. Or if an option is out of range, or the optimization diverges.
    TypeError
        If `risk` is not a `Risk`, or a basis is of another type.

    Notes
    -----
    The examples must be independent, and the prior fixed before they were seen; no program can
    check that. The basis may depend on the data, because the prior is isotropic. Q is a constant
    in the gradient, though it depends on w: this makes the minimum worse, not the bound invalid.
    All data are held in memory. Model and global random generators are left as they were.

    References
    ----------
    Dziugaite, Roy (2017), Computing nonvacuous generalization bounds for deep (stochastic) neural
    networks with many more parameters than training data, arXiv 1703.11008.
    Wu, Zhu, Wu, Wang, Ge (2020), Dissecting Hessian, arXiv 2010.04261 (the bases; their
    refreshed scales keep their index instead).

    Examples
    --------
    >>> x = torch.linspace(-1, 1, 400)[:, None]
    >>> model = torch.nn.Linear(1, 1)
    >>> before = {name: torch.zeros_like(p) for name, p in model.state_dict().items()}
    >>> _ = torch.nn.init.constant_(model.weight, 1.0), torch.nn.init.zeros_(model.bias)  # trained
    >>> risk = Risk(model, torch.nn.BCEWithLogitsLoss(), (x, (x > 0).float()))
    >>> result = pac_bayes(risk, before, epochs=30, learning_rate=0.1, num_monte_carlo=500)
    >>> round(result.bound, 1), result.empirical_error < 0.1
    (0.2, True)
    >>> round(result.confidence, 3)
    0.965
    """
    check_risk(risk)
    check_positive("prior_scale", prior_scale)
    check_delta("delta", delta)
    check_counts(num_monte_carlo=num_monte_carlo, num_eigenvectors=num_eigenvectors)
    schedule = Schedule(epochs, learning_rate, batch_size, drops, refresh_every)
    check_refresh(basis, refresh_every)
    devices = {p.device for p in risk.model.parameters()}
    undisturbed = left_as_it_was(risk.model, devices, risk.source.generators, seed)
    with torch.inference_mode(False), torch.enable_grad(), undisturbed:
        prior = check_prior(risk, prior_mean)
        classifier = Classifier.of(risk)

        def bases_at(mean: Tensor) -> Bases:
            with _parameters_at(risk, mean):
                return choose_bases(risk, basis, num_eigenvectors)

        objective = Objective(grid or PriorGrid(), classifier.num_examples)
        problem = _Problem(classifier, prior, objective, bases_at)
        training = _Training(problem, prior_scale, torch.Generator().manual_seed(seed))
        history = schedule.run(training.epoch, training.refresh)
        posterior = training.posterior()
        found = training.certificate(num_monte_carlo, delta)
    return PacBayesResult(found, posterior, history)


@dataclass(frozen=True)
class _Problem:
    """What is minimized over the posterior."""

    classifier: Classifier
    prior: Tensor  # (n,)
    objective: Objective
    bases_at: Callable[[Tensor], Bases]  # of the mean


class _Training:
    """The posterior and the prior's scale on their way to the minimum."""

    def __init__(self, problem: _Problem, prior_scale: float, generator: torch.Generator) -> None:
        self.problem, self.generator = problem, generator
        parameters, objective = problem.classifier.risk.parameters, problem.objective
        self.mean = parameters.ravel().to(problem.prior.dtype)
        self.bases = problem.bases_at(self.mean)
        parts = [self.mean[place] for place in parameters.slices.values()]
        blocks = zip(self.bases.values(), parts, strict=True)
        lengths = torch.cat([basis.lengths(part) for basis, part in blocks])
        floor = smallest_scale(float(self.mean.square().mean().sqrt()))
        self.log_scales = lengths.clamp(min=floor).log()
        self.log_prior = torch.tensor(objective.first_log_prior(prior_scale)).to(self.mean)
        variables = [self.mean, self.log_scales, self.log_prior]
        for variable in variables:
            variable.requires_grad_()
        self.optimizer = torch.optim.RMSprop(variables, alpha=0.9)

    def epoch(self, rate: float, batch_size: int) -> list[float]:
        """Take a step for each batch, and return averages of what the objective was made of."""
        problem, objective = self.problem, self.problem.objective
        classifier = problem.classifier
        self.optimizer.param_groups[0]["lr"] = rate
        counts = torch.cat([basis.multiplicities for basis in self.bases.values()]).to(self.mean)
        total = self.mean.detach().new_zeros(4)
        order = torch.randperm(classifier.num_examples, generator=self.generator)
        for chosen in torch.split(order, batch_size):
            normal = normal_numbers(self.mean, self.generator)
            noise = rotated_noise(self.bases, self.log_scales.exp(), normal)
            surrogate = classifier.surrogate(self.mean + noise, chosen)
            kl = objective.divergence(
                self.mean, self.log_scales, self.log_prior, problem.prior, counts
            )
            value = surrogate + objective.complexity(kl, self.log_prior)
            self.optimizer.zero_grad()
            torch.autograd.backward(value)
            self.optimizer.step()
            with torch.no_grad():
                self.log_prior.clamp_(max=objective.largest_log_prior)
                variance = torch.exp(2 * self.log_prior)
                row = torch.stack([surrogate.detach(), kl.detach(), variance, value.detach()])
                total += row * (len(chosen) / classifier.num_examples)
        return total.tolist()

    def refresh(self) -> None:
        """Make the basis anew; average what RMSprop knows, as coordinates have other meanings."""
        with torch.no_grad():
            bases = self.problem.bases_at(self.mean.detach())
            scales = transferred(self.bases, self.log_scales.exp(), bases)
            self.log_scales.copy_(scales.log())
            squares = self.optimizer.state[self.log_scales]["square_avg"]
            squares.fill_(squares.mean())
        self.bases = bases

    def posterior(self) -> GaussianPosterior:
        """Return what the variables stand for now."""
        parameters = self.problem.classifier.risk.parameters
        return GaussianPosterior(
            parameters, self.mean.detach(), self.bases, self.log_scales.detach().exp()
        )

    def certificate(self, num_monte_carlo: int, delta: float) -> Certificate:
        """Draw classifiers and return the certificate of what the variables stand for now."""
        posterior, problem = self.posterior(), self.problem
        mean, classifier = posterior.mean, problem.classifier
        normals = (normal_numbers(mean, self.generator) for _ in range(num_monte_carlo))
        return certificate(
            classifier.errors(mean + posterior.noise(normal) for normal in normals),
            mean.cpu().double().numpy(),
            posterior.scales.cpu().double().numpy(),
            problem.prior.cpu().double().numpy(),
            math.exp(2 * self.log_prior.item()),
            classifier.num_examples,
            multiplicities=posterior.multiplicities.numpy(),
            grid=problem.objective.grid,
            delta=delta,
        )


@contextmanager
def _parameters_at(risk: Risk, vector: Tensor) -> Iterator[None]:
    """Give the model the parameters of a flat vector for a while."""
    tensors = risk.parameters.tensors
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def assign(values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(values[name])

    try:
        assign(risk.parameters.unravel(vector.detach()))
        yield
    finally:
        assign(before)
