"""tokens: frames to discrete codes and back, for a language model that predicts codes.

    fsq      finite scalar quantisation (Mentzer et al. 2024): a learned bottleneck of 16 digits a
             slot, each rounded to one of five values; four digits are one of 625 codes
    units    k-means: the number of the nearest of 625 mean slots, the plain discrete units of
             Lakhotia et al. (2021), but of log-mel

A slot is two frames, 25 ms. The codes of a position, `patch_size` frames, depend on its own frames
alone: those of a context know nothing of what follows it. A run's tokeniser is trained on its own
audio and kept in tokeniser.pt.

Symbols:  K codes a position    G codes a slot    P positions    S slots
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cdslm import UserError, autocast, convnext, fingerprint, keyed, load, save, train_part

SLOT = 2                               # frames
LEVELS, DIGITS = 5, 4                  # values of a digit, digits of a code
CODES = LEVELS ** DIGITS               # different codes
GROUPS = {"fsq": 4, "units": 1}        # {kind of tokeniser: G}
WINDOWS, FRAMES = 16, 48               # of a training step of FSQ, as `train_part` draws them
SAMPLES, ROUNDS = 1600, 10             # of k-means: windows of 32 frames, and passes over them


def codes_per_position(config, kind):
    """K. Raises UserError if a position is not a whole number of slots, or has more codes than
    values."""
    if config.patch_size % SLOT or FRAMES % config.patch_size:
        raise UserError(f"codes need an even --patch-size that divides {FRAMES}, not "
                        f"{config.patch_size}")
    if SLOT * config.channels < GROUPS[kind]:                 # each is drawn by a value of noise
        raise UserError(f"{GROUPS[kind]} codes for {SLOT} frames need more than {config.channels} "
                        "values a frame; choose another --latent-dim")
    return config.patch_size // SLOT * GROUPS[kind]


def flops_of_convolution_backward(gradient, x, weight, *rest, **unused):
    """From the shapes: a forward pass for each gradient that is wanted, of input and of weight.
    (torch's own formula takes the depthwise convolutions of a ConvNeXt block for dense ones.)"""
    of_input, of_weight, _ = rest[-1]
    return (of_input + of_weight) * 2 * math.prod(gradient) * math.prod(weight[1:])


def flops_of(work):
    """FLOPs of the matrix products and convolutions in a call of `work`, counted while it runs."""
    formulas = {torch.ops.aten.convolution_backward: flops_of_convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops()


class Tokeniser(nn.Module):
    """encode: frames (B, T, C) -> codes (B, P, K);  decode: codes -> frames. Here as k-means units.
    """

    def __init__(self, config, kind="units"):
        super().__init__()
        self.kind, self.patch_size = kind, config.patch_size
        self.per_position = codes_per_position(config, kind)
        self.register_buffer("mel_stats", torch.zeros(2))     # of the autoencoder of its run
        if kind == "units":
            self.register_buffer("centres", torch.zeros(CODES, SLOT * config.channels))

    def slots(self, frames):
        """(B, T, C) -> (B, S, 2 C)."""
        return frames.float().unflatten(1, (-1, SLOT)).flatten(2)

    @torch.no_grad()
    def encode(self, frames):
        # In float32 at any precision of the run: a code must not depend on it.
        with autocast(frames.device, torch.float32):
            codes = self.slot_codes(frames)                                   # (B, S, G)
        return codes.flatten(1).unflatten(1, (-1, self.per_position))

    @torch.no_grad()
    def decode(self, codes):
        slots = self.slot_frames(codes.flatten(1).unflatten(1, (-1, GROUPS[self.kind])))
        return slots.unflatten(2, (SLOT, -1)).flatten(1, 2)

    def slot_codes(self, frames):
        """Frames (B, T, C) -> codes (B, S, G)."""
        slots = self.slots(frames)
        return self.nearest(slots.flatten(0, 1)).unflatten(0, (len(slots), -1))[..., None]

    def slot_frames(self, codes):
        """Codes (B, S, G) -> slots (B, S, 2 C)."""
        return self.centres[codes[..., 0]]

    def nearest(self, slots):
        """Slots (N, 2 C) -> the numbers of the nearest centres (N,)."""
        distance = self.centres.square().sum(1) - 2 * slots @ self.centres.T  # (N, 625)
        return distance.argmin(1)

    @torch.no_grad()
    def fit(self, slots):
        """Lloyd's algorithm on slots (N, 2 C). An empty centre stays where it is."""
        spread = torch.linspace(0, len(slots) - 1, CODES).long()
        self.centres.copy_(slots[spread])
        for _ in tqdm(range(ROUNDS), desc="k-means", unit="round"):
            numbers = self.nearest(slots)
            count = numbers.bincount(minlength=CODES)[:, None]                # (625, 1)
            total = torch.zeros_like(self.centres).index_add_(0, numbers, slots)
            self.centres.copy_(torch.where(count > 0, total / count.clamp(min=1), self.centres))


class FSQ(Tokeniser):
    """The learned bottleneck."""

    def __init__(self, config):
        super().__init__(config, "fsq")
        slot, digits = SLOT * config.channels, GROUPS["fsq"] * DIGITS
        self.encoder = convnext(slot, digits, width=64, blocks=1)
        self.decoder = convnext(digits, slot, blocks=2)
        self.register_buffer("powers", LEVELS ** torch.arange(DIGITS), persistent=False)

    def bottleneck(self, frames):
        """Frames (B, T, C) -> digits before they are rounded (B, S, 16), from -2 to 2."""
        positions = frames.unflatten(1, (-1, self.patch_size)).flatten(0, 1)  # (B P, k, C)
        digits = self.encoder(self.slots(positions).mT).mT                    # (B P, k/2, 16)
        digits = (LEVELS - 1) / 2 * digits.float().tanh()
        return digits.unflatten(0, (len(frames), -1)).flatten(1, 2)

    def slot_codes(self, frames):
        digits = self.bottleneck(frames).round().long() + LEVELS // 2
        return (digits.unflatten(2, (-1, DIGITS)) * self.powers).sum(3)

    def slot_frames(self, codes):
        digits = codes[..., None] // self.powers % LEVELS - LEVELS // 2       # (B, S, G, 4)
        return self.decoder(digits.flatten(2).float().mT).mT

    def loss(self, frames):
        """Mean absolute error of what comes back. Rounding lets gradients through as they are."""
        digits = self.bottleneck(frames)
        rounded = digits + (digits.round() - digits).detach()
        return F.l1_loss(self.decoder(rounded.mT).mT.float(), self.slots(frames))


def new_tokeniser(config, kind):
    """An untrained tokeniser of a kind."""
    return FSQ(config) if kind == "fsq" else Tokeniser(config)


def tokeniser_flops(config, kind):
    """FLOPs of training a tokeniser. All its steps cost the same, so one is counted."""
    tokeniser = new_tokeniser(config, kind)
    if kind == "units":
        slots = torch.zeros(16 * SAMPLES, SLOT * config.channels)
        return ROUNDS * flops_of(lambda: tokeniser.nearest(slots))
    frames = torch.zeros(WINDOWS, FRAMES, config.channels)
    step = flops_of(lambda: tokeniser.loss(frames).backward())
    return 4 * config.decoder_steps * step


def fit_tokeniser(config, kind, corpus, autoencoder, dtype):
    """Train a tokeniser of the frames that `autoencoder` makes of the corpus."""
    torch.manual_seed(config.seed)
    device = autoencoder.mel_stats.device
    tokeniser = new_tokeniser(config, kind).to(device)
    tokeniser.mel_stats.copy_(autoencoder.mel_stats)

    def loss_of(wave, dtype):
        frames = autoencoder.encode(wave)
        with autocast(device, dtype):
            return tokeniser.loss(frames)

    if kind == "fsq":
        steps = 4 * config.decoder_steps                      # as many as of another bottleneck
        train_part(tokeniser, loss_of, "tokeniser", steps, config, corpus, dtype)
    else:
        keys = [keyed(config.seed, "units", i) for i in range(SAMPLES)]
        mel = torch.from_numpy(corpus.windows("mel", "train", keys, 16 * SLOT))
        tokeniser.fit(tokeniser.slots(autoencoder.from_mel(mel.to(device))).flatten(0, 1))
    return tokeniser


def open_tokeniser(folder, config, kind, autoencoder, corpus=None, dtype=torch.float32):
    """The tokeniser of a run, trained on `corpus` if there is none yet, and a number that stands
    for its weights, by which a model knows its own. Raises UserError if it is of another kind."""
    path, device = Path(folder) / "tokeniser.pt", autoencoder.mel_stats.device
    if corpus and not path.exists():
        save(path, tokeniser=fit_tokeniser(config, kind, corpus, autoencoder, dtype).state_dict())
    weights, tokeniser = load(path).get("tokeniser", {}), new_tokeniser(config, kind)
    try:
        tokeniser.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"{path}: not a tokeniser of kind {kind} for this run") from None
    contents = b"".join(tensor.numpy().tobytes() for tensor in weights.values())
    tokeniser = tokeniser.to(device).eval().requires_grad_(False)
    return tokeniser, int(fingerprint(contents), 16)
