"""What the optimizer benchmarks compare: our methods, other packages' wrappers of the same rules, the floor below them,
and what each rule needs at least.

A variant is a function of a module and of what makes a base optimizer (``make_base(parameters)``); it returns a step,
which takes a closure. The closures are as cheap as real backwards can be, so that what is measured is the optimizer.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from composer.algorithms.sam import SAMOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.workloads import forced_placement, gradient_closure
from composer_sam import AESAM, SAM, LookSAM, RandomSAM, SharpnessAwareOptimizer, registry
from composer_sam.methods.base import SharpnessAware

__all__ = [
    'COMPOSER',
    'METHODS',
    'NEEDS',
    'PEERS',
    'MakeClosure',
    'Need',
    'Peer',
    'Wrap',
    'available_peers',
    'closure_of',
    'curved_closure',
    'hessian_by_hand',
    'ours',
    'passes_by_hand',
    'plain_closure',
    'watched_closure',
]

warnings.filterwarnings('ignore', message=r'Using backward\(\) with create_graph')  # every step here ends its graph

MakeBase: TypeAlias = Callable[..., Optimizer]
Wrap: TypeAlias = Callable[[nn.Module, MakeBase], Callable[[Any], object]]
# Makes a closure for a module's parameters; the optimizer zeroes their gradients.
MakeClosure: TypeAlias = Callable[[nn.Module, Optimizer], Callable[..., Tensor]]


@dataclass(frozen=True)
class Need:
    """What no implementation of a rule can do without, as far as we know a way; one process, no groups.

    Args:
        accesses: reads and writes of one element per parameter, beyond the passes and ``base.step()``. A norm has to
            be known before what is divided by it is used, so nothing is fused over a norm; all else is.
        copies: memory at the peak in copies of the parameters, beyond the base step with the same closure. What the
            rule remembers between steps is in it.
        for_decay: accesses besides, if the base optimizer adds weight decay to the gradient, as SGD does.
    """

    accesses: int
    copies: int
    for_decay: int = 0

    def accesses_with(self, base: str) -> int:
        """Return the accesses with a base optimizer of :data:`~benchmarks.workloads.BASES`."""
        return self.accesses + (self.for_decay if base == 'SGD' else 0)


NEEDS = {
    # N(g): g. Then w + e from g and w, into the memory of g; w stays where it is and is pointed at again.
    'SAM': Need(accesses=1 + 3, copies=1),
    # The same; T is made of w, so that N(T g) reads w too.
    'SAM, adaptive': Need(accesses=2 + 3, copies=1),
    'ASAM': Need(accesses=2 + 3, copies=1),
    # As SAM: the kept gradient at the outputs is not of the parameters' size.
    'FunctionalSAM': Need(accesses=1 + 3, copies=1),
    # As SAM, with no norm to wait for.
    'USAM': Need(accesses=3, copies=1),
    # As SAM: f is made of g wherever g is read, for the length and for e.
    'FisherSAM': Need(accesses=1 + 3, copies=1),
    # In steps of all passes as SAM; q is the square of the norm. A step of one pass only takes q.
    'AESAM': Need(accesses=1 + 3, copies=1),
    'AESAM, one pass': Need(accesses=1, copies=0),
    # In steps of all passes SAM, in the others the base step.
    'RandomSAM': Need(accesses=1 + 3, copies=1),
    # N(v) of the momentum v, then w + e from v and w. Coupled decay acts at w + e: the direction is g~ and its factor
    # times e, from v and g~ where g~ lies.
    'MSAM': Need(accesses=1 + 3, copies=1, for_decay=3),
    # N(d) of the direction before, then w + e from d and w, into the memory of d, as the gradient takes its place.
    'DPSAT': Need(accesses=1 + 3, copies=1),
    # Read g and m, for N(g - sigma m); then, from g, m and w, both w + e into the memory of g and the new m.
    'FriendlySAM': Need(accesses=2 + 5, copies=2),
    # The new average d from g and d, where d lies, and N(d) on the way; then w + e from d and w, into the memory of g.
    'VaSSO': Need(accesses=3 + 3, copies=2),
    # As SAM, but g is kept, w + e gets memory of its own; after the base step w, g and g~ are read and w written.
    'WSAM': Need(accesses=1 + 3 + 4, copies=2),
    # As SAM, but g is kept; the mixture of g and g~.
    'GNP': Need(accesses=1 + 3 + 3, copies=2),
    # The same; e takes the step back along g with it.
    'SAGM': Need(accesses=1 + 3 + 3, copies=2),
    # As SAM, but g is kept; <g, g~> and N(g~) read both; the direction is a sum of g and g~, whose factors are known.
    'GSAM': Need(accesses=1 + 3 + 2 + 3, copies=2),
    # The same; the sum of g and g~ is what is remembered. While w is displaced the old one is not needed: w + e lies
    # in its memory. A step of one pass takes N(g), and adds what is remembered, whose norm is known, to g.
    'LookSAM': Need(accesses=1 + 3 + 2 + 3, copies=2),
    'LookSAM, per tensor': Need(accesses=1 + 3 + 2 + 3, copies=2),
    'LookSAM, one pass': Need(accesses=1 + 3, copies=1),
    # As SAM, but g is kept; then w - e from g and w, and the sum of three gradients. With w displaced again, w - e lies
    # in the memory of g, and the part of the sum that is known, of g and the gradient at w + e, waits.
    'CRSAM': Need(accesses=1 + 3 + 3 + 4, copies=2),
    # e0: N(g0), then w + e0 (3). e1: N(g1 - g0) reads both, then w + e1 from g0, g1, w (4). e2: N(g2), then
    # (w + e1) + e2 where w + e1 lies (3). The end: p = g0 + |b2| g2 and q = b1 g1 + b3 g3 are known by their norms
    # and product (4 reads), then the direction (4 reads, 1 write). With w displaced, g0 and g1 wait for g2, and
    # afterwards p, in the memory of g0, and g1 for g3.
    'GAM': Need(accesses=(1 + 3) + (2 + 4) + (1 + 3) + (4 + 5), copies=3),
    # As SAM; of g only the norm is kept. Then N(g~), and g~ scaled where it lies.
    'SAMDirection': Need(accesses=1 + 3 + 1 + 2, copies=1),
    # The same; g is what is scaled, so it waits for the second pass.
    'SAMMagnitude': Need(accesses=1 + 3 + 1 + 2, copies=2),
    # g + rho h g from g and Hv, where Hv lies. The vectors v and Hv belong to the double backward, which is in the
    # floor's time; the memory is counted beyond a backward that only keeps its graph.
    'SGDHess': Need(accesses=3, copies=2),
}

_AESAM = functools.partial(AESAM, total_steps=1000)
# Where steps differ, those with all passes; and, for what they cost, those with one pass by themselves.
METHODS: dict[str, Callable[[], SharpnessAware]] = {
    **registry,
    'LookSAM': functools.partial(LookSAM, k=1),
    'LookSAM, per tensor': functools.partial(LookSAM, k=1, granularity='tensor'),
    'LookSAM, one pass': functools.partial(LookSAM, k=10**9),
    'AESAM': functools.partial(_AESAM, lambda_1=-10.0, lambda_2=-10.0),
    'AESAM, one pass': functools.partial(_AESAM, lambda_1=10.0, lambda_2=10.0),
    'RandomSAM': functools.partial(RandomSAM, p=1.0),
    'SAM, adaptive': functools.partial(SAM, adaptive=True),
}


def ours(method: str, placement: str = 'default') -> Wrap:
    """Return the step of one of our methods; ``placement`` is as in :func:`~benchmarks.workloads.forced_placement`."""

    def wrap(net: nn.Module, make_base: MakeBase) -> Callable[[Any], object]:
        optimizer = SharpnessAwareOptimizer(make_base(list(net.parameters())), METHODS[method](), net)
        if placement == 'default':
            return optimizer.step

        def step(closure: Any) -> None:
            with forced_placement(placement):
                optimizer.step(closure)

        return step

    return wrap


@dataclass(frozen=True)
class Peer:
    """Another package's wrapper: the rule it computes, a key of ``NEEDS``, and the package's name."""

    rule: str
    package: str
    wrap: Wrap


def _composer(net: nn.Module, make_base: MakeBase) -> Callable[[Any], object]:
    return SAMOptimizer(make_base(list(net.parameters())), rho=0.05).step


def _pytorch_optimizer(name: str, **options: Any) -> Wrap:
    """Through its two calls: its ``step`` wants the first backward done by the caller anyway."""

    def wrap(net: nn.Module, make_base: MakeBase) -> Callable[[Any], object]:
        made = getattr(importlib.import_module('pytorch_optimizer'), name)
        optimizer = made(*([net] if name == 'WSAM' else []), list(net.parameters()), make_base, **options)

        def step(closure: Any) -> None:
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step()

        return step

    return wrap


def _pytorch_optimizers_gsam(foreach: bool | None) -> Wrap:
    """Its closures return the outputs too, and are called without gradients; its scheduler of rho is constant here."""

    def wrap(net: nn.Module, make_base: MakeBase) -> Callable[[Any], object]:
        gsam = importlib.import_module('pytorch_optimizer').GSAM
        parameters, rho = list(net.parameters()), SimpleNamespace(step=lambda: 0.05)
        optimizer = gsam(parameters, make_base(parameters), net, rho, foreach=foreach)

        def step(closure: Any) -> None:
            optimizer.step(torch.enable_grad()(lambda: (None, closure())))

        return step

    return wrap


COMPOSER = "Composer's SAM"
# ``foreach`` is off by default on the CPU, and switched on in the wrapper it is so in its base optimizer too.
_OF_PYTORCH_OPTIMIZER: dict[str, tuple[str, Callable[..., Wrap]]] = {
    'SAM': ('SAM', functools.partial(_pytorch_optimizer, 'SAM', adaptive=False)),
    'SAM, adaptive': ('SAM, adaptive', functools.partial(_pytorch_optimizer, 'SAM', adaptive=True)),
    'WSAM': ('WSAM', functools.partial(_pytorch_optimizer, 'WSAM', adaptive=False)),
    'GSAM': ('GSAM', _pytorch_optimizers_gsam),
    'FriendlySAM': ('FriendlySAM', functools.partial(_pytorch_optimizer, 'FriendlySAM', adaptive=False)),
    'LookSAM': ('LookSAM, per tensor', functools.partial(_pytorch_optimizer, 'LookSAM', k=1, adaptive=False)),
}
PEERS = {
    COMPOSER: Peer('SAM', 'composer', _composer),
    **{
        f"pytorch_optimizer's {name}{', foreach' if foreach else ''}": Peer(
            rule, 'pytorch_optimizer', make(foreach=foreach)
        )
        for name, (rule, make) in _OF_PYTORCH_OPTIMIZER.items()
        for foreach in (None, True)
    },
}


def available_peers() -> list[str]:
    """Return the peers whose package is installed (``pip install pytorch-optimizer``)."""
    return [name for name, peer in PEERS.items() if importlib.util.find_spec(peer.package) is not None]


def passes_by_hand(count: int) -> Wrap:
    """Return the floor: ``passes`` passes and the base optimizer's step; the graph of a gradient is not used."""

    def wrap(net: nn.Module, make_base: MakeBase) -> Callable[[Any], object]:
        parameters = list(net.parameters())
        optimizer = make_base(parameters)

        def step(closure: Any) -> None:
            for _ in range(count):
                closure()
            _drop_graph(parameters)
            optimizer.step()

        return step

    return wrap


