"""cdslm: a spoken language model by continuous diffusion, in one file. No text anywhere: it hears speech and speaks on.

A reimplementation of "Scaling Properties of Continuous Diffusion Spoken Language Models" (Ramapuram et al., 2026,
arXiv 2604.24416), written to be read from top to bottom, in the order in which data flows:

    Config         one dataclass: every setting, its meaning, its flag
    (corpus.py)    recordings -> 24 kHz samples -> log-mel, 80 bands, 80 frames a second -> a cache -> windows
    Autoencoder    samples <-> frames; the decoder that turns frames back into sound is learned here
    Diffusion      noise schedules, what the network predicts, the loss
    MM-DiT         the network: two streams, context and continuation, one attention
    Sampler        noise -> speech: DDIM, DPM-Solver++(2M), guidance, window after window
    Optimiser      how learning rates follow from width and depth, schedules, averaged weights
    Checkpoints    written whole or not at all; the same command resumes
    Training       the loop, on one device or many (devices.py; lab/plan.py says beforehand what a run takes)
    main           the command line

    python cdslm.py --size tiny                         ten minutes on two CPU cores; then listen to out/tiny/*.wav
    python cdslm.py --size tiny --data my_recordings    the same on your own recordings
    python cdslm.py --size base --data librispeech      the paper's 36 M base, for one GPU

Marks in the comments: [paper] is stated there; CHOICE: the paper is silent; DEVIATION: we differ, and why.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import json
import math
import os
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from corpus import (DECODER_FFT, FRAME_RATE, HOP, MELS, UserError, check_data, check_room, griffin_lim, istft, keyed,
                    keyed_noise, lock, log_mel, low_griffin_lim, open_corpus, pitch, printable, pulses, replacing,
                    save_audio, stft, stft_distance, uniform, unmel)
from devices import (Ahead, check_launch, compiled, decide, from_rank_0, interruptible, keep_memory, rank_0_first,
                     ranks, shard, state_dicts, together)

LAUNCHED = time.perf_counter()
if __name__ == "__main__":
    sys.modules["cdslm"] = sys.modules["__main__"]  # what the lab imports is this program, not a second one

# ----------------------------------------------------------------------------------------------------------------------
# Config. One dial, the depth L: the width is 128 L [paper], heads are 64 wide, and `--size` names a depth with the
# window and the budget that suit it. Any field overrides it: `--steps 500`, `Config(size="tiny", steps=500)`.

PAPER = dict(ctx_seconds=10.0, gen_seconds=30.0, patch_size=4, predict="v", self_condition=0.0,
             min_snr_gamma=5.0, t_shift=0.0, optimizer="adamw")
# DEVIATION: on a laptop, predicting x0 in long patches, first guesses, a loss that is at high noise, where language is
# decided, and Muon reach words much sooner
LAPTOP = dict(patch_size=8, predict="x0", self_condition=0.5, min_snr_gamma=0.2, t_shift=1.0, optimizer="muon",
              batch_size=32)
SIZES = {
    "tiny": LAPTOP | dict(depth=4, width=192, ctx_seconds=1.0, gen_seconds=3.0, steps=4500, minutes=20.0),
    "small": LAPTOP | dict(depth=3, ctx_seconds=2.0, gen_seconds=6.0, steps=40_000),
    "base": PAPER | dict(depth=4, batch_size=64, steps=100_000),
    "medium": PAPER | dict(depth=8, batch_size=256, steps=200_000),
    "large": PAPER | dict(depth=12, batch_size=256, steps=300_000),
    "xl": PAPER | dict(depth=16, batch_size=512, steps=300_000),
    "11b": PAPER | dict(depth=27, batch_size=1024, steps=400_000),
    "16b": PAPER | dict(depth=30, batch_size=1024, steps=500_000),
}


def opt(default, text, *choices, above=None, least=None, most=10 ** 9, section=None):
    """A field of Config: its default, its meaning, what it may be, and the section of --help that begins with it."""
    limits = dict(above=above, least=least, most=most)
    return field(default=default, metadata=dict(text=text, choices=choices, section=section, **limits))


@dataclass
class Config:
    """Every setting of a run. A field left at None takes its value from `SIZES[size]`."""
    size: str = opt("tiny", "the one dial: how deep, and with it how wide, how long a window, how many steps", *SIZES)

    data: str = opt("toy", "folders of recordings, searched to any depth; toy: the built-in corpus", section="data")
    toy_words: int = opt(16, "toy speech: words in each invented language", least=2, most=1000)
    toy_languages: int = opt(2, "toy speech: how many languages", above=0, most=100)
    toy_hours: float = opt(3.0, "toy speech: hours to synthesise, 300 times faster than real time", above=0, most=9999)
    ctx_seconds: float = opt(None, "seconds of speech heard before the model speaks", above=0, most=3600)
    gen_seconds: float = opt(None, "seconds it learns to speak in one go", above=0, most=3600)

    latent_dim: int = opt(0, "0: diffuse log-mel (the paper); 16, say: diffuse that many learned latents a frame",
                          least=0, most=1000, section="sound")
    decoder: str = opt("neural", "frames to sound: learned, or Griffin-Lim (no training)", "neural", "griffinlim")
    decoder_steps: int = opt(300, "training steps of the learned decoder", least=0)

    depth: int = opt(None, "number of blocks L", above=0, most=256, section="network")
    width: int = opt(None, "model width d; 128 L (tiny: 192) unless you say otherwise", above=0, most=65536)
    patch_size: int = opt(None, "k consecutive frames make one token", above=0, most=1000)

    predict: str = opt(None, "the network predicts the velocity (the paper) or the clean frames", "v", "x0",
                       section="diffusion")
    self_condition: float = opt(None, "share of steps that see the network's own first guess (the paper: 0)", least=0)
    schedule: str = opt("cosine", "noise schedule", "cosine", "linear", "exponential")
    zero_terminal_snr: bool = opt(False, "noise all the way: no trace of speech is left at t = 1")
    min_snr_gamma: float = opt(None, "cap of the weight min(SNR, gamma); less counts texture less (paper: 5)", above=0)
    t_shift: float = opt(None, "train more at high noise, where language is decided: logit(t) plus this (the paper: 0)")
    ctx_drop: float = opt(0.0, "share of training contexts replaced by silence (the paper: none)", least=0)

    steps: int = opt(None, "optimiser steps; a larger number extends a finished run", above=0, section="training")
    minutes: float = opt(None, "without --steps: where the default takes longer, train for fewer steps (0: no limit)",
                         least=0)
    batch_size: int = opt(None, "windows a step, over all devices", above=0, most=1000000)
    micro_batch: int = opt(0, "windows a forward pass of a device, to save memory; 0: all of its share", least=0)
    optimizer: str = opt(None, "for the hidden matrices; all else is AdamW's, as in the paper", "adamw", "muon")
    lr: float = opt(1e-3, "AdamW learning rate of the base model (L = 4); other sizes follow by muP", above=0)
    muon_lr: float = opt(0.02, "Muon learning rate, the same at every width", above=0)
    weight_decay: float = opt(0.03, "AdamW weight decay of the base model", least=0)
    lr_schedule: str = opt("wsd", "warm-up, stable, linear decay; or warm-up and cosine", "wsd", "cosine")
    warmup: int = opt(100, "steps until the full learning rate", least=0)
    clip: float = opt(1.0, "largest gradient norm", above=0)
    ema: float = opt(0.999, "memory of the averaged weights that are evaluated and sampled from; 0: none", least=0)
    eval_every: int = opt(500, "steps between validations, each with a checkpoint", above=0)
    seed: int = opt(0, "everything random follows from this and the number of the sample", least=0, most=2 ** 63 - 1)

    out: str = opt(None, "run folder; out/SIZE unless you say otherwise", section="machine")
    device: str = opt("auto", "cuda, mps, cpu; auto takes the first there is")
    dtype: str = opt("auto", "of matrix products; auto is bf16 where the hardware has it", "auto", "bf16", "fp32")
    compile: bool = opt(False, "torch.compile the network, where that works")
    parallel: str = opt("ddp", "under torchrun, each device holds a copy of the model (DDP), or a shard (FSDP)", "ddp",
                        "fsdp")
    checkpoint_activations: bool = opt(False, "to save memory, keep only what enters a block, and compute it again")
    print_params: bool = opt(False, "say each parameter's shape, role, learning rate and weight decay, and stop")
    dry_run: bool = opt(False, "say what a run would be, and what it takes, and stop")
    devices: int = opt(0, "with --dry-run: on so many GPUs; 0: on this machine", least=0)
    tflops: float = opt(400.0, "with --dry-run: what each keeps up; 400 is two fifths of an H100's bf16 peak", above=0)
    json: bool = opt(False, "with --dry-run: say it as JSON")

    def __post_init__(self):
        if self.size not in SIZES:
            raise UserError(f"unknown size {self.size!r}; choose one of {', '.join(SIZES)}")
        if self.minutes is None and self.steps is not None:
            self.minutes = 0.0
        for name, value in ({"minutes": 0.0} | SIZES[self.size]).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.width = 128 * self.depth if self.width is None else self.width
        self.out = self.out or f"out/{self.size}"
        if isinstance(self.data, list) and len(self.data) == 1:
            self.data = self.data[0]
        for f in dataclasses.fields(self):
            self._check("--" + f.name.replace("_", "-"), getattr(self, f.name), **f.metadata)
        if self.ctx_drop > 1 or self.self_condition > 1 or self.ema >= 1:
            raise UserError("--ctx-drop and --self-condition must be at most 1, --ema less than 1")
        if not (self.ctx_frames and self.gen_frames):
            raise UserError(f"--ctx-seconds and --gen-seconds must hold at least one patch of {self.patch_size} frames")
        if self.width % (64 if self.width > 64 else 4):
            raise UserError(f"--width must be a multiple of 64 (below 64, of 4), not {self.width}")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise UserError(f"--micro-batch {self.micro_batch} must divide --batch-size {self.batch_size}")

    @staticmethod
    def _check(flag, value, choices, above, least, most, **_):
        if choices and value not in choices:
            raise UserError(f"{flag} is {value!r}; choose one of {', '.join(choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} must be a finite number")
        if above is not None and value <= above or least is not None and value < least:
            raise UserError(f"{flag} must be " + (f"at least {least}" if above is None else f"more than {above}"))
        if isinstance(value, int | float) and value > most:
            raise UserError(f"{flag} must be at most {most:g}")

    @property
    def ctx_frames(self):
        """Context length in frames, a whole number of patches."""
        return round(self.ctx_seconds * FRAME_RATE / self.patch_size) * self.patch_size

    @property
    def gen_frames(self):
        """Continuation length in frames, a whole number of patches."""
        return round(self.gen_seconds * FRAME_RATE / self.patch_size) * self.patch_size

    @property
    def channels(self):
        """Numbers a frame."""
        return self.latent_dim or MELS


# ----------------------------------------------------------------------------------------------------------------------
# Autoencoder. Samples <-> frames. With latent_dim = 0 (the paper) the encoder is the log-mel, only the decoder is
# learned; with latent_dim = 16, say, a variational bottleneck is learned between, and diffusion works on that. The
# decoder follows Vocos (Siuzdak, 2023): ConvNeXt blocks at the frame rate, magnitude and phase, one inverse STFT. But
# frames hold no phase, and a minute is too short to learn one. So the network shapes a source, as a vocal tract does
# (Dudley, 1939): a hum at the pitch heard in the frames, and a hiss. For each bin it says how loud, how harmonic, and
# how much of it hums. A few Griffin-Lim steps, most of them in the lowest bins, then make neighbours agree.


class ConvNeXt(nn.Module):
    """(B, C, T) -> (B, C, T): depthwise convolution over time, then an MLP over channels (Liu et al., 2022)."""

    def __init__(self, channels, scale):
        super().__init__()
        self.mix = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x):
        h = self.norm(self.mix(x).mT)                                       # (B, T, C)
        return x + (self.scale * self.down(F.gelu(self.up(h)))).mT


def convnext(before, after, width=128, blocks=3):
    """A network (B, before, T) -> (B, after, T)."""
    middle = [ConvNeXt(width, 1 / blocks) for _ in range(blocks)]
    return nn.Sequential(nn.Conv1d(before, width, 7, padding=3), *middle, nn.Conv1d(width, after, 1))


class AudioAutoencoder(nn.Module):
    """`encode(wave (B, N)) -> frames (B, T, C)`, `decode(frames) -> wave (B, 300 T)`; frames have mean 0, deviation 1:
    each latent its own, but one of each for all bands of log-mel, since a band may be dead (in 8 kHz recordings)."""

    def __init__(self, latent_dim=0, decoder="neural"):
        super().__init__()
        self.latent_dim, self.decoder, self.channels = latent_dim, decoder, latent_dim or MELS
        self.register_buffer("mel_stats", torch.tensor([-6.0, 3.0]))        # mean, standard deviation
        self.register_buffer("latent_stats", torch.tensor([0.0, 1.0]))
        if latent_dim:
            self.latent_stats = self.latent_stats[:, None].repeat(1, latent_dim)
            self.encoder, self.unlatent = convnext(MELS, 2 * latent_dim, blocks=2), convnext(latent_dim, MELS, blocks=2)
        if decoder == "neural":
            self.shaper = convnext(MELS + 2, 3 * (DECODER_FFT // 2 + 1))
            for parameter in self.shaper[-1].parameters():                  # begins as a vocoder that knows nothing
                nn.init.zeros_(parameter)

    def silence(self):
        """(C,) a frame of digital zero."""
        return self.encode(torch.zeros(1, 33 * HOP, device=self.mel_stats.device))[0, 16]

    def encode(self, wave):
        """(B, N) samples at 24 kHz -> (B, T, C) frames, T = ceil(N/300)."""
        return self.from_mel(log_mel(wave))

    def from_mel(self, mel):
        """(B, T, 80) log-mel, as cached -> (B, T, C) frames."""
        mel = (mel - self.mel_stats[0]) / self.mel_stats[1]
        if not self.latent_dim:
            return mel
        return (self.encoder(mel.mT).mT[..., :self.latent_dim] - self.latent_stats[0]) / self.latent_stats[1]

    def to_mel(self, frames):
        """(B, T, C) frames -> (B, T, 80) normalised log-mel."""
        if not self.latent_dim:
            return frames
        return self.unlatent((frames * self.latent_stats[1] + self.latent_stats[0]).mT).mT

    def spectrum(self, mel, noise, start=0, turns=0, dtype=torch.float32):
        """(B, T, 80) normalised log-mel, (1, 300 T) noise -> magnitudes (B, 601, T), a source whose phases they are to
        begin with (B, 601, T), and the hum's own phase (B, 300 T), which is `turns` at frame `start`."""
        mel, heard, hiss = mel * self.mel_stats[1] + self.mel_stats[0], mel, stft(noise, DECODER_FFT)
        if self.decoder == "griffinlim":
            return unmel(mel), hiss, noise
        magnitude = unmel(mel, 1)                                           # the network sees to the rest
        hertz, voiced = pitch(magnitude)                                    # (B, T) each
        hum, phase = pulses(hertz, start, turns)
        hum = stft(hum.to(mel.device), DECODER_FFT)
        ripple = hum.abs().clamp(min=1).log() - 3.5                         # large at a harmonic, small between two
        heard = torch.cat([heard, (hertz / 150).log()[..., None], voiced[..., None]], dim=-1)
        with torch.autocast(mel.device.type, dtype, enabled=dtype != torch.float32):
            loud, comb, hums = self.shaper(heard.mT.to(self.shaper[0].weight.dtype)).float().chunk(3, dim=1)
        magnitude = magnitude * (loud + comb * ripple).clamp(-8, 3).exp()
        return magnitude, hum * (hums + 8 * voiced[:, None] - 3).clamp(-8, 8).exp() + hiss, phase

    def decode(self, frames, piece=1600, margin=64):
        """(B, T, C) frames -> (B, 300 T) samples, in pieces that overlap by `margin` frames: memory stays bounded."""
        fits = frames.ndim == 3 and frames.shape[1] and frames.shape[2] == self.channels
        if not fits or not torch.isfinite(frames).all():
            wrong = "NaN or infinite values" if fits else tuple(frames.shape)
            raise UserError(f"decode takes finite frames (B, T, {self.channels}) with T > 0, not {wrong}")
        length, waves, turns = frames.shape[1], [], 0
        noise = torch.randn(1, HOP * length, generator=torch.Generator().manual_seed(0)).to(frames.device)
        for start in range(0, length, piece):
            stop, first, last = min(start + piece, length), max(0, start - margin), min(start + piece + margin, length)
            mel = self.to_mel(frames[:, first:last])
            magnitude, source, phase = self.spectrum(mel, noise[:, first * HOP:last * HOP], start - first, turns)
            turns = phase[:, (stop - first) * HOP - 1, None]                # the next piece hums on from here
            agree = low_griffin_lim if self.decoder == "neural" else griffin_lim
            wave = istft(agree(magnitude, source))
            waves.append(wave[:, (start - first) * HOP:(stop - first) * HOP])
        return torch.cat(waves, dim=1)

    def bottleneck_loss(self, wave, dtype=torch.float32, kl_weight=1e-3):
        """Of (B, N) samples: log-mel through the latents, and the latents' divergence from a standard normal. One of
        the windows is digital silence, which must come back as silence."""
        wave = torch.cat([wave[1:], torch.zeros_like(wave[:1])])
        mel = (log_mel(wave) - self.mel_stats[0]) / self.mel_stats[1]
        with torch.autocast(wave.device.type, dtype, enabled=dtype != torch.float32):
            mean, logvar = self.encoder(mel.mT).float().chunk(2, dim=1)     # (B, latent_dim, T) each
            again = self.unlatent(mean + torch.randn_like(mean) * (0.5 * logvar).exp()).float().mT
        return F.l1_loss(again, mel) + kl_weight * 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()

    def decoder_loss(self, wave, dtype=torch.float32):
        """Of (B, N) samples, decoded: log-mel, and STFT magnitudes at three resolutions."""
        target = log_mel(wave)
        mel = self.to_mel(self.from_mel(target)).detach()
        magnitude, source, _ = self.spectrum(mel, torch.randn_like(wave[:1]), dtype=dtype)
        guess = istft(griffin_lim(magnitude, source, 2))
        return 5 * F.l1_loss(log_mel(guess), target) + stft_distance(guess, wave)


