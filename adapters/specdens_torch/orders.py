"""What is being differentiated at the moment, for layers whose second derivatives are our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_linear_only = False
_within_model = False


@contextmanager
def linear_only() -> Iterator[None]:
    """Differentiate first derivatives in what they are linear in, not where they are taken."""
    global _linear_only
    before, _linear_only = _linear_only, True
    try:
        yield
    finally:
        _linear_only = before


def is_linear_only() -> bool:
    """Return whether only derivatives in what first derivatives are linear in are asked for."""
    return _linear_only


@contextmanager
def within_model() -> Iterator[None]:
    """Evaluate a model and its loss. If they take derivatives, a product takes third ones."""
    global _within_model
    before, _within_model = _within_model, True
    try:
        yield
    finally:
        _within_model = before


def is_within_model() -> bool:
    """Return whether a derivative is taken by the model or its loss, and may be taken thrice."""
    return _within_model
