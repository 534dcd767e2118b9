"""page: the listening page of a run folder: players, pictures, what is said, and what was learned.

    python -m lab.page out/tiny        writes out/tiny/index.html anew

`cdslm.py` writes it at the end of training, and `sample.py` after each command that writes sound to
the run folder. It is plain HTML beside the files that it plays (lab/page.html, filled in): it needs
no network, and the folder can be moved or sent as it is.
"""
import dataclasses
import json
import shlex
from html import escape
from pathlib import Path
from urllib.parse import quote

from cdslm import Parser, UserError, cli, count, read_config, read_json, replacing
from lab.clips import examine
from lab.pictures import bars, chart
from lab.plan import command_line
from lab.report import MEANING

TEMPLATE = Path(__file__).with_suffix(".html")
KINDS = {
    "generated": "context and generated continuation",
    "true": "the real recording",
    "reconstruction": "the recording, encoded and decoded",
}
LEGEND = """<p>Below each player is what a recogniser hears: <span class="context">the
context</span> ┊ the continuation, with <b>complete words</b> of its language in bold, and their
share of the continuation."""
UNHEARD = "<p>Where there is a recogniser, the next <code>sample.py</code> adds what is said."
WATCH = """<p>What the network takes the clean speech to be, after some of its evaluations. The
log-SNR tells how much speech there was in what it saw: at -10 nearly none, at 10 little else."""
GUIDANCE = """<p>The same noise with other guidance (--cfg). A larger number moves each estimate
farther away from what the network expects without the context."""
BLIND = """<p>True or generated? All begin with true speech. Half of the continuations are the true
ones, encoded and decoded; half are generated."""
JUDGED = """<p>pJSD, in bits: 0 if the phoneme n-grams of generated and of real speech are
distributed alike, 1 if they have nothing in common. Below generated and true speech stand nulls:
texts that know only which few phones or words follow each other. Lines are 95 % intervals."""
CURVES = """<p>{step} steps, {hours:.0f} hours, {epochs:.0f} epochs. The training loss has the
weights that the settings give it; the validation loss has the same in all runs."""
DECIDED = '<img src="decided.png" alt="what is read from the estimates of x0, by log-SNR">'
RENAMED = {"method": "code of Part I", "speech": "recordings, as a fingerprint"}


# --------------------------------------------------------------------------------------------------
# Players, of the clips that lab/clips.py describes.

def transcript(said):
    """HTML of what is said in a clip."""
    sides = []
    for side in ("context", "continuation"):
        words = [f"<b>{escape(text)}</b>" if complete else escape(text)
                 for text, complete in said[side]]
        sides.append(f'<span class="{side}">{" ".join(words)}</span>')
    share = "" if said["share"] is None else f"{said['share']:.0%} in words, "
    return f'<p class="said">{" ┊ ".join(sides)} <small>{share}{escape(said["language"])}</small>'


def player(name, clip):
    """HTML of a clip: caption, picture, player, and what is said."""
    caption, picture = escape(clip["caption"]), Path(name).with_suffix(".mel.png").name
    said = transcript(clip["said"]) if "said" in clip else ""
    return (f'<figure><figcaption>{caption}</figcaption>'
            f'<img src="{quote(picture, safe="")}" alt="" loading="lazy">'
            f'<audio controls preload="none" src="{quote(name, safe="")}" aria-label="{caption}">'
            f"</audio>{said}</figure>")


def players(clips, names):
    """HTML of those clips that are there, in this order."""
    return "".join(player(name, clips[name]) for name in names if name in clips)


def this_command(command, sounds, runs):
    """What a command has just written; what several runs made of a context stands in a row."""
    if not sounds:
        return ""
    width = 17 if runs == 1 else 56 / runs - 1
    return f'<pre>{escape(command)}</pre><div style="--column: {width:.1f}rem">{sounds}</div>'


