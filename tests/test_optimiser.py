import itertools
import json
import math

import pytest
import torch

import cdslm
from cdslm import ROLES, Config, Diffusion, MMDiT, decay_start, lr_factor, make_optimizers, role


def groups(config):
    """{name of a parameter: (its optimiser, its group)} of a model."""
    model = MMDiT(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], (optimizer, group)) for optimizer in make_optimizers(model, config)
             for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(names), "a parameter in no group, or in two"
    return dict(found)


def test_every_parameter_has_a_role(small):
    model = MMDiT(small(depth=2))
    roles = {name: role(model, name) for name, _ in model.named_parameters()}
    kinds = {"adaln": "adaln", "final": "adaln", "leave": "output", "enter": "input", "noise_in": "input"}
    assert set(roles.values()) == set(ROLES)
    for name, found in roles.items():
        module = next((key for key in kinds if key in name), "hidden")
        assert found == ("bias" if name.endswith("bias") else kinds.get(module, "hidden")), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(small, optimizer):
    found = groups(small(depth=2, optimizer=optimizer))
    muon = {name for name, (which, _) in found.items() if type(which).__name__ == "Muon"}
    model = MMDiT(small(depth=2))
    hidden = {name for name, _ in model.named_parameters() if role(model, name) == "hidden"}
    assert muon == (hidden if optimizer == "muon" else set())


@pytest.mark.parametrize("width", [64, 256, 512, 1024])
def test_adamw_follows_the_mup_table(small, width):
    """Learning rate 1/m for what comes from the width, 1 for what comes from outside; m = width / 512."""
    config, m = small(depth=2, width=width, optimizer="adamw", lr=2e-3, weight_decay=0.1), width / 512
    expected = {"enter_gen.weight": (2e-3, 0), "noise_in.weight": (2e-3, 0), "enter_gen.bias": (2e-3, 0),
                "blocks.0.gen.qkv.weight": (2e-3 / m, 0.1 * m), "blocks.1.ctx.qkv.weight": (2e-3 / m, 0.1 * m),
                "blocks.0.gen.down.weight": (2e-3 / m, 0.1 * m), "noise_out.weight": (2e-3 / m, 0.1 * m),
                "blocks.0.ctx.adaln.weight": (2e-3 / m, 0), "final.weight": (2e-3 / m, 0),
                "leave.weight": (2e-3 / m, 0)}
    found = groups(config)
    for name, (lr, decay) in expected.items():
        _, group = found[name]
        assert (group["peak"], group["weight_decay"]) == (pytest.approx(lr), pytest.approx(decay)), name


def test_the_base_is_the_base(small):
    for _, group in groups(small(depth=4, width=512, optimizer="adamw")).values():
        assert group["peak"] == 1e-3


