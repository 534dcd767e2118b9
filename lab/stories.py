"""stories: small English stories, spoken by a text-to-speech package. A real language in minutes.

    pip install hibari-tts
    python -m lab.stories --hours 3 --out stories      less than two minutes on two cores
    python cdslm.py --size tiny --data stories         then: python -m lab.words out/tiny

Each story is one recording of 5 to 10 sentences about a person, an animal, a thing and a place,
which stay the same to its end, so that one can check whether a model remembers what it talks about.
The voice is synthetic; at other speeds and lengths of the vocal tract it is several voices. The
folder holds 00000.wav and so on (24 kHz, 16 bits), stories.json (settings) and truth.jsonl, a line
a file: voice, text, start and end of each sentence in seconds. A file depends on settings and
number alone. The same command goes on where it stopped; more hours add files.
"""
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cdslm import RATE, Parser, UserError, cli, reason, replacing, resample, save_audio

# --------------------------------------------------------------------------------------------------
# 1. The grammar. Words in capitals are slots. The person and the STORY slots are drawn once a
# story, the others whenever they are used. SUBJ is the person's name, or he or she.

STORY = "ANIMAL", "THING", "PLACE", "SIZE", "COLOUR"
PERSON = "NAME", "HE", "HIS", "HIM"
NAMED = 0.4                    # how often SUBJ is the name: often enough to hear who it is about

SMALL = {
    "MEN": "Tom Ben Jack", "WOMEN": "Anna Lucy Mary",
    "ANIMAL": "dog cat duck horse", "THING": "ball boat drum stone book",
    "PLACE": "garden kitchen park forest", "SIZE": "small big", "COLOUR": "red green blue",
    "openings": [
        "NAME had a SIZE ANIMAL and a COLOUR THING",
        "One day NAME went to the PLACE with HIS ANIMAL",
        "In the morning NAME took HIS COLOUR THING to the PLACE"],
    "sentences": [
        "SUBJ went to the PLACE with the ANIMAL", "SUBJ gave the THING to HIS ANIMAL",
        "SUBJ saw the COLOUR THING in the PLACE", "SUBJ looked for HIS THING in the PLACE",
        "SUBJ loved HIS SIZE ANIMAL", "SUBJ was happy and sang to HIS ANIMAL",
        "SUBJ took the THING and ran home", "In the evening SUBJ played with HIS COLOUR THING",
        "Then SUBJ put the THING under a tree", "Then the ANIMAL came to the PLACE with HIM",
        "The ANIMAL sat on the COLOUR THING", "At night the ANIMAL slept at home with HIM",
        "The ANIMAL looked at HIM and was happy",
        "The SIZE ANIMAL was tired and slept in the PLACE"]}

LARGE = SMALL | {
    "MEN": "Tom Ben Jack David Peter Henry Oliver George Simon Daniel Robert Martin Thomas Kevin",
    "WOMEN": "Anna Lucy Mary Emma Alice Sarah Rachel Linda Julia Susan Laura Helen Nancy Betty",
    "ANIMAL": "dog cat duck horse rabbit mouse monkey tiger lion pig goat cow chicken frog turtle "
              "parrot bear fox donkey puppy kitten elephant camel wolf zebra",
    "THING": "ball boat drum stone book hat kite box bag spoon cup lamp chair bicycle wagon ladder "
             "basket blanket pillow bottle bell flag guitar mirror coat shoe clock knife camera",
    "PLACE": "garden kitchen park forest village market school farm castle library station church "
             "hotel museum valley desert harbor city hospital office theater restaurant bakery",
    "SIZE": "small big little huge tiny fat young lazy clever friendly",
    "COLOUR": "red green blue yellow white black brown pink purple golden silver",
    "TIME": "morning evening afternoon summer winter spring",
    "DAY": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "WEATHER": "cold warm sunny windy rainy cloudy beautiful quiet",
    "FEELING": "happy tired hungry thirsty proud afraid surprised lonely angry brave sleepy glad",
    "FOOD": "bread cheese soup cake milk rice honey butter chocolate corn fish fruit sugar salt",
    "RELATIVE": "mother father sister brother uncle grandmother grandfather cousin teacher doctor",
    "MOVED": "walked ran hurried danced jumped climbed traveled returned",
    "HOW": "slowly quickly quietly carefully softly gladly", "NEAR": "under behind near beside",
    "SPOT": "tree table bridge wall window door house hill rock fence lake street fire",
    "SEEN": "bird cloud star moon rainbow train ship butterfly snake spider airplane bus",
    "FOUND": "found lost hid washed carried painted dropped cleaned",
    "openings": SMALL["openings"] + ["On DAY NAME MOVED to the PLACE with HIS ANIMAL"],
    "sentences": SMALL["sentences"] + [
        "SUBJ MOVED HOW to the PLACE", "In the TIME SUBJ FOUND the COLOUR THING",
        "SUBJ FOUND the THING NEAR the SPOT", "SUBJ gave some FOOD to the SIZE ANIMAL",
        "SUBJ asked HIS RELATIVE for some FOOD", "SUBJ showed the THING to HIS RELATIVE",
        "HIS RELATIVE laughed at HIM", "SUBJ was FEELING because the THING was broken",
        "The ANIMAL was FEELING and wanted FOOD", "The ANIMAL MOVED HOW to the SPOT",
        "The ANIMAL waited for HIM NEAR the SPOT", "On DAY SUBJ saw a SEEN NEAR the PLACE",
        "The ANIMAL was FEELING when the SEEN came", "It was a WEATHER TIME and SUBJ slept",
        "SUBJ told HIS RELATIVE a story about the SEEN", "SUBJ cooked FOOD for HIS ANIMAL"]}

