"""What the comparisons with other curvature libraries share: a problem, matrices, errors."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from tests.adapters.torch_cases import classes, mlp
from tests.adapters.torch_dense import example_gradients, second_moment

CE = nn.CrossEntropyLoss()
EXACT = 1e-10  # largest relative error of results that are equal but for rounding
WRONG = 0.01  # smallest relative error of results that are called wrong


def problem():
    """Return a fresh model of 43 parameters, 12 inputs and their labels, in float64."""
    return mlp(), *classes(12)


def batches(inputs, targets, *sizes):
    """Return the data as a list of batches of these sizes."""
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def partly_ignored(labels):
    """Return labels of which four of the first six are ignored, and none of the others."""
    ignored = labels.clone()
    ignored[:4] = -100
    return ignored


def error(matrix, expected):
    """Return the error of a matrix relative to the expected one, in the Frobenius norm."""
    return (torch.linalg.norm(matrix - expected) / torch.linalg.norm(expected)).item()


def columns(operator):
    """Return all columns of an operator that multiplies blocks, (43, 43)."""
    return operator @ torch.eye(43, dtype=torch.float64)


def by_columns(product, dimension=43):
    """Return the matrix of a function of single vectors, (n, n)."""
    columns = [product(unit) for unit in torch.eye(dimension, dtype=torch.float64)]
    return torch.stack(columns, dim=1).detach()


def dense_second_moment(model, inputs, labels):
    """Return the second moment of the gradients of cross-entropy, ignored labels left out."""
    kept = labels != -100
    inputs, labels = inputs[kept], labels[kept]
    gradients = example_gradients(
        model, lambda o, y: F.cross_entropy(o, y, reduction="none"), inputs, labels
    )
    return second_moment(gradients, torch.ones(len(labels), dtype=torch.float64))
