"""eval_pjsd: is what it says shaped like language?

Speech is turned into phones, and the phoneme n-grams of generated and of real speech, n = 1 ... 5, are compared by the
Jensen-Shannon divergence [paper] in bits: 0 when both are distributed alike, 1 when they share nothing. Little speech
looks unlike anything, even more of its kind, so each value stands beside its *floor*: as much real speech, judged
the same way. For toy speech the truth is known, and what the paper could only play is measured as well.

    python eval_pjsd.py out/tiny                                                  a run: it speaks, we judge
    python eval_pjsd.py --generated mine --reference real --recognizer hama       any two folders of audio
    python eval_pjsd.py out/tiny --decided                                        what is decided at which noise level

The order of the page: the estimator, recognisers, the truth of toy speech, when it is decided, memory, the report.
"""
import argparse
import concurrent.futures
import inspect
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from cdslm import Parser, cli, decide, guided, load, load_run, sample, save
from corpus import (AUDIO_FILES, FRAME_RATE, HOP, MELS, RATE, UserError, cache_root, fingerprint, keyed_noise,
                    load_audio, log_mel, open_corpus, reason, replacing, resample)
from toyspeech import STYLES, SYMBOLS, VERSION, VOWELS, ToySpeech

NS, ENOUGH = (1, 2, 3, 4, 5), 200      # n-grams; phones without which there is no value to report
CONTEXTS, REFERENCE = 1_000_000, 2_000_000  # toy utterances from these numbers on: training stops far below
LEAD = 20                              # frames left out at the start of an utterance, which is silent


# ----------------------------------------------------------------------------------------------------------------------
# The estimator. A clip is a list of phones, a corpus a list of clips; n-grams never cross clips.

def jsd(p, q):
    """Jensen-Shannon divergence (Lin 1991) in bits of two histograms (K,), normalised or not; NaN if one is empty."""
    if not (p.sum() and q.sum()):
        return math.nan
    p, q = p / p.sum(), q / q.sum()
    bits = [-(x[x > 0] * np.log2(x[x > 0])).sum() for x in ((p + q) / 2, p, q)]
    return float(np.clip(bits[0] - (bits[1] + bits[2]) / 2, 0, 1))


def tabulate(n, *corpora):
    """For each corpus a function from a choice of its clips, a mask (clips,), to the histogram (K,) of n-grams."""
    number = {phone: i for i, phone in enumerate(sorted({p for corpus in corpora for clip in corpus for p in clip}))}
    grams, owners = [], []
    for corpus in corpora:
        clips = [np.array([number[p] for p in clip], np.int64) for clip in corpus]
        codes = [sum(c[i:max(0, len(c) - n + 1) + i] * len(number) ** i for i in range(n)) for c in clips]  # base K
        grams.append(np.concatenate([*codes, np.zeros(0, np.int64)]))
        owners.append(np.repeat(np.arange(len(codes)), [len(c) for c in codes]))
    kinds, which = np.unique(np.concatenate(grams), return_inverse=True)
    parts = np.split(which, np.cumsum([len(g) for g in grams])[:-1])
    return [lambda keep, part=part, owner=owner: np.bincount(part[keep[owner]], minlength=len(kinds)).astype(float)
            for part, owner in zip(parts, owners)]


def draw(rng, lengths, phones):
    """A random choice of clips, a mask (clips,), with about `phones` phones in all, at least one clip unless that is 0.
    Without replacement: clips seen twice look like a poorer language, and add the bias of small samples once more."""
    order = rng.permutation(len(lengths))
    middles = np.cumsum(lengths[order]) - lengths[order] / 2
    return np.isin(np.arange(len(lengths)), order[:max(np.searchsorted(middles, phones), phones > 0)])


