"""What a recipe may say: its keys, their types and their ranges."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from composer_sam.recipes.errors import RecipeError, unknown

__all__ = [
    'CNN',
    'MLP',
    'Cifar',
    'DataSection',
    'Digits',
    'ImageFolder',
    'ModelSection',
    'Recipe',
    'WideResNet',
    'parse_recipe',
    'parse_section',
]

Duration = str | PositiveInt
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PerChannel = Annotated[list[float], Field(min_length=3, max_length=3)]
Augmentation = Literal['none', 'crop_flip', 'resized_crop']


class _Section(BaseModel):
    # Strict, so that a quoted number or a boolean where a number belongs is an error and not a guess.
    model_config = ConfigDict(extra='forbid', frozen=True, strict=True)


class DataSection(_Section):
    """What every data set takes.

    Attributes:
        batch_size: Images per optimizer step over all processes together.
        eval_batch_size: Images per evaluation batch over all processes together; ``batch_size`` if not given.
        drop_last: Whether the last, smaller training batch of an epoch is left out.
        num_workers: Worker processes per training process that load and augment images.
        label_noise: Fraction of the training labels that are replaced by a different class, drawn uniformly.
        noise_seed: Seed of the label noise, so that runs with different seeds see the same wrong labels.
        validation_fraction: Part of the training images that is held out, with its label noise, and tested on in place
            of the test set: for choosing hyper-parameters. Which images those are follows the recipe's ``seed``.
    """

    name: str
    batch_size: PositiveInt = 128
    eval_batch_size: PositiveInt | None = None
    drop_last: bool = True
    num_workers: NonNegativeInt = 0
    label_noise: Fraction = 0.0
    noise_seed: NonNegativeInt = 0
    validation_fraction: Fraction = 0.0


class Digits(DataSection):
    """scikit-learn's 1,797 images of 8x8 pixels, which come with the package.

    Attributes:
        test_fraction: Part of the images that is held out for testing.
        split_seed: Seed of the split.
    """

    name: Literal['digits']
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    split_seed: NonNegativeInt = 0


class _ImageSection(DataSection):
    """What data sets of colour images take.

    Attributes:
        root: Directory of the data set.
        image_size: Height and width of the images the model sees.
        augment: ``crop_flip`` pads by an eighth, crops at random and mirrors; ``resized_crop`` cuts out a random
            region, resizes it and mirrors; ``none`` shows every image as it is.
        mean: Per channel, subtracted from pixel values in [0, 1].
        std: Per channel, what they are divided by afterwards.
    """

    root: str
    image_size: PositiveInt = 224
    augment: Augmentation = 'resized_crop'
    mean: PerChannel = Field(default=[0.485, 0.456, 0.406])
    std: PerChannel = Field(default=[0.229, 0.224, 0.225])


class Cifar(_ImageSection):
    """CIFAR-10 or CIFAR-100.

    Attributes:
        download: Whether to fetch the data set when ``root`` does not hold it yet.
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
    """A directory with ``train/`` and ``test/`` or ``val/``, each of one directory of images per class.

    Attributes:
        cache_mb: Images whose decoded, resized pixels fit into this many MiB together are kept in memory;
            0 always reads from disk. With ``augment: resized_crop`` the training images have no one size to be
            kept at and are always read from disk.
    """

    name: Literal['image_folder']
    cache_mb: NonNegativeInt = 1024


class ModelSection(_Section):
    """A torchvision classifier or a CIFAR-stem ResNet, which take no further options."""

    name: str


class MLP(ModelSection):
    """A multi-layer perceptron with ReLU.

    Attributes:
        hidden: Width of every hidden layer.
    """

    name: Literal['mlp']
    hidden: list[PositiveInt] = Field(default=[256, 256])


class CNN(ModelSection):
    """Two convolutions with BatchNorm, pooled, and a linear layer.

    Attributes:
        width: Channels of the first convolution; the second has twice as many.
    """

    name: Literal['cnn']
    width: PositiveInt = 32


