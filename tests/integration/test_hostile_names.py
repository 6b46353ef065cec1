"""Names are shown as they are, in tables, pictures and pages, or refused before training in one line."""

from __future__ import annotations

import html
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib import cbook
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console
from torch import nn

from composer_sam.commands.main import main
from composer_sam.files import file_name
from composer_sam.landscapes.page import page
from composer_sam.landscapes.pictures import contours, curves, png, surfaces
from composer_sam.landscapes.storage import Landscape
from composer_sam.landscapes.subspaces import Mark
from composer_sam.recipes import RecipeError, as_yaml, load_recipe
from composer_sam.studies import compare, console, drawing, tables, texts
from composer_sam.studies.checkpoints import CheckpointError, check_labels
from composer_sam.studies.landscape import Request
from composer_sam.studies.parallel import with_seed
from composer_sam.studies.report import tabulate_landscapes
from composer_sam.studies.result import RunResult

SGD = str(Path(__file__).parents[2] / 'yamls' / 'digits' / 'sgd.yaml')
SHOWN = [
    '<script>alert(1)</script>',
    'a "quoted" & \'quoted\' name',
    '{{ name }} {name} {} ${name} $title %s %(x)s %{x}',
    '$x^$',
    '$\\frac{1}$ and $5',
    '_begins with an underscore',
    '[bold]not bold[/bold] [/] :smile:',
    'a | b * c ` _d_ [e](f) ~g~',
    '-leading',
    'a/b\\c',
    '../../out',
    'ünï ρ 好 🙂',
    'x' * 200,
]
REFUSED = ['', ' ', 'two\nlines', 'a\ttab', 'escape \x1b[2J', 'turned \u202eround', 'y' * 201]


def run(name: str, seed: int = 0) -> compare.Run:
    curve = {'epoch': [1.0, 2.0], 'accuracy': [0.5, 0.6], 'loss': [1.0, 0.9]}
    return compare.Run('n', name, seed, 2, 0.1, 0.6, 0.9, 'how', {}, curve, curve)


def results(name: str) -> list[RunResult]:
    """Return the runs of a study of a recipe, at two values with names."""
    empty = {'geometry': None, 'threads': 1, 'versions': {}, 'train': {}, 'test': {}}
    config = {'data': {'name': name, 'label_noise': 0.0}, 'sharpness': None}
    return [
        RunResult('n', name, {'data.root': value}, 0, 0.5, 1.0, 1.0, 2, 0.1, None, config=config, **empty)
        for value in (name, 'b')
    ]


def landscape(name: str, dims: int) -> Landscape:
    axis = np.linspace(-1, 1, 3)
    loss = 1 + (axis**2 if dims == 1 else axis[None, :] ** 2 + axis[:, None] ** 2)
    marks = (Mark(name, (0.0,) * dims, 1.0, 0.5), Mark('other', (1.0,) * dims, 2.0, 0.5))
    data = {'label_noise': 0.0, 'validation_fraction': 0.0}
    about = {'samples': 8, 'split': 'train', 'data': data}
    return Landscape(name, (f'towards {name}',) * dims, (axis,) * dims, loss, None, marks, about)


