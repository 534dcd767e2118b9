"""toyspeech: invented languages, spoken by a small source-filter synthesiser, with labels.

Infants find words in a stream of syllables from transitional probabilities alone (Saffran, Aslin &
Newport, 1996). This corpus asks the same of a model: no text, few pauses between words, only sound.

Each *language* has its own consonants and vowels, drawn from the same 24 phonemes, so languages
overlap. Half of the time the next word is drawn with Zipf frequencies, the other half by a sharp
preference of the word before it. *Speakers* differ in pitch, vocal-tract length, rate and
breathiness, *styles* in pitch range, tempo and energy. The phoneme and the word of every frame are
known.

    toy = ToySpeech()               # version 1: 2 languages, 16 words each, 3 styles, seed 0
    utterance = toy.utterance(7)    # 20 s of speech; the same on every call
    utterance.wave                  # (480000,) float32 at 24 kHz
    utterance.phone                 # (1600,) phoneme numbers, 80 a second

Vowel formants are the means of Peterson & Barney (1952), and vocal tracts span their speakers (see
also Hillenbrand et al., 1995). Consonants and the source-filter synthesis follow Klatt (1980).
"""
from dataclasses import dataclass

import numpy as np

VERSION = 1                # of the corpus: any change to the sound or the grammar must raise it
RATE, HOP = 24_000, 300    # samples a second; samples per labelled frame (80 frames a second)
STEP, WINDOW = 150, 600    # the synthesiser's own frames: 6.25 ms apart, 25 ms long
BINS = np.fft.rfftfreq(WINDOW, 1 / RATE).astype(np.float32)
# The square root of a Hann window: squared, four overlapping windows sum to 1.
HANN = np.sqrt(np.hanning(WINDOW + 1)[:-1] / 2).astype(np.float32)

# Formants F1 to F3, centre and bandwidth of the noise are in Hz, the duration in ms.
PHONEME_TABLE = """
        kind       F1    F2    F3  voicing    noise  centre  bandwidth  duration
    i   vowel     270  2290  3010      1.0        0    3000       2000       110
    ɛ   vowel     530  1840  2480      1.0        0    3000       2000       110
    æ   vowel     660  1720  2410      1.0        0    3000       2000       120
    ɑ   vowel     730  1090  2440      1.0        0    3000       2000       120
    ɔ   vowel     570   840  2410      1.0        0    3000       2000       120
    u   vowel     300   870  2240      1.0        0    3000       2000       110
    ʌ   vowel     640  1190  2390      1.0        0    3000       2000       100
    ɝ   vowel     490  1350  1690      1.0        0    3000       2000       120
    p   stop      400  1100  2150        0      0.5     900       1200        85
    b   stop      200  1100  2150     0.25      0.3     900       1200        75
    t   stop      400  1600  2600        0      0.9    4800       2500        85
    d   stop      200  1600  2600     0.25      0.6    4800       2500        75
    k   stop      300  1990  2850        0      0.8    2200        900        90
    g   stop      200  1990  2850     0.25      0.5    2200        900        80
    s   noise     320  1390  2530        0      0.9    7000       2500        95
    z   noise     240  1390  2530     0.35      0.5    7000       2500        80
    ʃ   noise     300  1840  2750        0      1.0    3200       1600        95
    f   noise     340  1100  2080        0      0.3    5000       9000        90
    m   nasal     480  1270  2130      0.4        0    3000       2000        75
    n   nasal     480  1740  2470      0.4        0    3000       2000        75
    l   glide     310  1050  2880      0.6        0    3000       2000        70
    ɹ   glide     310  1060  1380      0.7        0    3000       2000        75
    w   glide     290   610  2150      0.7        0    3000       2000        75
    j   glide     260  2070  3020      0.7        0    3000       2000        75
"""
PHONEMES = {}                                     # {symbol: (kind, eight numbers)}
for line in PHONEME_TABLE.strip().splitlines()[1:]:
    symbol, kind, *numbers = line.split()
    PHONEMES[symbol] = kind, *map(float, numbers)
