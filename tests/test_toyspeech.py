import json
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cdslm import Config, UserError, read_config, train
from lab import topics
from lab.listener import ngrams
from lab.plan import command_line
from lab.topics import CLOSER, CONTENT, LINK, OPENER, TOPIC_WORDS, Chances, TopicSpeech, toy_source, word_pairs
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


# --------------------------------------------------------------------------------------------------
# Conversations (lab/topics.py).

@pytest.fixture(scope="module")
def talks():
    return TopicSpeech()


def phrases_in(talks, count, seed=0):
    """A long conversation in the first language, as text."""
    rng = np.random.default_rng(seed)
    chat = talks.phrases(rng, talks.languages[0], [talks.draw_speaker(rng)])
    return [next(chat) for _ in range(count)]


def test_version_1_of_conversations_is_frozen(talks):
    assert topics.VERSION == 1 and [len(language.words) for language in talks.languages] == [36, 36]
    assert ["".join(SYMBOLS[phone] for phone in language.words[-1]) for language in talks.languages] == ["dʌti", "tɑt"]
    assert [language.answers.tolist() for language in talks.languages] == [[3, 5, 0, 1, 2, 4], [5, 4, 3, 2, 0, 1]]
    assert [talks.entropy_per_phone(i) for i in range(2)] == pytest.approx([0.6671, 0.62919], abs=1e-5)
    talk = talks.utterance(0)
    assert len(talk.wave) == 60 * RATE and zlib.crc32(talk.phone.tobytes()) == 3528728999
    assert np.std(talk.wave) == pytest.approx(0.04592, abs=1e-4)


def test_a_conversation_depends_on_its_number_alone(talks):
    one, other = talks.utterance(5, 4.0), TopicSpeech().utterance(5, 4.0)
    assert one.wave.tobytes() == other.wave.tobytes() and (one.phone == other.phone).all()
    assert (one.wave != talks.utterance(6, 4.0).wave).any()
    silent = talks.utterance(5, 4.0, sound=False)
    assert not len(silent.wave)
    for name in ("phone", "word", "phrase", "topic", "speaker", "turn", "f0"):
        assert (getattr(silent, name) == getattr(one, name)).all()


