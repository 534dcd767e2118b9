"""Which of two? An oracle is always right, an untrained model by chance; pairs are fair."""
import json
import sys

import numpy as np
import pytest
import torch

import cdslm
from cdslm import Config, MMDiT, save_audio
from lab import pair_stories, pairs
from lab.best import best_of
from lab.markov import ngrams, words_in
from lab.pair_files import find_pairs, read_pair
from lab.pair_speech import FIRST, KINDS, SWAPPED, make_pairs, non_words
from lab.toyspeech import SYMBOLS, ToySpeech
from tests.conftest import SMALL, command, speech_like

TOY = ToySpeech()
N, M = 32, 192


@pytest.fixture(scope="module")
def config():
    return Config(**SMALL | dict(ctx_seconds=0.4, gen_seconds=2.4, patch_size=8, predict="x0"))


@pytest.fixture(scope="module")
def speech():
    """{kind: list of Pairs}."""
    return {kind: make_pairs(TOY, kind, 40, N, M) for kind in KINDS}


class Oracle(torch.nn.Module):
    """Knows the true continuation of each context, (P, Tc, C) -> (P, Tg, C)."""

    def __init__(self, config, ctx, x0):
        super().__init__()
        self.config, self.silence = config, torch.zeros(80)
        self.ctx, self.x0 = ctx.flatten(1), x0

    def forward(self, xt, phi, ctx, estimate=None):
        found = self.x0[torch.cdist(ctx.flatten(1), self.ctx).argmin(1)]
        return found[:, :xt.shape[1]]


class Encoder(cdslm.Encoder):
    """Log-mel with the statistics of toy speech."""

    def __init__(self):
        super().__init__()
        self.mel_stats = torch.tensor([-7.0, 2.5])


def ask(model, asked, mirrored=False, draws=1):
    errors, nulls = pairs.ask(model, Encoder(), asked, draws)
    return pairs.accuracy(errors, nulls, [pair.case for pair in asked], mirrored)


def untrained(config, seed=0):
    torch.manual_seed(seed)
    return MMDiT(config).eval().requires_grad_(False)


def random_weights(config):
    """A model whose layers, unlike those of an untrained one, do output something."""
    model = untrained(config)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape) / max(weight.shape) ** 0.5)
    return model


def stacked(asked):
    """Waves of the true and of the false utterances: (2, P, samples)."""
    return torch.stack([torch.stack(side) for side in list(zip(*asked))[:2]])


@pytest.mark.parametrize("kind", KINDS)
def test_an_oracle_is_right_and_an_untrained_model_guesses(kind, speech, config):
    asked = speech[kind]
    frames = Encoder().encode(stacked(asked)[0])
    oracle = ask(Oracle(config, frames[:, :N], frames[:, N:]), asked, kind in SWAPPED)
    assert oracle["accuracy"] == 1 and oracle["interval"][0] > 0.8
    assert set(oracle["levels"].values()) == {1}

    guessed = ask(untrained(config), asked, kind in SWAPPED)
    print(kind, guessed["accuracy"], guessed["interval"])
    assert guessed["interval"][0] <= 0.5 <= guessed["interval"][1]
    assert guessed["null"] == pytest.approx(guessed["accuracy"])              # it predicts the mean frame
    if kind in SWAPPED:
        assert oracle["matched"] == 1 and abs(guessed["accuracy"] - 0.5) < 0.2


def test_a_model_of_random_weights_guesses(speech, config):
    model, right = random_weights(config), []
    for kind in KINDS:
        row = ask(model, speech[kind])
        right += [row["accuracy"]] * row["pairs"]
    assert abs(np.mean(right) - 0.5) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_fair(kind):
    """Equally long and loud, of one context; the false one differs, in the continuation alone."""
    asked = make_pairs(TOY, kind, 8, N, M)
    true, false = stacked(asked)
    assert true.shape == false.shape == (8, (N + M) * cdslm.HOP)
    before = slice(0, (N - 8) * cdslm.HOP)
    assert torch.allclose(true[:, before], false[:, before], atol=1e-3)
    assert ((true - false).abs().amax(1) > 0.01).all()
    power = [float(side[:, N * cdslm.HOP:].square().mean().log()) for side in (true, false)]
    assert power[0] == pytest.approx(power[1], abs=0.5)
    assert [pair.shared for pair in asked] == [N] * 8
    cases = [pair.case for pair in asked]
    assert len(set(cases)) == (4 if kind in SWAPPED else 8)
    if kind in ("language", "speaker", "style"):              # swapped: the very same candidates
        candidates = slice(N * cdslm.HOP, None)
        assert torch.equal(true[::2, candidates], false[1::2, candidates])
        assert torch.equal(false[::2, candidates], true[1::2, candidates])
    again = stacked(make_pairs(TOY, kind, 8, N, M))
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


