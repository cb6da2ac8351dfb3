"""Evaluating a model and its loss on chunks of data without touching the model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from specdens_torch.activations import ACTIVATIONS
from specdens_torch.convolution import CONVOLUTIONS
from specdens_torch.guards import Totals, check_not_cached, has_weight_norm, written_silently
from specdens_torch.losses import TermLoss, Terms
from specdens_torch.normalization import ELEMENTARY, NORMALIZATIONS
from specdens_torch.orders import within_model
from specdens_torch.outputs import Cut, cut_outputs
from specdens_torch.parameters import FlatParameters
from specdens_torch.state import wide_dtype
from specdens_torch.structures import Batch, logits_of, move, num_elements, num_examples

#: Functions of torch's and what to call in place of them.
Functions: TypeAlias = Mapping[Any, Callable[..., Any]]


class Evaluation(NamedTuple):
    """A chunk of data, evaluated; what a matrix family differentiates."""

    leaves: tuple[Tensor, ...]  # the selected parameters, in flat order
    outputs: Any  # what the loss saw
    targets: Any
    loss: TermLoss
    terms: Terms
    cut: Cut | None  # the place where outputs and loss were cut apart, if they were
    position: int  # of the first of the terms in the data

    def gradients(self, *, create_graph: bool) -> tuple[Tensor | None, ...]:
        """Return the gradient of the weighted sum of losses by parameter, None where it is zero."""
        return total_gradient(self.terms.weighted, self.leaves, create_graph=create_graph)


def total_gradient(
    losses: Tensor, leaves: Sequence[Tensor], *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradient of the sum of `losses` by leaf, None where it is zero."""
    if not (losses.requires_grad and leaves):
        return (None,) * len(leaves)
    ones = torch.ones_like(losses)
    return torch.autograd.grad(losses, leaves, ones, create_graph=create_graph, allow_unused=True)


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Choose what has right second derivatives, and leave inference mode.

    That is one of the attention kernels, what `torch.compile` was given in place of what it made,
    and replacements for some layers. Products are in it too, not only forward passes, for
    checkpointed layers that run again then.
    """
    # Importing the compiler takes seconds; who has not done so has compiled nothing.
    compiles = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
    with torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH), eager, ExitStack() as stack:
        for context in _replacements(model):
            stack.enter_context(context)
        yield


class _Replaced(TorchFunctionMode):
    """Calls other functions in place of some of torch's own, and `elementary` in transforms.

    Transforms of torch.func know no functions with derivatives of their own.
    """

    def __init__(
        self, functions: Functions, elementary: Functions, modules: Container[nn.Module]
    ) -> None:
        super().__init__()
        self._functions, self._elementary, self._modules = functions, elementary, modules

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.autograd.grad:  # runs outside of this mode, checkpointed layers as well
            with _run_again(self._functions, self._elementary, self._modules):
                return func(*args, **(kwargs or {}))
        func = (self._elementary if _is_transformed() else self._functions).get(func, func)
        return func(*args, **(kwargs or {}))


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextmanager
def _run_again(
    functions: Functions, elementary: Functions, modules: Container[nn.Module]
) -> Iterator[None]:
    """Evaluate modules that a pass back runs again as the model was evaluated at first.

    Their saved tensors take the places of the first ones, so the same functions must save them. A
    pass back may run on threads of its own, one for each device.
    """
    if _waits():  # another mode around this one has seen to it
        yield
        return
    here = threading.local()

    def enter(module: nn.Module, args: Any) -> None:
        if module not in modules:
            return
        here.entered = [*getattr(here, "entered", []), ExitStack()]
        if len(here.entered) == 1:
            here.entered[0].callback(setattr, _pass_back, "waits", _waits())
            _pass_back.waits = False
            known = functions, elementary
            if _is_transformed():  # by `Columns`, which goes on with single columns if refused
                known = (dict.fromkeys(functions, _refused),) * 2
            here.entered[0].enter_context(_Replaced(*known, modules))
            here.entered[0].enter_context(within_model())

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        if module in modules:
            here.entered.pop().close()

    hooks = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    )
    _pass_back.waits = True
    try:
        yield
    finally:
        _pass_back.waits = False
        for hook in hooks:
            hook.remove()


def _refused(*args: Any, **kwargs: Any) -> Any:
    msg = "a layer that runs again takes one column of a product at a time."
    raise RuntimeError(msg)


def _waits() -> bool:
    """Return whether a pass back of this thread waits for modules that run again."""
    return getattr(_pass_back, "waits", False)


_pass_back = threading.local()


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Normalize without the fused kernel, whose second derivative is wrong up to torch 2.13.

    Its derivative holds the norm that the forward pass saved, and differentiating it takes that for
    a constant.
    """
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Have recurrent layers computed by kernels that can be differentiated twice."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _replacements(model: nn.Module) -> list[AbstractContextManager[Any]]:
    """Return the contexts in which all layers of the model have right second derivatives."""
    modules = frozenset(model.modules())
    elementary = dict(ELEMENTARY)
    functions = {**CONVOLUTIONS, **NORMALIZATIONS, **ACTIVATIONS}
    if has_weight_norm(model):
        functions[torch._weight_norm] = elementary[torch._weight_norm] = _weight_norm
    contexts: list[AbstractContextManager[Any]] = [_Replaced(functions, elementary, modules)]
    if any(isinstance(module, nn.RNNBase) for module in modules):
        contexts.append(_without_cudnn())
    return contexts


