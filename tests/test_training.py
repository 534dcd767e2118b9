import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cdslm
from cdslm import Trainer, count, load, open_autoencoder, read_config, train
from cdslm import UserError, load_audio, open_corpus
from lab import plan
from tests.test_checkpoints import newest
from tests.conftest import ROOT, SMALL, command, flags, speech_like

REAL = ROOT.parent / "shared/data/fsdd"


@pytest.fixture
def trainer(small, cache):
    """trainer(...): a Trainer on toy speech, nothing trained yet."""
    def make(**changes):
        config = small(**changes)
        os.makedirs(config.out, exist_ok=True)
        corpus = open_corpus(config)
        autoencoder = open_autoencoder(config, corpus, torch.device("cpu"))
        return Trainer(config, corpus, autoencoder, torch.device("cpu"), torch.float32)
    return make


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def log(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("frames/s", "wait")} for row in rows]


def same(one, other):
    """Every tensor and number of two checkpoints, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_run(folder, other):
    assert same(load(folder / "checkpoint.pt"), load(other / "checkpoint.pt"))
    assert log(folder) == log(other)


@pytest.fixture
def straight(mute, small, tmp_path):
    """The folder of a run of 10 steps in one go, evaluated in the middle."""
    train(small(out=str(tmp_path / "straight"), steps=10, eval_every=5, self_condition=0.5))
    return tmp_path / "straight"


def test_10_steps_are_5_an_interruption_and_5(straight, small, tmp_path, monkeypatch):
    """Ctrl-C or SIGTERM: the step is finished, saved, and the same command goes on."""
    config, step = small(steps=10, eval_every=5, self_condition=0.5), Trainer.step

    def interrupted(trainer):
        if trainer.done == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    assert stopped.value.code == 128 + signal.SIGTERM
    del stopped                                                                # its traceback holds the run's lock
    assert load(tmp_path / "run/checkpoint.pt")["step"] == 5
    monkeypatch.setattr(Trainer, "step", step)
    train(config)
    assert_same_run(tmp_path / "run", straight)


def test_10_steps_are_5_a_kill_and_5(straight, small, tmp_path):
    """SIGKILL two steps after a checkpoint: they are done again."""
    config = small(steps=10, eval_every=5, self_condition=0.5)
    killed = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import cdslm
step = cdslm.Trainer.step
def stepped(trainer):
    if trainer.done == 7:
        os.kill(os.getpid(), 9)
    return step(trainer)
cdslm.Trainer.step = stepped
cdslm.train(cdslm.Config(**{vars(config)!r}))
"""
    done = subprocess.run([sys.executable, "-c", killed], capture_output=True, timeout=200)
    assert done.returncode == -9, done.stderr
    assert load(tmp_path / "run/checkpoint.pt")["step"] == 5
    train(config)
    assert_same_run(tmp_path / "run", straight)


def test_a_longer_run_goes_on_and_equals_the_run_made_in_one_go(mute, small, tmp_path):
    for steps in (4, 12):
        train(small(steps=steps))
    train(small(steps=12, out=str(tmp_path / "whole")))
    assert same(load(tmp_path / "run/checkpoint.pt"), load(tmp_path / "whole/checkpoint.pt"))
    rows, whole = ([row["loss"] for row in log(tmp_path / name)] for name in ("run", "whole"))
    assert rows == whole and len(rows) == 12


def test_a_shorter_run_than_was_made_is_a_users_error(mute, small):
    train(small(steps=6))
    with pytest.raises(UserError, match="--steps"):
        train(small(steps=3))


def test_a_finished_run_is_not_trained_again(mute, small, monkeypatch):
    train(small())
    monkeypatch.setattr(Trainer, "step", lambda _: pytest.fail("trained again"))
    train(small())


def test_a_damaged_checkpoint_costs_its_steps_only(mute, small, straight, tmp_path, capsys):
    path = straight / "checkpoint.pt"
    whole = load(path)
    path.write_bytes(path.read_bytes()[:1000])
    train(small(out=str(straight), steps=10, eval_every=5, self_condition=0.5))
    assert "warning" in capsys.readouterr().out
    assert same(load(path), whole)


