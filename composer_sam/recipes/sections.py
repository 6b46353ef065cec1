"""What all sections of a recipe share: they are strict, and each has a name that determines its keys."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

__all__ = [
    'DataSection',
    'Fraction',
    'ModelSection',
    'NonNegativeInt',
    'OwnData',
    'OwnModel',
    'Section',
]

Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe."""

    # Strict: a quoted number, or a boolean in place of a number, is an error and not converted.
    model_config = ConfigDict(extra='forbid', frozen=True, strict=True)


class DataSection(Section):
    """The keys of every data set.

    Attributes:
        name: the name of the data set.
        batch_size: the number of images (sequences of a text) per optimizer step, over all processes.
        eval_batch_size: the number of images per evaluation batch, over all processes; ``batch_size`` if not given.
        drop_last: whether to skip the last training batch of an epoch if it is smaller than the others.
        num_workers: the number of worker processes per training process that load and augment images.
        label_noise: the fraction of the training labels that is replaced by another class, drawn uniformly.
        noise_seed: the seed of the label noise; runs with different ``seed`` have the same wrong labels.
        validation_fraction: the fraction of the training images, with their label noise, that is held out and replaces
            the test set, for choosing hyper-parameters. The ``seed`` of the recipe determines these images. With
            ``early_stopping`` it does not replace the test set.
    """

    samples: ClassVar[str] = 'images'  # what messages call them

    name: str
    batch_size: PositiveInt = 128
    eval_batch_size: PositiveInt | None = None
    drop_last: bool = True
    num_workers: NonNegativeInt = 0
    label_noise: Fraction = 0.0
    noise_seed: NonNegativeInt = 0
    validation_fraction: Fraction = 0.0


class OwnData(DataSection):
    """The name of a function of the user's own that returns the data, the keys of every data set, and its arguments."""

    model_config = ConfigDict(extra='allow')

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the function."""
        return dict(self.model_extra or {})


class ModelSection(Section):
    """A torchvision classifier or a ResNet with a CIFAR stem, which have no options besides the name."""

    name: str


class OwnModel(ModelSection):
    """The name of a function of the user's own that returns the network, and its arguments."""

    model_config = ConfigDict(extra='allow')

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the function."""
        return dict(self.model_extra or {})
