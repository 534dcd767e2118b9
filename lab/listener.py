"""listener: hears toy speech, of which everything is known: phones, words, language, speaker and style.

A small network, trained in about a minute on other invented languages, reads phones, speaker and style from a log-mel;
words and language follow from the phones. Set against the truth they measure what the paper could only play: what a
model goes on with and what it forgets (`toy_truth`), and at which noise level that is decided (`decided`).
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

from cdslm import load, save
from cdslm import FRAME_RATE, HOP, MELS, UserError, cache_root, fingerprint, keyed_noise, log_mel, replacing
from lab.toyspeech import STYLES, SYMBOLS, VERSION, VOWELS, ToySpeech

LEAD = 20                              # frames left out at the start of an utterance, which is silent


# ----------------------------------------------------------------------------------------------------------------------
# The network, what it learns from, and its cache.

class Listener(nn.Module):
    """The toy recogniser: log-mel (B, T, 80) -> phone logits (B, T, 25), log2 of pitch / 150 Hz (B, T), voice (B, 4) as
    in `voice_truth`. It hears 0.2 s around a frame, and learned from other languages than it will judge: it knows
    sounds, but has no words to read into a mumble."""

    def __init__(self, width=96):
        super().__init__()
        self.enter, self.fine = nn.Conv1d(MELS, width, 5, padding=2), nn.Conv1d(MELS, width, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2 * d, dilation=d) for d in (1, 2))
        self.phone, self.pitch = nn.Linear(width, len(SYMBOLS)), nn.Linear(width, 1)
        self.prosody = nn.Conv1d(width, width, 5, padding=4, dilation=2)
        self.voice = nn.Sequential(nn.Linear(2 * width + 2, 64), nn.GELU(), nn.Linear(64, 4))

    def forward(self, mel):
        mel = (mel.mT + 6) / 3                                                # (B, 80, T), of about unit variance
        x = F.gelu(self.enter(mel))
        for layer in self.middle:
            x = x + F.gelu(layer(x))
        phone, y = self.phone(x.mT), F.gelu(self.prosody(x + F.gelu(self.fine(mel))))
        pitch = self.pitch(y.mT)[..., 0]
        vowel = F.normalize(phone.detach().softmax(2)[..., VOWELS].sum(2) + 1e-3, p=1)  # (B, T): where pitch is plain
        mean = (pitch * vowel).sum(1, keepdim=True)
        spread = (((pitch - mean) ** 2 * vowel).sum(1, keepdim=True) + 1e-4).log() / 2
        return phone, pitch, self.voice(torch.cat([y.mean(2), y.std(2), mean, spread], dim=1))

    @torch.no_grad()
    def hear(self, mel):
        """Log-mel (B, T, 80) -> clips: B lists of phones; frames: phone numbers (B, T); voice (B, 4)."""
        parts = [self(part.float().cpu()) for part in mel.split(32)]
        frames, voice = (torch.cat(x).numpy() for x in zip(*[(phone.argmax(2), voice) for phone, _, voice in parts]))
        return {"clips": [[SYMBOLS[p] for p, _, _ in spans(row)] for row in frames], "frames": frames, "voice": voice}


def spans(frames, shortest=3):
    """Phone numbers (T,) -> [[phone, first frame, last frame + 1]], no pauses, nothing shorter than a phone."""
    runs = [list(run) for _, run in itertools.groupby(range(len(frames)), frames.__getitem__)]
    lasting = [t for run in runs if len(run) >= shortest for t in run]
    runs = [list(run) for phone, run in itertools.groupby(lasting, frames.__getitem__) if phone]
    return [[int(frames[run[0]]), run[0], run[-1] + 1] for run in runs]


def batched(work, x, desc=None, size=8):
    """work(x) of x (B, ...), a few at a time: a small batch stays in memory that is warm."""
    parts = tqdm(x.split(size), desc=desc, unit="batch", leave=False, disable=not desc)
    return torch.cat([work(part) for part in parts])


def speak(toy, first, count, frames, desc, context=0):
    """`frames` frames from within each of `count` toy utterances, numbered from `first`: waves (count, N), and the
    truth of what follows the first `context` frames."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(lambda i: toy.utterance(i, (frames + LEAD) / FRAME_RATE), range(first, first + count))
        spoken = list(tqdm(jobs, total=count, desc=desc, unit="clip", leave=False))
    waves = torch.from_numpy(np.stack([u.wave[LEAD * HOP:] for u in spoken]))
    for u in spoken:
        u.phone, u.word, u.f0 = (x[LEAD + context:] for x in (u.phone, u.word, u.f0))
    return waves, spoken


