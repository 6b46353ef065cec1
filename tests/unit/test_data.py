"""The data sets and networks a recipe can name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from composer_sam.recipes import RecipeError
from composer_sam.recipes.data import Images, build_data, noisy_labels
from composer_sam.recipes.models import build_model, plain_models
from composer_sam.recipes.schema import CNN, MLP, Cifar, Digits, ImageFolder, ModelSection, WideResNet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve training and four test images of two classes and different sizes, pixel values known."""
    for split, count in (('train', 6), ('test', 2)):
        for label, name in enumerate(('cat', 'dog')):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                shade = 100 * label + 10 * index
                pixels = np.full((20 + index, 24, 3), shade, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f'{index}.png')
    return tmp_path


def folder_section(root: Path, **changes: Any) -> ImageFolder:
    options: dict[str, Any] = {'image_size': 16, 'batch_size': 4, 'augment': 'crop_flip'}
    return ImageFolder(name='image_folder', root=str(root), **(options | changes))


def digits(**changes: Any) -> Digits:
    return Digits(name='digits', **changes)


def batches(loader: Any, epoch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.sampler.set_epoch(epoch)
    torch.manual_seed(0)
    return list(loader)


def shown(loader: DataLoader) -> Images:
    """The images of a loader."""
    assert isinstance(loader.dataset, Images)
    return loader.dataset


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for left, right in zip(first, second, strict=True) for a, b in zip(left, right, strict=True)
    )


def test_digits_are_split_by_class_and_scaled() -> None:
    data = build_data(digits(batch_size=64), seed=0)
    train, test = shown(data.train), shown(data.test)
    assert isinstance(train.images, torch.Tensor)
    assert (len(train), len(test), data.num_classes, data.image_shape) == (1347, 450, 10, (1, 8, 8))
    assert (train.images.min(), train.images.max()) == (0, 1)
    assert int(torch.bincount(test.labels).min()) >= 43
    assert [len(labels) for _, labels in batches(data.train)] == [64] * 21
    assert sum(len(labels) for _, labels in batches(data.test)) == 450


def test_the_seed_decides_the_order_and_every_epoch_has_another() -> None:
    first, again, other = (build_data(digits(batch_size=64), seed=seed).train for seed in (1, 1, 2))
    assert same(batches(first), batches(again))
    assert not same(batches(first), batches(other))
    assert not same(batches(first, epoch=0), batches(first, epoch=1))
    assert same(batches(first, epoch=1), batches(again, epoch=1))


def test_loading_takes_nothing_from_the_random_stream_of_training() -> None:
    loader = build_data(digits(), seed=0).train
    torch.manual_seed(3)
    expected = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), expected)


def test_label_noise_changes_the_training_labels_alone() -> None:
    clean, noisy = build_data(digits(), seed=0), build_data(digits(label_noise=0.4), seed=0)
    changed = shown(clean.train).labels != shown(noisy.train).labels
    assert int(changed.sum()) == round(0.4 * 1347)
    assert torch.equal(shown(clean.test).labels, shown(noisy.test).labels)


def test_label_noise_is_symmetric_and_seeded() -> None:
    labels = torch.arange(4).repeat(10_000)
    noisy = noisy_labels(labels, 4, 0.5, seed=1)
    counts = torch.bincount(4 * labels + noisy, minlength=16).view(4, 4)
    off_diagonal = counts[~torch.eye(4, dtype=torch.bool)]
    # Of each class's 10,000 labels half become each of three others: 1,667 with a standard deviation of about 40.
    assert (off_diagonal - 10_000 / 6).abs().max() < 200
    assert torch.equal(noisy, noisy_labels(labels, 4, 0.5, seed=1))
    assert not torch.equal(noisy, noisy_labels(labels, 4, 0.5, seed=2))
    assert torch.equal(noisy_labels(labels, 4, 0.0, seed=1), labels)


