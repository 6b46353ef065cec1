"""The mean loss over a fixed set of samples as a function of the weights: what every diagnostic measures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from composer_sam.diagnostics.checks import Loss, check_count, check_model, check_parameters, checked_loss
from composer_sam.diagnostics.samples import on, read, regrouped
from composer_sam.diagnostics.undisturbed import ModelState, RandomState, exact_kernels
from composer_sam.engine.placement import Placement
from composer_sam.engine.wrappers import layout_of
from composer_sam.vectors import Vector

__all__ = ['Loss', 'Objective']


class Objective:
    r"""The mean loss over a fixed set of samples, as a function of the trainable parameters.

    .. math:: L(w) = \frac{1}{N} \sum_{i=1}^{N} \ell(w; x_i)

    The model is in evaluation mode: BatchNorm uses its running statistics and does not update them, dropout is off, so
    L is a function of w alone. Computed in the weights' precision (no autocast, no TF32), without compiled graphs.

    Args:
        model: a module, or a Composer model. Under DistributedDataParallel every rank calls everything, brings samples
            of its own, and gets the same results: those of one process with all ranks' samples.
        loss: ``loss(model(inputs), targets)``, the mean over a batch's samples or one value for each. A sum
            (``reduction='sum'``) would weigh samples by their batch's size: it is refused where it shows, and gives
            wrong numbers where it does not. None for a Composer model, whose own ``loss`` is measured.
        batches: ``(inputs, targets)``, or for a Composer model what it takes. Read once, until there are enough, and
            kept where they lie; moved to the model's device when used. For results to repeat it must be a fixed set:
            shuffling and augmentation repeat only where they draw from the global random streams, which are set to a
            fixed seed while the batches are read.
        samples: :math:`\ge 1`, how many samples each rank takes at most, the last batch cut; None for all. The first
            dimension of every tensor of a batch must be the samples.
        microbatch: :math:`\ge 1`, larger batches are cut into pieces of at most so many samples. It bounds the memory
            and changes nothing else but rounding.
        process_group: the ranks to sum over where ``model`` is not DistributedDataParallel itself.

    Attributes:
        parameters: the parameters that require a gradient, when this was made.
        names: theirs, in the unwrapped model.
        samples: N, over all ranks.

    Cost:
        A value is a forward over all samples, a gradient a pass, a Hessian product about two to three passes. Memory:
        the graph of one micro-batch (for a Hessian product about three times a training step's), one copy of the
        weights, and the result.

    Raises:
        ValueError: no samples, ``samples`` or ``microbatch`` < 1, nothing to differentiate, parameters sharded by FSDP
            or in half precision, a loss that is a sum, or missing.

    Example:
        >>> import torch
        >>> from composer_sam.diagnostics import Objective
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> batches = [(torch.ones(2, 1), torch.ones(2, 1))]
        >>> objective = Objective(model, torch.nn.functional.mse_loss, batches)   # (w - 1)^2
        >>> objective.value(), objective.gradient()[0].item()
        (4.0, 4.0)
        >>> objective.hessian_product([torch.ones(1, 1)])[0].item()
        2.0
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        batches: Iterable[Any],
        *,
        samples: int | None = None,
        microbatch: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ):
        check_count('samples', samples)
        check_count('microbatch', microbatch)
        self._wrapped = model = _uncompiled(model)
        self._group = process_group
        if isinstance(model, DistributedDataParallel):
            self._group = model.process_group if process_group is None else process_group
            model = _uncompiled(model.module)
        self._model = model
        check_model(model)
        self._loss = checked_loss(model, loss)
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters: tuple[Tensor, ...] = tuple(parameter for _, parameter in named)
        self.names: tuple[str, ...] = tuple(name for name, _ in named)
        check_parameters(named)
        self.layout = layout_of(self.parameters)
        self.device = self.parameters[0].device
        self._devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        self._random: RandomState | None = None  # while undisturbed
        self._linear: bool | None = None  # not known
        randomness = RandomState(self._devices)
        try:
            randomness.fix()  # loaders draw from them
            self._batches = read(batches, samples, microbatch)
        finally:
            randomness.restore()
        self.samples = round(self.over_ranks(sum(size for _, size in self._batches)))
        if self.samples < 1:
            raise ValueError('batches must hold at least one sample, got none (an iterator that was read before?)')

    @classmethod
    def of(
        cls,
        model: nn.Module | Objective,
        loss: Loss | None = None,
        batches: Iterable[Any] | None = None,
        **options: Any,
    ) -> Objective:
        """What the diagnostics take: a model with loss and batches, or the objective made of them before."""
        if isinstance(model, Objective):
            given = [name for name, value in {'loss': loss, 'batches': batches, **options}.items() if value is not None]
            if given:
                raise ValueError(f'an Objective already has {", ".join(given)}: pass it alone, or the model instead')
            return model
        if batches is None:
            raise ValueError('batches must be the samples to measure on, got None')
        return cls(model, loss, batches, **options)

    def value(self) -> float:
        """L(w), summed in fp64. NaN or infinite where the loss is."""
        with self.undisturbed(), torch.no_grad():
            self._restart()
            partial = sum(self._batch_loss(batch).item() * size / self.samples for batch, size in self._batches)
            return self.over_ranks(partial)

    def gradient(self) -> list[Tensor]:
        r""":math:`\nabla L(w)`, one tensor per parameter; zero where the loss does not depend on it."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[float, list[Tensor]]:
        """Both in one pass."""
        with self.undisturbed(), torch.enable_grad():
            self._restart()
            total = self.zeros()
            partial = 0.0
            for batch, size in self._batches:
                loss = self._batch_loss(batch)
                gradients = torch.autograd.grad(_differentiable(loss), self.parameters, allow_unused=True)
                partial += loss.item() * size / self.samples
                _accumulate(total, gradients, size / self.samples)
                del loss, gradients  # one batch's graph at a time
            return self.over_ranks(partial), self._summed(total)

    def hessian_product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        r""":math:`\nabla^2 L(w) \, v`, exact: the gradient is differentiated again, batch by batch.

        A loss that is linear in every parameter has the Hessian zero, and gets it: its gradient has no graph in torch
        and stays the same when the weights move, which is tried, once. A gradient without a graph that does change
        comes from a function whose backward cannot be differentiated, and is an error. Where only some of a model's
        functions are of this kind and say nothing (torch's ``once_differentiable`` does), nobody can tell, and their
        part of the Hessian is missing. Kinks (ReLU) count as flat.

        Args:
            vector: one tensor per parameter, of its shape.

        Raises:
            ValueError: another number of tensors or other shapes; a loss that cannot be differentiated twice.
        """
        directions = self._checked(vector)
        with self.undisturbed(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._restart()
            total = self.zeros()
            rows = 0
            for batch, size in self._batches:
                found, products = self._batch_product(batch, directions)
                rows += found
                _accumulate(total, products, size / self.samples)
                del products
            if not self.over_ranks(float(rows)):
                self._check_linear()
            return self._summed(total)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Evaluation mode inside. At the end, also after an exception, everything is bit for bit as before: weights,
        buffers, gradients, the mode of every submodule, ``requires_grad`` flags and the random streams of Python,
        NumPy and torch. May be nested, also around the other functions: the outermost one does the work."""
        if self._random is not None:
            yield
            return
        randomness = RandomState(self._devices)
        state = ModelState(self._wrapped)
        self._random = randomness
        try:
            with exact_kernels(self._model, self.device):
                state.evaluate(self._wrapped)
                yield
        finally:
            self._random = None
            try:
                state.restore()
            finally:
                randomness.restore()

    @contextlib.contextmanager
    def at(self, offset: Sequence[Tensor] | None) -> Iterator[None]:
        """Weights w + offset inside, w again bit for bit at the end; ``None`` stays at w. May be nested: the inner
        offset is added to where the outer one has put the weights.

        Raises:
            ValueError: another number of tensors than parameters, or other shapes.
        """
        if offset is None:
            yield
            return
        placement = Placement(self.layout)
        vector = self.vector(self._checked(offset))
        try:
            placement.place(vector)
            yield
        finally:
            placement.restore()

    def vector(self, values: Sequence[Tensor]) -> Vector:
        """Tensors, one per parameter, for the mathematics of :mod:`composer_sam.vectors`; shares their memory."""
        return Vector(values, range(len(self.parameters)), self.layout)

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor per parameter as one vector of n numbers."""
        return torch.cat([tensor.detach().reshape(-1).to(self.device) for tensor in tensors])

    def shaped(self, flat: Tensor) -> list[Tensor]:
        """A vector of n numbers as one tensor per parameter; shares its memory where types and devices allow."""
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [part.view_as(p).to(p.device, p.dtype) for part, p in zip(parts, self.parameters, strict=True)]

    def zeros(self) -> list[Tensor]:
        """A zero for every parameter."""
        return [torch.zeros_like(parameter, requires_grad=False) for parameter in self.parameters]

    def gaussian(self, seed: int) -> list[Tensor]:
        """Independent standard normal numbers for every parameter: the same on every rank, and from a random stream of
        their own."""
        generators = {p.device: torch.Generator(p.device).manual_seed(seed) for p in self.parameters}
        return [
            torch.empty_like(p, requires_grad=False).normal_(generator=generators[p.device]) for p in self.parameters
        ]

    def subsets(self, size: int) -> Iterator[Objective]:
        """This rank's samples in the order they came, ``size`` at a time (the last subset may be smaller), each as an
        objective of its own that sums over no other rank."""
        for batches in regrouped(self._batches, size):
            yield Objective(self._model, self._loss, batches)

    @property
    def batches(self) -> list[Any]:
        """This rank's samples, as the micro-batches they are measured in."""
        return [batch for batch, _ in self._batches]

    @property
    def first_rank(self) -> bool:
        """Whether this process is the one to report."""
        return self._group is None or dist.get_rank(self._group) == 0

    def over_ranks(self, number: float) -> float:
        """The sum of every rank's number."""
        return self._summed([torch.tensor(number, dtype=torch.float64, device=self.device)])[0].item()

    # How it does it.

    def _restart(self) -> None:
        if self._random is not None:
            self._random.fix()

    def _batch_loss(self, batch: Any) -> Tensor:
        batch = on(batch, self.device)
        if self._loss is not None:
            inputs, targets = batch
            return self._loss(self._model(inputs), targets).mean()
        found: Any = self._model.loss(self._model(batch), batch)  # pyright: ignore[reportCallIssue]
        # As Composer's Trainer reads it: a tensor, several to be added, or a dictionary that may know the total.
        if isinstance(found, Mapping):
            found = [found['total']] if 'total' in found else list(found.values())
        parts = [found] if isinstance(found, Tensor) else list(found)
        return torch.stack([part.mean() for part in parts]).sum()

    def _batch_product(self, batch: Any, directions: list[Tensor]) -> tuple[int, Sequence[Tensor | None]]:
        """How many of the gradient's tensors have a graph, and one batch's Hessian product."""
        loss = _differentiable(self._batch_loss(batch))
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        rows = [
            (gradient, direction)
            for gradient, direction in zip(gradients, directions, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not rows:
            return 0, [None] * len(self.parameters)
        outputs, weights = zip(*rows, strict=True)
        try:
            products = torch.autograd.grad(outputs, self.parameters, weights, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f'the loss cannot be differentiated twice, which the Hessian needs: {error}. Use functions with a '
                'second derivative, for example attention without a custom kernel'
            ) from error
        return len(rows), products

    def _check_linear(self) -> None:
        """Raise ValueError where the gradient depends on the weights though it has no graph."""
        if self._linear is None:
            before = self.gradient()
            # As far as the weights themselves, so that a change of the gradient cannot hide in rounding.
            length = max(float(parameter.detach().abs().max()) for parameter in self.parameters if parameter.numel())
            with self.at([v * (length or 1.0) for v in self.gaussian(seed=0)]):
                after = self.gradient()
            self._linear = all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(before, after, strict=True))
        if not self._linear:
            raise ValueError(
                'the loss cannot be differentiated twice: its gradient changes with the weights but has no graph, as '
                'from a custom autograd.Function whose backward is not differentiable; write it with torch operations'
            )

    def _checked(self, vector: Sequence[Tensor]) -> list[Tensor]:
        shapes = [tuple(v.shape) for v in vector]
        expected = [tuple(parameter.shape) for parameter in self.parameters]
        if shapes != expected:
            at = next((i for i, (s, e) in enumerate(zip(shapes, expected, strict=False)) if s != e), None)
            what = f'{len(shapes)} tensors' if at is None else f'the shape {shapes[at]} for {self.names[at]!r}'
            right = f'{len(expected)}' if at is None else f'{expected[at]}'
            raise ValueError(f'a vector needs one tensor per parameter in its shape: got {what}, expected {right}')
        return [v.detach().to(p.device, p.dtype) for v, p in zip(vector, self.parameters, strict=True)]

    def _summed(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sum over ranks, one collective per kind of tensor."""
        if self._group is None or dist.get_world_size(self._group) == 1:
            return tensors
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for members in kinds.values():
            flat = _flatten_dense_tensors(members)
            dist.all_reduce(flat, group=self._group)
            torch._foreach_copy_(members, list(_unflatten_dense_tensors(flat, members)))
        return tensors


def _uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped: it holds the same parameters, under their own names."""
    return getattr(model, '_orig_mod', model)


def _differentiable(loss: Tensor) -> Tensor:
    if not loss.requires_grad:
        raise ValueError(
            'the loss does not depend on any trainable parameter as torch sees it: model and loss must not detach'
        )
    return loss


def _accumulate(total: list[Tensor], parts: Sequence[Tensor | None], weight: float) -> None:
    """``total += weight * parts`` in place; a part that is None is zero."""
    pairs = [(t, part) for t, part in zip(total, parts, strict=True) if part is not None]
    if any(part.layout != torch.strided for _, part in pairs):
        raise ValueError('a parameter has a sparse gradient: use nn.Embedding(..., sparse=False)')
    if pairs:
        torch._foreach_add_([t for t, _ in pairs], [part.detach() for _, part in pairs], alpha=weight)
