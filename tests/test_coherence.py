"""Coherence: each measure sees what it is for and nothing else, in text, and through the recogniser."""
import dataclasses
import json

import numpy as np
import pytest
import torch

import eval_pjsd
from cdslm import FRAME_RATE
from lab import coherence
from lab.coherence import (Clip, SpokenPhrase, figures, half_life, over_time, phrases_of, recognise, texts, true_clip,
                           turns_of)
from lab.listener import load_listener, spans
from lab.markov import symbols_of
from lab.topics import CLOSER, CONTENT, LINK, OPENER, Chances, TopicSpeech
from lab.toyspeech import SYMBOLS
from tests.conftest import SMALL, command, flags

TOY = TopicSpeech()
# The measures that a null breaks. All others must stay as they are.
BREAKS = {
    "topic": {"topic after prompt", "topic, 1 later", "topic, 3 later", "topic, 10 later", "half-life, s"},
    "closer": {"closers agree", "  within 3 s", "  later"},
    "reply": {"replies answer"},
    "turn": {"phrases a turn", "seconds a turn", "semitones apart"},
    "voice": {"voice comes back"},
}
# One speaker has nobody to reply to, and the newcomers' voices may be anywhere.
UNDEFINED = {("turn", "replies answer"), ("turn", "voice comes back"), ("voice", "semitones apart")}


@pytest.fixture(scope="module")
def found():
    """{side: figures} of texts of 60 s."""
    return {name: figures(TOY, clips) for name, clips in texts(TOY, 60).items()}


def value(found, side, name):
    return found[side][name]["value"]


@pytest.mark.parametrize("name, null, expected, at_chance", [
    ("topic, 3 later", "topic", 0.87, 0.24), ("closers agree", "closer", 1.00, 0.24), ("replies answer", "reply", 0.86, 0.19)])
def test_the_simulated_figures(found, name, null, expected, at_chance):
    assert value(found, "text", name) == pytest.approx(expected, abs=0.05)
    assert value(found, null, name) == pytest.approx(at_chance, abs=0.05)
    assert found["text"][name]["interval"][0] > found[null][name]["interval"][1] + 0.4


@pytest.mark.parametrize("null", BREAKS)
def test_a_null_breaks_its_own_measures_alone(found, null):
    for name, figure in found["text"].items():
        other = found[null][name]
        if name in BREAKS[null]:
            (low, high), (other_low, other_high) = figure["interval"], other["interval"]
            assert other_high < low or high < other_low, name
        elif (null, name) not in UNDEFINED:
            half = (figure["interval"][1] - figure["interval"][0] + other["interval"][1] - other["interval"][0]) / 2
            assert abs(figure["value"] - other["value"]) <= half + 0.01, name


def test_half_lives_are_those_of_the_grammar(found):
    """14 of 15 phrases keep what exceeds chance: 10 phrases, of about 3.5 s with their pauses."""
    low, high = found["text"]["half-life, s"]["interval"]
    assert low < 36 < high and low > 20
    assert value(found, "topic", "half-life, s") < 2 and value(found, "pairs", "half-life, s") < 2


def test_a_talker_stuck_with_one_topic_has_no_half_life():
    """Its phrases agree, but so do those of any two conversations."""
    phrase = SpokenPhrase([(CONTENT, 0, 10)], 0.0)
    stuck = [[SpokenPhrase([(CONTENT, 300 * i, 300 * i + 10)], 0.0) for i in range(9)] for _ in range(4)]
    assert phrase.topic == 0 and half_life(stuck)["value"] == 1
    faithful = [[SpokenPhrase([(CONTENT + 6 * topic, 300 * i, 300 * i + 10)], 0.0) for i in range(9)] for topic in range(4)]
    assert half_life(faithful)["value"] == 300
    assert half_life([[], []])["cases"] == 0


