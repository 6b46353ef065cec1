"""The network of a recipe, of whatever kind its data is."""

from __future__ import annotations

from typing import Any

from composer.models import ComposerModel

from composer_sam.recipes.data import Data
from composer_sam.recipes.language_models import build_language_model
from composer_sam.recipes.models import build_model
from composer_sam.recipes.own import check_scores
from composer_sam.recipes.sections import ModelSection
from composer_sam.recipes.text_schema import CausalLM

__all__ = ['build_network']


def build_network(section: ModelSection, data: Data) -> ComposerModel:
    """Build the network of the section ``model`` of a recipe.

    The weights are drawn from torch's global random stream, which must be seeded before.

    Args:
        section: the section.
        data: the data of the same recipe.

    Raises:
        RecipeError: the network does not take such data.
    """
    if isinstance(section, CausalLM):
        assert data.tokenizer is not None  # check_language_model() has refused all other data
        return build_language_model(section, data.tokenizer, data.image_shape[0])
    model = build_model(section, data.image_shape, data.num_classes)
    samples: Any = data.test.dataset
    check_scores(section, model.module, samples.__getitems__([0, len(samples) - 1])[0], data.num_classes)
    return model