def hessian_by_hand(net: nn.Module, make_base: MakeBase) -> Callable[[Any], object]:
    """The floor of a method that differentiates twice: a pass, the Hessian's product with a vector, the base step."""
    parameters = list(net.parameters())
    optimizer = make_base(parameters)

    def step(closure: Any) -> None:
        closure()
        gradients: Any = [parameter.grad for parameter in parameters]
        torch.autograd.grad(gradients, parameters, [torch.ones_like(gradient) for gradient in gradients])
        del gradients
        _drop_graph(parameters)
        optimizer.step()

    return step


def _drop_graph(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.requires_grad:
            parameter.grad = parameter.grad.detach()


def closure_of(method: str) -> MakeClosure:
    """Return what makes the closure that the method needs."""
    made = METHODS[method]()
    if made.backwards_create_graph:
        return curved_closure
    return watched_closure if made.watches_outputs else plain_closure


def plain_closure(net: nn.Module, optimizer: Optimizer) -> Callable[..., Tensor]:
    """Return :func:`~benchmarks.workloads.gradient_closure` of the module's parameters."""
    return gradient_closure(list(net.parameters()), optimizer)


def watched_closure(net: nn.Module, optimizer: Optimizer) -> Callable[..., Tensor]:
    """Return the same with a forward of the module, and a backward from its output, which a method can watch: one
    number in place of what the module computes. The module's own forward is lost."""
    gradients = plain_closure(net, optimizer)
    number = torch.ones((), requires_grad=True)
    vars(net)['forward'] = lambda: number * 1

    def closure(*args: Any, **kwargs: Any) -> Tensor:
        loss = gradients(*args, **kwargs)
        net().backward()
        return loss

    return closure


def curved_closure(net: nn.Module, optimizer: Optimizer) -> Callable[[], Tensor]:
    """Return :func:`plain_closure` with a gradient that can be differentiated again: the Hessian is diagonal, and its
    product with a vector allocates and writes each element once."""
    parameters = list(net.parameters())
    templates = [torch.randn_like(parameter) * 1e-3 for parameter in parameters]

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Any:
            del ctx, inputs
            return tuple(template.clone() for template in templates)

        @staticmethod
        def backward(ctx: Any, *vector: Tensor) -> Any:
            del ctx
            return tuple(torch._foreach_mul(vector, templates))

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            ctx.save_for_backward(*inputs)
            return inputs[0].new_ones(())

        @staticmethod
        def backward(ctx: Any, *outputs: Tensor) -> Any:
            del outputs
            return Gradient.apply(*ctx.saved_tensors)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Any = Loss.apply(*parameters)
        loss.backward(create_graph=True)
        return loss

    return closure
