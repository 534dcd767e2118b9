"""The judge: its estimator against exact grammars, its recognisers against known truth, its manners with bad input."""
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import cdslm
import eval_pjsd as judge
from cdslm import AudioAutoencoder
from cdslm import RATE, UserError, load_audio, log_mel
from lab import markov, pairs
from lab.decided import draw_decided
from lab.kept import VoiceMeter, breath_truth, nearness as near_in_group, tract_truth, voice_kept, voice_rows
from lab.listener import (batched, error_rate, guess_language, language_kept, load_listener,
                          nearness, ngrams, spans, speak, toy_truth, voice_truth, words_in)
from lab.recognizers import quiet_cuts
from lab.report import MEANING
from lab.toyspeech import CONSONANTS, SYMBOLS, ToySpeech

ROOT = Path(__file__).parents[1]


def everything(corpus):
    return np.ones(len(corpus), bool)


def pjsd(a, b, n):
    p, q = judge.tabulate(n, a, b)
    return judge.jsd(p(everything(a)), q(everything(b)))


def write(corpus, minutes, seed, share=0.0, seconds=3.0):
    """Clips of toy phones as the grammar says them, without sound; `share` of them in the second language."""
    toy, rng, clips = ToySpeech(), np.random.default_rng((corpus, seed)), []
    for _ in range(round(minutes * 60 / seconds)):
        phones, _, lengths = toy._say(rng, toy.languages[int(rng.random() < share)], round(seconds * 160) + 80, 1.0)
        stops = np.cumsum(lengths)
        clips.append([SYMBOLS[p] for p in phones[(stops > 64) & (stops < 64 + seconds * 160)] if p])
    return clips


def test_divergence_is_what_it_should_be():
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, q = rng.integers(0, 9, 50).astype(float), rng.integers(0, 9, 50).astype(float)
        assert judge.jsd(p, q) == pytest.approx(judge.jsd(q, p), abs=1e-12)
        assert judge.jsd(p, 3 * p) == pytest.approx(0, abs=1e-12)
        assert 0 < judge.jsd(p, q) < 1
    assert judge.jsd(np.array([1.0, 2, 0, 0]), np.array([0, 0, 5.0, 1])) == pytest.approx(1)
    assert math.isnan(judge.jsd(np.zeros(3), np.ones(3)))


def test_divergence_agrees_with_scipy():
    distance = pytest.importorskip("scipy.spatial.distance")
    rng = np.random.default_rng(1)
    for size in (2, 30, 500):
        p, q = rng.random(size) * (rng.random(size) < 0.7), rng.random(size)
        assert judge.jsd(p, q) == pytest.approx(distance.jensenshannon(p, q, base=2) ** 2, abs=1e-12)


def test_ngrams_never_cross_clips():
    clips = [["a", "b"], ["c"], [], ["d", "a", "b"]]
    assert sorted(judge.tabulate(2, clips)[0](everything(clips))) == [1, 2]        # da once, ab twice; no bc, no cd
    assert judge.tabulate(3, clips)[0](everything(clips)).sum() == 1
    assert judge.tabulate(4, clips)[0](everything(clips)).sum() == 0
    assert pjsd([["a", "b", "c"]], [["a", "b"], ["b", "c"]], 2) == pytest.approx(0)
    assert pjsd([["ab", "c"]], [["a", "bc"]], 2) == pytest.approx(1)               # phones, not letters
    assert pjsd([list("aab")], [list("aba")], 2) > 0                               # order counts


def test_draws_are_without_replacement_and_hold_the_phones_asked_for():
    rng, lengths = np.random.default_rng(0), np.random.default_rng(1).integers(0, 40, 300)
    totals = [lengths[judge.draw(rng, lengths, 2000)].sum() for _ in range(50)]
    assert abs(np.mean(totals) - 2000) < 10 and np.std(totals) < 25
    assert judge.draw(rng, lengths, math.inf).all() and not judge.draw(rng, lengths, 0).any()
    assert judge.draw(rng, np.array([600]), 300).all()                             # one long clip rather than none


