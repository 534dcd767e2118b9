"""What does each choice buy? The paper's ablations on a small model, each change on its own, over two seeds.

    python tests/ablate.py            twenty minutes a seed on one core; goes on where it stopped
    python tests/ablate.py --table    what is in results/ablations.csv, as a table for the README

A run is `tiny` with two blocks of width 128 and 600 steps, and one flag changed. Its language is judged by five minutes
of continuations, whose frames are heard without a decoder, so that nothing but the model counts.
"""
import csv
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import cdslm  # noqa: E402
import eval_pjsd  # noqa: E402
from corpus import log_mel, open_corpus  # noqa: E402
from listener import batched, load_listener, speak, toy_truth  # noqa: E402
from toyspeech import ToySpeech  # noqa: E402

RESULTS, CLIPS, SEEDS = ROOT / "results/ablations.csv", 100, (0, 1)
BASE = "--depth 2 --width 128 --steps 600 --decoder griffinlim --device cpu"
SCHEDULES = [f"--schedule {name}{zero}" for name in ("cosine", "linear", "exponential")
             for zero in ("", " --zero-terminal-snr")]
CHANGES = ["", "--patch-size 2", "--patch-size 4", "--predict v", "--predict v --patch-size 2", *SCHEDULES[1:],
           "--min-snr-gamma 1", "--min-snr-gamma 5", "--t-shift 0", "--ctx-seconds 0.5", "--ctx-seconds 2",
           "--ctx-drop 0.1"]
GUIDANCE = {"": (1, 1.25, 2, 4), "--ctx-drop 0.1": (1, 1.25, 2, 4)}  # every other run is judged at 1.25 alone
FIELDS = ("flags", "cfg", "seed", "loss", "pjsd1", "pjsd2", "pjsd3", "words", "language")


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
    trainer = cdslm.Trainer(config, corpus, cdslm.fit_autoencoder(config, corpus, device), device, dtype)
    while trainer.done < config.steps:
        trainer.step()
    loss = trainer.validate(256)["mean"]
    rows = [(flags, cfg, seed, loss, *judge(config, trainer, cfg)) for cfg in GUIDANCE.get(flags, (1.25,))]
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([FIELDS] * new + [[x if isinstance(x, (str, int)) else f"{x:.5g}" for x in row]
                                           for row in rows])


def table():
    """Means over seeds, and half the distance between them, in Markdown."""
    rows = done()
    print("| changed | validation loss | pJSD₁ | pJSD₂ | pJSD₃ | words | language |\n" + "|---" * 7 + "|")
    pairs = {(row["flags"], row["cfg"]) for row in rows}
    for flags, cfg in sorted(pairs, key=lambda pair: (CHANGES.index(pair[0]), float(pair[1]))):
        mine = [row for row in rows if (row["flags"], row["cfg"]) == (flags, cfg)]
        cells = []
        for name in FIELDS[3:]:
            values = [float(row[name]) for row in mine]
            digits = 4 if name == "loss" else 3
            spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        shown = " ".join(filter(None, [flags, f"--cfg {cfg}" if cfg != "1.25" else ""]))
        print(f"| {f'`{shown}`' if shown else 'nothing'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    finished = {(row["flags"], int(row["seed"])) for row in done()}
    for seed in () if "--table" in sys.argv else SEEDS:
        for flags in CHANGES:
            if (flags, seed) not in finished:
                run(flags, seed)
    table()
