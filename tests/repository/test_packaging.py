"""What pip installs: wheel and sdist have every file, and recipes are found without the tree."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ("dsa_plugin", "kernels", "model_registry", "recipes", "LICENSE", "README.md")
_BUILD = (
    "import sys, setuptools.build_meta as build; tree = sys.argv[1]; "
    "build.build_sdist(tree); build.build_wheel(tree)"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a wheel and an sdist."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copy(ROOT / "pyproject.toml", tree)
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree)
    subprocess.run([sys.executable, "-c", _BUILD, str(tree)], cwd=tree, check=True)
    return tree


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel was unpacked, far from the tree."""
    site = tmp_path_factory.mktemp("site")
    [wheel] = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def files(built_as: dict[str, str]) -> set[Path]:
    """What belongs into an archive that has the three packages in these folders."""
    roots = {"dsa_plugin": "", "dsa_kernels": "kernels", "dsa_registry": "model_registry"}
    found = {
        Path(built_as[package]) / path.relative_to(ROOT / root)
        for package, root in roots.items()
        for path in (ROOT / root / package).rglob("*")
        if path.suffix in (".py", ".json", ".yaml", ".txt", ".css", ".html", ".js")
        or path.name == "py.typed"
        or path.parent.name == "prose"
    }
    recipes = {
        Path(built_as["dsa_recipes"]) / path.relative_to(ROOT / "recipes")
        for path in (ROOT / "recipes").rglob("*")
        if path.suffix in (".yaml", ".json")
    }
    return found | recipes


def test_the_wheel_has_every_file(installed: Path) -> None:
    packages = {"dsa_plugin": "", "dsa_kernels": "", "dsa_registry": ""}
    found = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    expected = files({**packages, "dsa_recipes": "dsa_recipes"})
    assert {path for path in found if ".dist-info" not in path.parts[0]} == expected


def test_the_sdist_has_every_file(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        found = {Path(name).relative_to(Path(name).parts[0]) for name in archive.getnames()}
    roots = {"dsa_plugin": "", "dsa_kernels": "kernels", "dsa_registry": "model_registry"}
    assert files({**roots, "dsa_recipes": "recipes"}) <= found


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
