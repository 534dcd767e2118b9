"""bench: how fast, and beside whom? Each table holds medians measured in turns in one run: whatever slows the machine
slows all of them alike, so read the ratios rather than the milliseconds.

    python -m lab.bench step                    a training step of the blocks, beside mmdit's and diffusers'
    python -m lab.bench parts --emulate avx2    where a step of `tiny` goes; here without bf16
    python -m lab.bench sampling out/tiny       quality against evaluations of the network; draws a figure for docs/
    python -m lab.bench speed out/tiny          how many times faster than real time it speaks
    python -m lab.bench decoder out/tiny        what is heard of generated frames, once they are sound
    python -m lab.bench data                    toy speech, log-mel beside librosa and torchaudio, batches
    python -m lab.bench startup out/tiny        seconds until --help, until the first step
    python -m lab.bench growth                  time and memory of a step against depth, window and batch

`--quick` tries it all on something small. Threads are as many as OMP_NUM_THREADS says, or as there are processors.
"""
import argparse
import contextlib
import os
import re
import resource
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

import cdslm
from cdslm import Config, Diffusion, MMDiT, count, decide, load_run, make_optimizers, sample
from cdslm import FFT, FRAME_RATE, HOP, MELS, RATE, WINDOW, log_mel, open_corpus

ROOT = Path(__file__).parents[1]


# ----------------------------------------------------------------------------------------------------------------------
# Measuring.

def race(rounds=7, **contestants):
    """{name: median seconds} of functions that are called in turns, once in vain and then `rounds` times."""
    seconds = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, work in contestants.items():
            begun = time.perf_counter()
            work()
            seconds[name] += [time.perf_counter() - begun] * bool(turn)
    return {name: statistics.median(values) for name, values in seconds.items()}


def product(size=512, times=20):
    """Bf16 matrix products, with the FLOPs that they take: what the processor can do at best."""
    a = torch.randn(size, size).bfloat16()
    return lambda: [a @ a for _ in range(times)], 2 * size ** 3 * times


def table(title, columns, rows):
    """Print a table of a README."""
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row) + " |", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The training step beside the peers': forward and backward through L blocks of one width, tokens of bf16.

