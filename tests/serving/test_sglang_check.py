"""SGLang's `probe.check`: sees each way in which SGLang serves without us."""

import os
import subprocess

import pytest

from dsa_testbed.sglang_server import sglang_python

pytestmark = pytest.mark.serving


@pytest.mark.parametrize(
    ("env", "finding"),
    [
        ({}, None),
        ({"DSA_PLUGIN": "off"}, "FAIL entry point: DSA_PLUGIN=off: unset it"),
        ({"SGLANG_PLUGINS": "another"}, "FAIL entry point: SGLANG_PLUGINS=another leaves dsa out"),
        (
            {"SGLANG_EXTERNAL_MODEL_PACKAGE": "json"},
            "FAIL model classes: DeepseekV32ForCausalLM is ",
        ),
    ],
    ids=["all is well", "off", "left out", "another package of models"],
)
def test_check(env: dict[str, str], finding: str | None) -> None:
    done = subprocess.run(
        [str(sglang_python()), "-P", "-m", "dsa_plugin.hosts.sglang.probe.check"],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env,
        capture_output=True,
        text=True,
        check=False,
    )
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    if finding is None:
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("ok   ") == 6
    else:
        assert done.returncode == 1
        assert any(line.startswith(finding) for line in failures), done.stdout