def test_a_phrase_that_misses_the_topic_counts_as_loss():
    """A talker who never forgets, but misses the topic in three of ten phrases."""
    rng = np.random.default_rng(0)

    def conversation(missed):
        kept = rng.integers(4)
        topics = [rng.integers(4) if rng.random() < missed else kept for _ in range(15)]
        return [SpokenPhrase([(CONTENT + 6 * topic, 308 * i, 308 * i + 10)], 0.0) for i, topic in enumerate(topics)]
    noisy, faithful = ([conversation(missed) for _ in range(200)] for missed in (0.3, 0))
    assert 10 < half_life(noisy)["value"] < 30 and half_life(faithful)["value"] == 300


def test_a_babbler_of_word_pairs_is_at_chance(found):
    for name, chance in {"topic, 1 later": 0.25, "topic, 10 later": 0.25, "closers agree": 0.25,
                         "replies answer": 0.19}.items():
        assert value(found, "pairs", name) == pytest.approx(chance, abs=0.05)
    assert value(found, "pairs", "whole phrases") > 0.9


def test_pjsd_does_not_see_coherence():
    """A talker who forgets the topic at every phrase has the same phone pairs."""
    def phones(chances, first, count):
        toy = TopicSpeech(1, chances=chances)
        talks = [toy.utterance(first + number, 60, sound=False) for number in range(count)]
        return [[SYMBOLS[phone] for phone, _, _ in spans(talk.phone)] for talk in talks]

    reference = phones(Chances(), 100, 60)
    true, forgetful = (eval_pjsd.compare(phones(chances, 0, 20), reference, splits=2)["pjsd"][1]
                       for chances in (Chances(), coherence.NULLS["topic"]))
    assert forgetful < true + 0.001


@pytest.mark.slow
def test_a_window_limits_what_can_be_remembered(found):
    """A second of context may hold no topic word, and seldom the opener; eight hold all but the topic's history."""
    clips = texts(TOY, 60)["text"]
    second, eight, whole = (figures(TOY, clips, (80 * ctx, 240)) for ctx in (1, 8, 100))
    assert second["half-life, s"]["value"] < 0.7 * whole["half-life, s"]["value"]
    assert second["  later"]["value"] < second["  within 3 s"]["value"] < 0.9
    assert second["replies answer"]["value"] < 0.7 < eight["replies answer"]["value"]
    assert eight["closers agree"]["value"] == 1
    assert whole == found["text"]


def frames_of(language, *words, pause=20):
    """Phone numbers of words, six frames a phone; None is a pause."""
    frames = [0] * pause
    for word in words:
        frames += [0] * pause if word is None else [phone for phone in language.words[word] for _ in range(6)]
    return np.array([*frames, *[0] * pause], np.uint8)


def test_phrases_are_cut_by_pauses_and_words_are_found():
    language = TOY.languages[0]
    words = [OPENER + 1, CONTENT + 8, LINK + 2, CONTENT + 11, CLOSER + 1]
    phone = frames_of(language, *words, None, OPENER + 2, CONTENT + 3, CLOSER + 3)
    one, other = phrases_of(phone, np.full(len(phone), 0.5), language)
    assert one.words == words and one.topic == 1 and one.pair == (1, 1) and one.pitch == 0.5
    assert (one.first_place, one.last_place) == (2, 5)
    assert other.pair == (2, 3) and other.topic == 0 and other.start - one.stop == 20


def test_what_is_no_word_is_one_gap():
    language = TOY.languages[0]
    phone = frames_of(language, OPENER)
    vowel = language.words[OPENER][1]
    phone = np.concatenate([phone[:-20], np.repeat([vowel, 9, vowel], 6), phone[-20:]]).astype(np.uint8)
    (phrase,) = phrases_of(phone, np.zeros(len(phone)), language)
    assert phrase.words == [OPENER, -1] and phrase.pair is None and phrase.topic is None


def test_silence_and_noise_hold_no_phrase():
    language = TOY.languages[0]
    assert phrases_of(np.zeros(400, np.uint8), np.zeros(400), language) == []
    hiss = np.full(400, SYMBOLS.index("s"), np.uint8)
    assert phrases_of(hiss, np.zeros(400), language) == []
    silent = [Clip(np.zeros(800, np.uint8), np.zeros(800), 0, [])] * 2
    assert not any(figure["cases"] for name, figure in figures(TOY, silent).items())
    assert over_time(TOY, silent)["language"][1]["value"] == 0


