"""What pyproject.toml cannot say: the recipes in yamls/ travel inside the package, as composer_sam/yamls."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = Path('yamls')  # relative to this file, where every build runs


class BuildWithRecipes(build_py):
    """Copy the recipes into what is built. An editable installation uses those beside the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._recipes().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target, preserve_mode=False)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        recipes = [] if self.editable_mode else list(self._recipes().values())
        return [*super().get_outputs(include_bytecode), *recipes]

    def _recipes(self) -> dict[str, str]:
        return {str(file): str(Path(self.build_lib, 'composer_sam', file)) for file in sorted(RECIPES.rglob('*.yaml'))}


if __name__ == '__main__':
    setup(cmdclass={'build_py': BuildWithRecipes})
