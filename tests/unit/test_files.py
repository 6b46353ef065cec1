"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer_sam.files import make_writable, write_whole


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / 'numbers.json'
    write_whole(path, b'one')
    write_whole(path, 'two ±')
    assert path.read_text(encoding='utf-8') == 'two ±'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('fault', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_what_fails_in_the_middle_leaves_the_old_file(
    fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / 'numbers.json'
    write_whole(path, 'old')

    def half(self: Path, data: bytes) -> int:
        with self.open('wb') as file:
            file.write(data[:1])
        raise fault

    monkeypatch.setattr(Path, 'write_bytes', half)
    with pytest.raises(type(fault)):
        write_whole(path, 'new')
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_made_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    make_writable(tmp_path / 'a' / 'b')
    make_writable(tmp_path / 'a' / 'b')
    assert list((tmp_path / 'a' / 'b').iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error() -> None:
    with pytest.raises(OSError):
        make_writable(Path('/proc/self/out'))