def estimate_errors(minutes, runs, share):
    """RMS errors (3, 3): of n = 1, 2, 3 by the plain, the corrected and Miller & Madow's estimate of the divergence of
    toy speech from speech of the same (share 0) or of the other language (1), whose exact value the grammar gives."""
    toy, errors = ToySpeech(), []
    for seed in range(runs):
        a, b, row = write(1, minutes, seed), write(2, minutes, seed, share), []
        for n in (1, 2, 3):
            tables = [ngrams(toy, n, 0), ngrams(toy, n, int(share))]
            exact = judge.jsd(*(np.array([table.get(gram, 0) for gram in tables[0] | tables[1]]) for table in tables))
            p, q = judge.tabulate(n, a, b)
            p_all, q_all = p(everything(a)), q(everything(b))
            plain = judge.jsd(p_all, q_all)
            corrected = plain - judge.jackknife(p, q_all, len(a))[0] - judge.jackknife(q, p_all, len(b))[0]
            more = [((x > 0).sum() - 1) / (2 * x.sum() * math.log(2)) for x in (p_all + q_all, p_all, q_all)]
            row.append(np.array([plain, corrected, plain + more[0] - (more[1] + more[2]) / 2]) - exact)
        errors.append(row)
    return np.sqrt((np.array(errors) ** 2).mean(0))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("minutes, runs", [(1, 12), (3, 8), pytest.param(10, 8, marks=SLOW),
                                           pytest.param(30, 6, marks=SLOW)])
def test_corrected_estimate_is_nearer_the_exact_grammar(minutes, runs):
    same, other = (estimate_errors(minutes, runs, share) for share in (0.0, 1.0))
    print(f"{minutes} min; rows n = 1, 2, 3; plain, jackknife, Miller-Madow\n{np.hstack([same, other]).round(4)}")
    assert (same[:, 1] < 0.8 * same[:, 0]).all() and (same[2, 1] < same[2, 2] or minutes > 10)  # then both are tiny
    assert other[1:, 1].sum() < other[1:, 0].sum()


def test_interval_covers():
    """95 % intervals for what so much speech gives on average, over fresh samples of two known distributions."""
    rng, odds = np.random.default_rng(0), np.random.default_rng(5).dirichlet(np.ones(12), 2)

    def sample(which, clips):  # every clip has a bias of its own, as speakers do
        return [list(rng.choice(12, 25, p=rng.dirichlet(60 * odds[which]))) for _ in range(clips)]

    rows = [judge.compare(sample(0, 40), sample(1, 120), splits=4) for _ in range(60)]
    for i in (0, 1):
        mean = np.mean([row["pjsd"][i] for row in rows])
        share = np.mean([row["interval"][i][0] <= mean <= row["interval"][i][1] for row in rows])
        print(f"n = {i + 1}: {share:.0%} of 95 % intervals hold the mean")
        assert 0.85 <= share <= 1, (i + 1, share)


def test_floor_is_where_real_speech_lands():
    real, other = write(3, 12, 0), write(4, 3, 0)
    row = judge.compare(other, real)
    for i in range(3):
        assert abs(row["excess"][i]) < 4 * row["floor_sd"][i]
        assert row["floor"][i] == pytest.approx(row["pjsd"][i] - row["excess"][i])
    far = judge.compare(write(5, 3, 0, share=1.0), real, true=other)
    assert far["excess"][1] > 0.5 and far["true"] == pytest.approx(row["pjsd"], rel=0.2)
    assert all(0 <= lo <= v <= hi <= 1 for (lo, hi), v in zip(far["interval"], far["pjsd"]))
    assert far["normalized_excess"][1] == pytest.approx(far["excess"][1] / (1 - far["floor"][1]))


def test_variety_sees_who_repeats_himself():
    real = write(3, 12, 0)
    again = judge.compare(write(4, 1, 0) * 4, real)["variety"]
    other = judge.compare(write(4, 4, 0), real)["variety"]
    assert again[4] < 0.6 * other[4] and other == pytest.approx([1] * 5, abs=0.2)


def test_the_generated_is_thinned_when_the_reference_is_small():
    a, b = write(6, 8, 0), write(7, 2, 0)
    row = judge.compare(a, b)
    assert abs(row["excess"][1]) < 4 * row["floor_sd"][1] + 0.02