# ----------------------------------------------------------------------------------------------------------------------
# Diffusion. Variance preserving: x_t = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, so a noise level is one angle
# phi: alpha = cos(phi), sigma = sin(phi), from clean (0) to noise (pi/2), and log-SNR = -2 log tan(phi). A schedule is
# how phi grows with t in [0, 1]. The network is told phi, not t: it means the same whatever the schedule.

CLEAN, NOISE = math.atan(math.exp(-5)), math.atan(math.exp(5))  # CHOICE: log-SNR is clipped to [-10, 10]


class Diffusion:
    """The forward process and the loss that a Config describes."""

    def __init__(self, config):
        self.schedule, self.zero_terminal_snr = config.schedule, config.zero_terminal_snr
        self.predict, self.gamma, self.shift = config.predict, config.min_snr_gamma, config.t_shift

    def alpha(self, t):
        """Signal level at time t, before clipping."""
        if self.schedule == "cosine":
            return torch.cos(math.pi / 2 * t)                     # Nichol & Dhariwal 2021, without their offset
        if self.schedule == "linear":
            return torch.exp(-0.05 * t - 19.9 / 4 * t ** 2)       # beta from 0.1 to 20: Song et al. 2021, Eq. 33
        return torch.sigmoid(10 - 20 * t).sqrt()                  # exponential: log-SNR falls evenly from 10 to -10

    def angle(self, t):
        """t in [0, 1], any shape -> phi. For zero terminal SNR alpha is rescaled to end at 0 (Lin et al. 2024)."""
        t = t.double()
        alpha, first, last = (self.alpha(x) for x in (t, torch.zeros_like(t), torch.ones_like(t)))
        if self.zero_terminal_snr:
            alpha = (alpha - last) * first / (first - last)
        last = math.pi / 2 if self.zero_terminal_snr else NOISE
        return torch.acos(alpha.clamp(0, 1)).clamp(CLEAN, last).float()

    def times(self, u):
        """Uniform u -> training times; DEVIATION if shifted towards high noise (Esser et al. 2024, section 5.3.2)."""
        return torch.sigmoid(torch.logit(u.clamp(1e-6, 1 - 1e-6)) + self.shift) if self.shift else u

    def target(self, x0, eps, phi):
        """What the network should say, (B, T, C): v = alpha eps - sigma x0 [paper], or x0 itself."""
        return x0 if self.predict == "x0" else phi.cos() * eps - phi.sin() * x0

    def clean(self, prediction, xt, phi):
        """What the network says, as an estimate of x0. From v: alpha x_t - sigma v (Salimans & Ho 2022, appendix D)."""
        return prediction if self.predict == "x0" else phi.cos() * xt - phi.sin() * prediction

    def weight(self, phi):
        """min-SNR weight (Hang et al. 2023): min(SNR, gamma) on x0, which on v is min(SNR, gamma) / (SNR + 1) [paper].
        At zero terminal SNR it is 0: that prediction is learned from its neighbours only."""
        snr = phi.tan() ** -2
        return snr.clamp(max=self.gamma) / (1 if self.predict == "x0" else snr + 1)

    def loss(self, model, x0, ctx, phi, eps, guess=False):
        """Weighted squared error (B,) of predicting x0 (B, T, C) after ctx (B, Tc, C) at noise level phi (B,).

        DEVIATION if `guess`: the network first guesses x0 and then sees its guess, as it will when sampling, where each
        step knows what the last one thought (self-conditioning, Chen et al. 2023)."""
        angle = phi[:, None, None]
        xt, first = angle.cos() * x0 + angle.sin() * eps, None
        if guess:
            with torch.no_grad():
                first = self.clean(model(xt, phi, ctx).float(), xt, angle)
            torch.clear_autocast_cache()                          # or torch < 2.10 would learn nothing through it
        prediction = model(xt, phi, ctx, first)
        return (self.weight(angle) * (prediction.float() - self.target(x0, eps, angle)) ** 2).mean((1, 2))


