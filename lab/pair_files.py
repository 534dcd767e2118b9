"""pair_files: finds the pairs of recordings in the published tests of spoken language models.

Three layouts are known. In each folder of audio files, at any depth, it is one of these:

    gold.csv                 sWUGGY and sBLIMP as ZeroSpeech 2021 publishes them: a line a file,
                             `correct` is 1 or 0; pairs have the same id, voice, type and subtype
    sample_I_J.wav           SALMon: J is 0 for the true and 1 for the false recording of pair I
    NUMBER_..., NUMBER+...   sWUGGY, sBLIMP, spoken StoryCloze and TopicCloze as slamkit reads them:
                             in the order of their numbers each two files are a pair, the true one
                             first (of StoryCloze, 8_ID_correct.wav and 9_ID_incorrect.wav)

Checked against slamkit/metric/modelling_metric.py and config/metric/ (github.com/slp-rl/slamkit),
data_generation/speaker_consistency.py (github.com/slp-rl/salmon), and for gold.csv and StoryCloze
against programs of others that score them; the recordings themselves were not at hand.
"""
import csv
import re
from pathlib import Path

import torch

from cdslm import AUDIO_FILES, UserError, load_audio
from lab.pair_speech import Pair

QUIET = 0.01                           # of the loudest sample: 40 dB below it is silence
NUMBERED = re.compile(r"(\d+)[_+]")
SAMPLE = re.compile(r"sample_(\d+)_(\d+)")


def gold_pairs(folder, rows):
    """{category: [(case, true path, false path)]} of the rows of a gold.csv. Words are in the
    vocabulary of LibriSpeech if they occur in it; sentences have a type."""
    found = {}
    for row in rows:
        case = row.get("type", ""), row.get("subtype", ""), row["id"]
        sides = found.setdefault((case, row.get("voice", "")), {})
        sides[row["correct"]] = row

    pairs = {}
    for (case, _), sides in found.items():
        if set(sides) == {"0", "1"}:
            true, false = sides["1"], sides["0"]
            category = true.get("type")
            if category is None:
                unknown = true.get("frequency") in ("", "0", "oov", None)
                category = "out of vocabulary" if unknown else "in vocabulary"
            paths = [folder / f"{row['filename']}.wav" for row in (true, false)]
            pairs.setdefault(category, []).append((case, *paths))
    return pairs


def sample_pairs(files):
    """[(case, true path, false path)] of files of SALMon."""
    samples = {}
    for path in files:
        match = SAMPLE.match(path.stem)
        if match:
            index, option = map(int, match.groups())
            samples.setdefault(index, {})[option] = path
    return [(index, sides[0], sides[1]) for index, sides in sorted(samples.items())
            if {0, 1} <= set(sides)]


def numbered_pairs(files):
    """[(case, true path, false path)] of files that begin with a number."""
    numbered = []
    for path in files:
        match = NUMBERED.match(path.name)
        if match:
            numbered.append((int(match[1]), path.name, path))
    paths = [path for _, _, path in sorted(numbered)]
    return list(zip(range(len(paths)), paths[::2], paths[1::2]))


def find_pairs(folder):
    """{category: [(case, true path, false path)]}; a category is a folder, or a part of gold.csv.
    Raises UserError if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = {}
    for place in [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]:
        name = place.relative_to(folder).as_posix() if place != folder else folder.resolve().name
        files = sorted(path for path in place.iterdir() if path.suffix.lower() in AUDIO_FILES)
        if (place / "gold.csv").is_file():
            with open(place / "gold.csv", encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            if not rows or not {"id", "filename", "correct"} <= set(rows[0]):
                raise UserError(f"{place}/gold.csv: has no columns id, filename, correct")
            parts = gold_pairs(place, rows)
            found |= {f"{name}: {category}": pairs for category, pairs in parts.items()}
        elif pairs := sample_pairs(files) or numbered_pairs(files):
            found[name] = pairs
    if not found:
        raise UserError(f"{folder}: no pairs in it; they are recognised by a gold.csv, or by names "
                        "such as sample_0_0.wav and sample_0_1.wav, or 0_a.wav and 1_b.wav")
    return found


def read_pair(case, true, false):
    """The Pair of two recordings, without the silence around each: 40 dB below the loudest sample
    of both, so that what both begin with stays the same."""
    waves = load_audio(true), load_audio(false)
    loudest = max(float(wave.abs().max()) for wave in waves)
    cut = []
    for wave, path in zip(waves, (true, false)):
        loud = torch.nonzero(wave.abs() > QUIET * loudest)[:, 0]
        if not len(loud):
            raise UserError(f"{path}: silent beside the other recording of its pair")
        cut.append(wave[loud[0]:loud[-1] + 1])
    return Pair(*cut, case=case)