class Evaluator:
    """A model with its loss, its parameters replaced by aliases and its buffers by copies.

    The aliases share storage and version counter with the parameters, so autograd notices if they
    change while a graph is in use. Only the selected ones require gradients: frozen layers save
    nothing. Whatever a forward pass does to buffers happens to the copies, which are renewed
    before the next chunk.

    With `cuts`, the loss sees copies of the outputs that are leaves of its own graph, so that model
    and loss can be differentiated apart.
    """

    def __init__(
        self, model: nn.Module, loss: TermLoss, parameters: FlatParameters, *, cuts: bool = False
    ) -> None:
        self._model, self._cuts = model, cuts
        self._position = 0
        self._loss = loss
        self._buffers = dict(model.named_buffers())
        self._copies = {name: buffer.detach().clone() for name, buffer in self._buffers.items()}
        self._versions = {name: copy._version for name, copy in self._copies.items()}
        self._written = frozenset(written_silently(model))
        parameters.check_unchanged()
        check_not_cached(model)
        aliases = {name: p.detach() for name, p in model.named_parameters()}
        for name in parameters.names:
            aliases[name].requires_grad_()
        self._aliases = aliases
        self.leaves = tuple(aliases[name] for name in parameters.names)

    @property
    def tensors(self) -> list[Tensor]:
        """The aliases and copies that stand for the model's state."""
        return [*self._aliases.values(), *self._copies.values()]

    def __call__(self, batch: Batch) -> Evaluation:
        """Evaluate one chunk; gradients are recorded if they are enabled."""
        self._renew_buffers()
        args, kwargs = arguments_of(batch.inputs)
        state = {**self._aliases, **self._copies}
        with within_model():
            outputs = functional_call(self._model, state, args, kwargs)
        targets = batch.targets
        logits = logits_of(outputs)
        if logits is not None:  # which a model on several devices returns elsewhere
            targets = move(targets, logits.device)
        cut = None
        if self._cuts:
            outputs, cut = cut_outputs(outputs)
        with within_model():
            terms = self._loss.terms(outputs, targets)
        position = self._position
        self._position += terms.weighted.numel()
        return Evaluation(self.leaves, outputs, targets, self._loss, terms, cut, position)

    def _renew_buffers(self) -> None:
        for name, copy in self._copies.items():
            if copy._version != self._versions[name] or name in self._written:
                self._copies[name] = renewed = self._buffers[name].detach().clone()
                self._versions[name] = renewed._version


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    # The default collate function turns the tuples of a data set into lists.
    if type(inputs) in (tuple, list):
        return tuple(inputs), {}
    return (inputs,), {}


class RunningTotals:
    """Adds up what a pass sees, on the device, so that nothing waits before its end."""

    def __init__(self) -> None:
        self._counts = Totals()
        self._sums: list[Tensor] = []

    def add(self, batch: Batch, terms: Terms) -> None:
        """Count one evaluated chunk."""
        examples = num_examples(batch)
        self._counts += Totals(1 if examples is None else examples, num_elements(batch), 1)
        wide = wide_dtype(terms.weighted.device)
        weighted = terms.weighted.detach()
        parts = [terms.weights.sum(dtype=wide), weighted.sum(dtype=wide)]
        self._sums.append(torch.stack([*parts, weighted.abs().sum(dtype=wide)]))

    def result(self) -> Totals:
        """Return the totals so far, as numbers of the host."""
        total = self._counts
        if self._sums:
            columns = torch.stack(self._sums).cpu().double().sum(0).tolist()
            total += Totals(weight=columns[0], value=columns[1], magnitude=columns[2])
        return total


def totals_of(batch: Batch, terms: Terms) -> Totals:
    """Return what one evaluated chunk adds up to."""
    running = RunningTotals()
    running.add(batch, terms)
    return running.result()


def accumulate(blocks: Sequence[Tensor], pieces: Iterable[Tensor | None]) -> None:
    """Add one piece for each parameter to the blocks of a flat vector; None stands for zeros."""
    for block, piece in zip(blocks, pieces, strict=True):
        if piece is not None:
            block.add_(piece if piece.device == block.device else piece.to(block.device))
