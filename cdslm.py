"""cdslm: a spoken language model by continuous diffusion, in one file.

A reimplementation of "Scaling Properties of Continuous Diffusion Spoken Language Models" (Ramapuram
et al., 2026, arXiv 2604.24416). The model is trained on raw speech without transcripts. Given some
seconds of speech, it generates the continuation: a diffusion transformer turns noise into log-mel
frames, and a learned decoder turns the frames into sound. Read Part I from top to bottom; skip Part
II at first.

Part I, the method (needs torch only)          Part II, the machinery
  1  Config         settings and sizes           9  Decoder       frames -> sound
  2  Sound          samples -> log-mel          10  Files         audio, safe writing
  3  Encoder        log-mel -> frames           11  Data          recordings, cache, windows
  4  Diffusion      noise, target, loss         12  Checkpoints   the same command resumes
  5  muP            learning rates by role      13  Devices       bf16, DDP, FSDP2, compile
  6  MM-DiT         the network                 14  Training      the loop, the validation
  7  Sampler        noise -> frames             15  main          the command line
  8  Training step  Muon, schedule, EMA, update

    python cdslm.py --size tiny                         minutes on a laptop; then open out/tiny
    python cdslm.py --size tiny --data my_recordings    the same on your own recordings
    python cdslm.py --size base --data librispeech      the paper's 36 M base, for one GPU

Symbols:  x0 clean frames      eps noise         xt = alpha x0 + sigma eps, the noisy frames
          t in [0, 1] time     phi noise angle   alpha = cos(phi), sigma = sin(phi)
          v = alpha eps - sigma x0, velocity     snr = alpha^2 / sigma^2
          ctx context          gen continuation  k frames per token, d width, L depth
Shapes:   B batch, T frames, C channels per frame (80 log-mel bands), N samples
Marks:    [paper] stated in the paper; CHOICE: the paper is silent; DEVIATION: we differ, and why.
"""
import contextlib
import dataclasses
import functools
import hashlib
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


# ==================================================================================================
# PART I: THE METHOD
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# 1. Config. One dial, the depth L: the width is 128 L [paper], attention heads are 64 wide. --size
# names a depth, a window, a training budget, and the paper's method or the laptop's.

PAPER = dict(
    ctx_seconds=10.0, gen_seconds=30.0, patch_size=4, predict="v", self_condition=0.0,
    min_snr_gamma=5.0, t_shift=0.0, optimizer="adamw", sampling="even")
# DEVIATION: small models learn words much sooner when they predict x0 in long patches with
# self-conditioning, when the loss stresses high noise, where language is decided, and with Muon.
LAPTOP = dict(
    patch_size=8, predict="x0", self_condition=0.5, min_snr_gamma=0.2, t_shift=1.0,
    optimizer="muon", sampling="words", batch_size=32)
SIZES = {
    "tiny": LAPTOP | dict(
        depth=4, width=192, ctx_seconds=1.0, gen_seconds=3.0, steps=4500, minutes=20.0),
    "small": LAPTOP | dict(depth=3, ctx_seconds=2.0, gen_seconds=6.0, steps=40_000),
    "base": PAPER | dict(depth=4, batch_size=64, steps=100_000),
    "medium": PAPER | dict(depth=8, batch_size=256, steps=200_000),
    "large": PAPER | dict(depth=12, batch_size=256, steps=300_000),
    "xl": PAPER | dict(depth=16, batch_size=512, steps=300_000),
    "11b": PAPER | dict(depth=27, batch_size=1024, steps=400_000),
    "16b": PAPER | dict(depth=30, batch_size=1024, steps=500_000),
}


def opt(default, help, *choices, above=None, least=None, most=None, section=None):
    """A field of Config: default, help text, allowed values; `section` starts a group of --help."""
    limits = dict(choices=choices, above=above, least=least, most=most)
    return field(default=default, metadata=dict(help=help, section=section, limits=limits))


@dataclass
class Config:
    """Every setting of a run. A field left at None takes its value from `SIZES[size]`. Section 15
    checks the values and makes a flag of every field."""
    size: str = opt("tiny", "the one dial: depth, and with it width, window and steps", *SIZES)

    data: str = opt("toy", "folders of recordings, or toy: invented languages", section="data")
    toy_words: int = opt(16, "toy speech: words in each invented language", least=2)
    toy_languages: int = opt(2, "toy speech: number of languages", least=1)
    toy_grammar: str = opt("words", "toy speech: pairs of words, or dialogues", "words", "topics")
    toy_seed: int = opt(0, "toy speech: which languages are invented", least=0)
    toy_hours: float = opt(3.0, "toy speech: hours to synthesise", above=0)
    ctx_seconds: float = opt(None, "seconds of context that the model sees", above=0, most=86_400)
    gen_seconds: float = opt(None, "seconds that it generates at once", above=0, most=86_400)

    latent_dim: int = opt(0, "learned latents per frame; 0: log-mel", least=0, section="sound")
    decoder: str = opt("neural", "frames to sound: learned, or not", "neural", "griffinlim")
    decoder_steps: int = opt(300, "training steps of the learned decoder", least=0)

    depth: int = opt(None, "number of blocks L", least=1, section="network")
    width: int = opt(None, "model width d; by default 128 L (tiny: 192)", least=1, most=2 ** 20)
    patch_size: int = opt(None, "frames per token, k", least=1)

    predict: str = opt(None, "velocity (paper), or clean frames", "v", "x0", section="diffusion")
    self_condition: float = opt(None, "share of self-conditioned steps (paper: 0)", least=0, most=1)
    schedule: str = opt("cosine", "noise schedule", "cosine", "linear", "exponential")
    zero_terminal_snr: bool = opt(False, "pure noise at t = 1: no trace of x0 is left")
    min_snr_gamma: float = opt(None, "cap of the loss weight min(SNR, gamma) (base: 5)", above=0)
    t_shift: float = opt(None, "added to logit(t): more training at high noise (base: 0)")
    sampling: str = opt(None, "steps, guidance: even, or where words are decided", "even", "words")
    ctx_drop: float = opt(0.0, "share of contexts replaced by silence (paper: 0)", least=0, most=1)

    steps: int = opt(None, "training steps; more extend a run", least=1, section="training")
    minutes: float = opt(None, "train fewer steps if they would take longer (0: no limit)", least=0)
    batch_size: int = opt(None, "windows per step, over all devices", least=1)
    micro_batch: int = opt(0, "windows per forward pass, to save memory (0: all)", least=0)
    optimizer: str = opt(None, "for the hidden matrices; the rest uses AdamW", "adamw", "muon")
    lr: float = opt(1e-3, "AdamW learning rate at L = 4, d = 512; muP gives the others", above=0)
    muon_lr: float = opt(0.02, "Muon learning rate, the same at every width", above=0)
    weight_decay: float = opt(0.03, "of hidden matrices at L = 4, d = 512; times --lr", least=0)
    lr_schedule: str = opt("wsd", "after warmup: constant, then linear; cosine", "wsd", "cosine")
    warmup: int = opt(100, "steps of linear warmup", least=0)
    clip: float = opt(1.0, "maximum gradient norm", above=0)
    ema: float = opt(0.999, "EMA decay; EMA weights are validated and sampled", least=0, most=1)
    eval_every: int = opt(500, "steps between validations; each saves a checkpoint", least=1)
    save_minutes: float = opt(10.0, "a checkpoint at least this often", above=0)
    seed: int = opt(0, "all randomness follows from this number", least=0, most=2 ** 63 - 1)

    out: str = opt(None, "run folder; by default out/SIZE", section="machine")
    device: str = opt("auto", "cuda, mps, cpu; auto: the first that is available")
    dtype: str = opt("auto", "of matrix products", "auto", "bf16", "fp32")
    compile: bool = opt(None, "torch.compile the blocks; by default in long runs on CUDA")
    parallel: str = opt("ddp", "each device holds the whole model, or a shard", "ddp", "fsdp")
    checkpoint_activations: bool = opt(False, "recompute activations: less memory, more time")

    def __post_init__(self):
        # A time limit: by default that of the size; --steps alone switches it off.
        if self.minutes is None and self.steps is not None:
            self.minutes = 0.0
        for name, value in ({"minutes": 0.0} | SIZES[self.size]).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.width is None:
            self.width = 128 * self.depth
        self.out = str(self.out or f"out/{self.size}")

    @property
    def ctx_frames(self):
        """Context length in frames, a whole number of tokens."""
        return round(self.ctx_seconds * FRAME_RATE / self.patch_size) * self.patch_size

    @property
    def gen_frames(self):
        """Continuation length in frames, a whole number of tokens."""
        return round(self.gen_seconds * FRAME_RATE / self.patch_size) * self.patch_size

    @property
    def channels(self):
        """Numbers per frame, C."""
        return self.latent_dim or MELS


# Randomness. Each random number of a training step and of sampling depends on a key, not on a
# shared state: a step draws the same data and noise whether or not the run was interrupted,
# validated more often or spread over more devices. Only the initial weights and the training of the
# autoencoder use torch's own generator, with the same seed.

def keyed(seed, purpose, index):
    """A 63-bit integer that depends on (seed, purpose, index) alone."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seed, purpose, index):
    """A number in [0, 1) that depends on (seed, purpose, index) alone."""
    return keyed(seed, purpose, index) / 2 ** 63


def keyed_noise(seed, purpose, index, shape, device):
    """Standard normal noise that depends on (seed, purpose, index) and the kind of device alone."""
    generator = torch.Generator(device).manual_seed(keyed(seed, purpose, index))
    return torch.randn(shape, generator=generator, device=device)


# --------------------------------------------------------------------------------------------------
# 2. Sound. Log-mel frames as in the paper: 24 kHz, window 1200 samples (50 ms), hop 300 (12.5 ms),
# 80 bands, hence 80 frames a second. CHOICE: FFT of 2048, Slaney's mel scale from 0 to 12 kHz,
# magnitudes, natural logarithm with a floor of 1e-5. The cache holds log-mel: whoever changes this
# section must raise CACHE_VERSION (section 11).

RATE, HOP, WINDOW, FFT, MELS, FLOOR = 24_000, 300, 1200, 2048, 80, 1e-5
FRAME_RATE = RATE // HOP


def mel_bank(fft=FFT):
    """Slaney's (1998) triangular filters, each of unit area: (80, fft/2 + 1). The mel scale is
    linear below 1 kHz and logarithmic above."""
    log_step = math.log(6.4) / 27
    top = 15 + math.log(RATE / 2 / 1000) / log_step
    mel = torch.linspace(0, top, MELS + 2, dtype=torch.float64)
    edges = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * log_step))
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]

    hertz = torch.linspace(0, RATE / 2, fft // 2 + 1, dtype=torch.float64)
    rising = (hertz - low) / (mid - low)
    falling = (high - hertz) / (high - mid)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


def stft(wave, fft=FFT, hop=HOP, window=WINDOW):
    """(B, N) -> (B, fft/2 + 1, T) complex, T = ceil(N/hop). Frame i is centred on sample i * hop;
    the signal is zero outside."""
    frames = -(-wave.shape[-1] // hop)
    wave = F.pad(wave, (fft // 2, frames * hop - wave.shape[-1] + fft // 2))
    taper = torch.hann_window(window, device=wave.device)
    spectrum = torch.stft(wave, fft, hop, window, taper, center=False, return_complex=True)
    return spectrum[..., :frames]


def log_mel(wave):
    """(B, N) samples at 24 kHz -> (B, T, 80) log-mel, T = ceil(N/300). Silence is log(1e-5)."""
    bank = mel_bank().to(wave.device).T
    pieces = stft(wave).split(128, dim=-1)                  # small pieces stay in the CPU's cache
    mel = torch.cat([piece.abs().mT @ bank for piece in pieces], dim=1)
    return mel.clamp(min=FLOOR).log()


# --------------------------------------------------------------------------------------------------
# 3. Encoder: sound -> frames, which are normalised log-mel [paper]. Section 9 has the decoder.

class Encoder(nn.Module):
    """encode: wave (B, N) -> frames (B, T, C), T = ceil(N/300).

    Frames have mean 0 and standard deviation 1. Log-mel has one mean and one standard deviation for
    all bands: a band of its own may be dead (above 4 kHz in 8 kHz recordings)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mel_stats", torch.tensor([-6.0, 3.0]))          # mean, std

    def encode(self, wave):
        """(B, N) samples at 24 kHz -> (B, T, C) frames, T = ceil(N/300)."""
        return self.from_mel(log_mel(wave.float()))

    def from_mel(self, mel):
        """(B, T, 80) log-mel -> (B, T, C) frames."""
        return (mel - self.mel_stats[0]) / self.mel_stats[1]


# --------------------------------------------------------------------------------------------------
# 4. Diffusion. Variance preserving: xt = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1. A noise
# level is therefore one angle phi: alpha = cos(phi), sigma = sin(phi), from clean (0) to pure noise
# (pi/2); the log-SNR is -2 log tan(phi). A schedule says how phi grows with the time t in [0, 1].
# The network is given phi, not t, so its input means the same under every schedule.

LEAST_NOISE = math.atan(math.exp(-5))             # CHOICE: log-SNR is clipped to [-10, 10]
MOST_NOISE = math.atan(math.exp(5))


