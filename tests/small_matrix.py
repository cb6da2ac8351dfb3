"""A small matrix with zeros, and the comparison of an operator's products with a dense one."""

import numpy as np

from tests.cases import dense, home

_DENSE = dense(np.linspace(-1.0, 2.0, 6)).round(2)
MATRIX = np.where(np.abs(_DENSE) > 0.2, _DENSE, 0.0)
BLOCK = np.random.default_rng(5).standard_normal((6, 3))


def assert_multiplies_like(operator, matrix, rtol=1e-13):
    """Compare products of one vector and of a block with the dense matrix."""
    space = operator.space
    assert space.dimension == len(matrix)
    for x in (BLOCK[: len(matrix), 0], BLOCK[: len(matrix)]):
        y = operator @ space.from_numpy(x)
        assert tuple(y.shape) == x.shape
        assert y.dtype == space.dtype
        np.testing.assert_allclose(home(y), matrix @ x, rtol=rtol, atol=rtol)