SYMBOLS = ["_", *PHONEMES]                        # phoneme number 0 is silence
SILENCE = (500, 1500, 2500, 0, 0, 3000, 2000, 0)
TARGETS = np.float32([SILENCE] + [row[1:] for row in PHONEMES.values()])      # (25, 8)
VOWELS = [i for i, s in enumerate(SYMBOLS) if i and PHONEMES[s][0] == "vowel"]
STOPS = [i for i, s in enumerate(SYMBOLS) if i and PHONEMES[s][0] == "stop"]
CONSONANTS = [i for i in range(1, len(SYMBOLS)) if i not in VOWELS]
STYLES = {                                        # pitch range, tempo, energy
    "neutral": (1.0, 1.0, 1.0),
    "lively": (2.0, 1.15, 1.3),
    "calm": (0.35, 0.87, 0.7),
}
PAUSE_EVERY = 6                                   # on average, a phrase ends after so many words


@dataclass
class Language:
    """An invented language."""
    inventory: list        # phoneme numbers
    words: list            # V tuples of phoneme numbers
    frequency: np.ndarray  # (V,)
    follows: np.ndarray    # (V, V): follows[a, b] = P(next word is b | this word is a)


@dataclass
class Utterance:
    """Speech and its truth."""
    wave: np.ndarray       # (N,) float32 at 24 kHz
    phone: np.ndarray      # (N/300,) index into SYMBOLS
    word: np.ndarray       # (N/300,) index into the language's words, -1 in a pause
    f0: np.ndarray         # (N/300,) pitch in Hz, 0 where unvoiced
    language: int
    style: int             # index into STYLES
    speaker: dict          # pitch (Hz), tract (formant scale), rate, breath


