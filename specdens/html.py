"""Results in a few lines, or as small HTML tables for notebooks: what it is and how certain."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from specdens.bands import probe_radius

if TYPE_CHECKING:
    from specdens.measure import SpectralMeasure

_SHOWN = 6  # eigenvalues listed one by one
_CONFIDENCE = 0.95
_CELL = "text-align: left; vertical-align: top; padding: 0.15em 1.2em 0.15em 0"


def measure_text(measure: SpectralMeasure) -> str:
    """Return a measure in three lines.

    Parameters
    ----------
    measure : SpectralMeasure

    Returns
    -------
    str

    Examples
    --------
    >>> from specdens.measure import SpectralMeasure
    >>> measure = SpectralMeasure(np.array([[1.0, 3.0]]), np.array([[0.5, 0.5]]), dimension=4)
    >>> print(measure_text(measure))
    SpectralMeasure of n=4 eigenvalues in [1, 3]
      1 probe x 2 nodes, 0 eigenvalues resolved
      trace 8 (one probe: no standard error), smoothing Gaussian(width=1.0)
    """
    low, high = measure.support
    size = f"{_plural(measure.num_probes, 'probe')} x {_plural(measure.nodes.shape[1], 'node')}"
    total = f"trace {measure.trace()}"
    if measure.provenance.get("isotropic") is False:  # what given vectors see is no trace
        total = f"mean seen {measure.moment(1).value:.6g}"
    return (
        f"SpectralMeasure of n={measure.dimension} eigenvalues in [{low:.6g}, {high:.6g}]\n"
        f"  {size}, {_plural(len(measure.outliers), 'eigenvalue')} resolved\n"
        f"  {total}, smoothing {measure.smoothing}"
    )


def measure_html(measure: SpectralMeasure) -> str:
    """Return a measure as a table.

    Parameters
    ----------
    measure : SpectralMeasure

    Returns
    -------
    str
        One ``<table>``; everything that is not a number is escaped.

    Examples
    --------
    >>> from specdens.measure import SpectralMeasure
    >>> measure = SpectralMeasure(np.array([[1.0, 3.0]]), np.array([[0.5, 0.5]]), dimension=4)
    >>> "4 eigenvalues" in measure_html(measure)
    True
    """
    low, high = measure.support
    single = measure.provenance.get("isotropic") is False
    width = _half_width(measure)
    rows: list[tuple[str, str | list[str]]] = [
        ("made by", _made_by(measure)),
        ("between", f"{low:.6g} and {high:.6g}"),
    ]
    if single:
        rows.append(("weights", "those of the vectors given, not 1/n for each eigenvalue"))
        rows.append(("mean seen", f"{measure.moment(1).value:.6g}"))
    else:
        rows.append(("trace", str(measure.trace())))
    rows.append(("resolved", _resolved(measure)))
    rows.append(("how certain", _certainty(measure, width)))
    rows.append(("next", _advice(measure, width)))
    return _table(f"Spectral measure of {measure.dimension:,} eigenvalues", rows)


def eigenpairs_html(result: Any) -> str:
    """Return eigenpairs as a table.

    Parameters
    ----------
    result : EigenResult

    Returns
    -------
    str
        One ``<table>``.
    """
    done, count = int(np.sum(result.converged)), len(result.eigenvalues)
    listed = [
        f"{value:.10g} within {bound:.1g}"
        for value, bound in zip(result.eigenvalues, result.residuals, strict=True)
    ]
    rows: list[tuple[str, str | list[str]]] = [
        ("eigenvalues", _shortened(listed[::-1])),
        ("converged", f"{done} of {count}"),
        ("products", f"{result.num_products:,}"),
        ("how certain", "within its bound of each number lies an eigenvalue, up to rounding"),
    ]
    if done == count:
        rows.append(("next", "take them out: slq(A, deflate=result), kpm(A, deflate=result)"))
    else:
        rows.append(("next", "go on: eigsh(A, ..., start=result.eigenvectors)"))
    title = f"{count} eigenpairs of a matrix of dimension {result.eigenvectors.shape[0]:,}"
    return _table(title, rows)


def _made_by(measure: SpectralMeasure) -> str:
    told = measure.provenance
    degree = "num_moments" if "num_moments" in told else "num_steps"
    probes = _plural(measure.num_probes, "probe")
    if degree not in told:
        return f"{probes} x {_plural(measure.nodes.shape[1], 'node')}"
    work = f"{told.get('method')}, {probes} x {told[degree]} {degree.removeprefix('num_')}"
    where = f"{told.get('dtype')}, {told.get('backend')} on {told.get('device')}"
    return f"{work}, seeds {told.get('seeds')}; {where}"


def _resolved(measure: SpectralMeasure) -> str | list[str]:
    found = measure.outliers
    if not len(found):
        return "no eigenvalue one by one"
    largest = np.argsort(-np.abs(found.eigenvalues), kind="stable")
    listed = []
    for i in largest:
        times = found.multiplicities[i]
        copies = "" if times == 1 else f", {times:.3g} times"
        listed.append(f"{found.eigenvalues[i]:.10g} within {found.bounds[i]:.1g}{copies}")
    return [f"{len(found)}, largest first:", *_shortened(listed)]


def _certainty(measure: SpectralMeasure, width: float | None) -> str:
    accuracy = measure.accuracy
    if accuracy is not None:
        met = "reached" if accuracy.converged else "not reached"
        return (
            f"average distance to the truth about {accuracy.total:.2g} of the range "
            f"(tolerance {accuracy.tolerance:g} {met})"
        )
    if width is None:
        return "standard errors are those of the probes; no certified band"
    return (
        f"distribution function within ± {width:.2g} at each of its percentiles, "
        f"{_CONFIDENCE:.0%} confidence"
    )


def _half_width(measure: SpectralMeasure) -> float | None:
    """Return half the width of the certified band at the percentiles; None without a band."""
    try:
        at = measure.quantile(np.linspace(0, 1, 101))
        lower, upper = measure.cdf_band(at, _CONFIDENCE)
    except ValueError:  # other probes, or moments
        return None
    return float(np.max(upper - lower)) / 2


def _advice(measure: SpectralMeasure, width: float | None) -> str:
    told = measure.provenance
    if told.get("isotropic") is False or measure.rule is None:
        return "measure.plot(), measure.save(path)"
    accuracy = measure.accuracy
    if accuracy is not None:
        if accuracy.converged:
            return "measure.plot(), measure.save(path)"
        more = "probes" if accuracy.statistical > accuracy.quadrature else "steps"
        return f"more {more} would help most: a larger max_products"
    another = f"seed={max(told.get('seeds', [0])) + 1}"
    if width is None:
        return f"measure.plot(); for smaller errors, measure.extend of a run with {another}"
    freedoms = 2 if told["complex"] else 1
    radius = probe_radius(measure.dimension, measure.num_probes, _CONFIDENCE, freedoms)
    if width > 2 * radius:
        return "measure.plot(); for a narrower band, more steps"
    return f"measure.plot(); for a narrower band, measure.extend(slq(A, {another}))"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _shortened(lines: list[str]) -> list[str]:
    if len(lines) <= _SHOWN:
        return lines
    return [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"]


def _table(title: str, rows: Iterable[tuple[str, str | list[str]]]) -> str:
    body = []
    for name, text in rows:
        lines = [text] if isinstance(text, str) else text
        cell = "<br>".join(escape(line) for line in lines)
        body.append(
            f'<tr><th style="{_CELL}">{escape(name)}</th><td style="{_CELL}">{cell}</td></tr>'
        )
    head = f'<caption style="{_CELL}; font-weight: bold">{escape(title)}</caption>'
    return f"<table>{head}<tbody>{''.join(body)}</tbody></table>"
