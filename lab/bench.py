"""bench: how fast, and beside which other packages? Each table holds medians of functions that were
measured in turns in one run. A slow phase of the machine slows all of them alike, so compare within
a table.

    python -m lab.bench step                    a training step of the blocks, beside two packages
    python -m lab.bench parts --emulate avx2    the parts of a step of `tiny`; here without bf16
    python -m lab.bench sampling out/tiny       quality against evaluations; draws a figure
    python -m lab.bench speed out/tiny          times real time of generating
    python -m lab.bench decoder out/tiny        what the decoder changes in generated frames
    python -m lab.bench data                    toy speech, log-mel beside two packages, batches
    python -m lab.bench startup out/tiny        seconds until --help, until the first step

`--quick` measures something small, to see that it works. OMP_NUM_THREADS sets the threads.
"""
import contextlib
import dataclasses
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cdslm import (FFT, FLOOR, FRAME_RATE, HOP, MELS, RATE, WINDOW, AudioAutoencoder, Config,
                   Diffusion, MMDiT, Parser, Trainer, UserError, autocast, cli, decide,
                   load_run, log_mel, make_optimizers, open_corpus, read_config, rotary, sample)
from lab.figures import new_figure, save_figure
from lab.plan import command_line

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
# The processor of most laptops has neither AVX512 nor bf16. Libraries read these when they are
# loaded, hence a child process.
EMULATE = {"avx2": {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}}


# --------------------------------------------------------------------------------------------------
# Measuring.

def race(rounds=7, **functions):
    """{name: median seconds} of functions that are called in turns, once to warm up and then
    `rounds` times."""
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, work in functions.items():
            begun = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def race_commands(title, commands, rounds):
    """Table of how long programs take, beside the first of them."""
    def runner(words):
        command = [sys.executable, *map(str, words)]
        return lambda: subprocess.run(command, check=True, capture_output=True)

    seconds = race(rounds, **{name: runner(words) for name, words in commands.items()})
    first, *_ = seconds.values()
    rows = [(name, s, s - first) for name, s in seconds.items()]
    table(title, ("command", "seconds", "beyond the first"), rows)


