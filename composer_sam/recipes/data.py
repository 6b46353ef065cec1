"""The data sets that a recipe can name, as loaders of whole batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2

from composer_sam.extras import extra
from composer_sam.recipes.errors import RecipeError
from composer_sam.recipes.own import own_data
from composer_sam.recipes.samples import Samples, divided
from composer_sam.recipes.schema import Cifar, DataSection, Digits, ImageFolder, OwnData, Text
from composer_sam.recipes.text import Sequences, read_text
from composer_sam.recipes.tokenizers import Tokenizer, find_tokenizer

__all__ = ['Data', 'Images', 'build_data', 'noisy_labels']

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Data:
    """The loaders of a run, and what a network has to know of its samples.

    Attributes:
        train: the loader for training.
        test: the loader for testing.
        num_classes: the number of classes; of a text, the number of tokens there are.
        image_shape: the shape of a sample: (channels, height, width) of an image, (tokens,) of a sequence.
        validation: None unless it is wanted beside the test set.
        tokenizer: the tokenizer of a text; None for all else.
    """

    train: DataLoader
    test: DataLoader
    num_classes: int
    image_shape: tuple[int, ...]
    validation: DataLoader | None = None
    tokenizer: Tokenizer | None = None

    @property
    def numbers(self) -> int:
        """The numbers in a sample, or in what a network gives for it where that is more: a score for every token."""
        return math.prod(self.image_shape) * (1 if self.tokenizer is None else self.num_classes)


class Images(Dataset):
    """A data set of images and labels that returns a batch at a time.

    The per-sample collation of a loader takes most of the time of a step of a small network. Here a batch is read,
    converted and normalised at once. Random augmentation is drawn for every image separately.

    Args:
        images: a tensor of all images, or a sequence that reads one image at a time.
        labels: the classes of the images.
        augment: a random transform of one image.
        finish: a deterministic transform of a batch, applied last.
        plain: a deterministic transform of one image that replaces ``augment`` if the images serve for testing.
    """

    def __init__(
        self,
        images: Tensor | Sequence[Tensor] | Subset[Tensor],
        labels: Tensor,
        augment: Transform | None = None,
        finish: Transform | None = None,
        plain: Transform | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.augment = augment
        self.finish = finish
        self.plain = plain

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        if self.augment is None and isinstance(self.images, Tensor):
            images = self.images[indices]
        elif self.augment is None:
            images = torch.stack([self.images[index] for index in indices])
        else:
            images = torch.stack([self.augment(self.images[index]) for index in indices])
        return images if self.finish is None else self.finish(images), self.labels[indices]

    def held_out(self, fraction: float, seed: int) -> tuple[Images, Images]:
        """Split off a random ``fraction`` of the images: return the others, and the fraction without augmentation."""
        rest, chosen = divided(len(self), fraction, seed)

        def part(indices: Tensor, augment: Transform | None) -> Images:
            # A Subset needs no more of its data set than the methods of a sequence.
            source: Any = self.images
            images = source[indices] if isinstance(source, Tensor) else Subset(source, indices.tolist())
            return Images(images, self.labels[indices], augment, self.finish, self.plain)

        return part(rest, self.augment), part(chosen, self.plain)


def build_data(section: DataSection, seed: int, pin_memory: bool = False, keep_test: bool = False) -> Data:
    """Build the loaders of the section ``data`` of a recipe.

    Args:
        section: the section.
        seed: the seed of the order of the batches, of the validation images and of augmentation in worker processes.
        pin_memory: whether batches will be copied to a GPU.
        keep_test: whether validation images have a loader of their own; otherwise they replace the test set.

    Raises:
        RecipeError: the data cannot be read, or is too small for the batch size or the validation fraction.
    """
    world_size = dist.get_world_size()
    if section.batch_size % world_size:
        raise RecipeError(
            f'data.batch_size: {section.batch_size} is over all processes together and cannot be divided among '
            f'{world_size}; choose a multiple of {world_size}',
        )
    tokenizer = None
    if isinstance(section, Digits):
        train, test, num_classes = _digits(section)
    elif isinstance(section, Cifar):
        train, test, num_classes = _cifar(section)
    elif isinstance(section, ImageFolder):
        train, test, num_classes = _image_folder(section)
    elif isinstance(section, OwnData):
        train, test, num_classes = own_data(section)
    elif isinstance(section, Text):
        tokenizer = find_tokenizer(section.tokenizer)
        train, test = read_text(section, tokenizer)
        num_classes = tokenizer.size
    else:
        raise TypeError(f'no data set is built from {type(section).__name__}')
    if section.label_noise and not isinstance(train, Sequences):
        train.labels = noisy_labels(train.labels, num_classes, section.label_noise, section.noise_seed)
    validation = None
    if section.validation_fraction:
        train, validation = train.held_out(section.validation_fraction, seed)
        if not len(validation):
            raise RecipeError(
                f'data.validation_fraction: {section.validation_fraction} of {len(train)} training {section.samples} '
                'is none; choose a larger one, or 0 to test on the test set',
            )
        if not keep_test:
            test, validation = validation, None
    if len(train) < section.batch_size:
        raise RecipeError(
            f'data.batch_size: {section.batch_size} is more than the {len(train)} training {section.samples}'
        )

    def loader(images: Images | Samples | Sequences, batch_size: int, training: bool) -> DataLoader:
        return DataLoader(
            images,
            batch_size=batch_size,
            # Composer sets the epoch of a DistributedSampler, so the order depends on the seed and the epoch only.
            sampler=dist.get_sampler(images, shuffle=training, seed=seed),
            drop_last=training and section.drop_last,
            collate_fn=_whole_batch,
            num_workers=section.num_workers,
            pin_memory=pin_memory,
            # With a generator of its own, the seeds of the workers are not drawn from the random stream of training.
            generator=torch.Generator().manual_seed(seed + dist.get_global_rank()),
        )

    def tests(images: Images | Samples | Sequences) -> DataLoader:
        # Composer warns about a batch that is smaller than the batch size of the loader.
        eval_batch_size = min(section.eval_batch_size or section.batch_size, len(images))
        return loader(images, -(-eval_batch_size // world_size), training=False)

    return Data(
        train=loader(train, section.batch_size // world_size, training=True),
        test=tests(test),
        validation=None if validation is None else tests(validation),
        num_classes=num_classes,
        image_shape=tuple(test[0][0].shape),
        tokenizer=tokenizer,
    )


def noisy_labels(labels: Tensor, num_classes: int, fraction: float, seed: int) -> Tensor:
    """Return the labels with a ``fraction`` of them, rounded to whole labels, replaced by another random class."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator) if num_classes > 1 else 0
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % num_classes
    return noisy


