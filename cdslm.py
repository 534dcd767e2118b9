"""cdslm: a spoken language model by continuous diffusion, in one file. No text anywhere: it hears speech and goes on speaking.

A reimplementation of "Scaling Properties of Continuous Diffusion Spoken Language Models" (Ramapuram et al., 2026,
arXiv 2604.24416), written to be read from top to bottom, in the order in which data flows:

    Config          one dataclass: every setting, its meaning, its flag
    Sound           a file -> 24 kHz samples -> 80 log-mel bands, 80 frames a second
    Autoencoder     samples <-> frames; the decoder that turns frames back into sound is learned here
    Data            recordings or toy speech -> a cache on disk -> windows of context + continuation
    Diffusion       noise schedules, what the network predicts, the loss
    MM-DiT          the network: two streams, context and continuation, one attention
    Sampler         noise -> speech: DDIM, DPM-Solver++(2M), guidance, window after window
    Optimiser       how learning rates follow from width and depth, schedules, averaged weights
    Checkpoints     written whole or not at all; the same command resumes
    Training        the loop
    main            the command line

    python cdslm.py --size tiny                         ten minutes on two CPU cores; then listen to out/tiny/*.wav
    python cdslm.py --size tiny --data my_recordings    the same on your own recordings
    python cdslm.py --size base --data librispeech      the paper's 36 M base, for one GPU

Marks in the comments: [paper] is stated there; CHOICE: the paper is silent; DEVIATION: we differ, and why.
"""
import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend: printed as one line, exit status 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Config. One dial, the depth: width is 128 times the depth [paper], heads are 64 wide, and `--size` names a depth with
# the window and the budget that suit it. Any field can be overridden: `--steps 500`, `Config(size="tiny", steps=500)`.

SIZES = {
    "tiny": dict(depth=2, ctx_seconds=1.0, gen_seconds=3.0, patch_size=8, predict="x0", optimizer="muon", batch_size=32, steps=5000),
    "small": dict(depth=3, ctx_seconds=2.0, gen_seconds=6.0, patch_size=8, predict="x0", optimizer="muon", batch_size=32, steps=40_000),
    "base": dict(depth=4, batch_size=64, steps=100_000),
    "medium": dict(depth=8, batch_size=256, steps=200_000),
    "large": dict(depth=12, batch_size=256, steps=300_000),
    "xl": dict(depth=16, batch_size=512, steps=300_000),
    "11b": dict(depth=27, batch_size=1024, steps=400_000),
    "16b": dict(depth=30, batch_size=1024, steps=500_000),
}
SIZES = {name: dict(ctx_seconds=10.0, gen_seconds=30.0, patch_size=4, predict="v", optimizer="adamw") | row for name, row in SIZES.items()}


def opt(default, text, *choices):
    return field(default=default, metadata={"text": text, "choices": choices})


@dataclass
class Config:
    """Every setting of a run. A field left at None takes its value from `SIZES[size]`."""
    size: str = opt("tiny", "the one dial: how deep, and with it how wide, how long a window and how many steps", *SIZES)
    # data
    data: str = opt("toy", "a folder of recordings, searched to any depth, or 'toy' for the built-in invented languages")
    toy_words: int = opt(16, "toy speech: words in each language")
    toy_languages: int = opt(2, "toy speech: how many languages")
    toy_hours: float = opt(3.0, "toy speech: hours to synthesise (about 500 times faster than real time)")
    ctx_seconds: float = opt(None, "seconds of speech heard before the model speaks")
    gen_seconds: float = opt(None, "seconds it learns to speak in one go")
    # sound
    latent_dim: int = opt(0, "0: diffuse log-mel frames, as the paper does; 16, say: diffuse learned latents of that many numbers a frame")
    decoder: str = opt("neural", "what turns frames into sound: a learned decoder, or Griffin-Lim, which needs no training", "neural", "griffinlim")
    decoder_steps: int = opt(600, "training steps of the learned decoder")
    # network
    depth: int = opt(None, "number of blocks L")
    width: int = opt(None, "model width d; 128 L unless you say otherwise")
    patch_size: int = opt(None, "k consecutive frames make one token")
    # diffusion
    predict: str = opt(None, "what the network predicts: the velocity (the paper) or the clean frames", "v", "x0")
    schedule: str = opt("cosine", "noise schedule", "cosine", "linear", "exponential")
    zero_terminal_snr: bool = opt(False, "noise all the way: no trace of speech left at t = 1")
    min_snr_gamma: float = opt(5.0, "cap of the loss weight min(SNR, gamma)")
    t_shift: float = opt(0.0, "train more at high noise, where language is decided: logit(t) is shifted by this")
    ctx_drop: float = opt(0.0, "share of training contexts replaced by silence (the paper: none)")
    # training
    steps: int = opt(None, "optimiser steps; a larger number extends a finished run")
    batch_size: int = opt(None, "windows per step, over all devices")
    micro_batch: int = opt(0, "windows per forward pass, to save memory; 0: all at once")
    optimizer: str = opt(None, "for the hidden matrices: AdamW (the paper) or Muon; all else is AdamW's", "adamw", "muon")
    lr: float = opt(1e-3, "AdamW learning rate of the base model (L = 4); other sizes follow by muP")
    muon_lr: float = opt(0.01, "Muon learning rate; the same for every width")
    weight_decay: float = opt(0.03, "AdamW weight decay of the base model")
    lr_schedule: str = opt("wsd", "warm-up, then stable with a linear decay at the end, or a cosine", "wsd", "cosine")
    warmup: int = opt(100, "steps until the full learning rate")
    clip: float = opt(1.0, "largest gradient norm")
    ema: float = opt(0.999, "averaging of the weights that are evaluated and sampled from; 0 turns it off")
    eval_every: int = opt(500, "steps between validations and checkpoints")
    seed: int = opt(0, "everything random follows from this and from the number of the sample")
    # machine
    out: str = opt(None, "run folder; out/SIZE unless you say otherwise")
    device: str = opt("auto", "cuda, mps, cpu; auto takes the first there is")
    dtype: str = opt("auto", "precision of the matrix products; auto is bf16 where the hardware has it", "auto", "bf16", "fp32")
    compile: bool = opt(False, "torch.compile the network")
    dry_run: bool = opt(False, "say what would be done, and stop")
    json: bool = opt(False, "with --dry-run: as JSON")

    def __post_init__(self):
        if self.size not in SIZES:
            raise UserError(f"unknown size {self.size!r}; choose one of {', '.join(SIZES)}")
        for name, value in SIZES[self.size].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.width = self.width or 128 * self.depth
        self.out = self.out or f"out/{self.size}"
        self.check()

    def check(self):
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise UserError(f"--{f.name.replace('_', '-')} is {value!r}; choose one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{f.name.replace('_', '-')} must be a finite number")
        positive = "depth width patch_size ctx_frames gen_frames steps batch_size lr muon_lr min_snr_gamma clip eval_every toy_hours toy_languages"
        natural = "latent_dim decoder_steps micro_batch weight_decay warmup seed"
        for name, bad in [(n, getattr(self, n) <= 0) for n in positive.split()] + [(n, getattr(self, n) < 0) for n in natural.split()]:
            if bad:
                flag = {"ctx_frames": "ctx_seconds", "gen_frames": "gen_seconds"}.get(name, name)
                raise UserError(f"--{flag.replace('_', '-')} must be {'positive' if name in positive.split() else 'at least 0'}")
        if self.toy_words < 2:
            raise UserError("--toy-words must be at least 2")
        if not (0 <= self.ctx_drop <= 1 and 0 <= self.ema < 1):
            raise UserError("--ctx-drop must be between 0 and 1, --ema at least 0 and less than 1")
        if self.width % 4 or (self.width > 64 and self.width % 64):
            raise UserError(f"--width must be a multiple of 64 (or of 4 below 64), not {self.width}")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise UserError(f"--micro-batch {self.micro_batch} must divide --batch-size {self.batch_size}")

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
        """Numbers per frame."""
        return self.latent_dim or MELS