def test_accuracy_counts_ties_and_matches_mirrored_pairs():
    true = torch.ones(4, len(pairs.LEVELS))
    false = torch.tensor([3.0, 0.5, 1.0, 1.0])[:, None] * true
    errors, nulls = torch.stack([true, false], dim=1), torch.tensor([[1.0, 2.0]]).repeat(4, 1)
    row = pairs.accuracy(errors, nulls, [0, 0, 1, 1], mirrored=True)
    assert row["accuracy"] == 0.5 and row["matched"] == 0.75  # a gain, a smaller loss; two ties
    assert row["null"] == 1 and row["cases"] == 2 and row["pairs"] == 4
    four = pairs.accuracy(errors, nulls, range(4))
    assert four["interval"] == pytest.approx((0.15, 0.85), abs=0.01) and "matched" not in four
    assert row["interval"][0] < 0.15                          # two cases are fewer than four


def test_pairs_come_from_speech_that_training_never_sees():
    assert FIRST > 2_000_000 + 1_000_000 - 1


# --------------------------------------------------------------------------------------------------
# The best of several continuations.

def numbered(calls):
    """Like `sample`: the continuations of a call are constant, another constant for each seed."""
    def sample(model, context, frames=None, seed=0):
        calls.append(seed)
        return torch.full((len(context), frames, 80), float(len(calls)))
    return sample