def voice_truth(spoken):
    """(B, 4), each of about unit variance: the speaker's pitch and vocal tract; the style's pitch range and tempo."""
    rows = [(u.speaker, *list(STYLES.values())[u.style]) for u in spoken]
    return np.array([[2 * math.log2(who["pitch"] / 150), 10 * (who["tract"] - 1.04), 0.8 * math.log2(pitch_range),
                      4 * math.log2(tempo * who["rate"])] for who, pitch_range, tempo, _ in rows], np.float32)


def train_listener(clips=600, steps=600):
    """Train the toy recogniser on 40 minutes of invented speech, heard louder and softer and through noise."""
    torch.manual_seed(0)
    waves, spoken = speak(ToySpeech(languages=8, words=40, seed=1), 0, clips, 4 * FRAME_RATE, "toy recogniser: speech")
    mels, voices = batched(log_mel, waves), torch.from_numpy(voice_truth(spoken))
    phones, f0 = (torch.from_numpy(np.stack(x)) for x in ([u.phone for u in spoken], [u.f0 for u in spoken]))
    listener = Listener()
    optimizer = torch.optim.AdamW(listener.parameters(), lr=3e-3, weight_decay=0.01)
    for step in tqdm(range(steps), desc="toy recogniser: training", unit="step", leave=False):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        pick, knob = torch.randint(clips, (16,)), lambda: torch.rand(16, 1, 1)
        mel = torch.logaddexp(mels[pick] + 2 * knob() - 1, 4 * knob() - 11)
        phone, pitch, voice = listener(mel + 0.3 * knob() * torch.randn(mel.shape))
        off = (pitch - (f0[pick].clamp(min=50) / 150).log2()) * (f0[pick] > 0)
        loss = F.cross_entropy(phone.mT, phones[pick].long()) + F.mse_loss(voice, voices[pick]) + 4 * (off ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return listener


def load_listener():
    """The toy recogniser; trained now, in about a minute, unless the cache holds what this very code trained before."""
    code = fingerprint("".join(map(inspect.getsource, (Listener, voice_truth, train_listener))))
    path, listener = cache_root() / f"listener-{VERSION}-{code}.pt", Listener()
    try:
        listener.load_state_dict(load(path)["listener"])
    except UserError:
        listener = train_listener()
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, listener=listener.state_dict())
    return listener.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# The truth: what was said, in which language, in whose voice.

def words_in(clip, language):
    """Cover as many of a clip's S phones as can be with whole words of a language: the word of each (S,), -1: none."""
    lexicon = {tuple(SYMBOLS[p] for p in word): number for number, word in enumerate(language.words)}
    sizes = sorted({len(word) for word in lexicon}, reverse=True)
    best = [(0, [])]                       # the most of the first 0, 1, ... phones that can be covered, and how
    for stop in range(1, len(clip) + 1):
        ways = [(best[-1][0], best[-1][1] + [-1])]
        ways += [(best[-s][0] + s, best[-s][1] + [lexicon[word]] * s) for s in sizes
                 if s <= stop and (word := tuple(clip[stop - s:stop])) in lexicon]
        best.append(max(ways, key=lambda way: way[0]))
    return np.array(best[-1][1], int)


def ngrams(toy, n, language=0):
    """The grammar's exact distribution {n phones: probability}, pauses left out: what endless speech would give."""
    lang, table = toy.languages[language], {}

    def extend(phones, word, odds):  # grow a stretch of speech word by word until n phones are certain
        if len(phones) >= n:
            table[phones[:n]] = table.get(phones[:n], 0) + odds
            return
        for following, chance in enumerate(lang.follows[word]):
            extend(phones + lang.words[following], following, odds * chance)

    for word, odds in enumerate(toy.word_share(language)):
        for start in range(len(lang.words[word])):
            extend(lang.words[word][start:], word, odds)
    total = sum(table.values())
    return {gram: odds / total for gram, odds in table.items()}


def guess_language(toy, clips):
    """The language whose phones make each clip likeliest (B,); -1 for an empty clip."""
    tables = [ngrams(toy, 1, number) for number in range(len(toy.languages))]
    odds = [[sum(math.log(table.get((SYMBOLS.index(p),), 0) + 1e-3) for p in clip) for table in tables]
            for clip in clips]
    return np.array([np.argmax(row) if clip else -1 for row, clip in zip(odds, clips)])


def nearness(voice, truth):
    """Share of the other clips' true voices that a heard voice (B, D) is farther from than from its own truth (B, D),
    mean over clips: 1 for the very voice, 0.5 for any voice."""
    apart = ((voice[:, None] - truth[None]) ** 2).sum(2)
    return float((apart > apart.diagonal()[:, None]).sum() / max(1, len(apart) * (len(apart) - 1)))


