import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import cdslm
from lab import plan
from cdslm import ROLES, Config, Diffusion, MMDiT, UserError
from tests.conftest import ROOT, command

def said(capsys, *words):
    """What `python cdslm.py WORDS` prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["cdslm.py", *words])
        cdslm.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("size", ["tiny", "base", "16b"])
def test_every_parameter_is_printed_with_its_role_and_rates(capsys, size):
    lines = [line.split() for line in said(capsys, "--size", size, "--print-params").splitlines()]
    config = Config(size=size)
    with torch.device("meta"):
        shapes = {name: "x".join(map(str, p.shape)) for name, p in MMDiT(config).named_parameters()}
    assert {name: shape for name, shape, *_ in lines} == shapes
    assert {role for _, _, role, *_ in lines} == set(ROLES)
    found, m = {name: (float(lr), float(wd)) for name, _, _, _, lr, _, wd in lines}, config.width / 512
    assert found["enter_gen.weight"] == (1e-3, 0) and found["leave.weight"] == pytest.approx((1e-3 / m, 0), rel=5e-3)
    hidden = (1e-3 / m, 0.03 * m) if config.optimizer == "adamw" else (0.02, 0.0015)
    assert found["blocks.0.gen.up.weight"] == pytest.approx(hidden, rel=5e-3)


def test_a_dry_run_says_what_the_paper_would_have_counted(capsys):
    facts = json.loads(said(capsys, "--size", "base", "--dry-run", "--json", "--devices", "8", "--tflops", "100"))
    assert facts["6ND"] == 6 * facts["parameters"] * facts["tokens"]
    assert facts["flops"] == facts["flops_per_step"] * 100_000 and facts["tokens"] == 100_000 * 64 * 800
    assert facts["flops_per_window_spoken"] == pytest.approx(2 * cdslm.STEPS * facts["flops_per_step"] / 64 / 3, rel=0.01)
    assert facts["days"] == pytest.approx(facts["flops"] / 8e14 / 86400)


def test_what_a_step_keeps_is_what_autograd_saves(small):
    """In a block on a CPU, within a fifth: in bf16 it is less than on a GPU, which normalises in float32."""
    for dtype, kept in plan.KEPT.items():
        bytes_kept = []
        for depth in (2, 3):
            config, found = small(depth=depth, width=256, patch_size=1, gen_seconds=0.4), {}
            model, x = MMDiT(config), torch.randn(2, config.gen_frames, 80)
            mine = {parameter.shape for parameter in model.parameters()}
            mine |= {shape[::-1] for shape in mine}

            def pack(tensor, found=found, mine=mine):
                if tensor.shape not in mine:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast(
                    "cpu", dtype, enabled=dtype != torch.float32):
                Diffusion(config).loss(model, x, x[:, :config.ctx_frames], torch.ones(2), x)
            bytes_kept.append(sum(storage.nbytes() for storage in found.values()))
        tokens = 2 * (config.ctx_frames + config.gen_frames)
        softmax = tokens * (config.ctx_frames + config.gen_frames) * 4 * dtype.itemsize
        assert (bytes_kept[1] - bytes_kept[0] - softmax) / tokens / 256 == pytest.approx(kept, rel=0.2)


def test_what_is_announced_tells_why_it_is_float32(monkeypatch, small, capsys):
    for hardware in (True, False):
        monkeypatch.setattr(cdslm, "multiplies_bf16", lambda device, hardware=hardware: hardware)
        cdslm.announce(small(), torch.device("cpu"), torch.float32)
        assert ("no bf16 in hardware" in capsys.readouterr().out) == (not hardware)


@pytest.mark.parametrize("cap", [
    {"ATEN_CPU_CAPABILITY": "avx2"}, pytest.param({"ONEDNN_MAX_CPU_ISA": "AVX2"}, marks=pytest.mark.slow),
    pytest.param({"ONEDNN_MAX_CPU_ISA": "avx512_core"}, marks=pytest.mark.slow)])
def test_instruction_sets_that_may_not_be_used_do_not_count(cap):
    """The processor may have bf16: the libraries have been told not to use it."""
    done = command("cdslm.py", "--dry-run", "--json", "--device", "cpu", env=os.environ | cap)
    assert json.loads(done.stdout)["dtype"] == "float32"


def test_shards_and_checkpoints_take_less():
    gpu = torch.device("cuda")
    def need(**changes):
        return plan.memory(Config(size="large", **changes), 8, gpu, torch.bfloat16)
    copied, sharded = need(), need(parallel="fsdp")
    for kind in ("gradients", "optimiser"):
        assert sharded[kind] == pytest.approx(copied[kind] / 8)
    assert sharded["weights"] < copied["weights"] / 3 and sharded["activations"] == copied["activations"]
    assert need(micro_batch=1)["activations"] == pytest.approx(copied["activations"] / 32)
    assert copied["total with --checkpoint-activations"] < 0.6 * copied["total"]
    assert copied["optimiser"] == pytest.approx(8 * 1.01e9 / 2 ** 30, rel=0.03)


def test_a_model_too_large_for_the_machine_is_a_users_error(tmp_path, monkeypatch):
    """After what its checkpoints need: 1 TB."""
    config = Config(size="16b", out=str(tmp_path / "run"), device="cpu")
    with pytest.raises(UserError, match="are needed for its checkpoints"):
        cdslm.train(config)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10 ** 13))
    with pytest.raises(UserError) as error:
        cdslm.train(config)
    assert not (tmp_path / "run").exists()
    for word in ("--size 16b needs", "GiB on each device", "weights", "activations", "--parallel fsdp"):
        assert word in str(error.value)


MEASURE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import cdslm
from cdslm import open_corpus
def resident(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
config = cdslm.parse(sys.argv[1:])
corpus, (device, dtype) = open_corpus(config), cdslm.decide(config)
autoencoder = cdslm.AudioAutoencoder("griffinlim")
small = cdslm.parse([*sys.argv[1:], "--width", "64", "--batch-size", "2"])
cdslm.Trainer(small, corpus, autoencoder, device, dtype).step()        # what torch itself takes
before = resident("VmRSS")
trainer = cdslm.Trainer(config, corpus, autoencoder, device, dtype)
for _ in range(3):
    trainer.step()
print((resident("VmHWM") - before) / 2 ** 30)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("more", [[], ["--checkpoint-activations"]], ids=" ".join)
def test_memory_is_as_foretold_within_a_quarter(size, dtype, more):
    words = ["--size", size, "--toy-hours", "0.05", "--device", "cpu", "--dtype", dtype, *more]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config, measured = cdslm.parse(words), float(done.stdout.splitlines()[-1])
    need = plan.memory(config, 1, *cdslm.decide(config))
    foretold = need["total with --checkpoint-activations" if more else "total"]
    print(f"\n{size} {dtype} {' '.join(more)}: {measured:.3f} GiB measured, {foretold:.3f} foretold "
          f"({foretold / measured - 1:+.0%})")
    assert foretold == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("share, fits", [(0.95, False), (1.2, True)])
def test_a_gpu_may_be_used_by_others(monkeypatch, small, share, fits):
    """What counts is the memory that is free, less a tenth; and CUDA keeps more than a CPU, but for the scores."""
    config, cuda = small(), torch.device("cuda")
    need = plan.memory(config, 1, cuda, torch.bfloat16)["total"] * 2 ** 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(share * need), 100 * int(need)))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    if fits:
        return plan.afford(config, cuda, torch.bfloat16)
    with pytest.raises(UserError, match="for it"):
        plan.afford(config, cuda, torch.bfloat16)
