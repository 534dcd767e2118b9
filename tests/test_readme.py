import re
import shlex
import subprocess
import sys

import pytest
import soundfile
import torch

import cdslm
import eval_pjsd
import sample
from lab import plan, scaling
from tests.conftest import ROOT, SMALL, flags, speech_like

README = ROOT / "README.md"
DOCS = ("exercises", "notebook", "results", "fidelity", "faults", "stories", "coherence", "rival", "cluster",
        "colab", "scale")
PAGES = [README, *(ROOT / f"docs/{name}.md" for name in DOCS)]
PROGRAMS = ["sample.py", "eval_pjsd.py"]
PROGRAMS += [f"lab/{path.name}" for path in (ROOT / "lab").glob("*.py")]
TEST = "pip install -r requirements.txt pytest pytest-xdist && python -m pytest -n auto\n"
USED = ("depth", "width", "toy_hours", "decoder", "ctx_seconds", "gen_seconds")
FEW = flags(**{key: SMALL[key] for key in USED})


def text():
    """README.md and docs/*.md, one after the other, in the order in which their code runs."""
    return "\n".join(page.read_text() for page in PAGES)


def commands(start):
    """Commands of the pages' fenced blocks that begin with `start`, as lists of words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text(), re.S | re.M)
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if part.startswith(start)]


@pytest.fixture(scope="module")
def run():
    """run(words): what `python words` would do, without starting another Python."""
    def run(words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", words)
            patch.setattr("lab.clips.transcriber", lambda *_: None)           # it would be trained first
            {"cdslm.py": cdslm, "sample.py": sample}[words[0]].main()
    return run


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """A working folder with the run that the README makes first, of few steps."""
    words = commands("python cdslm.py --size tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("readme"))
        run(words[0][1:] + FEW + ["--steps", "2", "--batch-size", "2"])
        yield folder


def test_both_first_commands_are_there():
    page = README.read_text()
    first = "pip install -r requirements.txt && python cdslm.py --size tiny\n"
    assert first in page.split("\n## Hear it\n")[1]
    assert TEST in page


def test_the_front_page_is_short():
    assert len(README.read_text().splitlines()) <= 260
    assert len(README.read_text().split()) <= 3000


def test_every_page_of_docs_is_known():
    assert {page.name for page in (ROOT / "docs").glob("*.md")} == {page.name for page in PAGES[1:]}


def headings(page):
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in headings(target), link


def test_continuous_integration_runs_the_readmes_tests():
    assert TEST in (ROOT / ".ci/run").read_text()


def test_the_first_command_leaves_what_it_promises(folder):
    run = folder / "out/tiny"
    for name in ("config.json", "checkpoint.pt", "log.jsonl", "1_generated.wav", "index.html"):
        assert (run / name).exists(), name


def test_every_training_command_is_understood():
    for words in commands("python cdslm.py"):
        cdslm.parse(words[2:])


def test_there_are_commands_for_many_devices():
    kinds = ["fsdp" if "fsdp" in words else "ddp" for words in commands("torchrun")]
    assert {"ddp", "fsdp"} == set(kinds)


@pytest.mark.slow
@pytest.mark.parametrize("words", commands("torchrun"), ids=" ".join)
def test_every_command_for_many_devices_runs(words, tmp_path):
    """With its own window, but as two processes on a CPU, with a small network and two steps."""
    program = words.index("cdslm.py")
    few = flags(depth=1, width=64, steps=2, batch_size=2, toy_hours=0.1, decoder="griffinlim",
                device="cpu", out="run")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += [ROOT / "cdslm.py", *words[program + 1:], *few]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 ranks" in done.stdout and (tmp_path / "run/1_generated.wav").exists()
    assert cdslm.load(tmp_path / "run/checkpoint.pt")["step"] == 2


@pytest.mark.slow
def test_every_training_command_runs(run, tmp_path, monkeypatch):
    """As they stand, with few steps; recordings that are not here are replaced by others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recordings").mkdir()
    for number in range(3):
        soundfile.write(tmp_path / f"recordings/{number}.wav", speech_like(90, 8000, number), 8000)
    for number, words in enumerate(commands("python cdslm.py")):
        words = [word for word in words[1:] if word not in ("--out", "--data")]
        words = [word for word in words if not re.match("out/|[Ll]ib|LJ|my_|stories", word)]
        data = ["--data", "recordings"] if "--data" in commands("python cdslm.py")[number] else []
        few = flags(depth=1, width=64, steps=1, batch_size=2, toy_hours=0.1, decoder="griffinlim",
                    out=f"out/{number}")
        run([*words, *data, *few])
        assert cdslm.load(tmp_path / f"out/{number}/checkpoint.pt")["step"] == 1


def test_every_sampling_command_runs(folder, run):
    """As they stand, with few steps; runs and prompts that are not here are replaced."""
    soundfile.write(folder / "prompt.wav", speech_like(1.0), 24_000)
    for words in commands("python sample.py"):
        words = [re.sub(r"^out/\w+$", "out/tiny", word) for word in words[1:]]
        for i, word in enumerate(words[:-1]):
            if word == "--prompt" and words[i + 1] != "none":
                words[i + 1] = "prompt.wav"
        run(words + ["--steps", "2"])


def test_every_judging_planning_and_scaling_command_is_understood():
    for start in ("python eval_pjsd.py", "python -m lab.plan", "python -m lab.scaling"):
        assert commands(start)
    for words in commands("python eval_pjsd.py"):
        eval_pjsd.parse(words[2:])
    for words in commands("python -m lab.plan"):
        plan.parse(words[3:])
    for words in commands("python -m lab.scaling"):
        scaling.parse(words[3:])


