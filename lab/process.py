"""process: what a program does to its own process before it begins: it goes on although nobody
reads what it prints, and keeps the memory that it frees.

The reader of a pipe may go away (`| head`), the terminal may be closed, know only ASCII, or never
have been there. Without the second, the sampler is slower by a third.
"""
import contextlib
import ctypes
import sys


class Unbreakable:
    """A text stream whose reader may go away, or that was never there: writing then does nothing.
    Characters that the terminal lacks are escaped."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            encoding = self.stream.encoding or "utf-8"
            return self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError, AttributeError):
            return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def keep_memory():
    """Have Linux's malloc keep what is freed instead of returning it to the system, from where it
    would be fetched anew at each step."""
    with contextlib.suppress(OSError, AttributeError):        # other systems have no glibc
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL("libc.so.6").mallopt, -1, -3
        mallopt(trim_threshold, 2 ** 30)
        if not mallopt(mmap_threshold, 2 ** 30):
            mallopt(mmap_threshold, 2 ** 25)                  # the most that old versions allow


def prepare():
    """Make the output streams of this process unbreakable, and keep its memory."""
    keep_memory()
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
