"""Files of measures: one ``.npz`` of arrays with a JSON header that holds the provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdens.interpretation import rule_from_arrays
from specdens.measure import SpectralMeasure
from specdens.sharpening import Outliers
from specdens.smoothing import describe_smoothing, make_smoothing
from specdens.storage import read_npz, write_npz

_FORMAT = 1


def save(measure: SpectralMeasure, path: str | Path) -> None:
    """Write a measure; `load` gives it back to the last bit."""
    name, parameters = describe_smoothing(measure.smoothing)
    header = {
        "format_version": _FORMAT,
        "dimension": measure.dimension,
        "smoothing": name,
        "smoothing_parameters": parameters,
        "provenance": dict(measure.provenance),
    }
    arrays = {"nodes": measure.nodes, "weights": measure.weights}
    arrays |= {f"outliers_{key}": value for key, value in vars(measure.outliers).items()}
    if measure.rule is not None:
        arrays |= {f"rule_{key}": value for key, value in measure.rule.to_arrays().items()}
    write_npz(path, "measure", header, arrays)


def load(path: str | Path) -> SpectralMeasure:
    """Return the measure that `SpectralMeasure.save` wrote to `path`.

    Parameters
    ----------
    path : str or Path
        The ``.npz`` file.

    Returns
    -------
    SpectralMeasure

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, holds something else, or was written by a newer version.
    """
    header, arrays = read_npz(path, "measure", _FORMAT)
    parts: dict[str, dict[str, Any]] = {"outliers": {}, "rule": {}}
    for name, value in arrays.items():
        prefix, _, key = name.partition("_")
        if key:
            parts[prefix][key] = value
    return SpectralMeasure(
        arrays["nodes"],
        arrays["weights"],
        header["dimension"],
        make_smoothing(header["smoothing"], header["smoothing_parameters"]),
        Outliers(**parts["outliers"]),
        rule_from_arrays(parts["rule"]) if parts["rule"] else None,
        header["provenance"],
    )
