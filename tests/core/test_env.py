"""DSA_* variables: defaults, values, refusals, and that their table tells the truth."""

from pathlib import Path

import pytest

from dsa_plugin.env import VARIABLES, Env

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_defaults() -> None:
    expected = Env(
        plugin="auto",
        index_cache_dtype="auto",
        logits_workspace_mb=512,
        kernels="auto",
        op_counts=None,
        check=False,
    )
    assert Env.load({"PATH": "/bin", "NOT_DSA_X": "1"}) == expected


def test_values() -> None:
    given = {
        "DSA_PLUGIN": "off",
        "DSA_INDEX_CACHE_DTYPE": "fp8",
        "DSA_LOGITS_WORKSPACE_MB": "1",
        "DSA_KERNELS": "torch",
        "DSA_OP_COUNTS": "counts.json",
        "DSA_CHECK": "1",
    }
    assert Env.load(given) == Env(
        plugin="off",
        index_cache_dtype="fp8",
        logits_workspace_mb=1,
        kernels="torch",
        op_counts=Path("counts.json"),
        check=True,
    )


def test_reads_the_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSA_PLUGIN", "on")
    assert Env.load().plugin == "on"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DSA_PLUGIN", "ON"),
        ("DSA_PLUGIN", ""),
        ("DSA_INDEX_CACHE_DTYPE", "bf16"),
        ("DSA_KERNELS", "eager"),
        ("DSA_LOGITS_WORKSPACE_MB", "0"),
        ("DSA_LOGITS_WORKSPACE_MB", "-1"),
        ("DSA_LOGITS_WORKSPACE_MB", "1.5"),
        ("DSA_LOGITS_WORKSPACE_MB", "1_000"),
        ("DSA_LOGITS_WORKSPACE_MB", "²"),
        ("DSA_LOGITS_WORKSPACE_MB", ""),
        ("DSA_CHECK", "yes"),
        ("DSA_CHECK", ""),
    ],
)
def test_bad_value(name: str, value: str) -> None:
    (variable,) = [v for v in VARIABLES if v.name == name]
    with pytest.raises(ValueError, match="allowed") as caught:
        Env.load({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r}; allowed: {variable.allowed}; unset it for")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("DSA_PLUGINS", "DSA_PLUGIN"),
        ("DSA_LOGITS_WORKSPACE", "DSA_LOGITS_WORKSPACE_MB"),
        ("DSA_INDEX_DTYPE", "DSA_INDEX_CACHE_DTYPE"),
        ("DSA_PLUGI", "DSA_PLUGIN"),
        ("DSA_CHECKS", "DSA_CHECK"),
    ],
)
def test_unknown_name_is_an_error(typo: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"^{typo} is not .* did you mean {meant}\?.* Unset"):
        Env.load({typo: "x"})


def test_names_of_the_tests_are_ignored() -> None:
    assert Env.load({"DSA_TEST_ANYTHING": "x"}) == Env.load({})


def test_configuration_lists_every_variable() -> None:
    rows = {
        cells[1].strip(" `"): (cells[2].strip(), cells[3].strip(" `"))
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `DSA_")
        for cells in [line.split("|")]
    }
    assert rows == {v.name: (v.allowed, v.default) for v in VARIABLES}