class WideResNet(ModelSection):
    """WRN-d-k, the wide residual network.

    Attributes:
        depth: d, its convolutions on the longest way; 10, 16, 22, 28, ...
        widen: k, how many times wider than the narrow residual network.
        dropout: Probability between the two convolutions of a block.
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


class Recipe(_Section):
    """A whole training run.

    Attributes:
        name: What the run is called in tables and pictures; by default the recipe's file name.
        run_name: What Composer calls the run in checkpoints and logs; ``name`` if not given. A comparison calls its
            runs by name and seed.
        seed: Seed of the weights, the order of the batches, augmentation and dropout.
        precision: Numerical precision, as Composer names it.
        device: What to train on; a GPU where there is one, if not given.
        max_duration: When to stop.
        eval_interval: How often to test.
        data: Which data, see :class:`Digits`, :class:`Cifar` and :class:`ImageFolder`.
        model: Which network.
        optimizer: Name and arguments of a class of ``torch.optim`` or ``composer.optim``.
        scheduler: Name and arguments of a scheduler of ``composer.optim``.
        algorithms: Arguments by name of methods of this package and of ``composer.algorithms``. The ``schedules`` of
            a method are given by name: ``{rho: {cosine_annealing: {t_max: 1dur}}}``.
        callbacks: Arguments by name of ``composer.callbacks`` and of this package's monitors.
        loggers: Arguments by name of ``composer.loggers``.
        save_folder: Local directory for checkpoints and the resolved recipe.
        save_interval: How often to save a checkpoint.
        autoresume: Whether to go on from the newest checkpoint in ``save_folder``.
        load_path: Checkpoint to start from.
        device_train_microbatch_size: Images per forward-backward on one device, or ``auto``.
        parallelism: Arguments of Composer's FSDP configuration under ``fsdp`` or ``fsdp2``.
        trainer: Any further argument of Composer's ``Trainer``.
        grid: Values by key, such as ``{algorithms.sam.rho: [0.1, 0.2]}``. A study trains every combination of them;
            everything else trains what the other keys say.
    """

    name: str
    run_name: str | None = None
    seed: NonNegativeInt = 17
    precision: Literal['fp32', 'amp_bf16', 'amp_fp16', 'amp_fp8'] = 'fp32'
    device: Literal['cpu', 'gpu', 'mps', 'tpu'] | None = None
    max_duration: Duration
    eval_interval: str | NonNegativeInt = 1
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


DATA: dict[str, type[DataSection]] = {
    'digits': Digits,
    'cifar10': Cifar,
    'cifar100': Cifar,
    'image_folder': ImageFolder,
}
MODELS: dict[str, type[ModelSection]] = {'mlp': MLP, 'cnn': CNN, 'wide_resnet': WideResNet}


def parse_recipe(mapping: dict[str, Any], plain_models: list[str]) -> Recipe:
    """Checks a plain mapping against the schema.

    Args:
        mapping: What the YAML files say, merged and resolved.
        plain_models: Names of the models that take no options.
    """
    models = MODELS | dict.fromkeys(plain_models, ModelSection)
    sections = {'data': DATA, 'model': models}
    parsed = {key: _parse_named(key, mapping[key], known) for key, known in sections.items() if key in mapping}
    return parse_section(Recipe, mapping | parsed, '')


def _parse_named(key: str, values: Any, known: dict[str, Any]) -> Any:
    """Parses a section whose ``name`` says which keys it may have."""
    if not isinstance(values, dict):
        raise RecipeError(f'{key}: must be a mapping with a name, got {values!r}')
    name = values.get('name')
    if name is None:
        raise RecipeError(f'{key}.name: is required; valid: {", ".join(sorted(known))}')
    if name not in known:
        raise unknown('name', f'{key}.name', name, str(name), known)
    return parse_section(known[name], values, f'{key}.')


def parse_section(section: type[Any], values: dict[str, Any], prefix: str) -> Any:
    """Builds a ``section``, turning what pydantic finds wrong into one line about the first wrong key."""
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
    # A union reports one error for every type it tried; together they say what would have been right.
    wanted = dict.fromkeys([first['msg'], *(other['msg'] for other in others if other['loc'][0] == first['loc'][0])])
    messages = ' or '.join(message.removeprefix('Input should be ') for message in wanted)
    raise RecipeError(f'{key}: got {values[location[0]]!r}, should be {messages}')
