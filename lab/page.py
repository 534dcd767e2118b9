"""page: the listening page of a run folder. Plain HTML beside the files that it plays: it needs no
script and no network, and the folder can be moved or sent as it is.

    python -m lab.page out/tiny        writes out/tiny/index.html anew

`cdslm.py` writes it at the end of training, and `sample.py` after each command that writes sound to
the run folder.
"""
import dataclasses
import json
import shlex
from html import escape
from pathlib import Path
from urllib.parse import quote

from cdslm import (FRAME_RATE, Parser, UserError, cli, count, log_mel, read_audio,
                   read_config, replacing)
from lab.plan import command_line

STYLE = """
:root { color-scheme: light dark } table { border-collapse: collapse }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1, figcaption, pre, td:first-child { overflow-wrap: anywhere; white-space: pre-wrap }
section { display: grid; gap: 1.5rem 1rem;
          grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }
section > :not(figure) { grid-column: 1 / -1; max-width: 36rem; margin: 0 }
h2 { margin-top: 3rem } figure { margin: 0 } img, audio { width: 100% }
pre { background: #8882; padding: .5rem .8rem }
figure img { height: 6rem; border-radius: .4rem } audio { height: 2.5rem }
td:nth-child(3):last-child { color: #86c }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884 }
"""
KINDS = {
    "generated": "context and generated continuation",
    "true": "the real recording",
    "reconstruction": "the real recording, encoded and decoded",
}


def draw(path, wave, context):
    """Picture of the log-mel of (N,) samples, with a dotted line where `context` seconds end.
    Without matplotlib there is none."""
    try:
        from matplotlib.image import imsave
    except ImportError:
        path.unlink(missing_ok=True)
        return
    mel = log_mel(wave[None])[0].T.clamp(-10, 1)                              # (80, T)
    end = round(context * FRAME_RATE)
    if end:
        mel[::3, end:end + 1 + mel.shape[1] // 250] = 1
    with replacing(path) as temporary:
        imsave(temporary, mel.numpy(), cmap="magma", origin="lower", format="png")


def player(path, text, context=None):
    """HTML that plays a recording, below the log-mel of its first minute; empty if the recording
    can't be read. The picture is drawn anew; if `context` is None, only where there is none."""
    picture = path.with_suffix(".mel.png")
    try:
        wave = next(read_audio(path))
    except (UserError, StopIteration):
        return ""
    if context is not None or not picture.exists():
        draw(picture, wave, context or 0)

    image = ""
    if picture.exists():
        image = f'<img src="{quote(picture.name, safe="")}" alt="">'
    sound = f'<audio controls preload="metadata" src="{quote(path.name, safe="")}"></audio>'
    return f"<figure><figcaption>{escape(text)}</figcaption>{image}{sound}</figure>"


def cell(value):
    """A table's cell: text, a number, or None for nothing."""
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else escape(str(value))


def table(head, rows):
    """HTML of a table."""
    lines = [f"<tr><th>{'<th>'.join(head)}"]
    for row in rows:
        lines.append(f"<tr><td>{'<td>'.join(map(cell, row))}")
    return f"<table>{''.join(lines)}</table>"


# --------------------------------------------------------------------------------------------------
# The sections. Each is HTML, or empty if there is nothing to show.

def example_files(folder):
    """{file: caption} of the sounds that training writes."""
    return {folder / f"{i}_{kind}.wav": f"{i}: {text}"
            for i in range(1, 5) for kind, text in KINDS.items()}


def held_out(folder, config):
    """What training leaves: generated continuations beside the recordings."""
    return "".join(player(path, text, config.ctx_seconds)
                   for path, text in example_files(folder).items())


def this_command(command, written, context):
    """The files that a command has just written."""
    if not written:
        return ""
    players = "".join(player(path, path.name, context) for path in written)
    return f"<pre>{escape(command)}</pre>{players}"


def earlier(folder, written):
    """All other sounds of the folder."""
    others = {*folder.glob("*.wav")} - {*written, *example_files(folder)}
    ordered = sorted(others, key=lambda path: (len(path.name), path.name))
    return "".join(player(path, path.name) for path in ordered)


def judgement(folder):
    """What eval_pjsd.py found."""
    report = json.loads((folder / "judged.json").read_text())
    rows = []
    for n, value, floor in zip(report["n"], report["pjsd"], report["floor"]):
        rows.append([f"pJSD, n = {n}", value, floor, None])
    for name, row in report.get("toy", {}).items():
        rows.append([name.replace("_", " "), row["value"], row["ceiling"], row["floor"]])
    intro = ("<p>pJSD, in bits: 0 if the phoneme n-grams of generated and real speech are "
             "distributed alike, 1 if they have nothing in common.</p>")
    return intro + table(["", "model", "real", "chance"], rows)


def decided(folder):
    """The figure of eval_pjsd.py --decided."""
    return '<img src="decided.png" alt="">' if (folder / "decided.png").exists() else ""


def losses(folder):
    """The last validation, level by level."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    last = json.loads([line for line in lines if '"valid"' in line][-1])
    largest = max(last["valid"].values())
    rows = [[level, loss, "█" * round(12 * loss / largest)]
            for level, loss in last["valid"].items()]
    intro = ("<p>On held-out speech after {step:d} steps, {hours:.0f} hours, {epochs:.0f} epochs."
             "</p>").format(**last)
    return intro + table(["log-SNR", "loss"], rows)


def making(config):
    """The command that trains such a run, and all its settings."""
    words = ["python", "cdslm.py", *command_line(config)]
    settings = escape(json.dumps(dataclasses.asdict(config), indent=2))
    return (f"<pre>{escape(shlex.join(words))}</pre>"
            f"<details><summary>settings</summary><pre>{settings}</pre></details>")


def write_page(folder, config, command="", written=(), context=0.0):
    """Write RUN/index.html. `written` are the files that `command` has just written, each with
    `context` seconds of context."""
    folder = Path(folder)
    sections = {
        "Held-out speech": lambda: held_out(folder, config),
        "This command": lambda: this_command(command, written, context),
        "Earlier": lambda: earlier(folder, written),
        "Judged": lambda: judgement(folder),
        "What is decided when": lambda: decided(folder),
        "Loss per noise level": lambda: losses(folder),
        "How it was made": lambda: making(config),
    }
    body = ""
    for title, make in sections.items():
        try:
            inside = make()
        except (OSError, AttributeError, LookupError, TypeError, ValueError):
            continue                                          # its file is missing or damaged
        if inside:
            body += f"<h2>{title}</h2><section>{inside}</section>"

    hint = "" if ".mel.png" in body else "For pictures of the sound: pip install matplotlib"
    name = escape(folder.resolve().name)
    size = count(config)["parameters"] / 1e6
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style><h1>{name}</h1>
<p>A spoken language model of {size:.1f} M parameters. Its speech is generated: no person has spoken
it. {hint}{body}"""
    with replacing(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    print(f"open {folder / 'index.html'} in a browser: players, losses, settings. {hint}".strip())


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run folder, such as out/tiny")
    folder = parser.parse_args().run
    write_page(folder, read_config(folder))


if __name__ == "__main__":
    cli(main)