def test_too_little_speech_and_single_clips_say_so():
    clips = write(8, 3, 0)
    row = judge.compare(clips[:3], clips)
    assert all(map(math.isnan, row["pjsd"])) and "no value" in row["notes"][0]
    long = [sum(clips, [])]
    row = judge.compare(long, clips)
    assert all(math.isnan(low) for low, _ in row["interval"]) and "no interval" in row["notes"][0]
    assert row["pjsd"][0] < 0.1 and row["floor"][0] < 0.1
    row = judge.compare(clips, long)
    assert math.isnan(row["floor"][0]) and "no floor" in row["notes"][0] and row["pjsd"][0] < 0.1


def test_words_cover_as_much_as_can_be():
    language = types.SimpleNamespace(words=[(1, 2, 3), (3, 4), (1, 2), (4, 5, 6, 7)])
    say = lambda *numbers: [SYMBOLS[n] for n in numbers]  # noqa: E731
    assert words_in(say(1, 2, 3, 4), language).tolist() == [2, 2, 1, 1]      # not greedily 123 and a stray 4
    assert words_in(say(9, 1, 2, 3, 9), language).tolist() == [-1, 0, 0, 0, -1]
    assert words_in(say(2, 3, 4, 5, 6, 7), language).tolist() == [-1, -1, 3, 3, 3, 3]
    assert words_in([], language).tolist() == []
    toy = ToySpeech()
    spoken = [SYMBOLS[p] for word in (3, 1, 4, 1, 5) for p in toy.languages[0].words[word]]
    assert (words_in(spoken, toy.languages[0]) >= 0).all()
    assert (words_in(spoken, toy.languages[1]) >= 0).mean() < 0.3


def test_language_is_heard_in_phones():
    toy = ToySpeech()
    clips = write(9, 1, 0) + write(9, 1, 0, share=1.0) + [[]]
    assert guess_language(toy, clips).tolist() == [0] * 20 + [1] * 20 + [-1]


def test_nearness():
    truth = np.random.default_rng(0).standard_normal((200, 2))
    assert nearness(truth, truth) == 1
    assert nearness(np.roll(truth, 1, 0), truth) == pytest.approx(0.5, abs=0.05)


def test_spans_drop_flickers_and_pauses():
    frames = np.array([0] * 5 + [3] * 6 + [7] * 2 + [3] * 4 + [0] * 9 + [2] * 3 + [1])
    assert spans(frames) == [[3, 5, 17], [2, 26, 29]]
    assert spans(np.zeros(4, int)) == []


def test_error_rate_is_edit_distance():
    phone = np.repeat([0, 1, 2, 2, 3], 4)
    truth = types.SimpleNamespace(phone=phone.astype(np.uint8), word=np.repeat([-1, 0, 0, 1, 1], 4))  # phones 1 2 2 3
    says = lambda *numbers: error_rate([[SYMBOLS[n] for n in numbers]], [truth])  # noqa: E731
    assert [says(1, 2, 2, 3), says(1, 2, 3), says(1, 2, 2, 4), says(1, 2, 2, 3, 5), says()] == [0, 0.25, 0.25, 0.25, 1]


def test_cuts_fall_on_quiet_points():
    wave = torch.randn(40 * 8000, generator=torch.Generator().manual_seed(0))
    for second in (8, 17, 27):
        wave[second * 8000:second * 8000 + 800] *= 0.01
    pieces = list(quiet_cuts(wave, 8000))
    assert torch.equal(torch.cat(pieces), wave) and max(map(len, pieces)) <= 12 * 8000
    assert np.cumsum([len(piece) for piece in pieces])[:2] / 8000 == pytest.approx([8.05, 17.05], abs=0.06)


def corpus_of(mel):
    corpus = cdslm.Corpus.__new__(cdslm.Corpus)
    stem = os.path.join(tempfile.mkdtemp(), "0")
    np.save(f"{stem}.mel.npy", mel)
    corpus.shards, corpus.runs, corpus.tables = [{"stem": stem}], {"train": np.array([[0, 0, len(mel)]])}, {}
    return corpus


