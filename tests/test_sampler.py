import math
from types import SimpleNamespace

import pytest
import torch

import cdslm
from cdslm import MMDiT, sample
from tests.test_model import awake

MEAN, SPREAD = 0.7, 0.3


class Oracle:
    """A network that knows: the exact E[x0 | x_t] for x0 ~ N(MEAN, SPREAD^2), said as the config wants it."""
    continuation = MMDiT.continuation

    def __init__(self, config):
        self.config, self.silence, self.calls = config, torch.zeros(config.channels), []
        self.hears = config.ctx_frames

    def __call__(self, xt, phi, ctx, guess=None):
        self.calls.append(SimpleNamespace(xt=xt, phi=phi, ctx=ctx, guess=guess))
        xt, phi = xt.double(), phi.double()[:, None, None]
        alpha, sigma = phi.cos(), phi.sin()
        gain = alpha * SPREAD ** 2 / (alpha ** 2 * SPREAD ** 2 + sigma ** 2)
        x0 = MEAN + gain * (xt - alpha * MEAN)
        return x0 if self.config.predict == "x0" else (alpha * xt - x0) / sigma


def silence_for(config, batch=2):
    return torch.zeros(batch, config.ctx_frames, config.channels)


def error(config, steps, sampler):
    """Largest distance of the samples from the probability-flow ODE's exact solution from the same noise."""
    oracle = Oracle(config)
    got = sample(oracle, silence_for(config), steps=steps, cfg=1, sampler=sampler).double()
    noise, phi = oracle.calls[0].xt.double(), oracle.calls[0].phi[0].double()
    assert len(oracle.calls) == steps
    exact = MEAN + SPREAD * (noise - phi.cos() * MEAN) / (phi.cos() ** 2 * SPREAD ** 2 + phi.sin() ** 2).sqrt()
    return (got - exact).abs().max().item()


every_kind = pytest.mark.parametrize("predict", ["v", "x0"])
zero_or_not = pytest.mark.parametrize("zero", [False, True])


@every_kind
@zero_or_not
def test_dpm_is_closer_than_ddim_at_48_steps(small, predict, zero):
    config = small(predict=predict, zero_terminal_snr=zero)
    dpm, ddim = (error(config, 48, sampler) for sampler in ("dpm", "ddim"))
    assert dpm < 0.3 * ddim and dpm < 0.03


@pytest.mark.parametrize("schedule", ["cosine", "linear", "exponential"])
@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
@zero_or_not
def test_both_samplers_recover_the_gaussian(small, schedule, sampler, zero):
    config = small(schedule=schedule, zero_terminal_snr=zero, gen_seconds=2.0)
    assert error(config, 200, sampler) < 0.035
    got = sample(Oracle(config), silence_for(config, 4), steps=200, cfg=1, sampler=sampler)
    assert got.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert got.std().item() == pytest.approx(SPREAD, abs=0.01)


def test_ddim_is_of_first_order_and_dpm_of_a_higher(small):
    """Four times the steps: a quarter of the error, and less than a fifth."""
    ddim, dpm = ([error(small(), steps, sampler) for steps in (160, 640)] for sampler in ("ddim", "dpm"))
    assert 3.5 < ddim[0] / ddim[1] < 4.5
    assert dpm[0] / dpm[1] > 5


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
@zero_or_not
def test_one_step_is_the_networks_x0(small, sampler, zero):
    config = small(zero_terminal_snr=zero, predict="x0")
    oracle = Oracle(config)
    got = sample(oracle, silence_for(config), steps=1, cfg=1, sampler=sampler)
    call = oracle.calls[0]
    assert torch.allclose(got, oracle(call.xt, call.phi, call.ctx).float(), atol=1e-6)


