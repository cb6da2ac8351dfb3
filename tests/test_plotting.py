"""What figures draw: the curve holds the mass it should, stems stand at isolated eigenvalues."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from specdens import Gaussian, rademacher, slq
from specdens.plotting import grid, isolated_outliers, plot_cdf, plot_density
from specdens.testing import spiked_spectrum
from tests.cases import diagonal


@pytest.fixture(scope="module")
def measure():
    return slq(diagonal(spiked_spectrum(500, 5)), num_probes=4, num_steps=40)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("log", [True, False])
def test_curve_and_stems_share_the_mass(measure, log):
    axes = plot_density(measure, log=log, num_points=20000, smoothing=Gaussian(0.01))
    curve, stems = axes.lines
    assert axes.get_yscale() == ("log" if log else "linear")
    np.testing.assert_allclose(stems.get_xdata()[-5:], spiked_spectrum(500, 5)[-5:], rtol=1e-9)
    np.testing.assert_allclose(stems.get_ydata(), 1 / 500)
    area = np.trapezoid(curve.get_ydata(), curve.get_xdata())
    assert area + stems.get_ydata().sum() == pytest.approx(1, abs=0.01)


def test_neighbors_within_six_widths_are_no_stems(measure):
    assert isolated_outliers(measure, Gaussian(1e-5)).sum() > 5
    assert not isolated_outliers(measure, Gaussian(10.0)).any()


def test_the_distribution_function_lies_in_its_drawn_band(measure):
    axes = plot_cdf(measure)
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(1)
    assert len(axes.collections) == 1
    plain = plot_cdf(slq(np.diag(np.arange(9.0)), probes=rademacher))
    assert not plain.collections  # no band without sphere probes


def test_measures_draw_themselves(measure):
    figure, axes = plt.subplots(1, 2)
    assert measure.plot(axes[0]) is axes[0]
    assert measure.plot(axes[1], kind="cdf") is axes[1]
    figure.canvas.draw()


def test_degenerate_spectra_can_be_drawn():
    for matrix in (np.zeros((3, 3)), np.eye(4)):
        slq(matrix).plot().figure.canvas.draw()


def test_points_to_draw_at_cover_the_support(measure):
    x = grid(measure, 400)
    assert (np.diff(x) > 0).all()
    assert x[0] < measure.support[0]
    assert x[-1] > measure.support[1]
