"""kept: what of a context does generated toy speech keep? Each measure by itself, so that each can
fail.

The toy recogniser (`lab/listener.py`) reads a voice from a clip: pitch, vocal tract, pitch range
and tempo. In toy speech some of them go together: high voices have short vocal tracts, and the
tempo is that of the style times that of the speaker. Here they are taken apart. Of the vocal tract
the recogniser knows little but what the pitch tells of it; tract and breath are therefore read from
the vowels by a linear estimate, fitted to other toy speech.

    tract_kept     the vocal tract, less what the pitch tells of it
    breath_kept    how breathy the voice is
    rate_kept      the speaker's tempo, compared with speakers in the same style
    style_kept     the style, by pitch range alone

Each is the share of other clips whose truth a clip is farther from than from its own: 1 for the
very voice, 0.5 for any.
"""
import numpy as np
import torch

from cdslm import log_mel
from lab.listener import batched, speak, voice_truth
from lab.toyspeech import VOWELS, ToySpeech

CLIPS = 400                            # that the estimate of breath is fitted to
CLIP_FRAMES = 320
RIDGE = 3.0
SHIFTS = 8                             # other contexts, for the floor


def spectra(mel):
    """Log-mels (B, T, 80) -> (B, T, 158): each frame, and how uneven it is from band to band, as
    harmonics make it."""
    mel = mel.float().cpu()
    below, above = mel[..., :-2], mel[..., 2:]
    uneven = (below + above - 2 * mel[..., 1:-1]).abs()                       # (B, T, 78)
    return torch.cat([mel, uneven], dim=2).numpy()


class VoiceMeter:
    """Ridge regression (Hoerl & Kennard 1970) from the vowels of a clip to the logarithm of its
    breath and to its vocal tract, less what the pitch tells of it. Of each vowel its mean spectrum
    is subtracted, so that it does not matter which ones a clip has."""

    def __init__(self, listener):
        toy = ToySpeech(languages=8, words=40, seed=1)        # what the recogniser learned from
        waves, spoken = speak(toy, 0, CLIPS, CLIP_FRAMES, "voices: speech")
        mel = batched(log_mel, waves)
        frames = listener.hear(mel)["frames"]
        rows = spectra(mel)

        # The mean spectrum of each vowel.
        self.means = {}
        for phone in VOWELS:
            there = frames == phone
            if there.any():
                self.means[phone] = rows[there].mean(0)

        # The regression.
        features = self.features(mel, frames)                 # (B, 158)
        self.mean = features.mean(0)
        self.scale = features.std(0) + 1e-3
        x = (features - self.mean) / self.scale
        target = np.stack([breath_truth(spoken), tract_truth(spoken)], axis=1)
        self.offset = target.mean(0)
        gram = x.T @ x + RIDGE * np.eye(x.shape[1])
        self.weights = np.linalg.solve(gram, x.T @ (target - self.offset))

    def features(self, mel, frames):
        """Log-mels (B, T, 80), recognised phones (B, T) -> (B, 158): the mean over vowels."""
        rows = spectra(mel)
        total = np.zeros((len(mel), 158))
        count = np.zeros((len(mel), 1))
        for phone, mean in self.means.items():
            there = (frames == phone)[..., None]              # (B, T, 1)
            total += ((rows - mean) * there).sum(1)
            count += there.sum(1)
        return total / np.maximum(1, count)

    def read(self, mel, frames):
        """(B, 2): logarithm of breath, vocal tract less what the pitch tells of it."""
        x = (self.features(mel, frames) - self.mean) / self.scale
        return x @ self.weights + self.offset


def tract_truth(spoken):
    """The scale of the formants, less what the pitch tells of it (B,)."""
    tract = np.array([u.speaker["tract"] for u in spoken])
    log_pitch = np.log([u.speaker["pitch"] for u in spoken])
    line = np.polyfit(log_pitch, tract, 1)
    return tract - np.polyval(line, log_pitch)


def breath_truth(spoken):
    """The logarithm of breath (B,)."""
    return np.log([u.speaker["breath"] for u in spoken])


def nearness(value, truth, group=None):
    """Share of the other clips' truths (B,) that a value (B,) is farther from than from its own,
    mean over clips. Clips with the same truth are not compared; with `group` (B,), only clips of
    the same group are."""
    apart = np.abs(value[:, None] - truth[None])                              # (B, B)
    own = np.diag(apart)[:, None]
    compared = truth[:, None] != truth[None]
    if group is not None:
        compared &= group[:, None] == group[None]
    if not compared.any():
        return 0.5
    nearer = (apart > own) + 0.5 * (apart == own)
    return float(nearer[compared].mean())


def standard(values):
    """Values (B,) with mean 0 and standard deviation 1: what a decoder does to all clips alike does
    not count."""
    return (values - values.mean()) / (values.std() + 1e-9)


def voice_kept(voice, breath, tract, spoken):
    """{measure: value} of recognised voices (B, 4), breath and tract (B,), against the truth of
    `spoken`."""
    _, _, pitch_range, tempo = voice.T
    _, _, true_range, true_tempo = voice_truth(spoken).T
    true_tract = standard(tract_truth(spoken))
    true_breath = standard(breath_truth(spoken))
    style = np.array([u.style for u in spoken])
    return {
        "tract_kept": nearness(standard(tract), true_tract),
        "breath_kept": nearness(standard(breath), true_breath),
        "rate_kept": nearness(tempo, true_tempo, style),
        "style_kept": nearness(pitch_range, true_range),
    }


def voice_rows(listener, spoken, generated, true):
    """{measure: value, ceiling, floor, normalized} of continuations, each side (recognised,
    log-mels (B, T, 80)). The ceiling is the true continuation, the floor that of other contexts."""
    meter = VoiceMeter(listener)
    read = []
    for recognised, mel in (generated, true):
        breath, tract = meter.read(mel, recognised["frames"]).T
        read.append((recognised["voice"], breath, tract))
    value = voice_kept(*read[0], spoken)
    ceiling = voice_kept(*read[1], spoken)
    others = []
    for i in range(1, max(2, min(SHIFTS + 1, len(spoken)))):
        others.append(voice_kept(*read[1], spoken[i:] + spoken[:i]))

    rows = {}
    for name, v in value.items():
        c = ceiling[name]
        f = float(np.mean([other[name] for other in others]))
        normalized = (v - f) / (c - f) if c != f else float("nan")
        rows[name] = {"value": v, "ceiling": c, "floor": f, "normalized": normalized}
    return rows