def test_evaluating_more_often_changes_nothing(straight, mute, small, tmp_path):
    train(small(steps=10, eval_every=3, self_condition=0.5))
    assert same(load(tmp_path / "run/checkpoint.pt"), load(straight / "checkpoint.pt"))


def stepped(t):
    """The row of a step, whole."""
    return t.finish(t.step())


def test_smaller_micro_batches_make_the_same_step(trainer):
    one, other = trainer(micro_batch=0), trainer(micro_batch=1)
    before = weights(one).clone()
    for _ in range(2):
        whole, parts = stepped(one), stepped(other)
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert parts["gradient"] == pytest.approx(whole["gradient"], rel=1e-3)
    assert (weights(one) - weights(other)).norm() < 0.01 * (weights(one) - before).norm()


def test_another_seed_is_another_run(trainer):
    one, other = trainer(seed=0), trainer(seed=1)
    assert stepped(one)["loss"] != stepped(other)["loss"] and not torch.equal(weights(one), weights(other))


def test_a_silent_context_is_silence(trainer, monkeypatch):
    seen = []
    t = trainer(ctx_drop=1.0, self_condition=0.0)
    monkeypatch.setattr(cdslm.Diffusion, "loss", lambda self, model, x0, ctx, *rest: (seen.append(ctx), x0.new_zeros(
        len(x0)) + 0 * sum(p.sum() for p in model.parameters()))[1])
    t.step()
    assert torch.equal(seen[0], t.model.silence.expand_as(seen[0]))


def batch(t, step=0):
    """The whole batch of a step: ctx, x0, eps."""
    t.batches, t.done = None, step
    return next(t.micro_batches())


def test_a_batch_depends_on_its_step_alone(trainer):
    one, other = trainer(), trainer(micro_batch=2)
    for _ in range(2):
        one.step()
    one.validate()
    whole = batch(one, 2)
    assert all(map(torch.equal, whole, batch(trainer(), 2)))
    assert all(map(torch.equal, [part[:2] for part in whole], batch(other, 2)))
    assert not any(map(torch.equal, whole, batch(one, 3)))


def test_times_are_stratified_over_the_batch(trainer):
    t = trainer(batch_size=16, t_shift=0.0)
    for step in range(5):
        phi = cdslm.noise_levels(t.config, t.diffusion, step, range(16))
        shares = (phi / (math.pi / 2) * 16).floor().clamp(0, 15)
        assert sorted(shares.tolist()) == list(range(16))
        part = cdslm.noise_levels(t.config, t.diffusion, step, range(4, 8))
        assert torch.equal(part, phi[4:8])


def test_contexts_are_dropped_as_often_as_asked(small):
    for share, low, high in ((0.0, 0, 0), (0.3, 0.2, 0.4), (1.0, 1, 1)):
        config = small(ctx_drop=share, batch_size=200)
        assert low <= cdslm.dropped(config, 0, range(200)).float().mean() <= high


def test_context_and_continuation_follow_each_other(trainer):
    t = trainer()
    window = torch.from_numpy(t.corpus.windows("mel", "train", [5], 96))
    ctx, x0 = t.frames(window)
    assert (ctx.shape[1], x0.shape[1]) == (32, 64)
    assert torch.equal(torch.cat([ctx, x0], 1), t.autoencoder.from_mel(window))


@pytest.mark.parametrize("rank, ranks, micro", [(0, 1, 0), (0, 1, 2), (1, 2, 0), (1, 2, 1)])
def test_every_window_is_read_once_and_in_its_order(trainer, rank, ranks, micro):
    """By this rank: its share of the batch of every step, a micro-batch after the other."""
    t, read = trainer(micro_batch=micro, steps=3), []
    t.hardware.rank, t.hardware.ranks = rank, ranks
    original, share = t.read, 4 // ranks
    t.read = lambda step, part: (read.append((step, part)), original(step, part))[1]
    for _ in range(3):
        t.step()
    windows = [(step, i) for step, part in read for i in part]
    expected = [(step, i) for step in range(4) for i in range(rank * share, (rank + 1) * share)]
    assert windows == expected[:len(windows)] and len(windows) >= 3 * share