def test_copies_are_noticed_and_speech_is_not():
    waves, _ = speak(ToySpeech(), 5000, 60, 240, "speech")
    mels = batched(log_mel, waves)
    train, fresh, real = mels[:30].reshape(-1, 80).numpy(), mels[30:45], mels[45:]
    copies = torch.from_numpy(np.stack([train[at:at + 240] for at in range(37, 6000, 431)]))
    copies = copies + 0.3 + 0.1 * torch.randn(copies.shape, generator=torch.Generator().manual_seed(0))
    found = judge.memory(corpus_of(train), copies, real)
    assert found["flagged"] and found["generated"] < 0.5 * found["real"]
    assert not judge.memory(corpus_of(train), fresh, real)["flagged"]


def test_speech_learned_by_heart_is_flagged_although_no_second_is_copied():
    """Short pieces of training speech in another order, with noise. The same of other speech is not flagged."""
    waves, _ = speak(ToySpeech(), 6000, 9, 1600, "speech")
    train, heldout, other = batched(log_mel, waves).split(3)
    waves, _ = speak(ToySpeech(), 7000, 48, 200, "speech")
    true, corpus = batched(log_mel, waves), corpus_of(train.reshape(-1, 80).numpy())

    def shuffled(speech):
        random = torch.Generator().manual_seed(0)
        starts = torch.randint(0, 1560, (48, 5), generator=random)            # five pieces of half a second a clip
        frames = (starts[..., None] + torch.arange(40)).flatten(1)            # (48, 200)
        clips = speech[torch.arange(48) % 3, frames.T].transpose(0, 1)        # (48, 200, 80)
        return clips + torch.randn(clips.shape, generator=random)

    found = judge.memory(corpus, shuffled(train), true, heldout)
    print(found)
    assert found["nearer"] < 0.6 and found["nearer_than_heldout"] > 0.9 and found["flagged"]
    fresh = judge.memory(corpus, shuffled(other), true, heldout)
    print(fresh)
    assert not fresh["flagged"]
    assert "nearer_than_heldout" not in judge.memory(corpus, true, true, heldout.repeat(1, 4, 1))


def test_language_is_kept_in_words_not_in_phones():
    """Phones of the right language in any order are not speech of it."""
    toy, rng = ToySpeech(), np.random.default_rng(0)
    clips = write(9, 2, 0) + write(9, 2, 0, share=1.0)
    languages = [0] * 40 + [1] * 40
    assert language_kept(toy, clips, languages) > 0.97
    assert language_kept(toy, clips, languages[::-1]) < 0.03
    shuffled = [rng.permutation(clip).tolist() for clip in clips]
    assert (guess_language(toy, shuffled) == languages).mean() > 0.97
    assert language_kept(toy, shuffled, languages) < 0.6


def same_sounds():
    """Two languages of one inventory: the second has the words of the first with other phones."""
    toy, rng = ToySpeech(), np.random.default_rng(3)
    first = toy.languages[0]
    swap = {}
    for kind in (True, False):
        phones = [phone for phone in first.inventory if (phone in CONSONANTS) == kind]
        swap |= dict(zip(phones, rng.permutation(phones).tolist()))
    words = [tuple(swap[p] for p in word) for word in first.words]
    toy.languages[1] = dataclasses.replace(first, words=words)
    return toy


def test_language_kept_can_fail_where_languages_have_the_same_sounds():
    """Phones alone then tell nothing of the language, and babble of phones keeps none."""
    toy, languages = same_sounds(), np.random.default_rng(0).integers(2, size=300)
    texts = markov.null_texts(toy, languages, [28] * 300)
    kept = {name: language_kept(toy, text, languages) for name, text in texts.items()}
    guessed = (guess_language(toy, texts["unigram"]) == languages).mean()
    print(kept, guessed)
    assert kept["unigram"] < 0.3 < 0.95 < kept[markov.GRAMMAR] and kept["unigram"] < kept["trigram"]
    other = language_kept(toy, texts[markov.GRAMMAR], 1 - languages)
    assert other < 0.05


