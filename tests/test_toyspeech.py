import time
import zlib
from collections import Counter

import numpy as np
import pytest

from lab.listener import ngrams
from lab.toyspeech import HOP, PHONEMES, RATE, STYLES, SYMBOLS, VERSION, ToySpeech


@pytest.fixture(scope="module")
def toy():
    return ToySpeech()


def spoken(toy, language, seed, words):
    """Phones of a long text in a language, pauses left out."""
    rng, texts = np.random.default_rng(seed), []
    for _ in range(words // 100):
        phones, number, _ = toy._say(rng, toy.languages[language], 4000, 1.0)
        texts += phones[number >= 0].tolist()
    return texts


def test_version_1_is_frozen(toy):
    """Two languages, 16 words each, 24 phonemes; these very words."""
    assert VERSION == 1 and len(PHONEMES) == 24 and len(STYLES) == 3
    assert [len(language.words) for language in toy.languages] == [16, 16]
    assert ["".join(SYMBOLS[phone] for phone in language.words[0]) for language in toy.languages] == ["wiwɔk", "jɛgu"]
    assert [toy.entropy_per_phone(i) for i in range(2)] == pytest.approx([0.62124, 0.68196], abs=1e-5)
    utterance = toy.utterance(0)
    assert zlib.crc32(utterance.phone.tobytes()) == 1393337040
    assert np.std(utterance.wave) == pytest.approx(0.04331, abs=1e-4)


def test_the_same_number_is_the_same_speech_in_any_order(toy):
    forwards = [toy.utterance(i, 1.0) for i in (3, 4, 5)]
    backwards = [ToySpeech().utterance(i, 1.0) for i in (5, 4, 3)][::-1]
    for one, other in zip(forwards, backwards):
        assert one.wave.tobytes() == other.wave.tobytes()
        assert (one.phone == other.phone).all() and one.speaker == other.speaker
    assert (forwards[0].wave != forwards[1].wave).any()


def test_another_seed_is_another_corpus(toy):
    assert ToySpeech(seed=1).languages[0].words != toy.languages[0].words


@pytest.mark.parametrize("seconds", [0.0125, 0.5, 1.01, 3])
def test_every_frame_has_its_truth(toy, seconds):
    utterance = toy.utterance(11, seconds)
    frames = round(seconds * 80)
    assert len(utterance.wave) == frames * HOP and utterance.wave.dtype == np.float32
    assert len(utterance.phone) == len(utterance.word) == len(utterance.f0) == frames
    assert np.isfinite(utterance.wave).all() and np.abs(utterance.wave).max() < 1


def test_the_truth_agrees_with_itself(toy):
    """Pauses belong to no word, words hold their own phones in order, and only the language's."""
    for i in range(6):
        utterance = toy.utterance(i, 10.0)
        language = toy.languages[utterance.language]
        assert ((utterance.phone == 0) == (utterance.word < 0)).all()
        assert set(utterance.phone) <= {0, *language.inventory}
        for word in set(utterance.word) - {-1}:
            assert set(utterance.phone[utterance.word == word]) <= set(language.words[word])


def test_what_is_labelled_silent_is_quiet(toy):
    for i in range(4):
        utterance = toy.utterance(i, 10.0)
        level = np.sqrt((utterance.wave.reshape(-1, HOP) ** 2).mean(1))
        pause = np.convolve(utterance.phone != 0, np.ones(9), "same") == 0     # well inside it
        assert pause.any()
        assert level[pause].max() < 0.02 * level[utterance.phone != 0].mean()


def test_labels_are_in_time_with_the_sound(toy):
    """Loudness jumps where a pause ends; a shift of the labels by 50 ms would show."""
    scores = Counter()
    for i in range(6):
        utterance = toy.utterance(i, 10.0)
        level = np.log(np.sqrt((utterance.wave.reshape(-1, HOP) ** 2).mean(1)) + 1e-4)
        for shift in range(-8, 9):
            scores[shift] += np.corrcoef(np.roll(utterance.phone != 0, shift), level)[0, 1]
    assert abs(scores.most_common(1)[0][0]) <= 2


def test_pitch_is_the_truths(toy):
    """The spectrum of a vowel repeats at the f0 that the truth gives."""
    checked = 0
    for i in range(8):
        utterance = toy.utterance(i, 10.0)
        vowel = np.isin(utterance.phone, [SYMBOLS.index(s) for s in PHONEMES if PHONEMES[s][0] == "vowel"])
        steady = np.convolve(vowel, np.ones(7), "same") == 7
        for frame in np.flatnonzero(steady)[:3]:
            piece = utterance.wave[(frame - 2) * HOP:(frame + 2) * HOP]
            echo = np.correlate(piece, piece, "full")[len(piece) - 1:]
            period = 80 + echo[80:400].argmax()
            ratio = utterance.f0[frame] * period / RATE
            checked += abs(ratio - max(1, round(ratio))) < 0.08
    assert checked >= 18


def test_what_is_asked_for_is_given(toy):
    speaker = {"pitch": 200.0, "tract": 1.0, "rate": 1.0, "breath": 0.1}
    utterance = toy.utterance(0, 2.0, language=1, style=2, speaker=speaker)
    assert (utterance.language, utterance.style, utterance.speaker) == (1, 2, speaker)


def test_speakers_and_styles_differ(toy):
    utterances = [toy.utterance(i, 0.1) for i in range(60)]
    assert {u.language for u in utterances} == {0, 1} and {u.style for u in utterances} == {0, 1, 2}
    assert max(u.speaker["pitch"] for u in utterances) > 2 * min(u.speaker["pitch"] for u in utterances)


def test_it_is_50_times_faster_than_real_time(toy):
    fastest = 0
    for i in range(3):
        start = time.perf_counter()
        toy.utterance(i, 20.0)
        fastest = max(fastest, 20 / (time.perf_counter() - start))
    assert fastest > 50


@pytest.mark.parametrize("language", [0, 1])
def test_words_of_a_language(toy, language):
    words = toy.languages[language].words
    assert len(set(words)) == len(words)
    assert all(3 <= len(word) <= 7 for word in words)
    assert set(phone for word in words for phone in word) <= set(toy.languages[language].inventory)
    assert np.allclose(toy.languages[language].follows.sum(1), 1)


def test_more_words_and_languages():
    toy = ToySpeech(languages=3, words=120)
    assert len(toy.languages) == 3 and len(set(toy.languages[2].words)) == 120
    for wrong in (dict(languages=0), dict(words=1)):
        with pytest.raises(ValueError):
            ToySpeech(**wrong)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngrams_are_those_of_a_long_text(toy, n):
    grams = ngrams(toy, n)
    assert sum(grams.values()) == pytest.approx(1)
    text = spoken(toy, 0, seed=5, words=12_000)
    counted = Counter(zip(*[text[i:] for i in range(n)]))
    total = sum(counted.values())
    assert set(counted) <= set(grams)
    assert sum(abs(grams[gram] - counted[gram] / total) for gram in grams) / 2 < 0.05


def test_ngrams_agree_among_themselves(toy):
    """Leaving out the last phone of three gives the distribution of two."""
    pairs = Counter()
    for gram, odds in ngrams(toy, 3).items():
        pairs[gram[:2]] += odds
    for gram, odds in ngrams(toy, 2).items():
        assert pairs[gram] == pytest.approx(odds)


def test_entropy_is_what_one_more_phone_adds(toy):
    """Within words nothing is left to chance, so longer n-grams approach the chain's entropy from above."""
    entropy = [-sum(p * np.log2(p) for p in ngrams(toy, n).values()) for n in (4, 5, 6)]
    rate = toy.entropy_per_phone()
    assert 0 < rate < entropy[2] - entropy[1] < entropy[1] - entropy[0] < np.log2(14)
    assert entropy[2] - entropy[1] < 1.02 * rate


def test_word_frequencies_are_stationary(toy):
    share = toy.word_share()
    assert share.sum() == pytest.approx(1)
    assert np.allclose(share @ toy.languages[0].follows, share, atol=1e-9)