def jackknife(p, q, count, blocks=20):
    """Bias and variance (2,) that `count` clips, tabulated as p, bring to their divergence from the histogram q (K,),
    from what changes when one block of neighbouring clips after the other is left out (Quenouille 1956, Tukey 1958)."""
    parts = np.array_split(np.arange(count), min(blocks, count))
    values = np.array([jsd(p(~np.isin(np.arange(count), part)), q) for part in parts])
    return (len(parts) - 1) * np.array([values.mean() - jsd(p(np.ones(count, bool)), q), values.var()])


def compare(generated, reference, true=(), splits=20):
    """Judge one corpus by another: {name: list over n}, NaN where nothing can be said and `notes` on why.

    Each of `splits` random splits sets a part B of the reference aside with as many phones as were generated (at most
    half of them all; then the generated speech is thinned to match). Both are judged by the rest, A, and so carry the
    same bias: J(generated, A) is the value, J(B, A) the floor, means over splits. The 95 % interval is for what so much
    speech gives on average, both corpora jackknifed; `corrected` is without most of the bias, by the same jackknife
    (it tests better than Miller & Madow's correction). The `true` continuations are judged like the generated."""
    corpora = generated, reference, true
    lengths = [np.array([len(clip) for clip in corpus], int) for corpus in corpora]
    total, clips = [int(x.sum()) for x in lengths], [int((x > 0).sum()) for x in lengths]
    names = "pjsd", "floor", "true", "floor_sd", "corrected", "excess", "normalized_excess"
    rows = {"n": list(NS)} | {name: [math.nan] * len(NS) for name in names} | {"interval": [[math.nan] * 2 for _ in NS]}
    rows["notes"] = [f"no interval{' and no floor' * i}: the {('generated', 'reference')[i]} speech is a single clip"
                     for i in range(2) if clips[i] == 1]
    if min(total[:2]) < ENOUGH:
        rows["notes"] = [f"no value: {total[0]} phones generated, {total[1]} in the reference, and fewer than {ENOUGH} "
                         "say nothing"]
        return rows
    phones, aside = (min(total[0], total[1] // 2),) * 2 if clips[1] > 1 else (math.inf, 0)
    for i, n in enumerate(NS):
        (p, q, r), rng, values = tabulate(n, *corpora), np.random.default_rng(0), []
        for _ in range(splits):
            held = draw(rng, lengths[1], aside)
            mine, theirs = p(draw(rng, lengths[0], phones)), r(draw(rng, lengths[2], phones))
            values.append([jsd(x, q(~held)) for x in (mine, q(held), theirs)])
        value, floor, ceiling = np.mean(values, 0)
        corrected = math.nan
        if min(clips[:2]) > 1:
            all_p, all_q = (x(np.ones(len(corpus), bool)) for x, corpus in zip((p, q), corpora))
            bias, variance = jackknife(p, all_q, len(generated)) + jackknife(q, all_p, len(reference))
            corrected, freedom = jsd(all_p, all_q) - bias, min(20, len(generated), len(reference)) - 1
            reach = 1.96 * (1 + 1.21 / freedom + 1.44 / freedom ** 2) * math.sqrt(variance)  # Student's t, A&S 26.7.5
            rows["interval"][i] = [max(0.0, value - reach), min(1.0, value + reach)]
        share = (value - floor) / (1 - floor) if floor < 0.999 else math.nan
        row = value, floor, ceiling, np.std(values, 0)[1], corrected, value - floor, share
        for name, x in zip(names, row):
            rows[name][i] = float(x)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Recognisers: phones(wave (N,), rate) -> list of phones.

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
        vowel = phone.detach().softmax(2)[..., VOWELS].sum(2) + 1e-3          # (B, T): where pitch is plain
        vowel = vowel / vowel.sum(1, keepdim=True)
        mean = (pitch * vowel).sum(1, keepdim=True)
        spread = (((pitch - mean) ** 2 * vowel).sum(1, keepdim=True) + 1e-4).log() / 2
        return phone, pitch, self.voice(torch.cat([y.mean(2), y.std(2), mean, spread], dim=1))

    @torch.no_grad()
    def hear(self, mel):
        """Log-mel (B, T, 80) -> clips: B lists of phones, their `spans`, frames: phone numbers (B, T), voice (B, 4)."""
        parts = [self(part.float().cpu()) for part in mel.split(32)]
        frames, voice = (torch.cat(x).numpy() for x in zip(*[(phone.argmax(2), voice) for phone, _, voice in parts]))
        found = [spans(row) for row in frames]
        clips = [[SYMBOLS[p] for p, _, _ in row] for row in found]
        return {"clips": clips, "spans": found, "frames": frames, "voice": voice}

    def phones(self, wave, rate):
        """Samples (N,) at `rate` Hz -> list of phones, pauses left out."""
        return self.hear(log_mel(resample(wave, rate)[None]))["clips"][0]


def batched(work, x, desc=None, size=8):
    """work(x) of x (B, ...), a few at a time: a small batch stays in memory that is warm."""
    parts = tqdm(x.split(size), desc=desc, unit="batch", leave=False, disable=not desc)
    return torch.cat([work(part) for part in parts])


def spans(frames, shortest=3):
    """Phone numbers (T,) -> [[phone, first frame, last frame + 1]], no pauses, nothing shorter than a phone."""
    starts, found = np.flatnonzero(np.diff(frames, prepend=-1)), []
    for start, stop in zip(starts, [*starts[1:], len(frames)]):
        if stop - start >= shortest and found and found[-1][0] == frames[start]:
            found[-1][2] = stop
        elif stop - start >= shortest:
            found.append([int(frames[start]), start, stop])
    return [span for span in found if span[0]]


def speak(toy, first, count, frames, desc):
    """`frames` frames from within each of `count` toy utterances, numbered from `first`: waves (count, N), truth."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(lambda i: toy.utterance(i, (frames + LEAD) / FRAME_RATE), range(first, first + count))
        spoken = list(tqdm(jobs, total=count, desc=desc, unit="clip", leave=False))
    for u in spoken:
        u.wave, u.phone, u.word, u.f0 = u.wave[LEAD * HOP:], u.phone[LEAD:], u.word[LEAD:], u.f0[LEAD:]
    return torch.from_numpy(np.stack([u.wave for u in spoken])), spoken


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


def quiet_cuts(wave, rate):
    """Samples (N,) -> pieces of at most 12 s, each cut at the quietest 50 ms after its sixth second."""
    step = rate // 20
    while len(wave) > 12 * rate:
        loudness = wave[6 * rate:12 * rate].unfold(0, step, step).square().mean(1)
        cut = 6 * rate + int(loudness.argmin()) * step + step // 2
        yield wave[:cut]
        wave = wave[cut:]
    yield wave


def hama():
    """English, by the package `hama`, which ships its model: for 6 to 12 s of speech at 16 kHz."""
    try:
        from hama import ASRModel
        model = ASRModel()
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"--recognizer hama can't run ({reason(error)}): pip install hama; it has no library for "
                        "Windows") from None
    return lambda wave, rate: [p for piece in quiet_cuts(resample(wave, rate, 16_000), 16_000)
                               for p in model(piece.numpy(), 16_000).phonemes]


def huggingface(name):
    """A CTC phoneme model from the Hugging Face hub or from a folder: the likeliest token of each frame, without
    repeats, blanks and word boundaries."""
    try:
        from transformers import AutoFeatureExtractor, AutoModelForCTC
        from transformers.utils import cached_file
    except ImportError:
        raise UserError("--recognizer hf:MODEL needs transformers: pip install transformers") from None
    try:
        model, features = AutoModelForCTC.from_pretrained(name).eval(), AutoFeatureExtractor.from_pretrained(name)
        vocabulary = json.loads(Path(cached_file(name, "vocab.json")).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--recognizer hf:{name}: {reason(error)}") from None
    rate, blank, symbols = features.sampling_rate, model.config.pad_token_id, {i: s for s, i in vocabulary.items()}

    @torch.no_grad()
    def phones(wave, wave_rate):
        pieces = [piece for piece in quiet_cuts(resample(wave, wave_rate, rate), rate) if len(piece) >= rate // 20]
        inputs = [features(piece.numpy(), sampling_rate=rate, return_tensors="pt") for piece in pieces]
        tokens = [i for x in inputs for i in model(**x).logits[0].argmax(1).unique_consecutive().tolist() if i != blank]
        return [symbols[i] for i in tokens if symbols.get(i, "|") != "|" and not symbols[i].startswith(("<", "["))]
    return phones


def recogniser(name):
    """phones(wave, rate) by its name on the command line."""
    if name == "text":
        return None
    if name not in ("toy", "hama") and not name.startswith("hf:"):
        raise UserError(f"unknown --recognizer {name}; choose toy, hama, hf:MODEL or text")
    return load_listener().phones if name == "toy" else hama() if name == "hama" else huggingface(name[3:])


def read_folder(folder, phones):
    """Every file of a folder, an utterance each -> clips of phones, seconds of speech. Without `phones`: text, NaN."""
    folder, clips, seconds = Path(folder), [], 0.0
    kind, suffixes = ("text", {".txt"}) if phones is None else ("audio", AUDIO_FILES)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if not files:
        raise UserError(f"{folder}: {f'no {kind} files in it' if folder.is_dir() else 'no such folder'}")
    for path in tqdm(files, desc=f"listening to {folder}", unit="file", leave=False):
        try:
            wave = load_audio(path) if phones else None
            clips.append(path.read_text(encoding="utf-8").split() if wave is None else phones(wave, RATE))
            seconds += math.nan if wave is None else len(wave) / RATE
        except (UserError, OSError, UnicodeDecodeError) as error:
            tqdm.write(f"skipped {path}: {reason(error).removeprefix(f'{path}: ')}", file=sys.stderr)
    if not clips:
        raise UserError(f"{folder}: none of its {len(files)} files can be read")
    return clips, seconds


# ----------------------------------------------------------------------------------------------------------------------
# The truth of toy speech.

MEANING = {"word_rate": "words: phones inside whole words of the right language",
           "language_kept": "multilingual: goes on in the language of the context",
           "speaker_kept": "multi-speaker: goes on in the same voice, by pitch and vocal tract",
           "style_kept": "prosodic, emotive: goes on in the same style, by pitch range and tempo"}


def words_in(clip, language):
    """Cover as many of a clip's S phones as can be with whole words of a language: the word of each (S,), -1: none."""
    lexicon = {tuple(SYMBOLS[p] for p in word): number for number, word in enumerate(language.words)}
    sizes = {len(word) for word in lexicon}
    best, last = [0], [None]                                                  # phones covered; the word that ends here
    for stop in range(1, len(clip) + 1):
        ways = [(best[stop - s] + s, (s, lexicon[word])) for s in sizes
                if s <= stop and (word := tuple(clip[stop - s:stop])) in lexicon]
        covered, word = max(ways, default=(0, None))
        best.append(max(covered, best[-1]))
        last.append(word if covered > best[-2] else None)
    found, stop = np.full(len(clip), -1), len(clip)
    while stop:
        size, word = last[stop] or (1, -1)
        found[stop - size:stop], stop = word, stop - size
    return found


def guess_language(toy, clips):
    """The language whose phones make each clip likeliest (B,); -1 for an empty clip."""
    tables = [toy.ngrams(1, number) for number in range(len(toy.languages))]
    odds = [[sum(math.log(table.get((SYMBOLS.index(p),), 0) + 1e-3) for p in clip) for table in tables]
            for clip in clips]
    return np.array([np.argmax(row) if clip else -1 for row, clip in zip(odds, clips)])


def nearness(voice, truth):
    """Share of the other clips' true voices that a heard voice (B, D) is farther from than from its own truth (B, D),
    mean over clips: 1 for the very voice, 0.5 for any voice."""
    apart = ((voice[:, None] - truth[None]) ** 2).sum(2)
    return float((apart > apart.diagonal()[:, None]).sum() / max(1, len(apart) * (len(apart) - 1)))


def toy_truth(toy, spoken, generated, true):
    """{measure: value, ceiling, floor, normalized = (value - floor) / (ceiling - floor)} of generated continuations, as
    heard by the toy recogniser. The ceiling is the true continuation; the floor one of another context or, for words,
    one with its phones shuffled."""
    languages, voices, rng = np.array([u.language for u in spoken]), voice_truth(spoken), np.random.default_rng(0)

    def word_rate(clips):
        covered = np.concatenate([words_in(clip, toy.languages[i]) >= 0 for clip, i in zip(clips, languages)])
        return float(covered.mean()) if len(covered) else 0.0

    def kept(score, read):
        mine, theirs = read(generated), read(true)
        return score(mine), score(theirs), float(np.mean([score(np.roll(theirs, i, 0)) for i in range(1, 9)]))

    shuffled = [rng.permutation(clip).tolist() for clip in true["clips"]]
    rows = {"word_rate": [word_rate(clips) for clips in (generated["clips"], true["clips"], shuffled)],
            "language_kept": kept(lambda x: float((x == languages).mean()), lambda h: guess_language(toy, h["clips"])),
            "speaker_kept": kept(lambda x: nearness(x, voices[:, :2]), lambda h: h["voice"][:, :2]),
            "style_kept": kept(lambda x: nearness(x, voices[:, 2:]), lambda h: h["voice"][:, 2:])}
    return {name: {"value": v, "ceiling": c, "floor": f, "normalized": (v - f) / (c - f) if c > f else math.nan}
            for name, (v, c, f) in rows.items()}


def error_rate(clips, spoken):
    """Phone error rate: edit distance (Levenshtein 1966) between what was heard and the truth, over true phones."""
    errors = total = 0
    for clip, u in zip(clips, spoken):
        first = np.diff(u.phone.astype(int) * 1000 + u.word, prepend=-9999) != 0
        truth = np.array([SYMBOLS[p] for p in u.phone[first & (u.phone > 0)]])
        row = steps = np.arange(len(truth) + 1)
        for i, phone in enumerate(clip, 1):
            row = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (truth != phone))])
            row = np.minimum.accumulate(row - steps) + steps                  # and what the clip left out
        errors, total = errors + int(row[-1]), total + len(truth)
    return errors / total