def test_each_language_is_compared_with_itself():
    """Speech of the wrong language has the right n-grams as a whole, and none where each is judged alone."""
    clips = [write(30, 4, 0) + write(31, 4, 0, share=1.0), write(32, 12, 0) + write(33, 12, 0, share=1.0)]
    truth = [[types.SimpleNamespace(language=number) for number in (0, 1) for _ in range(len(side) // 2)]
             for side in clips]
    right = judge.by_language((*clips, clips[0]), (*truth, truth[0]))
    wrong = judge.by_language((clips[0][::-1], clips[1], clips[0]), (*truth, truth[0]))
    assert set(right) == {"0", "1"}
    whole = judge.compare(clips[0][::-1], clips[1], splits=4)
    assert whole["pjsd"][1] < 2 * whole["floor"][1]
    for number in right:
        assert right[number]["pjsd"][1] < 2 * right[number]["floor"][1]
        assert wrong[number]["pjsd"][1] > 0.8 and wrong[number]["true"][1] < 0.1


def speakers(count, seed=0):
    rng = np.random.default_rng(seed)
    return [types.SimpleNamespace(language=0, style=int(rng.integers(3)), speaker=ToySpeech.draw_speaker(rng))
            for _ in range(count)]


def test_each_part_of_a_voice_can_be_lost_by_itself():
    """Pitch and vocal tract go together in toy speech: a model that keeps the pitch alone keeps most of `speaker`."""
    spoken, others = speakers(300), speakers(300, seed=1)
    voice, breath, tract = voice_truth(spoken).astype(float), breath_truth(spoken), tract_truth(spoken)
    kept = voice_kept(voice, breath, tract, spoken)
    assert all(value > 0.99 for value in kept.values())

    pitch_only = voice.copy()
    pitch_only[:, 1] = np.polyval(np.polyfit(voice[:, 0], voice[:, 1], 1), voice[:, 0])
    assert nearness(pitch_only[:, :2], voice[:, :2]) > 0.85
    lost = voice_kept(pitch_only, breath, tract_truth(others), spoken)
    assert abs(lost["tract_kept"] - 0.5) < 0.1 and lost["breath_kept"] == kept["breath_kept"]

    style_only = voice.copy()
    style_only[:, 3] = 4 * np.log2([1.0, 1.15, 0.87])[[u.style for u in spoken]]
    lost = voice_kept(style_only, breath_truth(others), tract, spoken)
    assert abs(lost["rate_kept"] - 0.5) < 0.1 and abs(lost["breath_kept"] - 0.5) < 0.1
    assert lost["style_kept"] == kept["style_kept"] and lost["tract_kept"] == kept["tract_kept"]
    flat = voice.copy()
    flat[:, 2] = 0.0
    lost = voice_kept(flat, breath, tract, spoken)
    assert abs(lost["style_kept"] - 0.5) < 0.25 and lost["rate_kept"] == kept["rate_kept"]


def test_nearness_within_groups():
    value = np.array([0.0, 1.0, 10.0, 11.0])
    assert near_in_group(value, value) == 1
    assert near_in_group(value, value[[1, 0, 3, 2]], np.array([0, 0, 1, 1])) == 0
    assert near_in_group(value, value, np.arange(4)) == 0.5   # nobody to compare with
    assert near_in_group(np.zeros(4), np.zeros(4)) == 0.5     # nobody who differs
    assert near_in_group(np.zeros(4), value) == 0.5


def test_true_clips_score_near_one_and_every_figure_has_its_nulls(capsys):
    """The page of a report on text: nulls of words and n-grams, and how much speech n needs."""
    toy, languages = ToySpeech(), np.random.default_rng(0).integers(2, size=200)
    lengths = np.random.default_rng(1).integers(24, 33, size=200)
    texts = [markov.null_texts(toy, languages, lengths, seed)["true text"] for seed in range(5)]
    clips = texts[0], sum(texts[1:4], []), texts[4]
    spoken = [types.SimpleNamespace(language=int(number)) for number in languages]
    rows = {name: {"value": value, "ceiling": value, "floor": 0.0, "normalized": 1.0}
            for name, value in (markov.score(toy, clips[0], languages) | {"language_kept": 1.0}).items()}
    assert rows["word_rate"]["value"] > 0.98 and rows["runs_3"]["value"] > 0.97
    report = judge.judge("text", clips, (math.nan,) * 3) | {"toy": rows, "error_rate": 0.0,
                                                           "error_rate_reconstructed": 0.0}
    report |= judge.toy_nulls(toy, spoken, clips, rows)
    assert set(report["nulls"]) == {*markov.BABBLERS, markov.FREE_ORDER, markov.GRAMMAR}
    assert report["equivalent_order"]["generated"] > 4
    bigram, true = report["nulls"]["bigram"], report["nulls"][markov.GRAMMAR]
    assert bigram["pjsd"][2] > 5 * true["pjsd"][2] and true["pjsd"][4] < 1.5 * report["floor"][4]
    assert report["nulls"][markov.GRAMMAR]["language_kept"] > 0.97
    assert report["nulls"]["unigram"]["language_kept"] < 0.6
    truth = [types.SimpleNamespace(language=number) for number in list(languages) * 3]
    report["by_language"] = judge.by_language(clips, (spoken, truth, spoken))
    judge.page(report)
    out = capsys.readouterr().out
    assert "too little speech" in out and "times as much for n = 5" in out
    assert "in language 1 alone" in out and out.count("language_kept") == 2
    assert "shuffled" not in out and "equivalent Markov order" in out
    assert all(out.count(name) >= 2 for name in report["nulls"])


def test_how_much_speech_a_value_needs():
    """Four times as much has about a quarter of the floor; n = 1 needs a minute at most."""
    short, long = (judge.compare(write(20, m, 0), write(21, 3 * m, 0), splits=4) for m in (2, 8))
    assert short["enough"][4] > 2 > short["enough"][0] and long["enough"][0] < 1
    assert short["enough"][4] / long["enough"][4] == pytest.approx(3, abs=1.2)


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval_pjsd.py", *map(str, arguments)])
    try:
        judge.cli(judge.main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def save_text(folder, clips):
    folder.mkdir()
    for i, clip in enumerate(clips):
        (folder / f"{i}.txt").write_text(" ".join(clip), encoding="utf-8")
    return folder


def test_folders_of_text(tmp_path, monkeypatch, capsys):
    a, b = save_text(tmp_path / "a", write(10, 2, 0)), save_text(tmp_path / "b", write(11, 6, 0))
    (b / "broken.txt").write_bytes(b"\xff\xfe\xfa")
    code, out, err = run_main(monkeypatch, capsys, "--generated", a, "--reference", b, "--recognizer", "text",
                              "--json", tmp_path / "r")
    report = json.loads((tmp_path / "r").read_text())
    assert code == 0 and "broken.txt" in err and report["recognizer"] == "text" and report["n"] == [1, 2, 3, 4, 5]
    assert {"pjsd", "interval", "floor", "floor_sd", "excess", "normalized_excess", "phones"} <= set(report)
    assert report["phones"]["generated"] > 900 and report["true"] == [None] * 5 and abs(report["excess"][1]) < 0.05
    assert f"{report['pjsd'][2]:.4f}" in out and "NaN" not in (tmp_path / "r").read_text()


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    text, few = save_text(tmp_path / "text", write(12, 2, 0)), save_text(tmp_path / "few", [["a"] * 20] * 4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.wav").write_bytes(b"RIFF nothing")
    for arguments, words in [
            (["--generated", tmp_path / "empty", "--reference", text, "--recognizer", "text"], "no text files"),
            (["--generated", tmp_path / "none", "--reference", text, "--recognizer", "text"], "no such folder"),
            (["--generated", text, "--reference", text, "--recognizer", "ears"], "unknown --recognizer ears"),
            (["--generated", text], "give a run folder"), ([], "give a run folder"),
            (["out", "--minutes", "0"], "--minutes"), (["out", "--minutes", "x"], "--minutes"),
            ([tmp_path / "empty"], "no run there")]:
        code, out, err = run_main(monkeypatch, capsys, *arguments)
        assert code == 2 and words in err and err.strip().splitlines()[-1].startswith("error: "), (arguments, err)
    code, out, err = run_main(monkeypatch, capsys, "--generated", few, "--reference", text, "--recognizer", "text")
    assert code == 0 and "no value: 80 phones generated" in out and "0.0000" not in out
    monkeypatch.setattr(judge, "recogniser", lambda name: lambda wave, rate: ["a"])
    code, out, err = run_main(monkeypatch, capsys, "--generated", tmp_path / "bad", "--reference", tmp_path / "bad")
    assert code == 2 and "none of its 1 files can be read" in err and "skipped" in err


def test_conversations_have_a_judge_of_their_own(monkeypatch, tmp_path):
    config = cdslm.Config(toy_grammar="topics")
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path)])
    for module in (judge, pairs):
        monkeypatch.setattr(module, "load_run", lambda folder, device: (config, None, None))
        with pytest.raises(UserError, match="python -m lab.coherence"):
            module.main()


def test_missing_packages_are_named(monkeypatch):
    for package, name in (("hama", "hama"), ("transformers", "hf:x/y")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"pip install {package}"):
            judge.recogniser(name)
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install matplotlib" in draw_decided({}, Path("x.png"))


def test_hugging_face_model_from_a_folder(tmp_path):
    """In a process of its own: transformers changes how torch makes tensors in the whole of it."""
    pytest.importorskip("transformers")
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(hear_with_hugging_face, tmp_path).result()


def hear_with_hugging_face(tmp_path):
    import transformers
    torch.manual_seed(0)
    symbols = ["<pad>", "<s>", "|", "a", "b", "t"]
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[16] * 7,
                 num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(vocab_size=len(symbols), pad_token_id=0, **shape))
    model.save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    phones = judge.recogniser(f"hf:{tmp_path}")
    said = phones(torch.randn(14 * RATE, generator=torch.Generator().manual_seed(0)), RATE)
    assert said and set(said) <= {"a", "b", "t"} and phones(torch.zeros(10), RATE) == []
    with pytest.raises(UserError, match="hf:"):
        judge.recogniser(f"hf:{tmp_path / 'nothing'}")


