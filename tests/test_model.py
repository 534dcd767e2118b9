import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cdslm import Config, Diffusion, MMDiT, attention, count


@pytest.fixture
def shapes(small):
    """shapes(...): (Config, x_t, noise level, context) of a small model."""
    def make(batch=2, **changes):
        config = small(**changes)
        torch.manual_seed(0)
        return (config, torch.randn(batch, config.gen_frames, config.channels), torch.rand(batch) + 0.2,
                torch.randn(batch, config.ctx_frames, config.channels))
    return make


def awake(config):
    """A model in which nothing is zero any more."""
    torch.manual_seed(1)
    model = MMDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("changes", [dict(), dict(depth=3), dict(patch_size=1), dict(patch_size=5), dict(latent_dim=16),
                                     dict(width=32), dict(width=192)])
def test_the_prediction_has_the_shape_of_its_input(shapes, changes):
    config, xt, phi, ctx = shapes(**changes)
    assert awake(config)(xt, phi, ctx).shape == xt.shape


def test_a_new_model_says_zero(shapes):
    config, xt, phi, ctx = shapes(depth=2)
    assert (MMDiT(config)(xt, phi, ctx) == 0).all()


@pytest.mark.parametrize("predict", ["v", "x0"])
def test_its_first_loss_is_the_weight_itself(shapes, predict):
    """Of 0 against a target of variance 1 the error is 1: v of unit x0 and eps has it at every noise level."""
    config, xt, phi, ctx = shapes(batch=16, gen_seconds=4.0, predict=predict)
    diffusion, model = Diffusion(config), MMDiT(config)
    x0, eps, phi = torch.randn_like(xt), torch.randn_like(xt), torch.linspace(0.1, 1.5, 16)
    loss = diffusion.loss(model, x0, ctx, phi, eps)
    assert torch.allclose(loss, diffusion.weight(phi), rtol=0.06)
    assert loss.sum().item() == pytest.approx(diffusion.weight(phi).sum().item(), rel=0.015)


def test_a_new_block_lets_everything_through(shapes):
    config, *_ = shapes(depth=2)
    ctx, gen = torch.randn(2, 4, 64), torch.randn(2, 8, 64)
    heard, spoken = MMDiT(config).blocks[0](ctx, gen, torch.randn(2, 1, 64), torch.ones(12, 32),
                                            torch.zeros(12, 32), 1.0)
    assert torch.equal(heard, ctx) and torch.equal(spoken, gen)


@pytest.mark.parametrize("depth, parameters", [(1, 0.49e6), (2, 4.2e6), (4, 35.4e6), (27, 11.5e9), (30, 15.8e9)])
def test_parameters_are_the_papers(depth, parameters):
    assert count(Config(size="base", depth=depth, patch_size=1))["parameters"] == pytest.approx(parameters, rel=0.03)


def test_a_model_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        model = MMDiT(Config(size="16b"))
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("config", [Config(size=size) for size in ("tiny", "small", "base", "large")] + [
    Config(depth=3, patch_size=1), Config(depth=1, latent_dim=16), Config(size="base", patch_size=2, width=256)],
    ids=lambda config: f"{config.size}-{config.depth}-{config.patch_size}")
def test_flops_are_torchs_count(config):
    """Of a training step on one window, with and without a first guess."""
    def counted(guess):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = MMDiT(config)
            x0, ctx = (torch.empty(1, frames, config.channels) for frames in (config.gen_frames, config.ctx_frames))
            Diffusion(config).loss(model, x0, ctx, torch.empty(1), x0, guess).mean().backward()
        return counter.get_total_flops()

    share = config.self_condition
    average = (1 - share) * counted(False) + (share * counted(True) if share else 0)
    assert count(config)["flops"] == pytest.approx(average, rel=0.01)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        xt, ctx = (torch.empty(1, frames, config.channels) for frames in (config.gen_frames, config.ctx_frames))
        MMDiT(config)(xt, torch.empty(1), ctx, xt)
    assert count(config)["flops_forward"] == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_tokens_are_patches():
    config = Config(size="tiny")
    assert count(config)["tokens"] == (config.ctx_frames + config.gen_frames) // config.patch_size


def test_every_parameter_is_used(shapes):
    config, xt, phi, ctx = shapes(depth=2, self_condition=1.0)
    model = awake(config)
    model(xt, phi, ctx, xt).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


def test_context_position_and_noise_level_matter(shapes):
    config, xt, phi, ctx = shapes(depth=2)
    model = awake(config)
    said = model(xt, phi, ctx)
    for other in (model(xt, phi, ctx + 1), model(xt, phi, ctx.flip(1)), model(xt, phi + 0.1, ctx)):
        assert (other - said).abs().max() > 1e-3
    patches = xt.unflatten(1, (-1, config.patch_size))
    turned = model(patches.flip(1).flatten(1, 2), phi, ctx).unflatten(1, (-1, config.patch_size)).flip(1).flatten(1, 2)
    assert (turned - said).abs().max() > 1e-3


def test_a_first_guess_is_heard_if_asked_for_and_is_no_part_of_the_papers_model(shapes):
    config, xt, phi, ctx = shapes(self_condition=0.5)
    model = awake(config)
    assert (model(xt, phi, ctx, xt) - model(xt, phi, ctx)).abs().max() > 1e-3
    paper = shapes(self_condition=0.0)[0]
    assert len(list(MMDiT(paper).parameters())) == len(list(model.parameters())) - 1
    assert Config(size="base").self_condition == 0


def test_attention_goes_both_ways_in_time(shapes):
    config, xt, phi, ctx = shapes()
    model, later = awake(config), xt.clone()
    later[:, -config.patch_size:] += 1
    assert (model(later, phi, ctx) - model(xt, phi, ctx))[:, :config.patch_size].abs().max() > 1e-4


def test_the_context_hears_the_continuation(shapes):
    """Joint attention: in the first of two blocks the context's own stream changes with the continuation."""
    config, xt, phi, ctx = shapes(depth=2)
    model, heard = awake(config), []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: heard.append(output[0]))
    model(xt, phi, ctx), model(xt + 1, phi, ctx)
    assert (heard[0] - heard[1]).abs().max() > 1e-3


def test_the_streams_have_weights_of_their_own(shapes):
    """The same frames as context and as continuation are not treated alike, and no tensor serves both."""
    config, *_ = shapes(depth=2)
    model = awake(config)
    for block in model.blocks:
        mine, theirs = ({p.data_ptr() for p in stream.parameters()} for stream in (block.ctx, block.gen))
        assert mine and theirs and not mine & theirs
        assert not torch.equal(block.ctx.qkv.weight, block.gen.qkv.weight)
    assert not torch.equal(model.enter_ctx.weight, model.enter_gen.weight)


def test_the_last_block_has_no_context_output(shapes):
    config, *_ = shapes(depth=3)
    blocks = MMDiT(config).blocks
    sizes = [sum(p.numel() for p in block.ctx.parameters()) for block in blocks]
    assert sizes[0] == sizes[1] == sum(p.numel() for p in blocks[0].gen.parameters()) > 2 * sizes[2]


def test_windows_of_a_batch_do_not_hear_each_other(shapes):
    config, xt, phi, ctx = shapes(batch=3)
    model = awake(config)
    together = model(xt, phi, ctx)
    for i in range(3):
        assert torch.allclose(model(xt[i:i + 1], phi[i:i + 1], ctx[i:i + 1]), together[i:i + 1], atol=1e-5)


def test_attention_on_a_cpu_is_torchs():
    q, k, v = torch.randn(3, 2, 4, 10, 16)
    assert torch.allclose(attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-6)