# ----------------------------------------------------------------------------------------------------------------------
# When is it decided? What can be read from the x0 that the model predicts, from one true continuation with noise on it.

def decided(predict, listener, toy, x0, spoken):
    """{log_snr, language, speaker, phone, word: list over noise levels}: accuracy of what is read from the log-mel
    (B, T, 80) = predict(xt, phi) of x0 (B, T, C) and noise. Phones, words count by frames, speakers by `nearness`."""
    rows = {name: [] for name in ("log_snr", "language", "speaker", "phone", "word")}
    phones, words, languages = (np.stack([getattr(u, name) for u in spoken]) for name in ("phone", "word", "language"))
    eps = torch.stack([keyed_noise(0, "decided", i, x0.shape[1:], x0.device) for i in range(len(x0))])
    for level in tqdm(range(-10, 9, 2), desc="when is it decided", unit="level", leave=False):
        phi = math.atan(math.exp(-level / 2))
        heard = listener.hear(predict(math.cos(phi) * x0 + math.sin(phi) * eps, phi))
        said = np.full(words.shape, -1)
        for row, clip, found, language in zip(said, heard["clips"], heard["spans"], languages):
            for (_, start, stop), word in zip(found, words_in(clip, toy.languages[language])):
                row[start:stop] = word
        accuracy = [(guess_language(toy, heard["clips"]) == languages).mean(),
                    nearness(heard["voice"][:, :2], voice_truth(spoken)[:, :2]),
                    (heard["frames"] == phones)[phones > 0].mean(), (said == words)[words >= 0].mean()]
        for name, value in zip(rows, [level, *accuracy]):
            rows[name].append(float(value))
    return rows


