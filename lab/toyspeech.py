"""Toy speech: invented languages, spoken by a small source-filter synthesiser. Everything in it is known.

Infants find words in a stream of syllables from transitional probabilities alone (Saffran, Aslin & Newport, 1996). This
corpus asks the same of a model: no text, few pauses between words, only sound. Each *language* has its own consonants
and vowels (drawn from the same 24 phonemes, so they overlap), a lexicon with Zipf frequencies, and word pairs of which
half follow Zipf and half a sharp preference. *Speakers* differ in pitch, vocal-tract length, rate and breathiness,
*styles* in pitch range, tempo and energy. Every frame knows its phoneme and word, every utterance the rest.

    toy = ToySpeech()                       # version 1 of the corpus: 2 languages, 16 words each, 3 styles, seed 0
    utterance = toy.utterance(7)            # 20 s of speech; the same on every call
    utterance.wave, utterance.phone         # (480000,) float32 at 24 kHz; (1600,) phoneme numbers, 80 a second

Vowel formants are Peterson & Barney's averages (1952), and vocal tracts span their speakers (see also Hillenbrand et
al., 1995); consonants and the source-filter recipe follow Klatt (1980).
"""
from dataclasses import dataclass

import numpy as np

VERSION = 1                # of the corpus: any change to the sound or to the grammar below must raise it
RATE, HOP = 24_000, 300    # samples per second; samples per labelled frame (80 frames/s, the paper's)
STEP, WINDOW = 150, 600    # the synthesiser's own frames: 6.25 ms apart, 25 ms long
BINS = np.fft.rfftfreq(WINDOW, 1 / RATE).astype(np.float32)
HANN = np.sqrt(np.hanning(WINDOW + 1)[:-1] / 2).astype(np.float32)  # squared, four overlapping windows sum to 1

# symbol: kind, formants F1 F2 F3 (Hz), voicing, noise level, noise centre (Hz), noise bandwidth (Hz), duration (ms)
PHONEMES = {
    "i": ("vowel", 270, 2290, 3010, 1.0, 0, 3000, 2000, 110), "ɛ": ("vowel", 530, 1840, 2480, 1.0, 0, 3000, 2000, 110),
    "æ": ("vowel", 660, 1720, 2410, 1.0, 0, 3000, 2000, 120), "ɑ": ("vowel", 730, 1090, 2440, 1.0, 0, 3000, 2000, 120),
    "ɔ": ("vowel", 570, 840, 2410, 1.0, 0, 3000, 2000, 120), "u": ("vowel", 300, 870, 2240, 1.0, 0, 3000, 2000, 110),
    "ʌ": ("vowel", 640, 1190, 2390, 1.0, 0, 3000, 2000, 100), "ɝ": ("vowel", 490, 1350, 1690, 1.0, 0, 3000, 2000, 120),
    "p": ("stop", 400, 1100, 2150, 0, 0.5, 900, 1200, 85), "b": ("stop", 200, 1100, 2150, 0.25, 0.3, 900, 1200, 75),
    "t": ("stop", 400, 1600, 2600, 0, 0.9, 4800, 2500, 85), "d": ("stop", 200, 1600, 2600, 0.25, 0.6, 4800, 2500, 75),
    "k": ("stop", 300, 1990, 2850, 0, 0.8, 2200, 900, 90), "g": ("stop", 200, 1990, 2850, 0.25, 0.5, 2200, 900, 80),
    "s": ("noise", 320, 1390, 2530, 0, 0.9, 7000, 2500, 95), "z": ("noise", 240, 1390, 2530, 0.35, 0.5, 7000, 2500, 80),
    "ʃ": ("noise", 300, 1840, 2750, 0, 1.0, 3200, 1600, 95), "f": ("noise", 340, 1100, 2080, 0, 0.3, 5000, 9000, 90),
    "m": ("nasal", 480, 1270, 2130, 0.4, 0, 3000, 2000, 75), "n": ("nasal", 480, 1740, 2470, 0.4, 0, 3000, 2000, 75),
    "l": ("glide", 310, 1050, 2880, 0.6, 0, 3000, 2000, 70), "ɹ": ("glide", 310, 1060, 1380, 0.7, 0, 3000, 2000, 75),
    "w": ("glide", 290, 610, 2150, 0.7, 0, 3000, 2000, 75), "j": ("glide", 260, 2070, 3020, 0.7, 0, 3000, 2000, 75),
}
SYMBOLS = ["_", *PHONEMES]  # phoneme numbers in the truth: 0 is silence
VOWELS = [i for i, s in enumerate(SYMBOLS) if i and PHONEMES[s][0] == "vowel"]
CONSONANTS = [i for i in range(1, len(SYMBOLS)) if i not in VOWELS]
STOPS = [i for i, s in enumerate(SYMBOLS) if i and PHONEMES[s][0] == "stop"]
TARGETS = np.float32([(500, 1500, 2500, 0, 0, 3000, 2000, 0)] + [row[1:] for row in PHONEMES.values()])  # (25, 8)
STYLES = {"neutral": (1.0, 1.0, 1.0), "lively": (2.0, 1.15, 1.3), "calm": (0.35, 0.87, 0.7)}  # range, tempo, energy
PAUSE_EVERY = 6            # a phrase ends after any word with probability 1 in so many


