"""pair_speech: makes the pairs of toy utterances that `lab/pairs.py` asks a model about.

Both utterances of a pair have the same number, hence the same speaker, style, melody and noise, and
where one has another phone than the other, both last as long as both do on average.
"""
import concurrent.futures
import functools
import os
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from cdslm import FRAME_RATE, HOP, RATE, UserError
from lab.listener import LEAD
from lab.markov import ngrams, pick, words_in
from lab.toyspeech import CONSONANTS, PAUSE_EVERY, STEP, STYLES, SYMBOLS, TARGETS, ToySpeech

KINDS = "word", "place", "order", "language", "speaker", "style"
SWAPPED = "place", "language", "speaker", "style"     # kinds of which every two pairs are swapped
FIRST = 3_000_000                      # its utterances; training and eval_pjsd.py stay below
STEP_RATE = RATE // STEP               # steps of the synthesiser in a second
PAUSE = -1, (0,)                       # a word is its number and its phones
PAUSE_SECONDS = 0.275
START = 0.25                           # share of the continuation that lies before the change
MARGIN = 1.1                           # durations are random


class Pair(NamedTuple):
    """Two utterances (N,) at 24 kHz, not always equally long, of which the first is right."""
    true: torch.Tensor
    false: torch.Tensor
    shared: int | None = None          # frames that both begin with; None: as many as are alike
    case: object = None                # pairs of the same case are not independent


class Scripted(ToySpeech):
    """Toy speech whose phones and durations are given. All else is drawn, the same for utterances
    of the same number."""

    def __init__(self, toy, segments):
        self.seed, self.languages, self.segments = toy.seed, toy.languages, segments

    def _say(self, rng, language, steps, rate):
        return np.array(self.segments).T


class Voice:
    """The language, speaker and style of one utterance, and the random numbers for its text."""

    def __init__(self, toy, number):
        self.toy, self.number = toy, number
        self.rng = np.random.default_rng((toy.seed, number))
        self.speaker = toy.draw_speaker(self.rng)
        self.language_number = int(self.rng.integers(len(toy.languages)))
        self.language = toy.languages[self.language_number]
        self.style = int(self.rng.integers(len(STYLES)))
        _, style_tempo, _ = list(STYLES.values())[self.style]
        self.tempo = self.speaker["rate"] * style_tempo

    def seconds(self, word):
        """How long a word or pause lasts."""
        if word == PAUSE:
            return PAUSE_SECONDS
        _, phones = word
        return sum(TARGETS[phone, 7] for phone in phones) / 1000 / self.tempo

    def write(self, seconds, before=None):
        """A script, words and pauses of the grammar, of at least so many seconds, for what follows
        the word `before`."""
        odds = self.language.frequency
        if before is not None:
            odds = self.language.follows[before]
        script = []
        while seconds > 0:
            number = pick(self.rng, np.cumsum(odds))
            odds = self.language.follows[number]
            word = number, self.language.words[number]
            script.append(word)
            seconds -= self.seconds(word)
            if self.rng.random() < 1 / PAUSE_EVERY:
                script.append(PAUSE)
                seconds -= PAUSE_SECONDS
        return script

    def start(self, n, m, words):
        """A script that reaches into the continuation, so that `words` after it lie within as well.
        None if none was found."""
        for _ in range(100):
            script = self.write((n + LEAD + START * m) / FRAME_RATE)
            length = sum(map(self.seconds, script + words))
            if MARGIN * length < (n + m) / FRAME_RATE:
                return script
        return None

    def segments(self, script, other):
        """[(phone, word, steps)] of a script, with the durations that it shares with `other`. Words
        bear their place as their number, so that the melody has an accent on each."""
        rng = np.random.default_rng((self.toy.seed, self.number, 1))
        rows = [(0, -1, LEAD)]
        for place, ((word, phones), (_, others)) in enumerate(zip(script, other)):
            for phone, another in zip(phones, others):
                mean = (TARGETS[phone, 7] + TARGETS[another, 7]) / 2000
                seconds = mean / self.tempo * rng.uniform(0.85, 1.2)
                if phone == 0:
                    seconds = PAUSE_SECONDS
                steps = max(4, round(seconds * STEP_RATE))
                rows.append((phone, -1 if word == -1 else place, steps))
        return [*rows, (0, -1, 6 * STEP_RATE)]

    def speak(self, script, other, frames, spare=0):
        """A script -> wave of `frames` frames, without the silent start. With `spare` seconds the
        end of the script is spoken too, and cut off: how many random numbers the melody takes, and
        so all noise, depends on how many words are spoken."""
        scripted = Scripted(self.toy, self.segments(script, other))
        seconds = (frames + LEAD) / FRAME_RATE + spare
        spoken = scripted.utterance(
            self.number, seconds, self.language_number, self.style, self.speaker)
        return spoken.wave[LEAD * HOP:(LEAD + frames) * HOP]

    def pair(self, true, false, frames):
        """Waves of two scripts."""
        return self.speak(true, false, frames), self.speak(false, true, frames)


# --------------------------------------------------------------------------------------------------
# One pair, or two swapped ones, of each kind: [(true wave, false wave), ...] of n frames of context
# and m of continuation. Where a language has no such pair the list is empty.