def _whole_batch(batch: Any) -> Any:
    """Replace collation: the data sets return a batch and not a list of samples."""
    return batch


def _digits(section: Digits) -> tuple[Images, Images, int]:
    with extra('composer', 'the data set digits'):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    split: list[Any] = train_test_split(
        torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16,  # pixels are integers from 0 to 16
        torch.tensor(labels, dtype=torch.int64),
        test_size=section.test_fraction,
        random_state=section.split_seed,
        stratify=labels,
    )
    train_images, test_images, train_labels, test_labels = split
    return Images(train_images, train_labels), Images(test_images, test_labels), 10


def _cifar(section: Cifar) -> tuple[Images, Images, int]:
    dataset = {'cifar10': datasets.CIFAR10, 'cifar100': datasets.CIFAR100}[section.name]
    finish: list[Any] = [] if section.image_size == 32 else [v2.Resize(section.image_size, antialias=True)]
    finish += _normalise(section)
    splits = []
    for training in (True, False):
        try:
            with dist.run_local_rank_zero_first():
                source = dataset(section.root, train=training, download=section.download)
        except (RuntimeError, OSError) as error:
            advice = '' if section.download else '; set data.download=true or point data.root to it'
            raise RecipeError(f'data.root: {section.root!r} does not give {section.name} ({error}){advice}') from error
        images = torch.tensor(source.data).permute(0, 3, 1, 2).contiguous()
        augment = _augmentation(section.augment, 32) if training else None
        splits.append(Images(images, torch.tensor(source.targets), augment, v2.Compose(finish)))
    return splits[0], splits[1], {'cifar10': 10, 'cifar100': 100}[section.name]


class _Folder(Sequence[Tensor]):
    """The images of a ``torchvision.datasets.ImageFolder``, read from disk one at a time."""

    def __init__(self, source: datasets.ImageFolder, prepare: Transform | None) -> None:
        self.source = source
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Tensor:
        path, _ = self.source.samples[index]
        image = v2.functional.pil_to_tensor(self.source.loader(path))
        return image if self.prepare is None else self.prepare(image)


def _image_folder(section: ImageFolder) -> tuple[Images, Images, int]:
    root = Path(section.root)
    if not root.is_dir():
        raise RecipeError(f'data.root: {section.root!r} is no directory; it must hold train/ and test/ or val/')
    test_name = next((name for name in ('test', 'val') if (root / name).is_dir()), None)
    if test_name is None or not (root / 'train').is_dir():
        found = ', '.join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())) or 'no directories'
        raise RecipeError(f'data.root: {section.root!r} must hold train/ and test/ or val/, it holds {found}')
    try:
        train, test = datasets.ImageFolder(root / 'train'), datasets.ImageFolder(root / test_name)
    except FileNotFoundError as error:
        raise RecipeError(f'data.root: {section.root!r}: {error}') from None
    if train.classes != test.classes:
        differing = ', '.join(sorted(set(train.classes) ^ set(test.classes)))
        raise RecipeError(f'data.root: train/ and {test_name}/ of {section.root!r} differ in classes: {differing}')

    size = section.image_size
    prepare = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    train_images: Tensor | Sequence[Tensor] = _Folder(train, None if section.augment == 'resized_crop' else prepare)
    test_images: Tensor | Sequence[Tensor] = _Folder(test, prepare)
    same_size = len(test) if section.augment == 'resized_crop' else len(train) + len(test)
    if same_size * 3 * size * size <= section.cache_mb * 2**20:
        test_images = _read_all(test_images)
        if section.augment != 'resized_crop':
            train_images = _read_all(train_images)
    finish = v2.Compose(_normalise(section))
    return (
        Images(
            *(train_images, torch.tensor(train.targets), _augmentation(section.augment, size), finish),
            plain=prepare if section.augment == 'resized_crop' else None,
        ),
        Images(test_images, torch.tensor(test.targets), None, finish),
        len(train.classes),
    )


def _read_all(images: Sequence[Tensor]) -> Tensor:
    # About half of the decoding holds the GIL, so more threads do not help, and several runs may share the cores.
    with ThreadPoolExecutor(min(4, torch.get_num_threads())) as threads:
        return torch.stack(list(threads.map(images.__getitem__, range(len(images)))))


def _augmentation(name: str, size: int) -> Transform | None:
    if name == 'crop_flip':
        return v2.Compose([v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()])
    if name == 'resized_crop':
        return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    return None


def _normalise(section: Cifar | ImageFolder) -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(section.mean, section.std)]
