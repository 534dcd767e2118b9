"""eval_pjsd: is what it says shaped like language?

Speech is turned into phones, phones into n-grams, and the n-grams of generated and of real speech are compared by the
Jensen-Shannon divergence [paper], in bits: 0 when both are distributed alike, 1 when they share nothing.

    python eval_pjsd.py out/tiny                                                  a run: it speaks, we judge
    python eval_pjsd.py --generated mine --reference real --recognizer hama       any two folders of audio
"""
import argparse
import concurrent.futures
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from cdslm import FRAME_RATE, HOP, RATE, UserError, cache_root, decide, load, load_run, log_mel, resample, sample, save
from toyspeech import STYLES, SYMBOLS, VERSION, ToySpeech

NS = (1, 2, 3, 4, 5)
ENOUGH = 200               # phones: with fewer there is no value to report
CONTEXTS, REFERENCE, HELD_OUT = 1_000_000, 2_000_000, 3_000_000  # toy utterances from here on: training never comes so far
LEAD = 20                  # frames cut from the start of an utterance, which is silent


# ---------------------------------------------------------------------------------------------------------------------
# The estimator. A clip is a list of phones, a corpus a list of clips; n-grams never cross clips.

def jsd(p, q):
    """Jensen-Shannon divergence in bits of two histograms (K,) over the same K outcomes; they need not be normalised."""
    def entropy(x):
        x = x[x > 0]
        return -(x * np.log2(x)).sum()
    p, q = p / p.sum(), q / q.sum()
    return float(np.clip(entropy((p + q) / 2) - entropy(p) / 2 - entropy(q) / 2, 0, 1))


def tabulate(n, *corpora):
    """For each corpus a function from a choice of its clips, a mask (clips,), to the histogram (K,) of their n-grams."""
    number = {phone: i for i, phone in enumerate(sorted({p for corpus in corpora for clip in corpus for p in clip}))}
    grams, owners = [], []
    for corpus in corpora:
        codes = [np.array([number[p] for p in clip], np.int64) for clip in corpus]
        codes = [sum(c[i:len(c) - n + 1 + i] * len(number) ** i for i in range(n)) if len(c) >= n else c[:0] for c in codes]
        grams.append(np.concatenate([*codes, np.zeros(0, np.int64)]))
        owners.append(np.repeat(np.arange(len(codes)), [len(c) for c in codes]))
    kinds, which = np.unique(np.concatenate(grams), return_inverse=True)
    parts = np.split(which, np.cumsum([len(g) for g in grams])[:-1])
    return [lambda keep, part=part, owner=owner: np.bincount(part[keep[owner]], minlength=len(kinds)).astype(float)
            for part, owner in zip(parts, owners)]


def pjsd(a, b, n):
    """pJSD in bits between the n-grams of two corpora."""
    p, q = tabulate(n, a, b)
    return jsd(p(np.ones(len(a), bool)), q(np.ones(len(b), bool)))


def draw(rng, lengths, phones):
    """A random choice of clips, a mask (clips,), that holds about `phones` phones, drawn without replacement."""
    order = rng.permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    keep = np.zeros(len(lengths), bool)
    keep[order[:np.searchsorted(ends - lengths[order] / 2, phones)]] = True
    return keep