class ToySpeech:
    """The corpus. `utterance(i)` depends on the arguments below and on i alone, so any part can be
    made, in any order."""
    name, version, seconds = "toy", VERSION, 20.0

    def __init__(self, languages=2, words=16, seed=0):
        if languages < 1 or words < 2:
            raise ValueError("toy speech needs at least 1 language and 2 words")
        self.seed = seed
        self.languages = []
        for i in range(languages):
            rng = np.random.default_rng((VERSION, seed, i))
            self.languages.append(self._invent(rng, words))

    @staticmethod
    def _invent(rng, count):
        """Draw a language of `count` words."""
        vowels = rng.choice(VOWELS, 5, replace=False)
        consonants = rng.choice(CONSONANTS, 9, replace=False)

        # Words of one to three syllables. A short word always ends in a consonant, so that none has
        # only two phones.
        words = []
        while len(words) < count:
            syllables = rng.choice([1, 2, 3], p=[0.3, 0.5, 0.2])
            word = []
            for _ in range(syllables):
                word.append(int(rng.choice(consonants)))
                word.append(int(rng.choice(vowels)))
            if syllables == 1 or rng.random() < 0.25:
                word.append(int(rng.choice(consonants)))
            if tuple(word) not in words:
                words.append(tuple(word))

        # Word pairs: half Zipf, half a preference for two successors.
        frequency = 1 / np.arange(1, count + 1)
        frequency /= frequency.sum()
        preferred = np.zeros((count, count))
        for share in (0.75, 0.25):
            preferred[np.arange(count), rng.permutation(count)] += share
        follows = 0.5 * frequency + 0.5 * preferred
        inventory = sorted(map(int, [*vowels, *consonants]))
        return Language(inventory, words, frequency, follows)

    def utterance(self, index, seconds=seconds, language=None, style=None, speaker=None):
        """Utterance number `index`, of `seconds` in whole frames. Language, style and speaker are
        drawn unless they are given."""
        # All are drawn in any case, so that what is given does not change the other draws.
        rng = np.random.default_rng((VERSION, self.seed, 1, index))
        drawn_speaker = self.draw_speaker(rng)
        drawn_language = int(rng.integers(len(self.languages)))
        drawn_style = int(rng.integers(len(STYLES)))
        speaker = drawn_speaker if speaker is None else speaker
        language = drawn_language if language is None else language
        style = drawn_style if style is None else style
        pitch_range, tempo, energy = list(STYLES.values())[style]

        # Segments, then the segment of every step.
        steps = max(1, round(seconds * RATE / HOP)) * HOP // STEP
        phones, words, lengths = self._say(rng, self.languages[language], steps,
                                           speaker["rate"] * tempo)
        ends = np.minimum(np.cumsum(lengths), steps)
        which = np.searchsorted(ends, np.arange(steps), side="right")         # (steps,)

        # Sound.
        tracks = articulate(phones, which, ends, lengths, speaker)            # (steps, 7)
        f0 = intonate(rng, words[which], speaker["pitch"], pitch_range)       # (steps,)
        wave = vocalise(rng, tracks, f0, speaker) * energy                    # (N,)

        # Truth: a label per frame, that is for every second step.
        label = slice(0, None, HOP // STEP)
        voiced = tracks[label, 3] > 0.1
        return Utterance(
            wave=wave,
            phone=phones[which][label].astype(np.uint8),
            word=words[which][label].astype(np.int16),
            f0=np.where(voiced, f0[label], 0).astype(np.float32),
            language=language, style=style, speaker=speaker)

    @staticmethod
    def draw_speaker(rng):
        """Draw a speaker from continuous ranges. Higher voices have shorter vocal tracts, as in
        Peterson & Barney."""
        height = rng.random()
        return {
            "pitch": 90 * (250 / 90) ** height,
            "tract": 0.92 + 0.24 * height + rng.uniform(-0.04, 0.04),
            "rate": rng.uniform(0.9, 1.1),
            "breath": rng.uniform(0.02, 0.25),
        }

    @staticmethod
    def _say(rng, language, steps, rate):
        """Walk the chain of words until `steps` are filled -> phone, word and length in steps of
        each segment, (S,) each. The speech begins with a pause."""
        segments = [(0, -1, int(rng.integers(8, 32)))]
        chances = language.frequency
        filled = segments[0][2]
        while filled < steps:
            word = int(rng.choice(len(chances), p=chances))
            chances = language.follows[word]
            first = len(segments)
            for phone in language.words[word]:
                segments.append((phone, word, duration(rng, phone, rate)))
            if rng.random() < 1 / PAUSE_EVERY:
                segments.append((0, -1, int(rng.integers(24, 64))))
            filled += sum(length for _, _, length in segments[first:])
        return np.array(segments).T

    def entropy_per_phone(self, language=0):
        """Bits of grammar per phone: the entropy rate of the word chain over the mean word length,
        without pauses."""
        lang = self.languages[language]
        share = self.word_share(language)
        bits = -(share[:, None] * lang.follows * np.log2(lang.follows)).sum()
        return bits / (share * [len(word) for word in lang.words]).sum()

    def word_share(self, language=0):
        """Stationary word frequencies (V,) of the chain, by power iteration."""
        lang = self.languages[language]
        return lang.frequency @ np.linalg.matrix_power(lang.follows, 200)


# --------------------------------------------------------------------------------------------------
# The synthesiser: segments -> formants and pitch -> sound.

def duration(rng, phone, rate):
    """Draw how long a phone lasts, in steps, when it is spoken at `rate` (1: average)."""
    milliseconds = TARGETS[phone, 7] / rate * rng.uniform(0.85, 1.2)
    return max(4, round(milliseconds * RATE / 1000 / STEP))


def smooth(track, width):
    """Moving average of a track (S, ...) under a Hann window of `width` steps: articulators have
    mass."""
    kernel = np.hanning(width + 2)[1:-1]
    kernel = kernel / kernel.sum()
    padding = [(width // 2, width - 1 - width // 2)] + [(0, 0)] * (track.ndim - 1)
    padded = np.pad(track, padding, mode="edge")
    total = 0
    for i, weight in enumerate(kernel):
        total = total + weight * padded[i:i + len(track)]
    return total.astype(np.float32)


def articulate(phones, which, ends, lengths, speaker):
    """Segments -> smooth tracks (steps, 7): F1 F2 F3, voicing, noise level, centre, bandwidth."""
    step = np.arange(len(which))
    targets = TARGETS[phones[which], :7].copy()                               # (steps, 7)

    # A stop is a closure, then a burst in its last third. A voiced stop hums in the closure.
    stop = np.isin(phones[which], STOPS)
    burst = stop & (ends[which] - step <= np.maximum(4, lengths[which] // 3))
    targets[stop & ~burst, 4] = 0

    # In a pause the formants stay where they were.
    silent = phones[which] == 0
    if not silent.all():
        spoken = np.maximum.accumulate(np.where(silent, 0, step))
        targets[silent, :3] = targets[spoken[silent], :3]

    formants = smooth(targets[:, :3] * speaker["tract"], 9)
    levels = smooth(targets[:, 3:5], 3)
    noise = smooth(targets[:, 5:], 3)
    return np.concatenate([formants, levels, noise], axis=1)


def intonate(rng, words, pitch, pitch_range):
    """Pitch (steps,) in Hz: an accent on each word and a fall towards each pause, scaled by
    `pitch_range`, and some jitter."""
    change = np.flatnonzero(np.diff(words, prepend=-2))
    accent = np.where(words[change] < 0, -1.2, rng.uniform(-1, 1, len(change)))
    accents = np.repeat(accent, np.diff(change, append=len(words)))
    jitter = rng.standard_normal(len(words))
    return pitch * 2 ** (0.16 * pitch_range * smooth(accents, 25) + 0.004 * smooth(jitter, 5))


def pulse_train(f0):
    """Pitch (steps,) -> (N,) pulses of equal power at every pitch."""
    count = len(f0) * STEP
    pitch = np.interp(np.arange(count), np.arange(len(f0)) * STEP, f0)
    cycle = np.cumsum(pitch / RATE)
    at = np.flatnonzero(np.diff(np.floor(cycle), prepend=0) > 0)

    # A pulse falls between two samples: each gets its share.
    early = ((cycle[at] % 1) / (pitch[at] / RATE)).astype(np.float32)
    strength = np.sqrt(RATE / pitch[at]).astype(np.float32)
    pulses = np.zeros(count, np.float32)
    pulses[at] += strength * (1 - early)
    pulses[at - 1] += strength * early
    return pulses


def vocal_tract(tracks, tract):
    """Gain (steps, 301) of the vocal tract: three moving formants, three fixed ones, scaled by the
    length of the `tract`."""
    gain = np.ones((len(tracks), len(BINS)), np.float32)
    for formant, bandwidth in enumerate((70, 90, 140)):
        gain *= resonance(BINS, tracks[:, formant:formant + 1], np.float32(bandwidth))
    fixed = [3500 * tract, 4500 * tract, 5500 * tract]
    higher = np.prod([resonance(BINS, f, 0.06 * f) for f in fixed], axis=0).astype(np.float32)
    gain *= higher / (1 + (BINS / 900) ** 2) ** 0.25          # lips and glottis together fall off
    return gain


def vocalise(rng, tracks, f0, speaker):
    """Source and filter -> (N,) float32: pulses and noise, shaped step by step by the formants,
    then one inverse STFT."""
    pulses = pulse_train(f0)
    voice = vocal_tract(tracks, speaker["tract"])                             # (steps, 301)
    voice *= tracks[:, 3:4]

    # Hiss has its own peak.
    level, centre, bandwidth = tracks[:, 4:5], tracks[:, 5:6], tracks[:, 6:7]
    hiss = 0.35 * level / (1 + ((BINS - centre) / (0.5 * bandwidth)) ** 2)    # (steps, 301)

    noise = analyse(rng.standard_normal(len(pulses), dtype=np.float32))
    breath = speaker["breath"] * 0.3 * voice
    spectrum = analyse(pulses) * voice + noise * (breath + hiss)
    return 0.05 * synthesise(spectrum, len(pulses))


def resonance(frequency, formant, bandwidth):
    """|H| of one two-pole resonator with unit gain at 0 Hz (Klatt 1980, in its analogue form)."""
    squared = (formant ** 2 - frequency ** 2) ** 2 + (bandwidth * frequency) ** 2
    return formant ** 2 / np.sqrt(squared)


def analyse(wave):
    """STFT of (N,), N a multiple of 150 -> (N/150, 301) complex."""
    padded = np.pad(wave, (WINDOW // 2, WINDOW // 2 - STEP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::STEP]
    return np.fft.rfft(frames * HANN)


def synthesise(spectrum, count):
    """The inverse of `analyse`, except for the first and last 150 samples, by overlap-add ->
    (count,) float32."""
    parts = WINDOW // STEP
    frames = np.fft.irfft(spectrum, WINDOW) * HANN                            # (S, 600)
    frames = frames.reshape(len(spectrum), parts, STEP)
    out = np.zeros((len(spectrum) + parts, STEP), np.float32)
    for part in range(parts):
        out[part:part + len(spectrum)] += frames[:, part]
    return out.reshape(-1)[WINDOW // 2:WINDOW // 2 + count]
