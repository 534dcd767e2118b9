"""topics: toy speech with a memory: topics, phrases that close as they opened, two speakers.

In `lab/toyspeech.py` a word depends on the word before it, so no utterance can be incoherent. Here
each language has 36 words, spoken by the same synthesiser, and an utterance is a conversation:

    phrase   opener (one of 4), 3 to 6 words of the topic with links (4) between them, closer, pause
    closer   belongs to the opener (agreement over about 3 s)
    topic    one of 4, with 6 words each; changes between two phrases with probability 1/20
    speaker  one of two; the other one speaks the next phrase with probability 1/2, which is a reply
    reply    its first topic word answers the last one before it, 8 times in 10: each of the 6
             places that a word has in a topic has its answer

    toy = TopicSpeech()             # version 1: 2 languages, 36 words each, 3 styles, seed 0
    talk = toy.utterance(7)         # 60 s; `phone`, `word`, `phrase`, `topic`, `speaker`, `turn`
    toy.utterance(7, sound=False)   # the same truth in milliseconds, without a sound

`python cdslm.py --toy-grammar topics` trains on it, and `lab/coherence.py` measures what remains.
"""
import functools
from dataclasses import dataclass

import numpy as np
import torch

from cdslm import CACHE_VERSION, Clip, Source
from lab.toyspeech import (
    HOP, RATE, STEP, STYLES, Language, ToySpeech, articulate, duration, intonate, vocalise)

VERSION = 1                # of the corpus: any change to the sound or the grammar must raise it
TOPICS, TOPIC_WORDS = 4, 6
PAIRS, LINKS = 4, 4        # openers with their closers; links
OPENER, CLOSER, LINK = 0, PAIRS, 2 * PAIRS        # number of the first word of each kind
CONTENT = 2 * PAIRS + LINKS                       # number of the first word of the first topic
WORDS = CONTENT + TOPICS * TOPIC_WORDS
LEAST, MOST = 3, 6         # topic words in a phrase
LINKED = 0.5               # chance of a link after a topic word
APART = 1 / 2              # octaves, at least, between the voices of two who talk


@dataclass(frozen=True)
class Chances:
    """What holds a conversation together. With one of them changed it is incoherent in one way."""
    new_topic: float = 1 / 20      # the next phrase has another topic
    agreement: float = 1.0         # the closer is the opener's own, and not drawn from all
    reply: float = 0.8             # a reply answers, and its first topic word is not drawn from all
    new_speaker: float = 0.5       # the next phrase is a reply
    same_voice: float = 1.0        # a reply is spoken by who spoke before, and not by a newcomer


@dataclass
class TopicLanguage(Language):
    """An invented language with topics. `follows` are its pairs of words: it knows the topic of a
    topic word, but nothing that lies further back."""
    answers: np.ndarray    # (6,): places of the words that answer the words in places 0 to 5


@dataclass
class Phrase:
    """One phrase of a conversation, as text."""
    words: list            # word numbers
    topic: int
    speaker: int           # 0 or 1; more where newcomers speak
    turn: int              # number of changes of the speaker before it


@dataclass
class Conversation:
    """Speech and its truth. Labels of words, phrases, topics, speakers and turns are -1 in a
    pause."""
    wave: np.ndarray       # (N,) float32 at 24 kHz
    phone: np.ndarray      # (N/300,) index into SYMBOLS
    word: np.ndarray       # (N/300,) index into the language's words
    phrase: np.ndarray     # (N/300,) number of the phrase
    topic: np.ndarray      # (N/300,) 0 to 3
    speaker: np.ndarray    # (N/300,) index into `speakers`
    turn: np.ndarray       # (N/300,) number of the turn: phrases in a row of one speaker
    f0: np.ndarray         # (N/300,) pitch in Hz, 0 where unvoiced
    language: int
    style: int             # index into STYLES
    speakers: list         # pitch (Hz), tract (formant scale), rate, breath of each