def draw_decided(rows, path):
    """Draw it, if matplotlib is there; says where."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "(pip install matplotlib to have it drawn)"
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for name, marker in zip(list(rows)[1:], "osd^"):
        axes.plot(rows["log_snr"], rows[name], marker=marker, label=name)
    axes.set(xlabel="log-SNR of what the model sees", ylabel="accuracy of what it predicts", ylim=(0, 1.02))
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return f"drawn in {path}"


# ----------------------------------------------------------------------------------------------------------------------
# Memory: is generated speech nearer to the training set than real speech is?

def glimpses(mel, stride=1):
    """Log-mel (B, T, 80) -> (B, W, 320): each second of it in 20 steps and 16 bands, level and contrast removed."""
    mel = mel[:, :mel.shape[1] // 4 * 4].unflatten(1, (-1, 4)).unflatten(3, (16, 5)).mean((2, 4))
    seconds = mel.unfold(1, 20, stride).flatten(2)
    return F.normalize(seconds - seconds.mean(2, keepdim=True), dim=2)


def memory(corpus, generated, true, hours=10):
    """Distance of a second amid each generated (B, T, 80) and each true continuation to the nearest second of training
    speech (of `hours` at most): medians, how often generated speech is the nearer (0.5 if it is like real speech), and
    whether that is more often than chance allows (three standard deviations of Mann & Whitney's U)."""
    middle = max(0, generated.shape[1] // 2 - 42)
    both, runs = torch.cat([generated, true]), np.random.default_rng(0).permutation(corpus.runs["train"])
    seconds = torch.cat([glimpses(both[:, middle + phase:middle + phase + 80]) for phase in range(4)], dim=1)
    best, heard = torch.full(seconds.shape[:2], -1.0), 0
    for shard, start, length in tqdm(runs.tolist(), desc="looking for copies", unit="run", leave=False):
        if heard < hours * 3600 * FRAME_RATE and length >= 80:
            mel = torch.from_numpy(corpus.shards[shard]["mel"][start:start + length].astype(np.float32))
            best = torch.maximum(best, (seconds @ glimpses(mel[None])[0].T).amax(2))
            heard += length
    mine, theirs = (2 - 2 * best.amax(1)).clamp(min=0).sqrt().split((len(generated), len(true)))
    nearer = float((mine[:, None] < theirs).float().mean())
    chance = math.sqrt((len(mine) + len(theirs) + 1) / (12 * len(mine) * len(theirs)))
    return {"generated": float(mine.median()), "real": float(theirs.median()), "nearer": nearer,
            "flagged": nearer > 0.5 + 3 * chance}


# ----------------------------------------------------------------------------------------------------------------------
# The report.

def describe(clips, seconds):
    """What lies behind the figures, {side: value}: phones, phones a second, the share of clips without any."""
    total = {side: sum(map(len, c)) for side, c in clips.items()}
    return {"phones": total, "phones_per_second": {side: total[side] / seconds[side] for side in clips},
            "empty": {side: sum(not clip for clip in c) / len(c) for side, c in clips.items()}}


def judge_folders(generated, reference, name):
    """The report on two folders."""
    phones = recogniser(name)
    sides = {"generated": read_folder(generated, phones), "reference": read_folder(reference, phones)}
    clips, seconds = ({side: pair[i] for side, pair in sides.items()} for i in range(2))
    return {"recognizer": name} | compare(**clips) | describe(clips, seconds)


def windows(corpus, split, frames, count):
    """At most `count` windows from all over a corpus, of which no two overlap: (B, N)."""
    places = [(shard, start + at) for shard, start, length in corpus.runs[split]
              for at in range(0, length - frames + 1, frames)]
    cut = [corpus.shards[shard]["audio"][at * HOP:(at + frames) * HOP]
           for shard, at in np.random.default_rng(0).permutation(places)[:count]]
    return torch.from_numpy(np.stack(cut).astype(np.float32) / 32767)


def judge_run(arguments):
    """The report on a run: it continues held-out contexts, and what it says is judged beside the true continuations."""
    config, model, autoencoder = load_run(arguments.run)
    (device, dtype), corpus, started = decide(config), open_corpus(config), time.perf_counter()
    model, autoencoder, n, m = model.to(device), autoencoder.to(device), config.ctx_frames, config.gen_frames
    count, name = max(1, round(arguments.minutes * 60 * FRAME_RATE / m)), arguments.recognizer
    if config.data == "toy":
        if name not in (None, "toy"):
            raise UserError("a toy run is judged by the toy recogniser; for another, judge a folder of what it says")
        toy, listener, name = ToySpeech(config.toy_languages, config.toy_words), load_listener(), "toy"
        waves, spoken = speak(toy, CONTEXTS, count, n + m, "contexts")
        reference, _ = speak(toy, REFERENCE, 3 * count, m, "reference")
        for u in spoken:
            u.phone, u.word = u.phone[n:], u.word[n:]
    else:
        if arguments.decided or name == "text":
            raise UserError(f"{'--decided' if arguments.decided else '--recognizer text'} is not for recordings")
        toy, name = None, name or "hama"
        phones = recogniser(name)
        waves, reference = windows(corpus, "valid", n + m, count), windows(corpus, "train", m, 3 * count)

    def network(work, x, desc=None):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return batched(work, x, desc, size=32).float()

    def sound(x):
        return batched(lambda part: autoencoder.decode(part).cpu(), x, "decoding")

    frames, seeds = batched(lambda part: autoencoder.encode(part.to(device)), waves), itertools.count()
    resting = time.perf_counter()
    speech = network(lambda part: sample(model, part, steps=arguments.steps, cfg=arguments.cfg, seed=next(seeds)),
                     frames[:, :n], "speaking")
    resting -= time.perf_counter()
    sides = {"generated": sound(speech), "reference": reference, "true": waves[:, n * HOP:]}
    mels = {side: batched(log_mel, x) for side, x in sides.items()}
    if toy:
        heard = {side: listener.hear(mel) for side, mel in mels.items()}
        clips = {side: h["clips"] for side, h in heard.items()}
    else:
        clips = {side: [phones(wave, RATE) for wave in tqdm(x, desc=f"listening: {side}", unit="clip", leave=False)]
                 for side, x in sides.items()}
    report = {"recognizer": name} | compare(**clips)
    report |= describe(clips, {side: x.numel() / RATE for side, x in sides.items()})
    report["memory"] = memory(corpus, mels["generated"], mels["true"])
    if toy:
        again = listener.hear(batched(log_mel, sound(frames[:64, n:])))["clips"]
        report |= {"toy": toy_truth(toy, spoken, heard["generated"], heard["true"]),
                   "error_rate": error_rate(clips["true"], spoken),
                   "error_rate_reconstructed": error_rate(again, spoken)}
    if toy and arguments.decided:
        def predict(xt, phi):
            pairs = torch.cat([frames[:, :n], xt], dim=1)
            x0 = network(lambda part: guided(model, part[:, :n], 1, part[:, n:], phi, None), pairs)
            return autoencoder.to_mel(x0) * autoencoder.mel_stats[1] + autoencoder.mel_stats[0]
        report["decided"] = decided(predict, listener, toy, frames[:, n:], spoken)
    return report | {"seconds": time.perf_counter() - started + resting}


def page(report):
    """Print a report."""
    def line(name, values, form):
        print(f"{name:<22}" + "".join(f"{'-' if math.isnan(v) else format(v, form):>9}" for v in values))

    print(f"{'n':<22}" + "".join(f"{n:>8}{' *'[n > 3]}" for n in report["n"]))
    ends = dict(zip(("from", "to"), zip(*report["interval"])))
    for name, values in {"pJSD, bits": report["pjsd"], "  95 % interval from": ends["from"], "  to": ends["to"],
                         "floor": report["floor"], "  deviation": report["floor_sd"],
                         "excess over the floor": report["excess"], "  normalized": report["normalized_excess"],
                         "corrected for bias": report["corrected"],
                         "true continuations": report["true"]}.items():
        line(name, values, ".4f")
    print("* to be trusted only when there are hours of speech", *report["notes"], sep="\n")
    for side, phones in report["phones"].items():
        print(f"{side:<12}{phones:>8} phones, {report['phones_per_second'][side]:.2f} a second, "
              f"{report['empty'][side]:.1%} of clips empty".replace("nan a second, ", ""))
    errors = "its error rate on this speech is not known" if report["recognizer"] != "text" else "phones as written"
    if "error_rate" in report:
        errors = (f"{report['error_rate']:.1%} of phones wrong on held-out speech, "
                  f"{report['error_rate_reconstructed']:.1%} after the autoencoder")
    print(f"recogniser: {report['recognizer']}; {errors}")
    if "toy" in report:
        print(f"\n{'':<15}{'value':>7}{'ceiling':>9}{'floor':>7}{'normalized':>12}")
    for name, row in report.get("toy", {}).items():
        print(f"{name:<15}{row['value']:7.3f}{row['ceiling']:9.3f}{row['floor']:7.3f}{row['normalized']:12.3f}   "
              f"{MEANING[name]}")
    if "memory" in report:
        print("\nnearest second of training speech: {generated:.3f} from generated, {real:.3f} from real speech; "
              "generated is the nearer {nearer:.0%} of the time".format(**report["memory"])
              + ": FLAGGED, it may repeat what it learned from" * report["memory"]["flagged"])
    for name, values in report.get("decided", {}).items():
        line(name, values, "g" if name == "log_snr" else ".3f")
    if "seconds" in report:
        print(f"judged in {report['seconds']:.0f} s, speaking excluded")


def parse(argv=None):
    """Command line -> arguments. Raises UserError for one that makes no sense."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", nargs="?", help="a run folder, such as out/tiny")
    parser.add_argument("--generated", help="instead of a run: a folder of speech, a file an utterance")
    parser.add_argument("--reference", help="with --generated: a folder of real speech")
    parser.add_argument("--recognizer", help="toy, hama (English), hf:MODEL or text (.txt files of phones) [for toy "
                                             "runs toy, else hama]")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of speech that a run is to speak [10]")
    parser.add_argument("--cfg", type=float, default=1.5, help="its guidance [1.5]")
    parser.add_argument("--steps", type=int, default=24, help="its evaluations of the network [24]")
    parser.add_argument("--decided", action="store_true", help="toy runs: what is decided at which noise level; "
                                                               "draws RUN/decided.png")
    parser.add_argument("--json", type=Path, help="write the report to this file as well")
    arguments = parser.parse_args(argv)
    if bool(arguments.run) == bool(arguments.generated) or bool(arguments.generated) != bool(arguments.reference):
        raise UserError("give a run folder, or --generated and --reference with a folder each")
    if not (0 < arguments.minutes < math.inf and math.isfinite(arguments.cfg) and arguments.steps > 0):
        raise UserError("--minutes and --steps must be more than 0, --cfg a number")
    return arguments


def main():
    arguments = parse()
    if arguments.run:
        report = judge_run(arguments)
    else:
        report = judge_folders(arguments.generated, arguments.reference, arguments.recognizer or "hama")
    page(report)
    if "decided" in report:
        print(draw_decided(report["decided"], Path(arguments.run) / "decided.png"))
    if arguments.json:
        with replacing(arguments.json) as temporary:
            clean = json.loads(json.dumps(report), parse_constant=lambda _: None)  # JSON has no word for NaN
            temporary.write_text(json.dumps(clean, indent=2) + "\n")


if __name__ == "__main__":
    cli(main)
