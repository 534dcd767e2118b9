"""The study of windows: what is run, what is kept, what is drawn."""
import json

import pytest

from cdslm import UserError
from lab import contexts


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Programs that leave what the real ones leave; the words they were called with."""
    called = []
    monkeypatch.setattr(contexts, "RESULTS", tmp_path / "contexts.csv")

    def python(*words):
        called.append(words)
        if words[0] == "lab.coherence":
            figure = {"value": 0.5, "interval": [0.4, 0.7], "cases": 9}
            side = dict.fromkeys(contexts.MEASURES.values(), figure)
            side |= {"replies answer": {"value": None, "interval": None, "cases": 0}}
            report = {"figures": {"generated": side, "true": side, "window": side}}
            (tmp_path / "out" / words[1].split("/")[-1] / "coherence.json").write_text(json.dumps(report))
        else:
            folder = tmp_path / "out" / words[words.index("--out") + 1].split("/")[-1]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.jsonl").write_text(json.dumps({"step": 3, "flops": 7.9e13}) + "\n")
    monkeypatch.setattr(contexts, "python", python)
    return called, tmp_path / "out"


def test_each_window_once_and_one_with_three_seeds(study, monkeypatch, capsys):
    called, out = study
    monkeypatch.setattr("sys.argv", ["contexts", "--out", str(out)])
    contexts.main()
    assert len(called) == 2 * (len(contexts.RUNS) + 2)
    rows = contexts.read_rows(contexts.RESULTS)
    assert [row["seed"] for row in rows if contexts.key_of(row) == contexts.REPEATED] == ["0", "1", "2"]
    assert rows[0]["half_life"] == "0.5" and rows[0]["half_life_high"] == "0.7" and rows[0]["flops"] == "7.9e+13"
    assert "| C | 4 + 8 s | 3 | 3 | 0.50 ± 0.00 |" in capsys.readouterr().out
    contexts.main()                                           # nothing is left to do
    assert len(called) == 2 * (len(contexts.RUNS) + 2)


def test_the_results_are_drawn(study, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    _, out = study
    monkeypatch.setattr("sys.argv", ["contexts", "--plot", str(tmp_path / "x.png")])
    with pytest.raises(UserError, match="there are no results"):
        contexts.main()
    monkeypatch.setattr("sys.argv", ["contexts", "--out", str(out), "--seed", "0"])
    contexts.main()
    monkeypatch.setattr("sys.argv", ["contexts", "--plot", str(tmp_path / "x.png")])
    contexts.main()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