class TopicSpeech(ToySpeech):
    """The corpus. `utterance(i)` depends on the arguments below and on i alone."""
    name, version, seconds = "topics", VERSION, 60.0

    def __init__(self, languages=2, seed=0, chances=Chances()):
        super().__init__(languages, WORDS, seed)
        self.chances = chances

    @staticmethod
    def _invent(rng, count):
        """Draw a language: words as in `ToySpeech`, and the answers."""
        plain = ToySpeech._invent(rng, count)
        answers = rng.permutation(TOPIC_WORDS)
        return TopicLanguage(plain.inventory, plain.words, *word_pairs(), answers)

    def utterance(self, index, seconds=seconds, language=None, style=None, sound=True):
        """Conversation number `index`, of `seconds` in whole frames. Language and style are drawn
        unless they are given. Without `sound` its wave is empty, and all else is the same."""
        # The text has random numbers of its own, so that another word moves no other draw.
        key = VERSION, self.seed, 2, index
        rng, text = np.random.default_rng((*key, 1)), np.random.default_rng((*key, 2))
        drawn_language = int(rng.integers(len(self.languages)))
        drawn_style = int(rng.integers(len(STYLES)))
        language = drawn_language if language is None else language
        style = drawn_style if style is None else style
        pitch_range, tempo, energy = list(STYLES.values())[style]

        # Segments, then the segment of every step.
        steps = max(1, round(seconds * RATE / HOP)) * HOP // STEP
        speakers = [self.draw_speaker(text)]
        phrases = self.phrases(text, self.languages[language], speakers)
        segments = self._pronounce(rng, self.languages[language], phrases, steps, speakers, tempo)
        phones, words, phrase, topic, speaker, turn, lengths = segments       # (S,) each
        ends = np.minimum(np.cumsum(lengths), steps)
        which = np.searchsorted(ends, np.arange(steps), side="right")         # (steps,)

        # Sound, in which every step has the voice of its speaker.
        voices = {}
        for name in speakers[0]:
            values = np.float32([voice[name] for voice in speakers])
            voices[name] = values[speaker[which], None]                       # (steps, 1)
        tracks = articulate(phones, which, ends, lengths, voices)             # (steps, 7)
        f0 = intonate(rng, words[which], voices["pitch"][:, 0], pitch_range)  # (steps,)
        wave = np.zeros(0, np.float32)
        if sound:
            wave = vocalise(rng, tracks, f0, voices) * np.float32(energy)     # (N,)

        # Truth: a label per frame, that is for every second step.
        label = slice(0, None, HOP // STEP)
        phrase, topic, speaker, turn = np.where(words < 0, -1, [phrase, topic, speaker, turn])
        return Conversation(
            wave=wave,
            phone=phones[which][label].astype(np.uint8),
            word=words[which][label].astype(np.int16),
            phrase=phrase[which][label].astype(np.int16),
            topic=topic[which][label].astype(np.int16),
            speaker=speaker[which][label].astype(np.int16),
            turn=turn[which][label].astype(np.int16),
            f0=np.where(tracks[label, 3] > 0.1, f0[label], 0).astype(np.float32),
            language=language, style=style, speakers=speakers)

    def phrases(self, rng, language, speakers):
        """Yield the phrases of an endless conversation. `speakers` holds the first voice; the voice
        of the other one, and those of newcomers, are added to it."""
        chances, voices = self.chances, rng.spawn(1)[0]
        speakers.append(self.other_speaker(voices, speakers[0]))
        now, other, turn, is_reply, last = 0, 1, 0, False, 0
        topic = int(rng.integers(TOPICS))

        while True:
            # What is not used is drawn too, so that other chances leave the other draws alone.
            opener, any_closer = rng.integers(PAIRS, size=2)
            closer = opener if rng.random() < chances.agreement else any_closer
            places = rng.integers(TOPIC_WORDS, size=rng.integers(LEAST, MOST + 1))
            if (rng.random() < chances.reply) and is_reply:
                places[0] = language.answers[last]

            words = [OPENER + opener]
            for place in places:
                words.append(CONTENT + topic * TOPIC_WORDS + place)
                link = rng.integers(LINKS)
                if rng.random() < LINKED:
                    words.append(LINK + link)
            words.append(CLOSER + closer)
            yield Phrase([int(word) for word in words], topic, now, turn)

            last = places[-1]
            further = rng.integers(1, TOPICS)
            if rng.random() < chances.new_topic:
                topic = int(topic + further) % TOPICS
            is_reply = rng.random() < chances.new_speaker
            if is_reply:
                now, other, turn = other, now, turn + 1
                if voices.random() >= chances.same_voice:
                    speakers.append(self.other_speaker(voices, speakers[other]))
                    now = len(speakers) - 1

    def other_speaker(self, rng, speaker):
        """Draw a speaker whose pitch is at least `APART` from that of `speaker`, so that the two
        can be told apart."""
        while True:
            other = self.draw_speaker(rng)
            if abs(np.log2(other["pitch"] / speaker["pitch"])) >= APART:
                return other

    @staticmethod
    def _pronounce(rng, language, phrases, steps, speakers, tempo):
        """Phrases -> phone, word, phrase, topic, speaker, turn and length in steps of the segments
        that fill `steps`, (S,) each. A pause has the labels of the phrase before it, and the speech
        begins with a pause."""
        segments, filled = [], 0
        for number, phrase in enumerate(phrases):
            labels = number, phrase.topic, phrase.speaker, phrase.turn
            first = len(segments)
            if number == 0:
                segments.append((0, -1, *labels, int(rng.integers(8, 32))))
            rate = speakers[phrase.speaker]["rate"] * tempo
            for word in phrase.words:
                for phone in language.words[word]:
                    segments.append((phone, word, *labels, duration(rng, phone, rate)))
            segments.append((0, -1, *labels, int(rng.integers(24, 64))))
            filled += sum(segment[-1] for segment in segments[first:])
            if filled >= steps:
                return np.array(segments).T

    def entropy_per_phone(self, language=0):
        """Bits of grammar per phone, for a listener who remembers all that matters and hears who
        speaks."""
        chances, sizes = self.chances, [len(word) for word in self.languages[language].words]
        content = (LEAST + MOST) / 2                          # words of the topic in a phrase
        reply = chances.new_speaker * choice_bits(chances.reply, TOPIC_WORDS)
        reply += (1 - chances.new_speaker) * choice_bits(0, TOPIC_WORDS)
        bits = choice_bits(0, PAIRS) + choice_bits(chances.agreement, PAIRS)
        bits += choice_bits(1 - chances.new_topic * TOPICS / (TOPICS - 1), TOPICS)
        bits += choice_bits(0, MOST - LEAST + 1)
        bits += reply + (content - 1) * choice_bits(0, TOPIC_WORDS)
        bits += content * (choice_bits(0, 2) + LINKED * choice_bits(0, LINKS))

        phones = np.mean(sizes[OPENER:CLOSER]) + np.mean(sizes[CLOSER:LINK])
        phones += content * (np.mean(sizes[CONTENT:]) + LINKED * np.mean(sizes[LINK:CONTENT]))
        return bits / phones


def choice_bits(chance, count):
    """Entropy in bits of a choice among `count`: the expected one with this chance, else any of
    all."""
    odds = np.full(count, (1 - chance) / count)
    odds[0] += chance
    odds = odds[odds > 0]
    return -(odds * np.log2(odds)).sum()


def word_pairs():
    """(V,), (V, V): how frequent each word is, and P(next word | this word), pauses left out."""
    content = (LEAST + MOST) / 2
    ends = 1 / content                                        # chance that a topic word is the last
    openers, closers = slice(OPENER, CLOSER), slice(CLOSER, LINK)
    links, topics = slice(LINK, CONTENT), slice(CONTENT, WORDS)

    frequency = np.zeros(WORDS)
    frequency[openers] = frequency[closers] = 1 / PAIRS
    frequency[links] = content * LINKED / LINKS
    frequency[topics] = content / (WORDS - CONTENT)

    follows = np.zeros((WORDS, WORDS))
    follows[openers, topics] = 1 / (WORDS - CONTENT)
    follows[closers, openers] = 1 / PAIRS
    follows[links, topics] = (1 - ends) / (WORDS - CONTENT)
    follows[links, closers] = ends / PAIRS
    follows[topics, links] = LINKED / LINKS
    follows[topics, closers] = (1 - LINKED) * ends / PAIRS
    same = np.kron(np.eye(TOPICS), np.ones((TOPIC_WORDS, TOPIC_WORDS)))       # the same topic
    follows[topics, topics] = (1 - LINKED) * (1 - ends) * same / TOPIC_WORDS
    return frequency / frequency.sum(), follows


def toy_speech(config):
    """The corpus of invented languages that a Config describes."""
    if config.toy_grammar == "topics":
        return TopicSpeech(config.toy_languages, config.toy_seed)
    return ToySpeech(config.toy_languages, config.toy_words, config.toy_seed)


def toy_source(config):
    """The toy corpus as a Source for the cache: utterances of 20 s (conversations: 60 s), or longer
    where windows are, each by speakers of its own."""
    toy = toy_speech(config)
    words, seconds = len(toy.languages[0].words), toy.seconds
    while seconds < 1.25 * (config.ctx_seconds + config.gen_seconds):
        seconds += 10
    count = max(2, round(config.toy_hours * 3600 / seconds))

    def read(number):
        return [torch.from_numpy(toy.utterance(number, seconds).wave)]

    clips = [Clip(f"utterance {i}", seconds, functools.partial(read, i)) for i in range(count)]
    bits = [f"{toy.entropy_per_phone(i):.2f}" for i in range(config.toy_languages)]
    print(f"toy speech, version {toy.version}: {words} words per language, "
          f"{', '.join(bits)} bits per phone")
    name = f"{toy.name}-{config.toy_languages}x{words}-{count}x{seconds:.0f}s"
    if toy.seed:
        name += f"-{toy.seed}"
    return Source(name, f"{CACHE_VERSION} {toy.version}", clips, {})