def test_muons_rate_is_the_same_at_every_width(small):
    rates = [groups(small(width=width, optimizer="muon"))["blocks.0.gen.qkv.weight"][1]["peak"] for width in (64, 256)]
    assert rates[0] == rates[1] == small().muon_lr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 48), (144, 48), (48, 192)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape, dtype):
    """Singular values from 0.01 of the largest on become about 1; the vectors stay."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    made = cdslm.orthogonalize(u @ torch.diag_embed(torch.logspace(0, -2, 48).expand(3, -1)) @ v, dtype).float()
    values = (u.mT @ made @ v.mT).diagonal(dim1=1, dim2=2)                    # (3, 48)
    assert made.shape == (3, *shape) and 0.6 < values.min() and values.max() < 1.3
    assert (made - u @ torch.diag_embed(values) @ v).abs().max() < (1e-4 if dtype == torch.float32 else 0.05)


def test_no_singular_value_is_blown_up():
    """Whatever its size: the polynomials stay below 1.3 on all of [0, 1]."""
    s = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    for a, b, c in cdslm.NEWTON_SCHULZ:
        s = a * s + b * s ** 3 + c * s ** 5
    assert s.min() >= 0 and s.max() < 1.3
    assert cdslm.orthogonalize(torch.zeros(1, 4, 4), torch.float32).abs().max() == 0


def make_matrices(optimizer):
    """Three matrices of two shapes, and an optimiser for them."""
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (8, 24), (24, 8))]
    return matrices, optimizer(matrices)


def take_steps(matrices, optimizer, first, last):
    for step in range(first, last):
        torch.manual_seed(step)
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        optimizer.step()


def ours(matrices):
    return cdslm.Muon(matrices, 0.02, 0.1)


def test_matrices_of_one_shape_are_updated_as_each_alone():
    matrices, optimizer = make_matrices(ours)
    take_steps(matrices, optimizer, 0, 3)
    alone, one = make_matrices(lambda matrices: ours(matrices[2:]))
    take_steps(alone, one, 0, 3)
    assert torch.allclose(matrices[2], alone[2], atol=1e-6)


needs_torchs = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


@needs_torchs
def test_muon_is_torchs_but_for_the_coefficients(monkeypatch):
    """With the same polynomial as torch's, in bf16, the same weights but for rounding and the margin of 2 %."""
    monkeypatch.setattr(cdslm, "NEWTON_SCHULZ", 5 * ((3.4445, -4.7750, 2.0315),))
    made = []
    for optimizer in (lambda m: cdslm.Muon(m, 0.02, 0.1, dtype=torch.bfloat16),
                      lambda m: torch.optim.Muon(m, 0.02, 0.1, momentum=0.95, adjust_lr_fn="original")):
        matrices, optimizer = make_matrices(optimizer)
        take_steps(matrices, optimizer, 0, 5)
        made.append(torch.cat([matrix.detach().flatten() for matrix in matrices]))
    start = torch.cat([matrix.detach().flatten() for matrix in make_matrices(ours)[0]])
    assert (made[0] - made[1]).norm() < 0.05 * (made[1] - start).norm()


def test_a_checkpoint_of_another_optimiser_is_one_line(small, tmp_path, mute):
    """As torch before 2.9 left them: AdamW updated what Muon should have."""
    cdslm.train(small(optimizer="adamw", steps=2))
    config = json.loads((tmp_path / "run/config.json").read_text()) | dict(optimizer="muon")
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(cdslm.UserError, match="of another network or optimiser"):
        cdslm.train(small(optimizer="muon", steps=4))


def test_initial_weights_keep_the_variance(small):
    model = MMDiT(small(depth=2, width=256))
    for name, parameter in model.named_parameters():
        if role(model, name) in ("adaln", "output", "bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(parameter.shape[1] ** -0.5, rel=0.03), name


def test_residual_branches_are_divided_by_the_depth(small):
    """With the same weights in every block, as many blocks as you like move the stream by as much (CompleteP)."""
    def moved(depth):
        torch.manual_seed(0)
        model = MMDiT(small(depth=depth, width=64))
        seen = []
        model.blocks[0].register_forward_hook(lambda block, given, out: seen.append((out[1] - given[1]).norm()))
        with torch.no_grad():
            for parameter in model.blocks[0].parameters():
                parameter.copy_(0.01 + 0.01 * torch.arange(parameter.numel()).view_as(parameter).sin())
            x = torch.ones(1, model.config.gen_frames, 80).cumsum(1).sin()
            model(x, torch.ones(1), x[:, :model.config.ctx_frames])
        return seen[0].item()

    two, four, eight = moved(2), moved(4), moved(8)
    assert two / four == pytest.approx(2, rel=0.3) and four / eight == pytest.approx(2, rel=0.3)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_rate_warms_up_and_ends_near_zero(schedule):
    config = Config(steps=1000, warmup=100, lr_schedule=schedule)
    rates = [lr_factor(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01, rel=0.01) and 0.97 < max(rates) <= 1 and 0 < rates[-1] < 0.01
    assert all(a < b for a, b in itertools.pairwise(rates[:90]))
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))


