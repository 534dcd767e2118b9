"""What the tests share: a cache of their own, a small configuration, and one small trained run."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # small models: two threads gain nothing, and spin when the machine is busy

SMALL = dict(depth=1, width=64, ctx_seconds=0.4, gen_seconds=0.8, batch_size=4, steps=4, warmup=2, toy_hours=0.05,
             decoder="griffinlim", dtype="fp32", device="cpu")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: needs --slow"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Nothing is read from or written to the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["CDSLM_CACHE"] = str(folder)
    return folder


@pytest.fixture
def small(tmp_path):
    """small(steps=7, ...): a Config that trains in a second, with its run folder in the test's own folder."""
    from cdslm import Config
    return lambda **changes: Config(**SMALL | dict(out=str(tmp_path / "run")) | changes)


@pytest.fixture
def mute(monkeypatch):
    """Training leaves no WAV files: quicker, where only the numbers matter."""
    import cdslm
    monkeypatch.setattr(cdslm, "listen", lambda *arguments, **options: None)


def command(*words, cwd=ROOT, **options):
    """Run a program of the repository, such as cdslm.py or lab.bench -> CompletedProcess with text output."""
    program = ["-m", words[0]] if words[0].startswith("lab.") else [ROOT / words[0]]
    program = [sys.executable, *map(str, [*program, *words[1:]])]
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, timeout=300, **options)


def flags(**settings):
    """{"out": "x"} -> ["--out", "x"], as on the command line."""
    return [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]


def speech_like(seconds, rate=24_000, seed=0):
    """Noise in bursts (N,), float32: something to put in a recording where it does not matter what is said."""
    import numpy as np
    rng, count = np.random.default_rng(seed), round(seconds * rate)
    loud = 0.5 + 0.5 * np.sin(2 * np.pi * 3 * np.arange(count) / rate)
    return (0.1 * loud * rng.standard_normal(count)).astype(np.float32)


@pytest.fixture(scope="session")
def trained(cache, tmp_path_factory):
    """(run folder, what the program said) of one small run made by the command line; read only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = command("cdslm.py", "--size", "tiny", *flags(**SMALL | dict(out=folder, steps=10, eval_every=5)))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout
