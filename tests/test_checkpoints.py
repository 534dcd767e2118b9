import json
import os
import pickle

import pytest
import torch

import cdslm
from cdslm import Config, checkpoints, claim, load, load_run, read_config, resume_point, save
from cdslm import UserError


def newest(folder):
    """The newest readable checkpoint; None if there is none yet."""
    return next(checkpoints(folder), None)


class Bomb:
    """Unpickled without care, this runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path / "x.pt", step=3, weights={"a": torch.arange(3)}, rate=0.5, names=["b"])
    found = load(tmp_path / "x.pt")
    assert (found["step"], found["rate"], found["names"]) == (3, 0.5, ["b"])
    assert torch.equal(found["weights"]["a"], torch.arange(3))


def test_the_one_before_is_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "checkpoint.pt", step=step)
    assert load(tmp_path / "checkpoint.pt")["step"] == 3
    assert load(tmp_path / "checkpoint.previous.pt")["step"] == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_longer_run_goes_on_from_the_last_step_that_both_share(tmp_path):
    for name, step in (("trunk.pt", 750), ("checkpoint.pt", 500), ("checkpoint.pt", 1000)):
        save(tmp_path / name, step=step, steps=1000)
    assert [resume_point(tmp_path, Config(steps=steps))["step"] for steps in (1000, 2000, 800)] == [1000, 750, 500]
    with pytest.raises(UserError, match="past what --steps 400 can go on from"):
        resume_point(tmp_path, Config(steps=400))


def test_a_cosine_run_is_of_one_length(tmp_path):
    """Its learning rate is never that of a longer run."""
    save(tmp_path / "checkpoint.pt", step=500, steps=1000)
    assert resume_point(tmp_path, Config(steps=1000, lr_schedule="cosine"))["step"] == 500
    with pytest.raises(UserError, match="choose another --out"):
        resume_point(tmp_path, Config(steps=2000, lr_schedule="cosine"))


def test_a_run_that_goes_on_reads_its_newest_checkpoint_alone(tmp_path, monkeypatch):
    for name, step in (("trunk.pt", 750), ("checkpoint.pt", 500), ("checkpoint.pt", 900)):
        save(tmp_path / name, step=step, steps=1000)
    read = []
    monkeypatch.setattr(cdslm, "load", lambda path, **options: read.append(path.name) or load(path, **options))
    assert resume_point(tmp_path, Config(steps=1000))["step"] == 900
    assert read == ["checkpoint.pt"]


def test_a_save_that_fails_changes_nothing(tmp_path, monkeypatch):
    save(tmp_path / "checkpoint.pt", step=1)

    def break_off(contents, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path / "checkpoint.pt", step=2)
    assert load(tmp_path / "checkpoint.pt")["step"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("contents", ["bomb", "pickle", "text", "empty", "tensor", "foreign"])
def test_what_is_not_ours_is_refused_and_runs_nothing(tmp_path, contents):
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "executed"
    if contents == "bomb":
        torch.save({"format": "cdslm 1", "step": Bomb(trace)}, path)
    elif contents == "pickle":
        path.write_bytes(pickle.dumps({"format": "cdslm 1", "step": Bomb(trace)}, protocol=2))
    elif contents in ("tensor", "foreign"):
        torch.save(torch.ones(3) if contents == "tensor" else {"model": {}}, path)
    else:
        path.write_text("hello" if contents == "text" else "")
    with pytest.raises(UserError, match="checkpoint") as error:
        load(path)
    assert "\n" not in str(error.value) and not trace.exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    for step in (5, 10):
        save(tmp_path / "checkpoint.pt", step=step, steps=100)
    truncate(tmp_path / "checkpoint.pt")
    assert newest(tmp_path)["step"] == 5
    assert "warning" in capsys.readouterr().out
    truncate(tmp_path / "checkpoint.previous.pt")
    with pytest.raises(UserError):
        newest(tmp_path)


def test_a_new_folder_has_no_checkpoint(tmp_path):
    assert newest(tmp_path) is None


def test_checkpoints_hold_tensors_and_plain_values_only(trained):
    def plain(value):
        if isinstance(value, dict):
            return all(map(plain, value)) and all(map(plain, value.values()))
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or isinstance(value, (torch.Tensor, int, float, str, bool))

    for path in trained[0].glob("*.pt"):
        assert plain(torch.load(path, weights_only=True)), path


def test_a_run_is_loaded_as_it_was_made(trained):
    config, model, autoencoder = load_run(trained[0])
    assert config == read_config(trained[0]) and config.width == 64
    average = load(trained[0] / "checkpoint.pt")["ema"]
    assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad for p in [*model.parameters(), *autoencoder.parameters()])
    assert torch.allclose(model.silence, autoencoder.encode(torch.zeros(1, 9000))[0, 15], atol=1e-5)


def test_a_folder_that_is_no_run_is_a_users_error(tmp_path, small):
    with pytest.raises(UserError, match="no run there"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"depth": "x", "nonsense": 1}')
    with pytest.raises(UserError, match=r"config\.json"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(vars(small())))
    with pytest.raises(UserError, match="no checkpoint"):
        load_run(tmp_path)


def test_a_checkpoint_of_another_network_is_a_users_error(trained, tmp_path):
    for path in trained[0].iterdir():
        if path.suffix in (".pt", ".json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    foreign = load(tmp_path / "autoencoder.pt")
    foreign["autoencoder"]["mel_stats"] += 0.1                                # of the same shape, from another corpus
    save(tmp_path / "autoencoder.pt", **foreign)
    with pytest.raises(UserError, match="not the one its model was trained with"):
        load_run(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"depth": 2}))
    with pytest.raises(UserError, match=r"config\.json"):
        load_run(tmp_path)


def test_another_configuration_in_the_folder_is_refused_and_the_fields_are_named(trained):
    mine = read_config(trained[0])
    mine.out = str(trained[0])
    before = (trained[0] / "config.json").read_text()
    for field, value in dict(depth=2, lr=2e-3, seed=7, schedule="linear", batch_size=8).items():
        other = cdslm.Config(**vars(mine) | {field: value})
        with pytest.raises(UserError, match=field) as error:
            cdslm.train(other)
        assert "\n" not in str(error.value)
        assert (trained[0] / "config.json").read_text() == before


def test_steps_evaluation_and_device_may_change(small):
    for changes in ({}, dict(steps=99), dict(eval_every=3), dict(device="auto"), dict(micro_batch=2)):
        claim(small(**changes)).close()


def test_one_run_at_a_time(small):
    lock = claim(small())
    with pytest.raises(UserError, match="another run"):
        claim(small())
    lock.close()
    claim(small()).close()