# ----------------------------------------------------------------------------------------------------------------------
# MM-DiT, the two-stream transformer of Stable Diffusion 3 (Esser et al. 2024) [paper]: context and continuation have
# weights of their own and meet in one bidirectional attention per block; the noise level modulates every normalisation
# (adaLN-zero, Peebles & Xie 2023). CHOICE: rotary positions that run through both, normalised queries and keys.

BASE_DEPTH, BASE_WIDTH = 4, 512  # the size at which learning rates are tuned [paper]


def linear(fan_in, fan_out, role, bias=False):
    """A linear layer that knows its role in the optimiser's table `ROLES`, and begins as that says."""
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    nn.init.normal_(layer.weight, std=ROLES[role][0] * fan_in ** -0.5)
    layer.role = role
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def modulate(x, shift, scale):
    """Normalise, then move as the noise level says: x (B, T, d) with (B, 1, d) each."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def rotary(tokens, size, device):
    """Cosines and sines (T, D/2) of the angles by which positions turn heads of size D."""
    speed = 10_000 ** -torch.linspace(0, 1, size // 2, device=device)
    angles = torch.arange(tokens, device=device)[:, None] * speed
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): x (..., T, D) with cos, sin (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def attention(q, k, v):
    """Softmax attention, each (B, H, T, D). On a CPU two plain products are 1.5 to 6 times faster, backward as well."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1).to(v.dtype) @ v


