"""follow: a run's log as lines for people, while it is written; and to TensorBoard or wandb.

    python -m lab.follow out/tiny                      a line every 100 steps, until the run ends
    python -m lab.follow out/tiny --once               what is there now
    python -m lab.follow out/tiny --to tensorboard     needs: pip install tensorboard
    python -m lab.follow out/tiny --to wandb           needs: pip install wandb
    python -m lab.follow out/base --peak H100 --devices 8      also MFU

It only reads OUT/log.jsonl, so training needs no code for any of this, and it may begin before,
during or after the run. A logger gets every row. MFU is the share of the devices' peak FLOP/s, with
the FLOPs of `count` in cdslm.py; frames/s and FLOP/s are means since the run began or went on.
"""
import json
import statistics
import time
from pathlib import Path

import torch

from cdslm import FRAME_RATE, Parser, UserError, cli, read_config
from lab.roofline import GPU

POLL = 2                              # seconds between two looks at the log
# Dense bf16 FLOP/s, as the makers state them (only the H100's was checked). T4 and V100: fp16.
PEAKS = {
    "H100": GPU["tflops"][0] * 1e12, "H200": 989e12, "H100 PCIe": 756e12, "A100": 312e12,
    "L40S": 362e12, "A10": 125e12, "L4": 121e12, "V100": 125e12, "T4": 65e12,
}


def peak_of(name):
    """Peak FLOP/s of a device, from a name such as `NVIDIA A100-SXM4-80GB`; None if unknown."""
    words = name.replace("-", " ").upper().split()
    found = [known for known in PEAKS if set(known.upper().split()) <= set(words)]
    return PEAKS[max(found, key=len)] if found else None


def to_peak(text):
    """--peak: a number, or a name in PEAKS. Without it, the GPU of this machine, if known."""
    if text is None:
        return peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    try:
        peak = peak_of(text) or float(text)
    except ValueError:
        raise UserError(f"--peak {text}: give FLOP/s or one of {', '.join(PEAKS)}") from None
    if not 0 < peak < float("inf"):
        raise UserError("--peak must be more than 0")
    return peak


class Log:
    """The rows of a log.jsonl that may grow, and that a resumed run rewrites: its first rows stay
    as they are, the rest is written anew."""

    def __init__(self, path):
        self.path, self.seen = path, []                       # [(start, end, hash)] of lines

    def still_there(self, file):
        """Whether the last line that was seen is where it was."""
        start, end, known = self.seen[-1]
        file.seek(start)
        return hash(file.read(end - start)) == known

    def rows(self):
        """Yield the rows that are new since the last call. A line without its end is left for the
        next call."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            while self.seen and not self.still_there(file):
                self.seen.pop()
            start = self.seen[-1][1] if self.seen else 0
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.seen.append((start, start + len(line), hash(line)))
                start += len(line)
                try:
                    row = json.loads(line)
                except ValueError:                            # damaged by a crash
                    continue
                yield row


def measured(row, peak):
    """A row's numbers under flat names, with FLOP/s and, where the peak is known, MFU."""
    values = {name: value for name, value in row.items() if not isinstance(value, dict)}
    values |= {f"valid/{name}": value for name, value in row.get("valid", {}).items()}
    frames = row["hours"] * 3600 * FRAME_RATE
    values["FLOP/s"] = row["frames/s"] * row["flops"] / frames
    if peak:
        values["MFU"] = values["FLOP/s"] / peak
    return values


def line(values, losses, steps):
    """A line for people; the loss is the mean over the steps since the last line."""
    loss = statistics.fmean(losses)
    parts = [f"step {values['step']:>6} of {steps}", f"loss {loss:.4f}"]
    if "valid/mean" in values:
        parts.append(f"valid {values['valid/mean']:.4f}")
    parts.append(f"{values['frames/s']:.4g} frames/s")
    parts.append(f"{values['FLOP/s'] / 1e12:.3g} TFLOP/s")
    if "MFU" in values:
        parts.append(f"MFU {100 * values['MFU']:.1f} %")
    if values["skipped"]:
        parts.append(f"{values['skipped']} steps skipped")
    return "  ".join(parts)


class TensorBoard:
    """Event files in RUN/tensorboard. Steps that a resumed run does again replace the old ones."""

    def __init__(self, folder):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--to tensorboard needs: pip install tensorboard") from None
        self.writer_at = lambda step: SummaryWriter(folder / "tensorboard", purge_step=step)
        self.writer, self.last = None, 0
        print(f"next: tensorboard --logdir {folder.parent}")

    def add(self, values):
        step = values["step"]
        if self.writer is None or step <= self.last:
            self.close()
            self.writer = self.writer_at(step)
        self.last = step
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self):
        if self.writer:
            self.writer.close()


class WeightsAndBiases:
    """A run in the wandb project `cdslm`, named as the folder. wandb ignores a step that it has,
    and a repeated step has the same values."""

    def __init__(self, folder):
        try:
            import wandb
        except ImportError:
            raise UserError("--to wandb needs: pip install wandb") from None
        name = folder.resolve().name
        self.run = wandb.init(project="cdslm", name=name, config=vars(read_config(folder)))

    def add(self, values):
        self.run.log(values, step=values["step"])

    def close(self):
        self.run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def follow(folder, every=100, peak=None, logger=None, once=False):
    """Print the log of a run, a line every so many steps and at each validation, and give each row
    to the logger, until the run is at its last step."""
    log, losses, last = Log(folder / "log.jsonl"), [], 0
    while True:
        steps = read_config(folder).steps                     # a run may get fewer, or more
        values = None
        for row in log.rows():
            values = measured(row, peak)
            if values["step"] <= last:
                print(f"the run has gone on from step {values['step'] - 1}")
                losses = []
            last = values["step"]
            losses.append(values["loss"])
            if logger is not None:
                logger.add(values)
            if last % every == 0 or "valid" in row:
                print(line(values, losses, steps), flush=True)
                losses = []

        if once or last >= steps:
            if values and losses:
                print(line(values, losses, steps))
            return
        time.sleep(POLL)


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run folder, such as out/tiny")
    parser.add_argument("--to", choices=LOGGERS, help="send every row there too")
    parser.add_argument("--once", action="store_true", help="print what is there, and end")
    parser.add_argument("--every", type=int, default=100, help="steps between two lines [100]")
    parser.add_argument("--peak", help="FLOP/s of a device, or its name, for MFU: "
                                       f"{', '.join(PEAKS)} [the GPU of this machine]")
    parser.add_argument("--devices", type=int, default=1, help="so many devices train [1]")
    arguments = parser.parse_args()
    if arguments.every < 1 or arguments.devices < 1:
        raise UserError("--every and --devices must be at least 1")
    read_config(arguments.run)
    peak = to_peak(arguments.peak)
    logger = LOGGERS[arguments.to](arguments.run) if arguments.to else None
    try:
        follow(arguments.run, arguments.every, peak and peak * arguments.devices, logger,
               arguments.once)
    finally:
        if logger:
            logger.close()


if __name__ == "__main__":
    cli(main)