class Diffusion:
    """The noise schedule, the network's target and the loss that a Config describes."""

    def __init__(self, config):
        self.schedule, self.zero_terminal_snr = config.schedule, config.zero_terminal_snr
        self.predict, self.gamma, self.shift = config.predict, config.min_snr_gamma, config.t_shift

    def alpha(self, t):
        """Signal level at time t, before clipping."""
        if self.schedule == "cosine":
            return torch.cos(math.pi / 2 * t)               # Nichol & Dhariwal 2021, offset 0
        if self.schedule == "linear":
            return torch.exp(-0.05 * t - 19.9 / 4 * t ** 2) # VP-SDE, 2011.13456, Eq. 33
        return torch.sigmoid(10 - 20 * t).sqrt()            # exponential: log-SNR linear in t

    def angle(self, t):
        """Time t in [0, 1], any shape -> phi. With zero terminal SNR, alpha is rescaled to end at 0
        (Lin et al. 2024)."""
        t = t.double()
        alpha = self.alpha(t)
        largest = MOST_NOISE
        if self.zero_terminal_snr:
            first, last = self.alpha(torch.zeros_like(t)), self.alpha(torch.ones_like(t))
            alpha = (alpha - last) * first / (first - last)
            largest = math.pi / 2
        return torch.acos(alpha.clamp(0, 1)).clamp(LEAST_NOISE, largest).float()

    def times(self, u):
        """Uniform u in [0, 1) -> training times. DEVIATION if they are shifted towards high noise
        (Esser et al. 2024, section 5.3.2)."""
        if not self.shift:
            return u
        return torch.sigmoid(torch.logit(u.clamp(1e-6, 1 - 1e-6)) + self.shift)

    def target(self, x0, eps, phi):
        """What the network is to predict, (B, T, C): v = alpha eps - sigma x0 [paper], or x0."""
        if self.predict == "x0":
            return x0
        return phi.cos() * eps - phi.sin() * x0

    def clean(self, prediction, xt, phi):
        """The network's prediction as an estimate of x0. From v: alpha xt - sigma v (Salimans & Ho
        2022, appendix D)."""
        if self.predict == "x0":
            return prediction
        return phi.cos() * xt - phi.sin() * prediction

    def weight(self, phi):
        """min-SNR weight (Hang et al. 2023): min(SNR, gamma) on the error of x0, which is
        min(SNR, gamma) / (SNR + 1) on the error of v [paper]. A smaller gamma caps more of the low
        noise levels, so high noise has a larger share of the loss."""
        snr = phi.tan() ** -2
        capped = snr.clamp(max=self.gamma)
        return capped if self.predict == "x0" else capped / (snr + 1)

    def loss(self, model, x0, ctx, phi, eps, self_condition=False):
        """Weighted squared error (B,) of predicting x0 (B, T, C) from its noisy version at noise
        level phi (B,), given ctx (B, Tc, C).

        DEVIATION with self-conditioning (Chen et al. 2023): the network first estimates x0 without
        gradients, then sees this estimate; in sampling, it sees the estimate of the last step. A
        training step does this for all of its windows or for none."""
        phi_b = phi[:, None, None]                                            # (B, 1, 1)
        xt = phi_b.cos() * x0 + phi_b.sin() * eps

        estimate = None
        if self_condition:
            with torch.no_grad():
                estimate = self.clean(model(xt, phi, ctx).float(), xt, phi_b)
            # Before torch 2.10, autocast kept weights that it had cast without gradients.
            torch.clear_autocast_cache()

        prediction = model(xt, phi, ctx, estimate).float()
        error = prediction - self.target(x0, eps, phi_b)
        return (self.weight(phi_b) * error ** 2).mean((1, 2))


# --------------------------------------------------------------------------------------------------
# 5. muP (Yang et al. 2021) and CompleteP (Dey et al. 2025) [paper]: what is tuned at the base size
# (L = 4, d = 512) holds at every size. Learning rate and weight decay of a layer follow the width
# m = d/512 by its role. The residual branches and AdamW's epsilon also follow the depth L/4.

BASE_DEPTH, BASE_WIDTH = 4, 512


class Role(NamedTuple):
    """How a kind of parameter begins and learns at relative width m."""
    init: float           # initial standard deviation = init / sqrt(number of inputs)
    lr_power: int         # learning rate = base rate * m ** lr_power
    decays: bool          # weight decay = base decay * m, so rate * decay is the same at all m


ROLES = {
    "input": Role(init=1, lr_power=0, decays=False),    # frames or noise level -> residual stream
    "hidden": Role(init=1, lr_power=-1, decays=True),   # width -> width
    "adaln": Role(init=0, lr_power=-1, decays=False),   # zero: an untrained block is the identity
    "output": Role(init=0, lr_power=-1, decays=False),  # zero: an untrained model outputs 0
    "bias": Role(init=0, lr_power=0, decays=False),
}


def linear(fan_in, fan_out, role, bias=False):
    """A linear layer that knows its role, initialised accordingly."""
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    nn.init.normal_(layer.weight, std=ROLES[role].init * fan_in ** -0.5)
    layer.role = role
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def role(model, name):
    """The role of a parameter of `model`, by its name. `linear` made every weight's layer."""
    layer, _, kind = name.rpartition(".")
    return "bias" if kind == "bias" else model.get_submodule(layer).role


# --------------------------------------------------------------------------------------------------
# 6. MM-DiT, the two-stream transformer of Stable Diffusion 3 (Esser et al. 2024) [paper]. Context
# and continuation have their own weights and meet in one bidirectional attention per block. The
# noise level modulates every normalisation (adaLN-zero, Peebles & Xie 2023). CHOICE: rotary
# positions that run through both streams, normalised queries and keys.

def modulate(x, shift, scale):
    """Layer normalisation of x (B, T, d), then shift and scale (B, 1, d) by the noise level."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def rotary(tokens, head, x):
    """Cosines and sines (T, head/2) of the rotation angles of positions 0 to T - 1, for x."""
    frequencies = 10_000 ** -torch.linspace(0, 1, head // 2, device=x.device)
    angles = torch.arange(tokens, device=x.device)[:, None] * frequencies
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021): x (..., T, D) with cos, sin (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def attention(q, k, v):
    """Softmax attention of (B, H, T, D). On a CPU two matrix products are 1.5 to 6 times faster
    than torch's fused attention, forward and backward."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    return scores.softmax(-1).to(v.dtype) @ v


class Stream(nn.Module):
    """One stream's half of a block. The context of the last block only serves attention, so its
    stream ends there: `last`."""

    def __init__(self, d, last=False):
        super().__init__()
        self.last = last
        self.adaln = linear(d, (2 if last else 6) * d, "adaln", bias=True)
        self.qkv = linear(d, 3 * d, "hidden")
        if not last:
            self.out = linear(d, d, "hidden")
            self.up = linear(d, 4 * d, "hidden")
            self.down = linear(4 * d, d, "hidden")

    def open(self, x, c):
        """Stream x (B, T, d), noise embedding c (B, 1, d) -> queries, keys and values (B, T, 3d),
        and the modulation that `close` needs."""
        modulation = self.adaln(c).chunk(2 if self.last else 6, dim=-1)
        shift, scale = modulation[:2]
        return self.qkv(modulate(x, shift, scale)), modulation[2:]

    def close(self, x, attended, modulation, residual):
        """Add attention (B, T, d) to the stream, then the MLP's result; each times `residual`."""
        gate, shift, scale, mlp_gate = modulation
        x = x + residual * gate * self.out(attended)
        hidden = F.gelu(self.up(modulate(x, shift, scale)))
        return x + residual * mlp_gate * self.down(hidden)


class Block(nn.Module):
    """Both streams through one joint attention."""

    def __init__(self, d, heads, last):
        super().__init__()
        self.heads = heads
        self.ctx, self.gen = Stream(d, last), Stream(d)

    def forward(self, ctx, gen, c, cos, sin, residual):
        """ctx (B, Tc, d), gen (B, Tg, d), noise embedding c (B, 1, d) -> the same two, updated."""
        ctx_qkv, ctx_modulation = self.ctx.open(ctx, c)
        gen_qkv, gen_modulation = self.gen.open(gen, c)

        # Join the streams along time: (3, B, H, Tc + Tg, D).
        qkv = torch.cat([self.split_heads(ctx_qkv), self.split_heads(gen_qkv)], dim=3)
        qk, v = qkv.split([2, 1])

        # Normalised queries and keys, rotated by their positions, then attention over both streams.
        q, k = rotate(F.layer_norm(qk, qk.shape[-1:]), cos, sin)
        attended = attention(q, k, v[0])                                      # (B, H, T, D)
        attended = attended.transpose(1, 2)                                   # (B, T, H, D)
        ctx_attended = attended[:, :ctx.shape[1]].flatten(2)                  # (B, Tc, d)
        gen_attended = attended[:, ctx.shape[1]:].flatten(2)                  # (B, Tg, d)

        # Each stream has its own output projection and MLP.
        gen = self.gen.close(gen, gen_attended, gen_modulation, residual)
        if self.ctx.last:
            return None, gen
        return self.ctx.close(ctx, ctx_attended, ctx_modulation, residual), gen

    def split_heads(self, qkv):
        """(B, T, 3d) -> (3, B, H, T, D)."""
        return qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