def compare(generated, reference, true=None, splits=20):
    """Judge one corpus against another: a dict of lists over n, as --json has it.

    In each of `splits` splits of the reference, a part B is set aside that holds as many phones as were generated (half of
    the reference at most; then the generated speech is thinned to match). Generated speech and B are both compared with the
    rest, A, so that both carry the same bias; the mean over splits of J(generated, A) is reported, that of J(B, A) is the floor."""
    lengths = [np.array([len(clip) for clip in corpus]) for corpus in (generated, reference, true or [])]
    phones = min(lengths[0].sum(), lengths[1].sum() // 2)
    rows = {"n": list(NS), "pjsd": [], "floor": [], "floor_sd": [], "true": []}
    for n in NS:
        p, q, r = tabulate(n, generated, reference, true or [])
        rng, values = np.random.default_rng(0), []
        for _ in range(splits):
            held = draw(rng, lengths[1], phones)
            rest = q(~held)
            values.append([jsd(p(draw(rng, lengths[0], phones)), rest), jsd(q(held), rest),
                           jsd(r(draw(rng, lengths[2], phones)), rest) if true else np.nan])
        mean = np.mean(values, 0)
        for name, value in zip(("pjsd", "floor", "true", "floor_sd"), [*mean, np.std(values, 0)[1]]):
            rows[name].append(float(value))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Recognisers.

class Listener(nn.Module):
    """The toy recogniser: log-mel (B, T, 80) -> phone logits (B, T, 25) and what it makes of the voice (B, 5): log2 pitch,
    tract, and a logit for each style.

    It learns from other languages than it will judge (another seed, so other words), and hears 0.2 s around a frame: it can
    tell phones, but has no words to read into a mumble."""

    def __init__(self, width=96):
        super().__init__()
        self.enter = nn.Conv1d(80, width, 5, padding=2)
        self.middle = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2 * d, dilation=d) for d in (1, 2))
        self.phone, self.voice = nn.Linear(width, len(SYMBOLS)), nn.Conv1d(width, width, 5, padding=4, dilation=2)
        self.read = nn.Linear(2 * width, 2 + len(STYLES))

    def forward(self, mel):
        x = F.gelu(self.enter(((mel + 6) / 3).mT))                           # (B, width, T)
        for layer in self.middle:
            x = x + F.gelu(layer(x))
        voice = F.gelu(self.voice(x))
        return self.phone(x.mT), self.read(torch.cat([voice.mean(2), voice.std(2)], dim=1))

    @torch.no_grad()
    def phones(self, wave, rate):
        """(N,) samples at `rate` Hz -> list of phones, pauses left out."""
        return [SYMBOLS[p] for p, _, _ in spans(self(log_mel(resample(wave, rate)[None]))[0][0].argmax(1).numpy())]


def spans(frames, shortest=3):
    """Phone numbers (T,) frame by frame -> [(phone, first frame, last frame + 1)], pauses and runs under `shortest` frames left out."""
    starts = np.flatnonzero(np.diff(frames, prepend=-1))
    stops = np.append(starts[1:], len(frames))
    found = []
    for phone, start, stop in zip(frames[starts], starts, stops):
        if stop - start >= shortest:
            if found and found[-1][0] == phone:
                found[-1][2] = stop
            else:
                found.append([int(phone), start, stop])
    return [span for span in found if span[0]]


def speak(toy, first, count, frames, desc):
    """`count` toy utterances of `frames` frames from number `first` on, cut from within speech; (waves (count, N), utterances)."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(lambda i: toy.utterance(i, (frames + LEAD) / FRAME_RATE), range(first, first + count))
        spoken = list(tqdm(jobs, total=count, desc=desc, unit="clip", leave=False))
    for u in spoken:
        u.wave, u.phone, u.word, u.f0 = u.wave[LEAD * HOP:], u.phone[LEAD:], u.word[LEAD:], u.f0[LEAD:]
    return torch.from_numpy(np.stack([u.wave for u in spoken])), spoken


def voice_truth(spoken):
    """What `Listener.read` should say of utterances: log2(pitch / 150 Hz), 10 (tract - 1.04), style; (B, 3)."""
    return torch.tensor([[np.log2(u.speaker["pitch"] / 150), 10 * (u.speaker["tract"] - 1.04), u.style] for u in spoken])


def train_listener(steps=300):
    """Train the toy recogniser on 27 minutes of speech in eight invented languages, heard loud and soft, near and through noise."""
    torch.manual_seed(0)
    waves, spoken = speak(ToySpeech(languages=8, words=40, seed=1), 0, 400, 320, "toy recogniser: speech")
    mels = torch.cat([log_mel(w) for w in waves.split(16)])
    phones, voices = torch.from_numpy(np.stack([u.phone for u in spoken])).long(), voice_truth(spoken).float()
    listener = Listener()
    optimizer = torch.optim.AdamW(listener.parameters(), lr=3e-3, weight_decay=0.01)
    for step in tqdm(range(steps), desc="toy recogniser: training", unit="step", leave=False):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        pick, knob = torch.randint(len(mels), (16,)), lambda: torch.rand(16, 1, 1)
        mel = torch.logaddexp(mels[pick] + 2 * knob() - 1, -11 + 4 * knob())
        said, voice = listener(mel + 0.3 * knob() * torch.randn(mel.shape))
        loss = (F.cross_entropy(said.flatten(0, 1), phones[pick].flatten()) + 0.5 * F.mse_loss(voice[:, :2], voices[pick, :2])
                + 0.3 * F.cross_entropy(voice[:, 2:], voices[pick, 2].long()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return listener


def load_listener():
    """The toy recogniser, trained now if it is not in the cache."""
    path, listener = cache_root() / f"listener-{VERSION}.pt", Listener()
    try:
        listener.load_state_dict(load(path)["listener"])
    except UserError:
        path.parent.mkdir(parents=True, exist_ok=True)
        listener = train_listener()
        save(path, listener=listener.state_dict())
    return listener.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# What only toy speech lets us know.

def words_in(phones, lexicon):
    """Cover a clip's phones with whole words of a lexicon {tuple of phones: number} as far as it goes; (S,) word numbers, -1 uncovered."""
    best, back = [0] * (len(phones) + 1), [None] * (len(phones) + 1)
    for end in range(1, len(phones) + 1):
        best[end] = best[end - 1]
        for size in {len(word) for word in lexicon}:
            word = lexicon.get(tuple(phones[end - size:end])) if size <= end else None
            if word is not None and best[end - size] + size > best[end]:
                best[end], back[end] = best[end - size] + size, (size, word)
    found, end = np.full(len(phones), -1), len(phones)
    while end:
        size, word = back[end] or (1, -1)
        found[end - size:end], end = word, end - size
    return found


