"""scaling: what is the best use of a compute budget? A small isoFLOP study, from the runs to the laws.

    python scaling.py run --out runs/iso                                      about an hour on one core
    python scaling.py run --budgets 4e12,1.2e13,4e13,1.2e14 --out runs/iso    about two and a half
    python scaling.py fit runs/iso --plot runs/iso.png                        fit the laws, draw them

`run` trains toy speech as the paper trains (its loss, AdamW, no first guesses), but predicts x0, lest narrow models
measure their patches. Sizes have two blocks (CHOICE; one has four, where widths leave a gap), so that only the width
varies, and muP carries the learning rate over. Up to where its decay begins, a longer run is the shorter one: one trunk
a size gives every budget, each by a short decay branch. The same command goes on where it stopped.
On a cluster, start one job a size, with the same --out:

    for size in 2x64 4x64 2x128; do sbatch --wrap "python scaling.py run --only $size --out runs/iso ..."; done

Any flag of cdslm.py may follow: `--data DIR`, `--seed 7`, `--batch-size 64`. Each run is a line of OUT/runs.jsonl: N
parameters, D tokens of both streams, C training FLOPs (exact; 6ND beside it), loss, pJSD, seconds of its own.
"""
import argparse
import dataclasses
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import cdslm
import eval_pjsd
from cdslm import (Parser, Trainer, UserError, claim, cli, count, decay_start, decide, interruptible, newest,
                   open_autoencoder, sample)
from corpus import FRAME_RATE, lock, open_corpus, replacing
from listener import batched, load_listener, speak
from plan import forecast
from toyspeech import ToySpeech

STUDY = ("--size tiny --self-condition 0 --t-shift 0 --optimizer adamw --decoder griffinlim --toy-hours 20 "
         "--warmup 50").split()
BUDGETS = "1.2e12,4e12,1.2e13,4e13"
SIZES = "2x24,2x32,2x48,2x64,4x64,2x128,2x192,2x256,2x320,2x384,2x512"  # depth x width
VALIDATION, SAVE_EVERY = 256, 1000             # windows; steps


# ----------------------------------------------------------------------------------------------------------------------
# Run. The grid, budgets rising, since each run goes on from the trunk of the one before.

def plan(arguments, base):
    """[(name, budget, Config)] of every run: at each budget the `each` sizes next to a guess at the best, N^2 = C / 8,
    which short runs gave; at the budget `repeat` every size is trained with a second seed too."""
    runs, repeat = [], sorted(arguments.budgets)[:2][-1] if arguments.repeat is None else arguments.repeat
    shapes = [dataclasses.replace(base, depth=depth, width=width) for depth, width in arguments.sizes]
    for budget in sorted(arguments.budgets):
        near = sorted(shapes, key=lambda shape: abs(math.log(8 * count(shape)["parameters"] ** 2 / budget)))
        for seed in [base.seed, base.seed + 1][:1 + (budget == repeat)]:
            for shape in sorted(near[:arguments.each], key=lambda shape: count(shape)["parameters"]):
                size = f"{shape.depth}x{shape.width}"
                steps = round(budget / count(shape)["flops"] / base.batch_size)
                if steps < 4:
                    raise UserError(f"{budget:g} FLOPs are {steps} steps of {size}: too few to mean anything")
                out = str(arguments.out / f"{size}-seed{seed}")
                runs.append((size, budget, dataclasses.replace(shape, steps=steps, seed=seed, out=out)))
    return [run for run in runs if not arguments.only or run[0] in arguments.only.split(",")]


def train(trainer, first, seconds, bar, signals):
    """Train to the end of this budget, or until a signal comes, from where the trunk of the budget before it ended,
    step `first`; a step moves the bar by the seconds that it is thought to take."""
    config, folder, start = trainer.config, Path(trainer.config.out), decay_start(trainer.config.steps)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    shutil.copyfile(folder.parent / "autoencoder.pt", folder / "autoencoder.pt")
    if (found := newest(folder, config)) is not None:
        trainer.restore(found)
        bar.update((trainer.done - first) * seconds)
    while trainer.done < config.steps and not signals:
        if trainer.done == start:
            trainer.save(folder / "trunk.pt")                                 # the next budget goes on from here
        if trainer.done == start or trainer.done % SAVE_EVERY == 0:
            trainer.save(folder / "checkpoint.pt")
        trainer.step()
        bar.update(seconds)
    trainer.save(folder / "checkpoint.pt")


def make_judge(config, autoencoder, device, dtype, minutes):
    """judge(trainer) -> what `eval_pjsd.compare` says of its averaged weights. Frames of toy speech are heard without
    the decoder, so that the model alone is judged; contexts and reference are the same for all."""
    if config.data != "toy":
        eval_pjsd.recogniser("hama")                                          # is it there?
        return lambda trainer: eval_pjsd.judge_run(eval_pjsd.parse([trainer.config.out, "--minutes", str(minutes)]))
    toy, listener = ToySpeech(config.toy_languages, config.toy_words), load_listener()
    n, m = config.ctx_frames, config.gen_frames
    clips = max(1, round(minutes * 60 * FRAME_RATE / m))
    contexts = speak(toy, eval_pjsd.CONTEXTS, clips, n + m, "contexts")[0]
    contexts = batched(lambda part: autoencoder.encode(part.to(device)), contexts)[:, :n]
    reference = speak(toy, eval_pjsd.REFERENCE, 3 * clips, m, "reference")[0]
    reference = listener.hear(batched(eval_pjsd.log_mel, reference))["clips"]

    def judge(trainer):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            said = torch.cat([sample(trainer.ema, part, steps=24, seed=i) for i, part in enumerate(contexts.split(32))])
        mel = autoencoder.to_mel(said.float()) * autoencoder.mel_stats[1] + autoencoder.mel_stats[0]
        return eval_pjsd.compare(listener.hear(mel)["clips"], reference)
    return judge


