"""What the documentation shows works, and what is generated is up to date."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.readme import filled as figures_filled
from composer_sam import SharpnessAwareOptimizer
from composer_sam.methods import AESAM, GAM, MSAM, SAM, LookSAM, RandomSAM, own_fields, registry, table
from composer_sam.methods.__main__ import filled, pages
from composer_sam.methods.base import SharpnessAware
from composer_sam.methods.cards import file_of, snippets
from tests.problems import made
from tests.readers import stand_ins

DOCS = Path(__file__).parents[2] / 'docs'
METHODS = DOCS / 'methods'
PAGES = sorted(DOCS.rglob('*.md'))
PAGES_OF_METHODS = {name: (METHODS / f'{file_of(method)}.md').read_text() for name, method in registry.items()}
# ```python before: lines of other implementations, which cannot be run.
BLOCK = re.compile(r'^```python\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def _name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize('page', [page for page in PAGES if page.parent != METHODS], ids=_name)
def test_every_block_runs(page: Path) -> None:
    """The blocks of a page run in order, in one namespace."""
    text = page.read_text()
    namespace: dict[str, Any] = {'__name__': page.stem}
    for block in BLOCK.finditer(text):
        line = text.count('\n', 0, block.start(1))
        # Empty lines put the errors' line numbers right.
        exec(compile('\n' * line + block.group(1), str(page), 'exec', dont_inherit=True), namespace)


@pytest.mark.parametrize('name', registry)
def test_the_lines_on_the_page_of_a_method_train(name: str) -> None:
    trainer, _, loop = snippets(registry[name])
    page = (METHODS / f'{file_of(registry[name])}.md').read_text()
    for block in (trainer, loop):
        assert f'```python\n{block}```' in page
        namespace = stand_ins(block)
        before = [parameter.detach().clone() for parameter in namespace['model'].parameters()]
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message=r'Using backward\(\) with create_graph')
            exec(compile(block, name, 'exec', dont_inherit=True), namespace)
        after = list(namespace['model'].parameters())
        assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True)), f'nothing is trained in {block}'


@pytest.mark.parametrize('page', PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if target.startswith(('http://', 'https://')):
            continue
        path, _, anchor = target.partition('#')
        linked = page if not path else page.parent / path
        assert linked.exists(), target
        if anchor.startswith('composer_sam.'):
            assert f'::: {anchor}\n' in linked.read_text(), target
        elif anchor:
            headings = re.findall(r'^#+ (.*)$', linked.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}
            assert anchor in anchors, target


def test_the_pages_are_there() -> None:
    assert {page.stem for page in PAGES} >= {'index', 'migration', 'plain_pytorch', 'promises', 'limits'}


def test_the_pages_of_the_methods_are_the_generated_ones() -> None:
    commands = 'run: python -m composer_sam.methods docs/methods, and then python -m benchmarks.readme'
    found = {page.name: page.read_text() for page in METHODS.glob('*.md')}
    index = found.pop('index.md')
    assert sorted(found) == sorted(pages())
    for name, page in pages().items():
        assert found[name] == figures_filled(page), commands
    assert index == filled(index), commands


@pytest.mark.parametrize('name', registry)
def test_every_hyperparameter_has_a_range_and_a_meaning(name: str) -> None:
    section = PAGES_OF_METHODS[name].split('\n## Hyper-parameters\n')[1].split('\n## ')[0]
    rows = dict(re.findall(r'^\| `(\w+)` \| (.+) \|$', section, flags=re.MULTILINE))
    assert list(rows) == [field.name for field in own_fields(registry[name])]
    for row in rows.values():
        assert all(cell.strip() for cell in re.split(r'(?<!\\)\|', row)), row


@pytest.mark.parametrize('name', registry)
def test_the_page_of_a_method_has_every_section_of_a_card(name: str) -> None:
    page = PAGES_OF_METHODS[name]
    assert '\n**TL;DR.** ' in page and '\n**Attribution.** ' in page
    sections = re.findall(r'^## (.*)$', page, flags=re.MULTILINE)
    card = [
        'Rule',
        'Hyper-parameters',
        'Usage',
        'Suggested settings',
        'Cost',
        'Composability',
        'Known not to work',
        'API',
    ]
    assert sections == card
    settings = page.split('## Suggested settings\n\n')[1].split('\n\n##')[0]
    assert len(settings.splitlines()) <= 3 and settings.endswith('.')
    assert not re.search(r'``|:\w+:`|\.\. math', page.replace('```', '')), 'marks of reStructuredText'


def test_the_table_counts_the_collectives_that_two_ranks_take() -> None:
    """tests/distributed/test_reference.py counts them as they happen."""
    path = Path(__file__).parents[1] / 'distributed' / 'test_reference.py'
    (counted,) = re.findall(r'^COLLECTIVES = (\{.*?\})$', path.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert {row['name']: row['collectives'] for row in table()} == ast.literal_eval(counted)


@pytest.mark.parametrize('name', registry)
def test_every_method_says_when_to_take_it_and_who_found_it(name: str) -> None:
    method = registry[name]
    assert method.when and method.when == method.when.strip().rstrip('.')
    assert re.search(r', 20\d\d, .*https://', method.paper) or re.search(r' 20\d\d, https://', method.paper)


def test_methods_are_grouped_by_their_passes() -> None:
    index = (METHODS / 'index.md').read_text().replace('<!-- end of generated -->', '')
    groups = dict(re.findall(r'^### (\D+?)\n\n\| method (.*?)\n\n', index, flags=re.MULTILINE | re.DOTALL))
    found = {group: re.findall(r'^\| \[(\w+)\]', rows, flags=re.MULTILINE) for group, rows in groups.items()}
    assert list(found) == ['One pass', 'Two passes, or one or two', 'More passes', 'Building blocks of studies']
    assert sorted(name for names in found.values() for name in names) == sorted(registry)
    assert found['Building blocks of studies'] == ['SAMDirection', 'SAMMagnitude', 'SGDHess']
    for group, allowed in (('One pass', {1}), ('Two passes, or one or two', {2}), ('More passes', {3, 4})):
        assert {registry[name]().passes for name in found[group]} == allowed


def test_the_readme_counts_the_methods() -> None:
    assert f'{len(registry)} published methods' in (DOCS.parent / 'README.md').read_text()


@pytest.mark.parametrize(
    ('method', 'expected'),
    [
        (SAM(), 2),
        (SAM(ascent_steps=3), 4),
        (GAM(), 4),
        (LookSAM(k=5), 1 + 1 / 5),
        (LookSAM(k=1), 2),
        (RandomSAM(p=1.0), 2),
        (MSAM(), 1),
        (AESAM(), None),
    ],
    ids=repr,
)
def test_the_cost_is_the_average_number_of_passes(method: SharpnessAware, expected: float | None) -> None:
    assert method.mean_passes == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize('name', registry)
def test_the_table_says_what_is_held_between_steps(name: str) -> None:
    """Counted in the state that two steps leave."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = made(name)
    optimizer = SharpnessAwareOptimizer(base, method, model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward(create_graph=method.backwards_create_graph)
        return loss

    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message=r'Using backward\(\) with create_graph')
        for _ in range(2):
            optimizer.step(closure)
    held = [value for key, value in base.state[model.weight].items() if key != 'momentum_buffer']
    copies = sum(isinstance(value, torch.Tensor) for value in held)
    assert (copies, len(held) - copies) == (method.held_copies, len(method.held_numbers))
    (row,) = (row for row in table() if row['name'] == name)
    assert [int(number) for number in re.findall(r'\d+', row['held'])] == [n for n in (copies, len(held) - copies) if n]


def test_counting_draws_no_random_numbers_and_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    before = torch.get_rng_state()
    table()
    assert torch.equal(before, torch.get_rng_state())
    assert not recwarn.list