def test_wsd_is_stable_until_a_linear_decay():
    config = Config(steps=1000, warmup=10)
    assert {lr_factor(config, step) for step in range(10, decay_start(1000))} == {1.0}
    tail = [lr_factor(config, step) for step in range(decay_start(1000), 1000)]
    assert all(a - b == pytest.approx(1 / len(tail)) for a, b in itertools.pairwise(tail))


def test_wsd_runs_of_different_length_are_the_same_run_until_the_shorter_decays():
    short, long = Config(steps=100, warmup=10), Config(steps=400, warmup=10)
    assert all(lr_factor(short, step) == lr_factor(long, step) for step in range(decay_start(100)))


def test_cosine_is_half_way_at_half_time():
    assert lr_factor(Config(steps=1000, warmup=0, lr_schedule="cosine"), 500) == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_shortest_runs_have_a_rate_too(steps, schedule):
    for warmup in (0, 1, 100):
        config = Config(steps=steps, warmup=warmup, lr_schedule=schedule)
        assert all(0 < lr_factor(config, step) <= 1 for step in range(steps))
        assert all(math.isfinite(lr_factor(config, step)) for step in range(steps))


def coordinates(config, steps=10):
    """{name: root mean square} of what goes through a network after a few steps on one batch: the residual stream that
    enters and leaves the blocks, what they have added to it, and the prediction."""
    torch.manual_seed(0)
    model, diffusion = MMDiT(config), Diffusion(config)
    optimizers = make_optimizers(model, config)
    x0, ctx, eps = (torch.randn(4, frames, 80) for frames in (config.gen_frames, config.ctx_frames, config.gen_frames))
    phi, sizes = torch.linspace(0.2, 1.4, 4), {}
    for _ in range(steps):
        diffusion.loss(model, x0, ctx, phi, eps).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    model.blocks[0].register_forward_hook(lambda block, given, made: sizes.update(entering=given[1]))
    model.blocks[-1].register_forward_hook(lambda block, given, made: sizes.update(leaving=made[1]))
    with torch.no_grad():
        sizes["prediction"] = model(x0, phi, ctx)
    sizes["added"] = sizes["leaving"] - sizes["entering"]
    return {name: tensor.square().mean().sqrt().item() for name, tensor in sizes.items()}


OVER = {"width": [(width, 2) for width in (64, 128, 256, 512)], "depth": [(128, depth) for depth in (1, 2, 4, 8)]}


def spread(small, over, optimizer):
    """The largest of how many times larger an activation is at one size than at another."""
    found = [coordinates(small(width=width, depth=depth, optimizer=optimizer, patch_size=8, lr=2e-3))
             for width, depth in OVER[over]]
    return max(max(sizes) / min(sizes) for sizes in zip(*(each.values() for each in found)))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_activations_are_as_large_at_every_size(small, over, optimizer):
    """The coordinate check: within a factor of two after ten steps."""
    assert spread(small, over, optimizer) < 2


@pytest.mark.slow
def test_with_one_learning_rate_for_every_width_they_are_not(small, monkeypatch):
    """The check can fail."""
    monkeypatch.setattr(cdslm, "ROLES", {name: (init, lambda m: 1, decay) for name, (init, _, decay) in ROLES.items()})
    assert spread(small, "width", "adamw") > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_nearly_one_direction_do_not_explode(dtype):
    """Their largest singular value is their norm, which bf16 rounds; above 1 the polynomials grow without bound."""
    torch.manual_seed(0)
    for noise in (0, 1e-3, 1e-2):
        for signs in (False, True):
            column, row = torch.randn(12, 192, 1), torch.randn(12, 1, 192)
            if signs:
                column, row = column.sign(), row.sign()
            matrices = column @ row / 192 + noise * torch.randn(12, 192, 192) / 14
            norms = cdslm.orthogonalize(matrices, dtype).float().flatten(1).norm(dim=1)
            assert norms.max() < 1.3 * 192 ** 0.5