def test_quality_over_time_is_that_of_the_text():
    sides = texts(TOY, 60, 24)
    true, newcomers = (over_time(TOY, sides[name]) for name in ("text", "voice"))
    assert all(len(row) == 12 for row in true.values())
    known = "words", "language", "speaker"
    assert min(figure["value"] for name in known for figure in true[name]) > 0.8
    assert np.mean([figure["value"] for figure in true["speaker"]]) > 0.9
    assert np.mean([figure["value"] for figure in newcomers["speaker"]]) < 0.7
    assert np.mean([figure["value"] for figure in true["another speaker"]]) < 0.6
    other = [dataclasses.replace(clip, language=1 - clip.language) for clip in sides["text"]]
    assert max(figure["value"] for figure in over_time(TOY, other)["language"]) < 0.1


def test_a_turn_lasts_while_the_voice_does():
    phrases = [SpokenPhrase([(0, 0, 1)], pitch) for pitch in (0, 0.05, 0.6, 0.55, 0.1)]
    assert [len(turn) for turn in turns_of(phrases)] == [2, 2, 1]


@pytest.mark.slow
def test_the_recogniser_hears_conversations():
    """Words, topics and speakers, as true as in the text."""
    listener, right, frames = load_listener(), 0, 0
    for number in range(3):
        talk = TOY.utterance(number, 40)
        clip = true_clip(TOY, talk, 10 * FRAME_RATE)
        (recognised,) = recognise(listener, torch.from_numpy(talk.wave[10 * 24_000:])[None], [clip])
        language = TOY.languages[talk.language]
        words = np.full(len(clip.phone), -1)
        for phrase in phrases_of(recognised.phone, recognised.octaves, language):
            for word, start, stop in phrase.pieces:
                words[start:stop] = word
        true = talk.word[10 * FRAME_RATE:]
        right, frames = right + (words == true)[true >= 0].sum(), frames + (true >= 0).sum()
        one, other = (phrases_of(each.phone, each.octaves, language) for each in (clip, recognised))
        assert [p.topic for p in one] == [p.topic for p in other]
        assert [len(turn) for turn in turns_of(one)] == [len(turn) for turn in turns_of(other)]
    assert right / frames > 0.92


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    """A small run on conversations."""
    folder = tmp_path_factory.mktemp("conversations") / "run"
    done = command("cdslm.py", *flags(**SMALL | dict(out=folder, toy_grammar="topics", toy_hours=0.1)))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_run_is_judged(run):
    done = command("lab.coherence", run, "--num", 2, "--seconds", 10)
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "coherence.json").read_text())
    assert list(report["figures"]) == ["generated", "true", "text", "pairs", *BREAKS, "window"]
    assert {name: len(row) for name, row in report["over_time"]["true"].items()} == {
        "words": 2, "language": 2, "speaker": 2, "another speaker": 2}
    assert report["over_time"]["true"]["words"][0]["value"] > 0.9
    lines = done.stdout.splitlines()
    assert "half-life, s" in done.stdout and all(len(line) <= 100 for line in lines)
    assert sum(line.startswith(tuple(report["figures"]["true"])) for line in lines) == len(report["figures"]["true"])


@pytest.mark.slow
def test_other_runs_and_flags_are_named_in_one_line(run, trained):
    for words, message in [
            ((trained[0],), "was not trained on conversations"), (("nowhere",), "no run there"),
            ((run, "--num", 0), "--num"), ((run, "--seconds", 1), "--seconds"), ((run, "--cfg", "nan"), "--cfg")]:
        done = command("lab.coherence", *words)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (trained[0] / "coherence.json").exists()


def test_texts_that_forget_say_something_else_in_the_same_languages():
    sides = texts(TOY, 20, 4)
    assert symbols_of(sides["text"][0].phone) != symbols_of(sides["topic"][0].phone)
    for name in coherence.NULLS:
        assert [clip.language for clip in sides[name]] == [clip.language for clip in sides["text"]]
