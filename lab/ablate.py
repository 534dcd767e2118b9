"""ablate: what does each choice buy? Small models, each judged by the language that it generates.

    python -m lab.ablate                   the paper's ablations, one by one; 20 minutes a seed
    python -m lab.ablate words             what brought words sooner, step by step; half an hour
    python -m lab.ablate [words] --table   trains nothing: prints the results that are there

Results are kept in lab/results/. The second study stands in docs/results.md, "What brought words
sooner".

Times are for one core and one of two seeds; `--seed 1` trains that seed alone, so two processes can
share the work. The same command resumes. A model is `tiny` with the flags of `BASE`. Its frames are
recognised without the decoder, so only the model is judged.

(lab/results/ablations.csv is older: queries and keys were not centred, and the sampler used 48
evaluations with a guidance of 1.25 at every level. To measure all again, delete that file.)
"""
import csv
import statistics
import sys
import time
from pathlib import Path

import torch

import eval_pjsd
from cdslm import (Trainer, autocast, count, decide, fit_autoencoder, log_mel, open_corpus, parse,
                   sample)
from lab.listener import batched, load_listener, speak, toy_truth
from lab.toyspeech import ToySpeech

ROOT = Path(__file__).parents[1]
SEEDS = 0, 1

# What is changed, one string of flags a model; and the guidance that it is sampled with, if it is
# not 2 alone.
STUDY = "words" if "words" in sys.argv else "ablations"
if STUDY == "ablations":
    BASE = "--depth 2 --width 128 --steps 600 --decoder griffinlim --device cpu"
    CLIPS = 100                                   # continuations that are judged
    CHANGES = [
        "", "--patch-size 2", "--patch-size 4", "--predict v", "--predict v --patch-size 2",
        "--schedule cosine --zero-terminal-snr",
        "--schedule linear", "--schedule linear --zero-terminal-snr",
        "--schedule exponential", "--schedule exponential --zero-terminal-snr",
        "--min-snr-gamma 1", "--min-snr-gamma 5", "--t-shift 0",
        "--ctx-seconds 0.5", "--ctx-seconds 2", "--ctx-drop 0.1"]
    GUIDANCE = {"": (1, 2, 4), "--ctx-drop 0.1": (1, 2, 4)}
else:
    BASE = "--steps 1200 --decoder griffinlim --device cpu"
    CLIPS = 200
    CHANGES = [
        "--depth 2 --width 256 --min-snr-gamma 5 --t-shift 0 --muon-lr 0.01 --self-condition 0",
        "--depth 2 --width 256 --min-snr-gamma 5 --t-shift 0 --muon-lr 0.01",
        "--depth 2 --width 256 --min-snr-gamma 5",
        "--min-snr-gamma 5", "--min-snr-gamma 1", "", "--optimizer adamw"]
    GUIDANCE = {"": (1, 2)}

RESULTS = ROOT / f"lab/results/{STUDY}.csv"
KEYS = ["flags", "cfg", "seed"]
DIGITS = {"minutes": 1, "loss": 4, "pjsd1": 3, "pjsd2": 3, "pjsd3": 3, "words": 3, "language": 3}


def done():
    """The rows of the results file."""
    return list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []


def judge(config, trainer, cfg):
    """pJSD of one to three phones, and the normalised rates of words and of languages kept."""
    toy, listener, autoencoder = ToySpeech(), load_listener(), trainer.autoencoder
    ctx, gen = config.ctx_frames, config.gen_frames

    # Contexts with their true continuations, and a reference of other speech.
    waves, truth = speak(toy, eval_pjsd.CONTEXTS, CLIPS, ctx + gen, "contexts", context=ctx)
    mel = batched(log_mel, waves)                                             # (B, T, 80)
    reference, _ = speak(toy, eval_pjsd.REFERENCE, 3 * CLIPS, gen, "reference")

    contexts = autoencoder.from_mel(mel[:, :ctx])
    with autocast(trainer.device, trainer.hardware.dtype):
        frames = [sample(trainer.ema, part, cfg=cfg, seed=i)
                  for i, part in enumerate(contexts.split(50))]
    frames = torch.cat(frames).float()
    generated_mel = frames * autoencoder.mel_stats[1] + autoencoder.mel_stats[0]

    generated = listener.hear(generated_mel)
    kept = toy_truth(toy, truth, generated, listener.hear(mel[:, ctx:]))
    real = listener.hear(batched(log_mel, reference))
    pjsd = eval_pjsd.compare(generated["clips"], real["clips"])["pjsd"]
    return *pjsd[:3], kept["word_rate"]["normalized"], kept["language_kept"]["normalized"]


def run(flags, seed):
    """Train and judge one model, and add a row for each guidance to the results file."""
    config = parse(f"{BASE} {flags} --seed {seed}".split())
    device, dtype = decide(config)
    corpus = open_corpus(config)
    autoencoder = fit_autoencoder(config, corpus, device, dtype)
    trainer = Trainer(config, corpus, autoencoder, device, dtype)
    begun = time.perf_counter()
    while trainer.done < config.steps:
        trainer.step()
    minutes = (time.perf_counter() - begun) / 60
    loss = trainer.validate(256)["mean"]

    rows = []
    for cfg in GUIDANCE.get(flags, (2,)):
        measured = minutes, loss, *judge(config, trainer, cfg)
        rows.append([flags, cfg, seed, *(f"{value:.5g}" for value in measured)])
    if not RESULTS.exists():
        rows.insert(0, [*KEYS, *DIGITS])
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def table():
    """Print means over seeds, ± half of the distance between the seeds, in Markdown."""
    rows = done()
    print(f"| changed | FLOPs | {' | '.join(DIGITS)} |")
    print("|---" * (2 + len(DIGITS)) + "|")

    pairs = {(row["flags"], row["cfg"]) for row in rows}
    for flags, cfg in sorted(pairs, key=lambda pair: (CHANGES.index(pair[0]), float(pair[1]))):
        cells = []
        for name, digits in DIGITS.items():
            values = [float(row[name] or "nan") for row in rows
                      if (row["flags"], row["cfg"]) == (flags, cfg)]
            text = f"{statistics.mean(values):.{digits}f}"
            if len(values) > 1:
                text += f" ± {(max(values) - min(values)) / 2:.{digits}f}"
            cells.append(text)

        change = flags if cfg == "2" else f"{flags} --cfg {cfg}".strip()
        title = f"`{change}`" if change else "nothing"
        config = parse(f"{BASE} {flags}".split())
        flops = count(config)["flops"] * config.batch_size * config.steps
        print(f"| {title} | {flops:.1e} | {' | '.join(cells)} |")


def main():
    seeds = SEEDS
    if "--seed" in sys.argv:
        seeds = [int(sys.argv[sys.argv.index("--seed") + 1])]
    if "--table" in sys.argv:
        seeds = []
    finished = {(row["flags"], int(row["seed"])) for row in done()}
    for seed in seeds:
        for flags in CHANGES:
            if (flags, seed) not in finished:
                run(flags, seed)
    table()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
