"""The house: what is at the top, how long and how dense the file is, and that it stands alone."""
import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

import cdslm
from tests.conftest import ROOT, SMALL, flags, speech_like

TOP = {"README.md", "LICENSE", "cdslm.py", "sample.py", "eval_pjsd.py", "requirements.txt", "tests", "docs", "lab"}
UNCOUNTED = ast.expr_context, ast.operator, ast.boolop, ast.unaryop, ast.cmpop
PART_II = "# " + 98 * "=" + "\n# PART II"


def figures(path):
    """Lines, lines over 100 columns, syntax nodes per code line, and the longest function of a file."""
    text = path.read_text()
    lines, tree, docstrings = text.splitlines(), ast.parse(text), set()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = [i for i, line in enumerate(lines, 1)
            if line.strip() and not line.strip().startswith("#") and i not in docstrings]
    nodes = sum(not isinstance(node, UNCOUNTED) for node in ast.walk(tree))
    longest = max((node.end_lineno - node.lineno + 1 for node in functions), default=0)
    return {"lines": len(lines), "wide": sum(len(line) > 100 for line in lines),
            "density": nodes / len(code), "longest function": longest}


def test_the_top_level_is_the_cards():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".") and (ROOT / name).exists()} <= TOP | {"assets"}


def test_the_one_file_keeps_to_its_budgets(capsys):
    found = {path.name: figures(path) for path in (ROOT / "cdslm.py", ROOT / "sample.py", ROOT / "eval_pjsd.py")}
    with capsys.disabled():
        print("", *(f"{name}: {values}" for name, values in found.items()), sep="\n")
    file = found["cdslm.py"]
    assert file["density"] <= 8.5 and file["longest function"] <= 60 and file["wide"] == 0


def imported(source):
    """The top-level modules that a program imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


USE_PART_I = """
import copy
import torch
from part import Config, Diffusion, MMDiT, Encoder, OneDevice, make_optimizers, sample, training_step
config = Config(depth=1, width=64, ctx_seconds=0.4, gen_seconds=0.8, batch_size=4, micro_batch=2, steps=5)
model = MMDiT(config)
ema = copy.deepcopy(model).requires_grad_(False)
frames = Encoder().encode(0.1 * torch.randn(2, 96 * 300))
ctx, x0 = frames.split([32, 64], dim=1)
print(Diffusion(config).loss(model, x0, ctx, torch.ones(2), torch.randn_like(x0)).shape)
optimizers = make_optimizers(model, config)
batches = iter(lambda: (ctx, x0, torch.randn_like(x0)), None)
for step in range(5):
    print(training_step(model, ema, optimizers, Diffusion(config), config, step, batches, OneDevice()).tolist())
