"""Stochastic Lanczos quadrature against the exact spectrum: rows G1, G2 and P1.8.

Ghorbani, Krishnan, Xiao (2019, arXiv 1901.10159) compare their density of a network of 15,910
parameters with the exact one by eye; here the distance is a number, on digits, and with
``--nightly`` on a network of that size (about 2 GB, several minutes). Papyan (2019, arXiv
1811.07062) leaves out the reorthogonalization: copies of converged eigenvalues appear, but their
weights add up, so that the density is the same while counts of Ritz values are wrong.
"""

from __future__ import annotations

import sys

import numpy as np
import scipy.linalg
from fixtures import dense, digits_training, mnist_training
from report import Report, parser, run

from specdens import Gaussian, SpectralMeasure, lanczos, slq
from specdens_torch import Hessian

EPOCH = 3  # where outliers and bulk are apart
OUTLIERS = 9  # one fewer than classes


def exact_measure(eigenvalues: np.ndarray) -> SpectralMeasure:
    """Return the measure of equal masses at the eigenvalues."""
    return SpectralMeasure(
        eigenvalues, np.full(eigenvalues.shape, 1 / eigenvalues.size), eigenvalues.size
    )


def smoothing_grid(eigenvalues: np.ndarray, share: float) -> tuple[np.ndarray, Gaussian]:
    """Return a kernel as wide as this share of the range, and a grid that resolves it."""
    width = share * np.ptp(eigenvalues)
    low, high = eigenvalues[0] - 6 * width, eigenvalues[-1] + 6 * width
    return np.linspace(low, high, 1 + int(4 * (high - low) / width)), Gaussian(width)


def density_distance(a: SpectralMeasure, b: SpectralMeasure, eigenvalues, share: float) -> float:
    """Return the L1 distance of two densities of equal smoothing."""
    x, smoothing = smoothing_grid(eigenvalues, share)
    difference = np.abs(a.pdf(x, smoothing).value - b.pdf(x, smoothing).value)
    return float(np.trapezoid(difference, x))


def accuracy(report: Report, fixture: str, found: list[tuple[SpectralMeasure, np.ndarray]]) -> None:
    """G1: densities, and Wasserstein-1 distance, of 10 probes and 80 steps.

    Parameters
    ----------
    report : Report
    fixture : str
        Its letter.
    found : list
        Of pairs of a measure and the exact eigenvalues, ascending.
    """
    for name, read in (("plain", SpectralMeasure.plain), ("outliers exact", lambda m: m)):
        measures = [(read(measure), values) for measure, values in found]
        for share, high in ((0.003, 0.02), (0.01, 0.01)):
            errors = [density_distance(m, exact_measure(v), v, share) for m, v in measures]
            claim = f"{fixture} L1 of densities, width {share:.1%} of range, {name}"
            report.row("G1", claim, errors, high=high)
        distances = [m.distance(v) / np.ptp(v) for m, v in measures]
        report.row("G1", f"{fixture} Wasserstein-1 over range, {name}", distances, high=1e-3)


def density_figure(report: Report, measure: SpectralMeasure, eigenvalues: np.ndarray) -> None:
    """Draw the exact and the estimated density on top of each other."""
    x, smoothing = smoothing_grid(eigenvalues, 0.003)

    exact = exact_measure(eigenvalues).pdf(x, smoothing).value
    top = 10 * exact.max()

    def draw(ax) -> None:
        ax.semilogy(x, exact, label="exact")
        ax.semilogy(x, measure.pdf(x, smoothing).value, "--", label="quadrature")
        ax.set(xlabel="eigenvalue", ylabel="density", ylim=(1e-5, top), title="Hessian, digits")
        ax.legend()

    report.figure("density_exact_and_slq", draw)