@zero_or_not
def test_it_begins_at_the_schedules_end_and_never_goes_back(small, zero):
    config = small(zero_terminal_snr=zero)
    oracle = Oracle(config)
    sample(oracle, silence_for(config), steps=8, cfg=1)
    angles = [call.phi[0].item() for call in oracle.calls]
    top = math.pi / 2 if zero else math.atan(math.exp(5))
    assert angles[0] == pytest.approx(top, abs=1e-6) and angles == sorted(angles, reverse=True)


def test_noise_is_standard_normal(small):
    oracle = Oracle(small(gen_seconds=8.0))
    sample(oracle, silence_for(oracle.config), steps=1, cfg=1)
    noise = oracle.calls[0].xt
    assert noise.mean().abs() < 0.01 and noise.std().item() == pytest.approx(1, abs=0.01)


@pytest.fixture
def model(small):
    return awake(small(predict="v")).eval()


@pytest.fixture
def context(model):
    return torch.randn(3, model.config.ctx_frames, 80, generator=torch.Generator().manual_seed(0))


def test_guidance_1_is_the_model_itself(model, context):
    """As guidance approaches 1 its result approaches the model's own, which asks for no second context."""
    alone = sample(model, context, steps=4, cfg=1)
    assert torch.allclose(sample(model, context, steps=4, cfg=1 + 1e-6), alone, atol=1e-3)
    assert (sample(model, context, steps=4, cfg=3) - alone).abs().max() > 1e-2


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(cdslm, "GUIDED", (0, math.pi))


def test_from_base_up_steps_are_even_and_all_guided(small, context):
    """Unless asked for, what was tuned on toy words is off."""
    assert {size: cdslm.Config(size=size).sampling for size in ("tiny", "small", "base", "16b")} == {
        "tiny": "words", "small": "words", "base": "even", "16b": "even"}
    oracle = Oracle(small(sampling="even"))
    sample(oracle, context, steps=8, cfg=2)
    assert [len(call.xt) for call in oracle.calls] == 8 * [2 * len(context)]
    steps = torch.tensor(cdslm.levels(oracle.config, 8)).diff()
    assert torch.allclose(steps, steps[0].expand(8))


def test_guidance_is_in_the_middle_only(small, context):
    """Each evaluation between log-SNR -4 and 0 hears silence as well, no other does."""
    oracle = Oracle(small())
    sample(oracle, context, steps=24, cfg=2)
    log_snr = torch.stack([-2 * call.phi.tan().log()[0] for call in oracle.calls])
    guided = torch.tensor([len(call.xt) == 2 * len(context) for call in oracle.calls])
    assert torch.equal(guided, (log_snr > -4) & (log_snr < 0)) and guided.sum() == 10


def test_guidance_0_hears_silence_alone(small, context, everywhere):
    model = awake(small(predict="v", self_condition=0)).eval()
    model.silence.normal_()
    silent = model.silence.expand_as(context)
    assert torch.allclose(sample(model, context, steps=4, cfg=0), sample(model, silent, steps=4, cfg=1), atol=1e-4)


def test_guidance_is_one_batch_of_heard_and_silent(small, context, everywhere):
    oracle = Oracle(small())
    oracle.silence = torch.full((80,), -2.0)
    sample(oracle, context, steps=3, cfg=2)
    assert len(oracle.calls) == 3
    for call in oracle.calls:
        heard, silent = call.ctx.chunk(2)
        assert torch.equal(heard, context) and (silent == -2).all()
        assert torch.equal(*call.xt.chunk(2))


def test_only_the_heard_half_knows_the_last_guess(small, context, everywhere):
    oracle = Oracle(small())
    sample(oracle, context, steps=3, cfg=2)
    assert oracle.calls[0].guess is None
    for call in oracle.calls[1:]:
        heard, silent = call.guess.chunk(2)
        assert heard.std() > 0 and (silent == 0).all()