def test_the_lab_page_names_every_file_of_the_lab():
    page = (ROOT / "lab/README.md").read_text()
    for path in (ROOT / "lab").glob("*.py"):
        assert f"`{path.name}`" in page or path.name == "__init__.py", path.name


def test_every_module_that_the_pages_run_exists():
    modules = set(re.findall(r"python -m (lab\.\w+)", text()))
    assert {"lab.scaling", "lab.bench", "lab.ablate", "lab.lr_transfer"} <= modules
    assert all((ROOT / (module.replace(".", "/") + ".py")).exists() for module in modules)


def test_every_flag_the_pages_name_exists():
    known = {"--" + name.replace("_", "-") for name in cdslm.Config.__dataclass_fields__}
    for program in PROGRAMS:
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / program).read_text()))
    named = {flag for words in commands("python") for flag in words if flag.startswith("--")}
    assert named <= known | {"--slow"}


def blocks():
    """The pages' Python, block by block."""
    return re.findall(r"^```python\n(.*?)^```", text(), re.S | re.M)


def test_each_main_piece_takes_five_lines_and_every_block_runs(folder):
    """All in one notebook, in their order. A comment that begins with shapes gives those of the
    line's names."""
    notebook, shapes = {}, 0
    for name in "ToySpeech AudioAutoencoder MMDiT Diffusion sample".split():
        assert any(f"import {name}" in b or f", {name}\n" in b for b in blocks()), name
    for block in blocks():
        exec(block, notebook)
        assert "def " in block or len(block.splitlines()) <= 5
        for left, comment in re.findall(r"^([\w, ]+) = .*?# (\(.*)", block, re.M):
            promised = re.findall(r"\(([\d, ]+)\)", comment)
            for name, shape in zip(left.split(", "), promised, strict=True):
                found = list(notebook[name].shape)
                assert found == [int(n) for n in re.findall(r"\d+", shape)], name
                shapes += 1
    assert shapes >= 8 and notebook["wave"].ndim == 1


@pytest.fixture
def paper():
    """The paper in 40 lines, as a namespace."""
    found = [block for block in blocks() if "def loss(" in block]
    assert len(found) == 1 and len(found[0].splitlines()) <= 40 and found[0] in README.read_text()
    exec(found[0], names := {})
    return names


@pytest.fixture
def velocity(small):
    """A network whose output is not 0, and frames for it: (config, model, ctx, x0, eps)."""
    torch.manual_seed(0)
    config = small(predict="v", self_condition=0.0, t_shift=0.0, min_snr_gamma=5.0, patch_size=2)
    model = cdslm.MMDiT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    model.silence.fill_(-1.5)
    ctx = torch.randn(8, config.ctx_frames, 80)
    x0 = torch.randn(8, config.gen_frames, 80)
    return config, model, ctx, x0, torch.randn_like(x0)


def test_the_paper_in_40_lines_has_the_loss_of_cdslm(paper, velocity):
    config, model, ctx, x0, eps = velocity
    t, diffusion = torch.linspace(0, 1, 8), cdslm.Diffusion(config)
    for i in range(8):                                        # each noise level has its own loss
        one = [x[i:i + 1] for x in (x0, ctx, t, eps)]
        ours = diffusion.loss(model, *one[:2], diffusion.angle(one[2]), one[3])
        assert paper["loss"](model, *one).item() == pytest.approx(ours.item(), rel=1e-5)
    assert paper["loss"](model, x0, ctx, t, eps).item() == pytest.approx(
        diffusion.loss(model, x0, ctx, diffusion.angle(t), eps).mean().item(), rel=1e-5)


@pytest.mark.parametrize("cfg", [1, 1.5, 4])
def test_the_paper_in_40_lines_generates_what_cdslm_generates(paper, velocity, cfg):
    config, model, ctx, *_ = velocity
    shape = config.gen_frames, 80
    noise = [cdslm.keyed_noise(3, "sample 0", i, shape, "cpu") for i in range(len(ctx))]
    noise = torch.stack(noise)
    silence = model.silence.expand_as(ctx)
    of_the_page = paper["generate"](model, ctx, silence, noise, 24, cfg)
    of_the_file = cdslm.sample(model, ctx, steps=24, cfg=cfg, sampler="ddim", seed=3)
    assert of_the_file.std() > 0.1 and (of_the_page - of_the_file).abs().max() < 1e-3


def test_the_paper_in_40_lines_learns(paper, velocity):
    _, model, ctx, x0, eps = velocity
    x0, t = 0.1 * x0 + 1, torch.linspace(0.1, 0.9, 8)
    before = paper["loss"](model, x0, ctx, t, eps).item()
    paper["train"](model.requires_grad_(True), [(ctx, x0)] * 40)
    assert paper["loss"](model, x0, ctx, t, eps).item() < 0.8 * before


def test_every_place_in_the_fidelity_table_exists():
    table = (ROOT / "docs/fidelity.md").read_text().split("\n## ")[0]
    places = re.findall(r"`([\w/]+\.py): ([\w.]+)`", table)
    assert len(places) >= 20
    for file, name in places:
        definition = rf"^ *(def|class) {name.split('.')[-1]}\b|^{name}\b.* = "
        assert re.search(definition, (ROOT / file).read_text(), re.M), (file, name)


def test_every_test_in_the_table_of_faults_exists():
    """`::test_x` is a test of the file named before it."""
    named = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", (ROOT / "docs/faults.md").read_text())
    assert len(named) >= 20
    file = ""
    for name, test in named:
        file = name or file
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), (file, test)
