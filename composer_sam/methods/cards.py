"""The page of a method, in the form of Composer's method cards, written from its class and its docstring."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from composer_sam.markdown import of_docstring, table
from composer_sam.methods import own_fields
from composer_sam.methods.base import SharpnessAware

__all__ = ['card', 'file_of', 'hyperparameters', 'snippets']

_SECTION = re.compile(r'^([A-Z][\w ]*):\n((?: {4}.*\n?|\n)+)', re.MULTILINE)
_NOTHING_PUBLISHED = 'No published settings beyond the defaults.'
# Options that some methods refuse, with a value that the others take.
_OPTIONS = {
    'ascent_fraction': 0.25,
    'sync_first_pass': True,
    'parameters': 'normalization',
    'multipliers': {'weight': 0.5},
    'interval': 10,
    'on_nonfinite': 'skip',
}


def file_of(method: type[SharpnessAware]) -> str:
    """Return the name of a method's module, which its overlay for recipes and its page have too."""
    return method.__module__.split('.')[-1]


def card(row: dict[str, Any], method: type[SharpnessAware]) -> str:
    """Return the page of a method.

    Args:
        row: its row of the registry's table.
        method: its class.
    """
    name, file = method.__name__, file_of(method)
    rule, sections = _parts(method)
    known_limits = [*_refusals(sections.get('Raises', '')), *_points(_linked(sections.get('Limits', '')))]
    trainer, recipe, loop = snippets(method)
    parts = (
        f'# {name}\n\n**TL;DR.** {row["summary"]} Take it when {row["when"]}.\n\n'
        f'**Attribution.** {_reference(sections["Reference"])}\n',
        f'## Rule\n\n{rule}\n',
        f'### Departures from the published code\n\n{sections["Departures"]}\n' if 'Departures' in sections else '',
        f'## Hyper-parameters\n\n{hyperparameters(method, own_fields(method))}\n'
        'All methods share [further ones](index.md#hyper-parameters-of-every-method).\n',
        f'## Usage\n\nIn a Composer Trainer:\n\n```python\n{trainer}```\n\n'
        f'As an overlay for any recipe ([{file}.yaml](../../yamls/methods/{file}.yaml)):\n\n```\n{recipe}```\n\n'
        f'In a loop of your own:\n\n```python\n{loop}```\n',
        f'## Suggested settings\n\n{_linked(sections.get("Settings", _NOTHING_PUBLISHED))}\n',
        f'## Cost\n\n{_cost(row)}\n{sections["Passes and memory"]}\n\n'
        f'<!-- figures: method {name} -->\n<!-- end of figures -->\n',
        f'## Composability\n\n{_composability(method)}\n'
        'What every method promises beside other algorithms, over ranks and shards and in low precision:\n'
        '[promises](../promises.md).\n',
        f'## Known not to work\n\n{"".join(f"- {limit}{chr(10)}" for limit in known_limits)}'
        '- What holds for all methods: [limits](../limits.md).\n',
        f'## API\n\n[{name}](../api/methods.md#composer_sam.methods.{file}.{name}): its signature and source.\n',
        f'`python -m composer_sam.methods docs/methods` writes this page from `composer_sam/methods/{file}.py`.\n',
    )
    return '\n'.join(part for part in parts if part)


def snippets(method: type[SharpnessAware]) -> tuple[str, str, str]:
    """Return the lines that use a method in a Trainer, on the command line and in a loop."""
    name, file = method.__name__, file_of(method)
    found = re.search(r'>>> algorithm = (\S.*?\))(?:   #|$)', inspect.getdoc(method) or '', flags=re.MULTILINE)
    assert found is not None, f'the docstring of {name} has no example'
    made = found[1]
    trainer = (
        f'from composer import Trainer\nfrom composer_sam import {name}\n\n'
        'trainer = Trainer(\n    model=model,\n    optimizers=optimizer,\n    train_dataloader=loader,\n'
        f"    max_duration='10ep',\n    algorithms=[{made}],\n)\ntrainer.fit()\n"
    )
    own = own_fields(method)
    value = f'algorithms.{file}.{own[0].name}={own[0].default:g}'
    recipe = f'composer-sam train yamls/digits/sgd.yaml yamls/methods/{file}.yaml {value}\n'
    if any(field.name == 'total_steps' for field in own):
        made = f'{made[:-1]}, total_steps=10 * len(loader))'
    graph = 'create_graph=True' if method().backwards_create_graph else ''
    loop = (
        f'import torch\nfrom composer_sam import {name}, SharpnessAwareOptimizer\n\n'
        'base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)\n'
        f'optimizer = SharpnessAwareOptimizer(base, {made}, model)\n'
        'for x, y in loader:\n    for _ in optimizer.passes():\n        optimizer.zero_grad()\n'
        f'        loss_fn(model(x), y).backward({graph})\n'
    )
    return trainer, recipe, loop


