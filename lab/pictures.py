"""pictures: what the listening page draws, without any package: log-mel pictures as PNG, charts as
SVG inside the page.

    python -m lab.page out/tiny        draws them
"""
import itertools
import json
import math
import struct
import zlib
from html import escape

import numpy as np

from cdslm import FRAME_RATE, log_mel, replacing

# The colour map magma (van der Walt & Smith 2015) at eleven places, dark to light.
MAGMA = "000004 150e37 3b0f70 641a80 8c2981 b63779 de4968 f66f5c fe9f6d fece91 fcfdbf".split()
LOUD, QUIET = 1, -10              # log-mel of the lightest and of the darkest colour

# Where the axes of a chart are, which is 360 units wide and 240 high.
LEFT, RIGHT = 44, 352
TOP, BOTTOM = 8, 216


# --------------------------------------------------------------------------------------------------
# Log-mel pictures.

def magma(values):
    """Numbers in [0, 1] (...) -> colours (..., 3), uint8."""
    colours = np.array([list(bytes.fromhex(text)) for text in MAGMA])         # (11, 3)
    places = np.linspace(0, 1, len(colours))
    channels = [np.interp(values, places, channel) for channel in colours.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def png(pixels):
    """Pixels (height, width, 3), uint8, the upper row first -> the bytes of a PNG file."""
    height, width, _ = pixels.shape
    unfiltered = np.zeros((height, 1), np.uint8)              # a row begins with its filter
    rows = np.concatenate([unfiltered, pixels.reshape(height, -1)], axis=1)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),       # 8 bits, RGB
        b"IDAT": zlib.compress(rows.tobytes()),
        b"IEND": b"",
    }
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks.items():
        length = struct.pack(">I", len(data))
        check = struct.pack(">I", zlib.crc32(kind + data))
        file += length + kind + data + check
    return file


def draw(path, wave, context):
    """Write a picture of the log-mel of samples (N,), with a dotted line where `context` seconds
    end."""
    mel = log_mel(wave[None])[0].T                            # (80, T)
    mel = mel.flip(0).clamp(QUIET, LOUD).numpy()              # band 0 below
    end = round(context * FRAME_RATE)
    if end:
        width = 1 + mel.shape[1] // 250
        mel[1::3, end:end + width] = LOUD
    pixels = magma((mel - QUIET) / (LOUD - QUIET))            # (80, T, 3)
    with replacing(path) as temporary:
        temporary.write_bytes(png(pixels))


# --------------------------------------------------------------------------------------------------
# Charts.

def colour(number, count):
    """The colour of a chart's line: from orange to violet; of two lines, the first is as text."""
    if count <= 2 and number == 0:
        return "currentColor"
    place = number / (count - 1) if count > 2 else 0
    return f"hsl({round(35 + 255 * place)} 75% 52%)"


def round_steps(last):
    """Round numbers from 0 to `last`, at most six."""
    step = 1
    while last > 5 * step:
        # 1, 2, 5, 10, ...: a number that begins with 2 is followed by one that begins with 5.
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return range(0, last + 1, step)


def round_losses(low, high):
    """Numbers between `low` and `high` that begin with 1, 2 or 5, for a logarithmic axis; where
    there are few of them, numbers of any first digit."""
    for digits in ((1, 2, 5), range(1, 10)):
        numbers = []
        power = 10.0 ** math.floor(math.log10(low))
        while power <= high:
            numbers += [power * digit for digit in digits if low <= power * digit <= high]
            power *= 10
        if len(numbers) > 2:
            break
    return numbers


def thinned(points):
    """At most 100 of some points (step, loss): the means of as many parts. A loss that is not a
    positive number has no place on a logarithmic axis."""
    points = [(step, loss) for step, loss in points if 0 < loss < math.inf]
    size = math.ceil(len(points) / 100)
    thin = []
    for start in range(0, len(points), size):
        step, loss = np.mean(points[start:start + size], axis=0).tolist()
        thin.append((round(step), round(loss, 6)))
    return thin