def test_on_a_gpu_a_batch_is_copied_beside_the_step_before(trainer, monkeypatch):
    """In a stream of its own, which the step waits for; the memory is not given away before it has used it."""
    events, same = [], trainer()
    stream = types.SimpleNamespace(wait_stream=lambda other: events.append(f"the step waits for {other}"))

    @contextlib.contextmanager
    def inside(name):
        events.append(f"copy in {name}")
        yield
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (events.append("pin"), tensor)[1])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, user: events.append(("used in", user)))
    t = trainer()
    t.copy_stream = "a side stream"
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: events.append(f"the thread uses {device}"))
    first, whole = next(t.micro_batches()), batch(same)
    assert events.pop(0) == "the thread uses cpu"
    assert events[:4] == ["copy in a side stream", "pin", "the step waits for a side stream", ("used in", stream)]
    assert all(map(torch.equal, first, whole))


def test_training_lowers_the_loss_on_a_fixed_batch(trainer):
    t = trainer(steps=40, warmup=5, self_condition=0.0)
    t.batches = itertools.repeat(batch(t))
    first = stepped(t)["loss"]
    for _ in range(39):
        last = stepped(t)["loss"]
    assert last < 0.5 * first


@pytest.mark.parametrize("predict, optimizer", [("v", "adamw"), ("x0", "adamw"), ("v", "muon")])
def test_every_way_of_training_lowers_the_loss(trainer, predict, optimizer):
    t = trainer(steps=60, warmup=2, predict=predict, optimizer=optimizer, patch_size=2, lr=3e-3, ema=0.5,
                min_snr_gamma=5.0)
    before = t.validate(8)["mean"]
    for _ in range(60):
        t.step()
    assert t.validate(8)["mean"] < 0.9 * before


def test_the_average_is_an_exponential_one_with_a_short_memory_at_first(trainer):
    t = trainer(ema=0.4)
    expected = weights(t).clone()
    for done in range(6):
        t.step()
        memory = min(0.4, (1 + done) / (10 + done))
        expected = memory * expected + (1 - memory) * weights(t)
    assert torch.allclose(torch.cat([p.flatten() for p in t.ema.parameters()]), expected, atol=1e-6)


def test_without_memory_the_average_is_the_model(trainer):
    t = trainer(ema=0.0)
    t.step()
    assert torch.allclose(torch.cat([p.flatten() for p in t.ema.parameters()]), weights(t))


def test_gradients_are_clipped(trainer):
    t = trainer(clip=1e-3, optimizer="adamw")
    norms = []
    for optimizer in t.optimizers:
        optimizer.step = lambda: norms.append(sum(p.grad.norm() ** 2 for p in t.model.parameters()
                                                  if p.grad is not None) ** 0.5)
    assert stepped(t)["gradient"] > 1e-3
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("scaler", [True, False])
def test_a_step_that_is_not_finite_is_skipped_and_counted(trainer, scaler):
    """On a Mac's GPU there is no scaler that skips it."""
    t = trainer()
    assert t.hardware.scaler.is_enabled()
    t.hardware.scaler = torch.amp.GradScaler("cpu", enabled=scaler)
    t.step()
    before, average = weights(t).clone(), [p.clone() for p in t.ema.parameters()]
    good = t.batches
    t.batches = iter([[x * float("nan") for x in next(good)]])
    assert stepped(t)["skipped"] == 1
    assert torch.equal(weights(t), before) and all(map(torch.equal, average, t.ema.parameters()))
    t.batches = good
    for optimizer, spoilt in ((0, float("nan")), (-1, float("inf")), (-1, float("nan"))):     # AdamW's; Muon's
        parameter = t.optimizers[optimizer].param_groups[0]["params"][0]
        hook = parameter.register_hook(lambda gradient, spoilt=spoilt: gradient + spoilt)
        assert not math.isfinite(stepped(t)["gradient"]) and torch.equal(weights(t), before)
        hook.remove()
    t.skipped = 1
    row = stepped(t)
    assert row["skipped"] == 1 and math.isfinite(row["loss"]) and not torch.equal(weights(t), before)


