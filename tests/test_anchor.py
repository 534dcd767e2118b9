"""The anchor: what every window of a long continuation hears."""
import pytest
import torch

import cdslm
from cdslm import UserError
from lab.anchor import anchored

K = 8


def listening(heard):
    """In the place of `sample`: notes each context, and answers with frames that count the windows."""
    def sample(model, context, frames, seed, **options):
        heard.append((context[0, :, 0].tolist(), seed))
        return torch.full((len(context), frames, 1), -float(len(heard)))
    return sample


def test_every_window_hears_the_end_of_the_prompt(small, monkeypatch):
    config = small(ctx_seconds=0.4, gen_seconds=0.2, patch_size=K)
    model = type("Model", (), {"config": config, "hears": config.ctx_frames})()
    prompt, heard = torch.arange(100.0)[None, :, None], []
    monkeypatch.setattr("lab.anchor.sample", listening(heard))
    made = anchored(0.1)(model, prompt, frames=44, seed=5)
    assert made.shape == (1, 44, 1) and made[0, ::16, 0].tolist() == [-1, -2, -3]
    first, second, third = (context for context, _ in heard)
    assert first[-32:] == list(range(68, 100))                      # as without an anchor
    assert second == list(range(92, 100)) + list(range(92, 100)) + 16 * [-1]
    assert third == list(range(92, 100)) + 8 * [-1] + 16 * [-2]
    assert heard[0][1] == 5 and len({seed for _, seed in heard}) == 3


def test_no_anchor_changes_nothing_and_a_long_one_is_refused(small):
    assert anchored(0) is cdslm.sample
    model = type("Model", (), {"config": small(ctx_seconds=0.4, patch_size=K), "hears": 32})()
    for seconds in (0.4, 9, 0.01, -1):
        with pytest.raises(UserError, match="--anchor"):
            anchored(seconds)(model, torch.zeros(1, 32, 1))