@functools.lru_cache(maxsize=1024)
def non_words(toy, number, word):
    """All phone sequences that are not covered by words, with vowels and consonants where `word`
    has them, of attested phone pairs, and that begin and end as words do."""
    language = toy.languages[number]
    attested = {}
    for first, second in ngrams(toy, 2, number):
        attested.setdefault(first, []).append(second)

    is_consonant = [phone in CONSONANTS for phone in word]
    starts = sorted({other[0] for other in language.words})
    ends = {other[-1] for other in language.words}
    found = [(phone,) for phone in starts if (phone in CONSONANTS) == is_consonant[0]]
    for kind in is_consonant[1:]:
        longer = []
        for phones in found:
            longer += [phones + (p,) for p in attested[phones[-1]] if (p in CONSONANTS) == kind]
        found = longer

    def is_word(phones):
        symbols = [SYMBOLS[phone] for phone in phones]
        return (words_in(symbols, language) >= 0).all()
    return [phones for phones in found if phones[-1] in ends and not is_word(phones)]


def word_pairs(toy, number, n, m):
    """A word of the grammar's text, or a non-word in its place."""
    voice = Voice(toy, number)
    rest = voice.write(m / FRAME_RATE)
    word, phones = rest[0]
    choices = non_words(toy, voice.language_number, phones)
    start = voice.start(n, m, rest[:1])
    if not choices or start is None:
        return []
    foil = [(word, choices[voice.rng.integers(len(choices))])] + rest[1:]
    return [voice.pair(start + rest, start + foil, n + m)]


def place_pairs(toy, number, n, m):
    """Two rare words of one length, each after the word that prefers it and after the other's."""
    voice = Voice(toy, number)
    words, follows = voice.language.words, voice.language.follows
    preference = follows - 0.5 * voice.language.frequency     # half of `follows` is sharp
    preferred_by = preference.argmax(0)                       # (V,): the word before each word
    rare = range(len(words) // 3, len(words))
    choices = [(a, b) for a in rare for b in rare
               if a < b and len(words[a]) == len(words[b]) and preferred_by[a] != preferred_by[b]]
    if not choices:
        return []

    pairs = []
    a, b = choices[voice.rng.integers(len(choices))]
    for right, wrong in ((a, b), (b, a)):
        before = int(preferred_by[right])
        place = [(before, words[before]), (right, words[right])]
        start = voice.start(n, m, place)
        if start is None:
            return []
        rest = voice.write(m / FRAME_RATE, before=right)
        true = start + place + rest
        foil = start + [place[0], (wrong, words[wrong])] + rest
        pairs.append(voice.pair(true, foil, n + m))
    return pairs


def order_pairs(toy, number, n, m):
    """Words in the grammar's order, or the same words shuffled; pauses stay."""
    voice = Voice(toy, number)
    start = voice.write((n + LEAD) / FRAME_RATE)
    rest = voice.write(m / FRAME_RATE)
    places = [i for i, word in enumerate(rest) if word != PAUSE]
    if len({rest[i] for i in places}) == 1:
        return []
    foil = list(rest)
    while foil == rest:
        for place, source in zip(places, voice.rng.permutation(places)):
            foil[place] = rest[source]
    true, foil = start + rest, start + foil
    return [tuple(voice.speak(script, script, n + m, spare=4) for script in (true, foil))]


def context_pairs(toy, number, n, m, kind):
    """Two contexts and two continuations, of two languages, speakers or styles."""
    rng = np.random.default_rng((toy.seed, number))
    sides = {"language": rng.permutation(len(toy.languages)).tolist(),
             "style": rng.permutation(len(STYLES)).tolist(),
             "speaker": [toy.draw_speaker(rng), toy.draw_speaker(rng)]}

    def utter(side, part, frames):
        """What is not asked about is the same on both sides."""
        given = {name: values[side if name == kind else 0] for name, values in sides.items()}
        index = FIRST + 4 * (number - FIRST) + 2 * side + part
        return toy.utterance(index, (frames + LEAD) / FRAME_RATE, **given).wave[LEAD * HOP:]

    first, second = utter(0, 0, n), utter(1, 0, n)
    continuations = utter(0, 1, m), utter(1, 1, m)
    join = np.concatenate
    return [tuple(join([first, wave]) for wave in continuations),
            tuple(join([second, wave]) for wave in continuations[::-1])]


def make_pairs(toy, kind, count, n, m):
    """About `count` pairs of a kind: n frames of context, m of continuation."""
    makers = {"word": word_pairs, "place": place_pairs, "order": order_pairs}
    maker = makers.get(kind) or functools.partial(context_pairs, kind=kind)
    groups = (count + 1) // 2 if kind in SWAPPED else count
    numbers = range(FIRST, FIRST + groups)
    pairs = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda number: maker(toy, number, n, m), numbers)
        for number, group in zip(numbers, tqdm(made, f"{kind}: speech", groups, leave=False)):
            for true, false in group:
                pairs.append(Pair(torch.from_numpy(true), torch.from_numpy(false), n, number))
    if not pairs:
        raise UserError(f"these languages have no pairs of kind {kind}")
    return pairs
