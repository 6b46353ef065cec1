"""The keys of a recipe with their types and ranges."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from composer_sam.recipes.errors import RecipeError, unknown
from composer_sam.recipes.sections import (
    DataSection,
    Fraction,
    ModelSection,
    NonNegativeInt,
    OwnData,
    OwnModel,
    Section,
)
from composer_sam.recipes.text_schema import CausalLM, Text

__all__ = [
    'CNN',
    'MLP',
    'Arguments',
    'CausalLM',
    'Cifar',
    'DataSection',
    'Digits',
    'ImageFolder',
    'ModelSection',
    'OwnData',
    'OwnModel',
    'Recipe',
    'Text',
    'WideResNet',
    'Written',
    'parse_recipe',
]


def _shown(name: str) -> str:
    if not (name.strip() and name.isprintable() and len(name) <= 200):
        raise PydanticCustomError('name', 'a name of 1 to 200 characters that can be printed, in one line')
    return name


Name = Annotated[str, AfterValidator(_shown)]
Duration = str | PositiveInt
PerChannel = Annotated[list[float], Field(min_length=3, max_length=3)]
Augmentation = Literal['none', 'crop_flip', 'resized_crop']


class Digits(DataSection):
    """scikit-learn's 1,797 images of 8x8 pixels, which are part of that package.

    Attributes:
        test_fraction: the fraction of the images that is held out for testing.
        split_seed: the seed of the split.
    """

    name: Literal['digits']
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    split_seed: NonNegativeInt = 0


class _ImageSection(DataSection):
    """The keys of data sets of colour images.

    Attributes:
        root: the directory of the data set.
        image_size: the height and width of the images after resizing.
        augment: ``crop_flip`` pads by an eighth, crops at random and flips; ``resized_crop`` crops a random region,
            resizes it and flips; ``none`` does not augment.
        mean: the mean per channel, which is subtracted from pixel values in [0, 1].
        std: the standard deviation per channel, by which they are then divided.
    """

    root: str
    image_size: PositiveInt = 224
    augment: Augmentation = 'resized_crop'
    mean: PerChannel = Field(default=[0.485, 0.456, 0.406])
    std: PerChannel = Field(default=[0.229, 0.224, 0.225])


class Cifar(_ImageSection):
    """CIFAR-10 or CIFAR-100.

    Attributes:
        download: whether to download the data set if ``root`` does not contain it.
    """

    name: Literal['cifar10', 'cifar100']
    root: str = 'data'
    image_size: PositiveInt = 32
    augment: Augmentation = 'crop_flip'
    mean: PerChannel = Field(default=[0.4914, 0.4822, 0.4465])
    std: PerChannel = Field(default=[0.2470, 0.2435, 0.2616])
    download: bool = True

    @model_validator(mode='before')
    @classmethod
    def _own_statistics(cls, values: Any) -> Any:
        own = {'mean': [0.5071, 0.4865, 0.4409], 'std': [0.2673, 0.2564, 0.2762]}
        return own | values if values['name'] == 'cifar100' else values


class ImageFolder(_ImageSection):
    """A directory with ``train/`` and ``test/`` or ``val/``, each with one directory of images per class.

    Attributes:
        cache_mb: the memory for decoded and resized images in MiB. The images are kept in memory if all of them fit;
            with 0 they are always read from disk. With ``augment: resized_crop`` the training images are cropped from
            their full size and always read from disk.
    """

    name: Literal['image_folder']
    cache_mb: NonNegativeInt = 1024


class MLP(ModelSection):
    """A multi-layer perceptron with ReLU.

    Attributes:
        hidden: the width of every hidden layer.
    """

    name: Literal['mlp']
    hidden: list[PositiveInt] = Field(default=[256, 256])


class CNN(ModelSection):
    """Two convolutions with BatchNorm and pooling, and a linear layer.

    Attributes:
        width: the number of channels of the first convolution; the second has twice as many.
    """

    name: Literal['cnn']
    width: PositiveInt = 32


class WideResNet(ModelSection):
    """WRN-d-k, the wide residual network.

    Attributes:
        depth: d, the number of convolutions on the longest path: 10, 16, 22, 28, ...
        widen: k, the factor by which it is wider than the original residual network.
        dropout: the probability of dropout between the two convolutions of a block.
    """

    name: Literal['wide_resnet']
    depth: PositiveInt = 28
    widen: PositiveInt = 10
    dropout: Fraction = 0.0

    @field_validator('depth')
    @classmethod
    def _whole_blocks(cls, depth: int) -> int:
        if depth < 10 or depth % 6 != 4:
            raise PydanticCustomError(
                'depth', 'one of 10, 16, 22, 28, 34, 40, ...: three stages of equally many blocks'
            )
        return depth


Arguments = dict[str, Any]
# Values as the recipe writes them, ``${oc.env:DATA}``, and what they stand for, by the parts of their keys.
Written = dict[tuple[str, ...], tuple[Any, Any]]


class Recipe(Section):
    """A whole training run.

    Attributes:
        name: the name of the run in tables and pictures; the file name of the recipe if not given.
        run_name: the name of the run in Composer's checkpoints and logs; ``name`` if not given. In a comparison it is
            the name and the seed.
        seed: the seed of the weights, the order of the batches, augmentation and dropout.
        precision: the numerical precision, as Composer names it.
        device: the device to train on; if not given, a GPU if there is one.
        max_duration: the length of training, > 0.
        eval_interval: the interval between tests.
        early_stopping: whether the result of the run is the test of the epoch that is the most accurate on the
            validation images, of which ``data.validation_fraction`` > 0 says how many; the test set plays no part in
            the choice. The run goes on to its end; then the network gets the weights of that epoch.
        stop_at_nonfinite: the number of steps in a row with a training loss that is not finite after which the run is
            stopped and has failed; 0 to train to the end. A run whose loss is not finite at the end has failed too.
        data: the data set, see :class:`Digits`, :class:`Cifar`, :class:`ImageFolder`, :class:`Text` and
            :class:`OwnData`.
        model: the network, see :class:`MLP`, :class:`CNN`, :class:`WideResNet`, :class:`ModelSection`,
            :class:`CausalLM` and :class:`OwnModel`.
        optimizer: the name and arguments of a class of ``torch.optim`` or ``composer.optim``.
        scheduler: the name and arguments of a scheduler of ``composer.optim``.
        algorithms: arguments by name of methods of this package and of ``composer.algorithms``. The ``schedules`` of
            a method name a scheduler: ``{rho: {cosine_annealing: {t_max: 1dur}}}``.
        callbacks: arguments by name of ``composer.callbacks`` and of the monitors of this package.
        loggers: arguments by name of ``composer.loggers``. Without ``log_dir`` those of ``tensorboard`` lie in
            ``save_folder``. The commands show a progress bar of their own; ``trainer.progress_bar`` is Composer's.
        save_folder: the local directory of the run: its checkpoints, the resolved recipe as ``config.yaml``, and the
            event files of the logger ``tensorboard``.
        save_interval: the interval between checkpoints.
        autoresume: whether to resume from the newest checkpoint in ``save_folder``.
        load_path: the checkpoint to start from.
        device_train_microbatch_size: the number of images or sequences per forward-backward on one device, or ``auto``.
        parallelism: arguments of Composer's FSDP configuration under ``fsdp`` or ``fsdp2``.
        trainer: further arguments of Composer's ``Trainer``.
        grid: lists of values by key, such as ``{algorithms.sam.rho: [0.1, 0.2]}``. A study trains every combination;
            all other commands ignore the grid.
    """

    name: Name
    run_name: Name | None = None
    seed: NonNegativeInt = 17
    precision: Literal['fp32', 'amp_bf16', 'amp_fp16', 'amp_fp8'] = 'fp32'
    device: Literal['cpu', 'gpu', 'mps', 'tpu'] | None = None
    max_duration: Duration
    eval_interval: str | NonNegativeInt = 1
    early_stopping: bool = False
    stop_at_nonfinite: NonNegativeInt = 10
    data: SerializeAsAny[DataSection]
    model: SerializeAsAny[ModelSection]
    optimizer: Arguments
    scheduler: Arguments = Field(default={})
    algorithms: dict[str, Arguments] = Field(default={})
    callbacks: dict[str, Arguments] = Field(default={})
    loggers: dict[str, Arguments] = Field(default={})
    save_folder: str | None = None
    save_interval: Duration = '1ep'
    autoresume: bool = False
    load_path: str | None = None
    device_train_microbatch_size: PositiveInt | Literal['auto'] | None = None
    parallelism: dict[Literal['fsdp', 'fsdp2'], Arguments] = Field(default={})
    trainer: Arguments = Field(default={})
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default={})
    _written: Written = PrivateAttr(default_factory=dict)

    def written(self) -> dict[str, Any]:
        """Return the keys and values for files: resolved, but for texts from the environment, which can be secret.

        Those are as in the recipe, ``${oc.env:NAME}``, so that a recipe that is loaded from the file means the same.
        """
        content = self.model_dump(exclude_none=True)
        found = _escaped(content)
        for (*parents, key), (text, value) in self._written.items():
            ours, theirs = content, found
            for parent in parents:
                ours, theirs = ours.get(parent, {}), theirs.get(parent, {})
            if ours.get(key) == value:  # it is another one for a run of a comparison, such as its save_folder
                theirs[key] = text
        return found

    def from_environment(self) -> dict[str, Any]:
        """Return the texts from the environment, by dotted key."""
        return {'.'.join(parts): value for parts, (_, value) in self._written.items()}


S = TypeVar('S', bound=Section)

DATA: dict[str, type[DataSection]] = {
    'digits': Digits,
    'cifar10': Cifar,
    'cifar100': Cifar,
    'image_folder': ImageFolder,
    'text': Text,
}
MODELS: dict[str, type[ModelSection]] = {
    'mlp': MLP,
    'cnn': CNN,
    'wide_resnet': WideResNet,
    'causal_lm': CausalLM,
}


def parse_recipe(mapping: dict[str, Any], plain_models: list[str], written: Written | None = None) -> Recipe:
    """Check a plain mapping against the schema and return it as a recipe.

    Args:
        mapping: the merged and resolved content of the YAML files.
        plain_models: the names of the models without options.
        written: the values that are written to files as they are here.

    Raises:
        RecipeError: a key is unknown or missing, or a value is of the wrong type or out of its range.
    """
    models = MODELS | dict.fromkeys(plain_models, ModelSection)
    parsed: dict[str, Section] = {}
    if 'data' in mapping:
        parsed['data'] = _parse_named('data', mapping['data'], DATA, OwnData)
    if 'model' in mapping:
        parsed['model'] = _parse_named('model', mapping['model'], models, OwnModel)
    recipe = _parse_section(Recipe, mapping | parsed, '')
    recipe._written.update(written or {})
    return recipe


def _escaped(value: Any) -> Any:
    """Return a value with the ``${`` in its texts escaped, as they stand for themselves."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r'(\\*)\$\{', r'\1\1\\${', value) if isinstance(value, str) else value


def _parse_named(key: str, values: Any, known: Mapping[str, type[S]], own: type[S]) -> S:
    """Check a section whose ``name`` determines its keys; ``own`` has those of a function of the user's own."""
    if not isinstance(values, dict):
        raise RecipeError(f'{key}: must be a mapping with a name, got {values!r}')
    name = values.get('name')
    if name is None:
        raise RecipeError(f'{key}.name: is required; valid: {", ".join(sorted(known))}')
    if isinstance(name, str) and ':' in name:
        return _parse_section(own, values, f'{key}.')
    if name not in known:
        own_path = isinstance(name, str) and '.' in name
        hint = '; a function of your own is written package.module:function' if own_path else ''
        raise RecipeError(f'{unknown("name", f"{key}.name", name, str(name), known)}{hint}')
    return _parse_section(known[name], values, f'{key}.')


def _parse_section(section: type[S], values: dict[str, Any], prefix: str) -> S:
    """Construct a section; the errors of pydantic become one line about the first wrong key."""
    try:
        return section(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        first, *others = error.errors()
    location = [str(part) for part in first['loc']]
    key = prefix + location[0]
    if first['type'] == 'extra_forbidden':
        raise unknown('key', key, first['input'], location[0], section.model_fields)
    if first['type'] == 'missing':
        raise RecipeError(f'{key}: is required')
    # A union reports one error for each of its types; the message names all of them.
    wanted = dict.fromkeys([first['msg'], *(other['msg'] for other in others if other['loc'][0] == first['loc'][0])])
    messages = ' or '.join(message.removeprefix('Input should be ') for message in wanted)
    raise RecipeError(f'{key}: got {values[location[0]]!r}, should be {messages}')