@pytest.fixture(scope="module")
def toy_speech():
    toy = ToySpeech()
    reference, _ = speak(toy, judge.REFERENCE, 600, 240, "reference")
    return toy, *speak(toy, judge.CONTEXTS, 200, 240, "speech"), reference


@pytest.mark.slow
def test_toy_recogniser_and_the_ladder(toy_speech):
    """Phone error rates, and at n = 2 and 3: floor ~ reconstructed < half shuffled < other language <= noise."""
    toy, waves, spoken, reference = toy_speech
    listener = load_listener()
    hear = lambda sound: listener.hear(batched(log_mel, sound))["clips"]  # noqa: E731
    real, reference = hear(waves), hear(reference)
    coder = AudioAutoencoder(decoder="griffinlim").eval().requires_grad_(False)
    rebuilt = hear(batched(lambda part: coder.decode(coder.encode(part)), waves))
    rates = error_rate(real, spoken), error_rate(rebuilt, spoken)
    print("phone error rate of real and of reconstructed speech", rates)
    assert rates[0] <= 0.05 and rates[1] <= 0.08
    rng = np.random.default_rng(0)
    half = [clip[:len(clip) // 2] + rng.permutation(clip[len(clip) // 2:]).tolist() for clip in real]
    other = hear(speak(ToySpeech(languages=2, seed=7), 0, 200, 240, "another language")[0])
    phones = sorted({p for clip in reference for p in clip})
    noise = [rng.choice([p for p in SYMBOLS[1:] if p not in phones] or phones, 28).tolist() for _ in real]
    hiss = hear(0.05 * torch.randn(waves.shape, generator=torch.Generator().manual_seed(0)))
    sides = dict(real=real, rebuilt=rebuilt, half=half, other=other, noise=noise)
    rows = {name: judge.compare(clips, reference) for name, clips in sides.items()}
    print({name: np.round(row["pjsd"], 4) for name, row in rows.items()}, "phones in hiss:", sum(map(len, hiss)))
    for i in (1, 2):
        values = [rows[name]["pjsd"][i] for name in ("rebuilt", "half", "other", "noise")]
        assert values == sorted(values)
        assert values[0] < rows["rebuilt"]["floor"][i] + 4 * rows["rebuilt"]["floor_sd"][i] < values[1]


@pytest.mark.slow
def test_truth_of_true_speech(toy_speech):
    """True speech judged as if generated reaches its ceiling, and words of the other language don't count."""
    toy, waves, spoken, _ = toy_speech
    heard = load_listener().hear(batched(log_mel, waves))
    rows = toy_truth(toy, spoken, heard, heard)
    print(rows)
    assert all(row["normalized"] == pytest.approx(1) for row in rows.values())
    assert all(abs(row["ceiling"] - row["floor"]) > 0.25 for row in rows.values())
    assert rows["word_rate"]["value"] > 0.95 and rows["runs_2"]["value"] > 0.9
    strange = {name: x[::-1] for name, x in heard.items()}
    assert toy_truth(toy, spoken, strange, heard)["speaker_kept"]["normalized"] < 0.2


@pytest.mark.slow
def test_the_voice_of_true_speech(toy_speech):
    """What the ears for each part of a voice can tell, of real and of other speech."""
    _, waves, spoken, _ = toy_speech
    listener, mel = load_listener(), batched(log_mel, waves)
    side = listener.hear(mel), mel
    rows = voice_rows(listener, spoken, side, side)
    print({name: round(row["ceiling"], 3) for name, row in rows.items()})
    assert all(row["value"] == row["ceiling"] and abs(row["floor"] - 0.5) < 0.06 for row in rows.values())
    assert rows["style_kept"]["ceiling"] > 0.8 and rows["breath_kept"]["ceiling"] > 0.7
    assert rows["rate_kept"]["ceiling"] > 0.65 and rows["tract_kept"]["ceiling"] > 0.6
    breath, tract = VoiceMeter(listener).read(mel, side[0]["frames"]).T
    assert np.corrcoef(breath, breath_truth(spoken))[0, 1] > 0.6
    assert np.corrcoef(tract, tract_truth(spoken))[0, 1] > 0.6


@pytest.mark.parametrize("extra, kept", [([], "judged.json"), (["--json", "mine"], "mine")])
def test_the_report_on_a_run_is_kept_in_its_folder_or_where_asked(tmp_path, monkeypatch, extra, kept):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["eval_pjsd.py", ".", *extra])
    monkeypatch.setattr(judge, "judge_run", lambda arguments: {"pjsd": [0.5, math.nan]})
    monkeypatch.setattr(judge, "page", lambda report: None)
    judge.main()
    assert [path.name for path in tmp_path.iterdir()] == [kept]
    assert json.loads(Path(kept).read_text()) == {"pjsd": [0.5, None]}


@pytest.mark.slow
def test_a_run_is_judged(tmp_path):
    run, report = tmp_path / "run", tmp_path / "report.json"
    for words in (f"cdslm.py --steps 20 --toy-hours 0.1 --decoder griffinlim --out {run}",
                  f"eval_pjsd.py {run} --minutes 1 --steps 2 --decided --json {report}"):
        done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, check=True, capture_output=True, text=True)
    report = json.loads(report.read_text())
    assert "word_rate" in done.stdout and set(report["toy"]) == set(MEANING) and report["error_rate"] < 0.05
    assert all(0 <= v <= 1 for name, values in report["decided"].items() if name != "log_snr" for v in values)
    assert not report["memory"]["flagged"] and report["pjsd"][0] is not None
    assert set(report["nulls"]["bigram"]) == {*markov.MEASURES, "language_kept", "pjsd"}
    assert set(report["by_language"]) == {"0", "1"}
    assert 1 <= report["equivalent_order"]["generated"] <= report["equivalent_order"]["true"] <= 6


