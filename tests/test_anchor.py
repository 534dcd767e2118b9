"""The anchor: what every window of a long continuation hears."""
from types import SimpleNamespace

import pytest
import torch

import cdslm
from cdslm import UserError, sample
from lab.anchor import anchored
from tests.test_autoregressive import FEW, random_model

K = 8


def test_every_window_hears_the_end_of_the_prompt(small):
    """A model that answers with the number of the window."""
    heard, asked = [], []

    def continuation(context, noise, *rest):
        heard.append(context[0, :, 0].tolist())
        asked.append(noise)
        return torch.full((1, noise.shape[1], 1), -float(len(heard)))
    config = small(ctx_seconds=0.4, gen_seconds=0.2, patch_size=K)
    model = SimpleNamespace(config=config, hears=config.ctx_frames, continuation=continuation)
    prompt = torch.arange(100.0)[None, :, None]
    made = anchored(0.1, model)(model, prompt, frames=44, seed=5)
    assert made.shape == (1, 44, 1) and made[0, ::16, 0].tolist() == [-1, -2, -3]
    assert heard == [list(range(68, 100)),                           # as without an anchor
                     list(range(92, 100)) + list(range(92, 100)) + 16 * [-1],
                     list(range(92, 100)) + 8 * [-1] + 16 * [-2]]
    assert not any(torch.equal(one, other) for one, other in zip(asked, asked[1:]))


@pytest.mark.parametrize("arm", ["A", "C"])
def test_it_begins_as_without_an_anchor_and_makes_no_more_than_it_says(arm, small, monkeypatch):
    model = random_model(arm, small(gen_seconds=1.6, **FEW))
    says = model.config.ctx_frames + model.config.gen_frames - model.hears
    prompt, sizes, continuation = torch.randn(2, 120, 80), [], model.continuation
    monkeypatch.setattr(model, "continuation", lambda ctx, noise, *rest: (
        sizes.append(noise.shape[1]), continuation(ctx, noise, *rest))[1])
    made = anchored(0.1, model)(model, prompt, frames=says + 40, seed=3, steps=2)
    assert sizes[:2] == [says, says] and made.shape[1] == says + 40
    plain = sample(model, prompt, frames=says, seed=3, steps=2)
    assert torch.allclose(made[:, :says], plain, atol=1e-5)


def test_no_anchor_changes_nothing_and_what_makes_no_sense_is_refused(small):
    model = SimpleNamespace(config=small(ctx_seconds=0.4, patch_size=K), hears=32)
    assert anchored(0, model) is cdslm.sample
    for seconds in (0.4, 9, 0.01, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--anchor"):
            anchored(seconds, model)
