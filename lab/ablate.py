"""What does each choice buy? Small models, judged by the language of what they say, over two seeds.

    python -m lab.ablate            the paper's ablations, each on its own; twenty minutes a seed on one core
    python -m lab.ablate words      what brought words sooner, one thing after the other; half an hour a seed
    python -m lab.ablate [words] --table     what is in lab/results/, as a table for the README

(The ablations in lab/results/ are older: uncentred queries and keys, 48 evaluations, guided by 1.25 at every level.
Delete that file to have them all anew.)

Either goes on where it stopped; `--seed 1` does that seed alone, so that two processors can share the work. A model is
`tiny` with the flags of `BASE`. Its frames are heard without a decoder, so that nothing but the model counts.
"""
import csv
import statistics
import sys
import time
from pathlib import Path

import torch

import cdslm
import eval_pjsd
from cdslm import log_mel, open_corpus
from lab.listener import batched, load_listener, speak, toy_truth
from lab.toyspeech import ToySpeech

ROOT = Path(__file__).parents[1]

STUDY, SEEDS = "words" if "words" in sys.argv else "ablations", (0, 1)
SCHEDULES = [f"--schedule {name}{zero}" for name in ("cosine", "linear", "exponential")
             for zero in ("", " --zero-terminal-snr")]
if STUDY == "ablations":
    BASE, CLIPS = "--depth 2 --width 128 --steps 600 --decoder griffinlim --device cpu", 100
    CHANGES = ["", "--patch-size 2", "--patch-size 4", "--predict v", "--predict v --patch-size 2", *SCHEDULES[1:],
               "--min-snr-gamma 1", "--min-snr-gamma 5", "--t-shift 0", "--ctx-seconds 0.5", "--ctx-seconds 2",
               "--ctx-drop 0.1"]
    GUIDANCE = {"": (1, 2, 4), "--ctx-drop 0.1": (1, 2, 4)}               # all others are judged at 2 alone
else:
    BASE, CLIPS, GUIDANCE = "--steps 1200 --decoder griffinlim --device cpu", 200, {"": (1, 2)}
    wide = "--depth 2 --width 256 --min-snr-gamma 5"
    CHANGES = [f"{wide} --t-shift 0 --muon-lr 0.01 --self-condition 0", f"{wide} --t-shift 0 --muon-lr 0.01", wide,
               "--min-snr-gamma 5", "--min-snr-gamma 1", "", "--optimizer adamw"]
RESULTS = ROOT / f"lab/results/{STUDY}.csv"
FIELDS = {"flags": None, "cfg": None, "seed": None, "minutes": 1, "loss": 4, "pjsd1": 3, "pjsd2": 3, "pjsd3": 3,
          "words": 3, "language": 3}                                      # and the digits that are worth showing


def done():
    """The lines of the file."""
    return list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []


def judge(config, trainer, cfg):
    """pJSD of 1 to 3 phones, and the normalised rates of words and of languages kept."""
    toy, listener, n, m = ToySpeech(), load_listener(), config.ctx_frames, config.gen_frames
    waves, spoken = speak(toy, eval_pjsd.CONTEXTS, CLIPS, n + m, "contexts", context=n)
    reference, _ = speak(toy, eval_pjsd.REFERENCE, 3 * CLIPS, m, "reference")
    mel, autoencoder = batched(log_mel, waves), trainer.autoencoder
    with trainer.precision():
        frames = torch.cat([cdslm.sample(trainer.ema, part, cfg=cfg, seed=i)
                            for i, part in enumerate(autoencoder.from_mel(mel[:, :n]).split(50))])
    heard = listener.hear(frames.float() * autoencoder.mel_stats[1] + autoencoder.mel_stats[0])
    truth = toy_truth(toy, spoken, heard, listener.hear(mel[:, n:]))
    pjsd = eval_pjsd.compare(heard["clips"], listener.hear(batched(log_mel, reference))["clips"])["pjsd"]
    return *pjsd[:3], truth["word_rate"]["normalized"], truth["language_kept"]["normalized"]


def run(flags, seed):
    """Train and judge one model; its lines in the file."""
    config = cdslm.parse(f"{BASE} {flags} --seed {seed}".split())
    device, dtype = cdslm.decide(config)
    corpus = open_corpus(config)
    trainer = cdslm.Trainer(config, corpus, cdslm.fit_autoencoder(config, corpus, device, dtype), device, dtype)
    begun = time.perf_counter()
    while trainer.done < config.steps:
        trainer.step()
    minutes, loss = (time.perf_counter() - begun) / 60, trainer.validate(256)["mean"]
    rows = [(flags, cfg, seed, minutes, loss, *judge(config, trainer, cfg)) for cfg in GUIDANCE.get(flags, (2,))]
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([FIELDS] * new + [[x if isinstance(x, (str, int)) else f"{x:.5g}" for x in row]
                                           for row in rows])


def table():
    """Means over seeds, and half the distance between them, in Markdown."""
    rows, shown = done(), {name: digits for name, digits in FIELDS.items() if digits}
    print(f"| changed | FLOPs | {' | '.join(shown)} |\n" + "|---" * (2 + len(shown)) + "|")
    pairs = {(row["flags"], row["cfg"]) for row in rows}
    for flags, cfg in sorted(pairs, key=lambda pair: (CHANGES.index(pair[0]), float(pair[1]))):
        mine = [row for row in rows if (row["flags"], row["cfg"]) == (flags, cfg)]
        cells = []
        for name, digits in shown.items():
            values = [float(row[name] or "nan") for row in mine]
            spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        change = " ".join(filter(None, [flags, f"--cfg {cfg}" if cfg != "2" else ""]))
        config = cdslm.parse(f"{BASE} {flags}".split())
        flops = cdslm.count(config)["flops"] * config.batch_size * config.steps
        print(f"| {f'`{change}`' if change else 'nothing'} | {flops:.1e} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    finished = {(row["flags"], int(row["seed"])) for row in done()}
    seeds = [int(sys.argv[sys.argv.index("--seed") + 1])] if "--seed" in sys.argv else SEEDS
    for seed in () if "--table" in sys.argv else seeds:
        for flags in CHANGES:
            if (flags, seed) not in finished:
                run(flags, seed)
    table()