def test_validation_is_fixed_and_shows_every_noise_level(trainer):
    t = trainer()
    one, again = t.validate(8), t.validate(8)
    assert one == again and len(one) == 11
    levels = [float(level) for level in one if level != "mean"]
    assert levels == sorted(levels, reverse=True) and max(levels) > 4 and min(levels) < -4
    assert one["mean"] == pytest.approx(sum(v for k, v in one.items() if k != "mean") / 10)


def test_schedules_are_validated_alike(trainer):
    """A new model says 0 whatever its schedule, so the losses must agree."""
    assert trainer(schedule="linear").validate(8) == trainer(schedule="exponential").validate(8)


def test_a_run_leaves_what_it_should(trained):
    folder, said = trained
    assert {"config.json", "checkpoint.pt", "checkpoint.previous.pt", "log.jsonl"} <= {p.name for p in folder.iterdir()}
    sounds = {path.name: load_audio(path) for path in folder.glob("*.wav")}
    assert len(sounds) == 12 and all(len(wave) == 96 * 300 for wave in sounds.values())
    for i in range(1, 5):
        context = slice(2400, 6000)
        true, again = sounds[f"{i}_true.wav"], sounds[f"{i}_reconstruction.wav"]
        loudness = [wave[context].square().mean().sqrt().item() for wave in (true, again)]
        assert loudness[1] == pytest.approx(loudness[0], rel=0.6, abs=0.004)
    for word in ("parameters", "cpu", "float32", "FLOP", "listen", "sample.py"):
        assert word in said


