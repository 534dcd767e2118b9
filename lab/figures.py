"""figures: what programs share that draw with matplotlib, which is optional."""
from cdslm import UserError, replacing


def new_figure(width, height):
    """An empty figure of so many inches. Raises UserError if matplotlib is not there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Write a figure, whole or not at all, in the format that the path's suffix names [png]. Raises
    UserError for one that can't be written."""
    form = path.suffix[1:] or "png"
    if form not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path}: can't write {form}; png, pdf and svg can be")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=form)
