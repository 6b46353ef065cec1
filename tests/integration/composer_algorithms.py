"""Composer's own algorithms beside ours: the one registry of what works beside what.

``python tests/integration/composer_algorithms.py`` runs them all and writes ``docs/beside_composer.md``;
``test_beside_others.py`` holds every one of them to the same promises, and the page to what it says here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer import algorithms as composers
from composer.algorithms.alibi.alibi import Alibi
from composer.algorithms.blurpool import BlurConv2d, BlurMaxPool2d
from composer.algorithms.factorize import FactorizedConv2d, FactorizedLinear
from composer.algorithms.gated_linear_units.gated_linear_unit_layers import BERTGatedFFOutput
from composer.algorithms.ghost_batchnorm.ghost_batchnorm import GhostBatchNorm2d
from composer.algorithms.gyro_dropout.gyro_dropout import GyroDropoutLayer
from composer.algorithms.low_precision_groupnorm import low_precision_groupnorm as groupnorm
from composer.algorithms.low_precision_layernorm import low_precision_layernorm as layernorm
from composer.algorithms.squeeze_excite import SqueezeExciteConv2d
from composer.core import Algorithm, Event, Precision, State
from composer.loggers import Logger
from composer_models import (
    Sentences,
    convolutional,
    digits,
    dropping,
    language,
    normalised,
    pictures,
    residual,
    yes_or_no,
)
from composer_runs import METHODS, PROMISES, Case
from composer_signs import (
    attends_linearly,
    averages,
    channels_last,
    clipped,
    clipped_by_weights,
    drops_blocks,
    drops_samples,
    ends_at_average,
    freezes,
    grows,
    gyro_masks,
    is_a_dummy,
    mixes_targets,
    mixes_the_loss,
    replaced,
    sees_made_up_inputs,
    shapes,
    smooths,
    standardises,
    transformed,
)
from torch import nn

__all__ = ['CASES', 'PAGE', 'document', 'stated']

PAGE = Path(__file__).parents[2] / 'docs' / 'beside_composer.md'


class _AsAtBf16(Algorithm):
    """A LowPrecision algorithm that is told of bf16, which the Trainer refuses on the CPU; at fp32 it does nothing."""

    def __init__(self, apply: Callable[..., Any]):
        self._apply = apply

    def match(self, event: Event, state: State) -> bool:
        del state
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        del event, logger
        self._apply(state.model, precision=Precision.AMP_BF16, optimizers=state.optimizers)


_ONCE = 'It acts on the batch before the step begins; all passes get that batch.'
_REPLAYED = 'It draws anew at every forward; the passes replay the draw.'
_SURGERY = 'It changes the model and the optimizer when the Trainer is made, before the optimizer is wrapped.'
_TOLD = (
    'The Trainer has no amp on the CPU, where it is told of bf16 by hand. It changes layers when the Trainer is made.'
)
_CLIPS = 'It is held back in every pass and acts once, on the direction.'

CASES: dict[str, Case] = {
    'GradientClipping by norm': Case(
        lambda: composers.GradientClipping('norm', 0.05),
        convolutional,
        digits,
        lambda run: clipped(run, torch.linalg.vector_norm),
        _CLIPS,
    ),
    'GradientClipping by value': Case(
        lambda: composers.GradientClipping('value', 0.05),
        convolutional,
        digits,
        lambda run: clipped(run, lambda gradient: gradient.abs().max()),
        _CLIPS,
    ),
    'GradientClipping, adaptive': Case(
        lambda: composers.GradientClipping('adaptive', 0.05), convolutional, digits, clipped_by_weights, _CLIPS
    ),
    'EMA': Case(
        lambda: composers.EMA(half_life='1ba'),
        convolutional,
        digits,
        averages,
        'It averages at the end of batches, when the weights are back.',
    ),
    'SWA': Case(
        lambda: composers.SWA(swa_start='0.3dur', update_interval='1ba', schedule_swa_lr=True, anneal_steps=3),
        convolutional,
        digits,
        ends_at_average,
        'It averages at the end of batches, when the weights are back; its learning rate acts on the base optimizer.',
    ),
    'MixUp': Case(composers.MixUp, convolutional, digits, mixes_targets, _REPLAYED),
    'MixUp of the loss': Case(
        lambda: composers.MixUp(interpolate_loss=True), convolutional, digits, mixes_the_loss, _REPLAYED
    ),
    'CutMix': Case(composers.CutMix, convolutional, digits, mixes_targets, _REPLAYED),
    'CutMix of the loss': Case(
        lambda: composers.CutMix(interpolate_loss=True), convolutional, digits, mixes_the_loss, _REPLAYED
    ),
    'CutOut': Case(composers.CutOut, convolutional, digits, sees_made_up_inputs, _ONCE),
    'LabelSmoothing': Case(
        composers.LabelSmoothing,
        convolutional,
        digits,
        smooths,
        'It smooths before every loss and puts the labels back after it.',
    ),
    'ProgressiveResizing': Case(
        lambda: composers.ProgressiveResizing(delay_fraction=0.2, size_increment=2),
        convolutional,
        digits,
        grows,
        _ONCE,
    ),
    'ProgressiveResizing by crops': Case(
        lambda: composers.ProgressiveResizing('crop', delay_fraction=0.2, size_increment=2),
        convolutional,
        digits,
        grows,
        _ONCE,
    ),
    'RandAugment': Case(
        composers.RandAugment,
        lambda: convolutional(3),
        pictures,
        transformed('RandAugmentTransform'),
        'It augments the data set; all passes get the loaded batch.',
    ),
    'AugMix': Case(
        composers.AugMix,
        lambda: convolutional(3),
        pictures,
        transformed('AugmentAndMixTransform'),
        'It augments the data set; all passes get the loaded batch.',
    ),
    'ColOut': Case(
        lambda: composers.ColOut(0.25, 0.25),
        convolutional,
        digits,
        lambda run: {shape[2:] for shape in shapes(run)} == {(6, 6)},
        _ONCE,
    ),
    'ColOut of single images': Case(
        lambda: composers.ColOut(0.25, 0.25, batch=False),
        lambda: convolutional(3),
        pictures,
        lambda run: {shape[2:] for shape in shapes(run)} == {(6, 6)},
        'It augments the data set; all passes get the loaded batch.',
    ),
    'BlurPool': Case(
        lambda: composers.BlurPool(min_channels=8),
        convolutional,
        digits,
        replaced(BlurConv2d, BlurMaxPool2d),
        _SURGERY,
    ),
    'ChannelsLast': Case(
        composers.ChannelsLast,
        convolutional,
        digits,
        channels_last,
        'Weights, perturbed weights and directions keep their strides.',
    ),
    'StochasticDepth of blocks': Case(
        lambda: composers.StochasticDepth('ResNetBottleneck', 'block', 0.5, 'uniform', '0.5dur'),
        residual,
        digits,
        drops_blocks,
        _REPLAYED,
    ),
    'StochasticDepth of samples': Case(
        lambda: composers.StochasticDepth('ResNetBottleneck', 'sample', 0.5),
        residual,
        digits,
        drops_samples,
        _REPLAYED,
    ),
    'SqueezeExcite': Case(
        lambda: composers.SqueezeExcite(latent_channels=2, min_channels=8),
        convolutional,
        digits,
        replaced(SqueezeExciteConv2d),
        _SURGERY,
    ),
    'GhostBatchNorm': Case(
        lambda: composers.GhostBatchNorm(8),
        convolutional,
        digits,
        replaced(GhostBatchNorm2d),
        f'{_SURGERY} The statistics are those of the first pass.',
    ),
    'LayerFreezing': Case(
        lambda: composers.LayerFreezing(0.0, 1.0),
        convolutional,
        digits,
        freezes,
        'What it takes out of the optimizer is not perturbed any more and does not count in the radius.',
    ),
    'SelectiveBackprop': Case(
        lambda: composers.SelectiveBackprop(start=0.0, end=1.0, keep=0.6, interrupt=0),
        convolutional,
        digits,
        lambda run: {shape[0] for shape in shapes(run)} == {9},
        f'{_ONCE} Its own forward is at the weights before the step.',
        follows_weights=True,
    ),
    'SeqLengthWarmup': Case(
        lambda: composers.SeqLengthWarmup(duration=0.8, min_seq_length=4, max_seq_length=16, step_size=4),
        language,
        Sentences,
        lambda run: sorted({p.inputs[0]['input_ids'].shape[1] for p in run.first_passes}) == [4, 8, 12, 16],
        _ONCE,
    ),
    'WeightStandardization': Case(
        composers.WeightStandardization,
        convolutional,
        digits,
        standardises,
        'The weights before standardisation are the ones perturbed.',
    ),
    'LowPrecisionLayerNorm': Case(
        lambda: _AsAtBf16(layernorm.apply_low_precision_layernorm),
        lambda: normalised(nn.LayerNorm(12)),
        digits,
        replaced(layernorm.LPLayerNorm),
        _TOLD,
    ),
    'LowPrecisionGroupNorm': Case(
        lambda: _AsAtBf16(groupnorm.apply_low_precision_groupnorm),
        lambda: normalised(nn.GroupNorm(3, 12)),
        digits,
        replaced(groupnorm.LPGroupNorm),
        _TOLD,
    ),
    'GyroDropout': Case(
        lambda: composers.GyroDropout(0.5, sigma=27, tau=5),
        dropping,
        digits,
        replaced(GyroDropoutLayer),
        'Its layers count forwards and keep masks in attributes of their own, which are put back between passes.',
        masks=gyro_masks,
    ),
    'Factorize': Case(
        lambda: composers.Factorize(min_channels=8, latent_channels=2, min_features=8, latent_features=2),
        convolutional,
        digits,
        replaced(FactorizedConv2d, FactorizedLinear),
        _SURGERY,
    ),
    'GatedLinearUnits': Case(composers.GatedLinearUnits, language, Sentences, replaced(BERTGatedFFOutput), _SURGERY),
    'Alibi': Case(
        lambda: Alibi(16, 0.5),
        language,
        Sentences,
        attends_linearly,
        f'{_SURGERY} It cuts the batch before the step begins.',
    ),
    'NoOpModel': Case(composers.NoOpModel, convolutional, yes_or_no, is_a_dummy, _SURGERY),
}


# The page.

WORKS = 'works'
# The command that writes the page.
COMMAND = 'python tests/integration/composer_algorithms.py'


def stated(case: Case) -> str:
    """What the registry says of a case, as it stands in the table."""
    return _cell(list(case.broken))


def measured(case: Case, method: str) -> str:
    """What happens, as it stands in the table."""
    broken = []
    for promise, keep in PROMISES.items():
        try:
            keep(case, method)
        except AssertionError:
            broken.append(promise)
        except Exception as error:
            return f'stops with {type(error).__name__}: {error}'
    return _cell(broken)


def _cell(broken: list[str]) -> str:
    return WORKS if not broken else f'does not keep: {"; ".join(broken)}'


def document(cells: dict[str, list[str]]) -> str:
    """The page, from what stands in each row under each method."""
    rows = [
        f'| {name} | {" | ".join(cells[name])} | {": ".join([case.because, *case.broken.values()])} |'
        for name, case in CASES.items()
    ]
    promises = [f'- {promise}' for promise in PROMISES]
    return _PAGE.format(
        promises='\n'.join(promises),
        header=' | '.join(f'with {method}' for method in METHODS),
        ruler='|'.join('---' for _ in METHODS),
        rows='\n'.join(rows),
        callbacks='\n'.join(f'| {name} | {text} |' for name, text in _CALLBACKS.items()),
        command=COMMAND,
    )


_CALLBACKS = {
    'OptimizerMonitor': 'logs the norms of what the base optimizer was given: on a perturbed step the direction, after '
    'clipping; what an optimizer reports of its own state is logged as without us',
    'SpeedMonitor': 'counts batches and samples, not passes; its operations (FLOPs, MFU) are of one pass per batch',
    'MemoryMonitor': 'reports once a batch, after the last pass',
    'LRMonitor': 'logs the same rates under the same name',
    'CheckpointSaver': 'writes the same files at the same batches',
    'EarlyStopper, ThresholdStopper': "judge by the first pass's metrics, those of the weights themselves",
    'NaNMonitor': 'is asked in every pass: a NaN at perturbed weights stops the run before it is stepped on; an '
    'infinite loss there does not',
    'ActivationMonitor, RuntimeEstimator': 'log at the same batches and as often',
}

_PAGE = """# Beside Composer's algorithms and callbacks

Written by `{command}`, which trains every row on the CPU with Composer 0.32;
the tests train them again. A row that works keeps all of these:

{promises}

| algorithm | {header} | because |
|---|{ruler}|---|
{rows}

`composer.algorithms.SAM` and ours at once, or two of ours, are refused with an error that says so.

## Callbacks

Each has its test in `tests/integration/test_callbacks.py`.

| callback | beside us |
|---|---|
{callbacks}

`BATCH_START` and `BATCH_END` are fired once per batch. `BEFORE_TRAIN_BATCH`, `AFTER_TRAIN_BATCH` and the events between
them are fired in every pass; there `state.optimizers[0].pass_index` is the number of the pass, from 0, and -1 on a step
that is not perturbed. So a callback that counts batches by them counts where it is 0 or less.
"""

if __name__ == '__main__':
    PAGE.write_text(document({name: [measured(case, method) for method in METHODS] for name, case in CASES.items()}))