def drawn(figure: Figure) -> list[str]:
    """Draw a figure, and return all texts in it, as they are drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        png(figure, dpi=30)
    texts: Iterator[Any] = (one for one in figure.findobj(Text))
    found = [text.get_text() for text in texts]
    assert not any(cbook.is_math_text(text) for text in found)
    return [text.replace(r'\$', '$').replace('\u200b', '') for text in found]


def every_text(value: Any) -> list[str]:
    if isinstance(value, (dict, list)):
        return [text for one in (value.values() if isinstance(value, dict) else value) for text in every_text(one)]
    return [value] if isinstance(value, str) else []


def there(name: str, texts: list[str]) -> bool:
    """Return whether a name is in one of the texts, in which it may go over several lines."""
    return any(''.join(name.split()) in ''.join(text.split()) for text in texts)


@pytest.mark.parametrize('name', SHOWN)
def test_pictures(name: str) -> None:
    figures = [
        compare.draw([run(name), run('other')], f'on {name}'),
        drawing.draw(results(name)),
        curves([landscape(name, 1), landscape('other', 1)], f'Loss around {name}'),
        contours([landscape(name, 2)], f'Loss around {name}'),
        surfaces([landscape(name, 2)], f'Loss around {name}'),
    ]
    for figure in figures:
        assert there(name, drawn(figure))
    # The names of a comparison are at the ends of its curves where they are short.
    for figure in figures[1 if len(name) <= 30 and name.isascii() else 0 : 2]:
        assert there(name, [text.get_text().replace(r'\$', '$') for text in figure.legends[0].get_texts()])


@pytest.mark.parametrize('name', SHOWN)
def test_tables_on_the_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.console().print(compare.tabulate([run(name), run('other')]))
    console.console().print(tabulate_landscapes([landscape(name, 2)]))
    for table in tables.tables(results(name)):
        texts.print_table(table)
    console.note(name)
    with console.progress_bar('rows') as progress:
        progress(name, 1, 2)
    captured = capsys.readouterr()
    assert captured.out.count(name) >= 3
    assert captured.err.count(name) == 2 or len(name) > 80  # a bar is not wider than the terminal


def test_a_narrow_terminal_breaks_names_and_cuts_none() -> None:
    name = 'Q' * 200
    for table in (compare.tabulate([run(name)]), tabulate_landscapes([landscape(name, 2)])):
        file = io.StringIO()
        Console(width=80, file=file, markup=False).print(table)
        assert file.getvalue().count('Q') == 200


@pytest.mark.parametrize('name', SHOWN)
def test_tables_in_markdown(name: str) -> None:
    """A backslash before a punctuation mark stands for the mark in Markdown, within the cells of a table too."""
    found = results(name)
    written = texts.as_markdown(tables.about(found), tables.tables(found))
    rows = [line for line in written.splitlines() if line.startswith('| ')]
    assert len({line.replace(r'\|', '').count('|') for line in rows}) == 1
    unescaped = written
    for mark in '`*<>&~$[]_|':
        unescaped = unescaped.replace(f'\\{mark}', mark)
    assert name in unescaped.replace('\\\\', '\\')
    for mark in ('<script', '$x^$', '[e](f)', '~g', ' _d_ ', '`'):
        assert mark not in written.replace(f'\\{mark}', '').replace(r'\|', '')


@pytest.mark.parametrize('name', SHOWN)
@pytest.mark.parametrize('dims', [1, 2])
def test_the_page(name: str, dims: int) -> None:
    written = page([landscape(name, dims)], name, [name])
    assert written.count(f'>{html.escape(name, quote=False)}<') == 3  # the title, the heading and the note
    assert '<script>alert' not in written
    rest = written.partition('Plotly.newPlot(')[2]
    texts: list[str] = []
    for _ in range(3):  # the element, the traces and the layout
        value, end = json.JSONDecoder().raw_decode(rest := rest.lstrip(' ,\n'))
        rest = rest[end:]
        texts += every_text(value)
    assert html.escape(name, quote=False) in texts[1:]
    assert not any('<' in text.replace('<br>', '').replace('<extra', '').replace('</extra', '') for text in texts)


@pytest.mark.parametrize('name', [*SHOWN, *REFUSED, '..', '.', '/', 'a' * 179 + '好' * 40])
def test_names_of_files(name: str, tmp_path: Path) -> None:
    for other in '-_':
        file = file_name(name, other)
        assert '/' not in file and '\n' not in file and len(file.encode()) <= 180
    path = tmp_path / f'{file_name(name)}.json'
    path.write_text('')
    assert path.parent == path.resolve().parent and list(tmp_path.iterdir()) == [path]


def test_long_names_that_begin_alike_are_two_files() -> None:
    assert file_name('x' * 300) != file_name('x' * 299 + 'y')
    assert file_name('x' * 180) == 'x' * 180


@pytest.mark.parametrize('name', SHOWN)
def test_a_recipe_has_the_name_and_a_folder_in_its_own(name: str, tmp_path: Path) -> None:
    path = tmp_path / 'recipe.yaml'
    path.write_text(f'base: {SGD}\n{yaml.safe_dump({"name": name.replace("${", chr(92) + "${")})}')
    recipe = load_recipe(path, overrides=[f'save_folder={tmp_path}/runs'])
    assert recipe.name == name
    saved = tmp_path / 'config.yaml'
    saved.write_text(as_yaml(recipe))
    assert load_recipe(saved) == recipe
    assert Path(str(with_seed(recipe, 3).save_folder)).resolve().parent == tmp_path / 'runs'


@pytest.mark.parametrize('name', REFUSED)
def test_a_name_that_cannot_be_shown_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / 'recipe.yaml'
    path.write_text(f'base: {SGD}\n{yaml.safe_dump({"name": name})}')
    with pytest.raises(RecipeError, match='^name: .* a name of 1 to 200 characters that can be printed') as caught:
        load_recipe(path)
    assert str(caught.value).isprintable()
    with pytest.raises(CheckpointError, match='no name of 1 to 200 characters that can be printed') as refused:
        check_labels(['SGD', name])
    assert str(refused.value).isprintable()


def test_a_run_name_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^run_name: '\.\./\.\./x' would lead out of save_folder '.*/\{run_name\}'"):
        load_recipe(SGD, overrides=['name=../../x', f'save_folder={tmp_path}/{{run_name}}'])


def test_labels_that_would_be_one_file_are_refused() -> None:
    paths = (Path('a.pt'), Path('b.pt'))
    with pytest.raises(CheckpointError, match=r'would be the same file a_b\.npz; rename one'):
        Request(paths, ('a b', 'a/b'))
    Request(paths, ('a b', 'a/b'), directions='checkpoints', dims=1)  # these are in one file anyway


def test_a_comparison_and_the_landscapes_of_what_it_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ['<b>$x^$</b> [/] {{x}} %s "|" ../é', 'x' * 199 + '$']
    for index, name in enumerate(names):
        Path(f'{index}.yaml').write_text(f'base: {SGD}\nname: {json.dumps(name)}\nmodel: {{hidden: [4]}}\n')
    short = ['max_duration=2ba', 'eval_interval=0', '--jobs', '1']
    assert main(['compare', '0.yaml', '1.yaml', *short, '--out', 'out', '--landscape', '--sharpness']) == 0
    output = capsys.readouterr().out
    assert all(output.count(name) == 2 for name in names)
    assert [one['recipe'] for one in json.loads(Path('out/results.json').read_text())['runs']] == names
    assert html.escape(names[0], quote=False) in Path('out/landscape.html').read_text(encoding='utf-8')
    for file in ('out/comparison.png', 'out/landscape.png', 'out/surface.png'):
        assert Path(file).read_bytes().startswith(b'\x89PNG')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['0.yaml', '1.yaml', 'out']
    checkpoint = next(iter(Path('out/landscape').glob('*.pt')))
    command = [str(checkpoint), '--recipe', '0.yaml', '--samples', '8']
    assert main(['sharpness', *command, '--labels', names[0], '--out', 'out/sharpness.json']) == 0
    assert names[0] in capsys.readouterr().out
    (row,) = json.loads(Path('out/sharpness.json').read_text())
    assert row['label'] == names[0]


def test_a_checkpoint_whose_file_has_two_lines_needs_a_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
    torch.save(model.state_dict(), 'two\nlines.pt')
    command = ['sharpness', 'two\nlines.pt', '--recipe', SGD, 'model.hidden=[4]', '--samples', '8']
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == '' and captured.err.count('\n') == 1 and '--labels: ' in captured.err
    assert main([*command, '--labels', 'one line']) == 0
