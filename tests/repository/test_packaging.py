"""What pip installs: a wheel built from the tree has all of it, and finds its recipes by itself."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("dsa_plugin", "kernels", "model_registry", "recipes", "LICENSE", "README.md")
_BUILD = "import sys, setuptools.build_meta as build; build.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which a wheel was unpacked, far from the tree."""
    tree, site = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "pyproject.toml", tree)
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree)
    subprocess.run([sys.executable, "-c", _BUILD, str(tree)], cwd=tree, check=True)
    [wheel] = tree.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_the_wheel_has_every_file(installed: Path) -> None:
    roots = {"dsa_plugin": "", "dsa_kernels": "kernels", "dsa_registry": "model_registry"}
    modules = {
        path.relative_to(ROOT / root)
        for package, root in roots.items()
        for path in (ROOT / root / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    data = {
        Path("dsa_recipes") / path.relative_to(ROOT / "recipes")
        for path in (ROOT / "recipes").rglob("*")
        if path.suffix in (".yaml", ".json")
    }
    found = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert {path for path in found if ".dist-info" not in path.parts[0]} == modules | data


def test_recipes_are_found_without_the_tree(installed: Path, tmp_path: Path) -> None:
    source = {f"{path.parent.name}/{path.stem}" for path in (ROOT / "recipes").glob("*/*.yaml")}
    code = "from dsa_plugin.recipes import FOLDER, recipe_names; print(FOLDER, *recipe_names())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    folder, *names = done.stdout.split()
    assert Path(folder) == installed / "dsa_recipes"
    assert names == sorted(source)
