"""What GPUs and clusters need besides training: following a run, profiling, checkpoints in shards, equal replicas."""
import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.autograd import DeviceType

import cdslm
from cdslm import MMDiT, UserError, load, load_run, make_optimizers, read_config, train
from lab import consolidate, follow, process, profile
from tests import test_parallel
from tests.conftest import SMALL, command, flags
from tests.test_parallel import RUN, alone, assert_alike, run  # noqa: F401
from tests.test_training import log

# ----------------------------------------------------------------------------------------------------------------------
# Following a run.


def row(step, **changes):
    """A row of the log: a million FLOPs and 80 frames a step, 800 frames a second."""
    return {"step": step, "loss": 1 / step, "gradient": 1.0, "lr": 1e-3, "skipped": 0, "tokens": 12 * step,
            "flops": 1_000_000 * step, "hours": step / 3600, "epochs": 0.1, "frames/s": 800.0} | changes


def text(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path, small):
    """A run folder with a configuration of ten steps and no row yet."""
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(small(steps=10))))
    return tmp_path


class Kept(list):
    """A logger that keeps what it gets."""
    add = list.append


def test_a_row_that_is_half_written_waits_for_its_rest(folder):
    rows, path = follow.Log(folder / "log.jsonl"), folder / "log.jsonl"
    assert list(rows.rows()) == []
    whole = text(row(1), row(2))
    path.write_text(whole[:-5])
    assert [r["step"] for r in rows.rows()] == [1]
    assert list(rows.rows()) == []
    path.write_text(whole + text(row(3)) + "{damaged\n" + text(row(4)))
    assert [r["step"] for r in rows.rows()] == [2, 3, 4]


@pytest.mark.parametrize("kept", [0, 2, 5])
def test_a_resumed_run_rewrites_its_log(folder, kept):
    """Only the rows after the step from which it goes on are new, also if there are already more of them."""
    rows, path = follow.Log(folder / "log.jsonl"), folder / "log.jsonl"
    path.write_text(text(*map(row, range(1, 6))))
    assert len(list(rows.rows())) == 5
    path.write_text(text(*map(row, range(1, kept + 1))))
    assert list(rows.rows()) == []
    path.write_text(text(*map(row, range(1, kept + 1)), *(row(step, gradient=9.0) for step in range(kept + 1, 9))))
    assert [r["step"] for r in rows.rows()] == list(range(kept + 1, 9))


def test_a_run_is_followed_until_it_ends(folder, monkeypatch, capsys):
    """It stops after step 5, and goes on from step 4."""
    first, valid = [row(step) for step in range(1, 6)], {"mean": 0.5, "1.0": 0.4}
    second = [row(step, gradient=2.0) for step in range(5, 10)] + [row(10, valid=valid, skipped=1)]
    states = iter([text(*first[:2]), text(*first)[:-3], text(*first), text(*first[:4]), text(*first[:4], *second)])
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: (folder / "log.jsonl").write_text(next(states)))
    kept = Kept()
    follow.follow(folder, every=5, peak=4e7, logger=kept)
    said = capsys.readouterr().out.splitlines()
    assert [values["step"] for values in kept] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]
    assert kept[-1]["valid/mean"] == 0.5 and kept[-1]["valid/1.0"] == 0.4
    assert kept[0]["FLOP/s"] == pytest.approx(1e7) and kept[0]["MFU"] == pytest.approx(0.25)
    losses = [sum(1 / step for step in steps) / 5 for steps in (range(1, 6), range(6, 11))]
    line = "step {:>6} of 10  loss {:.4f}{}  800 frames/s  1e-05 TFLOP/s  MFU 25.0 %{}".format
    assert said == [line(5, losses[0], "", ""), "the run has gone on from step 4", line(5, 1 / 5, "", ""),
                    line(10, losses[1], "  valid 0.5000", "  1 steps skipped")]


def test_the_program_reads_a_real_run(trained):
    done = command("lab.follow", trained[0], "--once", "--every", "4", "--peak", "A100", "--devices", "2")
    assert done.returncode == 0, done.stderr
    said, rows = done.stdout.splitlines(), log(trained[0])
    assert [line.split()[1] for line in said] == ["4", "5", "8", "10"]
    assert f"valid {rows[-1]['valid']['mean']:.4f}" in said[-1] and "MFU" in said[-1] and "valid" not in said[0]
    said = command("lab.follow", trained[0], "--once", "--every", "7").stdout.splitlines()
    assert [line.split()[1] for line in said] == ["5", "7", "10"] and "MFU" not in said[-1]