class Stream(nn.Module):
    """One stream's half of a block. A context that nobody reads again (`last`) ends with queries, keys and values."""

    def __init__(self, d, last=False):
        super().__init__()
        self.last = last
        self.adaln = linear(d, (2 if last else 6) * d, "adaln", bias=True)
        self.qkv = linear(d, 3 * d, "hidden")
        if not last:
            self.out = linear(d, d, "hidden")
            self.up, self.down = linear(d, 4 * d, "hidden"), linear(4 * d, d, "hidden")

    def open(self, x, c):
        """x (B, T, d), c (B, 1, d) -> queries, keys and values (B, T, 3d), and what `close` needs."""
        shift, scale, *rest = self.adaln(c).chunk(2 if self.last else 6, dim=-1)
        return self.qkv(modulate(x, shift, scale)), rest

    def close(self, x, attended, rest, scaled):
        """Add attention's result (B, T, d) to the stream, then the MLP's, each `scaled` for the depth."""
        gate, shift, scale, mlp_gate = rest
        x = x + scaled * gate * self.out(attended)
        return x + scaled * mlp_gate * self.down(F.gelu(self.up(modulate(x, shift, scale))))


class Block(nn.Module):
    """Both streams through one joint attention."""

    def __init__(self, d, heads, last):
        super().__init__()
        self.heads, self.ctx, self.gen = heads, Stream(d, last), Stream(d)

    def forward(self, ctx, gen, c, cos, sin, scaled):
        n = ctx.shape[1]
        (heard, ctx_rest), (spoken, gen_rest) = self.ctx.open(ctx, c), self.gen.open(gen, c)
        parts = [x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4) for x in (heard, spoken)]
        qk, v = torch.cat(parts, dim=3).split((2, 1))                          # (2, B, H, T, D), (1, B, H, T, D)
        attended = attention(*rotate(F.layer_norm(qk, qk.shape[-1:]), cos, sin), v[0]).transpose(1, 2)  # (B, T, H, D)
        gen = self.gen.close(gen, attended[:, n:].flatten(2), gen_rest, scaled)
        return None if self.ctx.last else self.ctx.close(ctx, attended[:, :n].flatten(2), ctx_rest, scaled), gen


class MMDiT(nn.Module):
    """model(xt (B, Tg, C), phi (B,) or (1,), ctx (B, Tc, C)) -> prediction (B, Tg, C), with Tc and Tg whole numbers of
    patches; or with an earlier guess of x0, like xt, as a fourth."""

    def __init__(self, config):
        super().__init__()
        d, k, heads = config.width, config.patch_size, max(1, config.width // 64)
        self.config, self.patch, self.again = config, k, config.checkpoint_activations
        self.register_buffer("silence", torch.zeros(config.channels))         # a frame of digital zero, for guidance
        self.enter_ctx, self.enter_gen = (linear(k * config.channels, d, "input", bias=True) for _ in range(2))
        self.enter_guess = linear(k * config.channels, d, "input") if config.self_condition else None
        self.noise_in, self.noise_out = linear(256, d, "input", bias=True), linear(d, d, "hidden", bias=True)
        self.blocks = nn.ModuleList(Block(d, heads, last=i == config.depth - 1) for i in range(config.depth))
        self.final = linear(d, 2 * d, "adaln", bias=True)
        self.leave = linear(d, k * config.channels, "output", bias=True)

    def embed(self, phi):
        """Noise level (B,) -> (B, 1, d): sines and cosines of 128 frequencies, then a small MLP."""
        wave = phi[:, None] * 1000 * 10_000 ** -torch.linspace(0, 1, 128, device=phi.device)
        wave = torch.cat([wave.cos(), wave.sin()], dim=-1).to(self.silence.dtype)
        return F.silu(self.noise_out(F.silu(self.noise_in(wave))))[:, None]

    def forward(self, xt, phi, ctx, guess=None):
        patches = lambda x: x.to(self.silence.dtype).unflatten(1, (-1, self.patch)).flatten(2)  # -> (B, T/k, k*C)
        c, ctx, gen = self.embed(phi), self.enter_ctx(patches(ctx)), self.enter_gen(patches(xt))
        if self.enter_guess is not None and guess is not None:
            gen = gen + self.enter_guess(patches(guess))
        head = gen.shape[-1] // self.blocks[0].heads
        cos, sin = (x.to(gen.dtype) for x in rotary(ctx.shape[1] + gen.shape[1], head, gen.device))
        for block in self.blocks:
            run = functools.partial(checkpoint, block, use_reentrant=False) if self.again else block
            ctx, gen = run(ctx, gen, c, cos, sin, RESIDUAL(len(self.blocks) / BASE_DEPTH))
        gen = self.leave(modulate(gen, *self.final(c).chunk(2, dim=-1)))
        return gen.unflatten(2, (self.patch, -1)).flatten(1, 2)                # (B, Tg/k, k*C) -> (B, Tg, C)


def count(config):
    """Parameters, tokens a window, and FLOPs of training on one: 2 a multiply-add, backward twice forward, but nothing
    is passed back to the input. A first guess costs a forward pass more; `flops` has its share of them."""
    d, L, kc = config.width, config.depth, config.patch_size * config.channels
    ctx, gen = config.ctx_frames // config.patch_size, config.gen_frames // config.patch_size
    enter = kc * d * (ctx + gen) + 256 * d                                              # multiply-adds from the input
    blocks = 12 * d * d * (gen * L + ctx * (L - 1)) + 3 * d * d * ctx + 2 * d * L * (ctx + gen) ** 2
    inner = blocks + d * d * (1 + 6 * (2 * L - 1) + 2 + 2) + kc * d * gen               # noise level, adaLN, output too
    forward, seen = 2 * (enter + inner), 2 * kc * d * gen * (config.self_condition > 0)  # the guess that it sees
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MMDiT(config).parameters())
    flops = 4 * enter + 6 * inner + config.self_condition * (forward + 2 * seen)
    return {"parameters": parameters, "tokens": ctx + gen, "flops": flops, "flops_guess": forward + 2 * seen,
            "flops_forward": forward + seen}


# ----------------------------------------------------------------------------------------------------------------------
# Sampler. From noise at the largest angle to clean frames at 0. Each step asks for x0; steps are the shorter the more
# noise there is, since language is decided there.

STEPS, CFG = 24, 2.0                          # evaluations a window, and guidance, unless one says otherwise
GUIDED = math.pi / 4, math.atan(math.exp(2))  # CHOICE: guidance only from log-SNR -4 to 0 (Kynkäänniemi et al. 2024)


def levels(config, steps):
    """The noise levels phi (steps + 1) that a sampler goes through, falling to 0."""
    top = min(float(Diffusion(config).angle(torch.ones(()))), math.pi / 2)  # float32 rounds pi/2 up
    return (top * (1 - torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 2.5)).tolist()