GRAMMARS = {"small": SMALL, "large": LARGE}


def people(grammar):
    """The persons of a grammar, each {slot: word}."""
    men = [("he", "his", "him", name) for name in grammar["MEN"].split()]
    women = [("she", "her", "her", name) for name in grammar["WOMEN"].split()]
    return [dict(HE=he, HIS=his, HIM=him, NAME=name) for he, his, him, name in men + women]


def write_story(grammar, rng):
    """5 to 10 sentences, each with a capital letter and a full stop."""
    world = dict(rng.choice(people(grammar)))
    for slot in STORY:
        world[slot] = rng.choice(grammar[slot].split())
    others = rng.choice(grammar["sentences"], rng.integers(4, 10), replace=False)
    templates = [rng.choice(grammar["openings"]), *others]

    sentences = []
    for template in templates:
        words = []
        for word in template.split():
            if word == "SUBJ":
                word = "NAME" if rng.random() < NAMED else "HE"
            choices = [world[word]] if word in world else grammar.get(word, word).split()
            words.append(str(rng.choice(choices)))
        text = " ".join(words)
        sentences.append(text[0].upper() + text[1:] + ".")
    return sentences


def allowed(grammar, n):
    """All sequences of n <= 3 words, in lower case, that occur in stories, also across the end of
    a sentence: a set of n-tuples. The set is exact: sequences of words and slots are listed, and
    then filled in."""
    openings = [v for template in grammar["openings"] for v in variants(template)]
    others = [(v, i) for i, t in enumerate(grammar["sentences"]) for v in variants(t)]
    texts = {first + second for first in openings for second, _ in others}
    # No template is used twice in a story.
    texts |= {a + b for a, i in others for b, j in others if i != j}
    grams = {text[at:at + n] for text in texts for at in range(len(text) - n + 1)}
    return {filled for gram in grams for filled in fill(gram, grammar)}


def variants(template):
    """A template as tuples of words and slots, with SUBJ replaced by NAME and by HE."""
    return {tuple(template.replace("SUBJ", who).split()) for who in ("NAME", "HE")}


def fill(gram, grammar):
    """All ways to fill in the slots of a short tuple of words and slots, in lower case: tuples."""
    fixed = [slot for slot in STORY if slot in gram]
    persons = people(grammar) if set(PERSON) & set(gram) else [{}]
    for person, *values in itertools.product(persons, *(grammar[s].split() for s in fixed)):
        world = person | dict(zip(fixed, values))
        choices = [[world[w]] if w in world else grammar.get(w, w).split() for w in gram]
        for words in itertools.product(*choices):
            yield tuple(word.lower() for word in words)


# --------------------------------------------------------------------------------------------------
# 2. The voices. Another text-to-speech is another `speaker`.

# Played at 21,600 Hz, a voice has a vocal tract 24/21.6 times as long; it talks faster before that.
VOICES = [dict(rate=rate, speed=speed) for speed in (0.95, 1.1) for rate in (RATE, 21_600, 26_250)]
PAUSE = 0.25, 0.45             # seconds between sentences, from and to
SHORTEST = 5.0                 # no story takes fewer seconds
QUIET = 0.002                  # samples below this, at the ends of a sentence, are cut off


@functools.cache
def speaker():
    """speak(text, speed, seed) -> (N,) float32 at 24 kHz. Raises UserError without the package."""
    try:
        from hibari import Hibari
    except ImportError as error:
        raise UserError(f"no text-to-speech ({reason(error)}): pip install hibari-tts") from None
    return Hibari(threads=1)


def say(text, voice, seed):
    """One sentence in one of the voices, without silence before and after: (N,) float32."""
    wave = speaker()(text, voice["speed"] * RATE / voice["rate"], seed)
    loud = np.flatnonzero(np.abs(wave) > QUIET)
    return resample(torch.from_numpy(wave[loud[0]:loud[-1] + 1]), voice["rate"]).numpy()