@pytest.mark.parametrize("least", [1, 2, 4])
def test_the_best_has_the_least_denoising_error(config, least, monkeypatch):
    """Of four continuations, whose errors are given; each is judged after its own context, all with the same noise."""
    calls, noises, context = [], [], torch.arange(2 * N * 80.0).view(2, N, 80)

    def errors_of(model, ctx, x0, parts, noise):
        noises.append(noise)
        assert torch.equal(ctx, context[(len(noises) - 1) // 4]) and x0.shape == (50, 80)
        errors = torch.full((len(pairs.LEVELS),), 1.0 if x0[0, 0] == least else 2.0)
        errors[[0, -1]] = 3 - errors[1]                       # the other way around where nothing is decided
        return errors

    monkeypatch.setattr("lab.best.sample", numbered(calls))
    monkeypatch.setattr(pairs, "utterance_errors", errors_of)
    found = best_of(4)(untrained(config), context, 50, seed=7)
    assert found.shape == (2, 50, 80) and (found == least).all()
    assert calls[0] == 7 and len(set(calls)) == 4
    assert torch.equal(noises[0], noises[3]) and not torch.equal(noises[0], noises[4])


def test_the_best_of_a_batch_is_that_of_each_context(config):
    """By the real errors; the first continuation is that of `sample`, and one is kept that `sample` has made."""
    model = random_weights(config)
    torch.manual_seed(3)
    context, options = torch.randn(3, N, 80), dict(frames=M + 20, steps=2)
    found = best_of(3)(model, context, **options)
    for count in (1, 2):
        assert torch.allclose(best_of(3)(model, context[:count], **options), found[:count], atol=1e-4)
    assert torch.equal(best_of(1)(model, context, **options), cdslm.sample(model, context, **options))

    seeds = [0] + [cdslm.keyed(0, "best of", number) for number in (1, 2)]
    made = [cdslm.sample(model, context, seed=seed, **options) for seed in seeds]
    for item in range(3):
        sides = [torch.cat([context[item], x0[item]]) for x0 in made]
        errors = [pairs.pair_errors(model, [side], N, pairs.DRAWS, item)[0][0] for side in sides]
        least = torch.stack(errors).log()[:, pairs.DECISIVE].mean(1).argmin()
        assert torch.equal(found[item], made[least][item])
    with pytest.raises(cdslm.UserError, match="--best-of must be at least 1"):
        best_of(0)


# --------------------------------------------------------------------------------------------------
# Utterances of different length.

def test_length_gives_no_advantage(config):
    """Noise frames of many lengths, also of several windows: a model that knows nothing guesses; the true one may be
    longer or shorter."""
    rng, model = np.random.default_rng(0), random_weights(config)
    for shortest, longest in ((0.3, 1.0), (1.0, 0.3)):
        errors = []
        for item in range(60):
            sides = [torch.from_numpy(rng.standard_normal((round(share * 2.2 * M), 80))).float()
                     for share in (shortest, longest)]
            errors.append(pairs.pair_errors(model, sides, 0, 1, item)[0])
        right = pairs.accuracy(torch.stack(errors), torch.ones(60, 2), range(60))
        print(shortest, longest, right["accuracy"])
        assert 0.25 < right["accuracy"] < 0.75


def test_an_oracle_is_right_about_the_longer_and_the_shorter(config):
    """It knows the true frames window by window; the foil has other ones from the shared beginning on."""
    rng = np.random.default_rng(1)

    class Knows(torch.nn.Module):
        def __init__(self, frames):
            super().__init__()
            self.config, self.silence, self.frames = config, torch.zeros(80), frames

        def forward(self, xt, phi, ctx, estimate=None):
            """The true frames that follow the context, zeros after the end of the utterance."""
            count = ctx.shape[1]
            for at in range(len(self.frames) - count + 1):
                if torch.equal(ctx[0], self.frames[at:at + count]):
                    following = self.frames[at + count:][:xt.shape[1]]
                    missing = xt.shape[1] - len(following)
                    padded = torch.cat([following, torch.zeros(missing, 80)])
                    return padded.expand(len(xt), -1, -1)
            return torch.zeros_like(xt)

    for true_length, false_length in ((500, 130), (130, 500), (215, 230)):
        true = torch.from_numpy(rng.standard_normal((true_length, 80))).float()
        false = torch.from_numpy(rng.standard_normal((false_length, 80))).float()
        false[:50] = true[:50]
        assert pairs.shared_frames(true, false) == 50
        errors, null = pairs.pair_errors(Knows(true), (true, false), 50, 2, 0)
        assert (errors[0] == 0).all() and (errors[1] > 0.5).all()
        assert null == pytest.approx([float(true[50:].square().mean()), float(false[50:].square().mean())])


def test_a_long_utterance_is_cut_into_equal_windows_with_the_frames_before_as_context(config):
    seen = []

    class Watches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.silence = config, torch.zeros(80)

        def forward(self, xt, phi, ctx, estimate=None):
            seen.append((xt.shape[1], ctx[0, :, 0].tolist()))
            return torch.zeros_like(xt)

    ramp = torch.arange(500.0)[:, None].expand(-1, 80)
    pairs.pair_errors(Watches(), (ramp, ramp[:300]), 0, 1, 0)
    sizes = [size for size, _ in seen]
    assert sizes == [168, 168, 168, 104, 104, 96]             # three windows each: 500 and 300 frames
    contexts = [context for _, context in seen]
    assert contexts[0] == contexts[3] == [0.0] * N            # silence
    assert contexts[1] == list(range(168 - N, 168)) and contexts[5] == list(range(208 - N, 208))


# --------------------------------------------------------------------------------------------------
# Published layouts.

def recording(path, seconds=1.0, seed=0, rate=16_000):
    import soundfile
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, speech_like(seconds, rate, seed), rate)
    return path


def run(*words):
    """What `python -m lab.pairs WORDS` does, without starting another Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pairs", *map(str, words)])
        pairs.main()


def names(found):
    return {kind: [(true.name, false.name) for _, true, false in rows] for kind, rows in found.items()}


def test_the_layouts_of_slamkit_and_salmon(tmp_path):
    """Numbers decide, not the order of letters: 10 comes after 9; the true recording is the first."""
    for name in ("8_a_correct", "9_a_incorrect", "10_b_correct", "11_b_incorrect"):
        recording(tmp_path / f"tSC/{name}.wav")
    for name in ("0+right", "1+wrong"):
        recording(tmp_path / f"sblimp/agreement/{name}.wav")
    for index in (0, 2, 11):
        for option in (0, 1):
            recording(tmp_path / f"salmon/speaker_consistency/sample_{index}_{option}.wav")
    recording(tmp_path / "salmon/speaker_consistency/sample_5_0.wav")         # without its other
    (tmp_path / "tSC/notes.txt").write_text("no audio")
    assert names(find_pairs(tmp_path)) == {
        "tSC": [("8_a_correct.wav", "9_a_incorrect.wav"), ("10_b_correct.wav", "11_b_incorrect.wav")],
        "sblimp/agreement": [("0+right.wav", "1+wrong.wav")],
        "salmon/speaker_consistency": [(f"sample_{i}_0.wav", f"sample_{i}_1.wav") for i in (0, 2, 11)]}


def test_the_layout_of_zerospeech(tmp_path):
    """Pairs have the same id and voice; several voices of one item are one case; words that the training speech
    lacks are apart, sentences are sorted by type."""
    lexical = tmp_path / "lexical/dev"
    lines = ["id,filename,voice,frequency,word,phones,length,correct"]
    for item, frequency in ((1, 12), (2, 0)):
        for voice in ("A", "B"):
            for correct in (0, 1):
                name = f"w{item}{voice}{correct}"
                recording(lexical / f"{name}.wav")
                lines.append(f"{item},{name},{voice},{frequency},x,y,3,{correct}")
    (lexical / "gold.csv").write_text("\n".join(lines))
    syntactic = tmp_path / "syntactic/dev"
    lines = ["id,filename,voice,type,subtype,transcription,correct"]
    for name, correct in (("s", 1), ("t", 0)):
        recording(syntactic / f"{name}.wav")
        lines.append(f"7,{name},A,agreement,simple,text,{correct}")
    (syntactic / "gold.csv").write_text("\n".join(lines))
    found = find_pairs(tmp_path)
    assert names(found) == {
        "lexical/dev: in vocabulary": [("w1A1.wav", "w1A0.wav"), ("w1B1.wav", "w1B0.wav")],
        "lexical/dev: out of vocabulary": [("w2A1.wav", "w2A0.wav"), ("w2B1.wav", "w2B0.wav")],
        "syntactic/dev: agreement": [("s.wav", "t.wav")]}
    assert len({case for case, *_ in found["lexical/dev: in vocabulary"]}) == 1


def test_silence_around_recordings_is_cut_alike(tmp_path):
    """What both begin with stays aligned, although one of them is louder later."""
    quiet, voice = np.zeros(12_000, np.float32), speech_like(1.0, 24_000)
    true = np.concatenate([quiet, voice, 0.5 * speech_like(0.5, 24_000, 1), quiet])
    false = np.concatenate([quiet, voice, 3.0 * speech_like(0.7, 24_000, 2)])
    paths = tmp_path / "a.wav", tmp_path / "b.wav"
    for path, wave in zip(paths, (true, false)):
        save_audio(path, torch.from_numpy(wave))
    pair = read_pair(0, *paths)
    assert abs(len(pair.true) - 36_000) < 300 and abs(len(pair.false) - 40_800) < 300
    frames = [Encoder().encode(side[None])[0] for side in pair[:2]]
    assert 76 <= pairs.shared_frames(*frames) <= 80           # of 80 frames; the last ones see beyond
    save_audio(tmp_path / "c.wav", torch.zeros(24_000))
    with pytest.raises(cdslm.UserError, match="silent"):
        read_pair(0, paths[0], tmp_path / "c.wav")


def test_a_folder_of_pairs_is_asked_about(trained, tmp_path):
    for index in range(3):
        for option in (0, 1):
            recording(tmp_path / f"salmon/rooms/sample_{index}_{option}.wav", 0.7 + 0.3 * option, 10 * index + option)
    kept = tmp_path / "kept.json"
    done = command("lab.pairs", trained[0], tmp_path / "salmon", "--draws", "1", "--json", kept)
    assert done.returncode == 0, done.stderr
    row = json.loads(kept.read_text())["rooms"]
    assert row["pairs"] == row["cases"] == 3 and 0 <= row["interval"][0] <= row["accuracy"] <= 1
    assert set(row["levels"]) == set(map(str, pairs.LEVELS)) and "rooms" in done.stdout
    assert not (trained[0] / "pairs.json").exists()


def test_toy_pairs_and_their_curve(trained, tmp_path):
    pytest.importorskip("matplotlib")
    run(trained[0], "--kinds", "speaker", "--number", "4", "--draws", "1", "--curve", "--json", tmp_path / "kept.json")
    assert (trained[0] / "pairs.png").stat().st_size > 5000
    (trained[0] / "pairs.png").unlink()


def test_words_in_order_do_not_come_in_twos(trained, tmp_path):
    """Those of stories do, and have the same name."""
    run(trained[0], "--kinds", "order", "--number", "3", "--draws", "1", "--json", tmp_path / "kept.json")
    row = json.loads((tmp_path / "kept.json").read_text())["order"]
    assert row["pairs"] == row["cases"] > 0 and "matched" not in row


def test_without_matplotlib_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in pairs.draw_curve({}, tmp_path / "curve.png")


# --------------------------------------------------------------------------------------------------
# Stories.

SETTINGS = {"words": "small", "seed": 0, "voices": 6}


class Silent(pair_stories.World):
    """A world of stories in which nothing is spoken."""

    def speak(self, text):
        return np.zeros(600, np.float32)


def test_sentences_mirror_each_other():
    """All words that are true in one pair of a group are false in the other; foils are no stories."""
    vocabulary = pair_stories.vocabulary("small")
    for number in range(30):
        world = Silent(SETTINGS, number)
        (a, b), (c, d) = pair_stories.agreement_pairs(world)
        assert sorted(f"{a} {c}".lower().split()) == sorted(f"{b} {d}".lower().split())
        for true, false in ((a, b), (c, d)):
            changed = [pair for pair in zip(true.split(), false.split()) if pair[0] != pair[1]]
            assert changed and all(set(pair) == {"his", "her"} for pair in changed)

        for true, false in pair_stories.order_pairs(Silent(SETTINGS, number)):
            assert true != false
            assert sorted(true.lower().strip(".").split()) == sorted(false.lower().strip(".").split())

        for true, false in pair_stories.non_word_pairs(Silent(SETTINGS, number)):
            strange = set(false.lower().strip(".").split()) - vocabulary
            assert len(strange) == 1 and not set(true.lower().strip(".").split()) - vocabulary
    assert pair_stories.mixed("dog", "ball") == "dall" and pair_stories.mixed("horse", "ball") == "hall"


def test_order_has_each_order_once():
    for number in range(10):
        world = Silent(SETTINGS, number)
        first, second, a, b = world.choose(pair_stories.order_templates(world))
        assert first.index(a) < first.index(b) and second.index(b) < second.index(a)


@pytest.mark.parametrize("words", ["small", "large"])
def test_every_kind_of_sentence_can_be_written(words):
    for number in range(20):
        for maker in (pair_stories.agreement_pairs, pair_stories.order_pairs, pair_stories.non_word_pairs):
            for texts in maker(Silent(SETTINGS | {"words": words}, number)):
                for text in texts:
                    assert text.endswith(".") and text[0].isupper()
                    assert not set(text.split()) & (set(pair_stories.STORY) | set(pair_stories.PERSON) | {"SUBJ"})


def test_spoken_sentences_share_context_and_voice(config):
    """An untrained model guesses, and the two pairs of agreement together are fair to every model of sounds."""
    pytest.importorskip("hibari")
    asked = pair_stories.make_pairs(SETTINGS, "agreement", 12)
    assert len(asked) == 12 and len({pair.case for pair in asked}) == 6
    for pair in asked:
        start = pair.shared * cdslm.HOP
        assert torch.equal(pair.true[:start], pair.false[:start])
        assert 0.6 < len(pair.true[start:]) / len(pair.false[start:]) < 1.6
    row = ask(untrained(config), asked, mirrored=True)
    assert row["interval"][0] <= 0.5 <= row["interval"][1] and row["matched_interval"][0] <= 0.5


def test_bad_arguments(trained, tmp_path):
    for words in (["run", "--number", "0"], ["run", "--draws", "0"], [], ["run", "folder", "--stories"]):
        with pytest.raises(cdslm.UserError):
            pairs.parse(words)
    (tmp_path / "empty").mkdir()
    recording(tmp_path / "odd/name.wav")
    (tmp_path / "gold").mkdir()
    (tmp_path / "gold/gold.csv").write_text("a,b\n1,2\n")
    for words, message in [
            ([trained[0], tmp_path / "none"], "no such folder"), ([trained[0], tmp_path / "empty"], "no pairs in it"),
            ([trained[0], tmp_path / "odd"], "no pairs in it"), ([trained[0], tmp_path / "gold"], "has no columns"),
            ([trained[0], "--kinds", "x"], "--kinds x"), ([tmp_path / "empty"], "no run there")]:
        with pytest.raises(cdslm.UserError, match=message):
            run(*words)