def test_the_log_has_a_row_a_step(trained):
    rows = [json.loads(line) for line in (trained[0] / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert {"loss", "lr", "hours", "epochs", "frames/s"} <= set(rows[0])
    assert [row["step"] for row in rows if "valid" in row] == [5, 10]
    assert rows[-1]["hours"] == pytest.approx(10 * 4 * 1.2 / 3600)
    size = count(read_config(trained[0]))
    assert rows[-1]["tokens"] == 40 * size["tokens"]
    assert rows[-1]["flops"] == pytest.approx(40 * size["flops"])


def test_a_first_guess_in_bf16_leaves_every_weight_its_gradient(trainer):
    """Autocast may keep what it cast without gradients."""
    t = trainer(self_condition=1.0)
    (ctx, x0, eps), phi = batch(t), torch.ones(4)
    with torch.no_grad():
        for parameter in t.model.parameters():
            parameter.normal_(std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        t.diffusion.loss(t.model, x0, ctx, phi, eps, self_condition=True).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in t.model.parameters())


def test_bf16_trains_too(trainer):
    t = trainer()
    t.hardware.dtype = torch.bfloat16
    assert all(math.isfinite(stepped(t)["loss"]) for _ in range(2))
    assert weights(t).dtype == torch.float32


class Products(TorchDispatchMode):
    """Notes the types of all matrix products."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "addbmm", "linear"):
            self.seen |= {x.dtype for x in arguments if isinstance(x, torch.Tensor)}
        return function(*arguments, **options or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_in_float32_multiplies_nothing_in_bf16(trainer, dtype):
    """Where bf16 is emulated, a single product in it, in the optimiser for instance, makes a step 20 times as slow."""
    t = trainer(optimizer="muon")
    t.hardware.dtype, t.optimizers = dtype, cdslm.make_optimizers(t.model, t.config, dtype)
    with Products() as products:
        t.step()
    assert products.seen == {dtype}


@pytest.mark.parametrize("device, steps, asked, compiled", [
    ("cuda", 20_000, None, True), ("cuda", 200, None, False), ("cpu", 20_000, None, False), ("cpu", 200, True, True),
    ("cuda", 20_000, False, False)])
def test_long_runs_on_cuda_are_compiled(device, steps, asked, compiled, small, monkeypatch):
    """Unless they can't be: without Triton, as on Windows, or on an old GPU."""
    config, triton, capability = small(steps=steps, compile=asked), "triton", (7, 0)
    monkeypatch.setattr(cdslm.importlib.util, "find_spec", lambda name: {"triton": triton}[name])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cdslm.compiles(config, torch.device(device)) == compiled
    for triton, capability in ((None, (9, 0)), ("triton", (6, 1))):
        assert cdslm.compiles(config, torch.device(device)) == bool(asked)


def test_a_row_waits_for_one_step_and_for_no_checkpoint(mute, small, monkeypatch, tmp_path):
    """Its loss is asked for when the next step is under way; before a checkpoint, all are written."""
    happened = []
    for name in ("step", "finish", "save"):
        original = getattr(cdslm.Trainer, name)

        def note(t, *rest, name=name, original=original):
            happened.append(name)
            return original(t, *rest)
        monkeypatch.setattr(cdslm.Trainer, name, note)
    train(small(steps=4, eval_every=2, lr_schedule="wsd"))
    assert happened[:5] == ["step", "step", "finish", "finish", "save"]
    assert happened[5:] == ["step", "finish", "save"] * 2             # the trunk, from where the rate decays; the end
    assert [row["step"] for row in log(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("seconds, steps", [(0.1, 4500), (0.2, 4500), (0.45, 2200), (60, 80)])
def test_a_slow_machine_takes_fewer_steps(capsys, monkeypatch, seconds, steps):
    """Ten seconds were spent before. 20 minutes are enough for 4,500 steps of 0.2 s; twice the trial is the least."""
    monkeypatch.setattr(plan, "LAUNCHED", time.perf_counter() - 10)
    config = cdslm.Config()
    plan.keep_to_time(config, plan.TRIAL, seconds)
    assert config.steps == steps
    assert ("--steps 4500" in capsys.readouterr().out) == (steps < 4500)
    short = cdslm.Config(steps=50, minutes=0.01)
    assert not plan.keep_to_time(short, plan.TRIAL, seconds) and short.steps == 50      # never more than asked for


def test_a_shortened_run_stays_as_short(mute, small, monkeypatch, capsys):
    """The same command goes on with as many steps as it chose; --steps makes it longer."""
    monkeypatch.setitem(cdslm.SIZES, "tiny", cdslm.SIZES["tiny"] | dict(steps=60, minutes=1e-9))
    monkeypatch.setattr(plan, "TRIAL", 12)
    settings = dict(steps=None)
    train(small(**settings))
    assert "training for 24 instead" in capsys.readouterr().out
    train(small(**settings))
    assert newest(Path(small().out))["step"] == cdslm.read_config(small().out).steps == 24
    train(small(steps=30))
    assert newest(Path(small().out))["step"] == 30


MISTAKES = {                                      # in the order in which they are told
    "--parallel fsdp needs torchrun": dict(parallel="fsdp"),
    "nosuch: no such folder": dict(data="nosuch"),
    "choose another --out": dict(out="holds"),
    "GiB on each device": dict(width=8192, depth=64),
}


@pytest.mark.parametrize("first, second", [*itertools.combinations(MISTAKES, 2)])
def test_flags_come_before_folders_and_these_before_the_disk(small, tmp_path, monkeypatch, first, second):
    """Of two mistakes the cheaper is told, at once: nothing is synthesised, trained or written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "holds").mkdir()
    (tmp_path / "holds/log.jsonl").write_text("of something else")
    monkeypatch.setattr(cdslm, "open_corpus", lambda config: pytest.fail("work began"))
    with pytest.raises(UserError, match=first):
        train(small(**MISTAKES[second] | MISTAKES[first]))
    assert not (tmp_path / "run").exists()


def test_mistyped_data_does_not_spoil_the_folder(mute, small, tmp_path):
    with pytest.raises(UserError, match="--data"):
        train(small(data=str(tmp_path / "mistyped")))
    train(small(steps=1))


def test_silent_recordings_are_a_users_error(mute, small, tmp_path):
    import soundfile
    (tmp_path / "silent").mkdir()
    soundfile.write(tmp_path / "silent/a.wav", 0 * speech_like(60, 8000), 8000)
    with pytest.raises(UserError, match="silent"):
        train(small(data=str(tmp_path / "silent")))


@pytest.mark.parametrize("changes", [dict(data="/no/such/folder"), dict(steps=0)])
def test_a_mistake_is_one_line_and_status_2(tmp_path, changes):
    done = command("cdslm.py", *flags(**SMALL | dict(out=tmp_path / "run") | changes))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the recorded digits are not here")
def test_real_speech_is_learned(mute, small):
    config = small(data=str(REAL), steps=60, width=128, warmup=5, batch_size=8, ema=0.9, eval_every=30)
    train(config)
    rows = [json.loads(line) for line in open(f"{config.out}/log.jsonl")]
    assert rows[-1]["valid"]["mean"] < 0.9 * rows[29]["valid"]["mean"]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]


def test_validation_is_under_the_papers_weight_whatever_was_trained(trainer):
    """A smaller gamma is another loss to train, and the same to be judged by."""
    steps, losses = zip(*[(stepped(t)["loss"], t.validate(8)["mean"])
                          for t in (trainer(min_snr_gamma=gamma, lr=1e-9, muon_lr=1e-9) for gamma in (0.2, 5.0))])
    assert steps[0] < 0.5 * steps[1] and losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_ruler_does_not_move_when_a_student_changes_the_loss(trainer, monkeypatch):
    """Another weight, schedule or distribution of times trains otherwise, but is judged alike."""
    t = trainer()
    t.step()
    before = t.validate(8)
    for name, change in (("weight", lambda self, phi: 7.0 + 0 * phi), ("times", lambda self, u: u ** 3),
                         ("alpha", lambda self, t: 1 - t)):
        monkeypatch.setattr(cdslm.Diffusion, name, change)
    assert t.validate(8) == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells which files are mapped")
def test_a_run_that_goes_on_leaves_its_checkpoint_free(trainer, tmp_path):
    """Windows replaces no file that is mapped."""
    t, path = trainer(optimizer="muon"), tmp_path / "free.pt"
    stepped(t)
    t.save(path)
    found = load(path, mmap=True)
    assert str(path) in Path("/proc/self/maps").read_text()
    other = trainer(optimizer="muon")
    other.restore(found)
    del found
    assert str(path) not in Path("/proc/self/maps").read_text() and other.done == 1


def test_a_row_says_how_long_its_batch_was_waited_for(trainer, monkeypatch):
    t = trainer()
    read = t.read
    monkeypatch.setattr(t, "read", lambda *where: (time.sleep(0.2), read(*where))[1])
    assert 0.2 <= t.step()["wait"] < 5
    time.sleep(1)                                             # now the next batch is there
    assert t.step()["wait"] < 0.1


def test_a_run_goes_on_from_before_its_first_self_conditioned_step(trainer, tmp_path):
    """The weights that only such steps use have no optimiser state yet."""
    for optimizer in ("muon", "adamw"):
        settings = dict(optimizer=optimizer, self_condition=1e-9)
        straight, first, second = (trainer(**settings) for _ in range(3))
        for t in (straight, straight, first):
            stepped(t)
        first.save(tmp_path / "early.pt")
        second.restore(load(tmp_path / "early.pt"))
        stepped(second)
        assert torch.equal(weights(straight), weights(second))
        state = [optimizer.state for optimizer in second.optimizers]
        assert not any(second.model.enter_guess.weight in known for known in state)


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_a_gpu_without_bf16_computes_in_float32(monkeypatch, small, capability, dtype):
    """Not in float16, whose largest number a trained model exceeds."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    assert cdslm.decide(small(device="cuda:0", dtype="auto"))[1] == dtype
    assert cdslm.decide(small(device="cuda:0", dtype="fp32"))[1] == torch.float32


def test_on_windows_a_file_that_is_read_is_replaced_a_moment_later(tmp_path, monkeypatch):
    path, replace, tries = tmp_path / "checkpoint.pt", os.replace, []

    def busy(old, new):
        tries.append(old)
        if len(tries) < 3:
            raise PermissionError("another program reads it")
        replace(old, new)

    monkeypatch.setattr(cdslm, "RETRIES", 50)
    monkeypatch.setattr(cdslm.os, "replace", busy)
    monkeypatch.setattr(cdslm.time, "sleep", lambda seconds: None)
    with cdslm.replacing(path) as temporary:
        temporary.write_text("new")
    assert len(tries) == 3 and path.read_text() == "new"
