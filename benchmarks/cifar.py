"""CIFAR-10 as an image folder, and a small part of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torchvision.datasets import CIFAR10

from benchmarks.report import WORK

__all__ = ['image_folder', 'small_folder']


def image_folder(given: Path | None) -> Path:
    """Return the given folder, or download CIFAR-10 and write it as a folder."""
    if given is not None:
        for split in ('train', 'test'):
            if not (given / split).is_dir():
                raise SystemExit(f'--images: {given} has no {split}/; it must hold train/<class> and test/<class>')
        return given.resolve()
    root = WORK / 'cifar10'
    if not (root / 'written').exists():
        for split in ('train', 'test'):
            source = CIFAR10(str(WORK), train=split == 'train', download=True)
            for index in range(len(source)):
                image, label = source[index]
                folder = root / split / source.classes[label]
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f'{index:05d}.png')
        (root / 'written').touch()
    return root


def small_folder(whole: Path, train: int, test: int) -> Path:
    """Return a folder of links to the first ``train`` and ``test`` images of every class, by name."""
    small = WORK / f'cifar10-{train}-{test}-{hashlib.sha256(str(whole).encode()).hexdigest()[:8]}'
    for split, count in (('train', train), ('test', test)):
        for folder in sorted(path for path in (whole / split).iterdir() if path.is_dir()):
            target = small / split / folder.name
            target.mkdir(parents=True, exist_ok=True)
            for image in sorted(folder.iterdir())[:count]:
                link = target / image.name
                if not link.exists():
                    link.symlink_to(image)
    return small