def lexicons(toy):
    """One {word as a tuple of symbols: its number} per language."""
    return [{tuple(SYMBOLS[p] for p in word): i for i, word in enumerate(language.words)} for language in toy.languages]


def word_rate(clips, lexicons):
    """Share of the phones of all clips that whole words cover; one lexicon per clip."""
    return float(np.mean(np.concatenate([words_in(clip, lexicon) for clip, lexicon in zip(clips, lexicons)]) >= 0))


# ---------------------------------------------------------------------------------------------------------------------

def toy_run(folder, minutes, options, decode=True):
    config, model, autoencoder = load_run(folder)
    device, dtype = decide(config)
    model, autoencoder, toy = model.to(device), autoencoder.to(device), ToySpeech(config.toy_languages, config.toy_words)
    listener = load_listener()
    n, m = config.ctx_frames, config.gen_frames
    count = round(minutes * 60 * FRAME_RATE / m)
    waves, spoken = speak(toy, CONTEXTS, count, n + m, "contexts")
    mels = []
    for i in tqdm(range(0, count, 32), desc="speaking", unit="batch", leave=False):
        ctx = autoencoder.encode(waves[i:i + 32].to(device))[:, :n]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            frames = sample(model, ctx, seed=i, **options).float()
        mels.append(log_mel(autoencoder.decode(frames)) if decode else autoencoder.to_mel(frames) * autoencoder.mel_stats[1] + autoencoder.mel_stats[0])
    def read(mels):
        with torch.no_grad():
            said = [listener(mel)[0].argmax(2).numpy() for mel in mels]
        return [[SYMBOLS[p] for p, _, _ in spans(row)] for part in said for row in part]
    generated = read(m.cpu() for m in mels)
    true = read(log_mel(w) for w in waves[:, n * HOP:].split(32))
    real, _ = speak(toy, REFERENCE, 4 * count, m, "reference")
    reference = read(log_mel(w) for w in real.split(32))
    rows = compare(generated, reference, true)
    lex = [lexicons(toy)[u.language] for u in spoken]
    rng = np.random.default_rng(0)
    rates = {"value": word_rate(generated, lex), "ceiling": word_rate(true, lex), "floor": word_rate([rng.permutation(c).tolist() for c in true], lex)}
    rates["normalized"] = (rates["value"] - rates["floor"]) / (rates["ceiling"] - rates["floor"])
    return rows | {"phones": {"generated": sum(map(len, generated)), "reference": sum(map(len, reference))}, "recognizer": "toy", "toy": {"word_rate": rates}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run folder")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of speech to generate")
    parser.add_argument("--cfg", type=float, help="guidance")
    parser.add_argument("--steps", type=int, help="sampler steps")
    parser.add_argument("--cheap", action="store_true", help="skip the decoder")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    options = {k: v for k, v in (("cfg", args.cfg), ("steps", args.steps)) if v is not None}
    rows = toy_run(args.run, args.minutes, options, not args.cheap)
    print("n        " + "".join(f"{n:8d}" for n in rows["n"]))
    for name in ("pjsd", "floor", "floor_sd", "true"):
        print(f"{name:9s}" + "".join(f"{v:8.4f}" for v in rows[name]))
    print("excess   " + "".join(f"{v - f:8.4f}" for v, f in zip(rows["pjsd"], rows["floor"])))
    print("phones", rows["phones"], "words", rows["toy"]["word_rate"])
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