def test_validation_images_are_training_images_with_their_noise_and_others_for_another_seed() -> None:
    whole = shown(build_data(digits(label_noise=0.4), seed=3).train)
    data = build_data(digits(label_noise=0.4, validation_fraction=0.25), seed=3)
    train, held_out = shown(data.train), shown(data.test)
    assert (len(train), len(held_out)) == (1347 - 337, 337)

    def pairs(images: Images) -> list[tuple[bytes, int]]:
        assert isinstance(images.images, torch.Tensor)
        both = zip(images.images, images.labels, strict=True)
        return sorted((image.numpy().tobytes(), int(label)) for image, label in both)

    assert pairs(whole) == sorted(pairs(train) + pairs(held_out))
    assert pairs(held_out) == pairs(shown(build_data(digits(label_noise=0.4, validation_fraction=0.25), seed=3).test))
    other = shown(build_data(digits(label_noise=0.4, validation_fraction=0.25), seed=4).test)
    # Of 337 images each is among another seed's with probability a quarter: 84 in common, give or take 8.
    assert len(set(pairs(held_out)) & set(pairs(other))) < 130


def test_validation_images_are_not_augmented(folder: Path) -> None:
    for augment in ('crop_flip', 'resized_crop'):
        section = folder_section(folder, augment=augment, batch_size=2, validation_fraction=0.5)
        data = build_data(section, seed=0)
        held_out = shown(data.test)
        assert len(held_out) == len(shown(data.train))
        assert torch.equal(held_out[0][0], held_out[0][0])
        plain = shown(build_data(folder_section(folder, augment='none', batch_size=2), seed=0).train)
        originals = [image for image, _ in (plain[index] for index in range(len(plain)))]
        for index in range(len(held_out)):
            assert any(torch.equal(held_out[index][0], original) for original in originals)


def test_a_validation_set_of_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r'data\.validation_fraction: 0\.0001 of 1347 training images is none'):
        build_data(digits(validation_fraction=0.0001), seed=0)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(RecipeError, match=r'data\.batch_size: 4096 is more than the 1347 training images'):
        build_data(digits(batch_size=4096), seed=0)


def test_an_image_folder_is_read_alike_from_memory_and_from_disk(folder: Path) -> None:
    cached = build_data(folder_section(folder), seed=0)
    on_disk = build_data(folder_section(folder, cache_mb=0), seed=0)
    assert isinstance(shown(cached.train).images, torch.Tensor)
    assert not isinstance(shown(on_disk.train).images, torch.Tensor)
    assert (cached.num_classes, cached.image_shape) == (2, (3, 16, 16))
    assert same(batches(cached.train), batches(on_disk.train))
    assert same(batches(cached.test), batches(on_disk.test))


def test_images_are_normalised_by_the_given_mean_and_std(folder: Path) -> None:
    section = folder_section(folder, augment='none', mean=[0.5, 0.0, 0.0], std=[0.5, 1.0, 2.0])
    image, label = shown(build_data(section, seed=0).test)[3]  # the second dog: 110 everywhere
    value = 110 / 255
    assert int(label) == 1
    expected = torch.tensor([(value - 0.5) / 0.5, value, value / 2])
    torch.testing.assert_close(image, expected.view(3, 1, 1).expand(3, 16, 16))


def test_augmentation_is_drawn_for_every_image_in_training_alone(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    for split in ('train', 'val'):
        (tmp_path / split / 'only').mkdir(parents=True)
        for index in range(8):
            Image.fromarray(pixels).save(tmp_path / split / 'only' / f'{index}.png')
    for augment in ('crop_flip', 'resized_crop'):
        data = build_data(folder_section(tmp_path, augment=augment, batch_size=8), seed=0)
        ((train, _),), ((test, _),) = batches(data.train), batches(data.test)
        assert train.shape == test.shape == (8, 3, 16, 16)
        assert len({image.numpy().tobytes() for image in train}) > 1
        assert len({image.numpy().tobytes() for image in test}) == 1


def test_worker_processes_are_reproducible(folder: Path) -> None:
    first, again = (build_data(folder_section(folder, num_workers=1), seed=5).train for _ in range(2))
    assert same(batches(first), batches(again))


def test_what_is_wrong_with_an_image_folder_is_said(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r'data\.root: .*nowhere.* is no directory; it must hold train/ and test/'):
        build_data(folder_section(folder / 'nowhere'), seed=0)
    with pytest.raises(RecipeError, match=r'must hold train/ and test/ or val/, it holds cat, dog'):
        build_data(folder_section(folder / 'train'), seed=0)
    (folder / 'test' / 'dog').rename(folder / 'test' / 'fox')
    with pytest.raises(RecipeError, match=r'differ in classes: dog, fox'):
        build_data(folder_section(folder), seed=0)


def test_cifar_is_read_as_torchvision_stores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / 'cifar-10-batches-py'
    root.mkdir()
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (8, 3, 32, 32), dtype=np.uint8)
    batch = {'data': pixels.reshape(8, -1), 'labels': [0, 1, 2, 3, 4, 5, 6, 9]}
    for name in [*(f'data_batch_{number}' for number in range(1, 6)), 'test_batch']:
        (root / name).write_bytes(pickle.dumps(batch))
    (root / 'batches.meta').write_bytes(pickle.dumps({'label_names': list('abcdefghij')}))
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *_: True)

    section = Cifar(name='cifar10', root=str(tmp_path), download=False, batch_size=8, augment='none')
    data = build_data(section, seed=0)
    assert (len(shown(data.train)), len(shown(data.test)), data.num_classes) == (40, 8, 10)
    image, label = shown(data.test)[7]
    mean, std = torch.tensor(section.mean).view(3, 1, 1), torch.tensor(section.std).view(3, 1, 1)
    torch.testing.assert_close(image, (torch.from_numpy(pixels[7]) / 255 - mean) / std)
    assert int(label) == 9
    larger = build_data(section.model_copy(update={'image_size': 48}), seed=0)
    assert larger.image_shape == (3, 48, 48)


