"""Which of two? An oracle is always right, an untrained model by chance; pairs are fair."""
import numpy as np
import pytest
import torch

import cdslm
from cdslm import Config, MMDiT
from lab import pairs
from lab.listener import batched
from lab.markov import ngrams, words_in
from lab.pair_speech import FIRST, KINDS, SWAPPED, make_pairs, non_words
from lab.toyspeech import SYMBOLS, ToySpeech
from tests.conftest import SMALL

TOY = ToySpeech()
N, M = 32, 192


@pytest.fixture(scope="module")
def config():
    return Config(**SMALL | dict(ctx_seconds=0.4, gen_seconds=2.4, patch_size=8, predict="x0"))


@pytest.fixture(scope="module")
def speech():
    """{kind: frames (2, P, N + M, 80)}, normalised."""
    made = {}
    for kind in KINDS:
        waves = make_pairs(TOY, kind, 40, N, M)
        mel = torch.stack([batched(cdslm.log_mel, side) for side in waves])
        made[kind] = (mel - mel.mean()) / mel.std()
    return made


class Oracle(torch.nn.Module):
    """Knows the true continuation of each context."""

    def __init__(self, config, frames):
        super().__init__()
        self.config = config
        self.ctx, self.x0 = frames[:, :N].flatten(1), frames[:, N:]

    def forward(self, xt, phi, ctx, estimate=None):
        return self.x0[torch.cdist(ctx.flatten(1), self.ctx).argmin(1)]


def ask(model, frames, kind):
    errors = [pairs.denoising_errors(model, side, draws=1) for side in frames]
    return pairs.accuracy(*errors, kind in SWAPPED)


@pytest.mark.parametrize("kind", KINDS)
def test_an_oracle_is_right_and_an_untrained_model_guesses(kind, speech, config):
    frames = speech[kind]
    oracle = ask(Oracle(config, frames[0]), frames, kind)
    assert oracle["accuracy"] == 1 and oracle["interval"][0] > 0.8
    assert set(oracle["levels"].values()) == {1}

    torch.manual_seed(0)
    untrained = ask(MMDiT(config).eval().requires_grad_(False), frames, kind)
    print(kind, untrained["accuracy"], untrained["interval"])
    assert untrained["interval"][0] <= 0.5 <= untrained["interval"][1]
    if kind in SWAPPED:
        assert oracle["matched"] == 1 and abs(untrained["accuracy"] - 0.5) < 0.2


def test_a_model_of_random_weights_guesses(speech, config):
    """Its layers, unlike those of an untrained model, do output something."""
    torch.manual_seed(0)
    model = MMDiT(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape) / max(weight.shape) ** 0.5)
    right = []
    for kind in KINDS:
        row = ask(model, speech[kind], kind)
        right += [row["accuracy"]] * row["pairs"]
    assert abs(np.mean(right) - 0.5) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_fair(kind):
    """Equally long and loud, of one context; the false one differs, in the continuation alone."""
    true, false = make_pairs(TOY, kind, 8, N, M)
    assert true.shape == false.shape == (8, (N + M) * cdslm.HOP)
    before = slice(0, (N - 8) * cdslm.HOP)
    assert torch.allclose(true[:, before], false[:, before], atol=1e-3)
    assert ((true - false).abs().amax(1) > 0.01).all()
    power = [float(side[:, N * cdslm.HOP:].square().mean().log()) for side in (true, false)]
    assert power[0] == pytest.approx(power[1], abs=0.5)
    if kind in ("language", "speaker", "style"):              # swapped: the very same candidates
        candidates = slice(N * cdslm.HOP, None)
        assert torch.equal(true[::2, candidates], false[1::2, candidates])
        assert torch.equal(false[::2, candidates], true[1::2, candidates])
    again = make_pairs(TOY, kind, 8, N, M)
    assert torch.equal(again[0], true) and torch.equal(again[1], false)


def test_non_words_are_none_but_their_phone_pairs_are_attested():
    attested = set(ngrams(TOY, 2, 0))
    language = TOY.languages[0]
    found = 0
    for word in language.words:
        for phones in non_words(TOY, 0, word):
            found += 1
            assert len(phones) == len(word) and phones not in language.words
            assert set(zip(phones, phones[1:])) <= attested
            assert (words_in([SYMBOLS[p] for p in phones], language) < 0).any()
    assert found > 100


def test_accuracy_counts_ties_and_matches_swapped_pairs():
    true = torch.ones(4, len(pairs.LEVELS))
    false = torch.tensor([3.0, 0.5, 1.0, 1.0])[:, None] * true
    row = pairs.accuracy(true, false, swapped=True)
    assert row["accuracy"] == 0.5 and row["matched"] == 0.75  # a gain, a smaller loss; two ties
    assert pairs.accuracy(true, false)["interval"] == pytest.approx((0.15, 0.85), abs=0.01)
    assert row["interval"][0] < 0.15                          # two cases are fewer than four


def test_pairs_come_from_speech_that_training_never_sees():
    assert FIRST > 2_000_000 + 1_000_000 - 1


def test_bad_arguments():
    for words in (["run", "--number", "0"], ["run", "--draws", "0"], ["run", "--kinds", "x"], []):
        with pytest.raises(cdslm.UserError):
            pairs.parse(words)
