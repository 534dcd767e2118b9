import re
import shlex

import pytest
import soundfile

import cdslm
import sample
from tests.conftest import ROOT, SMALL, flags, speech_like

README = ROOT / "README.md"
FEW = flags(**{key: SMALL[key] for key in ("depth", "width", "toy_hours", "decoder", "ctx_seconds", "gen_seconds")})


def commands(start):
    """Commands of the README's fenced blocks that begin with `start`, as lists of words without comments."""
    text = README.read_text() if README.exists() else ""
    lines = [line.split("#")[0] for block in re.findall(r"```\w*\n(.*?)```", text, re.S) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if part.startswith(start)]


@pytest.fixture(scope="module")
def run():
    """run(words): what `python words` would do, without starting another Python."""
    def run(words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", words)
            {"cdslm.py": cdslm, "sample.py": sample}[words[0]].main()
    return run


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """A working folder with the run that the README makes first, of few steps."""
    words = commands("python cdslm.py --size tiny")
    if not words:
        pytest.skip("the README has no training command yet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("readme"))
        run(words[0][1:] + FEW + ["--steps", "2", "--batch-size", "2"])
        yield folder


def test_both_first_commands_are_there():
    if not README.exists():
        pytest.skip("no README yet")
    text = README.read_text()
    assert "pip install -r requirements.txt && python cdslm.py --size tiny\n" in text
    assert "pip install -r requirements.txt pytest && python -m pytest\n" in text


def test_continuous_integration_runs_the_readmes_tests():
    assert "pip install -r requirements.txt pytest && python -m pytest\n" in (ROOT / ".ci/run").read_text()


def test_the_first_command_leaves_what_it_promises(folder):
    run = folder / "out/tiny"
    assert {"config.json", "checkpoint.pt", "log.jsonl", "1_generated.wav"} <= {path.name for path in run.iterdir()}


def test_every_training_command_is_understood():
    for words in commands("python cdslm.py"):
        cdslm.parse(words[2:])


def test_every_sampling_command_runs(folder, run):
    """As they stand, with few steps; runs and prompts that are not here are replaced by those that are."""
    soundfile.write(folder / "prompt.wav", speech_like(1.0), 24_000)
    for words in commands("python sample.py"):
        words = [re.sub(r"^out/\w+$", "out/tiny", word) for word in words[1:]]
        for i, word in enumerate(words[:-1]):
            if word == "--prompt" and words[i + 1] != "none":
                words[i + 1] = "prompt.wav"
        run(words + ["--steps", "2"])


def test_every_flag_the_readme_names_exists():
    if not README.exists():
        pytest.skip("no README yet")
    known = {"--" + name.replace("_", "-") for name in cdslm.Config.__dataclass_fields__}
    for program in ("sample.py", "eval_pjsd.py", "scaling.py"):
        if (ROOT / program).exists():
            known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / program).read_text()))
    named = {flag for words in commands("python") for flag in words if flag.startswith("--")}
    assert named <= known | {"--slow"}
