r"""Passes over the data that see one layer: its inputs, and the curvature in its pre-activations.

For a layer :math:`z = W x` the Gauss-Newton matrix of an example is
:math:`\sum_{s,t} U_s^\top A U_t \otimes x_s x_t^\top` with :math:`U_s` the derivative of the
outputs in :math:`z_s`, :math:`A` the Hessian of its loss in the outputs, and s, t the positions at
which the layer is used. A is a sum of outer products of columns; each is pulled back to z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from specdens_torch.class_products import ClassRows
from specdens_torch.evaluation import Evaluation
from specdens_torch.gauss_newton import loss_gradients
from specdens_torch.guards import Totals
from specdens_torch.hessian import GradientGraph
from specdens_torch.layer_kinds import checked_layer, positions, unfolded
from specdens_torch.risk import Risk, check_risk
from specdens_torch.sampling import SoftmaxRows
from specdens_torch.state import wide_dtype

_MOST_ENTRIES = 2**23  # of unfolded inputs in double precision at a time: 64 MiB


class Column(NamedTuple):
    r"""Derivatives of every example's outputs in z, along two directions that may be one.

    Over all columns, :math:`\sum w a\, b^\top` is :math:`U^\top A U`.
    """

    a: Tensor  # (N, S, m)
    b: Tensor  # (N, S, m); a itself with softmax
    weights: Tensor  # (N,)
    row: int | None  # which row of logits of each example it belongs to, with softmax


class _Call(NamedTuple):
    inputs: Tensor
    edge: GradientEdge | None  # of the pre-activations; None where nothing is recorded
    shape: torch.Size


class LayerPasses:
    """Sweeps over the data of a risk that hand out what one layer saw and did.

    The layer is watched by hooks that are there during a sweep only.

    Parameters
    ----------
    risk : Risk
    layer : str
        Name of a module of the model.
    bias : bool
        Whether the bias varies too, as the weight of one more input that is always 1.

    Attributes
    ----------
    risk : Risk
        With the layer's parameters alone as those that vary.
    shape : tuple of int
        Outputs m and inputs d of the layer, those of a patch for a convolution.

    Raises
    ------
    ValueError
        If the model has no such layer, or of a kind whose matrix is not a sum of
        ``M (x) x x^T``.
    TypeError
        If `risk` is not a `Risk`.
    """

    def __init__(self, risk: Risk, layer: str, *, bias: bool) -> None:
        check_risk(risk)
        if risk.batch_statistics:
            msg = (
                "risk has batch_statistics=True: examples of a batch depend on each other, so that "
                "no example has inputs and derivatives of its own; put batch norm in eval mode."
            )
            raise ValueError(msg)
        self._name, self._bias = layer, bias
        self._module = checked_layer(risk.model, layer, bias=bias)
        weight = self._module.weight
        own = [weight, self._module.bias] if bias else [weight]
        self.risk = risk.restricted(own)
        self.shape = int(weight.shape[0]), weight[0].numel() + bias

    def sweep(self, visit: Callable[[LayerChunk], None]) -> Totals:
        """Evaluate all chunks once, hand each to `visit`, and return what they add up to.

        Raises
        ------
        ValueError
            If the layer is not used in the forward pass, or not example by example.
        """
        unchecked = [True]  # until there was a chunk in which examples could be mixed up

        def look(evaluation: Evaluation) -> None:
            chunk = LayerChunk(self._module, self._name, self._bias, list(calls), evaluation)
            if unchecked and chunk.num_examples > 1:
                chunk.check_examples()
                unchecked.clear()
            visit(chunk)

        with self._recorded() as calls:
            return self.risk.passes.sweep(look, cuts=True)

    @contextmanager
    def _recorded(self) -> Iterator[list[_Call]]:
        """Collect the calls of the layer in the present forward pass of the model."""
        calls: list[_Call] = []

        def begin(module: nn.Module, args: Any) -> None:
            calls.clear()

        def record(module: nn.Module, args: Any, kwargs: dict[str, Any], z: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            # By its edge: an activation in place after the layer does not change what z was.
            edge = get_gradient_edge(z) if z.requires_grad else None
            calls.append(_Call(x.detach(), edge, z.shape))

        start = self.risk.model.register_forward_pre_hook(begin, prepend=True)
        watch = self._module.register_forward_hook(record, prepend=True, with_kwargs=True)
        try:
            yield calls
        finally:
            start.remove()
            watch.remove()


class LayerChunk:
    """What a layer did with one chunk of N examples, at S positions each.

    Attributes
    ----------
    num_examples : int
        N. The first axis of the layer's inputs may hold several rows of each, one after the other.
    weights : tensor of shape (N, T)
        Of the terms of every example's loss.
    """

    def __init__(
        self,
        module: Any,
        name: str,
        bias: bool,
        calls: Sequence[_Call],
        evaluation: Evaluation,
    ) -> None:
        self._module, self._name, self._bias, self._evaluation = module, name, bias, evaluation
        self._calls = [call for call in calls if call.edge is not None]
        if not self._calls:
            msg = (
                f"layer={name!r}: the forward pass does not call this module with gradients; its "
                "weight may be used by the module that holds it, or under torch.no_grad."
            )
            raise ValueError(msg)
        for call in self._calls:
            _check_batched(call, module, name)
        self._rows = self._softmax_rows()
        assert evaluation.cut is not None
        tensors = evaluation.cut.leaves if self._rows is None else (self._rows.logits,)
        sizes = [len(call.inputs) for call in self._calls]
        sizes += [len(t) if t.ndim else 0 for t in (evaluation.terms.weights, *tensors)]
        # A model may merge examples with windows or tokens, in the layer or in its outputs.
        self.num_examples = min(sizes)
        if not self.num_examples or any(size % self.num_examples for size in sizes):
            self._refuse(f"inputs {[tuple(c.inputs.shape) for c in self._calls]}")
        self.weights = evaluation.terms.weights.reshape(self.num_examples, -1)

    def _softmax_rows(self) -> SoftmaxRows | None:
        evaluation = self._evaluation
        if evaluation.loss.softmax is None:
            return None
        return evaluation.loss.softmax(evaluation.outputs, evaluation.targets)

    def blocks(self, entries: int) -> Iterator[slice]:
        """Yield slices of few enough examples, where one needs `entries` numbers."""
        step = max(1, _MOST_ENTRIES // max(entries, 1))
        for start in range(0, self.num_examples, step):
            yield slice(start, start + step)

    @property
    def num_positions(self) -> int:
        """S, over all calls of the layer."""
        m = self._module.weight.shape[0]
        return sum(call.shape.numel() for call in self._calls) // (self.num_examples * m)

    def inputs(self, some: slice) -> Tensor:
        """Return x of some examples, (n, S, d), in double precision."""
        found = []
        for call in self._calls:
            merged = len(call.inputs) // self.num_examples
            own = call.inputs[some.start * merged : some.stop * merged]
            patches = unfolded(self._module, own).to(wide_dtype(own.device))
            found.append(patches.reshape(len(own) // merged, -1, patches.shape[-1]))
        x = torch.cat(found, 1)
        return torch.cat([x, torch.ones_like(x[..., :1])], -1) if self._bias else x

    def columns(self) -> Iterator[Column]:
        r"""Yield the columns of the loss's Hessian, pulled back to z, in double precision.

        Of softmax cross-entropy these are :math:`U^\top (e_c - p)` with the weights
        :math:`\kappa p_c`, one pass back for each logit of an example; of other losses
        :math:`U^\top e_k` and :math:`U^\top A e_k`, two.
        """
        if self._rows is None:
            yield from self._general_columns()
            return
        logits = self._rows.logits.detach()
        attached = self._attached(self._rows.logits)
        moved = logits.movedim(self._rows.axis, -1)
        classes = moved.shape[-1]
        p = torch.softmax(moved, -1, dtype=wide_dtype(moved.device))
        p = p.reshape(self.num_examples, -1, classes)
        weights = p * self._rows.factor.to(p).reshape(self.num_examples, -1, 1)
        for t in range(p.shape[1]):
            for c in range(classes):
                u = torch.zeros_like(p)
                u[:, t] = -p[:, t]
                u[:, t, c] += 1
                cotangent = u.to(logits.dtype).reshape(moved.shape).movedim(-1, self._rows.axis)
                a = self._pulled_back(attached, [cotangent])
                yield Column(a, a, weights[:, t, c], t)

    def _general_columns(self) -> Iterator[Column]:
        attached, leaves, gradients = loss_gradients(self._evaluation, create_graph=True)
        hessian = GradientGraph(leaves, gradients)
        for o, leaf in enumerate(leaves):
            for k in range(leaf.numel() // self.num_examples):
                units = [torch.zeros_like(leaf) for leaf in leaves]
                rows = leaf.new_zeros(self.num_examples, leaf.numel() // self.num_examples)
                rows[:, k] = 1
                units[o] = rows.reshape(leaf.shape)
                curved = hessian(units, range(len(leaves)))
                a = self._pulled_back(attached, units)
                b = self._pulled_back(attached, curved)
                yield Column(a, b, b.new_ones(len(b)), None)

    def memberships(self) -> tuple[Tensor, Tensor]:
        """Return how much every row of logits of each example belongs to each class.

        Returns
        -------
        memberships : tensor of shape (N, T, C)
        weights : tensor of shape (N, C)
            Of each example's terms, by the class they belong to.

        Raises
        ------
        ValueError
            If the loss is not softmax cross-entropy, or its targets are no classes.
        """
        rows, _ = ClassRows.of(self._evaluation, uniform=False)
        identity = torch.eye(rows.num_classes, device=rows.factor.device, dtype=rows.factor.dtype)
        found = rows.memberships.gathered(identity)
        found = found.reshape(self.num_examples, -1, rows.num_classes)
        # The last row of logits of a text predicts nothing: next_token_loss has no term for it.
        missing = found.shape[1] - self.weights.shape[1]
        weights = F.pad(self.weights.to(found), (0, missing))
        return found, torch.einsum("nt,ntc->nc", weights, found)

    def check_examples(self) -> None:
        """Refuse layers and losses in which the first example reaches other rows than its own."""
        if self._rows is None:
            attached, leaves, gradients = loss_gradients(self._evaluation, create_graph=True)
            units = [self._of_first(leaf) for leaf in leaves]
            curved = GradientGraph(leaves, gradients)(units, range(len(leaves)))
            own = self.num_examples
            if any(c is not None and bool(c.reshape(own, -1)[1:].any()) for c in curved):
                self._refuse("a loss of one example depends on the outputs of others")
        else:
            attached, units = self._attached(self._rows.logits), [self._of_first(self._rows.logits)]
        if bool(self._pulled_back(attached, units)[1:].any()):
            self._refuse("outputs of the first example depend on what the layer did for others")

    def _of_first(self, outputs: Tensor) -> Tensor:
        """Return a vector like `outputs` that is nonzero for the first example only."""
        number = outputs.numel() // self.num_examples
        rows = outputs.new_zeros(self.num_examples, number)
        rows[0] = torch.arange(1, number + 1, device=rows.device).cos()
        return rows.reshape(outputs.shape)

    def _attached(self, logits: Tensor) -> list[Tensor]:
        assert self._evaluation.cut is not None
        return list(self._evaluation.cut.behind(logits))

    def _pulled_back(self, outputs: Sequence[Tensor], vectors: Sequence[Tensor | None]) -> Tensor:
        """Return the derivative of ``<outputs, vectors>`` in z, (N, S, m), in double precision."""
        live = [(f, u) for f, u in zip(outputs, vectors, strict=False) if u is not None]
        edges = [call.edge for call in self._calls if call.edge is not None]
        found: Sequence[Tensor | None] = [None] * len(edges)
        if live:
            tensors, cotangents = zip(*live, strict=True)
            found = torch.autograd.grad(
                tensors, edges, cotangents, retain_graph=True, allow_unused=True
            )
        weight = self._module.weight
        parts = []
        for call, z in zip(self._calls, found, strict=True):
            full = weight.new_zeros(call.shape) if z is None else z.detach()
            rows = positions(full, self._module).to(wide_dtype(weight.device))
            parts.append(rows.reshape(self.num_examples, -1, rows.shape[-1]))
        return torch.cat(parts, 1)

    def _refuse(self, reason: str) -> None:
        msg = (
            f"layer={self._name!r}: {reason}; its inputs need the chunk's examples along the first "
            "axis (batch_first=True for transformers), those of one example next to each other, "
            "and examples must not depend on each other."
        )
        raise ValueError(msg)


def _check_batched(call: _Call, module: Any, name: str) -> None:
    needed = 2 if isinstance(module, nn.Linear) else module.weight.ndim
    if call.inputs.ndim < needed:
        msg = (
            f"layer={name!r} was called with inputs of shape {tuple(call.inputs.shape)}, one "
            "example without an axis for examples; keep that axis in the model."
        )
        raise ValueError(msg)
