"""Claims of papers on the spectra of networks, tried on scikit-learn's digits.

    pip install ".[examples]" && python examples/papers/digits.py

Every line is a claim: its id, what was measured, the range over three seeds and several epochs,
what is accepted, PASS or FAIL. A few minutes on one core; ``--quick`` is one seed and few epochs.
The claims are those of Papyan (2019, arXiv 1811.07062), rows P, and (2020, arXiv 2008.11865), rows
T, Sagun et al. (2017, arXiv 1706.04454), rows S, Ghorbani et al. (2019, arXiv 1901.10159), rows G,
and Wu et al. (2020, arXiv 2010.04261), rows W, each in its own module.
"""

from __future__ import annotations

import sys

import density_ghorbani
import eigenvalues_sagun
import layers_wu
import spectra_papyan
import structure_papyan
from report import parser, run

PAPERS = (spectra_papyan, eigenvalues_sagun, density_ghorbani, structure_papyan, layers_wu)


def main(arguments: list[str] | None = None) -> int:
    """Run the rows of all papers; return the exit status."""
    parts = [paper.claims for paper in PAPERS]
    return run("digits", parts, parser(__doc__).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