# ---------------------------------------------------------------------------------------------------------------------
# Sound. Log-mel frames as in the paper: 24 kHz, window 1200 (50 ms), hop 300 (12.5 ms), 80 bands: 80 frames a second.
# CHOICE: FFT 2048, Slaney's mel scale from 0 to 12 kHz, magnitudes, natural logarithm with a floor at 1e-5.

RATE, HOP, WINDOW, FFT, MELS, FLOOR = 24_000, 300, 1200, 2048, 80, 1e-5
FRAME_RATE = RATE // HOP
AUDIO_FILES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".rf64", ".sph"}


def mel_bank(fft=FFT, bands=MELS, rate=RATE):
    """Slaney's triangles, each of unit area: (bands, fft/2 + 1). Linear below 1 kHz, logarithmic above (Auditory Toolbox, 1998)."""
    def to_hz(mel):
        return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
    top = 15 + 27 * math.log(rate / 2 / 1000) / math.log(6.4)
    edges = to_hz(torch.linspace(0, top, bands + 2, dtype=torch.float64))
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = torch.linspace(0, rate / 2, fft // 2 + 1, dtype=torch.float64)
    triangles = torch.minimum((bins - low) / (mid - low), (high - bins) / (high - mid)).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


def stft(wave, fft=FFT, hop=HOP, window=WINDOW):
    """(B, N) -> (B, fft/2 + 1, ceil(N/hop)) complex, frame i centred on sample i * hop; N is padded with zeros to whole frames."""
    frames = -(-wave.shape[-1] // hop)
    wave = F.pad(wave, (fft // 2, frames * hop - wave.shape[-1] + fft // 2))
    return torch.stft(wave, fft, hop, window, torch.hann_window(window, device=wave.device), center=False, return_complex=True)[..., :frames]


def mel_spectrogram(wave):
    """(B, N) samples at 24 kHz -> (B, T, 80) mel magnitudes, T = ceil(N/300)."""
    return torch.einsum("bft,mf->btm", stft(wave).abs(), mel_bank().to(wave.device))


def log_mel(wave):
    """(B, N) samples at 24 kHz -> (B, T, 80) log-mel frames, T = ceil(N/300). Digital silence is log(1e-5) in every band."""
    return mel_spectrogram(wave).clamp(min=FLOOR).log()


def resample(wave, rate, new_rate=RATE, width=24, rolloff=0.94):
    """(N,) at `rate` Hz -> (ceil(N * new_rate / rate),) by windowed-sinc interpolation with anti-aliasing.

    The kernel is a sinc under a Kaiser window (beta 9, about 90 dB), `width` zero crossings a side; one phase of it for each of the
    output positions between two input samples that coincide (Smith, "Digital Audio Resampling", 2002)."""
    if rate == new_rate:
        return wave
    ratio = Fraction(new_rate, rate).limit_denominator(2000)  # odd rates: within 3e-7, and a table of bounded size
    new, old = ratio.numerator, ratio.denominator
    scale = min(new / old, 1) * rolloff                       # cut-off, as a share of the input's Nyquist frequency
    reach = math.ceil(width / scale)
    time = torch.arange(-reach, reach + old, dtype=torch.float64)[None] - torch.arange(new, dtype=torch.float64)[:, None] * old / new
    taper = torch.special.i0(9 * (1 - (time / (width / scale)) ** 2).clamp(min=0).sqrt()) / torch.special.i0(torch.tensor(9.0, dtype=torch.float64))
    kernel = (scale * torch.sinc(scale * time) * taper * (time.abs() < width / scale)).float()[:, None]  # (new, 1, taps)
    count = -(-len(wave) * new // old)
    padded = F.pad(wave, (reach, reach + old))[None, None]
    return F.conv1d(padded, kernel, stride=old)[0].T.reshape(-1)[:count]  # (1, new, M) -> (M * new,)


def reason(error):
    """The first line of an error's message, or failing that its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_audio(path, start=0, stop=None):
    """Yield seconds `start` to `stop` of a recording, a minute at a time: mono (the mean of the channels), 24 kHz, float32 (N,).
    Raises UserError with the reason if it can't be read or holds NaN."""
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            if not 8000 <= rate <= 192_000:
                raise UserError(f"{path}: {rate} Hz is outside 8 to 192 kHz")
            file.seek(start * rate)
            left = math.inf if stop is None else round(stop * rate) - start * rate
            while left > 0 and len(piece := file.read(int(min(60 * rate, left)), dtype="float32", always_2d=True)):
                if not np.isfinite(piece).all():
                    raise UserError(f"{path}: contains NaN or infinite samples")
                yield resample(torch.from_numpy(piece.mean(1)), rate)
                left -= len(piece)
    except (soundfile.SoundFileError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not readable as audio ({reason(error)})") from None


def load_audio(path):
    """A whole recording as (N,) float32 at 24 kHz. Raises UserError if it is not audio, or empty."""
    pieces = list(read_audio(path))
    if not pieces or not len(wave := torch.cat(pieces)):
        raise UserError(f"{path}: contains no samples")
    return wave


def save_audio(path, wave):
    """Write (N,) samples as a 16-bit WAV; louder than full scale is turned down, never clipped."""
    wave = wave.detach().float().cpu().numpy()
    with replacing(path) as temporary:
        soundfile.write(temporary, wave / max(1.0, np.abs(wave).max(initial=0)), RATE, format="WAV", subtype="PCM_16")


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder. Samples <-> frames. With latent_dim = 0 (the paper) the encoder is the log-mel itself and only the decoder is
# learned; with latent_dim = 16, say, a variational bottleneck is learned between, and the diffusion model works on that.
# The decoder is Vocos's idea (Siuzdak, 2023): ConvNeXt blocks at the frame rate, magnitude and phase, one inverse STFT.

DECODER_FFT = WINDOW       # the decoder's own STFT: no zero padding, so every bin carries information


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


class AudioAutoencoder(nn.Module):
    """`encode(wave (B, N)) -> frames (B, T, C)` and `decode(frames) -> wave (B, 300 T)`; frames have mean 0, deviation 1.

    One mean and one standard deviation serve all bands: statistics per band explode where a band is dead (8 kHz recordings have
    nothing above 4 kHz). They are buffers, set from the training set by `fit_autoencoder`."""

    def __init__(self, latent_dim=0, decoder="neural", width=256, blocks=6):
        super().__init__()
        self.latent_dim, self.decoder, self.channels = latent_dim, decoder, latent_dim or MELS
        self.register_buffer("mel_stats", torch.tensor([-6.0, 3.0]))        # mean, standard deviation
        self.register_buffer("latent_stats", torch.tensor([0.0, 1.0]))
        bank = mel_bank(DECODER_FFT)
        self.register_buffer("unmel", torch.linalg.pinv(bank), persistent=False)        # (601, 80)
        if latent_dim:
            self.encoder = nn.Sequential(nn.Conv1d(MELS, 128, 3, padding=1), nn.GELU(), ConvNeXt(128, 0.5), nn.Conv1d(128, 2 * latent_dim, 1))
            self.unlatent = nn.Sequential(nn.Conv1d(latent_dim, 128, 3, padding=1), nn.GELU(), ConvNeXt(128, 0.5), nn.Conv1d(128, MELS, 1))
        if decoder == "neural":
            self.enter = nn.Conv1d(MELS, width, 7, padding=3)
            self.blocks = nn.Sequential(*[ConvNeXt(width, 1 / blocks) for _ in range(blocks)])
            self.leave = nn.Linear(width, 2 * (DECODER_FFT // 2 + 1))
            nn.init.zeros_(self.leave.weight[:DECODER_FFT // 2 + 1])         # magnitudes start at the mel bank's pseudo-inverse

    def encode(self, wave):
        """(B, N) samples at 24 kHz -> (B, T, C) frames, T = ceil(N/300)."""
        return self.from_mel(log_mel(wave))

    def from_mel(self, mel):
        """(B, T, 80) log-mel, as cached -> (B, T, C) frames."""
        mel = (mel - self.mel_stats[0]) / self.mel_stats[1]
        if not self.latent_dim:
            return mel
        return (self.posterior(mel)[0] - self.latent_stats[0]) / self.latent_stats[1]

    def posterior(self, mel):
        """(B, T, 80) normalised log-mel -> mean and log-variance of the latents, each (B, T, latent_dim)."""
        return self.encoder(mel.mT).mT.chunk(2, dim=-1)

    def to_mel(self, frames):
        """(B, T, C) frames -> (B, T, 80) normalised log-mel."""
        if not self.latent_dim:
            return frames
        return self.unlatent((frames * self.latent_stats[1] + self.latent_stats[0]).mT).mT

    def spectrum(self, mel):
        """(B, T, 80) normalised log-mel -> (B, 601, T) complex spectrum of the wave."""
        magnitude = torch.einsum("btm,fm->bft", (mel * self.mel_stats[1] + self.mel_stats[0]).exp(), self.unmel).clamp(min=1e-5)
        if self.decoder == "griffinlim":
            return griffin_lim(magnitude, 32)
        h = self.blocks(self.enter(mel.mT)).mT
        gain, phase = self.leave(h).float().mT.chunk(2, dim=1)              # (B, 601, T) each
        return torch.polar(magnitude * gain.clamp(-8, 4).exp(), phase)

    def decode(self, frames, piece=1600, margin=48):
        """(B, T, C) frames -> (B, 300 T) samples. Long input is decoded in pieces with `margin` frames of context on either side."""
        if frames.ndim != 3 or frames.shape[2] != self.channels or not frames.shape[1]:
            raise UserError(f"decode takes frames (B, T, {self.channels}) with T > 0, not {tuple(frames.shape)}")
        if not torch.isfinite(frames).all():
            raise UserError("decode was given frames with NaN or infinite values")
        waves = []
        for start in range(0, frames.shape[1], piece):
            first, last = max(0, start - margin), min(frames.shape[1], start + piece + margin)
            wave = istft(self.spectrum(self.to_mel(frames[:, first:last])))
            waves.append(wave[:, (start - first) * HOP:(min(start + piece, frames.shape[1]) - first) * HOP])
        return torch.cat(waves, dim=1)

    def loss(self, wave, kl_weight=1e-2):
        """Reconstruction loss of (B, N) samples: STFT magnitudes at three resolutions and log-mel; with latents, the bottleneck's too."""
        with torch.no_grad():
            target = log_mel(wave)
            mel = heard = (target - self.mel_stats[0]) / self.mel_stats[1]
        extra = 0.0
        if self.latent_dim:
            mean, logvar = self.posterior(mel)
            heard = self.unlatent((mean + torch.randn_like(mean) * (0.5 * logvar).exp()).mT).mT
            kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
            extra = F.l1_loss(heard, mel) * 5 + kl_weight * kl
            heard = heard.detach()                                          # the decoder hears what it will be given
        guess = istft(self.spectrum(heard))
        total = extra + 5 * F.l1_loss(log_mel(guess), target)
        for fft in (512, 1024, 2048):
            a, b = stft(guess, fft, fft // 4, fft).abs(), stft(wave, fft, fft // 4, fft).abs()
            total = total + (a - b).norm() / b.norm().clamp(min=1e-3) + F.l1_loss((a + 1e-4).log(), (b + 1e-4).log())
        return total


def istft(spectrum):
    """(B, 601, T) complex -> (B, 300 T) samples; inverse of `stft(wave, DECODER_FFT)`."""
    window = torch.hann_window(WINDOW, device=spectrum.device)
    return torch.istft(spectrum, DECODER_FFT, HOP, WINDOW, window, center=True, length=HOP * spectrum.shape[-1])


def griffin_lim(magnitude, iterations, phase=None, momentum=0.99):
    """(B, 601, T) magnitudes -> complex spectrum with a phase consistent with them (Perraudin et al., 2013, the fast variant)."""
    angles = phase if phase is not None else torch.polar(torch.ones_like(magnitude), 6.2832 * torch.rand(
        magnitude.shape, generator=torch.Generator().manual_seed(0)).to(magnitude.device))
    previous = 0.0
    for _ in range(iterations):
        rebuilt = stft(istft(magnitude * angles), DECODER_FFT)
        angles = rebuilt - previous * momentum / (1 + momentum)
        angles, previous = angles / angles.abs().clamp(min=1e-8), rebuilt
    return magnitude * angles


def fit_autoencoder(config, corpus, device):
    """Set the frame statistics and train the decoder (and the bottleneck) for `decoder_steps`; deterministic on one machine."""
    torch.manual_seed(config.seed)
    model = AudioAutoencoder(config.latent_dim, config.decoder)
    model.mel_stats.copy_(torch.tensor(corpus.mel_stats()[:2]))
    model = model.to(device)
    steps = config.decoder_steps if config.decoder == "neural" or config.latent_dim else 0
    optimizer = torch.optim.AdamW([p for p in model.parameters()] or [torch.zeros(1)], lr=1e-3, betas=(0.8, 0.99), weight_decay=0.01)
    bar = tqdm(range(steps), desc="autoencoder", unit="step", disable=not steps)
    for step in bar:
        wave = corpus.audio("train", [keyed(config.seed, "autoencoder", step * 16 + i) for i in range(16)], 48)
        loss = model.loss(torch.from_numpy(wave).to(device))
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 20) * (0.02 + 0.98 * math.cos(math.pi / 2 * step / steps) ** 2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")
    if config.latent_dim:
        with torch.no_grad():
            mel = corpus.mel("train", [keyed(config.seed, "latents", i) for i in range(64)], 160)
            latents = model.from_mel(torch.from_numpy(mel).to(device))
        model.latent_stats.copy_(torch.stack([latents.mean(), latents.std()]))
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Data. A source (a folder, or the toy corpus) is a list of streams: a long recording, or short neighbours of one folder joined.
# Streams are cached once in shards of about half an hour: int16 audio, which the decoder learns from, and float16 log-mel. Every
# minute of a stream falls to training or validation by a hash of its name; a second is left out wherever the two meet.

CACHE_VERSION, SHARD_SECONDS, BLOCK_SECONDS, VALIDATION_SHARE = 1, 1800, 60, 0.06


def keyed(seed, purpose, index):
    """A 63-bit integer that depends on (seed, purpose, index) alone: all randomness of training goes through here, so that a step's
    data and noise do not depend on what ran before, on how often we validate or on how many devices share the batch."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def cache_root():
    """Where corpora are cached: $CDSLM_CACHE, or ~/.cache/cdslm."""
    return Path(os.environ.get("CDSLM_CACHE") or Path.home() / ".cache" / "cdslm")


@dataclass
class Stretch:
    """Half an hour of speech at the most, that belongs together: a stretch of one recording, or short ones of one folder in a row."""
    name: str
    seconds: float
    parts: list            # of (path, first second, last second)
    minute: int = 0        # its place in the recording


class ToySource:
    """The toy corpus: streams of 20 s, each a speaker of its own."""
    SECONDS = 20.0

    def __init__(self, config):
        from toyspeech import VERSION, ToySpeech
        self.toy = ToySpeech(config.toy_languages, config.toy_words)
        self.streams = [Stretch(f"utterance {i}", self.SECONDS, []) for i in range(max(2, round(config.toy_hours * 3600 / self.SECONDS)))]
        self.name = f"toy{VERSION}-{config.toy_languages}x{config.toy_words}"
        self.fingerprint = f"{CACHE_VERSION} {self.name} {len(self.streams)}"
        self.skipped = {}

    def read(self, stream):
        """Samples of a stream, (N,) float32 at 24 kHz."""
        return torch.from_numpy(self.toy.utterance(int(stream.name.split()[1]), self.SECONDS).wave)


class FolderSource:
    """A folder of recordings. What can't be read is left out and named in `skipped` {path: reason}."""

    def __init__(self, config):
        self.root = Path(config.data)
        if not self.root.is_dir():
            raise UserError(f"--data {config.data}: no such folder")
        files = sorted(p for p in self.root.rglob("*") if p.suffix.lower() in AUDIO_FILES)
        self.skipped, self.streams, prints = {}, [], [str(CACHE_VERSION)]
        for path in tqdm(files, desc="reading headers", unit="file", leave=False, disable=len(files) < 2000):
            try:
                stat, info = path.stat(), soundfile.info(path)
                if not info.frames:
                    raise UserError("contains no samples")
            except Exception as error:  # whatever a broken file makes the reader raise is that file's problem, not the run's
                self.skipped[str(path)] = reason(error)
                continue
            prints.append(f"{path.relative_to(self.root).as_posix()} {stat.st_size} {stat.st_mtime_ns}")
            self._add(path, info.duration)
        if not self.streams:
            why = f"none of its {len(files)} audio files can be read" if files else "it holds no audio files (wav, flac, ogg, mp3, ...)"
            raise UserError(f"--data {config.data}: {why}")
        self.name = self.root.resolve().name + "-" + hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:8]
        self.fingerprint = hashlib.sha256("\n".join(prints).encode()).hexdigest()

    def _add(self, path, seconds):
        last = self.streams[-1] if self.streams else None
        if last and last.parts[-1][0].parent == path.parent and last.seconds + seconds <= BLOCK_SECONDS:
            last.parts.append((path, 0, seconds))
            last.seconds += seconds
        else:
            for start in range(0, math.ceil(seconds), SHARD_SECONDS):
                stop = min(start + SHARD_SECONDS, seconds)
                name = path.relative_to(self.root).as_posix()
                self.streams.append(Stretch(name, stop - start, [(path, start, stop)], start // 60))

    def read(self, stream):
        """Samples of a stream, (N,) float32 at 24 kHz."""
        waves = [torch.zeros(0)]
        for path, start, stop in stream.parts:
            try:
                waves += list(read_audio(path, start, stop))
            except UserError as error:
                self.skipped[str(path)] = str(error)
        return torch.cat(waves)


def build_cache(source):
    """Cache every stream of a source, shard by shard, and return the cache's folder. A shard is complete once its .json is there, so an
    interrupted build goes on where it stopped; a source that changed has another fingerprint, and is cached anew."""
    folder = cache_root() / f"{source.name}-{hashlib.sha256(source.fingerprint.encode()).hexdigest()[:8]}"
    stale = [f for f in cache_root().glob(f"{source.name}-*") if f != folder and isinstance(source, FolderSource)]
    if stale:
        print(f"the recordings have changed since they were cached: caching them anew in {folder}")
        for old in stale:
            shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    shards = [[]]
    for stream in source.streams:
        if sum(s.seconds for s in shards[-1]) + stream.seconds > SHARD_SECONDS and shards[-1]:
            shards.append([])
        shards[-1].append(stream)
    bar = tqdm(total=round(sum(s.seconds for s in source.streams)), desc="caching speech", unit="s", unit_scale=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, streams in enumerate(shards):
            if not (folder / f"{number:05d}.json").exists():
                build_shard(folder / f"{number:05d}", source, streams, pool)
            bar.update(round(sum(s.seconds for s in streams)))
    bar.close()
    return folder


def build_shard(stem, source, streams, pool):
    """Write one shard: STEM.audio.npy (N,) int16, STEM.mel.npy (N/300, 80) float16, and last STEM.json, its table of contents."""
    def samples(stream):
        wave = source.read(stream)
        return (F.pad(wave, (0, -len(wave) % HOP)).clamp(-1, 1) * 32767).round().short().numpy()

    def frames(start):  # a minute of log-mel, with a little of its surroundings so that minutes join without a seam
        first, last = max(0, start - 8 * HOP), min(len(audio), start + 60 * RATE + 8 * HOP)
        mel = log_mel(torch.from_numpy(audio[first:last].astype(np.float32) / 32767)[None])[0]
        return mel[(start - first) // HOP:][:60 * FRAME_RATE].half().numpy()

    waves = list(pool.map(samples, streams))
    audio = np.concatenate(waves)
    with replacing(f"{stem}.mel.npy") as temporary:
        mel = np.concatenate(list(pool.map(frames, range(0, len(audio), 60 * RATE)))) if len(audio) else np.zeros((0, MELS), np.float16)
        save_array(temporary, mel)
    with replacing(f"{stem}.audio.npy") as temporary:
        save_array(temporary, audio)
    contents = {"streams": [[s.name, s.minute, len(w) // HOP] for s, w in zip(streams, waves)], "skipped": source.skipped}
    with replacing(f"{stem}.json") as temporary:
        temporary.write_text(json.dumps(contents))


class Corpus:
    """A cache, split into training and validation, served as windows. `split` is "train" or "valid" everywhere."""

    def __init__(self, folder, window):
        self.shards, self.skipped, streams = [], {}, []
        for number, path in enumerate(sorted(folder.glob("*.json"))):
            contents = json.loads(path.read_text())
            self.skipped |= contents["skipped"]
            self.shards.append([np.load(path.with_suffix(f".{kind}.npy"), mmap_mode="r") for kind in ("mel", "audio")])
            start = 0
            for name, minute, frames in contents["streams"]:
                streams.append((name, minute, number, start, frames))
                start += frames
        self.runs, self.tables = self._split(streams, window), {}

    @staticmethod
    def _split(streams, window):
        """{split: [(shard, first frame, frames)]}: minutes by a hash of their name, neighbours of the same split in one run."""
        total = sum(s[4] for s in streams)
        size = min(BLOCK_SECONDS * FRAME_RATE, max(2 * window, total // 20))  # with little speech, smaller blocks make the split
        blocks = []  # (hash, stream number, shard, start, frames)
        for number, (name, minute, shard, start, frames) in enumerate(streams):
            for offset in range(0, frames, size):
                chance = keyed(0, name, minute * 60 * FRAME_RATE // size + offset // size) / 2 ** 63
                blocks.append([chance, number, shard, start + offset, min(size, frames - offset)])
        usable = [b for b in blocks if b[4] >= window]
        if len(usable) < 2:
            raise UserError(f"too little speech: {total / FRAME_RATE:.1f} s in all, and training and validation each need a stretch of "
                            f"{2 * window / FRAME_RATE:g} s; add recordings, or shorten --ctx-seconds and --gen-seconds")
        limit = min(max(VALIDATION_SHARE, min(b[0] for b in usable)), sorted(b[0] for b in usable)[-2])
        runs, last = {"train": [], "valid": []}, None
        for chance, number, shard, start, frames in blocks:
            split = "valid" if chance <= limit else "train"
            if last and last[0] == number and last[1] == split:
                runs[split][-1][2] += frames
            else:
                if last and last[0] == number:
                    runs[last[1]][-1][2] -= FRAME_RATE                        # the second left out
                runs[split].append([shard, start, frames])
            last = number, split
        return {split: np.array(rows, dtype=np.int64).reshape(-1, 3) for split, rows in runs.items()}

    def hours(self, split):
        return self.runs[split][:, 2].sum() / FRAME_RATE / 3600

    def places(self, split, frames):
        """Number of windows of `frames` frames there are in a split, counting every start."""
        return int(self._table(split, frames)[1][-1])

    def _table(self, split, frames):
        if (split, frames) not in self.tables:
            runs = self.runs[split][self.runs[split][:, 2] >= frames]
            self.tables[split, frames] = runs, np.cumsum(runs[:, 2] - frames + 1)
        return self.tables[split, frames]

    def _windows(self, split, keys, frames):
        """Yield (shard, first frame) for each key: any integer names a window, all equally likely."""
        runs, ends = self._table(split, frames)
        for key in keys:
            place = key % int(ends[-1])
            row = np.searchsorted(ends, place, side="right")
            shard, start, length = runs[row]
            yield self.shards[shard], start + place - (ends[row] - (length - frames + 1))

    def mel(self, split, keys, frames):
        """Log-mel windows (len(keys), frames, 80) float32."""
        return np.stack([mel[start:start + frames] for (mel, _), start in self._windows(split, keys, frames)]).astype(np.float32)

    def audio(self, split, keys, frames):
        """The same windows as samples (len(keys), 300 * frames) float32."""
        cut = [audio[start * HOP:(start + frames) * HOP] for (_, audio), start in self._windows(split, keys, frames)]
        return np.stack(cut).astype(np.float32) / 32767

    def mel_stats(self):
        """Mean and standard deviation over all bands of the training set, from a sample of it; and how many bands are alive."""
        mel = self.mel("train", [keyed(0, "statistics", i) for i in range(512)], min(64, self.runs["train"][:, 2].max()))
        return float(mel.mean()), float(mel.std()), int((mel.std((0, 1)) > 0.2).sum())


def open_corpus(config):
    """Build or find the cache of config.data and return its Corpus."""
    source = ToySource(config) if config.data == "toy" else FolderSource(config)
    corpus = Corpus(build_cache(source), config.ctx_frames + config.gen_frames)
    corpus.skipped |= source.skipped
    return corpus


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion. Variance preserving: x_t = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, so a noise level is one angle phi with
# alpha = cos(phi) and sigma = sin(phi), from clean (0) to noise (pi/2); log-SNR = -2 log tan(phi). A schedule is how phi grows with
# t in [0, 1]. The network is told phi, not t: it then means the same whatever the schedule, in training, validation and sampling.

CLEAN, NOISE = math.atan(math.exp(-5)), math.atan(math.exp(5))  # CHOICE: log-SNR is clipped to [-10, 10]


class Diffusion:
    """The forward process and the loss. Arguments: see Config."""

    def __init__(self, schedule="cosine", zero_terminal_snr=False, predict="v", gamma=5.0, shift=0.0):
        self.schedule, self.zero_terminal_snr, self.predict, self.gamma, self.shift = schedule, zero_terminal_snr, predict, gamma, shift

    def alpha(self, t):
        """Signal level at time t, before clipping."""
        if self.schedule == "cosine":
            return torch.cos(math.pi / 2 * t)                                # Nichol & Dhariwal 2021, without their offset
        if self.schedule == "linear":
            return torch.exp(-0.05 * t - 19.9 / 4 * t ** 2)                  # beta from 0.1 to 20, linear in t: Song et al. 2021, Eq. 33
        return torch.sigmoid(10 - 20 * t).sqrt()                             # exponential: log-SNR falls linearly from 10 to -10

    def angle(self, t):
        """t in [0, 1], any shape -> noise level phi. With zero_terminal_snr, alpha is shifted and scaled to end at 0 (Lin et al. 2024)."""
        t = t.double()
        alpha, first, last = (self.alpha(x) for x in (t, torch.zeros_like(t), torch.ones_like(t)))
        if self.zero_terminal_snr:
            alpha = (alpha - last) * first / (first - last)
        return torch.acos(alpha.clamp(0, 1)).clamp(CLEAN, math.pi / 2 if self.zero_terminal_snr else NOISE).float()

    def times(self, u):
        """Uniform u -> training times: DEVIATION when shift > 0, towards high noise (as Esser et al. 2024 shift for large images)."""
        return torch.sigmoid(torch.logit(u.clamp(1e-6, 1 - 1e-6)) + self.shift) if self.shift else u

    def target(self, x0, eps, phi):
        """What the network should say, (B, T, C): v = alpha eps - sigma x0 [paper], or x0 itself."""
        return x0 if self.predict == "x0" else phi.cos() * eps - phi.sin() * x0

    def clean(self, prediction, xt, phi):
        """The network's words as an estimate of x0: with v, x0 = alpha x_t - sigma v, a rotation back (Salimans & Ho 2022)."""
        return prediction if self.predict == "x0" else phi.cos() * xt - phi.sin() * prediction

    def weight(self, phi):
        """min-SNR weight of the squared error (Hang et al. 2023): min(SNR, gamma) on x0, which is min(SNR, gamma)/(SNR + 1) on v [paper].
        At zero terminal SNR it is 0: nothing is learned there that t just below 1 does not teach."""
        snr = phi.tan() ** -2
        return snr.clamp(max=self.gamma) / (1 if self.predict == "x0" else snr + 1)

    def loss(self, model, x0, ctx, phi, eps):
        """Weighted squared error per sample (B,) of predicting x0 (B, T, C) after ctx (B, Tc, C), at noise phi (B,) with eps like x0."""
        phi = phi[:, None, None]
        prediction = model(phi.cos() * x0 + phi.sin() * eps, phi[:, 0, 0], ctx)
        error = (prediction.float() - self.target(x0, eps, phi)) ** 2
        return (self.weight(phi) * error).mean((1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# MM-DiT, the two-stream transformer of Stable Diffusion 3 (Esser et al. 2024) [paper]: context and continuation have weights of
# their own and meet in one bidirectional attention per block; the noise level modulates every normalisation (adaLN-zero, Peebles
# & Xie 2023). CHOICE: rotary positions, the continuation's starting where the context's end; queries and keys RMS-normalised.

BASE_DEPTH, BASE_WIDTH = 4, 512


def linear(fan_in, fan_out, role, bias=False):
    """A linear layer that knows its role in the optimiser's table, `ROLES`; hidden and input matrices keep unit variance."""
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    layer.weight.role = role
    nn.init.zeros_(layer.weight) if role in ("adaln", "output") else nn.init.normal_(layer.weight, std=fan_in ** -0.5)
    if bias:
        layer.bias.role = "bias"
        nn.init.zeros_(layer.bias)
    return layer


def modulate(x, shift, scale):
    """Normalise, then move as the noise level says: (B, T, d) with (B, 1, d) each."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): x (B, H, T, D) with cos, sin (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Stream(nn.Module):
    """One stream's share of a block. A context stream that nothing reads any more (`last`) keeps only its queries, keys and values."""

    def __init__(self, d, heads, last=False):
        super().__init__()
        self.heads, self.last = heads, last
        self.adaln = linear(d, (2 if last else 6) * d, "adaln", bias=True)
        self.qkv = linear(d, 3 * d, "hidden")
        if not last:
            self.out = linear(d, d, "hidden")
            self.up, self.down = linear(d, 4 * d, "hidden"), linear(4 * d, d, "hidden")

    def open(self, x, c, cos, sin):
        """x (B, T, d), c (B, 1, d) -> q, k, v (B, H, T, D) and what `close` needs."""
        shift, scale, *rest = self.adaln(c).chunk(2 if self.last else 6, dim=-1)
        q, k, v = self.qkv(modulate(x, shift, scale)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (rotate(F.rms_norm(part, part.shape[-1:]), cos, sin) for part in (q, k))
        return (q, k, v), rest

    def close(self, x, attended, rest, scale):
        """Attention's result (B, T, d), then the MLP, onto the residual stream, each branch times the depth's scale."""
        gate, shift2, scale2, gate2 = rest
        x = x + scale * gate * self.out(attended)
        return x + scale * gate2 * self.down(F.gelu(self.up(modulate(x, shift2, scale2)), approximate="tanh"))


class Block(nn.Module):
    """Both streams through one joint attention."""

    def __init__(self, d, heads, last):
        super().__init__()
        self.ctx, self.gen = Stream(d, heads, last), Stream(d, heads)

    def forward(self, ctx, gen, c, cos, sin, scale):
        n = ctx.shape[1]
        context, rest_ctx = self.ctx.open(ctx, c, cos[:n], sin[:n])
        continuation, rest_gen = self.gen.open(gen, c, cos[n:], sin[n:])
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(context, continuation))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)    # (B, Tc + Tg, d)
        gen = self.gen.close(gen, attended[:, n:], rest_gen, scale)
        return None if self.ctx.last else self.ctx.close(ctx, attended[:, :n], rest_ctx, scale), gen


class MMDiT(nn.Module):
    """model(xt (B, Tg, C), phi (B,), ctx (B, Tc, C)) -> prediction (B, Tg, C); Tc and Tg are whole numbers of patches."""

    def __init__(self, config):
        super().__init__()
        d, k, heads = config.width, config.patch_size, max(1, config.width // 64)
        self.config, self.patch = config, k
        self.register_buffer("silence", torch.zeros(config.channels))        # what digital zero sounds like; guidance needs it
        self.enter_ctx = linear(k * config.channels, d, "input", bias=True)
        self.enter_gen = linear(k * config.channels, d, "input", bias=True)
        self.noise_in, self.noise_out = linear(256, d, "input", bias=True), linear(d, d, "hidden", bias=True)
        self.blocks = nn.ModuleList(Block(d, heads, last=i == config.depth - 1) for i in range(config.depth))
        self.final = linear(d, 2 * d, "adaln", bias=True)
        self.leave = linear(d, k * config.channels, "output", bias=True)
        inverse = 10_000 ** -torch.linspace(0, 1, d // heads // 2)
        angles = torch.arange((config.ctx_frames + config.gen_frames) // k)[:, None] * inverse
        self.register_buffer("cos", angles.cos(), persistent=False)           # (T, D/2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def embed_noise(self, phi):
        """Noise level (B,) -> (B, 1, d): sines and cosines of 128 frequencies, then a small MLP."""
        wave = phi[:, None] * 1000 * 10_000 ** -torch.linspace(0, 1, 128, device=phi.device)
        return F.silu(self.noise_out(F.silu(self.noise_in(torch.cat([wave.cos(), wave.sin()], dim=-1)))))[:, None]

    def forward(self, xt, phi, ctx):
        c = self.embed_noise(phi)
        gen = self.enter_gen(xt.unflatten(1, (-1, self.patch)).flatten(2))    # (B, Tg, C) -> (B, Tg/k, k*C) -> (B, Tg/k, d)
        ctx = self.enter_ctx(ctx.unflatten(1, (-1, self.patch)).flatten(2))
        length = ctx.shape[1] + gen.shape[1]
        cos, sin = self.cos[:length].to(gen.dtype), self.sin[:length].to(gen.dtype)
        for block in self.blocks:
            ctx, gen = block(ctx, gen, c, cos, sin, BASE_DEPTH / len(self.blocks))
        gen = self.leave(modulate(gen, *self.final(c).chunk(2, dim=-1)))
        return gen.unflatten(2, (self.patch, -1)).flatten(1, 2)               # (B, Tg/k, k*C) -> (B, Tg, C)


def count(config):
    """Parameters, tokens per window, and FLOPs of one training window (a multiply-add is 2, backward twice forward), in closed form."""
    d, L, kc = config.width, config.depth, config.patch_size * config.channels
    ctx, gen = config.ctx_frames // config.patch_size, config.gen_frames // config.patch_size
    matrices = 12 * d * d * (gen * L + ctx * (L - 1)) + 3 * d * d * ctx + kc * d * (ctx + 2 * gen)   # used once per token
    modulation = 256 * d + d * d + 6 * d * d * (2 * L - 1) + 2 * d * d + 2 * d * d                    # used once per window
    attention = 2 * (ctx + gen) ** 2 * d * L
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MMDiT(config).parameters())
    return {"parameters": parameters, "tokens": ctx + gen, "flops": 6 * (matrices + modulation + attention)}


# ---------------------------------------------------------------------------------------------------------------------
# Sampler. From noise at the largest angle to clean frames at 0, in equal steps of the angle; each step asks the network for x0.

@torch.no_grad()
def sample(model, context, frames=None, steps=24, cfg=1.5, sampler="dpm", seed=0, progress=False):
    """Continue `context` (B, Tc, C) by `frames` frames -> (B, frames, C), on the model's device.

    Guidance (Ho & Salimans 2022) is x0 = silent + cfg (heard - silent), where `silent` continues zeroed speech [paper]; cfg 1 turns it off.
    Beyond one window the last Tc frames become the next context, as often as needed. Item i's noise depends on (seed, i) alone."""
    config, context = model.config, context.float()
    silence = model.silence.expand(len(context), config.ctx_frames, -1)
    diffusion = make_diffusion(config)
    speech, frames = context, frames or config.gen_frames
    windows = -(-frames // config.gen_frames)
    bar = tqdm(total=windows * steps, desc="speaking", unit="step", disable=not progress, leave=False)
    for window in range(windows):
        ctx = speech[:, -config.ctx_frames:]
        noise = [keyed_noise(seed, "sample", item + (window << 32), (config.gen_frames, config.channels), ctx.device) for item in range(len(ctx))]

        def predict(xt, phi):
            """x0 as the network sees it in xt at noise level phi, guided."""
            pair = (xt, ctx) if cfg == 1 else (torch.cat([xt, xt]), torch.cat([ctx, silence]))
            out = model(pair[0], torch.full((len(pair[0]),), phi, device=xt.device), pair[1]).float()
            bar.update()
            if cfg != 1:
                heard, silent = out.chunk(2)
                out = silent + cfg * (heard - silent)
            return diffusion.clean(out, xt, torch.tensor(phi))

        solve = {"dpm": dpm_solver, "ddim": ddim}[sampler]
        angles = torch.linspace(float(diffusion.angle(torch.ones(()))), 0, steps + 1, dtype=torch.float64).tolist()
        speech = torch.cat([speech, solve(predict, torch.stack(noise), angles)], dim=1)
    bar.close()
    return speech[:, context.shape[1]:context.shape[1] + frames]


def ddim(predict, x, angles):
    """Song et al. 2021, Eq. 12 without noise: keep the eps the network implies, take the next angle."""
    for phi, following in zip(angles, angles[1:]):
        x0 = predict(x, phi)
        eps = (x - math.cos(phi) * x0) / math.sin(phi)
        x = math.cos(following) * x0 + math.sin(following) * eps
    return x


def dpm_solver(predict, x, angles):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): second order, from the change of x0 since the last step."""
    rate = [-math.log(math.tan(phi)) if phi else math.inf for phi in angles]  # half the log-SNR; its steps are h
    before = None
    for i, (phi, following) in enumerate(zip(angles, angles[1:])):
        x0 = better = predict(x, phi)
        h = rate[i + 1] - rate[i]
        if before is not None and math.isfinite(h):
            better = x0 + (x0 - before) * h / (2 * (rate[i] - rate[i - 1]))
        x = math.sin(following) / math.sin(phi) * x + math.cos(following) * (1 - math.exp(-h)) * better
        before = x0
    return x


def make_diffusion(config):
    return Diffusion(config.schedule, config.zero_terminal_snr, config.predict, config.min_snr_gamma, config.t_shift)


def keyed_noise(seed, purpose, index, shape, device):
    """Standard normal noise that depends on (seed, purpose, index) and the kind of device alone."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(keyed(seed, purpose, index)), device=device)


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser. muP and CompleteP [paper]: what is tuned on the base (L = 4, d = 512) holds at every size, because each role's
# learning rate follows the width as in this table, and each residual branch is divided by the depth (in MMDiT.forward).
# m = d / 512. Muon's update has a fixed spectral norm, so its learning rate needs no m (Bernstein & Newhouse 2024).

ROLES = {  # role: (learning rate, weight decay) relative to the base's, as functions of m
    "input": (lambda m: 1, lambda m: 0),         # from frames or the noise level into the residual stream
    "hidden": (lambda m: 1 / m, lambda m: m),    # d x d and the like; lr x decay stays the same
    "adaln": (lambda m: 1 / m, lambda m: 0),
    "output": (lambda m: 1 / m, lambda m: 0),
    "bias": (lambda m: 1, lambda m: 0),
}


def make_optimizers(model, config):
    """Optimisers over all parameters, each group with its full learning rate as `peak`. Every parameter has a role."""
    m, roles = config.width / BASE_WIDTH, {role: [] for role in ROLES}
    for parameter in model.parameters():
        roles[parameter.role].append(parameter)
    groups = [dict(params=params, lr=config.lr * ROLES[role][0](m), weight_decay=config.weight_decay * ROLES[role][1](m))
              for role, params in roles.items() if not (role == "hidden" and config.optimizer == "muon")]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8 / m / config.depth * BASE_DEPTH, fused=True)]
    if config.optimizer == "muon":
        decay = config.lr / config.muon_lr * config.weight_decay
        matrices = [p for p in roles["hidden"] if p.ndim == 2]
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=decay, momentum=0.95, adjust_lr_fn="original"))
    for group in (g for o in optimizers for g in o.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def lr_factor(config, step):
    """Share of the full learning rate at a step: warm-up, then a cosine, or stable with a linear decay over the last fifth (Hu et al. 2024)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.lr_schedule == "cosine":
        return warm * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
    return warm * min(1.0, (config.steps - step) / (config.steps - decay_start(config)))


def decay_start(config):
    """The step at which wsd begins to decay: up to here, runs of different length are the same run."""
    return config.steps - max(1, config.steps // 4)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints. Tensors and plain values only, loaded with weights_only=True: a file from the internet can't run code. Written under a
# temporary name, flushed to the disk, then renamed: at every moment there is one whole checkpoint.

FREE = {"out", "steps", "device", "dtype", "compile", "eval_every", "dry_run", "json", "micro_batch"}  # may change when a run goes on


@contextlib.contextmanager
def replacing(path):
    """Write a file whole or not at all: yields a temporary path beside it, which takes its place if nothing went wrong."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_array(path, array):
    with open(path, "wb") as file:  # numpy would add .npy to the temporary name
        np.save(file, array, allow_pickle=False)


def save(path, **contents):
    """Save tensors and plain values; the file that was there becomes NAME.previous.pt."""
    with replacing(path) as temporary:
        torch.save({"format": "cdslm 1", **contents}, temporary)
        if path.exists():
            os.replace(path, path.with_suffix(".previous.pt"))


def load(path):
    """What `save` wrote. Raises UserError if the file is damaged, or not ours."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        if contents["format"] != "cdslm 1":
            raise KeyError
        return contents
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception:  # torch raises half a dozen kinds for a damaged or foreign file, and refuses code with another
        raise UserError(f"{path}: damaged, or not a cdslm checkpoint") from None


def newest(folder, config=None):
    """The newest readable checkpoint of a run, or None; given the config of a run to go on with, one that its schedule leads through."""
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "trunk.pt"):
        if (folder / name).exists():
            try:
                found = load(folder / name)
            except UserError as error:
                print(f"warning: {error}; trying the one before")
                continue
            if config is None or config.lr_schedule == "cosine" or found["steps"] == config.steps or found["step"] <= decay_start(config):
                return found
    if any((folder / name).exists() for name in ("checkpoint.pt", "checkpoint.previous.pt")) and config is None:
        raise UserError(f"{folder}: none of its checkpoints can be read")


def claim(config):
    """Make the run folder ours: one run at a time, and only with the configuration it was begun with. Returns the lock to hold."""
    folder = Path(config.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows has no flock: two runs in one folder are then the user's to avoid
    except OSError:
        raise UserError(f"--out {folder}: another run is writing there") from None
    path, mine = folder / "config.json", dataclasses.asdict(config)
    if path.exists():
        theirs = dataclasses.asdict(read_config(folder))
        differ = [f"{name} {theirs[name]} -> {mine[name]}" for name in mine if name not in FREE and theirs[name] != mine[name]]
        if differ:
            raise UserError(f"--out {folder} holds a run of another configuration ({', '.join(differ)}); choose another --out")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(mine, indent=2) + "\n")
    return lock


def read_config(folder):
    """Config of a run folder."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: no run there (it has no config.json); train one with: python cdslm.py --size tiny --out {folder}")
    try:
        return Config(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged, or not ours") from None


def load_run(folder, device="cpu"):
    """A run folder -> config, model (averaged weights) and autoencoder, ready to sample from; the training data may be gone."""
    folder, config = Path(folder), read_config(folder)
    checkpoint = newest(folder)
    if checkpoint is None:
        raise UserError(f"{folder}: no checkpoint yet")
    model, autoencoder = MMDiT(config), AudioAutoencoder(config.latent_dim, config.decoder)
    try:
        model.load_state_dict(checkpoint["ema"])
        autoencoder.load_state_dict(load(folder / "autoencoder.pt")["autoencoder"])
    except (RuntimeError, KeyError):
        raise UserError(f"{folder}: its checkpoint does not match its config.json") from None
    return config, model.to(device).eval().requires_grad_(False), autoencoder.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Training.

LEVELS = [6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0, -8.0]  # log-SNR at which validation looks, whatever the training schedule


def decide(config):
    """(device, dtype) from what was asked and what the machine has."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {reason(error)}") from None
    hardware = {"cpu": lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
                "cuda": lambda: torch.cuda.get_device_capability()[0] >= 8, "mps": lambda: False}
    bf16 = config.dtype == "bf16" or (config.dtype == "auto" and hardware.get(device.type, lambda: False)())
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device, torch.bfloat16 if bf16 else torch.float32


class Windows:
    """Training and validation windows as frames on the device, each named by its global number."""

    def __init__(self, config, corpus, autoencoder, device):
        self.config, self.corpus, self.autoencoder, self.device = config, corpus, autoencoder, device

    def frames(self, split, keys):
        """(B, Tc, C) context and (B, Tg, C) continuation."""
        mel = torch.from_numpy(self.corpus.mel(split, keys, self.config.ctx_frames + self.config.gen_frames)).to(self.device, non_blocking=True)
        frames = self.autoencoder.from_mel(mel)
        return frames[:, :self.config.ctx_frames], frames[:, self.config.ctx_frames:]

    def batch(self, step, part, size, diffusion, silence):
        """Windows `part .. part + size` of a step's batch: x0, context, noise level and noise. Times are stratified over the whole batch."""
        c = self.config
        numbers = range(step * c.batch_size + part, step * c.batch_size + part + size)
        ctx, x0 = self.frames("train", [keyed(c.seed, "window", i) for i in numbers])
        jitter = keyed(c.seed, "time", step) / 2 ** 63
        phi = diffusion.angle(diffusion.times((torch.arange(part, part + size) + jitter) / c.batch_size)).to(self.device)
        eps = torch.stack([keyed_noise(c.seed, "noise", i, x0.shape[1:], self.device) for i in numbers])
        dropped = torch.tensor([keyed(c.seed, "drop", i) / 2 ** 63 < c.ctx_drop for i in numbers], device=self.device)
        return x0, torch.where(dropped[:, None, None], silence, ctx), phi, eps


@torch.no_grad()
def validate(model, windows, diffusion, precision, count=64):
    """Held-out loss on fixed windows and fixed noise: {log-SNR: loss} and, under "mean", the paper's loss: its average over the cosine
    schedule's times. The same for every training schedule, so that schedules can be compared."""
    c, losses = windows.config, []
    ctx, x0 = windows.frames("valid", [keyed(0, "validation", i) for i in range(count)])
    eps = torch.stack([keyed_noise(0, "validation", i, x0.shape[1:], x0.device) for i in range(count)])
    levels = torch.tensor(LEVELS)
    angles = torch.atan(torch.exp(-levels / 2))
    for phi in angles:
        parts = [slice(i, i + c.batch_size) for i in range(0, count, c.batch_size)]
        with precision():
            losses.append(torch.cat([diffusion.loss(model, x0[p], ctx[p], phi.expand(len(x0[p])).to(x0.device), eps[p]) for p in parts]).mean())
    losses = torch.stack(losses).cpu()
    times = torch.cat([torch.zeros(1), (angles[1:] + angles[:-1]) / math.pi, torch.ones(1)])  # each level stands for its share of t
    return {"mean": float((losses * times.diff()).sum())} | {f"{level:g}": float(loss) for level, loss in zip(LEVELS, losses)}


def train(config):
    """Everything from a config to a run folder full of sound."""
    import copy
    import signal
    device, dtype = decide(config)
    precision = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)  # noqa: E731
    lock, folder, size = claim(config), Path(config.out), count(config)
    print(f"cdslm {config.size}: {size['parameters'] / 1e6:.2f} M parameters, {config.steps} steps of {config.batch_size} windows "
          f"({size['tokens']} tokens, {size['flops'] * config.batch_size / 1e9:.1f} GFLOP a step) on {device} in {str(dtype)[6:]}")

    corpus = open_corpus(config)
    autoencoder = load_autoencoder(config, corpus, folder, device)
    torch.manual_seed(config.seed)
    model = MMDiT(config)
    model.silence.copy_(autoencoder.encode(torch.zeros(1, 8 * HOP, device=device))[0, 4].cpu())
    model = model.to(device)
    ema, diffusion, optimizers = copy.deepcopy(model).eval().requires_grad_(False), make_diffusion(config), make_optimizers(model, config)
    windows, first, skipped = Windows(config, corpus, autoencoder, device), 0, 0
    if (found := newest(folder, config)) is not None:
        model.load_state_dict(found["model"])
        ema.load_state_dict(found["ema"])
        for optimizer, state in zip(optimizers, found["optimizers"]):
            optimizer.load_state_dict(state)
        first, skipped = found["step"], found["skipped"]
        print(f"going on from step {first}")
    trim_log(folder / "log.jsonl", first)
    network = torch.compile(model) if config.compile else model
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: (stop.append(n), signal.signal(n, signal.SIG_DFL)))

    def checkpoint(name, step):
        save(folder / name, step=step, steps=config.steps, config=dataclasses.asdict(config), model=model.state_dict(), ema=ema.state_dict(),
             optimizers=[o.state_dict() for o in optimizers], skipped=skipped)

    micro, parameters, started = config.micro_batch or config.batch_size, list(model.parameters()), time.perf_counter()
    seconds = (config.ctx_frames + config.gen_frames) / FRAME_RATE
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc="training", unit="step")
    with open(folder / "log.jsonl", "a") as log:
        for step in bar:
            if step == decay_start(config) and config.lr_schedule == "wsd":
                checkpoint("trunk.pt", step)
            loss = 0.0
            for part in range(0, config.batch_size, micro):
                x0, ctx, phi, eps = windows.batch(step, part, micro, diffusion, model.silence)
                with precision():
                    share = diffusion.loss(network, x0, ctx, phi, eps).sum() / config.batch_size
                share.backward()
                loss += share.detach()
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)
            loss, norm = torch.stack([loss, norm]).tolist()
            factor = lr_factor(config, step)
            if math.isfinite(loss + norm):
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["peak"] * factor
                    optimizer.step()
                average(ema, model, config.ema, step)
            else:
                skipped += 1
            model.zero_grad(set_to_none=True)
            row = {"step": step + 1, "loss": loss, "grad": norm, "lr": config.lr * factor, "skipped": skipped,
                   "hours": (step + 1) * config.batch_size * seconds / 3600}
            row |= {"epochs": row["hours"] / corpus.hours("train"), "frames/s": (step + 1 - first) * config.batch_size * seconds * FRAME_RATE / (time.perf_counter() - started)}
            last = step + 1 == config.steps or bool(stop)
            if last or (step + 1) % config.eval_every == 0:
                row["valid"] = validate(ema, windows, diffusion, precision)
                bar.set_postfix(loss=f"{loss:.4f}", valid=f"{row['valid']['mean']:.4f}")
            elif step % 10 == 0:
                bar.set_postfix_str(f"loss={loss:.4f}" + bar.postfix[bar.postfix.find(", valid"):] if bar.postfix and ", valid" in bar.postfix else f"loss={loss:.4f}")
            log.write(json.dumps({k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
            if last or (step + 1) % config.eval_every == 0:
                log.flush()
                checkpoint("checkpoint.pt", step + 1)
            if stop:
                break
    if stop:
        print(f"stopped at step {step + 1}; the same command goes on from there")
        sys.exit(128 + stop[0])
    lock.close()


def average(ema, model, decay, step):
    """ema <- decay * ema + (1 - decay) * model; early on a shorter memory, so that the first steps are soon forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def load_autoencoder(config, corpus, folder, device):
    """The run's autoencoder, trained now if it is not there yet; with it are kept a few held-out windows of sound to listen to."""
    path, window = folder / "autoencoder.pt", config.ctx_frames + config.gen_frames
    if not path.exists():
        model = fit_autoencoder(config, corpus, device)
        examples = corpus.audio("valid", [keyed(0, "example", i) for i in range(8)], window)
        save(path, autoencoder=model.state_dict(), examples=torch.from_numpy(examples * 32767).short())
    model = AudioAutoencoder(config.latent_dim, config.decoder)
    model.load_state_dict(load(path)["autoencoder"])
    return model.to(device).eval().requires_grad_(False)


def trim_log(path, step):
    """Drop what the log says of steps after `step`, which will be done again."""
    if path.exists():
        rows = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(row + "\n" for row in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        flag, kind = "--" + f.name.replace("_", "-"), {"str": str, "int": int, "float": float}.get(f.type if isinstance(f.type, str) else f.type.__name__)
        if kind is None:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=f.metadata["text"])
        else:
            parser.add_argument(flag, type=kind, default=f.default, help=f.metadata["text"], choices=f.metadata["choices"] or None)
    config = Config(**vars(parser.parse_args()))
    train(config)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