@pytest.mark.slow
def test_real_english_with_hama(tmp_path):
    """floor ~ resynthesised < time-reversed, on digits read by six speakers."""
    pytest.importorskip("hama")
    folder = next((p for p in (ROOT.parent / "shared/data/fsdd", ROOT / "shared/data/fsdd") if p.is_dir()), None)
    if folder is None:
        pytest.skip("no recordings here")
    phones, coder = judge.recogniser("hama"), AudioAutoencoder(decoder="griffinlim").eval().requires_grad_(False)
    waves = [load_audio(path) for path in sorted(folder.rglob("*.flac"))[::2]]
    hear = lambda sounds: [phones(wave, RATE) for wave in sounds]  # noqa: E731
    real, mine = hear(waves[::2] + waves[1::4]), waves[3::4]
    rebuilt = hear(coder.decode(coder.encode(wave[None]))[0] for wave in mine)
    rows = [judge.compare(clips, real) for clips in (hear(mine), rebuilt, hear(wave.flip(0) for wave in mine))]
    print([np.round(row["pjsd"], 4) for row in rows], np.round(rows[0]["floor"], 4))
    for i in (1, 2):
        assert rows[1]["pjsd"][i] < rows[0]["pjsd"][i] + 0.1 < rows[2]["pjsd"][i]