@dataclass
class Language:
    """An invented language."""
    inventory: list        # phoneme numbers
    words: list            # tuples of them, V words
    frequency: np.ndarray  # (V,)
    follows: np.ndarray    # (V, V): follows[a, b] = P(next word is b | this word is a)


@dataclass
class Utterance:
    """Speech and its truth."""
    wave: np.ndarray       # (N,) float32 at 24 kHz
    phone: np.ndarray      # (N/300,) index into SYMBOLS
    word: np.ndarray       # (N/300,) index into the language's words, -1 in a pause
    f0: np.ndarray         # (N/300,) Hz, 0 where unvoiced
    language: int
    style: int             # index into STYLES
    speaker: dict          # pitch (Hz), tract (formant scale), rate, breath


class ToySpeech:
    """The corpus. `utterance(i)` depends on the arguments here and on i alone: any part can be made, in any order."""

    def __init__(self, languages=2, words=16, seed=0):
        if languages < 1 or words < 2:
            raise ValueError("toy speech needs at least 1 language and 2 words")
        self.seed = seed
        self.languages = [self._invent(np.random.default_rng((VERSION, seed, i)), words) for i in range(languages)]

    @staticmethod
    def _invent(rng, count):
        vowels, consonants = rng.choice(VOWELS, 5, replace=False), rng.choice(CONSONANTS, 9, replace=False)
        words = []
        while len(words) < count:
            syllables = rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2])
            word = [int(rng.choice(kind)) for _ in range(syllables) for kind in (consonants, vowels)]
            if syllables == 1 or rng.random() < 0.25:  # short words are closed, so that none is only two phones long
                word.append(int(rng.choice(consonants)))
            if tuple(word) not in words:
                words.append(tuple(word))
        frequency = 1 / np.arange(1, count + 1)
        frequency /= frequency.sum()
        preferred = np.zeros((count, count))
        for share in (0.75, 0.25):
            preferred[np.arange(count), rng.permutation(count)] += share
        return Language(sorted(map(int, [*vowels, *consonants])), words, frequency, 0.5 * frequency + 0.5 * preferred)

    def utterance(self, index, seconds=20.0, language=None, style=None, speaker=None):
        """Speak utterance number `index`, drawing what is not given -> Utterance of `seconds`, in whole frames."""
        rng = np.random.default_rng((VERSION, self.seed, 1, index))
        drawn = self.draw_speaker(rng), int(rng.integers(len(self.languages))), int(rng.integers(len(STYLES)))
        speaker, language, style = (d if g is None else g for d, g in zip(drawn, (speaker, language, style)))
        spread, tempo, energy = list(STYLES.values())[style]
        steps = max(1, round(seconds * RATE / HOP)) * HOP // STEP
        phones, words, lengths = self._say(rng, self.languages[language], steps, speaker["rate"] * tempo)
        ends = np.minimum(np.cumsum(lengths), steps)
        which = np.searchsorted(ends, np.arange(steps), side="right")  # (steps,) segment under each step
        tracks = articulate(phones, which, ends, lengths, speaker)
        f0 = intonate(rng, words[which], speaker["pitch"], spread)
        wave = vocalise(rng, tracks, f0, speaker) * energy
        label = slice(0, None, HOP // STEP)
        return Utterance(wave, phones[which][label].astype(np.uint8), words[which][label].astype(np.int16),
                         np.where(tracks[label, 3] > 0.1, f0[label], 0).astype(np.float32), language, style, speaker)

    @staticmethod
    def draw_speaker(rng):
        """Draw a speaker from continuous ranges; higher voices have shorter tracts, as in Peterson & Barney."""
        height = rng.random()
        return {"pitch": 90 * (250 / 90) ** height, "tract": 0.92 + 0.24 * height + rng.uniform(-0.04, 0.04),
                "rate": rng.uniform(0.9, 1.1), "breath": rng.uniform(0.02, 0.25)}

    @staticmethod
    def _say(rng, language, steps, rate):
        """Walk the word chain until `steps` are filled: phone, word and length (in steps) of each segment, (S,)."""
        segments, odds, before = [(0, -1, int(rng.integers(8, 32)))], language.frequency, 0
        while (steps := steps - sum(length for *_, length in segments[before:])) > 0:
            before = len(segments)
            word = int(rng.choice(len(odds), p=odds))
            odds = language.follows[word]
            for phone in language.words[word]:
                milliseconds = TARGETS[phone, 7] / rate * rng.uniform(0.85, 1.2)
                segments.append((phone, word, max(4, round(milliseconds * RATE / 1000 / STEP))))
            if rng.random() < 1 / PAUSE_EVERY:
                segments.append((0, -1, int(rng.integers(24, 64))))
        return np.array(segments).T

    def entropy_per_phone(self, language=0):
        """Bits of grammar per phone: the entropy rate of the word chain over the mean word length, pauses left out."""
        lang = self.languages[language]
        share = self.word_share(language)
        bits = -(share[:, None] * lang.follows * np.log2(lang.follows)).sum()
        return bits / (share * [len(word) for word in lang.words]).sum()

    def word_share(self, language=0):
        """Stationary word frequencies (V,) of the chain, by power iteration."""
        lang = self.languages[language]
        return lang.frequency @ np.linalg.matrix_power(lang.follows, 200)


def smooth(track, width):
    """Moving average of a track (S, ...) under a Hann window of `width` steps: articulators have mass."""
    kernel = np.hanning(width + 2)[1:-1]
    padded = np.pad(track, [(width // 2, width - 1 - width // 2)] + [(0, 0)] * (track.ndim - 1), mode="edge")
    return sum(weight * padded[i:i + len(track)] for i, weight in enumerate(kernel / kernel.sum())).astype(np.float32)


def articulate(phones, which, ends, lengths, speaker):
    """Segments to smooth tracks (steps, 7): F1 F2 F3, voicing, noise level, noise centre, noise bandwidth."""
    targets = TARGETS[phones[which], :7].copy()
    stop = np.isin(phones[which], STOPS)
    burst = stop & (ends[which] - np.arange(len(which)) <= np.maximum(4, lengths[which] // 3))  # before its end
    targets[stop & ~burst, 4] = 0                       # a closure, then a burst; voiced stops hum in the closure
    silent = phones[which] == 0
    if not silent.all():                                # in a pause the tongue waits where it was
        spoken = np.maximum.accumulate(np.where(silent, 0, np.arange(len(which))))
        targets[silent, :3] = targets[spoken[silent], :3]
    return np.concatenate([smooth(targets[:, :3] * speaker["tract"], 9), smooth(targets[:, 3:5], 3),
                           smooth(targets[:, 5:], 3)], axis=1)


def intonate(rng, words, pitch, spread):
    """The melody (steps,) in Hz: an accent on each word and a fall towards each pause, scaled by `spread`."""
    change = np.flatnonzero(np.diff(words, prepend=-2))
    accent = np.where(words[change] < 0, -1.2, rng.uniform(-1, 1, len(change)))
    runs = np.repeat(accent, np.diff(change, append=len(words)))
    return pitch * 2 ** (0.16 * spread * smooth(runs, 25) + 0.004 * smooth(rng.standard_normal(len(words)), 5))


def vocalise(rng, tracks, f0, speaker):
    """Source and filter -> (N,) float32: pulses and noise, shaped step by step by the formants; one inverse STFT."""
    count = len(f0) * STEP
    pitch = np.interp(np.arange(count), np.arange(len(f0)) * STEP, f0)
    cycle = np.cumsum(pitch / RATE)
    at = np.flatnonzero(np.diff(np.floor(cycle), prepend=0) > 0)
    early = ((cycle[at] % 1) / (pitch[at] / RATE)).astype(np.float32)  # a pulse falls between two samples
    pulses = np.zeros(count, np.float32)
    strength = np.sqrt(RATE / pitch[at]).astype(np.float32)  # equal power at every pitch
    pulses[at] += strength * (1 - early)
    pulses[at - 1] += strength * early
    voice = np.ones((len(f0), len(BINS)), np.float32)
    tract = [3500 * speaker["tract"], 4500 * speaker["tract"], 5500 * speaker["tract"]]
    fixed = np.prod([resonance(BINS, f, 0.06 * f) for f in tract], axis=0).astype(np.float32)
    for formant, bandwidth in enumerate((70, 90, 140)):
        voice *= resonance(BINS, tracks[:, formant:formant + 1], np.float32(bandwidth))
    voice *= fixed / (1 + (BINS / 900) ** 2) ** 0.25  # lips and glottis together fall off a little
    voice *= tracks[:, 3:4]
    hiss = 0.35 * tracks[:, 4:5] / (1 + ((BINS - tracks[:, 5:6]) / (0.5 * tracks[:, 6:7])) ** 2)
    noise = analyse(rng.standard_normal(count, dtype=np.float32))
    spectrum = analyse(pulses) * voice + noise * (speaker["breath"] * 0.3 * voice + hiss)
    return 0.05 * synthesise(spectrum, count)


def resonance(frequency, formant, bandwidth):
    """|H| of one two-pole resonator with unit gain at 0 Hz; broadcasts (Klatt 1980, in its analogue form)."""
    return formant ** 2 / np.sqrt((formant ** 2 - frequency ** 2) ** 2 + (bandwidth * frequency) ** 2)


def analyse(wave):
    """STFT of (N,), N a multiple of 150 -> (N/150, 301) complex."""
    padded = np.pad(wave, (WINDOW // 2, WINDOW // 2 - STEP))
    return np.fft.rfft(np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::STEP] * HANN)


def synthesise(spectrum, count):
    """Inverse of `analyse`, but for the first and last 150 samples, by overlap-add -> (count,) float32."""
    frames = (np.fft.irfft(spectrum, WINDOW) * HANN).reshape(len(spectrum), WINDOW // STEP, STEP)
    out = np.zeros((len(spectrum) + WINDOW // STEP, STEP), np.float32)
    for part in range(WINDOW // STEP):
        out[part:part + len(spectrum)] += frames[:, part]
    return out.reshape(-1)[WINDOW // 2:WINDOW // 2 + count]