@pytest.mark.parametrize("number", range(4))
def test_the_truth_of_a_conversation_agrees_with_itself(talks, number):
    talk = talks.utterance(number, 30.0)
    frames, language = 30 * 80, talks.languages[talk.language]
    labels = talk.word, talk.phrase, talk.topic, talk.speaker, talk.turn
    assert len(talk.wave) == frames * HOP and talk.wave.dtype == np.float32 and np.abs(talk.wave).max() < 1
    assert all(len(label) == frames for label in (*labels, talk.phone, talk.f0))
    assert all(((label < 0) == (talk.phone == 0)).all() for label in labels)
    content = talk.word >= CONTENT
    assert ((talk.word - CONTENT)[content] // TOPIC_WORDS == talk.topic[content]).all()
    for phrase in range(talk.phrase.max()):                                   # the last may be cut
        inside = talk.phrase == phrase
        words = talk.word[inside]
        assert words[0] < CLOSER <= words[-1] < LINK and words[-1] - CLOSER == words[0] - OPENER
        assert all(len(set(label[inside])) == 1 for label in (talk.topic, talk.speaker, talk.turn))
        assert set(talk.phone[inside]) <= set(language.inventory)


def test_two_speakers_can_be_told_apart(talks):
    """By the pitch that is heard, not only by the one that was drawn."""
    for number in range(6):
        talk = talks.utterance(number, 40.0, sound=False)
        drawn = [speaker["pitch"] for speaker in talk.speakers]
        assert len(drawn) == 2 and abs(np.log2(drawn[0] / drawn[1])) >= topics.APART
        for speaker in {0, 1} & set(talk.speaker):
            heard = talk.f0[(talk.speaker == speaker) & (talk.f0 > 0)]
            assert abs(np.log2(np.median(heard) / drawn[speaker])) < topics.APART / 2


def test_chances_are_those_of_the_grammar(talks):
    phrases = phrases_in(talks, 8000)
    pairs = list(zip(phrases, phrases[1:]))
    answers, content = talks.languages[0].answers, [[w for w in p.words if w >= CONTENT] for p in phrases]
    replies = [(a, b) for (p, q), a, b in zip(pairs, content, content[1:]) if p.speaker != q.speaker]
    right = [answers[(a[-1] - CONTENT) % TOPIC_WORDS] == (b[0] - CONTENT) % TOPIC_WORDS for a, b in replies]
    assert np.mean([p.topic != q.topic for p, q in pairs]) == pytest.approx(1 / 20, abs=0.01)
    assert np.mean([p.speaker != q.speaker for p, q in pairs]) == pytest.approx(0.5, abs=0.02)
    assert np.mean(right) == pytest.approx(0.8 + 0.2 / 6, abs=0.02)
    assert all(p.words[0] - OPENER == p.words[-1] - CLOSER for p in phrases)
    assert {len(words) for words in content} == {3, 4, 5, 6}


@pytest.mark.parametrize("chances, same", [
    (Chances(new_topic=0.75), ("places", "speakers")), (Chances(agreement=0), ("topics", "places", "speakers")),
    (Chances(reply=0), ("topics", "speakers")), (Chances(same_voice=0), ("topics", "places"))])
def test_another_chance_leaves_the_other_draws_alone(talks, chances, same):
    sides = []
    for toy in (talks, TopicSpeech(chances=chances)):
        phrases = phrases_in(toy, 300)
        sides.append({
            "topics": [p.topic for p in phrases], "speakers": [p.speaker for p in phrases],
            "places": [(w - CONTENT) % TOPIC_WORDS for p in phrases for w in p.words if w >= CONTENT]})
    assert {name for name in sides[0] if sides[0][name] == sides[1][name]} == set(same)


def test_word_pairs_are_those_of_a_long_text(talks):
    text = [word for phrase in phrases_in(talks, 20_000) for word in phrase.words]
    counts = np.zeros((36, 36))
    np.add.at(counts, (text[:-1], text[1:]), 1)
    frequency, follows = word_pairs()
    assert frequency.sum() == pytest.approx(1) and np.allclose(follows.sum(1), 1)
    assert np.allclose(frequency @ follows, frequency)
    assert np.abs(counts.sum(1) / len(text) - frequency).max() < 0.005
    assert np.abs(counts / len(text) - frequency[:, None] * follows).max() < 0.002


def test_memory_saves_bits(talks):
    """A listener who forgets needs more bits for a phone, one who knows only word pairs most."""
    forgetful = TopicSpeech(chances=Chances(new_topic=0.75, agreement=0, reply=0))
    language, (frequency, follows) = talks.languages[0], word_pairs()
    bits = -(frequency[:, None] * follows * np.log2(np.maximum(follows, 1e-9))).sum()
    pairs = bits / (frequency * [len(word) for word in language.words]).sum()
    assert talks.entropy_per_phone() < forgetful.entropy_per_phone() < pairs


def test_a_config_names_its_corpus(tmp_path, monkeypatch):
    """Conversations have a cache of their own; that of the words is where it was."""
    words, conversations = (toy_source(Config(toy_grammar=name)) for name in ("words", "topics"))
    assert (words.name, words.contents, len(words.clips)) == ("toy-2x16-540x20s", "3 1", 540)
    assert (conversations.name, conversations.contents) == ("topics-2x36-180x60s", "3 1")
    wave = conversations.clips[3].read()[0].numpy()
    assert np.abs(wave - TopicSpeech().utterance(3).wave).max() < 1e-4
    long = toy_source(Config(toy_grammar="topics", ctx_seconds=60))
    assert long.name == "topics-2x36-135x80s"


def test_an_older_run_knows_no_grammar(small, mute):
    """Its config.json has no such field: it means words, and goes on."""
    config = small(steps=2)
    train(config)
    path = Path(config.out) / "config.json"
    facts = json.loads(path.read_text())
    assert facts.pop("toy_grammar") == "words"
    path.write_text(json.dumps(facts))
    train(small(steps=4))
    assert read_config(config.out).toy_grammar == "words"
    with pytest.raises(UserError, match="toy_grammar words -> topics"):
        train(small(steps=4, toy_grammar="topics"))


def test_the_plan_prints_the_grammar():
    assert command_line(Config(toy_grammar="topics")) == ["--size", "tiny", "--toy-grammar", "topics"]
    assert "--toy-grammar" not in command_line(Config())
    assert command_line(Config(compile=False)) == ["--size", "tiny", "--no-compile"]