def table(title, columns, rows):
    """Print a table in Markdown."""
    print(f"\n{title}\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in row]
        print(f"| {' | '.join(cells)} |", flush=True)


# --------------------------------------------------------------------------------------------------
# The training step beside other packages: forward and backward through L blocks of one width, in
# bf16. Each maker returns a module and run(ctx (B, Tc, d), gen (B, Tg, d), noise (B, d)) -> gen.

def our_blocks(config):
    """The blocks of cdslm.py."""
    model = MMDiT(config)
    tokens = (config.ctx_frames + config.gen_frames) // config.patch_size
    like = torch.zeros((), dtype=torch.bfloat16)
    cos, sin = rotary(tokens, config.width // model.blocks[0].heads, like)

    def run(ctx, gen, c):
        for block in model.blocks:
            ctx, gen = block(ctx, gen, c[:, None], cos, sin, 1.0)
        return gen
    return model.blocks, run


def diffusers_blocks(config):
    """The joint blocks of Stable Diffusion 3 in `diffusers`."""
    from diffusers.models.attention import JointTransformerBlock
    blocks = nn.ModuleList()
    for i in range(config.depth):
        last = i == config.depth - 1
        blocks.append(JointTransformerBlock(
            config.width, config.width // 64, 64, last, qk_norm="rms_norm"))

    def run(ctx, gen, c):
        for block in blocks:
            ctx, gen = block(gen, ctx, c)
        return gen
    return blocks, run


def mmdit_blocks(config):
    """The blocks of `mmdit`, with the attention that is the faster of its two on a CPU."""
    from mmdit.mmdit_pytorch import MMDiT as Peer
    d = config.width
    model = Peer(depth=config.depth, dim_image=d, dim_text=d, dim_cond=d, heads=d // 64,
                 dim_head=64, num_residual_streams=1, qk_rmsnorm=True, final_norm=False)

    def run(ctx, gen, c):
        _, gen = model(text_tokens=ctx, image_tokens=gen, time_cond=c)
        return gen
    return model, run


def blocks_step(config, make, compiled=False):
    """A function that runs such blocks forward and backward on a batch of the config's shape."""
    module, run = make(config)
    run = torch.compile(run, dynamic=False) if compiled else run
    for parameter in module.parameters():                     # no gate is closed
        nn.init.normal_(parameter, std=0.02)
    batch, d = config.batch_size, config.width
    shapes = [
        (batch, config.ctx_frames // config.patch_size, d),
        (batch, config.gen_frames // config.patch_size, d),
        (batch, d)]
    inputs = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]

    def step():
        with autocast(CPU, torch.bfloat16):
            run(*inputs).float().square().mean().backward()
        module.zero_grad(set_to_none=True)
    return step


def block_flops(config):
    """FLOPs of training the blocks alone on a batch, as `count` has them for the whole network."""
    d, L = config.width, config.depth
    ctx = config.ctx_frames // config.patch_size
    gen = config.gen_frames // config.patch_size
    products = 12 * d * d * (gen * L + ctx * (L - 1)) + 3 * d * d * ctx
    attention = 2 * d * L * (ctx + gen) ** 2
    adaln = 6 * d * d * (2 * L - 1) + 2 * d * d
    return 6 * config.batch_size * (products + attention + adaln)


def bench_step(quick, _):
    """Blocks beside two packages. All normalise queries and keys; ours also rotate them."""
    makers = {"ours": our_blocks}
    try:
        import diffusers
        import mmdit  # noqa: F401
        makers["mmdit 0.3.0"] = mmdit_blocks
        makers[f"diffusers {diffusers.__version__}"] = diffusers_blocks
    except ImportError:
        print("(pip install mmdit==0.3.0 diffusers to see them beside ours)")

    # What the processor can do at best: products of bf16 matrices.
    matrix = torch.randn(512, 512).bfloat16()
    product_flops = 20 * 2 * 512 ** 3

    def products():
        for _ in range(20):
            matrix @ matrix

    wide = dict(depth=2, width=256)
    shapes = [
        ("tiny", dict(batch_size=32)),
        ("tiny", wide | dict(batch_size=32)),
        ("tiny", wide | dict(batch_size=16, patch_size=2)),
        ("base", dict(batch_size=4))]
    for size, shape in shapes:
        if quick:
            shape = shape | dict(batch_size=1)
        config = Config(size, **shape)
        work = {name: blocks_step(config, make) for name, make in makers.items()}
        torch._dynamo.reset()                                 # or it compiles for any shape
        compiler = shutil.which("g++") and not quick
        compiled = {f"{name}, compiled": blocks_step(config, make, compiled=True)
                    for name, make in makers.items() if compiler}
        seconds = race(2 if quick else 9, product=products, **work, **compiled)
        peak = product_flops / seconds.pop("product")
        rows = [(name, 1e3 * s, s / seconds["ours"], block_flops(config) / s / peak)
                for name, s in seconds.items()]
        title = (f"Blocks, L = {config.depth}, d = {config.width}, "
                 f"{config.ctx_frames // config.patch_size} + "
                 f"{config.gen_frames // config.patch_size} tokens, batch {config.batch_size}, "
                 f"bf16; {peak / 1e9:.0f} GFLOP/s in products of 512 x 512")
        table(title, ("blocks", "ms a step", "beside ours", "share of the peak"), rows)
    bench_parts(quick)


# --------------------------------------------------------------------------------------------------
# The whole training step, part by part.

class Step:
    """A training step on noise in the shape of speech, in its parts."""

    def __init__(self, config):
        self.config = config
        _, self.dtype = decide(config)
        self.model, self.diffusion = MMDiT(config), Diffusion(config)
        self.optimizers = make_optimizers(self.model, config, self.dtype)
        self.ctx = torch.randn(config.batch_size, config.ctx_frames, config.channels)
        self.x0 = torch.randn(config.batch_size, config.gen_frames, config.channels)

    def backward(self, self_condition):
        phi = torch.rand(len(self.x0)) + 0.2
        eps = torch.randn_like(self.x0)
        with autocast(CPU, self.dtype):
            losses = self.diffusion.loss(self.model, self.x0, self.ctx, phi, eps, self_condition)
            losses.mean().backward()

    def update(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def __call__(self):
        self.backward(self.config.self_condition > 0)
        self.update()
        self.model.zero_grad(set_to_none=True)


def bench_parts(quick, _=None):
    """Where a step of `tiny` goes. Muon must take at most 0.6 times as long as the network, on any
    processor."""
    step = Step(Config("tiny", batch_size=2 if quick else 32))
    step.backward(True)
    weights = list(step.model.parameters())
    averages = list(MMDiT(step.config).requires_grad_(False).parameters())
    adamw, muon = step.optimizers
    work = {
        "forward and backward": lambda: step.backward(False),
        "and with self-conditioning": lambda: step.backward(True),
        "gradient norm": lambda: nn.utils.clip_grad_norm_(weights, 1.0),
        "AdamW": adamw.step,
        "Muon": muon.step,
        "EMA": lambda: ema(averages, weights),
    }
    if hasattr(torch.optim, "Muon"):
        matrices = muon.param_groups[0]["params"]
        torchs = torch.optim.Muon(matrices, lr=0.02, adjust_lr_fn="original")
        work["torch's Muon (bf16, always)"] = torchs.step

    seconds = race(2 if quick else 9, **work)
    network = (seconds["forward and backward"] + seconds["and with self-conditioning"]) / 2
    rows = [(name, 1e3 * s, s / network) for name, s in seconds.items()]
    title = (f"Where a step of `tiny` goes, {torch.backends.cpu.get_cpu_capability()}, "
             f"{str(step.dtype)[6:]}")
    table(title, ("part", "ms", "beside the network"), rows)


@torch.no_grad()
def ema(averages, weights):
    torch._foreach_lerp_(averages, weights, 0.001)


# --------------------------------------------------------------------------------------------------
# Sampling: what more evaluations and another sampler are worth, and how fast it is.

EVALUATIONS, GUIDANCE, FINEST = (4, 8, 16, 32, 64), (1, 2, 4), 256


def toy_contexts(config, autoencoder, number):
    """Toy speech of the run's languages, and the frames (number, T, C) of windows of it."""
    from eval_pjsd import CONTEXTS
    from lab.listener import speak
    from lab.topics import toy_speech
    toy = toy_speech(config)
    frames = config.ctx_frames + config.gen_frames
    waves, _ = speak(toy, CONTEXTS, number, frames, "contexts", config.ctx_frames)
    return toy, autoencoder.encode(waves)


def bench_sampling(quick, run):
    """Toy runs: pJSD beside new speech, and the distance to the result of FINEST evaluations from
    the same noise."""
    from eval_pjsd import REFERENCE, compare
    from lab.listener import batched, load_listener, speak
    from lab.sides import log_mel_of
    config, model, autoencoder = load_run(run)
    listener = load_listener()
    evaluations, finest = (EVALUATIONS[:2], 8) if quick else (EVALUATIONS, FINEST)
    seconds = 60 if quick else 180
    number = max(1, seconds * FRAME_RATE // config.gen_frames)
    toy, frames = toy_contexts(config, autoencoder, number)
    contexts = frames[:, :config.ctx_frames]
    waves, _ = speak(toy, REFERENCE, 3 * number, config.gen_frames, "reference")
    reference = listener.hear(batched(log_mel, waves))["clips"]

    def generate(sampler, steps, cfg):
        def continued(part):
            return sample(model, part, steps=steps, cfg=cfg, sampler=sampler)
        return batched(continued, contexts, size=32)

    def pjsd(x0):
        return compare(listener.hear(log_mel_of(autoencoder, x0))["clips"], reference)["pjsd"][:3]

    rows = []
    for cfg in GUIDANCE:
        fine = generate("dpm", finest, cfg)
        rows.append(("dpm", finest, cfg, *pjsd(fine), 0.0))
        for sampler in ("ddim", "dpm"):
            for steps in evaluations:
                x0 = generate(sampler, steps, cfg)
                error = float((x0 - fine).square().mean().sqrt())
                rows.append((sampler, steps, cfg, *pjsd(x0), error))
    minutes = number * config.gen_frames / FRAME_RATE / 60
    table(f"{minutes:.1f} minutes of speech from {run}; the error is the distance of frames, of "
          f"standard deviation 1, to those of {finest} evaluations of dpm",
          ("sampler", "evaluations", "cfg", "pJSD 1", "pJSD 2", "pJSD 3", "error"), rows)
    if not quick:
        draw_sampling(rows, ROOT / "docs/figures/sampler.png")


def draw_sampling(rows, path):
    """pJSD and frame error against evaluations: a colour for each guidance, dashes for DDIM."""
    figure = new_figure(10, 2.8)
    titles = {3: "pJSD$_1$", 4: "pJSD$_2$", 5: "pJSD$_3$", 6: "error"}        # by column of rows
    for axes, (column, title) in zip(figure.subplots(1, 4), titles.items()):
        for cfg, colour in zip(GUIDANCE, ("C0", "C1", "C2")):
            for sampler, line in (("ddim", "--"), ("dpm", "-")):
                points = sorted(row for row in rows
                                if row[0] == sampler and row[2] == cfg and row[1] < FINEST)
                axes.plot([row[1] for row in points], [row[column] for row in points], line + "o",
                          color=colour, markersize=3, label=f"{sampler}, cfg {cfg}")
        axes.set(xscale="log", yscale="log", title=title, xlabel="evaluations")
        axes.set_xticks(EVALUATIONS, EVALUATIONS)
        axes.minorticks_off()
    axes.legend(frameon=False, fontsize=7)
    save_figure(figure, path)
    print(f"\ndrawn in {path}")


def bench_speed(quick, run):
    """Times real time, decoder included, in a batch of 8; and one continuation by a command from a
    cold start."""
    config, model, autoencoder = load_run(run)
    context = torch.randn(2 if quick else 8, config.ctx_frames, config.channels)
    frames = torch.cat([context] * 4, dim=1)[:, :config.gen_frames]
    seconds = len(context) * config.gen_frames / FRAME_RATE

    def generator(steps, cfg):
        steps = 4 if quick else steps
        return lambda: autoencoder.decode(sample(model, context, steps=steps, cfg=cfg))

    work = {f"{steps} evaluations, --cfg {cfg}": generator(steps, cfg)
            for steps in (24, 40, 48) for cfg in (1, 2)}
    work["the decoder alone"] = lambda: autoencoder.decode(frames)
    rows = [(name, seconds / s) for name, s in race(1 if quick else 5, **work).items()]
    table(f"Generating, batch {len(context)}", ("what", "times real time"), rows)

    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "python -c 'import torch'": ("-c", "import torch"),
            "python sample.py RUN --num 1": (
                ROOT / "sample.py", run, "--num", "1", "--out", f"{folder}/x.wav"),
        }
        race_commands("One continuation", commands, 1 if quick else 3)


# --------------------------------------------------------------------------------------------------
# Data, decoder, start-up.

def log_mels(wave):
    """{name: function} of log-mel here and in the packages that are installed."""
    work = {"log-mel": lambda: log_mel(wave)}
    with contextlib.suppress(ImportError):
        import librosa
        samples = wave[0].numpy()

        def of_librosa():
            mel = librosa.feature.melspectrogram(
                y=samples, sr=RATE, n_fft=FFT, hop_length=HOP, win_length=WINDOW, n_mels=MELS,
                power=1.0)
            return np.log(np.maximum(mel, FLOOR))
        work["log-mel, librosa"] = of_librosa
    with contextlib.suppress(ImportError):
        import torchaudio
        transform = torchaudio.transforms.MelSpectrogram(
            RATE, FFT, WINDOW, HOP, n_mels=MELS, power=1.0, norm="slaney", mel_scale="slaney")
        work["log-mel, torchaudio"] = lambda: transform(wave).clamp(min=FLOOR).log()
    return work


def bench_data(quick, _):
    """Toy speech; log-mel beside other packages; and how long reading a batch takes, which a thread
    does ahead of the step."""
    from lab.toyspeech import ToySpeech
    seconds, toy = 5 if quick else 60, ToySpeech()
    indices = iter(range(10 ** 6))
    work = {"toy speech": lambda: toy.utterance(next(indices), seconds)}
    work |= log_mels(0.1 * torch.randn(1, seconds * RATE))
    rows = [(name, seconds / s) for name, s in race(2 if quick else 7, **work).items()]
    table(f"Data, {seconds} s of speech", ("what", "times real time"), rows)

    few = dict(toy_hours=0.05, batch_size=2) if quick else {}
    config = Config(decoder="griffinlim", **few)
    corpus = open_corpus(config)
    trainer = Trainer(config, corpus, AudioAutoencoder("griffinlim"), *decide(config))
    spent, read = [], trainer.read

    def timed(*part):
        begun = time.perf_counter()
        batch = read(*part)
        spent.append(time.perf_counter() - begun)
        return batch

    trainer.read = timed
    step = race(2 if quick else 20, step=lambda: trainer.finish(trainer.step()))["step"]
    batch = statistics.median(spent)
    rows = [("its batch", 1e3 * batch, batch / step), ("all of it", 1e3 * step, 1.0)]
    table("A step of `tiny`", ("what", "ms", "share"), rows)


@torch.no_grad()
def bench_decoder(quick, run):
    """What the decoder, or Griffin-Lim, changes in real and in generated frames: the log-mel of the
    sound, and the phones that the recogniser finds in it, beside those of the frames."""
    from lab.listener import batched, load_listener, phone_errors
    config, model, autoencoder = load_run(run)
    listener = load_listener()
    _, frames = toy_contexts(config, autoencoder, 4 if quick else 60)
    context, real = frames.split([config.ctx_frames, config.gen_frames], dim=1)
    generated = batched(lambda part: sample(model, part), context, size=20)
    griffin_lim = AudioAutoencoder(decoder="griffinlim")
    griffin_lim.mel_stats.copy_(autoencoder.mel_stats)

    rows = []
    for kind, frames in (("real", real), ("generated", generated)):
        normalised = autoencoder.to_mel(frames)
        mel = normalised * autoencoder.mel_stats[1] + autoencoder.mel_stats[0]
        phones = listener.hear(mel)["clips"]
        total = sum(map(len, phones))
        sounds = {
            "learned": autoencoder.decode(frames),
            "Griffin-Lim 32": griffin_lim.decode(normalised),
        }
        for way, wave in sounds.items():
            decoded_mel = log_mel(wave)
            decoded_phones = listener.hear(decoded_mel)["clips"]
            errors = sum(phone_errors(a, b) for a, b in zip(decoded_phones, phones))
            rows.append((kind, way, float((decoded_mel - mel).abs().mean()), errors / total))
    table("Frames, decoded", ("frames", "decoder", "log-mel L1", "phones changed"), rows)


def bench_startup(quick, run):
    """--help beside `import torch`; and the first step of a run whose speech is cached and whose
    decoder is trained."""
    commands = {
        "python -c 'import torch'": ("-c", "import torch"),
        "python cdslm.py --help": (ROOT / "cdslm.py", "--help"),
    }
    race_commands("Start-up", commands, 2 if quick else 7)
    seconds = []
    for _ in range(1 if quick else 3):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("config.json", "autoencoder.pt"):
                shutil.copy(Path(run) / name, folder)
            seconds.append(first_step(folder, read_config(run)))
    table("A run whose speech is cached", ("from launch to", "seconds"),
          [("the first step", statistics.median(seconds))])


def first_step(folder, config):
    """Seconds until a run of this configuration in this folder has done a step."""
    words = command_line(dataclasses.replace(config, out=folder))
    command = [sys.executable, ROOT / "cdslm.py", *words]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True) as process:
        output = ""
        while process.poll() is None and not re.search(r"training:.*\b1/\d", output):
            output += process.stderr.read(1)
        seconds = time.perf_counter() - begun
        process.kill()
    return seconds


# --------------------------------------------------------------------------------------------------
# The command line.

BENCHES = {name[6:]: work for name, work in globals().items() if name.startswith("bench_")}
OF_A_RUN = "sampling", "speed", "decoder", "startup"


def main():
    parser = Parser(__doc__)
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("run", nargs="?", help=f"a run folder, for {', '.join(OF_A_RUN)}")
    parser.add_argument("--quick", action="store_true",
                        help="measure something small, to see that it works")
    parser.add_argument("--emulate", choices=EMULATE,
                        help="run with the instruction sets of another processor")
    arguments = parser.parse_args()
    if arguments.run is None and arguments.what in OF_A_RUN:
        raise UserError(f"{arguments.what} needs a run folder, such as out/tiny")
    if arguments.emulate:
        words = [word for word in sys.argv[1:] if word not in ("--emulate", arguments.emulate)]
        done = subprocess.run([sys.executable, "-m", "lab.bench", *words],
                              env=os.environ | EMULATE[arguments.emulate])
        raise SystemExit(done.returncode)

    torch.manual_seed(0)
    _, dtype = decide(Config())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bf16 in hardware: "
          f"{dtype == torch.bfloat16}")
    BENCHES[arguments.what](arguments.quick, arguments.run)


if __name__ == "__main__":
    cli(main)
