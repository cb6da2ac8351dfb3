"""Laws that spectra are compared with: bulks, tails, distances to them, and what sticks out."""

from specdens.laws.bulk import MarchenkoPastur, Semicircle
from specdens.laws.distances import Fit, Law, goodness_of_fit
from specdens.laws.gaps import OutlierGap, outlier_gap_test
from specdens.laws.tails import LikelihoodRatio, PowerLaw

__all__ = [
    "Fit",
    "Law",
    "LikelihoodRatio",
    "MarchenkoPastur",
    "OutlierGap",
    "PowerLaw",
    "Semicircle",
    "goodness_of_fit",
    "outlier_gap_test",
]