def phone_errors(clip, truth):
    """Edit distance between two lists of phones (Levenshtein 1966)."""
    truth = np.array(truth)
    row = steps = np.arange(len(truth) + 1)
    for i, phone in enumerate(clip, 1):
        row = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (truth != phone))])
        row = np.minimum.accumulate(row - steps) + steps                      # and what the clip left out
    return int(row[-1])


def error_rate(clips, spoken):
    """Phone error rate: edit distance between what was heard and the truth, over true phones."""
    errors = total = 0
    for clip, u in zip(clips, spoken):
        first = np.diff(u.phone.astype(int) * 1000 + u.word, prepend=-9999) != 0
        truth = [SYMBOLS[p] for p in u.phone[first & (u.phone > 0)]]
        errors, total = errors + phone_errors(clip, truth), total + len(truth)
    return errors / total


def likeness(toy, heard, spoken):
    """{measure: 0 to 1}: how like the truth, language, speaker and style of `spoken`, is what was heard?"""
    clips, voice, truth = heard["clips"], heard["voice"], voice_truth(spoken)
    covered = np.concatenate([words_in(clip, toy.languages[u.language]) >= 0 for clip, u in zip(clips, spoken)])
    return {"word_rate": float(covered.sum() / max(1, len(covered))),
            "language_kept": float((guess_language(toy, clips) == [u.language for u in spoken]).mean()),
            "speaker_kept": nearness(voice[:, :2], truth[:, :2]), "style_kept": nearness(voice[:, 2:], truth[:, 2:])}


def toy_truth(toy, spoken, generated, true):
    """{measure: value, ceiling, floor, normalized = (value - floor) / (ceiling - floor)} of generated continuations, as
    heard by the toy recogniser. The ceiling is the true continuation; the floor one of another context or, for words,
    one with its phones shuffled."""
    shuffle = np.random.default_rng(0).permutation
    shuffled = true | {"clips": [shuffle(clip).tolist() for clip in true["clips"]]}
    value, ceiling, random = (likeness(toy, heard, spoken) for heard in (generated, true, shuffled))
    others = [likeness(toy, true, spoken[i:] + spoken[:i]) for i in range(1, max(2, min(9, len(spoken))))]
    floor = {name: float(np.mean([x[name] for x in others])) for name in value} | {"word_rate": random["word_rate"]}
    return {name: {"value": v, "ceiling": c, "floor": f, "normalized": (v - f) / (c - f) if c > f else math.nan}
            for name, v, c, f in zip(value, *(x.values() for x in (value, ceiling, floor)))}


# ----------------------------------------------------------------------------------------------------------------------
# When is it decided? What can be read from the x0 that the model predicts, from one true continuation with noise on it.

def decided(predict, listener, toy, x0, spoken):
    """{log_snr, language, speaker, phone, word: list over noise levels}: accuracy of what is read from the log-mel
    (B, T, 80) = predict(xt, phi) of x0 (B, T, C) and noise. Phones, words count by frames, speakers by `nearness`."""
    phones, words = (np.stack([getattr(u, name) for u in spoken]) for name in ("phone", "word"))
    rows, eps = [], torch.stack([keyed_noise(0, "decided", i, x0.shape[1:], x0.device) for i in range(len(x0))])
    for level in tqdm(range(-10, 9, 2), desc="when is it decided", unit="level", leave=False):
        phi = math.atan(math.exp(-level / 2))
        heard = listener.hear(predict(math.cos(phi) * x0 + math.sin(phi) * eps, phi))
        said = np.full(words.shape, -1)
        for row, frames, clip, u in zip(said, heard["frames"], heard["clips"], spoken):
            for (_, start, stop), word in zip(spans(frames), words_in(clip, toy.languages[u.language])):
                row[start:stop] = word
        found = likeness(toy, heard, spoken)
        rows.append([level, found["language_kept"], found["speaker_kept"],
                     (heard["frames"] == phones)[phones > 0].mean(), (said == words)[words >= 0].mean()])
    return dict(zip(("log_snr", "language", "speaker", "phone", "word"), np.array(rows).T.tolist()))


def draw_decided(rows, path):
    """Draw it, if matplotlib is there; says where."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "(pip install matplotlib to have it drawn)"
    axes = Figure(figsize=(6.4, 4), layout="constrained").subplots()
    for name, marker in zip(list(rows)[1:], "osd^"):
        axes.plot(rows["log_snr"], rows[name], marker=marker, label=name)
    axes.set(xlabel="log-SNR of what the model sees", ylabel="accuracy of what it predicts", ylim=(0, 1.02))
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        axes.figure.savefig(temporary, dpi=150, format="png")
    return f"drawn in {path}"