def probes_and_steps(report: Report, matrices: list[np.ndarray], spectra: list[np.ndarray]) -> None:
    """G2: steps resolve the density; errors of traces and masses are those of the probes."""
    num_probes, steps = (20, (10, 20, 40)) if report.quick else (60, (10, 20, 40, 80))
    drifts, falls, gains, single = [], [], [], []
    for matrix, values in zip(matrices, spectra, strict=True):
        # Without a common basis every probe has a recurrence of its own, as in the papers.
        settings = {"num_probes": num_probes, "block_size": num_probes, "reorthogonalize": False}
        runs = [slq(matrix, num_steps=m, progress=False, **settings).plain() for m in steps]
        # Of every probe, the relative error of its estimate of the trace.
        errors = [
            len(values) * np.sum(run.nodes * run.weights, axis=1) / values.sum() - 1 for run in runs
        ]
        drifts.append(max(np.abs(error - errors[1]).max() for error in errors[1:]))
        tens = errors[1].reshape(-1, 10).mean(axis=1)
        gains.append(np.sqrt(np.mean(errors[1] ** 2) / np.mean(tens**2)))
        single.append(np.sqrt(np.mean(errors[1] ** 2)))
        distances = [run.distance(values) for run in runs]
        falls.append(distances[0] / distances[-1])
    claim = f"D Wasserstein-1 of {steps[0]} steps over that of {steps[-1]}"
    # The floor is set by the probes: 20 have a higher one than 60.
    report.row("G2", claim, falls, low=1.5 if report.quick else 2)
    report.row("G2", f"D drift of trace errors from {steps[1]} steps on", drifts, high=1e-9)
    report.row("G2", "D rms error of the trace, 1 probe, relative", single)
    # The square root of 10 is 3.16; few groups of ten probes know it to about a third.
    report.row("G2", "D the same over that of 10 probes", gains, low=1.6)


def reorthogonalization(
    report: Report, matrices: list[np.ndarray], spectra: list[np.ndarray]
) -> None:
    """P1.8: without reorthogonalization the same density, but copies of the outliers."""
    num_starts = 1 if report.quick else 2
    for num_steps in (40,) if report.quick else (40, 80, 128):
        distances, kept_counts, fast_counts, merged = [], [], [], []
        for matrix, values in zip(matrices, spectra, strict=True):
            edge = (values[-OUTLIERS] + values[-OUTLIERS - 1]) / 2
            for seed in range(num_starts):
                fast, kept = (
                    lanczos(
                        matrix, seed=seed, num_steps=num_steps, reorthogonalize=r, progress=False
                    )
                    for r in (False, True)
                )
                distances.append(density_distance(fast, kept, values, 0.01))
                kept_counts.append(np.sum(kept.nodes[kept.weights > 0] > edge))
                fast_counts.append(np.sum(fast.nodes[fast.weights > 0] > edge))
                merged.append(np.sum(fast.outliers.eigenvalues > edge))
        when = f"{num_steps} steps"
        report.row("P1.8", f"D L1 of densities, {when}", distances, high=1e-3)
        report.row("P1.8", f"D Ritz values above the bulk, {when}", kept_counts, low=9, high=9)
        report.row("P1.8", "D the same without reorthogonalization", fast_counts, low=10)
        report.row("P1.8", "D the same, copies merged", merged, low=9, high=9)


def claims(report: Report) -> None:
    """Add the rows on digits."""
    hidden = 16 if report.quick else 32
    risks = [digits_training(seed, hidden).risk(EPOCH) for seed in report.seeds]
    matrices = [dense(Hessian(risk)) for risk in risks]
    matrices = [(matrix + matrix.T) / 2 for matrix in matrices]
    spectra = [np.linalg.eigvalsh(matrix) for matrix in matrices]
    measures = [slq(Hessian(risk), num_probes=10, num_steps=80, progress=False) for risk in risks]
    accuracy(report, "D", list(zip(measures, spectra, strict=True)))
    density_figure(report, measures[0], spectra[0])
    probes_and_steps(report, matrices, spectra)
    reorthogonalization(report, matrices, spectra)


def nightly(report: Report) -> None:
    """Add G1 on the 15,910 parameters of fixture M, for one seed."""
    hessian = Hessian(mnist_training(0).risk(EPOCH))
    measure = slq(hessian, num_probes=10, num_steps=80, progress=False)
    matrix = dense(hessian).T  # in the order of columns, which LAPACK overwrites
    values = scipy.linalg.eigvalsh(matrix, overwrite_a=True, check_finite=False)
    accuracy(report, "M", [(measure, values)])


def main(arguments: list[str] | None = None) -> int:
    """Run the rows; return the exit status."""
    options = parser(__doc__)
    options.add_argument("--nightly", action="store_true", help="G1 on 15,910 parameters, too")
    chosen = options.parse_args(arguments)
    return run("slq", [claims, *([nightly] if chosen.nightly else [])], chosen)


if __name__ == "__main__":
    sys.exit(main())
