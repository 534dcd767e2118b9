"""listener: recognises toy speech, whose truth is known: phones, words, language, speaker, style.

A small network, trained in about a minute on other invented languages, reads phones, speaker and
style from a log-mel; words and language follow from the phones. Compared with the truth they show
what a model keeps of its context (`toy_truth`) and, with `lab.decided`, when it is decided.
"""
import concurrent.futures
import inspect
import itertools
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from cdslm import FRAME_RATE, HOP, MELS, UserError, cache_root, fingerprint, load, log_mel, save
from lab import markov
from lab.markov import ngrams, words_in
from lab.toyspeech import STYLES, SYMBOLS, VERSION, VOWELS, ToySpeech

LEAD = 20                              # frames left out at the start of an utterance: silence
SHORTEST = 3                           # frames: anything shorter is no phone


# --------------------------------------------------------------------------------------------------
# The network, what it learns from, and its cache.

class Listener(nn.Module):
    """The toy recogniser: log-mel (B, T, 80) -> phone logits (B, T, 25), log2 of pitch / 150 Hz
    (B, T), voice (B, 4) as in `voice_truth`. It sees 0.2 s around a frame and learned from other
    languages than it will judge: it knows sounds, but no words to read into a mumble."""

    def __init__(self, width=96):
        super().__init__()
        self.enter = nn.Conv1d(MELS, width, 5, padding=2)
        self.fine = nn.Conv1d(MELS, width, 3, padding=1)
        self.middle = nn.ModuleList(
            nn.Conv1d(width, width, 5, padding=2 * d, dilation=d) for d in (1, 2))
        self.phone = nn.Linear(width, len(SYMBOLS))
        self.pitch = nn.Linear(width, 1)
        self.prosody = nn.Conv1d(width, width, 5, padding=4, dilation=2)
        self.voice = nn.Sequential(nn.Linear(2 * width + 2, 64), nn.GELU(), nn.Linear(64, 4))

    def forward(self, mel):
        # Phones.
        mel = (mel.mT + 6) / 3                                # (B, 80, T), of about unit variance
        x = F.gelu(self.enter(mel))                           # (B, width, T)
        for layer in self.middle:
            x = x + F.gelu(layer(x))
        phone = self.phone(x.mT)                              # (B, T, 25)

        # Pitch, with its mean and its log standard deviation over vowels, where it is plain.
        y = F.gelu(self.prosody(x + F.gelu(self.fine(mel))))  # (B, width, T)
        pitch = self.pitch(y.mT)[..., 0]                      # (B, T)
        vowel = phone.detach().softmax(2)[..., VOWELS].sum(2)
        vowel = F.normalize(vowel + 1e-3, p=1)
        mean = (pitch * vowel).sum(1, keepdim=True)
        variance = ((pitch - mean) ** 2 * vowel).sum(1, keepdim=True)
        spread = (variance + 1e-4).log() / 2

        summary = torch.cat([y.mean(2), y.std(2), mean, spread], dim=1)
        return phone, pitch, self.voice(summary)

    @torch.no_grad()
    def hear(self, mel):
        """Log-mel (B, T, 80) -> clips: B lists of phones; frames: phone numbers (B, T); voice
        (B, 4)."""
        frames, voices = [], []
        for part in mel.split(32):
            phone, _, voice = self(part.float().cpu())
            frames.append(phone.argmax(2))
            voices.append(voice)
        frames = torch.cat(frames).numpy()
        clips = [[SYMBOLS[phone] for phone, _, _ in spans(row)] for row in frames]
        return {"clips": clips, "frames": frames, "voice": torch.cat(voices).numpy()}


def runs_of(frames, numbers):
    """Frame numbers -> lists of those in a row that have the same phone."""
    return [list(run) for _, run in itertools.groupby(numbers, frames.__getitem__)]


def spans(frames):
    """Phone numbers (T,) -> [[phone, first frame, last frame + 1]], no pauses, nothing shorter than
    a phone."""
    lasting = []
    for run in runs_of(frames, range(len(frames))):
        if len(run) >= SHORTEST:
            lasting += run

    found = []
    for run in runs_of(frames, lasting):
        phone = int(frames[run[0]])
        if phone:
            found.append([phone, run[0], run[-1] + 1])
    return found


