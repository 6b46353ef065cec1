"""What a recipe may say, and the one line a mistake in it gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from composer_sam.methods import SAM, registry
from composer_sam.recipes import Recipe, RecipeError, is_override, load_recipe
from composer_sam.recipes.components import build_components, build_optimizer
from composer_sam.recipes.schema import ImageFolder

YAMLS = Path(__file__).parents[2] / 'yamls'
DIGITS = YAMLS / 'digits' / 'sgd.yaml'
ON_CPU = ['device=cpu', 'precision=fp32']
OVERLAYS = sorted((YAMLS / 'methods').glob('*.yaml'))  # no recipes of their own: tests/integration/test_recipes.py
RECIPES = sorted(set(YAMLS.rglob('*.yaml')) - set(OVERLAYS))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


PLAIN = ('sgd_early', 'adamw', 'gpu_60m', 'finetune', 'gpu_finetune')


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path, overrides=ON_CPU)
    methods = [
        type(algorithm) for algorithm in build_components(recipe).algorithms if type(algorithm).__name__ in registry
    ]
    plain = path.stem.split('_')[-1] == 'sgd' or path.stem in PLAIN
    assert len(methods) == (0 if plain else 1)
    assert (SAM in methods) == (path.stem in ('sam', 'sam_last', 'resnet18_sam', 'resnet50_sam_interval10'))


@pytest.mark.parametrize('path', sorted(YAMLS.rglob('*.yaml')), ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_every_key_of_a_shipped_recipe_is_commented(path: Path) -> None:
    lines = path.read_text().splitlines()
    silent = [
        line
        for before, line in zip(['', *lines], lines, strict=False)
        if line.split('#')[0].strip() and '#' not in line and not before.startswith('#')
    ]
    # A section's or component's own name explains itself, as do the standard arguments of an optimizer.
    methods = [f'{overlay.stem}:' for overlay in OVERLAYS]
    allowed = ('data:', 'model:', 'optimizer:', 'scheduler:', 'algorithms:', 'speed_monitor:', *methods)
    standard = ('lr:', 'momentum:', 'weight_decay:', 'name:')
    assert [line for line in silent if not line.strip().startswith((*allowed, *standard))] == []


@pytest.mark.parametrize('name', ['resnet18_sgd', 'resnet18_sam'])
def test_cifar_recipes_take_an_image_folder_by_two_overrides(name: str) -> None:
    recipe = load_recipe(YAMLS / 'cifar10' / f'{name}.yaml', overrides=['data.name=image_folder', 'data.root=photos'])
    assert isinstance(recipe.data, ImageFolder)
    assert (recipe.data.name, recipe.data.root) == ('image_folder', 'photos')


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('sedd=3', r'^sedd: unknown key \(value 3\); did you mean seed\?$'),
        ('seed=true', r'^seed: got True, should be a valid integer$'),
        ('seed=-1', r'^seed: got -1, should be greater than or equal to 0$'),
        ('max_duration=soon', r"^max_duration: 'soon' is not a duration; write '90ep'"),
        ('max_duration=0ep', r"^max_duration: '0ep' must be > 0$"),
        ('precision=fp31', r"^precision: got 'fp31', should be 'fp32', 'amp_bf16'"),
        ('precision=amp_bf16', r"^precision: 'amp_bf16' does not run on the CPU; choose 'fp32'$"),
        ('data=null', r'^data: is required$'),
        ('data.name=digit', r"^data.name: unknown name \(value 'digit'\); did you mean digits\?$"),
        ('data.name=null', r'^data.name: is required; valid: cifar10, cifar100, digits, image_folder, text$'),
        ('data.batch_sise=64', r'^data.batch_sise: unknown key \(value 64\); did you mean batch_size'),
        ('model={name: wide_resnet, depth: 12}', r'^model.depth: got 12, should be one of 10, 16, 22, 28'),
        ('data.validation_fraction=1.0', r'^data.validation_fraction: got 1.0, should be less than 1$'),
        ('data.batch_size=0', r'^data.batch_size: got 0, should be greater than 0$'),
        ('data.label_noise=1.0', r'^data.label_noise: got 1.0, should be less than 1$'),
        ('data.batch_size="64"', r"^data.batch_size: got '64', should be a valid integer$"),
        ('model.hidden=[3,a]', r"^model.hidden: got \[3, 'a'\], should be a valid integer$"),
        ('model.name=resnet19', r"^model.name: unknown name \(value 'resnet19'\); did you mean .*resnet"),
        ('optimizer.name=adamm', r"^optimizer.name: unknown name \(value 'adamm'\); did you mean .*Adam"),
        ('optimizer.name=null', r'^optimizer.name: is required; valid: .*AdamW'),
        ('optimizer.learning_rate=1', r'^optimizer.learning_rate: unknown key \(value 1\); valid: .*lr, '),
        ('optimizer.lr=fast', r"^optimizer.lr: must be a number, got 'fast'$"),
        ('optimizer.lr=.nan', r'^optimizer.lr: must be a number, got nan$'),
        ('algorithms.sam.rho=nan', r"^algorithms.sam.rho: must be a number, got 'nan'$"),
        ('optimizer.nesterov=3', r'^optimizer.nesterov: must be true or false, got 3$'),
        ('optimizer.lr=-1', r'^optimizer: Invalid learning rate: -1'),
        ('optimizer.params=[]', r'^optimizer.params: is filled in by the recipe itself'),
        ('scheduler.t_max=1du', r"^scheduler.t_max: '1du' is not a duration"),
        ('scheduler.t_maxx=1dur', r"^scheduler.t_maxx: unknown key \(value '1dur'\); did you mean t_max\?$"),
        ('algorithms.sma.rho=1', r"^algorithms.sma: unknown name \(value 'sma'\); did you mean .*SAM"),
        ('algorithms.sam.roh=1', r'^algorithms.sam.roh: unknown key \(value 1\); did you mean rho'),
        ('algorithms.sam.rho=-0.1', r'^algorithms.sam: rho must be .*> 0, got -0.1$'),
        ('algorithms.sam.interval=0', r'^algorithms.sam: interval must be an integer >= 1, got 0$'),
        ('algorithms.sam.start=soon', r"^algorithms.sam.start: 'soon' is not a duration"),
        ('algorithms.sam.schedules=3', r'^algorithms.sam.schedules: must be a scheduler for each hyper-parameter'),
        ('algorithms.sam.schedules.roh={linear: {}}', r'^algorithms.sam.schedules.roh: .*; did you mean rho\?$'),
        (
            'algorithms.sam.schedules.rho=0.5',
            r'^algorithms.sam.schedules.rho: must be one scheduler by name, .*, got 0.5$',
        ),
        (
            'algorithms.sam.schedules.rho={linear: {}, step: {}}',
            r'^algorithms.sam.schedules.rho: must be one scheduler',
        ),
        ('algorithms.sam.schedules.rho.linaer={}', r'^algorithms.sam.schedules.rho.linaer: .*; did you mean .*Linear'),
        ('algorithms.sam.schedules.rho.linear=3', r'^algorithms.sam.schedules.rho.linear: must be a mapping'),
        ('algorithms.sam.schedules.rho.linear.t_maxx=1ep', r'^algorithms.sam.schedules.rho.linear.t_maxx: .* t_max\?$'),
        (
            'algorithms.sam.schedules.rho.linear.t_max=1e',
            r"^algorithms.sam.schedules.rho.linear.t_max: '1e' is not a dur",
        ),
        ('algorithms.sam.parameters="("', r"^algorithms.sam: parameters must be a regular expression, got '\('"),
        ('algorithms.sam.parameters=3', r'^algorithms.sam.parameters: must be a text, got 3$'),
        (
            'algorithms.sam.multipliers={weight: much}',
            r"^algorithms.sam.multipliers: must be a mapping from a text to a number, got \{'weight': 'much'\}$",
        ),
        (
            'algorithms.sam.multipliers={weight: -1}',
            r"^algorithms.sam: multipliers\['weight'\] must be a finite number >= 0, got -1.0$",
        ),
        ("algorithms.sam.multipliers={'(': 1}", r"^algorithms.sam: multipliers: '\(' is no regular expression"),
        ('algorithms.sam.ascent_steps=0', r'^algorithms.sam: ascent_steps must be an integer >= 1, got 0$'),
        ('algorithms.look_sam.k=2.0', r'^algorithms.look_sam.k: must be an integer, got 2.0$'),
        ('algorithms.aesam.total_steps=9ba', r"^algorithms.aesam.total_steps: must be an integer, got '9ba'$"),
        ('algorithms.functional_sam.output=3', r'^algorithms.functional_sam.output: must be a text, got 3$'),
        ('algorithms.random_sam.seed=-1', r'^algorithms.random_sam: seed must be an integer >= 0, got -1$'),
        ('algorithms.msam.sync_first_pass=true', r'^algorithms.msam: sync_first_pass=True means nothing to MSAM'),
        ('algorithms.mixup=3', r'^algorithms: got .*should be a valid dictionary$'),
        ('algorithms.sam=null', r'^algorithms.sam: null in the command line removes an inherited component'),
        (
            'callbacks.speed_monitor.window_size=wide',
            r"^callbacks.speed_monitor.window_size: must be an integer, got 'wide'$",
        ),
        (
            'callbacks.sharpness_monitor.probs=9',
            r'^callbacks.sharpness_monitor.probs: unknown key .*did you mean probes',
        ),
        (
            'callbacks.sharpness_monitor.k=two',
            r"^callbacks.sharpness_monitor.k: must be an integer, got 'two'$",
        ),
        (
            'callbacks.sharpness_monitor.probes=2',
            r'^callbacks.sharpness_monitor: probes must be an integer >= 6, got 2$',
        ),
        ('callbacks.threshold_stopper={}', r'^callbacks.threshold_stopper.monitor: is required by ThresholdStopper$'),
        ('loggers.csv={}', r'^loggers.csv: unknown name \(value .csv.\); .*File.*Tensorboard.*WandB'),
        ('trainer.progres_bar=true', r'^trainer.progres_bar: unknown key \(value True\); did you mean .*progress_bar'),
        ('trainer.max_duration=1ep', r"^trainer.max_duration: write max_duration instead \(value '1ep'\)$"),
        ('trainer.load_path=x', r"^trainer.load_path: write load_path instead \(value 'x'\)$"),
        ('trainer.optimizers=x', r"^trainer.optimizers: write optimizer instead \(value 'x'\)$"),
        ('parallelism.fsdp.shards=2', r'^parallelism.fsdp.shards: unknown key \(value 2\)'),
        ('load_path=nowhere.pt', r"^load_path: 'nowhere.pt' does not exist$"),
        ('save_folder=s3://bucket/runs', r"^save_folder: 's3://bucket/runs' is not a local directory"),
        ('autoresume=true', r'^autoresume: true needs a save_folder to resume from$'),
        ('name=${sed}', r'^name: '),
        ('run_name=???', r'^run_name: '),
        ('just.a.key', r"^override 'just.a.key' is not of the form dotted.key=value$"),
    ],
)
def test_a_mistake_is_one_line_naming_key_value_and_remedy(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(DIGITS, overrides=[override])
    assert '\n' not in str(caught.value)


def test_two_spellings_of_one_component_are_refused() -> None:
    with pytest.raises(RecipeError, match=r'names the same component as callbacks\.lr_monitor'):
        load_recipe(DIGITS, overrides=['callbacks.lr_monitor={}', 'callbacks.LRMonitor={}'])


def test_names_ignore_case_and_underscores_and_ours_come_first() -> None:
    overrides = [
        'algorithms.Sam.rho=0.3',
        'algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 1.0}',
    ]
    overrides += ['optimizer={name: adam_w, momentum: null, betas: [0.8, 0.99]}', 'scheduler.name=cosineAnnealing']
    recipe = load_recipe(DIGITS, overrides=overrides)
    components = build_components(recipe)
    sam, clipping = components.algorithms
    assert isinstance(sam, SAM)
    assert (type(sam), sam.rho, type(clipping).__name__) == (SAM, 0.3, 'GradientClipping')
    assert type(components.scheduler).__name__ == 'CosineAnnealingScheduler'
    optimizer = build_optimizer(recipe, [torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults['betas'] == (0.8, 0.99)


def test_arguments_of_every_kind_reach_a_method() -> None:
    arguments = {
        'sam': {'multipliers': {r'^module\.1\.': 0.5, 'bias': 2}, 'ascent_steps': 3, 'step_size': 0.5},
        'aesam': {'total_steps': 100},
        'functional_sam': {'output': 'logits'},
        'random_sam': {'seed': 3},
        'look_sam': {'k': 2, 'granularity': 'tensor'},
    }
    for name, given in arguments.items():
        (method,) = build_components(
            load_recipe(DIGITS, overrides=[f'algorithms={json.dumps({name: given})}'])
        ).algorithms
        assert {key: getattr(method, key) for key in given} == given


@pytest.mark.parametrize('logger', ['tensorboard', 'file', 'wandb', 'mlflow'])
def test_the_loggers_of_the_readme_are_found(logger: str) -> None:
    try:
        load_recipe(DIGITS, overrides=[f'loggers.{logger}={{}}'])
    except RecipeError as error:  # found, but the package it logs to is not installed
        assert str(error).startswith(f'loggers.{logger}: Composer was installed without')


def test_overlay_wins_over_base_and_command_line_over_both(tmp_path: Path) -> None:
    write(tmp_path / 'base.yaml', DIGITS.read_text() + '\nrun_name: base\n')
    (tmp_path / 'sub').mkdir()
    middle = write(tmp_path / 'sub' / 'middle.yaml', 'base: ../base.yaml\nseed: 2\ndata: {batch_size: 32}\n')
    overlay = write(tmp_path / 'overlay.yaml', 'data: {batch_size: 16}\nalgorithms: {sam: {rho: 0.2}}\n')
    recipe = load_recipe(middle, [overlay], ['algorithms.sam.interval=5'])
    assert (recipe.name, recipe.run_name, recipe.seed, recipe.data.batch_size) == (
        'SGD+middle+overlay, interval=5',
        *('base', 2, 16),
    )
    assert recipe.algorithms == {'sam': {'rho': 0.2, 'interval': 5}}


def test_null_removes_what_the_base_has_set(tmp_path: Path) -> None:
    overlay = write(tmp_path / 'plain.yaml', f'base: {YAMLS}/digits/sam.yaml\nalgorithms: {{sam: null}}\nname: null\n')
    recipe = load_recipe(overlay)
    assert (recipe.algorithms, recipe.name) == ({}, 'plain')


def test_interpolation_refers_to_other_keys() -> None:
    assert load_recipe(DIGITS, overrides=['run_name=seed-${seed}']).run_name == 'seed-17'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('base: base.yaml', 'base leads back to itself'),
        ('base: elsewhere.yaml', r"elsewhere\.yaml' does not exist"),
        ('base: [a.yaml]', r'^base: must be the path of a recipe'),
        ('- a\n- b', 'a recipe is a mapping'),
        ('a: [1', 'not valid YAML'),
        ('seed: 1\nseed: 2', 'duplicate key seed'),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path / 'base.yaml', text))


def test_a_missing_recipe_suggests_its_neighbours() -> None:
    with pytest.raises(RecipeError, match=r'did you mean .*digits/sam\.yaml'):
        load_recipe(YAMLS / 'digits' / 'asm.yaml')


def test_the_resolved_recipe_is_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(YAMLS / 'cifar10' / 'resnet18_sam.yaml', overrides=[*ON_CPU, 'algorithms.sam.interval=2'])
    dumped = write(tmp_path / 'config.yaml', OmegaConf.to_yaml(recipe.model_dump(exclude_none=True)))
    again = load_recipe(dumped)
    assert isinstance(again, Recipe)
    assert again == recipe


@pytest.mark.parametrize(
    ('argument', 'expected'),
    [('a=1', True), ('data.root=/x/y.yaml', True), ('runs/a=1/x.yaml', False), ('sam.yaml', False), ('a b=c', False)],
)
def test_overrides_and_files_are_told_apart(argument: str, expected: bool) -> None:
    assert is_override(argument) is expected
