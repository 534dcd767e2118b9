"""The rivals: causal, exact in resuming and counting, generating what they were taught to expect."""
import dataclasses
import importlib
import inspect
import json
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cdslm
import eval_pjsd
from cdslm import Trainer, UserError, load, save
from lab import autoregressive as ar
from lab import causal, pairs, tokens
from tests.conftest import command
from tests.test_training import assert_same_run

FEW = dict(patch_size=8, predict="x0", decoder_steps=1)


@pytest.fixture
def config(small):
    return small(**FEW)


def random_model(arm, config):
    """A model of an arm whose layers all do something, with an untrained tokeniser."""
    torch.manual_seed(0)
    model = ar.new_model(arm, config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
    if arm in ar.TOKENS:
        model.adopt(random_tokeniser(config, ar.TOKENS[arm]), 1)
    return model


def random_tokeniser(config, kind):
    torch.manual_seed(1)
    tokeniser = tokens.new_tokeniser(config, kind).eval().requires_grad_(False)
    if kind == "units":
        tokeniser.centres.normal_()
    return tokeniser


def frames(config, count=3):
    torch.manual_seed(2)
    x = torch.randn(count, config.ctx_frames + config.gen_frames, config.channels)
    return x.split([config.ctx_frames, config.gen_frames], dim=1)


# --------------------------------------------------------------------------------------------------
# Tokens.

@pytest.mark.parametrize("kind, codes", [("fsq", 16), ("units", 4)])
def test_codes_know_their_own_position_alone(config, kind, codes):
    tokeniser, x = random_tokeniser(config, kind), torch.cat(frames(config), dim=1)
    found = tokeniser.encode(x)
    assert found.shape == (3, 12, codes) and 0 <= found.min() and found.max() < tokens.CODES
    assert tokeniser.decode(found).shape == x.shape
    assert torch.equal(tokeniser.encode(x[:, :32]), found[:, :4])             # a context alone

    x[:, 40:48] += 1
    changed = (tokeniser.encode(x) != found).any(2).any(0)
    assert changed[5] and changed.sum() == 1


def test_fsq_codes_and_digits_are_the_same_thing(config):
    tokeniser = random_tokeniser(config, "fsq")
    codes = torch.arange(tokens.CODES).repeat(16)[:9600].view(1, -1, 4)
    digits = []
    tokeniser.decoder.register_forward_pre_hook(lambda module, inputs: digits.append(inputs[0]))
    tokeniser.slot_frames(codes)
    tokeniser.bottleneck = lambda x: digits[0].mT
    assert digits[0].min() == -2 and digits[0].max() == 2
    assert torch.equal(tokeniser.slot_codes(None), codes)


def test_fsq_learns(config):
    tokeniser, x = tokens.FSQ(config), torch.randn(4, 1, 80).expand(-1, 16, -1)
    optimizer, losses = torch.optim.AdamW(tokeniser.parameters(), lr=4e-3), []
    for _ in range(30):
        loss = tokeniser.loss(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    rebuilt = tokeniser.decode(tokeniser.encode(x))
    assert (rebuilt - x).abs().mean().item() < 0.6 * losses[0]


def test_units_are_means_of_what_is_nearest(config):
    tokeniser, slots = tokens.Tokeniser(config), torch.randn(2000, 160)
    tokeniser.fit(slots)
    numbers = tokeniser.nearest(slots)
    assert torch.equal(numbers, torch.cdist(slots, tokeniser.centres).argmin(1))
    first = slots[torch.linspace(0, 1999, tokens.CODES).long()]
    before = torch.cdist(slots, first).min(1).values.square().mean()
    assert (slots - tokeniser.centres[numbers]).square().sum(1).mean() < 0.9 * before


# --------------------------------------------------------------------------------------------------
# Networks.

@pytest.mark.parametrize("arm", ["B", "C"])
def test_the_trunk_does_not_see_the_future_and_goes_on_where_it_was(config, arm):
    model, x = random_model(arm, config), torch.cat(frames(config), dim=1)
    k = config.patch_size
    if arm == "B":
        x, k = model.tokeniser.encode(x), 1
    h, _ = model(x)
    other = x.clone()
    other[:, 5 * k:] = other.flip(0)[:, 5 * k:]
    changed = (model(other)[0] - h).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == 5 * [False] + 7 * [True]

    start, past = model(x[:, :4 * k])
    middle, past = model(x[:, 4 * k:5 * k], past)
    end, _ = model(x[:, 5 * k:], past)
    assert (torch.cat([start, middle, end], dim=1) - h).abs().max() < 1e-4


@pytest.mark.parametrize("arm", ["B", "units"])
def test_codes_are_drawn_from_the_probabilities_that_are_trained(config, arm):
    model = random_model(arm, config)
    count = model.head.per_position
    h, u = torch.randn(200, 64), torch.rand(200, count)
    codes = model.head.draw(h, u, 1.0)
    logits = model.head(h, codes)                             # (200, K, 625), of all codes at once
    expected = torch.stack([causal.choose(logits[:, i], u[:, i]) for i in range(count)], dim=1)
    assert (codes == expected).float().mean() > 0.995         # but for rounding
    assert codes.unique().numel() > 100

    # Each code matters to those after it only.
    logits_of_others = model.head(h, torch.cat([codes[:, :2], codes[:, 2:].flip(0)], dim=1))
    changed = (logits_of_others - logits).abs().amax((0, 2)) > 1e-4
    assert changed.tolist() == 3 * [False] + (count - 3) * [True]


def test_choosing_follows_the_probabilities():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    u = (torch.arange(10_000) + 0.5) / 10_000
    share = causal.choose(logits.expand(10_000, -1), u).bincount(minlength=4) / 10_000
    assert (share - logits.softmax(0)).abs().max() < 2e-4
    assert causal.choose(logits[None], torch.ones(1)) == 3


def test_the_noise_on_the_history_is_not_that_of_the_target(config):
    """Else the head could find its own noise in what the trunk tells it."""
    model, (ctx, x0) = random_model("C", config), frames(config)
    eps = torch.randn_like(x0)
    other = eps.clone()
    other[:, 24:32] = 0                                       # the fourth position
    h = model.known(ctx, x0 + eps).unflatten(0, (3, 8))
    changed = (model.known(ctx, x0 + other).unflatten(0, (3, 8)) - h).abs().amax((0, 2)) > 1e-5
    assert changed.tolist() == 4 * [False] + 4 * [True]


def test_noise_levels_are_spread_over_the_positions(config):
    t = ar.ByPosition(dataclasses.replace(config, t_shift=0.0)).times(torch.rand(4))
    assert t.shape == (4, 8) and 0 <= t.min() and t.max() < 1
    assert torch.histc(t, 4, 0, 1).min() >= 4 and t[0].sort().values.diff().max() < 0.25


# --------------------------------------------------------------------------------------------------
# Generating.

@pytest.mark.parametrize("arm", ["B", "C"])
def test_what_is_generated_depends_on_seed_context_and_item(config, arm):
    model, (ctx, _) = random_model(arm, config), frames(config)
    first = cdslm.sample(model, ctx, steps=3, seed=5)
    assert first.shape == (3, 64, 80) and first.isfinite().all()
    assert torch.equal(first, cdslm.sample(model, ctx, steps=3, seed=5))
    assert (first[:2] - cdslm.sample(model, ctx[:2], steps=3, seed=5)).abs().max() < 1e-3
    for other in (cdslm.sample(model, ctx, steps=3, seed=6), cdslm.sample(model, ctx + 1, steps=3, seed=5)):
        assert (first - other).abs().mean() > 1e-2
    assert cdslm.sample(model, ctx, frames=100, steps=3, seed=5).shape == (3, 100, 80)
    silent = torch.cat([model.silence.expand(3, 20, -1), ctx[:, 20:]], dim=1)
    assert torch.equal(cdslm.sample(model, ctx[:, 20:], steps=3), cdslm.sample(model, silent, steps=3))


def test_a_low_temperature_leaves_no_choice(config):
    model, (ctx, _) = random_model("B", config), frames(config)
    warm = [cdslm.sample(model, ctx, seed=seed) for seed in (0, 1)]
    model.temperature = 1e-4
    cold = [cdslm.sample(model, ctx, seed=seed) for seed in (0, 1)]
    assert torch.equal(*cold) and not torch.equal(*warm)


def test_the_first_frames_come_first(config):
    """C needs none of the others for them."""
    model, (ctx, _) = random_model("C", config), frames(config)
    whole, start = cdslm.sample(model, ctx, steps=3), cdslm.sample(model, ctx, frames=12, steps=3)
    assert start.shape[1] == 12 and (whole[:, :12] - start).abs().max() < 1e-4


@pytest.mark.parametrize("cfg", [1, 3])
def test_a_full_window_begins_again_with_its_newest_two_thirds(config, cfg):
    """Of 96 frames: contexts may have 64, and what is said then is said in two passes."""
    model, (ctx, x0) = random_model("C", config), frames(config)
    assert model.hears == 64
    long, noise = torch.cat([ctx, x0], dim=1)[:, :64], torch.randn(len(ctx), 64, 80)
    made = model.continuation(long, noise, 2, cfg, "ddim")
    first = model.continuation(long, noise[:, :32], 2, cfg, "ddim")
    second = model.continuation(torch.cat([long, first], dim=1)[:, -64:], noise[:, 32:], 2, cfg, "ddim")
    assert torch.allclose(made, torch.cat([first, second], dim=1), atol=1e-4)
    assert not torch.allclose(model.continuation(long[:, 8:], noise, 2, cfg, "ddim"), made, atol=1e-2)


def test_a_long_context_is_heard_whole_where_little_is_said(config):
    config.gen_seconds = 0.1
    model = random_model("C", config)
    assert model.hears == config.ctx_frames


@pytest.mark.parametrize("arm", ["B", "C"])
def test_no_window_grows_longer_than_in_training(config, arm, monkeypatch):
    model, (ctx, x0), seen = random_model(arm, config), frames(config), []
    trunk = model.trunk.forward
    monkeypatch.setattr(model.trunk, "forward", lambda x, past=None: (seen.append(
        x.shape[1] + (past[0][0].shape[2] if past else 0)), trunk(x, past))[1])
    made = cdslm.sample(model, torch.cat([ctx, x0], dim=1), frames=160, steps=1, cfg=1, sampler="ddim")
    assert made.shape[1] == 160 and set(seen) == {8, 9, 10, 11}       # of 12 positions, the last is not heard


@pytest.mark.parametrize("arm", ["A", "B", "C"])
def test_a_prompt_of_any_length_is_continued(config, arm):
    """Of a prompt longer than a context, whole tokens are heard."""
    model, (ctx, x0) = random_model(arm, config), frames(config)
    for length in (5, 37, 96):
        prompt = torch.cat([ctx, x0], dim=1)[:, :length]
        assert cdslm.sample(model, prompt, steps=1, sampler="ddim").isfinite().all()


def test_guidance_leads_away_from_a_silent_context(config):
    model, (ctx, _) = random_model("C", config), frames(config)
    plain, guided = [cdslm.sample(model, ctx, steps=4, cfg=cfg) for cfg in (1, 3)]
    assert (plain - guided).abs().mean() > 1e-3
    silent = model.silence.expand_as(ctx)                     # nothing to lead away from, but the
    config.self_condition = 0.0                               # last estimate, that the other lacks
    model = random_model("C", config)
    assert (cdslm.sample(model, silent, steps=4, cfg=3) - cdslm.sample(model, silent, steps=4, cfg=1)
            ).abs().max() < 1e-3


def test_the_ceiling_is_true_speech_through_the_tokens(config):
    model, autoencoder = random_model("units", config), cdslm.AudioAutoencoder(decoder="griffinlim")
    sides = SimpleNamespace(frames=torch.cat(frames(config), dim=1))
    ar.through_tokens(sides, model, autoencoder, 24, 2)
    rebuilt = model.tokeniser.decode(model.tokeniser.encode(sides.frames))[:, 32:]
    assert torch.equal(sides.generated, autoencoder.decode(rebuilt))
    with pytest.raises(UserError, match="runs of B and of units"):
        ar.through_tokens(sides, random_model("C", config), autoencoder)


@pytest.mark.parametrize("arm", ["B", "C"])
def test_pairs_ask_an_arm_for_its_own_errors(config, arm):
    model, (ctx, x0) = random_model(arm, config), frames(config, 1)
    noise = torch.randn(1, 2, 64, 80)
    found = pairs.utterance_errors(model, ctx[0], x0[0, :60], 1, noise)
    whole = model.errors(x0[:, :56].expand(2, -1, -1), ctx.expand(2, -1, -1), noise[0, :, :56],
                         pairs.ANGLES)
    assert torch.allclose(found, whole.mean(0) * 56 / 60)
    if arm == "B":
        assert whole[0, 0] == model.loss(None, x0[:, :56], ctx) and len(set(found.tolist())) == 1
    two = pairs.utterance_errors(model, ctx[0], x0[0], 2, noise.expand(2, -1, -1, -1))
    assert two.shape == (len(pairs.LEVELS),) and two.isfinite().all()


# --------------------------------------------------------------------------------------------------
# Counting, training, resuming.

@pytest.mark.parametrize("arm", ["B", "C", "units"])
def test_flops_are_those_of_the_operations(config, arm):
    """A block more takes 12 d^2 multiply-adds a position, and 2 d for each pair of positions; backward twice that."""
    one, two = [ar.count_arm(arm, dataclasses.replace(config, depth=depth)) for depth in (1, 2)]
    d, positions = 64, 11                                     # of 12, the last one is not read
    assert two["flops"] - one["flops"] == 6 * (12 * d ** 2 * positions + 2 * d * positions ** 2)
    assert two["parameters"] - one["parameters"] == 12 * d ** 2
    never = ar.count_arm(arm, dataclasses.replace(config, self_condition=0.0))
    assert (one["flops"] > never["flops"]) == (arm == "C") and (one["flops_tokeniser"] > 0) == (arm != "C")
    assert one["tokens"] == 12


@pytest.mark.parametrize("groups", [1, 4])
def test_flops_of_a_convolution_are_three_times_its_forward_pass(groups):
    layer = torch.nn.Conv1d(8, 12, 5, padding=2, groups=groups)
    x = torch.zeros(3, 8, 20, requires_grad=True)
    assert tokens.flops_of(lambda: layer(x).sum().backward()) == 3 * 2 * (3 * 12 * 20) * (8 // groups * 5)
    assert tokens.flops_of(lambda: layer(x.detach()).sum().backward()) == 2 * 2 * (3 * 12 * 20) * (8 // groups * 5)


def test_a_budget_becomes_steps(config):
    for arm in ar.ARMS:
        steps, size = ar.steps_for(1e12, arm, config), ar.count_arm(arm, config)
        spent = size["flops_tokeniser"] + steps * size["flops"] * config.batch_size
        assert 0 <= 1e12 - spent < size["flops"] * config.batch_size
    assert ar.count_arm("A", config)["flops"] == cdslm.count(config)["flops"]
    with pytest.raises(UserError, match="does not pay for the tokeniser and some steps"):
        ar.steps_for(1e6, "B", config)
    with pytest.raises(UserError, match="does not pay"):
        ar.steps_for(math.inf, "C", config)


@pytest.mark.parametrize("arm", ["B", "C", "units"])
def test_6_steps_are_3_an_interruption_and_3(arm, mute, small, tmp_path, monkeypatch, cache):
    monkeypatch.setattr(tokens, "SAMPLES", 50)
    flags = FEW | dict(steps=6, eval_every=3, self_condition=0.5)
    straight = small(out=str(tmp_path / "straight"), **flags)
    ar.train(straight, arm)
    rows = [json.loads(line) for line in (tmp_path / "straight/log.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[-1]["loss"] < rows[0]["loss"] and "valid" in rows[2]
    assert rows[0]["flops"] > ar.count_arm(arm, straight)["flops_tokeniser"]

    config, step = small(**flags), Trainer.step

    def interrupted(trainer):
        if trainer.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(SystemExit):
            ar.train(config, arm)
    assert load(Path(config.out) / "checkpoint.pt")["step"] == 3
    ar.train(config, arm)
    assert_same_run(tmp_path / "straight", tmp_path / "run")

    loaded, model, _ = ar.load(config.out)
    ctx, x0 = frames(loaded)
    assert cdslm.sample(model, ctx, steps=2).shape == x0.shape
    refuse(config, arm, tmp_path)


def refuse(config, arm, tmp_path):
    """What does not belong to a run is refused."""
    other = "C" if arm != "C" else "A"
    with pytest.raises(UserError, match=f"holds a run of arm {arm}; choose another --out"):
        ar.train(config, other)
    if arm not in ar.TOKENS:
        return
    path, kind = tmp_path / "run/tokeniser.pt", ar.TOKENS[arm]
    save(path, tokeniser=random_tokeniser(config, kind).state_dict())
    for use in (lambda: ar.load(config.out), lambda: ar.train(config, arm)):
        with pytest.raises(UserError, match="not the one that the run's model was trained with"):
            use()
    save(path, tokeniser=random_tokeniser(config, "units" if kind == "fsq" else "fsq").state_dict())
    with pytest.raises(UserError, match="not a tokeniser of kind"):
        ar.load(config.out)


@pytest.fixture
def folder(config, mute, cache):
    """A run of cdslm."""
    ar.train(dataclasses.replace(config, steps=1), "A")
    return config.out


def test_a_run_of_cdslm_is_arm_a(folder):
    config, model, _ = ar.load(folder)
    assert ar.read_arm(folder) == "A" and isinstance(model, cdslm.MMDiT)
    with pytest.raises(UserError, match="holds a run of arm A"):
        ar.train(cdslm.read_config(folder), "B")


@pytest.mark.parametrize("arm", ["A", "B", "C"])
def test_the_programs_take_a_run_of_any_arm(arm, config, mute, monkeypatch, capsys, tmp_path):
    """And their own flags."""
    monkeypatch.setattr(tokens, "SAMPLES", 50)
    ar.train(dataclasses.replace(config, steps=1), arm)
    monkeypatch.setattr(sys, "argv", ["autoregressive"])
    sound, kept = tmp_path / "x.wav", tmp_path / "pairs.json"
    words = [config.out, "--prompt", "none", "--out", str(sound), "--steps", "2"]
    files = []
    for temperature in ("1", "1", "0.01"):
        if arm != "B" and temperature != "1":
            with pytest.raises(UserError, match="--temperature is for runs of B"):
                ar.run_program("sample", [*words, "--temperature", temperature])
            continue
        ar.run_program("sample", [*words, "--temperature", temperature])
        files.append(sound.read_bytes())
    assert files[0] == files[1] and files[1] not in files[2:]
    if arm != "A":
        with pytest.raises(UserError, match="--decided is for runs of cdslm.py"):
            ar.run_program("eval_pjsd", [config.out, "--decided"])
    ar.run_program("lab.pairs", [config.out, "--kinds", "speaker", "--number", "4", "--draws", "1", "--json", str(kept)])
    levels = json.loads(kept.read_text())["speaker"]["levels"]
    assert len(set(levels.values())) == 1 or arm != "B"      # likelihood knows no noise levels


def test_what_only_b_has(folder, monkeypatch):
    """Each program that is named is run with a temperature; others, and bad flags, are refused."""
    seen = []
    monkeypatch.setattr(sys, "argv", ["autoregressive"])
    monkeypatch.setattr(causal.CodeModel, "temperature", 1.0)
    (Path(folder) / "arm.json").write_text('{"arm": "B"}')
    for name in ar.PROGRAMS:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "main", lambda **parts: seen.append(parts))
        ar.run_program(name, [folder, "--temperature", "0.5", "--minutes", "3"])
        assert seen[-1] == {} and sys.argv[1:] == [folder, "--minutes", "3"]
        assert causal.CodeModel.temperature == 0.5
    # True speech is not reported as what the model generates.
    for more, kept in ([], f"{folder}/ceiling.json"), (["--json", "x.json"], "x.json"):
        ar.run_program("eval_pjsd", [folder, "--ceiling", *more])
        assert seen[-1] == {"generate": ar.through_tokens} and str(eval_pjsd.parse().json) == kept
    inspect.signature(eval_pjsd.judge_run).bind(None, **seen[-1])
    for name, words in (("nonsense", []), ("json", []), ("eval_pjsd", ["--temperature", "0"]),
                        ("lab.pairs", ["x", "--ceiling"])):
        with pytest.raises(UserError):
            ar.run_program(name, words)


def test_a_run_needs_its_lab(folder, config, monkeypatch):
    (Path(folder) / "arm.json").write_text('{"arm": "C"}')
    monkeypatch.setattr(cdslm, "lab", lambda name: None)
    with pytest.raises(UserError, match="needs lab/autoregressive.py"):
        cdslm.load_run(folder)


def test_a_folder_is_of_no_arm_before_its_first_step(folder, config, tmp_path, monkeypatch):
    """What was interrupted while its decoder was trained may become any arm's."""
    for path in Path(folder).glob("*checkpoint*"):
        path.unlink()
    (Path(folder) / "trunk.pt").unlink(missing_ok=True)
    ar.train(dataclasses.replace(config, steps=1), "C")
    assert ar.read_arm(folder) == "C"
    (Path(folder) / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match="holds a run of arm C"):
        ar.train(dataclasses.replace(config, steps=1), "A")
    with pytest.raises(UserError, match="holds a run of lab/autoregressive.py; choose another --out"):
        cdslm.train(dataclasses.replace(config, steps=1))


# --------------------------------------------------------------------------------------------------
# Bad input.

def test_bad_arguments(small, tmp_path, monkeypatch):
    for words in (["--arm", "X"], ["--flops", "1e12", "--steps", "3"], ["--arm", "B", "--flops", "5"]):
        with pytest.raises(UserError):
            ar.parse(words)
    config, arm = ar.parse(["--arm", "C", "--flops", "2e13"])
    assert arm == "C" and config.minutes == 0 and 300 < config.steps < 2000
    with pytest.raises(UserError, match="an even --patch-size that divides 48, not 5"):
        ar.new_model("B", small(patch_size=5))
    with pytest.raises(UserError, match="4 codes for 2 frames need more than 1 values a frame"):
        ar.new_model("B", dataclasses.replace(config, latent_dim=1))
    for changes in (dict(compile=True), dict(checkpoint_activations=True)):
        with pytest.raises(UserError, match="one device"):
            ar.train(small(**changes), "B")
    (tmp_path / "arm.json").write_text('{"arm": "Z"}')
    with pytest.raises(UserError, match="unknown arm 'Z'; the arms are A, B, C, units"):
        ar.load(tmp_path)


def test_an_unknown_arm_is_one_line_and_status_2():
    done = command("lab.autoregressive", "--arm", "X")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