def test_guidance_goes_beyond_what_was_heard(small, context, everywhere):
    """One step of x0-prediction: silent + cfg (heard - silent), by hand."""
    config = small(predict="x0")
    model = awake(config).eval()
    heard, silent = (sample(model, c, steps=1, cfg=1) for c in (context, model.silence.expand_as(context)))
    assert torch.allclose(sample(model, context, steps=1, cfg=2.5), silent + 2.5 * (heard - silent), atol=1e-4)


def test_the_same_seed_is_the_same_speech(model, context):
    one, same, other = (sample(model, context, steps=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and (one - other).abs().max() > 0.1


def test_an_item_does_not_depend_on_its_batch(model, context):
    together, alone = sample(model, context, steps=3), sample(model, context[:1], steps=3)
    assert torch.allclose(together[:1], alone, atol=1e-4)
    twice = sample(model, context[:1].repeat(2, 1, 1), steps=3)
    assert (twice[0] - twice[1]).abs().max() > 0.1


def test_beyond_a_window_what_was_said_last_is_the_context(small, context):
    config = small(predict="x0")
    oracle, (gen, ctx) = Oracle(config), (config.gen_frames, config.ctx_frames)
    got = sample(oracle, context, frames=2 * gen + 5, steps=2, cfg=1)
    assert got.shape == (3, 2 * gen + 5, 80)
    contexts = [call.ctx for call in oracle.calls[::2]]
    assert len(contexts) == 3 and torch.equal(contexts[0], context)
    for window in (1, 2):
        assert torch.equal(contexts[window], got[:, window * gen - ctx:window * gen])
    assert not torch.equal(oracle.calls[0].xt, oracle.calls[2].xt)             # new noise for every window


def test_a_context_longer_than_a_window_reaches_back_before_what_was_said(small):
    config = small(ctx_seconds=1.2, gen_seconds=0.4)
    oracle, context = Oracle(config), torch.randn(1, config.ctx_frames, 80)
    got = sample(oracle, context, frames=2 * config.gen_frames, steps=1, cfg=1)
    expected = torch.cat([context, got], 1)[:, config.gen_frames:][:, :config.ctx_frames]
    assert torch.equal(oracle.calls[1].ctx, expected)


def test_only_the_end_of_a_long_context_is_heard(model, context):
    longer = torch.cat([torch.randn(3, 50, 80), context], dim=1)
    assert torch.allclose(sample(model, longer, steps=2), sample(model, context, steps=2), atol=1e-4)


@pytest.mark.parametrize("frames", [1, 7, 64, 65])
def test_as_many_frames_as_asked_for(model, context, frames):
    short = sample(model, context, frames=frames, steps=2)
    assert short.shape == (3, frames, 80)
    assert torch.equal(short, sample(model, context, frames=130, steps=2)[:, :frames])


def test_each_step_is_told_what_the_last_one_thought(small, context):
    """DDIM what the network said, DPM-Solver++ where that was going."""
    for sampler in ("ddim", "dpm"):
        oracle = Oracle(small(predict="x0", self_condition=0.5))
        sample(oracle, context, steps=3, cfg=1, sampler=sampler)
        one, two, three = oracle.calls
        first, then = (Oracle(oracle.config)(call.xt, call.phi, None) for call in (one, two))
        rate = [-math.log(math.tan(call.phi[0])) for call in oracle.calls]
        ahead = 0 if sampler == "ddim" else (rate[2] - rate[1]) / (2 * (rate[1] - rate[0]))
        assert one.guess is None and torch.allclose(two.guess.double(), first, atol=1e-5)
        assert torch.allclose(three.guess.double(), then + ahead * (then - first), atol=1e-4)


def test_a_new_model_speaks_without_end_or_accident(small):
    """Zero prediction of v or x0: finite, of the right shape."""
    for predict in ("v", "x0"):
        config = small(predict=predict)
        got = sample(MMDiT(config), silence_for(config), frames=200, steps=2)
        assert got.shape == (2, 200, 80) and torch.isfinite(got).all()