def tell(number, words, seed, voices):
    """Story `number`: its samples (N,) and its line of truth.jsonl, a dict."""
    rng = np.random.default_rng([seed, number])
    sentences = write_story(GRAMMARS[words], rng)
    voice = VOICES[rng.integers(voices)]
    pieces, times, at = [np.zeros(RATE // 10, np.float32)], [], RATE // 10
    for text in sentences:
        wave = say(text, voice, int(rng.integers(2 ** 31)))
        pause = np.zeros(round(rng.uniform(*PAUSE) * RATE), np.float32)
        end = at + len(wave)
        times.append({"text": text, "start": round(at / RATE, 5), "end": round(end / RATE, 5)})
        pieces += [wave, pause]
        at = end + len(pause)
    line = {"file": f"{number:05d}.wav", "voice": voice, "text": " ".join(sentences),
            "seconds": round(at / RATE, 5), "sentences": times}
    return np.concatenate(pieces), line


# --------------------------------------------------------------------------------------------------
# 3. The folder.

def read_truth(folder):
    """The lines of truth.jsonl, {file: line}, without a last one that was cut off when the program
    was stopped. Raises UserError if there is no such file."""
    path, lines = Path(folder) / "truth.jsonl", {}
    if not path.is_file():
        raise UserError(f"{folder}: no truth.jsonl in it; make stories with python -m lab.stories")
    for text in path.read_text(encoding="utf-8").splitlines():
        if text.endswith("}]}"):
            line = json.loads(text)
            lines[line["file"]] = line
    return lines


def write_truth(folder, lines):
    """Write truth.jsonl anew, in the order of the files."""
    with replacing(folder / "truth.jsonl") as temporary:
        rows = [json.dumps(lines[file]) + "\n" for file in sorted(lines)]
        temporary.write_text("".join(rows), encoding="utf-8")


def open_folder(folder, settings):
    """Make the folder, or check that it holds stories of these settings -> {file: line} of what is
    complete. Raises UserError if it holds anything else."""
    marker = folder / "stories.json"
    if not marker.exists():
        if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--out {folder} holds other things; choose a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(marker) as temporary:
            temporary.write_text(json.dumps(settings) + "\n")
    found = marker.read_text().strip()
    if found != json.dumps(settings):
        raise UserError(f"--out {folder} holds other stories, {found}; choose a new folder")

    lines = read_truth(folder) if (folder / "truth.jsonl").exists() else {}
    for file, line in list(lines.items()):
        path = folder / file
        if not path.exists() or path.stat().st_size < line["seconds"] * 2 * RATE:
            del lines[file]
    write_truth(folder, lines)
    return lines


def begin_worker():
    """A worker leaves Ctrl-C to the program that started it, and ends when that has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def make(folder, settings, hours, pool):
    """Fill the folder with at least `hours` of stories -> {file: line} of truth.jsonl."""
    lines, target, total = open_folder(folder, settings), hours * 3600, 0.0
    names = [f"{number:05d}.wav" for number in range(math.ceil(target / SHORTEST))]
    todo = [number for number, name in enumerate(names) if name not in lines]
    told = pool.map(functools.partial(tell, **settings), todo)

    with (tqdm(total=round(target), desc="telling stories", unit="s") as bar,
          open(folder / "truth.jsonl", "a", encoding="utf-8") as file):
        for name in names:
            if total >= target:
                break
            if name not in lines:
                # The recording first: a line in truth.jsonl says that it is complete.
                wave, lines[name] = next(told)
                save_audio(folder / name, torch.from_numpy(wave))
                file.write(json.dumps(lines[name]) + "\n")
                file.flush()
            total += lines[name]["seconds"]
            bar.update(min(round(total), bar.total) - bar.n)
    write_truth(folder, lines)
    return lines


def main():
    parser = Parser(__doc__)
    parser.add_argument("--hours", type=float, default=3.0, help="hours of speech [3]")
    parser.add_argument("--out", type=Path, default=Path("stories"), help="the folder [stories]")
    parser.add_argument("--words", choices=GRAMMARS, default="small", help="about 70, 300 [small]")
    parser.add_argument("--voices", type=int, choices=range(1, 7), default=6, help="how many [6]")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other stories [0]")
    arguments = parser.parse_args()
    if not 0 < arguments.hours < math.inf or arguments.seed < 0:
        raise UserError("--hours must be more than 0, --seed at least 0")
    speaker()                                              # is the package there?
    settings = {name: getattr(arguments, name) for name in ("words", "seed", "voices")}
    # Processes: threads of one Python are no faster than one of them.
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), begin_worker)
    try:
        lines = make(arguments.out, settings, arguments.hours, pool)
    finally:
        pool.shutdown(cancel_futures=True)
    hours = sum(line["seconds"] for line in lines.values()) / 3600
    print(f"{len(lines)} stories, {hours:.2f} hours; next: python cdslm.py --data {arguments.out}")


if __name__ == "__main__":
    cli(main, resumable=True)