class MMDiT(nn.Module):
    """model(xt (B, Tg, C), phi (B,) or (1,), ctx (B, Tc, C)) -> prediction (B, Tg, C). Tc and Tg
    are whole numbers of tokens. A fourth argument, like xt, is an earlier estimate of x0."""

    def __init__(self, config):
        super().__init__()
        d, token = config.width, config.patch_size * config.channels
        heads = max(1, d // 64)
        self.config, self.patch_size = config, config.patch_size
        self.hears = config.ctx_frames                        # lab/causal.py hears more
        self.register_buffer("silence", torch.zeros(config.channels))     # set by Trainer
        self.enter_ctx = linear(token, d, "input", bias=True)
        self.enter_gen = linear(token, d, "input", bias=True)
        self.enter_guess = linear(token, d, "input") if config.self_condition else None
        self.noise_in = linear(256, d, "input", bias=True)
        self.noise_out = linear(d, d, "hidden", bias=True)
        self.blocks = nn.ModuleList(
            Block(d, heads, last=i == config.depth - 1) for i in range(config.depth))
        self.final = linear(d, 2 * d, "adaln", bias=True)
        self.leave = linear(d, token, "output", bias=True)

    def embed(self, phi):
        """Noise level (B,) -> (B, 1, d): sines and cosines of 128 frequencies, then an MLP."""
        frequencies = 10_000 ** -torch.linspace(0, 1, 128, device=phi.device)
        angles = phi[:, None] * 1000 * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        features = features.to(self.silence.dtype)                            # that of the weights
        return F.silu(self.noise_out(F.silu(self.noise_in(features))))[:, None]

    def patches(self, frames):
        """(B, T, C) -> (B, T/k, k C): k frames in a row are one token."""
        frames = frames.to(self.silence.dtype)
        return frames.unflatten(1, (-1, self.patch_size)).flatten(2)

    def forward(self, xt, phi, ctx, estimate=None):
        # Tokens.
        c = self.embed(phi)
        ctx = self.enter_ctx(self.patches(ctx))                               # (B, Tc/k, d)
        gen = self.enter_gen(self.patches(xt))                                # (B, Tg/k, d)
        if self.enter_guess is not None and estimate is not None:
            gen = gen + self.enter_guess(self.patches(estimate))

        # Blocks.
        head = gen.shape[-1] // self.blocks[0].heads
        cos, sin = rotary(ctx.shape[1] + gen.shape[1], head, gen)
        residual = BASE_DEPTH / len(self.blocks)                              # CompleteP
        for block in self.blocks:
            ctx, gen = block(ctx, gen, c, cos, sin, residual)

        # Frames.
        shift, scale = self.final(c).chunk(2, dim=-1)
        tokens = self.leave(modulate(gen, shift, scale))                      # (B, Tg/k, k C)
        return tokens.unflatten(2, (self.patch_size, -1)).flatten(1, 2)       # (B, Tg, C)

    def continuation(self, ctx, noise, steps, cfg, sampler):
        """A window like `noise` (B, Tg, C) that continues ctx (B, Tc, C); for `sample`, below."""
        predict = functools.partial(guided, self, ctx, cfg)
        return SOLVERS[sampler](predict, noise, levels(self.config, steps))


# --------------------------------------------------------------------------------------------------
# 7. Sampler. From noise at the largest angle down to clean frames at angle 0. In each step the
# network estimates x0. CHOICE with --sampling words, tuned on toy speech: steps are shorter where
# there is more noise, since language is decided there, and guided where the log-SNR is between -4
# and 0 (Kynkäänniemi et al. 2024).

STEPS, CFG = 40, 2.0                          # defaults: evaluations per window, guidance
GUIDED = math.pi / 4, math.atan(math.exp(2))


def levels(config, steps):
    """The steps + 1 noise angles of a sampler, falling to 0."""
    largest = min(Diffusion(config).angle(torch.ones(())).item(), math.pi / 2)    # rounded up
    fractions = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    power = 2.5 if config.sampling == "words" else 1
    return (largest * (1 - fractions ** power)).tolist()


def is_guided(config, phi):
    """Whether the sampler guides at noise angle phi."""
    return config.sampling == "even" or GUIDED[0] < phi < GUIDED[1]


@torch.no_grad()
def sample(model, context, frames=None, steps=STEPS, cfg=CFG, sampler="dpm", seed=0, progress=iter):
    """Continue `context` (B, Tc, C) by `frames` frames (default: one window) -> (B, frames, C).

    `cfg` is the guidance scale (1: none). Longer continuations are made window by window; the next
    context is the newest frames. The noise of item i depends on (seed, i) alone."""
    config, ctx = model.config, context.float()
    missing = max(0, config.ctx_frames - ctx.shape[1])
    silence = model.silence.float().expand(len(ctx), missing, -1)
    ctx = torch.cat([silence, ctx], dim=1)                    # silence before a short context
    frames = frames or config.gen_frames
    shape, windows = (config.gen_frames, config.channels), []
    for window in progress(range(-(-frames // config.gen_frames))):
        tokens = min(model.hears, ctx.shape[1]) // config.patch_size
        ctx = ctx[:, -tokens * config.patch_size:]            # the newest, as whole tokens
        noise = torch.stack([keyed_noise(seed, f"sample {window}", item, shape, ctx.device)
                             for item in range(len(ctx))])
        windows.append(model.continuation(ctx, noise, steps, cfg, sampler))
        ctx = torch.cat([ctx, windows[-1]], dim=1)
    return torch.cat(windows, dim=1)[:, :frames]


def guided(model, ctx, cfg, xt, phi, estimate):
    """The network's x0 (B, Tg, C) for xt at noise angle phi, with classifier-free guidance (Ho &
    Salimans 2021): uncond + cfg (cond - uncond). `uncond` is the same network with silence as its
    context [paper]; in training it met such contexts only with --ctx-drop.

    Nor does `uncond` see the last estimate of x0: guiding away from a network that knows less makes
    more words (compare autoguidance, Karras et al. 2024)."""
    diffusion, level = Diffusion(model.config), torch.full((1,), phi, device=xt.device)
    if cfg == 1 or not is_guided(model.config, phi):
        return diffusion.clean(model(xt, level, ctx, estimate).float(), xt, level)

    # Both in one batch.
    xt = xt.repeat(2, 1, 1)
    ctx = torch.cat([ctx, model.silence.expand_as(ctx)])
    if estimate is not None:                                  # zeros are as no estimate
        estimate = torch.cat([estimate, torch.zeros_like(estimate)])
    x0 = diffusion.clean(model(xt, level, ctx, estimate).float(), xt, level)
    x0_cond, x0_uncond = x0.chunk(2)
    return x0_uncond + cfg * (x0_cond - x0_uncond)


def ddim(predict, x, angles):
    """DDIM (Song et al. 2021, 2010.02502, Eq. 12 without noise): keep the eps that x0 implies, and
    move to the next angle. `predict(x, phi, estimate)` gives x0."""
    x0 = None
    for phi, next_phi in zip(angles, angles[1:]):
        x0 = predict(x, phi, x0)
        eps = (x - math.cos(phi) * x0) / math.sin(phi)
        x = math.cos(next_phi) * x0 + math.sin(next_phi) * eps
    return x


def dpm_solver(predict, x, angles):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): second order, by extrapolating x0 from its
    change since the last step. The first step is of first order, and so is the last one, to clean
    frames, where the step in log-SNR is infinite. The network sees the extrapolated x0 as its next
    estimate."""
    half_log_snr = [-math.log(math.tan(phi)) if phi else math.inf for phi in angles]
    previous = extrapolated = None
    for i, (phi, next_phi) in enumerate(zip(angles, angles[1:])):
        x0 = extrapolated = predict(x, phi, extrapolated)
        h = half_log_snr[i + 1] - half_log_snr[i]
        if previous is not None and math.isfinite(h):
            last_h = half_log_snr[i] - half_log_snr[i - 1]
            extrapolated = x0 + (x0 - previous) * h / (2 * last_h)
        shrink = math.sin(next_phi) / math.sin(phi)
        x = shrink * x + math.cos(next_phi) * (1 - math.exp(-h)) * extrapolated
        previous = x0
    return x


SOLVERS = {"dpm": dpm_solver, "ddim": ddim}


# --------------------------------------------------------------------------------------------------
# 8. The training step. Muon updates the hidden matrices, AdamW the other parameters.

# CHOICE: four Newton-Schulz steps, each with the coefficients that are best after the steps before
# it, for singular values from 0.003 to 1 (Amsel et al. 2025, "The Polar Express").
NEWTON_SCHULZ = ((8.3837, -24.7659, 18.3571), (4.0434, -3.0114, 0.5695),
                 (3.5056, -2.6267, 0.5257), (2.4901, -1.8343, 0.4368))


def polynomial(gram, a, b, c):
    """a I + b gram + c gram^2, for gram (N, n, n)."""
    result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal(dim1=1, dim2=2).add_(a)
    return result


def orthogonalize(matrices, dtype):
    """(N, rows, columns) -> matrices with the same singular vectors and singular values of about 1,
    computed in `dtype`.

    A step takes every singular value s to a s + b s^3 + c s^5: it multiplies the matrix by a
    polynomial of its Gram matrix."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    # Now s is at most 1, also when bf16 rounds: the polynomials explode above 1.003.
    x = x / (1.02 * x.norm(dim=(1, 2), keepdim=True)).clamp(min=1e-7)
    for coefficients in NEWTON_SCHULZ[:-2]:
        gram = x.mT @ x if tall else x @ x.mT
        factor = polynomial(gram, *coefficients)
        x = x @ factor if tall else factor @ x

    # Polynomials of a matrix commute, so the last two steps share one Gram matrix: a sixth faster.
    gram = x.mT @ x if tall else x @ x.mT
    third = polynomial(gram, *NEWTON_SCHULZ[-2])
    fourth = polynomial(third @ gram @ third, *NEWTON_SCHULZ[-1])
    return x @ (third @ fourth) if tall else (fourth @ third) @ x


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal: a step changes every direction of a matrix alike
    (Jordan et al. 2024). Matrices of one shape are updated in one batched product. Its rate is the
    same at every width, because the spectral norm of the updates is fixed (Bernstein 2025)."""
    orthogonalize = staticmethod(orthogonalize)               # or its share of them (lab/muon.py)

    def __init__(self, groups, lr, weight_decay, momentum=0.95, dtype=torch.float32):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
            for matrices in shapes.values():
                self.update(matrices, group["lr"], group["weight_decay"], group["momentum"])

    def update(self, matrices, lr, weight_decay, momentum):
        """Update matrices (rows, columns) of one shape."""
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        gradients = [matrix.grad for matrix in matrices]
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]

        # Nesterov momentum, orthogonalised.
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = [torch.lerp(gradient, buffer, momentum).to(self.dtype)
                   for gradient, buffer in zip(gradients, buffers)]
        updates = self.orthogonalize(torch.stack(updates), self.dtype)

        # A matrix with more rows than columns gets a larger step.
        rows, columns = matrices[0].shape
        rate = lr * max(1, rows / columns) ** 0.5
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        for matrix, update in zip(matrices, updates):
            matrix.add_(update, alpha=-rate)


def make_optimizers(model, config, dtype=torch.float32):
    """AdamW, and Muon if asked for, over all parameters of `model`, with the learning rate and
    weight decay of their roles. Each group keeps its full learning rate as "peak"."""
    m, relative_depth = config.width / BASE_WIDTH, config.depth / BASE_DEPTH
    by_role = {name: [] for name in ROLES}
    for name, parameter in model.named_parameters():
        by_role[role(model, name)].append(parameter)
    matrices = by_role.pop("hidden") if config.optimizer == "muon" else []

    groups = []
    for name, parameters in by_role.items():
        if not parameters:
            continue
        lr = config.lr * m ** ROLES[name].lr_power
        decay = config.weight_decay * m if ROLES[name].decays else 0.0
        groups.append(dict(params=parameters, lr=lr, peak=lr, weight_decay=decay))
    fused = not next(model.parameters()).is_meta
    epsilon = 1e-8 / (m * relative_depth)                                     # CompleteP
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=epsilon, fused=fused)]
    if matrices:
        decay = config.weight_decay * config.lr / config.muon_lr
        groups = [dict(params=matrices, peak=config.muon_lr)]
        optimizers.append(Muon(groups, config.muon_lr, decay, dtype=dtype))
    return optimizers


def decay_start(steps):
    """The step at which wsd (Hu et al. 2024) begins to decay. CHOICE: linearly, over a quarter.
    Before it, a longer and a shorter run are equal."""
    return steps - math.ceil(steps / 4)


def lr_factor(config, step):
    """Learning rate at a step, relative to its peak: linear warmup, then cosine or wsd."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup))
    if config.lr_schedule == "cosine":
        return warmup * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
    decay = (config.steps - step) / (config.steps - decay_start(config.steps))
    return warmup * min(1.0, decay)


def autocast(device, dtype):
    """The context in which matrix products are computed in `dtype`; weights stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class OneDevice:
    """Where a training step runs. `ManyDevices`, in Part II, has the same methods."""
    rank, ranks = 0, 1

    def __init__(self, device="cpu", dtype=torch.float32):
        self.device, self.dtype = torch.device(device), dtype
        # It scales nothing: on the device, it skips updates that are not finite.
        self.scaler = torch.amp.GradScaler(self.device.type, 1.0, enabled=self.device.type != "mps")

    def place(self, tensor):
        """Copy a CPU's tensor here; except on CUDA, wait: its memory may be used again after it."""
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def micro_batches(self, config):
        """Positions in the batch that this device computes: a range for each forward pass."""
        share = config.batch_size // self.ranks
        size = config.micro_batch or share
        first = self.rank * share
        return [range(i, i + size) for i in range(first, first + share, size)]

    def exchange(self, network, last):
        """The context of a forward and backward pass, and of the exchange of gradients after it."""
        return contextlib.nullcontext()

    def total(self, value):
        """The sum of a tensor over all devices."""
        return value


def noise_levels(config, diffusion, step, positions):
    """Noise angles (b,) of the windows at these positions in a step's batch. The times of a batch
    are evenly spaced, with one random offset per step."""
    offset = uniform(config.seed, "time", step)
    u = (torch.tensor(positions) + offset) / config.batch_size
    return diffusion.angle(diffusion.times(u))


def dropped(config, step, positions):
    """Which contexts at these positions are replaced by silence, for guidance: (b,)."""
    keys = (step * config.batch_size + i for i in positions)
    return torch.tensor([uniform(config.seed, "drop", key) < config.ctx_drop for key in keys])


def training_step(network, ema, optimizers, diffusion, config, step, batches, hardware):
    """One update of the network, of its EMA and of the optimisers' state.

    `batches` iterates over micro-batches: ctx (b, Tc, C), x0 (b, Tg, C), eps like x0. Returns the
    loss and the gradient norm, (2,). A step whose gradients are not finite changes no weight.
    With AdamW on CUDA, nothing here waits for the device."""
    self_condition = uniform(config.seed, "guess", step) < config.self_condition
    parts = hardware.micro_batches(config)

    # Sum the gradients. `parts` comes first: zip must not take a batch of the next step.
    total = torch.zeros((), device=hardware.device)
    for positions, (ctx, x0, eps) in zip(parts, batches):
        phi = hardware.place(noise_levels(config, diffusion, step, positions))
        silent = hardware.place(dropped(config, step, positions))
        ctx = torch.where(silent[:, None, None], ema.silence, ctx)
        with hardware.exchange(network, last=positions == parts[-1]):
            with autocast(hardware.device, hardware.dtype):
                losses = diffusion.loss(network, x0, ctx, phi, eps, self_condition)
                loss = losses.sum() / config.batch_size
            hardware.scaler.scale(loss * hardware.ranks).backward()   # the exchange takes the mean
        total += loss.detach()
    total = hardware.total(total)
    for optimizer in optimizers:
        hardware.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(network.parameters(), config.clip)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm       # of FSDP2's shards

    # The scaler skips one optimiser on the device. Two must skip the same steps: so we look.
    finite = len(optimizers) == 1 and hardware.scaler.is_enabled() or math.isfinite(norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor(config, step)
        if finite:
            hardware.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    hardware.scaler.update(1.0)

    decay = min(config.ema, (1 + step) / (10 + step)) if finite else 1.0      # short at first
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)
    return torch.stack([total, norm])


# ==================================================================================================
# PART II: THE MACHINERY (skip this at first reading)
# ==================================================================================================

import argparse
import ast
import copy
import datetime
import gc
import glob
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

LAUNCHED = time.perf_counter()


class UserError(Exception):
    """A mistake that the user can correct: printed as one line, exit status 2."""


# --------------------------------------------------------------------------------------------------
# 9. Decoder: frames -> sound. It follows Vocos (Siuzdak 2023): ConvNeXt blocks at the frame rate
# predict a spectrum, one inverse STFT makes the waveform. Frames hold no phase. Vocos learns to
# make one; a minute of training is too short for that. So our network shapes a source-filter model
# (Dudley 1939): pulses at the pitch found in the frames, and noise. For every bin it predicts a
# gain, the depth of the harmonics, and the ratio of pulses to noise. Griffin-Lim then makes the
# phases of neighbouring frames agree.

DECODER_FFT = WINDOW       # no zero padding: 601 bins
PULSE_LOG_MAGNITUDE = 3.5          # typical of the pulse train: neutral for the harmonics


def istft(spectrum):
    """(B, n + 1, T) complex -> (B, n/2 T) samples; the inverse of `stft(wave, 2n, n/2, 2n)`."""
    fft = 2 * spectrum.shape[1] - 2
    hop = fft // 4
    taper = torch.hann_window(fft, device=spectrum.device)
    return torch.istft(spectrum, fft, hop, fft, taper, length=hop * spectrum.shape[-1])


def unmel(mel, iterations=3):
    """(B, T, 80) log-mel -> (B, 601, T) non-negative magnitudes with this mel spectrum, by
    multiplicative updates (Richardson 1972; Lucy 1974)."""
    bank = mel_bank(DECODER_FFT).to(mel.device)             # (80, 601)
    mel = mel.exp().mT                                      # (B, 80, T)
    spread = bank.T / bank.sum(0)[:, None].clamp(min=1e-8)
    magnitude = (spread @ (mel / bank.sum(1)[:, None])).clamp(min=1e-7)
    for _ in range(iterations):
        ratio = mel / (bank @ magnitude)
        magnitude = (magnitude * (spread @ ratio)).clamp(min=1e-7)
    return magnitude


@torch.no_grad()
def pitch(magnitude, low=60, high=420):
    """(B, 601, T) magnitudes -> pitch in Hz (B, T) and periodicity, at most 1 (B, T).

    The best of 256 comb filters below 5 kHz, 0.8 % apart, on compressed magnitudes: without the
    compression one strong formant would hide the other harmonics."""
    bins = torch.arange(2, 5000 * DECODER_FFT // RATE, device=magnitude.device)
    hertz = low * (high / low) ** torch.linspace(0, 1, 256, device=magnitude.device)
    combs = torch.cos(2 * math.pi * bins * RATE / DECODER_FFT / hertz[:, None])   # (256, bins)
    compressed = magnitude[:, 2:2 + len(bins)] ** 0.7
    periodicity, best = (combs @ compressed / compressed.sum(1, keepdim=True)).max(1)

    # A running median over five frames removes single octave errors.
    padded = F.pad(hertz[best], (2, 2), mode="replicate")
    return padded.unfold(1, 5, 1).median(-1).values, periodicity


def pulses(hertz, start, phase):
    """Pitch (B, T) -> pulse train (B, 300 T) with harmonics up to 12 kHz, and its phase in cycles
    (B, 300 T), which is `phase` (B, 1) at frame `start`."""
    hertz = hertz[:, None].cpu().double()                   # on the CPU: MPS has no doubles
    hertz = F.interpolate(hertz, scale_factor=HOP, mode="linear")[:, 0]
    cycles = F.pad((hertz / RATE).cumsum(1), (1, 0))
    cycles = cycles[:, 1:] - cycles[:, start * HOP, None] + phase
    cycles = cycles - cycles.round()

    harmonics = RATE / 2 / hertz.float()
    distance = torch.sin(math.pi * cycles.float())
    train = harmonics.sqrt() * torch.exp(-0.5 * (harmonics * distance) ** 2)
    return train, cycles


def griffin_lim(magnitude, source, iterations=32, momentum=0.99):
    """Magnitudes (B, n + 1, T) and a complex spectrum with initial phases, of the same shape ->
    complex spectrum whose phases agree better between frames (Perraudin et al. 2013)."""
    fft = 2 * magnitude.shape[1] - 2
    phase, previous = source.sgn(), 0
    for _ in range(iterations):
        projected = stft(istft(magnitude * phase), fft, fft // 4, fft)
        phase = (projected - previous * (momentum / (1 + momentum))).sgn()
        previous = projected
    return magnitude * phase


def two_band_griffin_lim(magnitude, source, low=60):
    """24 iterations below 1.2 kHz, where phase matters most and an iteration costs a fifteenth,
    then two over the whole spectrum. The lowest n + 1 bins are themselves speech at a lower rate.
    """
    low_band = griffin_lim(magnitude[:, :low + 1], source[:, :low + 1], iterations=24)
    source = torch.cat([low_band[:, :low], source[:, low:]], dim=1)
    return griffin_lim(magnitude, source, iterations=2)


class ConvNeXt(nn.Module):
    """(B, C, T) -> (B, C, T): depthwise convolution over time, then an MLP over channels (Liu et
    al. 2022)."""

    def __init__(self, channels, scale):
        super().__init__()
        self.mix = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 3 * channels)
        self.down = nn.Linear(3 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x):
        hidden = self.norm(self.mix(x).mT)                                    # (B, T, C)
        hidden = self.down(F.gelu(self.up(hidden)))
        return x + (self.scale * hidden).mT


def convnext(channels_in, channels_out, width=128, blocks=3):
    """A network (B, channels_in, T) -> (B, channels_out, T)."""
    middle = [ConvNeXt(width, 1 / blocks) for _ in range(blocks)]
    enter = nn.Conv1d(channels_in, width, 7, padding=3)
    return nn.Sequential(enter, *middle, nn.Conv1d(width, channels_out, 1))


class AudioAutoencoder(Encoder):
    """encode: wave (B, N) -> frames (B, T, C);  decode: frames -> wave (B, 300 T). Frames are
    log-mel, C = 80; learned latents are in lab/latents.py."""

    def __init__(self, decoder="neural"):
        super().__init__()
        self.decoder = decoder
        self.register_buffer("latent_stats", torch.tensor([0.0, 1.0]))        # of lab/latents.py
        if decoder == "neural":
            self.shaper = convnext(MELS + 2, 3 * (DECODER_FFT // 2 + 1))
            for parameter in self.shaper[-1].parameters():
                nn.init.zeros_(parameter)                     # an untrained network changes nothing

    def to_mel(self, frames):
        """(B, T, C) frames -> (B, T, 80) normalised log-mel."""
        return frames

    def silence(self):
        """A frame of digital silence, (C,)."""
        wave = torch.zeros(1, 33 * HOP, device=self.mel_stats.device)
        return self.encode(wave)[0, 16]

    def spectrum(self, normalised, noise, start=0, phase=0, dtype=torch.float32):
        """Normalised log-mel (B, T, 80) and noise (1, 300 T) -> magnitudes (B, 601, T), a complex
        spectrum with initial phases (B, 601, T), and the phase of the pulses (B, 300 T), which is
        `phase` at frame `start`."""
        mel = normalised * self.mel_stats[1] + self.mel_stats[0]
        noise_spectrum = stft(noise, DECODER_FFT)
        if self.decoder == "griffinlim":
            return unmel(mel), noise_spectrum, noise

        # The source: pulses at the pitch of each frame.
        magnitude = unmel(mel, iterations=1)
        hertz, periodicity = pitch(magnitude)                                 # (B, T) each
        pulse_train, phase = pulses(hertz, start, phase)
        pulse_spectrum = stft(pulse_train.to(mel.device), DECODER_FFT)

        # The network's three predictions for every bin of every frame.
        relative_pitch = (hertz / 150).log()[..., None]
        features = torch.cat([normalised, relative_pitch, periodicity[..., None]], dim=-1)
        features = features.mT.to(self.shaper[0].weight.dtype)
        with autocast(mel.device, dtype):
            prediction = self.shaper(features).float()
        gain, depth, ratio = prediction.chunk(3, dim=1)                       # (B, 601, T) each

        # The filter: a mel band is wider than a harmonic, so the harmonics are put back.
        harmonics = pulse_spectrum.abs().clamp(min=1).log() - PULSE_LOG_MAGNITUDE
        magnitude = magnitude * (gain + depth * harmonics).clamp(-8, 3).exp()

        # Pulses and noise. Before training, the log ratio is -3 where nothing is periodic, and 5
        # where everything is.
        log_ratio = ratio + 8 * periodicity[:, None] - 3
        source = pulse_spectrum * log_ratio.clamp(-8, 8).exp() + noise_spectrum
        return magnitude, source, phase

    def decode(self, frames, piece=1600, margin=192):
        """(B, T, C) frames -> (B, 300 T) samples. Long inputs are decoded in pieces that overlap by
        `margin` frames on each side, so memory stays bounded."""
        length = frames.shape[1]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, HOP * length, generator=generator).to(frames.device)
        fit_phases = two_band_griffin_lim if self.decoder == "neural" else griffin_lim
        waves, phase = [], 0
        for start in range(0, length, piece):
            stop = min(start + piece, length)
            first, last = max(0, start - margin), min(stop + margin, length)
            mel = self.to_mel(frames[:, first:last])
            magnitude, source, phases = self.spectrum(
                mel, noise[:, first * HOP:last * HOP], start - first, phase)
            phase = phases[:, (stop - first) * HOP - 1, None]                 # the next goes on
            wave = istft(fit_phases(magnitude, source))
            waves.append(wave[:, (start - first) * HOP:(stop - first) * HOP])
        return torch.cat(waves, dim=1)

    def decoder_loss(self, wave, dtype=torch.float32):
        """Loss of the decoder on samples (B, N): log-mel and STFT magnitudes of what it decodes."""
        target = log_mel(wave)
        mel = self.to_mel(self.from_mel(target)).detach()
        magnitude, source, _ = self.spectrum(mel, torch.randn_like(wave[:1]), dtype=dtype)
        decoded = istft(griffin_lim(magnitude, source, iterations=2))
        return 5 * F.l1_loss(log_mel(decoded), target) + stft_distance(decoded, wave)


def stft_distance(decoded, wave):
    """Multi-resolution STFT distance of (B, N) samples: spectral convergence and log magnitude
    (Yamamoto et al. 2020)."""
    total = 0
    for fft in (512, 1024, 2048):
        a = stft(decoded, fft, fft // 4, fft).abs()
        b = stft(wave, fft, fft // 4, fft).abs()
        total = total + 3 * (a - b).norm() / b.norm().clamp(min=1e-3)
        total = total + F.l1_loss((a + 1e-4).log(), (b + 1e-4).log())
    return total


# --------------------------------------------------------------------------------------------------
# 10. Files: recordings of any kind, and writing that leaves a whole file or the old one.

AUDIO_FILES = set(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .caf .w64 .rf64 .sph "
                  ".m4a .aac .mp4 .webm .wma .amr .mkv .mov".split())     # the last are never read
RETRIES = 50 if os.name == "nt" else 0


def reason(error):
    """The first line of an error's message, or failing that its type."""
    lines = getattr(error, "error_string", str(error)).splitlines()           # of libsndfile
    return lines[0] if lines else type(error).__name__


def printable(name):
    """A file name, whatever is in it, as text that can be printed on one line and hashed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def fingerprint(text):
    """Eight hexadecimal digits that stand for a text."""
    return hashlib.blake2b(os.fsencode(text), digest_size=4).hexdigest()


def resample(wave, rate, new_rate=RATE):
    """(N,) at `rate` Hz -> (ceil(N * new_rate / rate),): the same spectrum, cut off or padded with
    zeros."""
    if rate == new_rate:
        return wave
    seconds = len(wave) // rate + 2             # whole seconds: whole numbers of samples at both
    spectrum = torch.fft.rfft(F.pad(wave, (0, seconds * rate - len(wave))))
    shared = min(rate, new_rate) * seconds // 2
    spectrum = F.pad(spectrum[:shared], (0, new_rate * seconds // 2 + 1 - shared))
    resampled = torch.fft.irfft(spectrum, seconds * new_rate) * (new_rate / rate)
    return resampled[:-(-len(wave) * new_rate // rate)]


def read_audio(path, start=0, stop=math.inf):
    """Yield seconds `start` to `stop` of a recording, a minute at a time: mono, 24 kHz, float32
    (N,). Raises UserError if it can't be read; and after its last minute, if the file is longer or
    shorter than its header says."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        # Python opens the file: libsndfile does not take every name.
        with open(path, "rb") as disk, soundfile.SoundFile(disk.fileno(), closefd=False) as file:
            rate, done = file.samplerate, start * file.samplerate
            end = math.ceil(min(file.frames, stop * rate))
            if not 8000 <= rate <= 192_000:
                raise UserError(f"{path}: {rate} Hz is outside 8 to 192 kHz")
            scale = full_scale(path, file.subtype, os.fstat(disk.fileno()).st_mtime_ns)
            for at in range(start * rate, end, 60 * rate):
                # Minutes overlap by a second, so that resampling makes no edge between them.
                before = min(at, rate)
                if at:
                    file.seek(at - before)
                count = min(61 * rate, end - at) + before
                piece = file.read(count, dtype="float32", always_2d=True)
                done = at + len(piece) - before
                if done <= at:                                # the header promised more
                    break
                if not np.isfinite(piece).all():
                    raise UserError(f"{path}: contains NaN or infinite samples")
                mono = torch.from_numpy(to_mono((piece / scale).clip(-1, 1)))
                samples = -(-min(60 * rate, len(piece) - before) * RATE // rate)
                yield resample(mono, rate)[before * RATE // rate:][:samples]

            # libsndfile reads as far as the header says, which may be wrong: of files that were
            # joined, or of an mp3 that does not state its length.
            size = os.fstat(disk.fileno()).st_size
            unread = size - os.lseek(disk.fileno(), 0, os.SEEK_CUR)
            if done < end or (end == file.frames and unread > 4096 + 0.02 * size):
                raise UserError(f"{path}: only its first {done / rate:.1f} s can be read")
    except (soundfile.SoundFileError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not readable as audio ({reason(error)})") from None


@functools.lru_cache(maxsize=64)
def full_scale(path, subtype, modified):
    """1, or 32768 for a file of floats that holds 16-bit integers. Remembered until the file is
    `modified`, since a long recording is read in many parts."""
    if subtype not in ("FLOAT", "DOUBLE"):
        return 1
    with open(path, "rb") as disk, soundfile.SoundFile(disk.fileno(), closefd=False) as file:
        peak = max((np.abs(block).max() for block in file.blocks(2 ** 20)), default=0)
    return 2 ** 15 if 16 < peak <= 2 ** 15 else 1


def to_mono(samples):
    """(N, channels) -> (N,): the mean; the loudest channel where channels cancel each other, as in
    stereo of opposite phase."""
    mono, power = samples.mean(1), (samples ** 2).mean(0)
    if (mono ** 2).mean() < 0.05 * power.max():
        return samples[:, power.argmax()].copy()
    return mono


def load_audio(path):
    """A whole recording, (N,) float32 at 24 kHz. Raises UserError if it is not audio, or empty."""
    pieces = list(read_audio(path))
    if not pieces:
        raise UserError(f"{path}: contains no samples")
    return torch.cat(pieces)


def save_audio(path, wave):
    """Write (N,) samples at 24 kHz as a 16-bit WAV. Samples above full scale turn all down."""
    wave = wave.detach().float().cpu().numpy()
    peak = max(wave.max(initial=0), -wave.min(initial=0))
    wave = wave / peak if peak > 1 else wave                  # an hour need not be copied
    with replacing(path) as temporary:
        soundfile.write(temporary, wave, RATE, format="WAV", subtype="PCM_16")


def rename(old, new):
    """os.replace. On Windows it fails while another program reads the file: try for 5 seconds."""
    for _ in range(RETRIES):
        with contextlib.suppress(PermissionError):
            return os.replace(old, new)
        time.sleep(0.1)
    os.replace(old, new)


@contextlib.contextmanager
def replacing(path, keep=None):
    """Write a file whole or not at all: yields a temporary path that becomes `path` if all goes
    well. `keep`: a name under which the old file is kept. One process at a time."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep and path.exists():
            rename(path, keep)
        rename(temporary, path)
    except (OSError, RuntimeError, UnicodeError) as error:    # torch, libsndfile: RuntimeError
        full = path.parent.is_dir() and shutil.disk_usage(path.parent).free < 2 ** 20
        why = "the disk is full" if full else reason(error)
        raise UserError(f"{path} could not be written ({why}); the old file is kept") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_room(path, size, purpose):
    """Raise UserError if `size` more bytes don't fit on the disk where `path` is, or will be."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if size > free:
        raise UserError(f"{path} has {free / 2 ** 30:.2f} GiB free, but {size / 2 ** 30:.2f} are "
                        f"needed for {purpose}")


def lock(path, wait=False):
    """Hold a file for this process until it is closed. Returns None if another process holds it,
    unless we `wait`."""
    file = open(path, "a")
    try:
        import fcntl                                          # not on Windows
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except (ImportError, OSError):                            # nor on some disks
        print(f"note: {path} can't be locked here; start one run at a time")
    return file


# --------------------------------------------------------------------------------------------------
# 11. Data. A source, a folder or the toy corpus, is a list of clips. They are cached once, in
# shards of about half an hour: int16 audio for the decoder, float16 log-mel for the diffusion. A
# hash of a clip's own name decides whether it is for training or validation, so a new file moves no
# other, once there are 20 minutes of speech. Long recordings are split minute by minute; where the
# splits meet, a second is left out.

CACHE_VERSION, SHARD_SECONDS, BLOCK_SECONDS, VALIDATION_SHARE = 3, 1800, 60, 0.06


class Clip(NamedTuple):
    """A recording, or up to half an hour of a long one."""
    name: str                     # its path in the source
    seconds: float
    read: Callable                # () -> its samples in pieces (N,), float32
    minute: int = 0               # where in the recording it begins


class Source(NamedTuple):
    """Where clips come from. `contents` lists the files with their sizes and dates: when it
    changes, a new cache is made."""
    name: str
    contents: str
    clips: list
    skipped: dict                 # {file: why it can't be used, or not whole}


def places(data):
    """The folders and files that `--data` names, each once, as absolute paths; and "toy". Raises
    UserError if one is not there."""
    found = []
    for name in map(str, data if isinstance(data, (list, tuple)) else [data]):
        if name == "toy" and lab("topics") is None:
            raise UserError("--data toy needs lab/toyspeech.py beside cdslm.py; or give a folder")
        path = os.path.expanduser(name)
        named = [path] if os.path.exists(path) else sorted(glob.glob(path))
        if name != "toy" and not named:
            raise UserError(f"--data {name}: no such folder")
        found += ["toy"] if name == "toy" else map(os.path.realpath, named)
    unique = dict.fromkeys(found)                             # in their order
    return [place for place in unique
            if not any(str(parent) in unique for parent in Path(place).parents)]


def find_recordings(root, skipped):
    """Audio files under a folder, at any depth; links are followed. Each file once, and none of a
    run folder. A folder that may not be read is `skipped`."""
    found, seen = {}, set()

    def closed(error):
        skipped[printable(os.path.relpath(error.filename, root))] = error.strerror

    for parent, folders, names in os.walk(root, onerror=closed, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen or "log.jsonl" in names:
            folders.clear()                                   # links may run in a circle
            continue
        seen.add(place)
        folders.sort()                                        # of two links, the same one always
        # Without hidden files: macOS leaves a ._NAME beside NAME.
        for path in (Path(parent, name) for name in sorted(names) if name[0] != "."):
            if path.suffix.lower() in AUDIO_FILES and path.is_file():
                found.setdefault(path.resolve(), path)
    return sorted(found.values())


def folder_source(place):
    """A folder of recordings, searched to any depth, or one recording, as a Source."""
    root, clips, skipped, contents = Path(place), [], {}, [str(CACHE_VERSION)]
    if root.is_file():
        root, files = root.parent, [root]
    else:
        files = find_recordings(root, skipped)
    for path in files:
        name, stat = printable(path.relative_to(root).as_posix()), path.stat()
        try:
            with open(path, "rb") as disk:
                seconds = soundfile.info(disk).duration
            if not 0 < seconds < stat.st_size:
                raise UserError("it is empty, or its header is wrong")
        except Exception as error:                            # a broken file may raise anything
            skipped[name] = printable(reason(error))
            continue
        contents.append(f"{name} {stat.st_size} {stat.st_mtime_ns}")
        for start in range(0, math.ceil(seconds), SHARD_SECONDS):
            stop = min(start + SHARD_SECONDS, seconds)
            read = functools.partial(read_audio, path, start, stop)
            clips.append(Clip(name, stop - start, read, start // 60))
    if not clips:
        raise UserError(f"--data {place}: none of its {len(files)} audio files can be read")

    # Short clips of a folder lie in the order of their hash: those for validation are neighbours.
    clips.sort(key=lambda clip: (os.path.dirname(clip.name), clip.seconds < BLOCK_SECONDS and
                                 uniform(0, clip.name, 0), clip.name))
    short = re.sub(r"[^A-Za-z0-9]", "-", Path(place).name)
    return Source(short, "\n".join(contents), clips, skipped)


def cache_root():
    """Where corpora are cached: $CDSLM_CACHE, or ~/.cache/cdslm."""
    try:
        return Path(os.environ.get("CDSLM_CACHE") or Path.home() / ".cache" / "cdslm")
    except RuntimeError:
        raise UserError("there is no home folder for the cache; set CDSLM_CACHE to one") from None


def build_cache(source):
    """Cache the clips of a source and return the open shards. A shard is complete once its .json is
    there, so an interrupted build goes on where it stopped. A complete shard never changes."""
    folder = cache_root() / f"{source.name}-{fingerprint(source.contents)}"
    plan, total = {}, 0.0                                     # which clips belong to which shard
    for clip in source.clips:
        total += clip.seconds
        plan.setdefault(folder / f"{int(total / SHARD_SECONDS):05d}", []).append(clip)
    shards = [open_shard(stem) for stem in plan]
    if all(shards):
        return shards

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".lock", wait=True), ThreadPoolExecutor(os.cpu_count()) as pool:
            missing = [stem for stem in plan if not open_shard(stem)]         # still
            seconds = sum(clip.seconds for stem in missing for clip in plan[stem])
            check_room(folder, seconds * (2 * RATE + 2 * MELS * FRAME_RATE),
                       "the cache; CDSLM_CACHE moves it")
            array.cache_clear()                               # damaged shards are made again
            for stem in tqdm(missing, desc=f"caching speech in {folder}", unit="half hour"):
                build_shard(stem, source, plan[stem], pool)
    except OSError as error:
        raise UserError(f"cache {folder}: {error.strerror}; set CDSLM_CACHE to another") from None
    return [open_shard(stem) for stem in plan]


def build_shard(stem, source, clips, pool):
    """Write a shard: STEM.audio.npy (N,) int16, STEM.mel.npy (N/300, 80) float16, and last
    STEM.json with its contents."""
    skipped = {}

    def samples(clip):
        """Int16, a whole number of frames; what can't be read is left out and noted."""
        waves = [torch.zeros(0, dtype=torch.int16)]
        try:
            for wave in clip.read():
                waves.append((wave.clamp(-1, 1) * 32767).round().short())
        except UserError as error:
            skipped[clip.name] = printable(reason(error))
        wave = torch.cat(waves)
        return F.pad(wave, (0, -len(wave) % HOP)).numpy()

    def frames(start):
        """Log-mel of a minute, computed with some of its surroundings: minutes join seamlessly."""
        first, last = max(0, start - 8 * HOP), min(len(audio), start + 60 * RATE + 8 * HOP)
        mel = log_mel(torch.from_numpy(audio[first:last]).float()[None] / 32767)[0]
        return mel[(start - first) // HOP:][:60 * FRAME_RATE].half().numpy()

    waves = list(pool.map(samples, clips))
    contents = {"clips": [[clip.name, clip.minute, len(wave) // HOP]
                          for clip, wave in zip(clips, waves)],
                "skipped": skipped}
    audio = np.concatenate(waves)
    del waves                                                 # hold a long recording only once
    minutes = pool.map(frames, range(0, len(audio), 60 * RATE))
    mel = np.concatenate([np.zeros((0, MELS), np.float16), *minutes])

    for kind, array in (("audio", audio), ("mel", mel)):
        with replacing(f"{stem}.{kind}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
    with replacing(f"{stem}.json") as temporary:
        temporary.write_text(json.dumps(contents))


def open_shard(stem):
    """The contents of a shard, and its number of frames. None if it isn't there, or is damaged."""
    try:
        shard = json.loads(Path(f"{stem}.json").read_text()) | {"stem": str(stem)}
        frames = shard["frames"] = sum(length for _, _, length in shard["clips"])
        audio, mel = (array.__wrapped__(stem, kind) for kind in ("audio", "mel"))
        if audio.shape == (frames * HOP,) and mel.shape == (frames, MELS):
            return shard
    except (FileNotFoundError, EOFError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return None


@functools.lru_cache(maxsize=256)
def array(stem, kind):
    """"audio" or "mel" of a shard, mapped from the disk. The others are closed: a program may have
    about 1,000 files open, but a corpus has two for every half hour."""
    return np.load(f"{stem}.{kind}.npy", mmap_mode="r", allow_pickle=False)


class Corpus:
    """A cache, split into "train" and "valid" and served as windows. Any integer key names a
    window; uniform keys make every start of a window equally likely."""

    def __init__(self, shards, window, contents=""):
        self.shards, self.window, self.contents = shards, window, contents
        self.skipped, clips = {}, []
        for number, shard in enumerate(shards):
            self.skipped |= shard["skipped"]
            start = 0
            for name, minute, frames in shard["clips"]:
                clips.append((name, minute, number, start, frames))
                start += frames
        self.runs, self.tables = split(clips, window), {}

    def hours(self, split):
        """Hours of a split in runs that are long enough for a window."""
        frames = self.runs[split][:, 2]
        return frames[frames >= self.window].sum() / FRAME_RATE / 3600

    def ends(self, split, frames):
        """For each run of a split, how many windows begin in it and in the runs before it, (R,). A
        key of `windows` counts them in this order. Every batch asks for them: computed once."""
        if (split, frames) not in self.tables:
            starts = np.maximum(self.runs[split][:, 2] - frames + 1, 0)
            self.tables[split, frames] = starts.cumsum()
        return self.tables[split, frames]

    def stored(self, kind, split, keys, frames):
        """Windows as the cache holds them: "mel" (len(keys), frames, 80) float16, or "audio"
        (len(keys), 300 * frames) int16."""
        runs, ends = self.runs[split], self.ends(split, frames)
        hop, shape, dtype = (1, (MELS,), np.float16) if kind == "mel" else (HOP, (), np.int16)
        windows = np.empty((len(keys), frames * hop, *shape), dtype)
        for window, key in zip(windows, keys):
            place = key % int(ends[-1])                       # among all starts of all runs
            row = np.searchsorted(ends, place, side="right")
            shard, start, length = runs[row]
            start += place - (ends[row] - (length - frames + 1))
            stored = array(self.shards[shard]["stem"], kind)
            # Copied: a view would keep the file of its shard open.
            window[:] = stored[start * hop:(start + frames) * hop]
        return windows

    def windows(self, kind, split, keys, frames):
        """Windows of the same shapes in float32; "audio" within -1 and 1."""
        windows = self.stored(kind, split, keys, frames).astype(np.float32)
        return windows if kind == "mel" else windows / 32767

    def mel_stats(self):
        """Mean and standard deviation of training log-mel over all bands; number of live bands."""
        keys = [keyed(0, "statistics", i) for i in range(512)]
        mel = self.windows("mel", "train", keys, 32)
        if mel.std() < 1e-3:
            raise UserError("the recordings are silent")
        live = np.quantile(mel, 0.99, (0, 1)) > math.log(FLOOR) + 2
        return float(mel.mean()), float(mel.std()), int(live.sum())


def split(clips, window):
    """Clips (name, minute, shard, first frame, frames) -> {split: runs (R, 3)}. A run here is a
    stretch of frames without a gap: (shard, first, frames). Raises UserError if a split has no run
    of `window` frames.

    Clips shorter than a window are joined with neighbours of their folder, longer ones never."""
    total = sum(clip[-1] for clip in clips)
    whole = max(BLOCK_SECONDS * FRAME_RATE, 3 * window)
    size = whole if total > 20 * whole else 2 * window        # little speech is cut more finely
    for shortest in (whole, 0):                               # clips up to this length stay whole
        blocks = []
        for name, minute, shard, start, frames in clips:
            place = name if frames >= window else os.path.dirname(name) + "/"
            step = size if frames > shortest else max(1, frames)
            for at in range(0, frames, step):
                chance = uniform(0, name, (minute * 60 * FRAME_RATE + at) // size)
                blocks.append((chance, place, name, shard, start + at, min(step, frames - at)))

        # Usually 6 % are for validation; of very little speech, what gives each split a window.
        chances = [block[0] for block in blocks] or [0.0]
        for limit in [VALIDATION_SHARE, *np.quantile(chances, np.linspace(0, 1, 65))]:
            runs = join(blocks, limit)
            if all((rows[:, 2] >= window).any() for rows in runs.values()):
                return runs
    raise UserError(f"too little speech: {total / FRAME_RATE:.1f} s, where training and validation "
                    f"each need {window / FRAME_RATE:g} s; add some, or shorten --gen-seconds")


def join(blocks, limit):
    """Runs of neighbouring blocks (see `split`): chances up to `limit` are for validation."""
    runs = {"train": [], "valid": []}
    last = last_name = None
    for chance, place, name, shard, start, frames in blocks:
        kind = "valid" if chance <= limit else "train"
        if last == (kind, place, shard):
            runs[kind][-1][2] += frames
        else:
            if last and last[0] != kind and last_name == name:
                run = runs[last[0]][-1]
                run[2] -= min(FRAME_RATE, run[2])             # the second between the splits
            runs[kind].append([shard, start, frames])
        last, last_name = (kind, place, shard), name
    return {kind: np.array(rows, int).reshape(-1, 3) for kind, rows in runs.items()}


def open_corpus(config):
    """Build or find the cache of each of `config.data` and return the Corpus of all."""
    sources = [lab("topics").toy_source(config) if place == "toy" else folder_source(place)
               for place in places(config.data)]
    window = config.ctx_frames + config.gen_frames
    # Is there enough speech, as far as file headers tell?
    clips = [clip for source in sources for clip in source.clips]
    frames = [int(clip.seconds * FRAME_RATE) for clip in clips]
    starts = np.cumsum([0, *frames])
    split([(c.name, c.minute, 0, start, n) for c, start, n in zip(clips, starts, frames)], window)

    contents = fingerprint(" ".join(fingerprint(source.contents) for source in sources))
    shards = [shard for source in sources for shard in build_cache(source)]
    corpus = Corpus(shards, window, contents)
    for source in sources:
        corpus.skipped |= source.skipped
    if corpus.skipped:
        named = [f"{name} ({why})" for name, why in list(corpus.skipped.items())[:5]]
        print(f"{len(corpus.skipped)} files can't be used, or not whole: {'; '.join(named)}. "
              "Convert them: ffmpeg -i FILE FILE.flac")
    hours = sum(shard["frames"] for shard in shards) / FRAME_RATE / 3600
    train, valid = corpus.hours("train"), corpus.hours("valid")
    unused = hours - train - valid
    print(f"{train:.2f} hours of speech for training, {valid:.2f} for validation"
          + (f", {unused:.2f} in pieces shorter than a window" if unused > 0.005 else "")
          + f"; {corpus.mel_stats()[2]} of {MELS} mel bands are alive")
    return corpus


# --------------------------------------------------------------------------------------------------
# 12. Checkpoints: tensors and plain values only, loaded with weights_only=True, so that a file from
# the internet can run no code. There is a whole checkpoint on the disk at every moment.

CHECKPOINTS = "checkpoint.pt", "checkpoint.previous.pt", "trunk.pt", "trunk.previous.pt"
MAY_CHANGE = set("out steps minutes micro_batch eval_every save_minutes device dtype compile "
                 "parallel checkpoint_activations sampling".split())          # on resuming


def save(path, **contents):
    """Save tensors and plain values. An existing file becomes NAME.previous.pt."""
    with replacing(path, path.with_suffix(".previous.pt")) as temporary:
        torch.save({"format": "cdslm 1", **contents}, temporary)


def load(path, mmap=False):
    """What `save` wrote; with `mmap` only what is used stays in memory. The whole file is read, to
    check it. Raises UserError if it is damaged or not a cdslm checkpoint."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()                          # torch does not check the checksums
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if contents.get("format") == "cdslm 1" and not damaged:
            return contents
    except Exception:                                         # torch raises many types of errors
        pass
    raise UserError(f"{path}: damaged, or not a cdslm checkpoint")


def checkpoints(folder):
    """Yield the readable checkpoints of a run, the newest first; warn of the others. Raises
    UserError if there are some but none is readable."""
    paths = [folder / name for name in CHECKPOINTS if (folder / name).exists()]
    damaged = []
    for path in paths:
        try:
            yield load(path, mmap=True)
        except UserError as error:
            damaged.append(path)
            print(f"warning: {error}; trying the one before")
    if paths and damaged == paths:
        raise UserError(f"{folder}: none of its checkpoints can be read")


def can_go_on(found, config):
    """Whether a run of `config.steps` can go on from a checkpoint of which `found` holds step and
    steps: not where the learning rate has already decayed, to another number of steps."""
    if found["steps"] == config.steps:
        return found["step"] <= config.steps
    shorter = min(config.steps, found["steps"])
    return config.lr_schedule == "wsd" and found["step"] <= decay_start(shorter)


def resume_point(folder, config):
    """The newest checkpoint from which a run of `config.steps` can go on; None for a new run. A run
    whose learning rate has already decayed, to fewer steps, goes back to the trunk."""
    steps, fits = [], []
    for found in checkpoints(folder):
        if found["steps"] == config.steps:
            return found                                      # the others need not be read
        steps.append(found["step"])
        if can_go_on(found, config):
            fits.append(found)
    if steps and not fits:
        raise UserError(f"{folder} is past what --steps {config.steps} can go on from, at step "
                        f"{max(steps)}; ask for more steps, or choose another --out")
    return max(fits, key=lambda found: found["step"], default=None)


@functools.cache
def method_fingerprint(path=__file__):
    """A hash of this file's Part I from section 2 on, without comments and docstrings: it changes
    when the method does. Python's version is in it, since the parser's output depends on it."""
    source = Path(path).read_text(encoding="utf-8")
    source = source[source.index("# 2. Sound."):source.index("# PART II: THE MACHINERY")]
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return f"{sys.version_info.major}.{sys.version_info.minor} {fingerprint(ast.dump(tree))}"


def check_out(config):
    """Raise UserError unless the run folder is new, or of this configuration and method, with room
    for its checkpoints. A run that was shortened to fit `minutes` stays as short."""
    folder = Path(config.out)
    if not config.out.isprintable():                          # torch opens no such file
        raise UserError(f"--out {folder}: its name is not valid UTF-8; choose another")
    if (folder / "config.json").exists():
        saved, code = read_config(folder), read_json(folder / "config.json").get("method", "")
        old, new = vars(saved), vars(config)
        differ = [f"{name} {old[name]} -> {new[name]}" for name in new
                  if name not in MAY_CHANGE and old[name] != new[name]]
        mine = method_fingerprint()
        if code.split()[:1] == mine.split()[:1] and code != mine:             # of one Python
            differ.append("the code of Part I has changed since this run began")
        if differ:
            raise UserError(f"--out {folder} holds another run ({', '.join(differ)}); choose "
                            "another --out")
        if config.minutes and saved.minutes and config.steps != saved.steps:
            print(f"note: this run keeps its {saved.steps} steps; --steps alone makes it longer")
            config.steps = saved.steps
    elif foreign := [*folder.glob("log.jsonl"), *folder.glob("[1-4]_*.wav")]:
        raise UserError(f"--out {folder} holds {foreign[0].name}, but no run; choose another --out")
    there = [*folder.glob("*.pt"), *folder.glob("*.shards/*")]
    there = sum(path.stat().st_size for path in there)
    size = 4 * 16 * count(config)["parameters"] - there       # four checkpoints
    check_room(folder, size, "its checkpoints; choose another --out")


def claim(config):
    """Make the run folder and hold its lock: one run at a time. Returns the lock."""
    folder = Path(config.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder / ".lock")
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    if held is None:
        raise UserError(f"--out {folder}: another run is writing there")
    return held


def read_json(path):
    """The dictionary in a JSON file of a run folder. Raises UserError if there is none."""
    if path.parent.is_file():
        raise UserError(f"{path.parent} is a file; give the run folder that it is in")
    if not path.exists():
        raise UserError(f"{path.parent}: no run there; train one with: python cdslm.py --size tiny "
                        f"--out {shlex.quote(str(path.parent))}")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: damaged, or not a run's configuration") from None


def read_config(folder):
    """The Config of a run folder; fields that only other versions know are left out."""
    path = Path(folder) / "config.json"
    known = {f.name for f in dataclasses.fields(Config)}
    saved = {name: value for name, value in read_json(path).items() if name in known}
    try:
        return checked(Config(**saved))
    except (TypeError, KeyError):
        raise UserError(f"{path}: damaged, or not a run's configuration") from None


def write_config(folder, config, speech=""):
    """Write config.json, with the fingerprints of the method and of the speech."""
    contents = dataclasses.asdict(config) | {"method": method_fingerprint(), "speech": speech}
    with replacing(Path(folder) / "config.json") as temporary:
        temporary.write_text(json.dumps(contents, indent=2) + "\n")


def load_run(folder, device="cpu", network=None):
    """A run folder -> config, model (EMA weights, in bf16 where the hardware has it), autoencoder.
    Raises UserError if there is no run, or its files do not belong together."""
    folder, config = Path(folder), read_config(folder)
    if network is None and (folder / "arm.json").exists():    # of lab/autoregressive.py
        if lab("autoregressive") is None:
            raise UserError(f"{folder}: needs lab/autoregressive.py beside cdslm.py")
        return lab("autoregressive").load(folder, device)
    device, dtype = decide(dataclasses.replace(config, device=str(device)))
    checkpoint = next(checkpoints(folder), None)
    if checkpoint is None:
        raise UserError(f"{folder}: no checkpoint yet")

    model = (network or MMDiT)(config)
    autoencoder = new_autoencoder(config)
    try:
        model.load_state_dict(checkpoint["ema"])
        autoencoder.load_state_dict(load(folder / "autoencoder.pt")["autoencoder"])
    except (RuntimeError, KeyError):
        raise UserError(f"{folder}: its checkpoints do not match its config.json") from None
    if (model.silence - autoencoder.silence()).abs().max() > 0.01:
        raise UserError(f"{folder}: its autoencoder.pt is not the one its model was trained with")

    model, autoencoder = model.to(device, dtype), autoencoder.to(device)
    if config.decoder == "neural":
        autoencoder.shaper.to(dtype)
    return config, model.eval().requires_grad_(False), autoencoder.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# 13. Devices: one of any kind, or many under torchrun, which starts this program once per device.
# Each process is a rank and computes its share of every batch; rank 0 writes.

ISA_WITHOUT_BF16 = set("SSE41 AVX AVX2 AVX2_VNNI AVX2_VNNI_2 AVX512_CORE AVX512_CORE_VNNI".split())
WAIT = 10                             # seconds, before a rank says that it waits for the others


def decide(config):
    """(device, dtype) from flags and machine. Raises UserError if the device isn't there."""
    name = config.device
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()                  # "meta" holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: {reason(error)}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")            # TF32
    # No float16: activations of a trained model exceed its largest number, 65,504.
    bf16 = config.dtype == "bf16" or config.dtype == "auto" and multiplies_bf16(device)
    return device, torch.bfloat16 if bf16 else torch.float32


def multiplies_bf16(device):
    """Whether the device multiplies bf16 in hardware; a CPU that emulates it takes 30 times as long
    as in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    # torch and oneDNN may be told to use older instruction sets only.
    capped = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ISA_WITHOUT_BF16
    if capped or torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return False
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and has_bf16


def compiles(config, device):
    """Whether the blocks are compiled: as asked, else where a minute of compiling pays. On CUDA
    that needs Triton, which not every system has, and a GPU of 2017 or later."""
    if config.compile is not None:
        return config.compile
    return (device.type == "cuda" and config.steps >= 10_000
            and importlib.util.find_spec("triton") is not None
            and torch.cuda.get_device_capability(device) >= (7, 0))


def ranks():
    """This process's rank and the number of ranks, from the variables that torchrun sets, all of
    which must be there; 0 and 1 without it."""
    needed = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    if not all(os.environ.get(name) for name in needed):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def check_division(config, count):
    """Raise UserError unless a batch divides evenly over `count` devices."""
    if config.batch_size % (count * (config.micro_batch or 1)):
        raise UserError(f"--batch-size {config.batch_size} must divide evenly over {count} devices "
                        "and their micro-batches")


@contextlib.contextmanager
def together(device=torch.device("cpu")):
    """Under torchrun, connect to the other ranks, of which each has such a device. If one of them
    is lost, the others soon stop with a UserError. Yields the rank."""
    rank, size = ranks()
    if size == 1:
        yield rank
        return
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    waiting = threading.Timer(WAIT, print, kwargs=dict(flush=True), args=[
        f"rank {rank} of {size} waits for the others at {where}; if none were started, unset RANK"])
    waiting.daemon = True
    waiting.start()
    # Tensors of a GPU are exchanged by NCCL, what lies in a CPU's memory by gloo.
    backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backends, timeout=datetime.timedelta(days=1))     # caching takes long
    waiting.cancel()
    if rank:
        sys.stdout = open(os.devnull, "w")
    try:
        yield rank
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise UserError("another rank stopped; the same command goes on from the last "
                        "checkpoint") from None
    dist.destroy_process_group()


class ManyDevices(OneDevice):
    """DDP or FSDP2 over the ranks of a process group."""

    def __init__(self, device, dtype):
        super().__init__(device, dtype)
        self.rank, self.ranks = ranks()

    def exchange(self, network, last):
        if last:                                              # gradients are exchanged after it
            return contextlib.nullcontext()
        return network.no_sync()

    def total(self, value):
        dist.all_reduce(value)
        return value


# --------------------------------------------------------------------------------------------------
# 14. Training: first the autoencoder, in a minute, then the network.

VALIDATION_WINDOWS = 64
ANGLES = [math.pi / 2 * (i + 0.5) / 10 for i in range(10)]    # noise levels of the validation
DIVERGED = 100                        # no training recovers from such a loss; it begins at about 1


def new_autoencoder(config):
    """An untrained autoencoder."""
    if config.latent_dim:
        return lab("latents").LatentAutoencoder(config.latent_dim, config.decoder)
    return AudioAutoencoder(config.decoder)


def fit_autoencoder(config, corpus, device, dtype=torch.float32):
    """Set the frame statistics, then train the latents, if there are any, and the decoder."""
    torch.manual_seed(config.seed)
    model = new_autoencoder(config)
    model.mel_stats.copy_(torch.tensor(corpus.mel_stats()[:2]))
    model.to(device)
    if config.latent_dim:
        model.fit(config, corpus, dtype)
    if config.decoder == "neural":
        train_part(model, model.decoder_loss, "decoder", config.decoder_steps, config, corpus,
                   dtype)
    return model.eval().requires_grad_(False)


def train_part(model, loss_of, name, steps, config, corpus, dtype):
    """AdamW with a cosine schedule on the part of the autoencoder that this loss reaches."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.99), weight_decay=0.01)
    bar = tqdm(range(steps), desc=name, unit="step")
    for step in bar:
        keys = [keyed(config.seed, name, step * 16 + i) for i in range(16)]
        wave = torch.from_numpy(corpus.windows("audio", "train", keys, 48))
        loss = loss_of(wave.to(model.mel_stats.device), dtype)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        decay = 0.02 + 0.98 * math.cos(math.pi / 2 * step / steps) ** 2
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * decay
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def open_autoencoder(config, corpus, device, dtype=torch.float32):
    """The run's autoencoder, trained now if there is none yet. Kept beside it in autoencoder.pt are
    a few held-out windows, for listening."""
    path = Path(config.out) / "autoencoder.pt"
    if not path.exists():
        place = torch.device("cpu") if device.type == "mps" else device    # complex STFT
        model = fit_autoencoder(config, corpus, place, dtype)
        keys = [keyed(0, "example", i) for i in range(8)]
        examples = corpus.windows("audio", "valid", keys, corpus.window)
        examples = torch.from_numpy(examples * 32767).short()
        save(path, autoencoder=model.state_dict(), examples=examples)
    model = new_autoencoder(config)
    try:
        model.load_state_dict(load(path)["autoencoder"])
    except (RuntimeError, KeyError):
        raise UserError(f"{path}: of a run with another --latent-dim or --decoder") from None
    return model.to(device).eval().requires_grad_(False)


def count(config):
    """Parameters; tokens per window; FLOPs of training on a window (2 per multiply-add, backward
    twice forward, nothing is passed back to the input), and of a forward pass. "flops" holds the
    mean share of self-conditioning."""
    d, L = config.width, config.depth
    token = config.patch_size * config.channels
    ctx = config.ctx_frames // config.patch_size
    gen = config.gen_frames // config.patch_size
    enter = token * d * (ctx + gen) + 256 * d                 # multiply-adds from the input
    blocks = 12 * d * d * (gen * L + ctx * (L - 1)) + 3 * d * d * ctx
    blocks += 2 * d * L * (ctx + gen) ** 2                    # attention
    adaln = d * d * (1 + 6 * (2 * L - 1) + 2 + 2)             # and the noise embedding
    inner = blocks + adaln + token * d * gen
    forward = 2 * (enter + inner)
    estimate = 2 * token * d * gen if config.self_condition else 0
    guess = config.self_condition * (forward + 2 * estimate)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MMDiT(config).parameters())
    return {"parameters": parameters, "tokens": ctx + gen,
            "flops": 4 * enter + 6 * inner + guess, "flops_forward": forward + estimate}


class Trainer:
    """A run in training: model, EMA, optimisers, batches, and how far it is."""

    def __init__(self, config, corpus, autoencoder, device, dtype, network=MMDiT):
        self.config, self.corpus, self.autoencoder = config, corpus, autoencoder
        hardware = ManyDevices if dist.is_initialized() else OneDevice
        self.hardware = hardware(device, dtype)
        self.device, self.rank = device, self.hardware.rank

        # `model` holds the weights; `network` is the same, as DDP or compile wraps it.
        torch.manual_seed(config.seed)
        if config.parallel == "fsdp":
            self.model, self.ema = lab("fsdp").shards(config, autoencoder, device, dtype)
        else:
            model = network(config)
            model.silence.copy_(autoencoder.silence())
            self.model, self.ema = model.to(device), copy.deepcopy(model).to(device)
        self.ema.eval().requires_grad_(False)
        self.network = self.model
        if compiles(config, device):
            torch._dynamo.config.suppress_errors = True       # where it fails, go on without
            for block in self.model.blocks:
                block.forward = torch.compile(block.forward)
        if config.checkpoint_activations:
            for block in self.model.blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if dist.is_initialized() and config.parallel == "ddp":
            # Weights that only self-conditioning uses have no gradient in the other steps.
            self.network = DistributedDataParallel(
                self.model, gradient_as_bucket_view=True,
                find_unused_parameters=config.self_condition > 0)
            self.network.broadcast_buffers = False            # its one buffer never changes

        self.diffusion = Diffusion(config)
        self.optimizers = make_optimizers(self.model, config, dtype)
        self.size, self.hours, self.batches = count(config), corpus.hours("train"), None
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.done = 0                                         # steps
        self.skipped = self.failed = 0                        # not finite: in all, and in a row
        self.signals, self.saved = [], time.monotonic()       # when the last checkpoint was
        self.stopping = self.late = False                     # a signal to any rank; too long ago
        self.waited = 0.0                                     # seconds, for the next batch

    def read(self, step, positions):
        """Log-mel windows (b, T, 80) float16 of a micro-batch; on CUDA, their copy to the device is
        begun. What follows takes float32, but converting is slow on a CPU: a fast GPU would wait.
        """
        first = step * self.config.batch_size
        keys = [keyed(self.config.seed, "window", first + i) for i in positions]
        mel = torch.from_numpy(self.corpus.stored("mel", "train", keys, self.corpus.window))
        if self.copy_stream is None:
            return mel
        torch.cuda.set_device(self.device)                    # this thread would use cuda:0
        with torch.cuda.stream(self.copy_stream):             # beside the step before
            return mel.pin_memory().to(self.device, non_blocking=True)

    def micro_batches(self):
        """Yield ctx (b, Tc, C), x0 (b, Tg, C), eps like x0, from the next step on, without end.
        While one is trained on, a thread reads the windows of the next."""
        config, parts = self.config, self.hardware.micro_batches(self.config)
        order = ((step, part) for step in itertools.count(self.done) for part in parts)
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(self.read, self.done, parts[0])
            for (step, part), following in itertools.pairwise(order):
                begun = time.perf_counter()
                mel = coming.result()
                self.waited += time.perf_counter() - begun
                if self.copy_stream:
                    torch.cuda.current_stream().wait_stream(self.copy_stream)
                    mel.record_stream(torch.cuda.current_stream())
                coming = thread.submit(self.read, *following)
                ctx, x0 = self.frames(mel)
                eps = [keyed_noise(config.seed, "noise", step * config.batch_size + i,
                                   x0.shape[1:], self.device) for i in part]
                yield ctx, x0, torch.stack(eps)

    def frames(self, mel):
        """Log-mel windows (b, T, 80) -> context (b, Tc, C) and continuation (b, Tg, C)."""
        frames = self.autoencoder.from_mel(self.hardware.place(mel).float())
        return frames.split([self.config.ctx_frames, self.config.gen_frames], dim=1)

    def step(self):
        """Launch a training step -> its row in the log; `finish` adds what the device computes."""
        config, step = self.config, self.done
        if self.batches is None:
            self.batches = self.micro_batches()
        result = training_step(self.network, self.ema, self.optimizers, self.diffusion, config,
                               step, self.batches, self.hardware)
        self.done += 1
        late = self.rank == 0 and time.monotonic() - self.saved > 60 * config.save_minutes
        asked = self.hardware.total(torch.tensor([len(self.signals), late]))  # by gloo: no GPU
        self.stopping, self.late = (asked > 0).tolist()
        wait, self.waited = self.waited, 0.0
        windows = self.done * config.batch_size
        hours = windows * self.corpus.window / FRAME_RATE / 3600
        return {"step": self.done, "result": result, "lr": config.lr * lr_factor(config, step),
                "tokens": windows * self.size["tokens"], "flops": windows * self.size["flops"],
                "hours": hours, "epochs": hours / self.hours, "wait": wait}

    def finish(self, row):
        """Wait for the device: the row with its loss and gradient norm. Raises UserError after ten
        bad ones in a row."""
        loss, norm = row.pop("result").tolist()
        finite = math.isfinite(loss + norm)
        self.skipped += not finite
        self.failed = 0 if finite and loss < DIVERGED else self.failed + 1
        if self.failed == 10:
            raise UserError(f"ten steps in a row with a loss above {DIVERGED} or not finite: "
                            "training has diverged; try a lower --lr or --muon-lr in another --out")
        if self.device.type == "cuda":
            row["memory"] = torch.cuda.max_memory_allocated(self.device)      # bytes of tensors
        return row | {"loss": loss, "gradient": norm, "skipped": self.skipped}

    @torch.no_grad()
    def validate(self, number=VALIDATION_WINDOWS):
        """The validation loss: min(SNR, 5) (x0 - estimate)^2 of the EMA weights, without
        self-conditioning, on fixed held-out windows and noise: {log-SNR: loss} at ten angles, and
        their mean. It does not depend on the schedule or on the weight of the training loss, so
        the validation losses of two runs can be compared."""
        keys = [keyed(0, "validation", i) for i in range(number)]
        mel = self.corpus.windows("mel", "valid", keys, self.corpus.window)
        ctx, x0 = self.frames(torch.from_numpy(mel))
        eps = torch.stack([keyed_noise(0, "validation", i, x0.shape[1:], self.device)
                           for i in range(number)])
        size = self.config.micro_batch or self.config.batch_size // self.hardware.ranks

        losses = []
        for angle in ANGLES:
            errors = []
            for x, c, e in zip(x0.split(size), ctx.split(size), eps.split(size)):
                phi = torch.full((len(x),), angle, device=self.device)
                phi_b = phi[:, None, None]
                xt = phi_b.cos() * x + phi_b.sin() * e
                with autocast(self.device, self.hardware.dtype):
                    prediction = self.ema(xt, phi, c).float()
                estimate = self.diffusion.clean(prediction, xt, phi_b)
                weight = (phi_b.tan() ** -2).clamp(max=5)
                errors.append((weight * (estimate - x) ** 2).mean((1, 2)))
            losses.append(torch.cat(errors).mean())
        losses = torch.stack(losses)
        names = [f"{-2 * math.log(math.tan(angle)):.1f}" for angle in ANGLES]
        return {"mean": losses.mean().item()} | dict(zip(names, losses.tolist()))

    def save(self, path):
        """Write a checkpoint: full state dicts, gathered in rank 0's memory: the same for any
        number of ranks."""
        from torch.distributed.checkpoint import state_dict as tools          # slow to import
        options = tools.StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer = tools.get_optimizer_state_dict(self.model, self.optimizers, options=options)
        model = tools.get_model_state_dict(self.model, options=options)
        ema = tools.get_model_state_dict(self.ema, options=options)
        if self.rank == 0:
            save(path, step=self.done, steps=self.config.steps, skipped=self.skipped, model=model,
                 ema=ema, optimizer=optimizer)
        self.saved = time.monotonic()                         # however long it took

    def restore(self, found):
        """Go on from a checkpoint; from None, begin."""
        if found is None:
            return
        self.done, self.skipped = found["step"], found["skipped"]
        from torch.distributed.checkpoint import state_dict as tools
        options = tools.StateDictOptions(full_state_dict=True)
        # Not strict: weights that have had no gradient yet have no state.
        partial = tools.StateDictOptions(full_state_dict=True, strict=False)
        try:
            tools.set_model_state_dict(self.model, found["model"], options=options)
            tools.set_model_state_dict(self.ema, found["ema"], options=options)
            # Copied: state that is set is not, and would keep the checkpoint's file open.
            tools.set_optimizer_state_dict(self.model, self.optimizers,
                                           copy.deepcopy(found["optimizer"]), options=partial)
        except (RuntimeError, KeyError):
            raise UserError("its checkpoint is of another network or optimiser") from None
        for name, parameter in self.model.named_parameters():
            if name not in found["optimizer"]["state"]:
                for optimizer in self.optimizers:
                    optimizer.state.pop(parameter, None)


def check_run(config):
    """Raise UserError before work begins: about flags, folders, disk and memory."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and ranks()[1] == 1:
        raise UserError(f"srun has started {tasks} processes, and each would train alone: set RANK "
                        "and the other variables, see docs/cluster.md")
    device, dtype = decide(checked(config))
    if config.parallel == "fsdp" and (ranks()[1] == 1 or config.optimizer == "muon"):
        raise UserError("--parallel fsdp needs torchrun and --optimizer adamw")
    for needed, name in ((config.parallel == "fsdp", "fsdp"), (config.latent_dim, "latents")):
        if needed and lab(name) is None:
            raise UserError(f"these flags need lab/{name}.py beside cdslm.py")
    check_division(config, ranks()[1])
    data = places(config.data)
    config.data = "toy" if data == ["toy"] else data
    check_out(config)
    if plan := lab("plan"):
        plan.afford(config, device, dtype)
    elif config.minutes:
        print("(lab/plan.py is not here, so --minutes does not count)")
    return device, dtype


def train(config, trainer_of=Trainer, count=count):
    """From a Config to a run folder with checkpoints and sound. The same Config resumes the run.
    Whoever trains another network (`lab/autoregressive.py`) brings what differs."""
    if trainer_of is Trainer and Path(config.out, "arm.json").exists():
        raise UserError(f"--out {config.out} holds a run of lab/autoregressive.py; choose another "
                        "--out")
    device, dtype = check_run(config)
    process, cache = lab("process"), lab("cache")
    with together(device) as rank, contextlib.nullcontext() if rank else claim(config):
        announce(config, device, dtype, count)
        if rank:
            dist.barrier()                                    # rank 0 makes what the others open
            if not Path(config.out, "autoencoder.pt").exists():
                raise UserError(f"--out {config.out} of rank 0 is not to be seen by rank {rank}; "
                                "put it on a disk that all nodes share")
        corpus = cache.indexed(config) if rank and cache else None
        corpus = corpus or open_corpus(config)
        if rank == 0 and not (Path(config.out) / "config.json").exists():
            write_config(config.out, config, corpus.contents) # now the folder is this run's
        autoencoder = open_autoencoder(config, corpus, device, dtype)
        if rank == 0 and dist.is_initialized():
            if cache:
                cache.keep_index(config.out, corpus)
            dist.barrier()
        trainer = trainer_of(config, corpus, autoencoder, device, dtype)
        with process.attend(trainer) if process else contextlib.nullcontext():
            train_loop(trainer, Path(config.out))
        if trainer.stopping:
            print(f"stopped after step {trainer.done}; the same command goes on from there")
            if dist.is_initialized():
                dist.barrier()                                # torchrun kills all once one is gone
            raise SystemExit(128 + (trainer.signals or [signal.SIGTERM])[0])
        if rank == 0:
            del trainer                                       # its memory may be needed now
            gc.collect()
            listen(config.out, device)


def announce(config, device, dtype, count=count):
    """Print what will be trained, and on what."""
    size, precision = count(config), str(dtype)[6:]
    if dtype == torch.float32 and not multiplies_bf16(device):
        precision += f" (this {device.type} has no bf16 in hardware)"
    print(f"{config.size}: {size['parameters'] / 1e6:.2f} M parameters on {ranks()[1]} x {device} "
          f"in {precision}; {config.steps} steps of {config.batch_size} windows of "
          f"{size['tokens']} tokens, {size['flops'] * config.batch_size / 1e9:.3g} GFLOP per step")
    if plan := lab("plan"):
        plan.note_unused_gpu(config, device)


def train_loop(trainer, folder):
    """Steps, a row of log.jsonl for each, and now and then a validation and a checkpoint."""
    config = trainer.config
    trainer.restore(resume_point(folder, config))
    if trainer.done:
        print(f"going on from step {trainer.done}")
    path = Path(os.devnull if trainer.rank else folder / "log.jsonl")
    if trainer.rank == 0:
        speech = trainer.corpus.contents
        if read_json(folder / "config.json").get("speech", speech) not in ("", speech):
            print("note: the recordings have changed since this run began")
        write_config(folder, config, speech)                  # steps may have changed
        rows = path.read_text().splitlines(True) if path.exists() else []
        with replacing(path) as temporary:
            temporary.write_text("".join(rows[:trainer.done]))                # a row a step
    frames_per_step = config.batch_size * trainer.corpus.window
    first, begun, shown, unwritten = trainer.done, time.perf_counter(), {}, []
    plan = lab("plan")
    pace = plan and plan.Pace(config, first)

    with (open(path, "a", buffering=1) as log,                # a row is written at once
          tqdm(initial=first, total=config.steps, desc="training", unit="step",
               disable=trainer.rank > 0) as bar):
        while trainer.done < config.steps and not trainer.stopping:
            if config.lr_schedule == "wsd" and trainer.done == decay_start(config.steps):
                trainer.save(folder / "trunk.pt")             # a longer run resumes here
            row = trainer.step()
            unwritten.append(row)
            if pace and pace.shortens(trainer.done):
                bar.total = config.steps
                write_config(folder, config, trainer.corpus.contents)
            elapsed = time.perf_counter() - begun
            row["frames/s"] = (trainer.done - first) * frames_per_step / elapsed
            due = trainer.done == config.steps or trainer.done % config.eval_every == 0
            if due:
                row["valid"] = trainer.validate()
                shown["valid"] = f"{row['valid']['mean']:.4f}"

            # The newest row is finished in the next step, so that the device need not wait for us.
            saves = due or trainer.stopping or trainer.late
            whole = saves or trainer.done == decay_start(config.steps)
            while len(unwritten) > (0 if whole else 1):
                row = trainer.finish(unwritten.pop(0))
                log.write(json.dumps(row) + "\n")
                if row["step"] % 10 == 0:
                    shown["loss"] = f"{row['loss']:.4f}"
                    bar.set_postfix(shown, refresh=False)
            bar.update()
            if saves:
                if trainer.rank == 0:
                    os.fsync(log.fileno())                    # no checkpoint without its rows
                trainer.save(folder / "checkpoint.pt")


def listen(folder, device="cpu", number=4):
    """Write WAV files to judge by: for a few held-out windows, the context with the model's
    continuation, the recording, and the recording encoded and decoded."""
    folder = Path(folder)
    config, model, autoencoder = load_run(folder, device)
    examples = load(folder / "autoencoder.pt")["examples"][:number]
    waves = examples.float().to(device) / 32767
    frames = autoencoder.encode(waves)
    context = frames[:, :config.ctx_frames]
    generated = sample(model, context, progress=GENERATING)
    sounds = {"generated": autoencoder.decode(torch.cat([context, generated], dim=1)),
              "true": waves, "reconstruction": autoencoder.decode(frames)}
    for kind, batch in sounds.items():
        for i, wave in enumerate(batch, 1):
            save_audio(folder / f"{i}_{kind}.wav", wave)
    quoted = shlex.quote(str(folder))
    print(f"listen to {folder}/1_generated.wav: {config.ctx_seconds:g} s of a held-out recording, "
          "then the model's continuation; 1_true.wav is the recording, 1_reconstruction.wav the "
          f"recording encoded and decoded.\nnext: python sample.py {quoted} --num 8 --seconds 10"
          f"      then: python eval_pjsd.py {quoted}")
    open_page(folder, config)


GENERATING = functools.partial(tqdm, desc="generating", unit="window")


def open_page(folder, config, *written):
    """Write the listening page, if the lab is there (see `lab.page.write_page`)."""
    if page := lab("page"):
        page.write_page(folder, config, *written)
    else:
        print("(lab/page.py is not here, so no index.html is written)")


def lab(name):
    """A module of lab/; None where cdslm.py was copied alone."""
    sys.modules.setdefault("cdslm", sys.modules[__name__])    # the lab imports this very program
    try:
        return importlib.import_module(f"lab.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("lab", f"lab.{name}"):
            raise
    return None


# --------------------------------------------------------------------------------------------------
# 15. main. The command line is the dataclass.

class Parser(argparse.ArgumentParser):
    """argparse with errors of one line; its description, a program's docstring, stays as it is."""

    def __init__(self, description=None, **options):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def config_parser(description=__doc__):
    """A parser with a flag for every field of Config."""
    parser = group = Parser(description)
    for f in dataclasses.fields(Config):
        flag, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.metadata["section"]:
            group = parser.add_argument_group(f.metadata["section"])
        if f.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default,
                               help=help)
            continue
        if f.default is not None:
            help += f" [{f.default}]"
        choices = f.metadata["limits"]["choices"]
        group.add_argument(flag, type=f.type, default=f.default, help=help,
                           metavar="|".join(choices) or f.type.__name__.upper(),
                           nargs="+" if f.name == "data" else None)
    return parser


def to_config(arguments):
    """Parsed arguments, among them all fields of Config -> Config."""
    fields = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Config)}
    if isinstance(fields["data"], list) and len(fields["data"]) == 1:
        fields["data"] = fields["data"][0]
    if fields["size"] not in SIZES:
        raise UserError(f"--size is {fields['size']!r}; choose one of {', '.join(SIZES)}")
    return checked(Config(**fields))


def checked(config):
    """The same Config. Raises UserError for a value that its field does not allow, and for values
    that do not fit each other."""
    for f in dataclasses.fields(config):
        flag, value = "--" + f.name.replace("_", "-"), getattr(config, f.name)
        limits = f.metadata["limits"]
        if limits["choices"] and value not in limits["choices"]:
            raise UserError(f"{flag} is {value!r}; choose one of {', '.join(limits['choices'])}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} must be a finite number")
        if limits["above"] is not None and value <= limits["above"]:
            raise UserError(f"{flag} must be more than {limits['above']}")
        if limits["least"] is not None and value < limits["least"]:
            raise UserError(f"{flag} must be at least {limits['least']}")
        if limits["most"] is not None and value > limits["most"]:
            raise UserError(f"{flag} must be at most {limits['most']:g}")

    if not (config.ctx_frames and config.gen_frames):
        raise UserError("--ctx-seconds and --gen-seconds must hold at least one token of "
                        f"{config.patch_size} frames")
    if config.width % (64 if config.width > 64 else 4):
        raise UserError(f"--width must be a multiple of 64 (below 64, of 4), not {config.width}")
    if config.micro_batch and config.batch_size % config.micro_batch:
        raise UserError(f"--micro-batch {config.micro_batch} must divide --batch-size "
                        f"{config.batch_size}")
    return config


def parse(argv=None):
    """Command line -> Config."""
    return to_config(config_parser().parse_args(argv))


def cli(main, resumable=False):
    """Run a program's `main`. A mistake of the user, or a full disk, is one line and exit status 2;
    SIGTERM is as Ctrl-C. `resumable`: the same command goes on where it stopped."""
    def terminated(number, frame):
        raise KeyboardInterrupt(number)

    def fail(message):
        who = f"rank {ranks()[0]}: " if ranks()[1] > 1 else ""
        print(f"error: {who}{printable(message)}", file=sys.stderr)
        sys.exit(2)

    if process := lab("process"):
        process.prepare()
    signal.signal(signal.SIGTERM, terminated)
    try:
        main()
    except (UserError, OSError) as error:
        fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        fail("out of memory; try a smaller --micro-batch or --num, or --checkpoint-activations")
    except KeyboardInterrupt as stopped:
        hint = "; the same command goes on from what is done" if resumable else ""
        print(f"stopped{hint}", file=sys.stderr)
        sys.exit(128 + (stopped.args or [signal.SIGINT])[0])


def main():
    if not {"--dry-run", "--print-params"} & set(sys.argv):
        train(parse())
    elif plan := lab("plan"):
        plan.main()
    else:
        raise UserError("--dry-run and --print-params need lab/plan.py beside cdslm.py")


if __name__ == "__main__":
    cli(main, resumable=True)