def test_what_is_not_yet_due_is_shown_once(folder, capsys):
    (folder / "log.jsonl").write_text(text(row(1), row(2)))
    follow.follow(folder, once=True)
    assert capsys.readouterr().out == "step      2 of 10  loss 0.7500  800 frames/s  1e-05 TFLOP/s\n"


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("Tesla T4", 65e12), ("NVIDIA GeForce GTX 1080", None)])
def test_the_peak_is_found_by_the_devices_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert follow.to_peak(None) == peak
    assert follow.to_peak("1.5e12") == 1.5e12 and follow.to_peak("h100") == 989e12


@pytest.mark.parametrize("words", [
    ["nowhere"], ["RUN", "--every", "0"], ["RUN", "--devices", "0"], ["RUN", "--peak", "fast"], ["RUN", "--peak", "-1"],
    ["RUN", "--to", "paper"]])
def test_what_cannot_be_followed_is_a_users_error(words, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["follow", *(str(folder) if word == "RUN" else word for word in words)])
    with pytest.raises(UserError) as error:
        follow.main()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_logger_that_is_not_installed_is_named(name, module, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["follow", str(folder), "--once", "--to", name])
    with pytest.raises(UserError, match=f"pip install {name}"):
        follow.main()


def test_tensorboard_gets_every_row_and_forgets_what_is_done_again(folder, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, where, purge_step):
            calls.append((where, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("close")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    logger = follow.TensorBoard(folder)
    for step in (1, 2, 2):
        logger.add({"step": step, "loss": 0.5})
    logger.close()
    where = folder / "tensorboard"
    assert calls == [(where, 1), ("step", 1, 1), ("loss", 0.5, 1), ("step", 2, 2), ("loss", 0.5, 2), "close",
                     (where, 2), ("step", 2, 2), ("loss", 0.5, 2), "close"]


def test_tensorboard_reads_what_is_written(folder):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = folder / "log.jsonl"
    path.write_text(text(row(1), row(2, valid={"mean": 0.5})))
    logger = follow.TensorBoard(folder)
    follow.follow(folder, logger=logger, once=True)
    logger.close()
    events = reader.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert [e.step for e in events.Scalars("valid/mean")] == [2]


def test_wandb_gets_every_row(folder, monkeypatch):
    calls = []
    started = types.SimpleNamespace(log=lambda values, step: calls.append((values, step)),
                                    finish=lambda: calls.append("end"))
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or started)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (folder / "log.jsonl").write_text(text(row(1), row(2)))
    monkeypatch.setattr(sys, "argv", ["follow", str(folder), "--once", "--to", "wandb"])
    follow.main()
    assert calls[0] == {"project": "cdslm", "name": folder.name, "config": vars(read_config(folder))}
    assert [(values["loss"], step) for values, step in calls[1:-1]] == [(1.0, 1), (0.5, 2)] and calls[-1] == "end"


# ----------------------------------------------------------------------------------------------------------------------
# Profiling.

def test_a_profile_names_operators_and_leaves_a_trace(tmp_path):
    done = command("lab.profile", *flags(**SMALL | dict(steps=2, out=tmp_path / "prof")))
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + profile.SHOWN and "mm" in done.stdout and "waiting for the batch" in done.stdout
    shares = [float(line.split("|")[4]) for line in rows[2:]]
    assert shares == sorted(shares, reverse=True) and 0.2 < sum(shares) <= 1
    assert os.listdir(tmp_path / "prof") == ["trace.json"]
    events = json.loads((tmp_path / "prof/trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "step" for event in events) == 2


def test_a_run_folder_is_not_for_profiles(trained):
    before = {path: path.stat().st_mtime_ns for path in trained[0].iterdir()}
    done = command("lab.profile", *flags(**SMALL | dict(out=trained[0])))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in trained[0].iterdir()}


def test_on_a_gpu_an_operators_time_is_that_of_its_kernels(capsys, monkeypatch):
    def event(key, cpu, gpu, kind=DeviceType.CPU, section=False):
        return types.SimpleNamespace(key=key, self_cpu_time_total=cpu, self_device_time_total=gpu, count=4,
                                     device_type=kind, is_user_annotation=section)

    events = [event("step", 100, 900, section=True), event("aten::mm", 10, 6000), event("aten::add", 50, 2000),
              event("gemm", 0, 6000, DeviceType.CUDA)]
    profiler = types.SimpleNamespace(key_averages=lambda: events)
    assert profile.operators(profiler, 2, cuda=True) == [("aten::mm", 2, 3.0, 0.75), ("aten::add", 2, 1.0, 0.25)]
    assert profile.operators(profiler, 2, cuda=False)[0][0] == "aten::add"

    trainer = types.SimpleNamespace(config=types.SimpleNamespace(steps=2, batch_size=4), device=torch.device("cuda"),
                                    size={"flops": 1e12})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2 ** 30)
    profile.report(trainer, profiler, seconds=2.0, wait=0.5)
    said = capsys.readouterr().out
    assert "takes 1000 ms, profiled; 4 TFLOP/s" in said and "250 ms" in said and "tensors: 3 GiB" in said


@pytest.mark.slow
def test_rank_0_is_profiled(tmp_path):
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lab.profile"]
    settings = SMALL | dict(steps=2, out=tmp_path / "prof", parallel="fsdp", optimizer="adamw")
    done = cdslm_module(*launch, *flags(**settings))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("waiting for the batch") == 1 and (tmp_path / "prof/trace.json").exists()


def cdslm_module(*words):
    """Run `python -m WORDS` from the repository's root."""
    import subprocess
    return subprocess.run([sys.executable, "-m", *map(str, words)], cwd=Path(cdslm.__file__).parent, timeout=300,
                          capture_output=True, text=True)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints in shards.

def to_shards(path):
    """A checkpoint in one file becomes one in shards, as one rank would write it."""
    found, place = load(path), path.with_suffix(".shards")
    config = read_config(path.parent)
    model, ema = MMDiT(config), MMDiT(config)
    optimizers = make_optimizers(model, config)
    state = consolidate.tensors(model, ema, optimizers)
    with torch.no_grad():
        for kind, old in (("model", found["model"]), ("ema", found["ema"])):
            for name, tensor in state[kind].items():
                tensor.copy_(old[name])
        for name, moments in state["optimizer"].items():
            for kind, tensor in moments.items():
                tensor.copy_(found["optimizer"]["state"][name][kind])
    place.mkdir()
    cdslm.save(place / "facts.pt", **{name: found[name] for name in ("step", "steps", "skipped")})
    dcp.save(state, checkpoint_id=place)
    path.unlink()
    return place


def assert_same(found, expected):
    """Two checkpoints in one file hold the same; the rates of the optimiser follow from the step."""
    assert found.keys() == expected.keys() and found["step"] == expected["step"]
    for kind in ("model", "ema"):
        assert found[kind].keys() == expected[kind].keys()
        assert all(torch.equal(tensor, expected[kind][name]) for name, tensor in found[kind].items())
    for name, moments in expected["optimizer"]["state"].items():
        assert all(torch.equal(tensor, found["optimizer"]["state"][name][kind]) for kind, tensor in moments.items())
    for group, other in zip(found["optimizer"]["param_groups"], expected["optimizer"]["param_groups"], strict=True):
        same = {"lr": 0, "betas": 0}                                          # a tuple, or a list once it was loaded
        assert group | same == other | same and list(group["betas"]) == list(other["betas"])


@pytest.fixture
def stopped(small, mute, tmp_path):
    """The folder of a run of AdamW that was stopped after step 7 of 8, and what makes it go on. Its trunk is step 6."""
    step, usual = cdslm.Trainer.step, dict(optimizer="adamw", eval_every=2, steps=8)

    def warned(trainer):
        if trainer.done == 6:
            trainer.signals.append(signal.SIGTERM)
        return step(trainer)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(cdslm.Trainer, "step", warned)
        train(small(**usual))
    assert [load(tmp_path / f"run/{name}.pt")["step"] for name in ("checkpoint", "trunk")] == [7, 6]
    return tmp_path / "run", lambda **changes: train(small(**usual | changes))


def test_one_file_is_made_of_shards(stopped, capsys):
    folder, _ = stopped
    expected = {name: load(folder / f"{name}.pt") for name in ("checkpoint", "trunk")}
    for name in expected:
        to_shards(folder / f"{name}.pt")
    done = command("lab.consolidate", folder)
    assert done.returncode == 0, done.stderr
    assert f"{folder}/checkpoint.pt: step 7" in done.stdout and (folder / "checkpoint.shards").exists()
    for name, old in expected.items():
        assert_same(load(folder / f"{name}.pt"), old)
    assert load_run(folder)[1]
    written = (folder / "checkpoint.pt").stat().st_mtime_ns
    assert consolidate.consolidate(folder, "checkpoint")                      # as new as the shards: it stays
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == written


def test_without_shards_there_is_nothing_to_make(trained):
    done = command("lab.consolidate", trained[0])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_run_goes_on_from_the_newest_checkpoint_of_either_kind(stopped, capsys):
    """Step 7 in shards before step 6 in one file; and, if the shards are damaged, step 6."""
    folder, go_on = stopped
    place = to_shards(folder / "checkpoint.pt")
    before = shutil.copytree(folder, folder.with_name("before"))
    assert load(folder / "checkpoint.previous.pt")["step"] == 6
    go_on()
    assert "going on from step 7" in capsys.readouterr().out
    end = load(folder / "checkpoint.pt")

    shutil.rmtree(folder)
    shutil.move(before, folder)
    (shards,) = place.glob("*.distcp")
    shards.write_bytes(shards.read_bytes()[:-20_000])
    go_on()
    said = capsys.readouterr().out
    assert "going on from step 6" in said and f"warning: {place}: damaged" in said
    assert_same(load(folder / "checkpoint.pt"), end)
    with pytest.raises(UserError, match="damaged"):
        cdslm.save(place / "facts.pt", step=9, steps=9, skipped=0)
        consolidate.consolidate(folder, "checkpoint")


def test_a_longer_run_goes_on_from_the_trunk_in_shards(stopped, capsys):
    folder, go_on = stopped
    for name in ("checkpoint", "trunk"):
        to_shards(folder / f"{name}.pt")
    (folder / "checkpoint.previous.pt").unlink(missing_ok=True)
    go_on(steps=40)
    assert "going on from step 6" in capsys.readouterr().out
    with pytest.raises(UserError, match="no checkpoint that --steps 2 can go on from"):
        consolidate.restore(types.SimpleNamespace(config=dataclasses.replace(read_config(folder), steps=2)), None, None)


def test_facts_that_are_damaged_are_passed_over(stopped, capsys):
    folder, go_on = stopped
    place = to_shards(folder / "checkpoint.pt")
    (place / "facts.pt").write_bytes(b"half")
    go_on()
    said = capsys.readouterr().out
    assert f"warning: {place}/facts.pt" in said and "going on from step 6" in said


def test_shards_that_are_replaced_while_they_are_read_are_not_mixed(stopped, monkeypatch):
    folder, _ = stopped
    place, load_shards = to_shards(folder / "checkpoint.pt"), dcp.load

    def replaced(*arguments, **options):
        load_shards(*arguments, **options)
        cdslm.save(place / "facts.pt", step=4, steps=4, skipped=0)

    monkeypatch.setattr(consolidate.dcp, "load", replaced)
    with pytest.raises(UserError, match="try again"):
        consolidate.consolidate(folder, "checkpoint")
    assert not (folder / "checkpoint.pt").exists()


class Bomb:
    """Unpickled without care, this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("where", ["index", "entry"])
def test_shards_run_no_code(stopped, tmp_path, where):
    folder, _ = stopped
    place = to_shards(folder / "checkpoint.pt")
    trace = tmp_path / "executed"
    if where == "index":
        (place / ".metadata").write_bytes(pickle.dumps(Bomb(trace)))
    else:                                                                     # torch would unpickle what is no tensor
        model = MMDiT(read_config(folder))
        state = {"model": {name: Bomb(trace) for name in model.state_dict()}}
        dcp.save(state, checkpoint_id=place)
        trace.unlink(missing_ok=True)
    with pytest.raises(UserError, match="damaged"):
        consolidate.consolidate(folder, "checkpoint")
    assert not trace.exists()


def test_there_is_a_whole_checkpoint_at_every_moment(tmp_path, monkeypatch):
    """Whatever rename or removal is the last that is done."""
    def names(step, *places):
        return {place.name: (place / "step").read_text() for place in places if (place / "step").exists()}

    place, previous = tmp_path / "checkpoint.shards", tmp_path / "checkpoint.previous.shards"
    done, seen = [], []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (rename(path, to), seen.append(names(0, place, previous))))
    for step in range(4):
        new = tmp_path / "new"
        new.mkdir()
        (new / "step").write_text(str(step))
        consolidate.swap(new, place)
        done.append(names(step, place, previous))
    assert done[0] == {"checkpoint.shards": "0"}
    assert done[-1] == {"checkpoint.shards": "3", "checkpoint.previous.shards": "2"}
    assert all(seen) and sorted(os.listdir(tmp_path)) == ["checkpoint.previous.shards", "checkpoint.shards"]


@pytest.mark.slow
def test_shards_of_two_ranks_are_read_by_one_and_by_four(alone, tmp_path):  # noqa: F811
    """The run stops after step 2; one file is made of its shards; four ranks go on from them, and end as one would."""
    ended = run(tmp_path, 2, (1, signal.SIGTERM), parallel="fsdp")
    assert [status for status, _ in ended] == [143, 143], ended
    folder = tmp_path / "run"
    assert any("python -m lab.consolidate" in line for line in ended[0][1])
    assert len(list((folder / "checkpoint.shards").glob("*.distcp"))) == 2 and not (folder / "checkpoint.pt").exists()
    consolidate.consolidate(folder, "checkpoint")
    assert load(folder / "checkpoint.pt")["step"] == 2 and load_run(folder)[0].parallel == "fsdp"
    (folder / "checkpoint.pt").unlink()
    ended = run(tmp_path, 4, parallel="fsdp")
    assert [status for status, _ in ended] == [0] * 4, ended
    assert any("going on from step 2" in line for line in ended[0][1])
    assert_alike(folder, alone)
    assert not (folder / "checkpoint.shards").exists() and (folder / "trunk.pt").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_is_a_users_error(tmp_path, monkeypatch):
    monkeypatch.setattr(test_parallel, "program", on_a_full_disk)
    ended = run(tmp_path, 2, parallel="fsdp")
    assert [status for status, _ in ended] == [2, 2], ended
    for _, said in ended:
        assert "could not be written" in said[-1] and "Traceback" not in " ".join(said)


def on_a_full_disk(words, place, said, fault):
    """As `program`; but rank 1 can't write its second shard."""
    from lab import consolidate
    write = dcp.FileSystemWriter.write_data

    def full(writer, plan, planner):
        if "checkpoint" in str(writer.path) and os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        return write(writer, plan, planner)

    consolidate.dcp.FileSystemWriter.write_data = full
    ordinary(words, place, said, fault)


# ----------------------------------------------------------------------------------------------------------------------
# Equal replicas.

ordinary = test_parallel.program


@pytest.mark.parametrize("sizes, named", [
    ([1.0, 1.0], None), ([1.0, 1.0 + 1e-7, 1.0], None), ([1.0, 1.5], "rank 1"), ([1.0, 1.0, 0.9, float("nan")],
    "rank 2 and rank 3"), ([1.5, 1.0, 1.0], "rank 0"), ([float("nan"), 1.0], "rank 0")])
def test_the_rank_whose_weights_differ_is_named(sizes, named, monkeypatch):
    """One weight of these sizes on the ranks; all of them find the same rank."""
    def weights(size):
        model = torch.nn.Linear(4, 2, bias=False)
        torch.nn.init.ones_(model.weight)
        model.weight.data[0, 0] = size
        return model

    gathered = []
    monkeypatch.setattr(process, "ranks", lambda: (0, len(sizes)))
    monkeypatch.setattr(process.dist, "all_gather_object", lambda found, mine: gathered.append(mine))
    for size in sizes:                                                        # what each rank sends
        with contextlib.suppress(UserError, TypeError):
            process.check_replicas(weights(size), weights(1.0))
    monkeypatch.setattr(process.dist, "all_gather_object", lambda found, mine: found.__setitem__(slice(None), gathered))
    expected = pytest.raises(UserError, match=f"weights of {named} differ") if named else contextlib.nullcontext()
    for size in sizes:
        with expected:
            process.check_replicas(weights(size), weights(1.0))


def disturbing(words, place, said, fault):
    """As `program`; but a weight of rank 1 changes in step 3."""
    step = cdslm.Trainer.step

    def disturbed(trainer):
        row = step(trainer)
        if trainer.rank == 1 and trainer.done == 3:
            next(trainer.model.parameters()).data[0, 0] += 0.5
        return row

    cdslm.Trainer.step = disturbed
    ordinary(words, place, said, fault)


@pytest.mark.slow
def test_replicas_that_part_stop_the_run_before_they_are_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(test_parallel, "program", disturbing)
    ended = run(tmp_path, 2)
    assert [status for status, _ in ended] == [2, 2], ended
    for rank, (_, said) in enumerate(ended):
        assert said[-1].startswith(f"error: rank {rank}: the weights of rank 1 differ")
    assert load(tmp_path / "run/checkpoint.pt")["step"] == 2