def test_missing_cifar_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    section = Cifar(name='cifar10', root=str(tmp_path), download=False)
    with pytest.raises(RecipeError, match=r'data\.root: .* does not give cifar10 .* set data\.download=true'):
        build_data(section, seed=0)


@pytest.mark.parametrize(
    ('section', 'shape', 'classes', 'parameters'),
    [
        (MLP(name='mlp'), (1, 8, 8), 10, 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10),
        (CNN(name='cnn'), (1, 8, 8), 10, 9 * 32 + 2 * 32 + 9 * 32 * 64 + 2 * 64 + 64 * 10 + 10),
        # As published: 11.17 million for the CIFAR ResNet-18, 36.5 for WRN-28-10, 2.7 for WRN-16-4, 2.2 for WRN-40-2.
        (ModelSection(name='cifar_resnet18'), (3, 32, 32), 10, 11_173_962),
        (WideResNet(name='wide_resnet', dropout=0.3), (3, 32, 32), 10, 36_479_194),
        (WideResNet(name='wide_resnet', widen=1), (3, 16, 16), 10, 369_498),
        (WideResNet(name='wide_resnet', depth=16, widen=4), (3, 32, 32), 10, 2_748_890),
        (WideResNet(name='wide_resnet', depth=40, widen=2), (3, 32, 32), 10, 2_243_546),
        (ModelSection(name='resnet18'), (3, 64, 64), 1000, 11_689_512),
    ],
    ids=lambda value: getattr(value, 'name', None),
)
def test_models_have_the_published_size_and_shape(section: Any, shape: Any, classes: int, parameters: int) -> None:
    model = build_model(section, shape, classes).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    with torch.inference_mode():
        outputs = model((torch.zeros(2, *shape), torch.zeros(2, dtype=torch.int64)))
    assert outputs.shape == (2, classes)


def test_the_cifar_stem_keeps_the_resolution() -> None:
    module = build_model(ModelSection(name='cifar_resnet18'), (3, 32, 32), 10).module
    sizes = []
    for name in ('conv1', 'maxpool', 'layer1', 'layer4'):
        getattr(module, name).register_forward_hook(lambda *hook: sizes.append(tuple(hook[2].shape[-2:])))
    with torch.inference_mode():
        module.eval()(torch.zeros(1, 3, 32, 32))
    assert sizes == [(32, 32), (32, 32), (32, 32), (4, 4)]


def test_wide_resnet_drops_out_between_the_convolutions() -> None:
    module = build_model(WideResNet(name='wide_resnet', dropout=0.3), (3, 32, 32), 10).module
    rates = [layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)]
    assert rates == [0.3] * 12


def test_grey_images_are_refused_by_torchvision_models() -> None:
    with pytest.raises(RecipeError, match=r"model\.name: 'resnet18' takes images of 3 channels, the data has 1"):
        build_model(ModelSection(name='resnet18'), (1, 8, 8), 10)


def test_torchvision_classifiers_are_listed_and_other_models_not() -> None:
    assert {'resnet50', 'vit_b_16', 'cifar_resnet34'} <= set(plain_models())
    assert 'fcn_resnet50' not in plain_models()
