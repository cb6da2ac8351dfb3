"""Notebook tables: well-formed, escaped, and saying what the numbers say."""

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from specdens import (
    Estimate,
    Outliers,
    SpectralMeasure,
    density,
    eigsh,
    kpm,
    lanczos,
    rademacher,
    slq,
)
from tests.cases import diagonal

EIGENVALUES = np.concatenate([np.linspace(0, 1, 395), [3.0, 4.0, 4.0, 6.0, 9.0]])


@pytest.fixture(scope="module")
def measure():
    return slq(diagonal(EIGENVALUES), num_probes=6, num_steps=40)


def table(result):
    """Return the title, and the rows by name, of a result's HTML, parsed as XML."""
    tree = ElementTree.fromstring(result._repr_html_().replace("<br>", "\n"))
    assert tree.tag == "table"
    rows = {row[0].text: row[1].text for row in tree.find("tbody")}
    return tree.find("caption").text, rows


def test_a_measure_says_what_it_knows(measure):
    title, rows = table(measure)
    assert title == "Spectral measure of 400 eigenvalues"
    assert rows["made by"].startswith("slq, 6 probes x 40 steps, seeds [0]; float64, numpy")
    assert rows["trace"] == str(measure.trace())
    assert rows["between"] == f"{measure.support[0]:.6g} and 9"
    first, second, third, fourth, *_ = rows["resolved"].split("\n")
    assert first == f"{len(measure.outliers)}, largest first:"
    assert second.startswith("9 within")
    assert third.startswith("6 within")
    assert fourth.startswith("4 within")
    assert fourth.endswith(", 2 times")


def test_the_certainty_is_the_half_width_of_the_band(measure):
    at = measure.quantile(np.linspace(0, 1, 101))
    lower, upper = measure.cdf_band(at, 0.95)
    assert f"within ± {(upper - lower).max() / 2:.2g} " in table(measure)[1]["how certain"]
    assert "seed=1" in table(measure)[1]["next"]


def test_few_steps_are_advised_against():
    short = slq(diagonal(EIGENVALUES), num_probes=6, num_steps=4)
    assert table(short)[1]["next"].endswith("more steps")


def test_without_a_band_it_says_so():
    signs = slq(diagonal(EIGENVALUES), num_probes=3, num_steps=10, probes=rademacher)
    moments = kpm(diagonal(EIGENVALUES), num_probes=3, num_moments=20)
    for result in (signs, moments):
        assert "no certified band" in table(result)[1]["how certain"]
    assert "20 moments" in table(moments)[1]["made by"]
    assert table(moments)[1]["resolved"] == "no eigenvalue one by one"


def test_one_vector_has_no_trace():
    _, rows = table(lanczos(diagonal(EIGENVALUES), np.ones(400), num_steps=20))
    assert "trace" not in rows
    assert rows["mean seen"] == f"{EIGENVALUES.mean():.6g}"  # all entries of the vector are equal


@pytest.mark.parametrize("limit", [None, 12])
def test_a_density_says_whether_it_is_accurate(limit):
    result = density(diagonal(EIGENVALUES), tolerance=0.01, max_products=limit)
    word = "reached" if result.accuracy.converged else "not reached"
    assert result.accuracy.converged == (limit is None)
    _, rows = table(result)
    assert rows["how certain"].endswith(f"(tolerance 0.01 {word})")
    assert ("max_products" in rows["next"]) == (limit is not None)


def test_measures_made_by_hand():
    title, rows = table(SpectralMeasure(np.array([[1.0, 3.0]]), np.array([[0.5, 0.5]]), 4))
    assert title.endswith("of 4 eigenvalues")
    assert rows["made by"] == "1 probe x 2 nodes"


def test_texts_from_files_are_escaped(measure):
    evil = replace(
        measure, provenance={**measure.provenance, "device": "<script>alert(1)</script>"}
    )
    assert "<script>" not in evil._repr_html_()
    assert table(evil)[1]["made by"].endswith("<script>alert(1)</script>")


def test_eigenpairs_list_the_largest_first():
    pairs = eigsh(diagonal(EIGENVALUES), 8, tol=1e-9)
    title, rows = table(pairs)
    assert title == "8 eigenpairs of a matrix of dimension 400"
    lines = rows["eigenvalues"].split("\n")
    assert [line.split()[0] for line in lines[:4]] == ["9", "6", "4", "4"]
    assert lines[-1] == "and 2 more"
    assert rows["converged"] == "8 of 8"
    assert "deflate=result" in rows["next"]


def test_pairs_that_have_not_converged_tell_how_to_go_on():
    pairs = eigsh(diagonal(EIGENVALUES), 8, max_products=10)
    _, rows = table(pairs)
    assert rows["converged"].startswith(f"{pairs.converged.sum()} of ")
    assert "start=result.eigenvectors" in rows["next"]


def test_short_texts():
    assert repr(Estimate(np.float64(3.14159), np.float64(0.012))) == "Estimate(3.142 ± 0.012)"
    assert repr(Estimate(np.ones(2), np.zeros(2))).startswith("Estimate(value=[1. 1.]")
    found = Outliers(np.arange(3.0), np.full(3, 1e-9), np.ones(3), np.zeros(3))
    assert repr(found) == "Outliers(3 eigenvalues [0. 1. 2.], within 1e-09)"
    assert repr(Outliers.none()) == "Outliers(0 eigenvalues [], within 0)"