def watched(clips):
    """One continuation, estimate by estimate, and under other guidance."""
    names = [name for name in clips if name.startswith("watch-")]
    if not names:
        return ""
    guided = players(clips, [name for name in names if "cfg" in name])
    estimates = players(clips, [name for name in names if "cfg" not in name])
    return f'{WATCH}<div class="row">{estimates}</div>{GUIDANCE}<div>{guided}</div>'


def blind(clips):
    """A test: which clips are true? The script of the page asks and counts."""
    items = ""
    for name, clip in clips.items():
        if name.startswith("blind-"):
            items += (f'<li data-truth="{escape(clip["caption"])}">'
                      f'{player(name, clip | {"caption": "true or generated?"})}'
                      "<button>true</button> <button>generated</button> <output></output>")
    return items and f'{BLIND}<ol id="blind">{items}</ol><p id="score" role="status">'


# --------------------------------------------------------------------------------------------------
# What was learned. `runs` is {name: run folder}: one, or several that are compared.

def read_log(folder):
    """The rows of a run's log.jsonl, and those with a validation."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return rows, [row for row in rows if "valid" in row]


def differences(runs):
    """The settings in which runs differ, and their last validation loss."""
    columns = []
    for folder in runs.values():
        loss = f"{read_log(folder)[1][-1]['valid']['mean']:.4f}"
        facts = read_json(folder / "config.json") | dataclasses.asdict(read_config(folder))
        facts |= {"out": "", "validation loss": loss}
        columns.append({name: str(value) for name, value in facts.items()})
    rows = ""
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [column.get(name, "") for column in columns]
        if len(set(cells)) > 1:
            rows += f'<tr><th scope="row">{escape(RENAMED.get(name, name))}<td>'
            rows += "<td>".join(map(escape, cells))
    head = '<th scope="col">'.join(map(escape, ["", *runs]))
    return rows and f'<table class="wide"><tr><th>{head}{rows}</table>'


def learning(runs):
    """Losses against steps: of one run, also at each noise level; of several, beside each other."""
    means, levels = {}, {}
    for name, folder in runs.items():
        rows, valid = read_log(folder)
        means[name] = [(row["step"], row["valid"]["mean"]) for row in valid]
    if len(runs) > 1:
        return f'<div class="charts">{chart("validation loss", means)}</div>'

    for row in valid:
        for level, loss in row["valid"].items():
            levels.setdefault(f"log-SNR {level}", []).append((row["step"], loss))
    lines = {"training": [(row["step"], row["loss"]) for row in rows],
             "validation, mean": levels.pop("log-SNR mean")}
    _, decay = max((row["lr"], row["step"]) for row in rows)  # the last step at the full rate
    charts = chart("training and validation loss", lines, decay)
    charts += chart("validation loss at each noise level", levels, decay)
    return CURVES.format(**rows[-1]) + f'<div class="charts">{charts}</div>'


def measures(folder):
    """{measure: {side: (value, interval)}} of what eval_pjsd.py and lab.words found."""
    found = {}
    if (folder / "judged.json").exists():
        report = read_json(folder / "judged.json")
        nulls = report.get("nulls", {})
        for i, n in enumerate(report["n"][:3]):
            found[f"pJSD, n = {n}"] = {
                "generated": (report["pjsd"][i], report["interval"][i]),
                "true": (report["true"][i], None),
                "floor": (report["floor"][i], None),
            } | {null: (row["pjsd"][i], None) for null, row in nulls.items()}
        for name, row in report.get("toy", {}).items():
            sides = {"generated": (row["value"], row.get("interval")),
                     "true": (row["ceiling"], None)}
            others = {null: (row[name], None) for null, row in nulls.items() if name in row}
            title = f"{name.replace('_', ' ')}: {MEANING.get(name, '')}"
            found[title] = sides | (others or {"chance": (row["floor"], None)})
    if (folder / "words.json").exists():
        for side, row in read_json(folder / "words.json")["figures"].items():
            for name, figure in row.items():
                if not name[-1].isdigit():                    # so many sentences back
                    found.setdefault(name, {})[side] = figure["value"], figure["interval"]
    return found


def judgement(runs):
    """What the judges found, as bars; of several runs, what each generated."""
    judged = {name: measures(folder) for name, folder in runs.items()}
    tables = ""
    for measure, sides in next(iter(judged.values())).items():
        generated = {name: found[measure]["generated"]
                     for name, found in judged.items() if measure in found}
        others = {side: figure for side, figure in sides.items() if side != "generated"}
        tables += bars(measure, generated, others)
    return tables and JUDGED + tables


def making(config):
    """The command that trains such a run, and all its settings."""
    words = ["python", "cdslm.py", *command_line(config)]
    settings = escape(json.dumps(dataclasses.asdict(config), indent=2))
    return (f"<pre>{escape(shlex.join(words))}</pre>"
            f"<details><summary>settings</summary><pre>{settings}</pre></details>")


# --------------------------------------------------------------------------------------------------
# The page.

def write_page(folder, config, command="", written=None, context=0.0, runs=()):
    """Write FOLDER/index.html. `written` is {file: caption} of the sounds that `command` has just
    written, each with `context` seconds of context. The folder is a run's, or another, with sounds
    of the `runs` that are compared; `config` is that of the run, or of the first."""
    folder, written = Path(folder), written or {}
    runs = {str(run): Path(run) for run in runs}
    if len(runs) < 2:
        runs = {"generated": folder}
    notes = {path.name: (caption, context) for path, caption in written.items()}
    examples = {f"{i}_{kind}.wav": (f"{i}: {text}", config.ctx_seconds)
                for i in range(1, 5) for kind, text in KINDS.items()}
    examples = {name: note for name, note in examples.items() if name not in notes}
    clips = examine(folder, notes | examples, config, next(iter(runs.values())), bool(command))
    plain = [name for name in clips if not name.startswith(("watch-", "blind-"))]
    own = sorted([name for name in plain if name in notes], key=lambda name: (len(name), name))
    others = [name for name in plain if name not in notes | examples]

    sections = {
        "Settings that differ": lambda: differences(runs),
        "This command": lambda: this_command(command, players(clips, own), len(runs)),
        "Watch it think": lambda: watched(clips),
        "Held-out speech": lambda: players(clips, [*examples]),
        "Earlier": lambda: players(clips, others),
        "Blind test": lambda: blind(clips),
        "How it learned": lambda: learning(runs),
        "Judged": lambda: judgement(runs),
        "What is decided when": lambda: DECIDED if (folder / "decided.png").exists() else "",
        "How it was made": lambda: making(config) if len(runs) == 1 else "",
    }
    body = ""
    for title, make in sections.items():
        try:
            inside = make()
        except (UserError, OSError, AttributeError, LookupError, TypeError, ValueError):
            continue                                          # its file is missing or damaged
        if inside:
            body += f"<h2>{title}</h2>\n<section>{inside}</section>\n"

    size = count(config)["parameters"] / 1e6
    intro = f"<p>A spoken language model of {size:.1f} M parameters."
    if len(runs) > 1:
        intro = f"<p>{len(runs)} spoken language models with the same contexts and noise."
    intro += " What they generate, no person has spoken."
    legend = LEGEND if any("said" in clip for clip in clips.values()) else UNHEARD
    page = TEMPLATE.read_text(encoding="utf-8").replace("<!-- body -->", intro + legend + body)
    page = page.replace("<!-- name -->", escape(folder.resolve().name))
    with replacing(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    print(f"open {folder / 'index.html'} in a browser")


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run folder, such as out/tiny")
    run = parser.parse_args().run
    write_page(run, read_config(run), f"python -m lab.page {run}")


if __name__ == "__main__":
    cli(main)
