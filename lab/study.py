"""study: what studies of many runs share: programs they run, results, seeds, the mean of some."""
import csv
import shutil
import subprocess
import sys
from pathlib import Path

from cdslm import UserError, lock, replacing

ROOT, SEEDS = Path(__file__).parent.parent, (0, 1, 2)


def python(*words):
    """Run a program of this repository. Raises UserError if it fails."""
    status = subprocess.run([sys.executable, "-m", *words], cwd=ROOT).returncode
    if status:
        raise UserError(f"{' '.join(words)} stopped with status {status}")


def adopt_decoder(out, folder, seed):
    """Give a new run folder the sound decoder of the seed's first run in `out`, if there is one."""
    trained = sorted(out.glob(f"*-{seed}/autoencoder.pt"))
    if trained and not folder.exists():
        folder.mkdir()
        shutil.copy(trained[0], folder)


def read_rows(path):
    """The rows of a results file, {column: text}; [] if there is none."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def write_rows(path, rows):
    """Write a results file, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def add_row(path, row, order=None):
    """Add a row to a results file, to which other processes may add theirs; sorted by `order`, a
    function of a row, if there is one. Returns all rows."""
    with lock(path.with_suffix(".lock"), wait=True):
        rows = [*read_rows(path), row]
        if order:
            rows.sort(key=order)
        write_rows(path, rows)
    return rows


def chosen_seeds(seed):
    """The seeds that --seed asks for: all of SEEDS if it is None. Raises UserError for another."""
    if seed is not None and seed not in SEEDS:
        raise UserError(f"--seed must be one of {SEEDS}")
    return SEEDS if seed is None else [seed]


def spread(values, digits):
    """The mean of some runs as text, ± half of the distance between the outermost; "" of none."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"