def measure(trainer, judge):
    """What is kept of a finished run. Raises UserError if it diverged."""
    config, losses, size = trainer.config, trainer.validate(VALIDATION), count(trainer.config)
    if not math.isfinite(losses["mean"]):
        raise UserError("the validation loss is not finite")
    seen = config.steps * config.batch_size
    hours = seen * (config.ctx_frames + config.gen_frames) / FRAME_RATE / 3600
    D, report = seen * size["tokens"], judge(trainer)
    return {"N": size["parameters"], "D": D, "C": seen * size["flops"], "6ND": 6 * size["parameters"] * D,
            "hours": hours, "epochs": hours / trainer.corpus.hours("train"), "loss": losses.pop("mean"),
            "losses": losses, "skipped": trainer.skipped, "pjsd": report["pjsd"], "pjsd_floor": report["floor"],
            "pjsd_interval": report["interval"]}


def written(out):
    """The lines of runs.jsonl: {(size, budget, seed): the last line of that run}."""
    path = Path(out) / "runs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["size"], row["budget"], row["seed"]): row for row in rows}


def run(arguments, flags):
    """Train what the grid lacks, a line of runs.jsonl for each run; a failed one says why, and is tried again."""
    base, out = cdslm.parse(STUDY + flags), arguments.out
    runs, (device, dtype) = plan(arguments, base), decide(base)
    done = {key for key, row in written(out).items() if "error" not in row}
    speed, begin, work = {}, {}, []
    for size, budget, config in runs:
        if size not in speed:
            speed[size] = forecast(config, device, dtype)[0]
        if (size, budget, config.seed) not in done:
            work.append((size, budget, config, begin.get(config.out, 0), speed[size]))
        begin[config.out] = decay_start(config.steps)
    total = sum((config.steps - first) * seconds for _, _, config, first, seconds in work)
    print(f"{len(work)} of {len(runs)} runs to do: about {total / 60:.0f} min on this machine, and the judging")
    if not work:
        return
    out.mkdir(parents=True, exist_ok=True)
    corpus, failed = open_corpus(base), 0
    autoencoder = open_autoencoder(dataclasses.replace(base, out=str(out)), corpus, device)  # one for all
    judge = make_judge(base, autoencoder, device, dtype, arguments.minutes)
    bar = tqdm(total=total, smoothing=0, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")
    with bar, interruptible() as signals:
        for size, budget, config, first, seconds in work:
            bar.set_description_str(f"{size} {budget:.3g} FLOPs")
            row, begun = {"size": size, "budget": budget, "seed": config.seed}, time.perf_counter()
            with claim(config):
                try:
                    trainer = Trainer(config, corpus, autoencoder, device, dtype)
                    train(trainer, first, seconds, bar, signals)
                    if signals:
                        break
                    row["seconds"] = time.perf_counter() - begun
                    row |= measure(trainer, judge)
                    bar.set_postfix_str(f"loss {row['loss']:.4f}")
                except UserError as error:
                    failed, row["error"] = failed + 1, str(error)
                    tqdm.write(f"{size} at {budget:g} FLOPs failed: {error}", file=sys.stderr)
            with lock(out / ".lock", wait=True), open(out / "runs.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
    if signals:
        print("stopped; the same command goes on from there")
        raise SystemExit(128 + signals[0])
    print(f"{out}/runs.jsonl: {len(runs) - failed} runs, {failed} failed. Next: python scaling.py fit {out}")


def numbers(text):
    """"4e12,1.2e13" -> [4e12, 1.2e13]."""
    return [float(word) for word in text.split(",")]


def shapes(text):
    """"2x64,2x128" -> [(2, 64), (2, 128)]."""
    return [tuple(map(int, word.split("x"))) for word in text.split(",")]


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train a grid of runs", allow_abbrev=False)
    running.add_argument("--budgets", type=numbers, default=BUDGETS, help=f"training FLOPs, exact [{BUDGETS}]")
    running.add_argument("--sizes", type=shapes, default=SIZES, help=f"depth x width of models [{SIZES}]")
    running.add_argument("--each", type=int, default=5, help="how many of them each budget trains [5]")
    running.add_argument("--only", help="train these sizes of the grid alone, such as 2x64: for a job of a cluster")
    running.add_argument("--repeat", type=float, help="where a second seed is trained as well [the second budget]")
    running.add_argument("--minutes", type=float, default=10, help="minutes of speech that each run is judged by [10]")
    running.add_argument("--out", type=Path, default="runs/iso", help="folder of the study [runs/iso]")
    arguments, flags = parser.parse_known_args()
    run(arguments, flags)


if __name__ == "__main__":
    cli(main)