def batched(work, x, desc=None, size=8):
    """work(x) of x (B, ...), a few at a time: a small batch stays in memory that is warm."""
    parts = tqdm(x.split(size), desc=desc, unit="batch", leave=False, disable=not desc)
    return torch.cat([work(part) for part in parts])


def speak(toy, first, count, frames, desc, context=0):
    """`frames` frames from within each of `count` toy utterances, numbered from `first`: waves
    (count, N), and the truth of what follows the first `context` frames."""
    def utter(number):
        return toy.utterance(number, (frames + LEAD) / FRAME_RATE)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(utter, range(first, first + count))
        spoken = list(tqdm(jobs, total=count, desc=desc, unit="clip", leave=False))
    waves = np.stack([u.wave[LEAD * HOP:] for u in spoken])
    start = LEAD + context
    for u in spoken:
        u.phone = u.phone[start:]
        u.word = u.word[start:]
        u.f0 = u.f0[start:]
    return torch.from_numpy(waves), spoken


def voice_truth(spoken):
    """(B, 4), each of about unit variance: pitch and vocal tract of the speaker; pitch range and
    tempo of the style."""
    rows = []
    for u in spoken:
        pitch_range, tempo, _ = list(STYLES.values())[u.style]
        rows.append([
            2 * math.log2(u.speaker["pitch"] / 150),
            10 * (u.speaker["tract"] - 1.04),
            0.8 * math.log2(pitch_range),
            4 * math.log2(tempo * u.speaker["rate"])])
    return np.array(rows, np.float32)


def train_listener(clips=600, steps=600):
    """Train the toy recogniser on 40 minutes of invented speech, louder, softer and with noise."""
    torch.manual_seed(0)
    toy = ToySpeech(languages=8, words=40, seed=1)
    waves, spoken = speak(toy, 0, clips, 4 * FRAME_RATE, "toy recogniser: speech")
    mels = batched(log_mel, waves)
    voices = torch.from_numpy(voice_truth(spoken))
    phones = torch.from_numpy(np.stack([u.phone for u in spoken])).long()
    f0 = torch.from_numpy(np.stack([u.f0 for u in spoken]))
    log_pitch = (f0.clamp(min=50) / 150).log2()

    def uniform():
        return torch.rand(16, 1, 1)

    listener = Listener()
    optimizer = torch.optim.AdamW(listener.parameters(), lr=3e-3, weight_decay=0.01)
    for step in tqdm(range(steps), desc="toy recogniser: training", unit="step", leave=False):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)

        # Another loudness, another noise floor, and noise on every band.
        pick = torch.randint(clips, (16,))
        mel = mels[pick] + 2 * uniform() - 1
        mel = torch.logaddexp(mel, 4 * uniform() - 11)
        mel = mel + 0.3 * uniform() * torch.randn(mel.shape)

        phone, pitch, voice = listener(mel)
        pitch_error = (pitch - log_pitch[pick]) * (f0[pick] > 0)
        loss = F.cross_entropy(phone.mT, phones[pick]) + F.mse_loss(voice, voices[pick])
        loss = loss + 4 * (pitch_error ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return listener


def load_listener():
    """The toy recogniser; trained now, in about a minute, unless the cache holds what this very
    code trained before."""
    parts = Listener, voice_truth, train_listener
    code = fingerprint("".join(map(inspect.getsource, parts)))
    path = cache_root() / f"listener-{VERSION}-{code}.pt"
    listener = Listener()
    try:
        listener.load_state_dict(load(path)["listener"])
    except UserError:
        listener = train_listener()
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, listener=listener.state_dict())
    return listener.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# What of the truth is in generated speech: words, language, voice.