print(sample(ema, ctx, steps=2).shape)
"""


def test_part_one_can_be_cut_out(tmp_path):
    """It needs torch and the standard library only, computes a loss, trains and samples."""
    part_one, banner, _ = (ROOT / "cdslm.py").read_text().partition(PART_II)
    assert banner and len(part_one[part_one.index("# PART I:"):].splitlines()) <= 800
    assert imported(part_one) - {"torch"} <= sys.stdlib_module_names
    (tmp_path / "part.py").write_text(part_one)
    done = subprocess.run([sys.executable, "-c", USE_PART_I], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "torch.Size([2])" and lines[-1] == "torch.Size([2, 64, 80])"
    losses = [float(line.strip("[").split(",")[0]) for line in lines[1:-1]]
    assert losses[-1] < losses[0]


@pytest.fixture
def alone(tmp_path):
    """A folder with cdslm.py and some recordings, nothing else; and what runs a command there."""
    shutil.copy(ROOT / "cdslm.py", tmp_path)
    (tmp_path / "recordings").mkdir()
    for number in range(3):
        soundfile.write(tmp_path / f"recordings/{number}.wav", speech_like(30, 8000, number), 8000)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words, launch=(), **settings):
        few = flags(**SMALL | dict(data="recordings", out="run", steps=6, eval_every=2, decoder="neural",
                                   decoder_steps=2) | settings)
        return subprocess.run([sys.executable, *launch, "cdslm.py", *few, *words], cwd=tmp_path, text=True,
                              capture_output=True, env=environment, timeout=300)
    return tmp_path, run


def test_the_file_stands_alone(alone):
    """Copied to an empty folder it caches, trains, goes on after a kill, validates and leaves sound."""
    folder, run = alone
    killed = run(steps=4)
    assert killed.returncode == 0, killed.stderr
    for name in ("checkpoint.pt", "1_generated.wav"):
        assert (folder / "run" / name).exists()
    done = run()
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout and "lab/page.py is not here" in done.stdout
    assert cdslm.load(folder / "run/checkpoint.pt")["step"] == 6
    toys = run(data="toy", out="other")
    assert toys.returncode == 2 and toys.stderr.startswith("error: ") and toys.stderr.count("\n") == 1
    assert "lab/toyspeech.py" in toys.stderr and not (folder / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("words, launch", [
    ((), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")), (("--compile",), ())])
def test_alone_it_runs_on_two_ranks_and_compiled(alone, words, launch):
    folder, run = alone
    done = run(*words, launch=launch, device="cpu")
    assert done.returncode == 0, done.stderr
    assert (folder / "run/1_generated.wav").exists()


def test_the_file_is_executed_once(tmp_path):
    """Although the lab imports it, too."""
    marked = "LAUNCHED = time.perf_counter()\n"
    for name in ("cdslm.py", "lab"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    text = (tmp_path / "cdslm.py").read_text()
    assert marked in text
    (tmp_path / "cdslm.py").write_text(text.replace(marked, marked + "print('executed')\n"))
    done = subprocess.run([sys.executable, "cdslm.py", "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("executed") == 1


@pytest.mark.parametrize("old, new, differs", [
    ("return capped if self.predict", "return 2 * capped if self.predict", True),
    ("        shrink = math.sin(next_phi)", "        shrink = math.cos(next_phi)", True),
    ('"""One update of the network', '"""One (a note) update of the network', False),
    ("        # Tokens.\n", "        # Tokens of a student.\n", False),
    ("VALIDATION_WINDOWS = 64", "VALIDATION_WINDOWS = 65", False)])
def test_the_methods_fingerprint_follows_the_method_alone(tmp_path, old, new, differs):
    """Not its comments, its docstrings, or the machinery."""
    text = (ROOT / "cdslm.py").read_text()
    assert text.count(old) == 1
    (tmp_path / "edited.py").write_text(text.replace(old, new))
    assert (cdslm.method_fingerprint(tmp_path / "edited.py") != cdslm.method_fingerprint()) == differs


def test_a_run_does_not_go_on_with_another_method(small, mute, monkeypatch):
    """The same command after an edit would otherwise generate from old weights."""
    cdslm.train(small(steps=1))
    python = cdslm.method_fingerprint().split()[0]
    monkeypatch.setattr(cdslm, "method_fingerprint", lambda: f"{python} 01234567")
    with pytest.raises(cdslm.UserError, match="has changed since this run began"):
        cdslm.train(small(steps=1))
    monkeypatch.setattr(cdslm, "method_fingerprint", lambda: "3.99 01234567")
    cdslm.train(small(steps=1))                                               # another Python cannot tell


def test_an_older_run_goes_on(small, mute):
    """One from before the method's fingerprint, with settings that have since left Config."""
    config = small(steps=2)
    cdslm.train(config)
    path = Path(config.out) / "config.json"
    facts = json.loads(path.read_text())
    del facts["method"]
    path.write_text(json.dumps(facts | dict(print_params=False, dry_run=False, devices=0, tflops=400.0, json=False)))
    assert cdslm.load_run(config.out)[0] == cdslm.read_config(config.out) == config
    cdslm.train(small(steps=4))
    assert cdslm.load(Path(config.out) / "checkpoint.pt")["step"] == 4