def our_blocks(config):
    """Module, and (ctx (B, Tc, d), gen (B, Tg, d), noise level (B, d)) -> gen."""
    model = MMDiT(config)
    tokens = (config.ctx_frames + config.gen_frames) // config.patch_size
    cos, sin = (x.bfloat16() for x in cdslm.rotary(tokens, config.width // model.blocks[0].heads, "cpu"))

    def run(ctx, gen, c):
        for block in model.blocks:
            ctx, gen = block(ctx, gen, c[:, None], cos, sin, 1.0)
        return gen
    return model.blocks, run


def diffusers_blocks(config):
    """The same of `diffusers`: the joint blocks of Stable Diffusion 3."""
    from diffusers.models.attention import JointTransformerBlock
    blocks = nn.ModuleList(JointTransformerBlock(config.width, config.width // 64, 64, i == config.depth - 1)
                           for i in range(config.depth))

    def run(ctx, gen, c):
        for block in blocks:
            ctx, gen = block(gen, ctx, c)
        return gen
    return blocks, run


def mmdit_blocks(config):
    """The same of `mmdit`, with the attention that is the faster of its two on a CPU."""
    from mmdit.mmdit_pytorch import MMDiT as Peer
    d = config.width
    model = Peer(depth=config.depth, dim_image=d, dim_text=d, dim_cond=d, heads=d // 64, dim_head=64,
                 num_residual_streams=1, final_norm=False)
    return model, lambda ctx, gen, c: model(text_tokens=ctx, image_tokens=gen, time_cond=c)[1]


def blocks_step(config, make):
    """A function that runs such blocks forward and backward on a batch of the config's shape."""
    (module, run), d = make(config), config.width
    for parameter in module.parameters():                                     # no gate is closed
        nn.init.normal_(parameter, std=0.02)
    shapes = [(config.batch_size, frames // config.patch_size, d) for frames in (config.ctx_frames, config.gen_frames)]
    inputs = [torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in (*shapes, (config.batch_size, d))]

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            run(*inputs).float().square().mean().backward()
        module.zero_grad(set_to_none=True)
    return step


def block_flops(config):
    """FLOPs of training the blocks alone on a batch: what `count` says, with nothing but blocks left in it."""
    d, L = config.width, config.depth
    ctx, gen = config.ctx_frames // config.patch_size, config.gen_frames // config.patch_size
    products = 12 * d * d * (gen * L + ctx * (L - 1)) + 3 * d * d * ctx + 2 * d * L * (ctx + gen) ** 2
    return 6 * config.batch_size * (products + 6 * d * d * (2 * L - 1) + 2 * d * d)


class Step:
    """A training step on noise in the shape of speech, in its parts."""

    def __init__(self, config):
        self.config, self.dtype = config, decide(config)[1]
        self.model, self.diffusion = MMDiT(config), Diffusion(config)
        self.optimizers = make_optimizers(self.model, config, self.dtype)
        self.ctx, self.x0 = (torch.randn(config.batch_size, frames, config.channels)
                             for frames in (config.ctx_frames, config.gen_frames))

    def backward(self, guess):
        phi = torch.rand(len(self.x0)) + 0.2
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            self.diffusion.loss(self.model, self.x0, self.ctx, phi, torch.randn_like(self.x0), guess).mean().backward()

    def update(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def __call__(self):
        self.backward(self.config.self_condition > 0)
        self.update()
        self.model.zero_grad(set_to_none=True)


def bench_step(quick, _):
    """Ours is to be the fastest, although it alone has rotary positions and normalised queries."""
    makers, (product_work, product_flops) = {"ours": our_blocks}, product()
    try:
        import diffusers
        import mmdit  # noqa: F401
        makers |= {"mmdit 0.3.0": mmdit_blocks, f"diffusers {diffusers.__version__}": diffusers_blocks}
    except ImportError:
        print("(pip install mmdit==0.3.0 diffusers to see them beside ours)")
    wide = dict(depth=2, width=256)
    for size, shape in (("tiny", dict(batch_size=32)), ("tiny", wide | dict(batch_size=32)),
                        ("tiny", wide | dict(patch_size=2, batch_size=16)), ("base", dict(batch_size=4))):
        config = Config(size, **shape | ({"batch_size": 1} if quick else {}))
        work = {name: blocks_step(config, make) for name, make in makers.items()}
        seconds = race(2 if quick else 9, product=product_work, **work)
        peak = product_flops / seconds.pop("product")
        table(f"Blocks, L = {config.depth}, d = {config.width}, {config.ctx_frames // config.patch_size} + "
              f"{config.gen_frames // config.patch_size} tokens, batch {config.batch_size}, bf16; "
              f"{peak / 1e9:.0f} GFLOP/s in products of 512 x 512",
              ("blocks", "ms a step", "beside ours", "share of the peak"),
              [(name, 1e3 * s, s / seconds["ours"], block_flops(config) / s / peak) for name, s in seconds.items()])
    bench_parts(quick)


def bench_parts(quick, _=None):
    """Where a step of `tiny` goes. Muon is to take at most 0.6 times as long as the network, whatever the processor."""
    step = Step(Config("tiny", batch_size=2 if quick else 32))
    step.backward(True)
    weights, average = (list(model.parameters()) for model in (step.model, MMDiT(step.config)))
    work = {"forward and backward": lambda: step.backward(False),
            "and with self-conditioning": lambda: step.backward(True),
            "gradient norm": lambda: nn.utils.clip_grad_norm_(weights, 1.0),
            "AdamW": step.optimizers[0].step, "Muon": step.optimizers[-1].step, "EMA": lambda: lerp(average, weights)}
    if hasattr(torch.optim, "Muon"):
        matrices = step.optimizers[-1].param_groups[0]["params"]
        work["torch's Muon (bf16, always)"] = torch.optim.Muon(matrices, lr=0.02, adjust_lr_fn="original").step
    seconds = race(2 if quick else 9, **work)
    network = (seconds["forward and backward"] + seconds["and with self-conditioning"]) / 2
    table(f"Where a step of `tiny` goes, {torch.backends.cpu.get_cpu_capability()}, {str(step.dtype)[6:]}",
          ("part", "ms", "beside the network"), [(name, 1e3 * s, s / network) for name, s in seconds.items()])


# The processor that most laptops have: neither AVX512 nor bf16. Read when torch is loaded, hence for a child process.
EMULATE = {"avx2": dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2")}


@torch.no_grad()
def lerp(average, weights):
    torch._foreach_lerp_(average, weights, 0.001)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling: what a better or longer way from noise to speech is worth, and how fast it is.

EVALUATIONS, GUIDANCE, FINEST = (4, 8, 16, 32, 64), (1, 2, 4), 256


def bench_sampling(quick, run):
    """Toy runs: pJSD against fresh speech, and the distance to where FINEST evaluations lead from the same noise."""
    from eval_pjsd import CONTEXTS, REFERENCE, compare
    from lab.listener import batched, load_listener, speak
    from lab.toyspeech import ToySpeech
    (config, model, autoencoder), listener = load_run(run), load_listener()
    n, m, evaluations = config.ctx_frames, config.gen_frames, EVALUATIONS[:2] if quick else EVALUATIONS
    toy, finest = ToySpeech(config.toy_languages, config.toy_words), 8 if quick else FINEST
    count = max(1, (60 if quick else 180) * FRAME_RATE // m)
    context = autoencoder.encode(speak(toy, CONTEXTS, count, n + m, "contexts", n)[0])[:, :n]
    reference = listener.hear(batched(log_mel, speak(toy, REFERENCE, 3 * count, m, "reference")[0]))["clips"]

    def frames(sampler, steps, cfg):
        return batched(lambda part: sample(model, part, steps=steps, cfg=cfg, sampler=sampler), context, size=32)

    def heard(x0):
        mel = autoencoder.to_mel(x0) * autoencoder.mel_stats[1] + autoencoder.mel_stats[0]
        return compare(listener.hear(mel)["clips"], reference)["pjsd"][:3]

    rows = []
    for cfg in GUIDANCE:
        fine = frames("dpm", finest, cfg)
        rows.append(("dpm", finest, cfg, *heard(fine), 0.0))
        for sampler in ("ddim", "dpm"):
            for steps in evaluations:
                x0 = frames(sampler, steps, cfg)
                rows.append((sampler, steps, cfg, *heard(x0), float((x0 - fine).square().mean().sqrt())))
    table(f"{count * m / FRAME_RATE / 60:.1f} minutes of speech from {run}; the error is that of frames of deviation 1 "
          f"beside {finest} evaluations of dpm",
          ("sampler", "evaluations", "cfg", "pJSD 1", "pJSD 2", "pJSD 3", "error"), rows)
    if not quick:
        draw_sampling(rows, ROOT / "docs/figures" / "sampler.png")


def draw_sampling(rows, path):
    """pJSD and frame error against evaluations: a colour for each guidance, dashes for DDIM."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for column, (axes, name) in enumerate(zip(figure.subplots(1, 4), ("pJSD$_1$", "pJSD$_2$", "pJSD$_3$", "error")), 3):
        for cfg, colour in zip(GUIDANCE, ("C0", "C1", "C2")):
            for sampler, line in (("ddim", "--"), ("dpm", "-")):
                points = sorted(row for row in rows if row[0] == sampler and row[2] == cfg and row[1] < FINEST)
                axes.plot([row[1] for row in points], [row[column] for row in points], line + "o", color=colour,
                          markersize=3, label=f"{sampler}, cfg {cfg}")
        axes.set(xscale="log", yscale="log", title=name, xlabel="evaluations", xticks=EVALUATIONS)
        axes.set_xticks(EVALUATIONS, EVALUATIONS)
        axes.minorticks_off()
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    print(f"\ndrawn in {path}")


def bench_speed(quick, run):
    """Times real time, decoder included, in a batch of 8; and one continuation by a command from a cold start."""
    config, model, autoencoder = load_run(run)
    context = torch.randn(2 if quick else 8, config.ctx_frames, config.channels)
    seconds = len(context) * config.gen_frames / FRAME_RATE

    def speak(cfg, steps):
        autoencoder.decode(sample(model, context, steps=4 if quick else steps, cfg=cfg))

    work = {f"{steps} evaluations, --cfg {cfg}": lambda cfg=cfg, steps=steps: speak(cfg, steps)
            for steps in (24, 48) for cfg in (1, 2)}
    work["the decoder alone"] = lambda: autoencoder.decode(torch.cat([context] * 4, dim=1)[:, :config.gen_frames])
    table(f"Speaking, batch {len(context)}", ("what", "times real time"),
          [(name, seconds / s) for name, s in race(1 if quick else 5, **work).items()])
    with tempfile.TemporaryDirectory() as folder:
        commands = {"python -c 'import torch'": ("-c", "import torch"), "python sample.py RUN --num 1": (
            ROOT / "sample.py", run, "--num", "1", "--out", f"{folder}/x.wav")}
        race_commands("One continuation", commands, 1 if quick else 3)


def race_commands(title, commands, rounds):
    """Table of how long programs take, beside the first of them."""
    def execute(words):
        subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)

    seconds = race(rounds, **{name: lambda words=words: execute(words) for name, words in commands.items()})
    table(title, ("command", "seconds", "beyond the first"),
          [(name, s, s - next(iter(seconds.values()))) for name, s in seconds.items()])


# ----------------------------------------------------------------------------------------------------------------------
# All else: data, start-up, growth.

def bench_data(quick, _):
    """Toy speech; log-mel beside the libraries'; and how long a step waits for its batch, which is made ahead."""
    from lab.toyspeech import ToySpeech
    seconds, toy = 5 if quick else 60, ToySpeech()
    wave, number = 0.1 * torch.randn(1, seconds * RATE), iter(range(10 ** 6))
    work = {"toy speech": lambda: toy.utterance(next(number), seconds), "log-mel": lambda: log_mel(wave)}
    with contextlib.suppress(ImportError):
        import librosa
        work["log-mel, librosa"] = lambda: np.log(np.maximum(librosa.feature.melspectrogram(
            y=wave[0].numpy(), sr=RATE, n_fft=FFT, hop_length=HOP, win_length=WINDOW, n_mels=MELS, power=1.0), 1e-5))
    with contextlib.suppress(ImportError):
        import torchaudio
        theirs = torchaudio.transforms.MelSpectrogram(RATE, FFT, WINDOW, HOP, n_mels=MELS, power=1.0, norm="slaney",
                                                      mel_scale="slaney")
        work["log-mel, torchaudio"] = lambda: theirs(wave).clamp(min=1e-5).log()
    table(f"Data, {seconds} s of speech", ("what", "times real time"),
          [(name, seconds / s) for name, s in race(2 if quick else 7, **work).items()])
    config = Config(decoder="griffinlim", **(dict(toy_hours=0.05, batch_size=2) if quick else {}))
    trainer = cdslm.Trainer(config, open_corpus(config), cdslm.AudioAutoencoder(0, "griffinlim"), *decide(config))
    spent, batch = [], trainer.batch

    def timed(*part):
        begun = time.perf_counter()
        found = batch(*part)
        spent.append(time.perf_counter() - begun)
        return found

    trainer.batch = timed
    step = race(2 if quick else 20, step=trainer.step)["step"]
    table("A step of `tiny`", ("what", "ms", "share"),
          [(what, 1e3 * s, s / step) for what, s in (("its batch", statistics.median(spent)), ("all of it", step))])


@torch.no_grad()
def bench_decoder(quick, run):
    """Frames that were generated beside true ones: how far from them is what is heard of the sound they became? Beside
    Griffin-Lim; phones are those that a recogniser hears in the frames, and in the sound."""
    from eval_pjsd import CONTEXTS
    from lab.listener import batched, load_listener, phone_errors, speak
    from lab.toyspeech import ToySpeech
    (config, model, autoencoder), listener = load_run(run), load_listener()
    toy, n, m = ToySpeech(config.toy_languages, config.toy_words), config.ctx_frames, config.gen_frames
    waves = speak(toy, CONTEXTS, 4 if quick else 60, n + m, "contexts", n)[0]
    true = autoencoder.encode(waves)
    kinds = {"true": true[:, n:], "generated": batched(lambda part: sample(model, part), true[:, :n], size=20)}
    untrained, rows = cdslm.AudioAutoencoder(decoder="griffinlim"), []
    untrained.mel_stats.copy_(autoencoder.mel_stats)
    for kind, frames in kinds.items():
        normalised = autoencoder.to_mel(frames)
        mel = normalised * autoencoder.mel_stats[1] + autoencoder.mel_stats[0]
        heard = listener.hear(mel)
        for way, wave in (("learned", autoencoder.decode(frames)), ("Griffin-Lim 32", untrained.decode(normalised))):
            again = log_mel(wave)
            wrong = sum(phone_errors(a, b) for a, b in zip(listener.hear(again)["clips"], heard["clips"]))
            rows.append((kind, way, float((again - mel).abs().mean()), wrong / sum(map(len, heard["clips"]))))
    table("Sound, heard again", ("frames", "decoder", "log-mel L1", "phones changed"), rows)


def bench_startup(quick, run):
    """--help beside `import torch`; and the first step of a run whose speech is cached and whose decoder is trained."""
    race_commands("Start-up", {"python -c 'import torch'": ("-c", "import torch"),
                               "python cdslm.py --help": (ROOT / "cdslm.py", "--help")}, 2 if quick else 7)
    seconds = []
    for _ in range(1 if quick else 3):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("config.json", "autoencoder.pt"):
                shutil.copy(Path(run) / name, folder)
            seconds.append(first_step(folder, cdslm.read_config(run)))
    table("A run whose speech is cached", ("from launch to", "seconds"),
          [("the first step", statistics.median(seconds))])


def first_step(folder, config):
    """Seconds until a run of this configuration in this folder has done a step."""
    usual = vars(Config(config.size))
    changed = {f"--{name.replace('_', '-')}": value for name, value in vars(config).items() if value != usual[name]}
    words = [str(x) for flag, value in changed.items() for x in ([flag] if value is True else [flag, value])]
    words += ["--size", config.size, "--out", folder]
    begun = time.perf_counter()
    with subprocess.Popen([sys.executable, ROOT / "cdslm.py", *words], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as process:
        said = ""
        while process.poll() is None and not re.search(r"training:.*\b1/\d", said):
            said += process.stderr.read(1)
        seconds = time.perf_counter() - begun
        process.kill()
    return seconds


def measure(settings, rounds):
    """Print what a step of `tiny`, so changed, takes: milliseconds, and MiB beyond those of a process that has none."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = race(rounds, step=Step(Config("tiny", **settings)))["step"]
    print(1e3 * seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def alone(settings, rounds):
    """What `measure` says in a process of its own."""
    code = f"from lab import bench; bench.measure({settings!r}, {rounds})"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return list(map(float, said.stdout.split()))


def bench_growth(quick, _):
    """Time, memory and FLOPs of a step, as depth, window and batch grow."""
    base = dict(depth=2, width=256, ctx_seconds=1.0, gen_seconds=3.0, batch_size=2 if quick else 8, optimizer="adamw",
                self_condition=0.0)
    changes = {"depth 2, window 4 s, batch 8": {}}
    changes |= {f"depth {n}, width {128 * n}": dict(depth=n, width=128 * n) for n in (4, 6)}
    changes |= {f"window {4 * n} s": dict(ctx_seconds=1.0 * n, gen_seconds=3.0 * n) for n in (2, 4, 8)}
    changes |= {f"batch {8 * n}": dict(batch_size=8 * n) for n in (2, 4, 8)}
    rows = []
    for name, change in list(changes.items())[:2 if quick else None]:
        settings = base | change
        config, (ms, memory) = Config("tiny", **settings), alone(settings, 1 if quick else 5)
        flops = count(config)["flops"] * config.batch_size
        rows.append((name, flops / 1e9, ms, flops / ms / 1e6, memory))
    table("A step, grown", ("what", "GFLOP", "ms", "GFLOP/s", "MiB"), rows)


BENCHES = {name[6:]: work for name, work in globals().items() if name.startswith("bench_")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=BENCHES)
    parser.add_argument("run", nargs="?", help="a run folder, such as out/tiny; for those that show one")
    parser.add_argument("--quick", action="store_true", help="something small, to see that it works")
    parser.add_argument("--emulate", choices=EMULATE, help="run with the instruction sets of another processor")
    arguments = parser.parse_args()
    if arguments.emulate:
        words = [word for word in sys.argv[1:] if word not in ("--emulate", arguments.emulate)]
        done = subprocess.run([sys.executable, "-m", "lab.bench", *words], env=os.environ | EMULATE[arguments.emulate])
        raise SystemExit(done.returncode)
    if arguments.run is None and arguments.what in ("sampling", "speed", "decoder", "startup"):
        parser.error(f"{arguments.what} needs a run folder, such as out/tiny")
    cdslm.keep_memory()                                                       # as the programs do
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bf16 in hardware: "
          f"{decide(Config())[1] == torch.bfloat16}")
    BENCHES[arguments.what](arguments.quick, arguments.run)


if __name__ == "__main__":
    main()
