"""page: the listening page of a run folder. Plain HTML beside the files that it plays: no script, no network, and the
folder can be moved or sent as it is.

    python -m lab.page out/tiny                      write out/tiny/index.html anew

`cdslm.py` writes it at the end of training, and `sample.py` after each command that leaves sound in the run folder.
"""
import argparse
import dataclasses
import json
import shlex
from html import escape
from pathlib import Path
from urllib.parse import quote

from cdslm import Config, UserError, cli, count, read_config
from cdslm import FRAME_RATE, log_mel, read_audio, replacing

STYLE = """
:root { color-scheme: light dark } table { border-collapse: collapse }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1, figcaption, pre, td:first-child { overflow-wrap: anywhere; white-space: pre-wrap }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1.5rem 1rem }
section > :not(figure) { grid-column: 1 / -1; max-width: 36rem; margin: 0 }
h2 { margin-top: 3rem } figure { margin: 0 } img, audio { width: 100% } pre { background: #8882; padding: .5rem .8rem }
figure img { height: 6rem; border-radius: .4rem } audio { height: 2.5rem } td:nth-child(3):last-child { color: #86c }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884 }
"""
KINDS = {"generated": "the model goes on", "true": "the recording goes on", "reconstruction": "the recording, decoded"}


def draw(path, wave, context):
    """Picture of the log-mel of (N,) samples, dotted where `context` seconds end; without matplotlib, none."""
    try:
        from matplotlib.image import imsave
    except ImportError:
        return path.unlink(missing_ok=True)
    mel, end = log_mel(wave[None])[0].T.clamp(-10, 1), round(context * FRAME_RATE)  # (80, T)
    mel[::3, end:end + 1 + mel.shape[1] // 250 if end else 0] = 1
    with replacing(path) as temporary:
        imsave(temporary, mel.numpy(), cmap="magma", origin="lower", format="png")


def player(path, text, context=None):
    """HTML that plays a recording under the log-mel of its first minute; empty if it can't be read. The picture is
    drawn anew; or, if `context` is not known, only if there is none."""
    try:
        wave, picture = next(read_audio(path)), path.with_suffix(".mel.png")
    except (UserError, StopIteration):
        return ""
    if context is not None or not picture.exists():
        draw(picture, wave, context or 0)
    sound, image = (quote(file.name, safe="") for file in (path, picture))
    return (f"<figure><figcaption>{escape(text)}</figcaption>" + f'<img src="{image}" alt="">' * picture.exists() +
            f'<audio controls preload="metadata" src="{sound}"></audio></figure>')


def table(head, rows):
    """HTML of a table of texts, numbers, and None where there is nothing."""
    cells = [["" if x is None else f"{x:.4f}" if isinstance(x, float) else escape(str(x)) for x in row] for row in rows]
    return f"<table><tr><th>{'<th>'.join(head)}" + "".join(f"<tr><td>{'<td>'.join(row)}" for row in cells) + "</table>"


def judgement(folder):
    """HTML of what eval_pjsd.py found."""
    report = json.loads((folder / "judged.json").read_text())
    rows = [[f"pJSD, n = {n}", *values, None] for n, *values in zip(report["n"], report["pjsd"], report["floor"])]
    rows += [[name.replace("_", " "), *(row[x] for x in ("value", "ceiling", "floor"))]
             for name, row in report.get("toy", {}).items()]
    intro = "<p>pJSD, in bits, is 0 where phonemes follow each other as in real speech; 1 if they share nothing.</p>"
    return intro + table(["", "model", "real", "chance"], rows)


def losses(folder):
    """HTML of the last validation."""
    rows = [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines() if '"valid"' in row]
    levels, top = rows[-1]["valid"].items(), max(rows[-1]["valid"].values())
    intro = "<p>On held-out speech after {step:d} steps, {hours:.0f} hours, {epochs:.0f} epochs.</p>".format(**rows[-1])
    return intro + table(["log-SNR", "loss"], [[level, x, "█" * round(12 * x / top)] for level, x in levels])


def making(config):
    """HTML of the command line that has this configuration, and of the configuration itself."""
    words, usual = ["python", "cdslm.py", "--size", config.size], dataclasses.asdict(Config(size=config.size))
    for name, value in dataclasses.asdict(config).items():
        if value != usual[name]:
            values = value if isinstance(value, list) else [value] * (value is not True)
            words += ["--" + name.replace("_", "-"), *map(str, values)]
    every = escape(json.dumps(dataclasses.asdict(config), indent=2))
    return f"<pre>{escape(shlex.join(words))}</pre><details><summary>settings</summary><pre>{every}</pre></details>"


def write_page(folder, config, command="", written=(), context=0.0):
    """Write RUN/index.html of what the folder holds. `written` are the files that a `command` has just made, with
    `context` seconds of context in each."""
    folder = Path(folder)
    examples = {folder / f"{i}_{kind}.wav": f"{i}: {text}" for i in range(1, 5) for kind, text in KINDS.items()}
    others = sorted({*folder.glob("*.wav")} - {*written, *examples}, key=lambda path: (len(path.name), path.name))
    sections = {
        "Held-out speech": lambda: "".join(player(path, text, config.ctx_seconds) for path, text in examples.items()),
        "This command": lambda: f"<pre>{escape(command)}</pre>" * bool(written) +
                                "".join(player(path, path.name, context) for path in written),
        "Earlier": lambda: "".join(player(path, path.name) for path in others),
        "Judged": lambda: judgement(folder),
        "What is decided when": lambda: '<img src="decided.png" alt="">' * (folder / "decided.png").exists(),
        "Loss per noise level": lambda: losses(folder),
        "How it was made": lambda: making(config),
    }
    body, name = "", escape(folder.resolve().name)
    for title, inside in sections.items():
        try:
            body += f"<h2>{title}</h2><section>{inside}</section>" if (inside := inside()) else ""
        except (OSError, AttributeError, LookupError, TypeError, ValueError):
            continue                                                          # not there, or damaged
    hint = "" if ".mel.png" in body else "For pictures of the sound: pip install matplotlib"
    with replacing(folder / "index.html") as temporary:
        temporary.write_text(f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style><h1>{name}</h1>
<p>A spoken language model of {count(config)["parameters"] / 1e6:.1f} M parameters. What it says is generated: nobody
said it. {hint}{body}""", encoding="utf-8", errors="replace")
    print(f"{folder / 'index.html'}: open it in a browser to hear and see all of it. {hint}".strip())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, such as out/tiny")
    folder = parser.parse_args().run
    write_page(folder, read_config(folder))


if __name__ == "__main__":
    cli(main)