def label(x, y, text, anchor="middle"):
    """SVG of a text."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def axes(last, low, high, x, y):
    """SVG of a chart's axes: steps from 0 to `last`, losses from `low` to `high`."""
    marks = ""
    for step in round_steps(last):
        marks += label(x(step), BOTTOM + 16, step)
    for loss in round_losses(low, high):
        marks += f'<path class="grid" d="M{LEFT} {y(loss)}H{RIGHT}"/>'
        marks += label(LEFT - 4, y(loss) + 4, f"{loss:g}", "end")
    return marks


def chart(title, lines, decay=None):
    """HTML of a chart of `lines`, {name: [(step, loss), ...]}, with a logarithmic axis: an SVG, and
    a table of names and values, at first the last ones. The script of the page shows those at the
    step that is pointed at. The learning rate decays from step `decay` on."""
    lines = {name: thinned(points) for name, points in lines.items()}
    steps, losses = zip(*itertools.chain(*lines.values()))
    last = max(steps)
    low = min(losses) / 1.1
    high = max(losses) * 1.1
    title = escape(title)

    def x(step):
        return round(LEFT + (RIGHT - LEFT) * step / last, 1)

    def y(loss):
        share = math.log(loss / low) / math.log(high / low)
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    marks = axes(last, low, high, x, y)
    if decay is not None:
        marks += f'<path class="decay" d="M{x(decay)} {TOP}H{RIGHT}V{BOTTOM}H{x(decay)}"/>'
        marks += label(RIGHT - 4, TOP + 12, "learning rate decays", "end")

    # Each line is also a row of the table, which holds its points.
    rows = ""
    for number, (name, points) in enumerate(lines.items()):
        stroke = colour(number, len(lines))
        path = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
        marks += f'<polyline stroke="{stroke}" points="{path}"/>'
        rows += f'<tr data-points="{json.dumps(points)}"><th scope="row">'
        rows += f'<i style="background:{stroke}"></i> {escape(name)}<td>{points[-1][1]:.4f}'
    marks += f'<path class="cursor" d="M0 {TOP}V{BOTTOM}" transform="translate({RIGHT})"/>'
    return f"""<figure class="chart"><figcaption>{title}</figcaption>
<svg viewBox="0 0 360 240" role="img" tabindex="0" aria-label="{title}; arrow keys show values">
{marks}</svg>
<table><caption>after step {last}</caption>{rows}</table></figure>"""


def bar(value, interval, most):
    """SVG of a bar as long as `value`, where `most` fills the width, with its interval if there is
    one."""
    def x(number):
        return round(100 * max(0, number) / most, 2)

    marks = f'<rect width="{x(value)}" height="10"/>'
    if interval:
        low, high = map(x, interval)
        marks += f'<path d="M{low} 5H{high}M{low} 1V9M{high} 1V9"/>'
    return f'''<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none"
aria-hidden="true">{marks}</svg>'''


def bars(measure, generated, others):
    """A table of {side: (value, interval)}, each None where nothing can be said, with a bar for
    each side."""
    sides, ends = generated | others, [0]
    for value, interval in sides.values():
        ends += [value, *(interval or ())]
    most = max(end for end in ends if end is not None) or 1

    rows = ""
    for side, (value, interval) in sides.items():
        drawn, text = "", "-"
        if interval and None in interval:
            interval = None
        if value is not None:
            drawn, text = bar(value, interval, most), f"{value:#.3g}"
        if interval:
            low, high = interval
            text += f"<small>{low:#.3g} to {high:#.3g}</small>"
        kind = "generated" if side in generated else "other"
        rows += f'<tr class="{kind}"><th scope="row">{escape(side)}<td>{drawn}<td>{text}'
    return f'<table class="measure"><caption>{escape(measure)}</caption>{rows}</table>'