@torch.no_grad()
def sample(model, context, frames=None, steps=STEPS, cfg=CFG, sampler="dpm", seed=0, progress=False):
    """Continue `context` (B, Tc, C) by `frames` frames, by default one window -> (B, frames, C) on its device.

    `cfg` is the guidance, 1 for none. Beyond a window, what was said last is the next context. The noise of item i
    depends on (seed, i) alone."""
    config, speech, frames = model.config, context.float(), frames or model.config.gen_frames
    solve, shape = {"dpm": dpm_solver, "ddim": ddim}[sampler], (config.gen_frames, config.channels)
    for window in tqdm(range(-(-frames // config.gen_frames)), desc="speaking", unit="window", disable=not progress):
        predict = functools.partial(guided, model, speech[:, -config.ctx_frames:], cfg)
        noise = [keyed_noise(seed, f"sample {window}", item, shape, speech.device) for item in range(len(speech))]
        speech = torch.cat([speech, solve(predict, torch.stack(noise), levels(config, steps))], dim=1)
    return speech[:, context.shape[1]:context.shape[1] + frames]


def guided(model, ctx, cfg, xt, phi, guess):
    """x0 (B, Tg, C) as the network sees it in xt at noise phi; where `GUIDED`, silent + cfg (heard - silent) (Ho &
    Salimans 2021): `heard` continues ctx and `silent` zeroed speech [paper]. Nor does `silent` know the last guess:
    away from a network that knows less there are more words (autoguidance, Karras et al. 2024)."""
    guide = cfg != 1 and GUIDED[0] < phi < GUIDED[1]
    if guide:
        xt, ctx = xt.repeat(2, 1, 1), torch.cat([ctx, model.silence.expand_as(ctx)])
        guess = guess if guess is None else torch.cat([guess, torch.zeros_like(guess)])
    level = torch.full((1,), phi, device=xt.device)                           # the same for all
    x0 = Diffusion(model.config).clean(model(xt, level, ctx, guess).float(), xt, level)
    if not guide:
        return x0
    heard, silent = x0.chunk(2)
    return silent + cfg * (heard - silent)


def ddim(predict, x, angles):
    """Song et al. 2021, Eq. 12 without noise: keep the eps that x0 implies, go to the next angle."""
    x0 = None
    for phi, following in zip(angles, angles[1:]):
        x0 = predict(x, phi, x0)
        eps = (x - math.cos(phi) * x0) / math.sin(phi)
        x = math.cos(following) * x0 + math.sin(following) * eps
    return x


def dpm_solver(predict, x, angles):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): second order, from how x0 changed since the last step. The first
    step (from pure noise, h may be infinite) and the last are of first order. Where x0 goes is the next guess."""
    rate = [-math.log(math.tan(phi)) if phi else math.inf for phi in angles]  # half the log-SNR, whose steps are h
    before = better = None
    for i, (phi, following) in enumerate(zip(angles, angles[1:])):
        x0 = better = predict(x, phi, better)
        h = rate[i + 1] - rate[i]
        if before is not None and math.isfinite(h):
            better = x0 + (x0 - before) * h / (2 * (rate[i] - rate[i - 1]))
        x = math.sin(following) / math.sin(phi) * x + math.cos(following) * (1 - math.exp(-h)) * better
        before = x0
    return x


# ----------------------------------------------------------------------------------------------------------------------
# Optimiser. muP and CompleteP [paper]: what is tuned on the base (L = 4, d = 512) holds at every size, because the
# learning rate of each role follows the width m = d/512, and all else the depth L/4, as in this table. Roles that begin
# at 0 have a new model say 0. The spectral norm of Muon's updates is fixed: its rate needs no m (Bernstein 2025).

ROLES = {  # role: (initial deviation times root of the inputs, learning rate and weight decay relative to the base's)
    "input": (1, lambda m: 1, lambda m: 0),       # from frames or the noise level to the residual stream
    "hidden": (1, lambda m: 1 / m, lambda m: m),  # between widths: learning rate times decay stays the same
    "adaln": (0, lambda m: 1 / m, lambda m: 0),
    "output": (0, lambda m: 1 / m, lambda m: 0),
    "bias": (0, lambda m: 1, lambda m: 0),
}
RESIDUAL = lambda depth: 1 / depth                # what each branch is multiplied by; all roles have AdamW's
EPSILON = lambda m, depth: 1e-8 / (m * depth)     # epsilon in common: gradients shrink with the branches


def role(model, name):
    """The role of a parameter in `ROLES`, by its name. Every weight belongs to a layer that `linear` made."""
    layer, _, kind = name.rpartition(".")
    return "bias" if kind == "bias" else model.get_submodule(layer).role


def make_optimizers(model, config, dtype=torch.float32):
    """Optimisers over all parameters, by role; each group keeps its full learning rate as `peak`. Muon multiplies in
    `dtype`."""
    m, roles = config.width / BASE_WIDTH, {role: [] for role in ROLES}
    for name, parameter in model.named_parameters():
        roles[role(model, name)].append(parameter)
    matrices = roles.pop("hidden") if config.optimizer == "muon" else []
    groups = [dict(params=parameters, lr=config.lr * rate(m), weight_decay=config.weight_decay * decay(m))
              for role, parameters in roles.items() for _, rate, decay in [ROLES[role]]]
    epsilon = EPSILON(m, config.depth / BASE_DEPTH)
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=epsilon, fused=not next(model.parameters()).is_meta)]
    if matrices:
        decay = config.weight_decay * config.lr / config.muon_lr
        optimizers.append(Muon(matrices, config.muon_lr, decay, dtype=dtype))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


# CHOICE: four Newton-Schulz steps, each with the coefficients that are best after the steps before it, for singular
# values from 0.003 to 1 (Amsel et al. 2025, "The Polar Express"). The usual five bring them no closer to 1.
NEWTON_SCHULZ = ((8.3837, -24.7659, 18.3571), (4.0434, -3.0114, 0.5695), (3.5056, -2.6267, 0.5257),
                 (2.4901, -1.8343, 0.4368))


def orthogonalize(matrices, dtype):
    """(N, rows, columns) -> matrices with the same singular vectors, whose singular values are about 1, in `dtype`.

    Each step takes every singular value s to a s + b s^3 + c s^5, by products with a polynomial of a Gram matrix."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)                            # no s is larger than 1

    def gram():
        return x.mT @ x if tall else x @ x.mT

    def polynomial(gram, a, b, c):
        """a I + b gram + c gram^2"""
        result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        result.diagonal(dim1=1, dim2=2).add_(a)
        return result

    for coefficients in NEWTON_SCHULZ[:-2]:
        step = polynomial(gram(), *coefficients)
        x = x @ step if tall else step @ x

    # The last two steps share a Gram matrix, since polynomials of one matrix commute: a sixth of the time.
    start = gram()
    third = polynomial(start, *NEWTON_SCHULZ[-2])
    fourth = polynomial(third @ start @ third, *NEWTON_SCHULZ[-1])
    return x @ (third @ fourth) if tall else (fourth @ third) @ x


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal, so that a step changes every direction of a matrix alike (Jordan et
    al. 2024). Matrices of one shape are updated together. A state of torch.optim.Muon can be loaded."""

    def __init__(self, matrices, lr, weight_decay, momentum=0.95, dtype=torch.float32):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
            for matrices in shapes.values():
                self.update(matrices, **group)

    def update(self, matrices, lr, weight_decay, momentum, **_):
        """Update matrices (rows, columns) of one shape."""
        gradients = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]

        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch.stack(torch._foreach_lerp(gradients, buffers, momentum))        # Nesterov's momentum
        updates = orthogonalize(updates, self.dtype).to(matrices[0].dtype)

        rows, columns = matrices[0].shape
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        torch._foreach_add_(matrices, list(updates), alpha=-lr * max(1, rows / columns) ** 0.5)


def lr_factor(config, step):
    """Share of the full learning rate at a step: warm-up, then a cosine, or stable and at last a linear decay."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.lr_schedule == "cosine":
        return warm * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
    return warm * min(1.0, (config.steps - step) / (config.steps - decay_start(config.steps)))


def decay_start(steps):
    """The step at which wsd begins to decay (Hu et al. 2024): up to here, runs of different length are the same run."""
    return steps - math.ceil(steps / 4)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints. Tensors and plain values only, loaded with weights_only=True: a file from the internet can run no code.
# Written under a temporary name, flushed to the disk, then renamed: there is a whole checkpoint at every moment.

FREE = {"out", "steps", "minutes", "micro_batch", "eval_every", "device", "dtype", "compile", "parallel", "json",
        "checkpoint_activations", "print_params", "dry_run", "devices", "tflops"}  # may change when a run goes on


def save(path, **contents):
    """Save tensors and plain values; a file that was there becomes NAME.previous.pt."""
    with replacing(path, path.with_suffix(".previous.pt")) as temporary:
        torch.save({"format": "cdslm 1", **contents}, temporary)


def load(path, mmap=False):
    """What `save` wrote; `mmap` reads only what is used. Raises UserError if the file is damaged, or not ours."""
    try:
        with zipfile.ZipFile(path) as file:
            flipped = file.testzip()                                          # torch does not look at the checksums
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if contents.get("format") == "cdslm 1" and not flipped:
            return contents
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception:  # torch has half a dozen kinds of error for a damaged or foreign file, and one for code in it
        pass
    raise UserError(f"{path}: damaged, or not a cdslm checkpoint")


def newest(folder, config=None):
    """The newest readable checkpoint of a run, None if there is none yet. Given a config to go on with, the newest that
    its learning-rate schedule leads through: a run made longer goes back to where the decay began."""
    names = [name for name in ("checkpoint.pt", "checkpoint.previous.pt", "trunk.pt") if (folder / name).exists()]
    seen, fits = [], []
    if names and names[0] != "checkpoint.pt":
        print(f"warning: {folder}/checkpoint.pt is missing; trying {names[0]}")
    for name in names:
        try:
            seen.append(found := load(folder / name, mmap=config is None))
        except UserError as error:
            print(f"warning: {error}; trying the one before")
            seen.append(None)
            continue
        if config is not None and seen[0] is None and (folder / names[0]).exists():
            os.replace(folder / names[0], folder / f"{names[0]}.damaged")     # lest the next save move it over this one
        if config is None or found["steps"] == config.steps:
            return found
        wsd = config.lr_schedule == "wsd"
        if found["step"] <= (min(map(decay_start, (config.steps, found["steps"]))) if wsd else config.steps):
            fits.append(found)
    if fits:
        return max(fits, key=lambda found: found["step"])
    if seen and not any(seen):
        raise UserError(f"{folder}: none of its checkpoints can be read")
    if seen:
        raise UserError(f"{folder} is past what --steps {config.steps} can go on from, at step "
                        f"{max(found['step'] for found in seen if found)}; ask for more, or choose another --out")


def check_out(config):
    """Raise UserError unless the run folder is new, or of this configuration, with room for four checkpoints. A run
    that was shortened to fit `minutes` stays as short."""
    folder, mine = Path(config.out), dataclasses.asdict(config)
    if (folder / "config.json").exists():
        saved = read_config(folder)
        theirs = dataclasses.asdict(saved)
        differ = [f"{k} {theirs[k]} -> {mine[k]}" for k in mine if k not in FREE and theirs[k] != mine[k]]
        if differ:
            raise UserError(f"--out {folder} holds another run ({', '.join(differ)}); choose another --out")
        if config.minutes and saved.minutes:
            config.steps = saved.steps
    elif foreign := [*folder.glob("log.jsonl"), *folder.glob("[1-4]_*.wav")]:
        raise UserError(f"--out {folder} holds {foreign[0].name}, but no config.json of a run; choose another --out")
    there = sum(path.stat().st_size for path in folder.glob("*.pt"))
    check_room(folder, 4 * 16 * count(config)["parameters"] - there, "its checkpoints; choose another --out")


def claim(config):
    """Make the run folder ours: one run at a time. Returns the lock to hold."""
    folder = Path(config.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder / ".lock")
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    if held is None:
        raise UserError(f"--out {folder}: another run is writing there")
    return held


def read_config(folder):
    """Config of a run folder."""
    path = Path(folder) / "config.json"
    try:
        return Config(**json.loads(path.read_text()))
    except OSError:
        raise UserError(f"{folder}: no run there; train one with: python cdslm.py --size tiny --out {folder}") from None
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged, or not ours") from None


def write_config(folder, config):
    with replacing(Path(folder) / "config.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load_run(folder, device="cpu"):
    """A run folder -> config, model (averaged weights, in bf16 where hardware has it) and autoencoder, to speak."""
    folder, config = Path(folder), read_config(folder)
    device, dtype = decide(dataclasses.replace(config, device=str(device)))
    if (checkpoint := newest(folder)) is None:
        raise UserError(f"{folder}: no checkpoint yet")
    model, autoencoder = MMDiT(config), AudioAutoencoder(config.latent_dim, config.decoder)
    try:
        model.load_state_dict(checkpoint["ema"])
        autoencoder.load_state_dict(load(folder / "autoencoder.pt")["autoencoder"])
    except (RuntimeError, KeyError):
        raise UserError(f"{folder}: its checkpoints do not match its config.json") from None
    if (model.silence - autoencoder.silence()).abs().max() > 0.01:
        raise UserError(f"{folder}: its autoencoder.pt is not the one that its model learned from")
    model, autoencoder = model.to(device, dtype), autoencoder.to(device)
    if config.decoder == "neural":
        autoencoder.shaper.to(dtype)
    return config, model.eval().requires_grad_(False), autoencoder.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Training: of the autoencoder, in a minute, then of the network. What a step does depends on the weights and on the
# step's number alone: see `keyed`. Under torchrun this program runs once a device, as so many ranks: each takes its
# share of every batch, and rank 0 writes.

WARM, TRIAL = 10, 40  # steps from which and up to which the speed is measured
ANGLES = [math.pi / 2 * (i + 0.5) / 10 for i in range(10)]  # where validation looks, whatever schedule is trained


def fit_autoencoder(config, corpus, device):
    """Set the frame statistics, then train the bottleneck, if there is one, and the decoder; deterministic."""
    torch.manual_seed(config.seed)
    model = AudioAutoencoder(config.latent_dim, config.decoder)
    model.mel_stats.copy_(torch.tensor(corpus.mel_stats()[:2]))
    model, dtype = model.to(device), decide(config)[1]
    if config.latent_dim:
        train_part(model, model.bottleneck_loss, "bottleneck", 4 * config.decoder_steps, config, corpus, dtype)
        with torch.no_grad():                                               # diffusion expects deviation 1
            keys = [keyed(config.seed, "latents", i) for i in range(256)]
            latents = model.from_mel(torch.from_numpy(corpus.windows("mel", "train", keys, 48)).to(device))
        model.latent_stats.copy_(torch.stack([latents.mean((0, 1)), latents.std((0, 1))]))
    if config.decoder == "neural":
        train_part(model, model.decoder_loss, "decoder", config.decoder_steps, config, corpus, dtype)
    return model.eval().requires_grad_(False)


def train_part(model, loss_of, name, steps, config, corpus, dtype):
    """AdamW under a cosine for the part of the autoencoder that this loss reaches."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.99), weight_decay=0.01)
    for step in (bar := tqdm(range(steps), desc=name, unit="step")):
        keys = [keyed(config.seed, name, step * 16 + i) for i in range(16)]
        loss = loss_of(torch.from_numpy(corpus.windows("audio", "train", keys, 48)).to(model.mel_stats.device), dtype)
        decay = 0.02 + 0.98 * math.cos(math.pi / 2 * step / steps) ** 2
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * decay
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def open_autoencoder(config, corpus, device):
    """The run's autoencoder, trained now if it isn't there yet; kept beside it are a few held-out windows to hear."""
    path = Path(config.out) / "autoencoder.pt"
    if not path.exists():
        model = fit_autoencoder(config, corpus, device)
        keys = [keyed(0, "example", i) for i in range(8)]
        examples = corpus.windows("audio", "valid", keys, config.ctx_frames + config.gen_frames)
        save(path, autoencoder=model.state_dict(), examples=torch.from_numpy(examples * 32767).short())
    model = AudioAutoencoder(config.latent_dim, config.decoder)
    try:
        model.load_state_dict(load(path)["autoencoder"])
    except (RuntimeError, KeyError):
        raise UserError(f"{path}: not this run's: of another --latent-dim or --decoder") from None
    return model.to(device).eval().requires_grad_(False)


class Trainer:
    """A model in training: its weights, their average, the optimisers, and the batches they learn from."""

    def __init__(self, config, corpus, autoencoder, device, dtype):
        self.config, self.corpus, self.autoencoder, self.device, self.dtype = config, corpus, autoencoder, device, dtype
        (self.rank, self.ranks), self.sharded, self.size = ranks(), config.parallel == "fsdp", count(config)
        self.share = config.batch_size // self.ranks
        torch.manual_seed(config.seed)
        with torch.device("meta" if self.sharded and self.rank else "cpu"):
            model = MMDiT(config)
        model.silence.copy_(autoencoder.silence())
        self.model, self.ema = (shard(model, device, dtype) if self.sharded else copy.deepcopy(model).to(device)
                                for _ in range(2))
        self.ema.eval().requires_grad_(False)
        self.network = self.model
        if dist.is_initialized() and not self.sharded:                        # without a guess, some weights are idle
            self.network = DistributedDataParallel(self.model, gradient_as_bucket_view=True,
                                                   find_unused_parameters=config.self_condition > 0)
        self.network = compiled(self.network, device) if config.compile else self.network
        self.diffusion, self.optimizers = Diffusion(config), make_optimizers(self.model, config, dtype)
        self.paper = Diffusion(dataclasses.replace(config, min_snr_gamma=5.0))
        state_dicts().get_optimizer_state_dict(self.model, self.optimizers)   # makes their state by an empty step ...
        for state in [state for optimizer in self.optimizers for state in optimizer.state.values() if "step" in state]:
            state["step"].zero_()                                             # ... which must not count
        self.window = window = functools.partial(corpus.windows, "mel", frames=config.ctx_frames + config.gen_frames)
        seed, shape = config.seed, (config.gen_frames, config.channels)
        self.read = Ahead(lambda part: (window("train", [keyed(seed, "window", i) for i in part]),
                                        torch.stack([keyed_noise(seed, "noise", i, shape, device) for i in part])))
        self.done, self.guessed, self.skipped, self.failed = 0, 0, 0, 0       # steps: guessing, not finite, in a row
        self.signals, self.stopped = [], False                                # this rank's; whether any rank has one

    def precision(self):
        """The context in which the network runs: bf16 matrix products, float32 weights."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def frames(self, mel):
        """Log-mel windows (B, Tc + Tg, 80) as context (B, Tc, C) and continuation (B, Tg, C) on the device."""
        frames = self.autoencoder.from_mel(self.send(torch.from_numpy(mel)))
        return frames.split((self.config.ctx_frames, self.config.gen_frames), dim=1)

    def send(self, tensor):
        """To the device, without waiting for it."""
        return (tensor.pin_memory() if self.device.type == "cuda" else tensor).to(self.device, non_blocking=True)

    def batch(self, part, size):
        """Windows `part` to `part + size` of a step's batch: x0 (B, Tg, C), context, noise level (B,), noise like x0.
        Times are stratified over the whole batch: each window draws from a share of its own."""
        c = self.config
        numbers = range(self.done * c.batch_size + part, self.done * c.batch_size + part + size)
        ahead = size if (part + size) % self.share else size + c.batch_size - self.share   # over other ranks' shares
        mel, eps = self.read(numbers, range(numbers.start + ahead, numbers.stop + ahead))
        ctx, x0 = self.frames(mel)
        dropped = torch.tensor([uniform(c.seed, "drop", i) < c.ctx_drop for i in numbers])
        u = (torch.arange(part, part + size) + uniform(c.seed, "time", self.done)) / c.batch_size
        phi, dropped = self.send(self.diffusion.angle(self.diffusion.times(u))), self.send(dropped[:, None, None])
        return x0, torch.where(dropped, self.model.silence, ctx), phi, eps

    def accumulating(self, last):
        """Ranks exchange gradients once a step, in the last of its backward passes."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext() if last else getattr(self.network, "no_sync", contextlib.nullcontext)()

    def step(self):
        """One optimiser step -> its line in the log. If its loss or gradient is not finite it changes no weight."""
        c, micro = self.config, self.config.micro_batch or self.share
        guess = uniform(c.seed, "guess", self.done) < c.self_condition
        self.guessed += guess
        total, end = torch.zeros(2, device=self.device), (self.rank + 1) * self.share  # of all ranks: loss, signals
        for part in range(end - self.share, end, micro):
            x0, ctx, phi, eps = self.batch(part, micro)
            with self.accumulating(last=part + micro == end):
                with self.precision():
                    loss = self.diffusion.loss(self.network, x0, ctx, phi, eps, guess).sum() / c.batch_size
                (loss * self.ranks).backward()                                # what is exchanged is the average
            total[0] += loss.detach()
        total[1] = len(self.signals)
        if dist.is_initialized():
            dist.all_reduce(total)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        norm = norm.full_tensor() if self.sharded else norm
        loss, self.stopped, norm = torch.stack([*total, norm]).tolist()       # the one wait for the device
        factor = lr_factor(c, self.done)
        if math.isfinite(loss + norm):
            self.failed = 0
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                optimizer.step()
            decay = min(c.ema, (1 + self.done) / (10 + self.done))            # a short memory at first
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        else:
            self.skipped += 1
            self.failed += 1
            if self.failed == 10:
                raise UserError("ten steps in a row without a finite loss; the last checkpoint is whole. Try a lower "
                                "--lr or --muon-lr, or --dtype fp32")
        self.model.zero_grad(set_to_none=True)
        self.done += 1
        windows = self.done * c.batch_size
        hours = windows * (c.ctx_frames + c.gen_frames) / FRAME_RATE / 3600
        return {"step": self.done, "loss": loss, "gradient": norm, "lr": c.lr * factor, "skipped": self.skipped,
                "tokens": windows * self.size["tokens"], "flops": windows * self.size["flops"] + c.batch_size *
                (self.guessed - c.self_condition * self.done) * self.size["flops_guess"],       # as they were drawn
                "hours": hours, "epochs": hours / self.corpus.hours("train")}

    @torch.no_grad()
    def validate(self, number=64):
        """Loss of the averaged weights on fixed held-out windows and noise, {log-SNR: loss} at ten angles; "mean" is
        the paper's loss under the cosine schedule, whatever was trained, so that runs compare."""
        mine = range(self.rank, -(-number // self.ranks) * self.ranks, self.ranks)  # as many for each rank, to the end
        ctx, x0 = self.frames(self.window("valid", [keyed(0, "validation", i) for i in mine]))
        eps = torch.stack([keyed_noise(0, "validation", i, x0.shape[1:], self.device) for i in mine])
        size, losses = self.config.micro_batch or self.share, []
        for angle in ANGLES:
            parts = [part.split(size) for part in (x0, ctx, torch.full((len(mine),), angle, device=self.device), eps)]
            with self.precision():
                loss = torch.cat([self.paper.loss(self.ema, *part) for part in zip(*parts)])
            losses.append(loss[:len(range(self.rank, number, self.ranks))].sum() / number)
        losses = torch.stack(losses)
        if dist.is_initialized():
            dist.all_reduce(losses)
        levels = [f"{-2 * math.log(math.tan(angle)):.1f}" for angle in ANGLES]
        return {"mean": losses.mean().item()} | dict(zip(levels, losses.tolist()))

    def save(self, path):
        """Write a checkpoint: full state dicts, gathered in rank 0's memory, the same for any number of ranks."""
        tools = state_dicts()
        options = tools.StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer = tools.get_optimizer_state_dict(self.model, self.optimizers, options=options)
        model, ema = (tools.get_model_state_dict(model, options=options) for model in (self.model, self.ema))
        if self.rank == 0:
            save(path, step=self.done, steps=self.config.steps, skipped=self.skipped, model=model, ema=ema,
                 optimizer=optimizer)

    def restore(self, found):
        """Go on from a checkpoint that rank 0 has loaded, if there is one; for the other ranks `found` is None."""
        done = torch.tensor([found["step"], found["skipped"]] if found else [0, 0], device=self.device)
        if dist.is_initialized():
            dist.broadcast(done, 0)
        self.done, self.skipped = done.tolist()
        self.guessed = sum(uniform(self.config.seed, "guess", i) < self.config.self_condition for i in range(self.done))
        if self.done:
            found = found or {"model": {}, "ema": {}, "optimizer": {}}
            tools, options = state_dicts(), from_rank_0()
            tools.set_model_state_dict(self.model, found["model"], options=options)
            tools.set_model_state_dict(self.ema, found["ema"], options=options)
            for group in found["optimizer"].get("param_groups", []):
                if "ns_steps" in group:                                       # a run that torch.optim.Muon began
                    for name in ("nesterov", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn"):
                        group.pop(name, None)
            try:
                tools.set_optimizer_state_dict(self.model, self.optimizers, found["optimizer"], options=options)
            except KeyError as error:
                raise UserError(f"its checkpoint holds the state of another optimiser ({error}); choose another --out"
                                ) from None


def train(config):
    """From a config to a run folder full of sound. The same config goes on where it stopped."""
    from lab import plan
    device, dtype = decide(config)
    check_launch(config)                                                      # flags, folders, room, and then the rest
    check_data(config)
    check_out(config)
    plan.afford(config, device, dtype)
    with together() as rank, contextlib.nullcontext() if rank else claim(config):
        plan.announce(config, device, dtype)
        with rank_0_first():                                                  # it makes what the others then find
            corpus = open_corpus(config)
            if rank == 0 and not (Path(config.out) / "config.json").exists():
                write_config(config.out, config)                              # whose folder this is, from now on
            autoencoder = open_autoencoder(config, corpus, device)
        trainer = Trainer(config, corpus, autoencoder, device, dtype)
        with interruptible() as trainer.signals:
            learn(trainer, Path(config.out))
        if trainer.stopped:
            print(f"stopped after step {trainer.done}; the same command goes on from there")
            raise SystemExit(128 + (trainer.signals or [signal.SIGTERM])[0])
        if not rank:
            del trainer
            gc.collect()                                                      # its memory may be needed now
            listen(config.out, device)


def keep_to_time(config, done, seconds):
    """Print how long training takes at `seconds` a step. At the start of a run that was given no --steps, have it take
    no more than `minutes`, counted from the launch."""
    spent, left = (time.perf_counter() - LAUNCHED) / 60, (config.steps - done) * seconds / 60
    if config.minutes and config.lr_schedule == "wsd" and not dist.is_initialized() and done == TRIAL:
        affordable = (0.85 * config.minutes - spent) * 60 / seconds    # the rest: validation, sound, a slower machine
        if affordable < config.steps - done:
            full, config.steps = config.steps, max(2 * done, int(done + affordable) // 100 * 100)
            tqdm.write(f"{full} steps would take {left:.0f} minutes here: training for {config.steps} instead; for all "
                       f"of them add --steps {full}")
            left = (config.steps - done) * seconds / 60
    tqdm.write(f"about {left:.1f} minutes of training, at {seconds:.3f} s a step")


def learn(trainer, folder):
    """The loop: steps, a line of log.jsonl for each, and now and then a validation and a checkpoint."""
    config, rate = trainer.config, trainer.config.batch_size * (trainer.config.ctx_frames + trainer.config.gen_frames)
    trainer.restore(None if trainer.rank else newest(folder, config))
    if trainer.done:
        print(f"going on from step {trainer.done}")
    if trainer.rank == 0:
        write_config(folder, config)                                          # it may ask for more steps than before
        trim_log(folder / "log.jsonl", trainer.done)
    first, shown = trainer.done, {}

    def keep(name):                                                           # what is saved is in the log already
        if trainer.rank == 0:
            log.flush()
            os.fsync(log.fileno())
        trainer.save(folder / name)

    with (tqdm(initial=first, total=config.steps, desc="training", unit="step", disable=trainer.rank > 0) as bar,
          open(os.devnull if trainer.rank else folder / "log.jsonl", "a") as log):
        begun = time.perf_counter()
        while trainer.done < config.steps and not trainer.stopped:
            if config.lr_schedule == "wsd" and trainer.done == decay_start(config.steps):
                keep("trunk.pt")                                              # a longer run will go on from here
            row = trainer.step()
            if trainer.done == first + WARM:
                warm = time.perf_counter()
            if trainer.done == first + TRIAL and trainer.rank == 0:
                keep_to_time(config, trainer.done, (time.perf_counter() - warm) / (TRIAL - WARM))
                bar.total = config.steps
                write_config(folder, config)
            row["frames/s"] = (trainer.done - first) * rate / (time.perf_counter() - begun)
            due = trainer.done == config.steps or trainer.done % config.eval_every == 0
            if due:
                row["valid"] = trainer.validate()
                shown["valid"] = f"{row['valid']['mean']:.4f}"
            if trainer.done % 10 == 0:
                shown["loss"] = f"{row['loss']:.4f}"
                bar.set_postfix(shown, refresh=False)
            log.write(json.dumps(row) + "\n")
            bar.update()
            if due or trainer.stopped:
                keep("checkpoint.pt")


def trim_log(path, step):
    """Drop what the log says of steps after `step`: they will be done again."""
    if path.exists():
        whole = [row for row in path.read_text().splitlines(True) if row.endswith("}\n")]
        rows = [row for row in whole if json.loads(row)["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(rows))


def listen(folder, device="cpu", number=4):
    """Leave sound to judge by: for a few held-out windows the context with the model's continuation, with the true one,
    and the true one as the autoencoder gives it back."""
    folder, (config, model, autoencoder) = Path(folder), load_run(folder, device)
    waves = load(folder / "autoencoder.pt")["examples"][:number].float().to(device) / 32767
    frames = autoencoder.encode(waves)
    context = frames[:, :config.ctx_frames]
    speech = autoencoder.decode(torch.cat([context, sample(model, context, progress=True)], dim=1))
    for kind, sounds in {"generated": speech, "true": waves, "reconstruction": autoencoder.decode(frames)}.items():
        for i, wave in enumerate(sounds, 1):
            save_audio(folder / f"{i}_{kind}.wav", wave)
    print(f"listen to {folder}/1_generated.wav: {config.ctx_seconds:g} s of a held-out recording, then the model; "
          f"1_true.wav is how it really went on, 1_reconstruction.wav what the decoder alone costs.\n"
          f"next: python sample.py {folder} --num 8 --seconds 10      then: python eval_pjsd.py {folder}")
    open_page(folder, config)


def open_page(folder, config, *written):
    """Write the listening page, if the lab is there (see `lab.page.write_page`)."""
    try:
        from lab.page import write_page
    except ModuleNotFoundError:
        print("(lab/page.py is not here: no index.html is written)")
        return
    write_page(folder, config, *written)


# ----------------------------------------------------------------------------------------------------------------------
# main. The command line is the dataclass.

class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(argv=None):
    """Command line -> Config."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    group = parser
    for f in dataclasses.fields(Config):
        meta, flag = f.metadata, "--" + f.name.replace("_", "-")
        group = parser.add_argument_group(meta["section"]) if meta["section"] else group
        text = meta["text"] + (f" [{f.default}]" if f.default not in (None, False) else "")
        if f.type is bool:
            group.add_argument(flag, action="store_true", help=text)
        else:
            metavar = "|".join(meta["choices"]) if meta["choices"] else f.type.__name__.upper()
            group.add_argument(flag, type=f.type, default=f.default, metavar=metavar, help=text,
                               nargs="+" if f.name == "data" else None)
    return Config(**vars(parser.parse_args(argv)))


def cli(main):
    """Run a program's `main`: a user's mistake, or the disk's, is one line and exit status 2; SIGTERM is as Ctrl-C."""
    def terminated(number, frame):
        raise KeyboardInterrupt(number)

    keep_memory()
    signal.signal(signal.SIGTERM, terminated)
    try:
        main()
    except torch.OutOfMemoryError:
        print("error: out of memory; try a smaller --micro-batch, or --checkpoint-activations", file=sys.stderr)
        sys.exit(2)
    except (UserError, OSError) as error:
        if ranks()[0] == 0 or dist.is_initialized():                          # what all ranks are told, one says
            print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print("stopped; the same command goes on from what is done", file=sys.stderr)
        sys.exit(128 + (stopped.args or [signal.SIGINT])[0])


def main():
    from lab import plan
    config = parse()
    (plan.dry_run if config.dry_run else plan.print_params if config.print_params else train)(config)


if __name__ == "__main__":
    cli(main)
