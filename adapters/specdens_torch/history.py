"""Records of a spectrum that is followed during training, and the history that they make."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from specdens.arguments import checked_path

_FORMAT = 1
_VECTORS = ("eigenvalues", "residuals", "converged")
_COUNTS = ("step", "num_products")


@dataclass(frozen=True, eq=False)
class SpectrumRecord:
    r"""What a `SpectrumTracker` found at one step; numbers that do not exist are nan.

    Attributes
    ----------
    step : int
    eigenvalues : ndarray of shape (k,)
        The largest ones, largest first, in loss per squared parameter.
    residuals : ndarray of shape (k,)
        ``|A u - lambda u|``: within that distance of each number lies an eigenvalue.
    converged : ndarray of shape (k,)
        Whether each residual is as small as was asked for.
    edge : float
        Largest sharpness at which the optimizer is stable, 2 / learning rate for gradient descent.
    gradient_norm : float
    energy : float
        Share of the gradient's squared norm in the top eigenspace; nan for a zero gradient.
    overlap : float
        Of the top eigenspace with the last one, 1 if they are the same; nan the first time.
    num_products : int
        Products that the eigenpairs took.
    seconds : float
        The whole update took.
    """

    step: int
    eigenvalues: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    edge: float
    gradient_norm: float
    energy: float
    overlap: float
    num_products: int
    seconds: float

    @property
    def sharpness(self) -> float:
        """The largest eigenvalue."""
        return float(self.eigenvalues[0])

    @property
    def ratio(self) -> float:
        """Sharpness over edge: above 1, gradient descent along the top eigenvector grows."""
        return self.sharpness / self.edge

    def __repr__(self) -> str:
        known = "" if math.isnan(self.edge) else f" ({self.ratio:.3f} of the edge {self.edge:.4g})"
        share = "" if math.isnan(self.energy) else f"energy={self.energy:.1%}, "
        overlap = "" if math.isnan(self.overlap) else f"overlap={self.overlap:.3f}, "
        return (
            f"SpectrumRecord(step={self.step}, sharpness={self.sharpness:.5g} ± "
            f"{self.residuals[0]:.1g}{known}, {share}{overlap}"
            f"{int(self.converged.sum())} of {len(self.converged)} converged, "
            f"num_products={self.num_products})"
        )


class SpectrumHistory(Sequence[SpectrumRecord]):
    """The records of a run in the order of their steps: a sequence that does not change.

    Parameters
    ----------
    records : iterable of SpectrumRecord

    Raises
    ------
    ValueError
        If steps do not increase.

    Examples
    --------
    >>> one = np.ones(1)
    >>> record = SpectrumRecord(0, 5 * one, 0 * one, one > 0, 20.0, 1.0, 0.5, np.nan, 12, 0.1)
    >>> history = SpectrumHistory([record])
    >>> history.arrays()["eigenvalues"]
    array([[5.]])
    >>> history
    SpectrumHistory(1 record, step 0, 12 products, all converged)
    """

    def __init__(self, records: Iterable[SpectrumRecord] = ()) -> None:
        self._records = tuple(records)
        for before, after in pairwise(record.step for record in self._records):
            if after <= before:
                msg = f"records: step {after} comes after step {before}; steps must increase."
                raise ValueError(msg)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[SpectrumRecord]:
        return iter(self._records)

    @overload
    def __getitem__(self, index: int) -> SpectrumRecord: ...
    @overload
    def __getitem__(self, index: slice) -> SpectrumHistory: ...
    def __getitem__(self, index: int | slice) -> SpectrumRecord | SpectrumHistory:
        if isinstance(index, slice):
            return SpectrumHistory(self._records[index])
        return self._records[index]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return one array per field, `sharpness` and `ratio`, the records along the first axis.

        Returns
        -------
        dict of str to ndarray
            ``np.savez(path, **history.arrays())`` keeps them. Rows with fewer eigenvalues than
            others end in nan, and in False.
        """
        width = max((len(record.eigenvalues) for record in self), default=0)
        names = [field.name for field in fields(SpectrumRecord)]
        arrays = {}
        for name in [*names, "sharpness", "ratio"]:
            values = [getattr(record, name) for record in self]
            if name in _VECTORS:
                fill = False if name == "converged" else np.nan
                rows = [np.pad(v, (0, width - len(v)), constant_values=fill) for v in values]
                arrays[name] = np.array(rows).reshape(len(self), width)
            else:
                arrays[name] = np.array(values)
        return arrays

    def rows(self) -> list[dict[str, Any]]:
        """Return the records as plain numbers, lists and, for nan and infinity, strings."""
        names = [field.name for field in fields(SpectrumRecord)]
        return [{name: _plain(getattr(record, name)) for name in names} for record in self]

    @classmethod
    def of_rows(cls, rows: Iterable[Mapping[str, Any]]) -> SpectrumHistory:
        """Return the history that `rows` describes.

        Raises
        ------
        KeyError, TypeError, ValueError
            If it describes none.
        """
        return cls(
            SpectrumRecord(**{f.name: _read(f.name, row[f.name]) for f in fields(SpectrumRecord)})
            for row in rows
        )

    def save(self, path: str | Path) -> None:
        """Write the records to `path` as JSON, nan and infinity as strings; complete or not at all.

        Parameters
        ----------
        path : str or Path
        """
        content = {"kind": "spectrum history", "format_version": _FORMAT, "records": self.rows()}
        temporary = Path(f"{path}.part")
        temporary.write_text(json.dumps(content, allow_nan=False, indent=1), encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> SpectrumHistory:
        """Return the history that `save` wrote to `path`, equal to the last bit.

        Parameters
        ----------
        path : str or Path

        Returns
        -------
        SpectrumHistory

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is damaged, holds something else, or was written by a newer version.
        """
        try:
            text = checked_path("path", path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            msg = f"path={str(path)!r}: there is no such file."
            raise FileNotFoundError(msg) from error
        try:
            content = json.loads(text)
            kind, version = content["kind"], int(content["format_version"])
            if kind == "spectrum history" and version <= _FORMAT:
                return cls.of_rows(content["records"])
        except (KeyError, TypeError, ValueError) as error:
            msg = f"path={str(path)!r} is damaged or not a spectrum history ({error!r})."
            raise ValueError(msg) from error
        msg = (
            f"path={str(path)!r} holds a {kind} of format {version}; expected a spectrum history "
            f"of format {_FORMAT} at most."
        )
        raise ValueError(msg)

    def __repr__(self) -> str:
        if not self:
            return "SpectrumHistory(no records)"
        first, last = self[0].step, self[-1].step
        steps = f"step {first}" if len(self) == 1 else f"steps {first} to {last}"
        open_pairs = sum(int((~record.converged).sum()) for record in self)
        pairs = "1 pair" if open_pairs == 1 else f"{open_pairs} pairs"
        done = f"{pairs} not converged" if open_pairs else "all converged"
        count = "1 record" if len(self) == 1 else f"{len(self)} records"
        products = sum(record.num_products for record in self)
        return f"SpectrumHistory({count}, {steps}, {products:,} products, {done})"


def _plain(value: Any) -> Any:
    """Return numbers and arrays as JSON holds them, to the last bit."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(name: str, value: Any) -> Any:
    if name in _VECTORS:
        return np.array(value, dtype=bool if name == "converged" else np.float64)
    return int(value) if name in _COUNTS else float(value)