def hyperparameters(method: type[SharpnessAware], fields: list[dataclasses.Field[Any]]) -> str:
    """Return the table of some of a method's hyper-parameters: default, range and meaning."""
    meanings = _meanings(inspect.getdoc(method) or '')
    rows = [(f'`{f.name}`', f'`{f.default!r}`', _range(f), meanings[f.name]) for f in fields]
    return table(('hyper-parameter', 'default', 'range', 'meaning'), rows)


def _parts(method: type[SharpnessAware]) -> tuple[str, dict[str, str]]:
    """Return the text of a docstring outside its sections, without the first line, and the text of each section."""
    doc = (inspect.getdoc(method) or '') + '\n'
    sections = {title: inspect.cleandoc(text) for title, text in _SECTION.findall(doc)}
    rule = _SECTION.sub('', doc).split('\n', 1)[1]
    converted = {title: of_docstring(text) for title, text in sections.items()}
    return re.sub(r'\n{3,}', '\n\n', of_docstring(rule)).strip(), converted


def _reference(text: str) -> str:
    return re.sub(r'(https://\S+)', r'<\1>', ' '.join(text.split()))


def _linked(text: str) -> str:
    """Return a text with links to the reports and pages that it names."""
    text = re.sub(r'docs/(\w+)\.md', r'[\1](../\1.md)', text)
    return re.sub(r'benchmarks/results/(\w+)\.md', r'[\1](../../benchmarks/results/\1.md)', text)


def _refusals(raises: str) -> list[str]:
    """Return what a method refuses besides values out of range, one sentence each."""
    text = ' '.join(raises.split()).removeprefix('ValueError: ').rstrip('.')
    text = re.sub(r'^a hyper-parameter is out of its range[,;]?\s*(or,?\s+)?', '', text)
    return [f'Refused with an error: {text}.'] if text else []


def _points(limits: str) -> list[str]:
    return [' '.join(point.split()) for point in re.split(r'^- ', limits, flags=re.MULTILINE) if point]


def _cost(row: dict[str, Any]) -> str:
    shown = ('passes', 'cost', 'extra_copies', 'held', 'collectives')
    return table(('passes', 'cost', 'memory', 'held', 'collectives'), [[row[key] for key in shown]])


def _composability(method: type[SharpnessAware]) -> str:
    rows = [(f'`{name}`', _answer(method, name, value)) for name, value in _OPTIONS.items()]
    numbers = ', '.join(f'`{f.name}`' for f in own_fields(method) if 'range' in f.metadata)
    groups = ', '.join(
        f'`{f.name}`' for f in own_fields(method) if 'range' in f.metadata and f.metadata['range'].per_group
    )
    rows += [('`schedules`', numbers), ('a value per parameter group', groups), ('two calls', _two_calls(method()))]
    return table(('option', 'taken'), rows)


def _answer(method: type[SharpnessAware], name: str, value: Any) -> str:
    try:
        method(**{name: value})
    except ValueError as error:
        return f'refused: {str(error).split(": ", 1)[-1]}'
    return 'yes'


def _two_calls(method: SharpnessAware) -> str:
    if method.watches_outputs:
        return 'refused: it watches the outputs of the first forward'
    if method.passes != 2 or method.varies:
        return 'refused: a step may take other than two passes'
    return 'yes'


def _range(field: dataclasses.Field[Any]) -> str:
    if 'choices' in field.metadata:
        return ', '.join(f'`{choice!r}`' for choice in field.metadata['choices'])
    if 'range' in field.metadata:
        bounds = ' and '.join(f'{sign} {bound:g}'.replace('>=', '≥') for sign, bound in field.metadata['range'].bounds)
        return (bounds or 'any number') + (', or `None`' if field.default is None else '')
    if isinstance(field.default, bool):
        return '`True`, `False`'
    if isinstance(field.default, int):
        return f'integer ≥ {min(1, field.default)}'
    return {'int | None': 'integer ≥ 1, or `None`', 'str | None': 'a name, or `None`'}.get(str(field.type), '')


def _meanings(doc: str) -> dict[str, str]:
    """Return the text of each argument in a docstring's ``Args``, as Markdown."""
    section = re.split(r'\n\n', doc.split('Args:\n', 1)[1], maxsplit=1)[0]
    entries = re.findall(r'^    (\w+): (.*(?:\n {8}.*)*)', section, flags=re.MULTILINE)
    return {name: of_docstring(' '.join(text.split())) for name, text in entries}