def guess_language(toy, clips):
    """The language whose phones make each clip likeliest (B,); -1 for an empty clip."""
    numbers = range(len(toy.languages))
    log_odds = np.full((len(numbers), len(SYMBOLS)), math.log(1e-3))
    for number in numbers:
        for (phone,), odds in ngrams(toy, 1, number).items():
            log_odds[number, phone] = math.log(odds + 1e-3)

    guesses = []
    for clip in clips:
        phones = [SYMBOLS.index(phone) for phone in clip]
        likelihood = log_odds[:, phones].sum(1)               # (languages,)
        guesses.append(int(likelihood.argmax()) if clip else -1)
    return np.array(guesses)


def language_kept(toy, clips, languages):
    """Share of clips in which words of the right language cover more phones than words of any
    other. Phones of the right language that make no word do not count."""
    kept = 0
    for clip, language in zip(clips, languages):
        covered = []
        for other in toy.languages:
            words = words_in(clip, other)
            covered.append(int((words >= 0).sum()))
        right = covered.pop(language)
        kept += right > max(covered, default=0)
    return kept / len(clips)


def nearness(voice, truth):
    """Share of the other clips' true voices that a recognised voice (B, D) is farther from than
    from its own truth (B, D), mean over clips: 1 for the very voice, 0.5 for any voice."""
    count = len(voice)
    apart = (voice[:, None] - truth[None]) ** 2               # (B, B, D)
    apart = apart.sum(2)                                      # (B, B)
    own = apart.diagonal()[:, None]
    return float((apart > own).sum() / max(1, count * (count - 1)))


def phone_errors(clip, truth):
    """Edit distance between two lists of phones (Levenshtein 1966)."""
    truth = np.array(truth)
    row = steps = np.arange(len(truth) + 1)
    for i, phone in enumerate(clip, 1):
        kept = np.minimum(row[1:] + 1, row[:-1] + (truth != phone))
        row = np.concatenate([[i], kept])
        row = np.minimum.accumulate(row - steps) + steps      # phones that the clip left out
    return int(row[-1])


def error_rate(clips, spoken):
    """Phone error rate: edit distance between recognised and true phones, over true phones."""
    errors = total = 0
    for clip, u in zip(clips, spoken):
        both = u.phone.astype(int) * 1000 + u.word            # changes where either does
        first = np.diff(both, prepend=-9999) != 0
        truth = [SYMBOLS[p] for p in u.phone[first & (u.phone > 0)]]
        errors += phone_errors(clip, truth)
        total += len(truth)
    return errors / total


def likeness(toy, recognised, spoken):
    """{measure: value} of what was recognised, set against the truth of `spoken`."""
    languages = [u.language for u in spoken]
    voice, truth = recognised["voice"], voice_truth(spoken)
    words = markov.score(toy, recognised["clips"], languages)
    return words | {
        "language_kept": language_kept(toy, recognised["clips"], languages),
        "speaker_kept": nearness(voice[:, :2], truth[:, :2]),
        "style_kept": nearness(voice[:, 2:], truth[:, 2:]),
    }


def toy_truth(toy, spoken, generated, true):
    """{measure: value, ceiling, floor, normalized = (value - floor) / (ceiling - floor)} of
    generated continuations, as the toy recogniser reads them. The ceiling is the true continuation.
    The floor is the true continuation of another context; for words and runs of words, text of a
    phone bigram babbler, for word pairs, words in free order."""
    value = likeness(toy, generated, spoken)
    ceiling = likeness(toy, true, spoken)

    # The floor: other contexts, and texts that know phone pairs or single words.
    shifts = range(1, max(2, min(9, len(spoken))))
    others = [likeness(toy, true, spoken[i:] + spoken[:i]) for i in shifts]
    floor = {name: float(np.mean([other[name] for other in others])) for name in value}
    languages = [u.language for u in spoken]
    lengths = [len(clip) for clip in true["clips"]]
    texts = markov.null_texts(toy, languages, lengths)
    bigram = markov.score(toy, texts["bigram"], languages)
    free = markov.score(toy, texts[markov.FREE_ORDER], languages)
    floor |= bigram | {"pair_bits": free["pair_bits"]}

    rows = {}
    for name, v in value.items():
        c, f = ceiling[name], floor[name]
        normalized = (v - f) / (c - f) if c != f else math.nan
        rows[name] = {"value": v, "ceiling": c, "floor": f, "normalized": normalized}
    return rows
