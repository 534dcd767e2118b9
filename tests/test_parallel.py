"""Many devices: here two processes on a CPU, which talk through gloo."""
import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time

import pytest
import torch

import cdslm
from cdslm import load, load_run, train
from cdslm import UserError
from lab import process as own_process
from tests.conftest import SMALL, command, flags
from tests.test_training import log

RUN = SMALL | dict(depth=2, steps=4, eval_every=2, optimizer="adamw", self_condition=0.5, ctx_drop=0.3)


def program(words, place, said, fault):
    """What `python cdslm.py WORDS` does as one of torchrun's processes, but for sound; it says it to a file. A `fault`
    is a signal that this process gets in a step."""
    os.environ.update(place)
    sys.stdout = sys.stderr = open(said, "w", buffering=1)
    sys.argv, step = ["cdslm.py", *words], cdslm.Trainer.step

    def faulty(trainer):
        for number in fault[1:] if fault and trainer.done == fault[0] else ():
            os.kill(os.getpid(), number)
        return step(trainer)

    if fault and fault[0] == 99:                                       # as on a node with a disk of its own
        open_autoencoder = cdslm.open_autoencoder
        def other(*arguments):
            autoencoder = open_autoencoder(*arguments)
            autoencoder.mel_stats += 0.5
            return autoencoder
        cdslm.open_autoencoder = other

    cdslm.Trainer.step, cdslm.listen = faulty, lambda *_: print("listen")
    cdslm.cli(cdslm.main)


def run(folder, ranks=2, fault=None, outs=None, **settings):
    """Run as `torchrun --nproc_per_node=RANKS` would; the last rank has the fault. `outs`: each rank's own run folder,
    as on nodes that share no disk. [(exit status, lines), ...]"""
    processes, folder = multiprocessing.get_context("forkserver"), folder / "said"
    processes.set_forkserver_preload([__name__])                       # torch is imported once
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(ranks))
    begun = []
    for rank in range(ranks):
        here = place | dict(RANK=str(rank), LOCAL_RANK=str(rank)) if ranks > 1 else {}
        words = flags(**RUN | dict(out=outs[rank] if outs else folder.parent / "run") | settings)
        words = [word for word in words if word != "True"]             # --compile has no value
        begun.append(processes.Process(target=program, args=(
            words, here | {"CDSLM_CACHE": os.environ["CDSLM_CACHE"]}, folder / str(rank), fault if rank == ranks - 1
            else None)))
        begun[-1].start()
    for process in begun:
        process.join(120)
    texts = [(folder / str(rank)).read_text().splitlines() for rank in range(ranks)]
    return [(process.exitcode, [line for line in lines if "step/s]" not in line and "window/s]" not in line])
            for process, lines in zip(begun, texts)]


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    """The folder of a run on one device."""
    folder = tmp_path_factory.mktemp("alone")
    ((status, said),) = run(folder, ranks=1)
    assert status == 0, said
    return folder / "run"


def assert_alike(folder, other):
    """The same run but for rounding in float32."""
    for kind in ("model", "ema"):
        one, two = (torch.cat([tensor.flatten() for tensor in load(where / "checkpoint.pt")[kind].values()])
                    for where in (folder, other))
        assert (one - two).norm() < 1e-5 * one.norm(), kind
    for row, expected in zip(log(folder), log(other), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["gradient"] == pytest.approx(expected["gradient"], rel=1e-4)
        assert row.get("valid", {}) == pytest.approx(expected.get("valid", {}), rel=1e-5)
        for name in ("step", "tokens", "flops", "hours"):
            assert row[name] == expected[name]


@pytest.mark.parametrize("settings", [
    dict(parallel="ddp", micro_batch=1),
    pytest.param(dict(parallel="fsdp", checkpoint_activations=True), marks=pytest.mark.slow),
    pytest.param(dict(parallel="fsdp", micro_batch=1), marks=pytest.mark.slow),
    pytest.param(dict(parallel="ddp", compile=True), marks=pytest.mark.slow)], ids=str)
def test_two_ranks_are_the_run_on_one_device(alone, tmp_path, settings):
    (status, said), (other, whispered) = run(tmp_path, **settings)
    assert (status, other) == (0, 0), said + whispered
    assert "2 x cpu" in " ".join(said) and (not whispered or "compile" in settings)      # where torch itself warns
    assert_alike(tmp_path / "run", alone)
    assert said[-1] == "listen" and load_run(tmp_path / "run")[0].parallel == settings["parallel"]


@pytest.mark.slow
def test_muon_on_two_ranks_is_muon_on_one(tmp_path):
    """Its bf16 iterations round a little more."""
    for ranks, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        folder.mkdir()
        assert [status for status, _ in run(folder, ranks=ranks, optimizer="muon")] == [0] * ranks
    for row, other in zip(log(tmp_path / "one/run"), log(tmp_path / "two/run"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.parametrize("ways", [
    ("ddp", "one"), pytest.param(("fsdp", "one", "ddp"), marks=pytest.mark.slow),
    pytest.param(("one", "fsdp", "one"), marks=pytest.mark.slow)], ids=" ".join)
def test_a_run_goes_on_with_another_number_of_ranks(alone, tmp_path, ways):
    """One of the ranks is told to stop: all finish the same step, and leave one checkpoint."""
    for at, way in enumerate(ways):
        alone_now, last = way == "one", at == len(ways) - 1
        ended = run(tmp_path, 1 if alone_now else 2, None if last else (at, signal.SIGTERM),
                    parallel="ddp" if alone_now else way)
        assert [status for status, _ in ended] == [0 if last else 143] * len(ended), ended
        assert last or f"stopped after step {at + 1}; the same command goes on" in ended[0][1][-1]
    assert_alike(tmp_path / "run", alone)


def test_a_checkpoint_is_saved_by_the_clock_too(mute, small, monkeypatch):
    steps, save = [], cdslm.Trainer.save
    monkeypatch.setattr(cdslm.Trainer, "save", lambda t, path: (steps.append(t.done), save(t, path)))
    train(small(steps=3, eval_every=100, lr_schedule="cosine", save_minutes=1e-9))
    assert steps == [1, 2, 3]


@pytest.mark.slow
def test_signals_that_torchrun_forwards_count_as_one(tmp_path):
    """SLURM signals every process, and torchrun signals them once more."""
    ended = run(tmp_path, fault=(1, signal.SIGTERM, signal.SIGTERM))
    assert [status for status, _ in ended] == [143, 143], ended
    assert load(tmp_path / "run/checkpoint.pt")["step"] == 2


def test_the_signal_of_a_batch_system_counts(mute, small, tmp_path, monkeypatch):
    step = cdslm.Trainer.step

    def warned(trainer):
        if trainer.done == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(trainer)

    monkeypatch.setattr(cdslm.Trainer, "step", warned)
    with pytest.raises(SystemExit) as stopped:
        train(small(steps=5))
    assert stopped.value.code == 128 + signal.SIGUSR1 and load(tmp_path / "run/checkpoint.pt")["step"] == 2


@pytest.mark.slow
def test_nodes_without_a_shared_disk_are_told_so(tmp_path, monkeypatch):
    """The last rank finds another decoder."""
    ended = run(tmp_path, fault=(99, 0))
    assert [status for status, _ in ended] == [2, 2]
    assert any("on a disk that all nodes share" in line for line in ended[0][1])


def test_a_node_that_does_not_see_the_run_folder_is_told_so(tmp_path):
    (_, said), (status, whispered) = run(tmp_path, outs=[tmp_path / "one", tmp_path / "two"])
    assert status == 2 and len(whispered) == 1 and "put it on a disk that all nodes share" in whispered[0]
    assert said[-1].startswith("error: rank 0: another rank stopped") and not (tmp_path / "two").exists()


@pytest.mark.slow
def test_a_node_that_would_go_on_from_another_step_is_told_so(alone, tmp_path):
    """As where the run folder was copied to each node, once before the last checkpoint."""
    outs = [shutil.copytree(alone, tmp_path / name) for name in ("one", "two")]
    (outs[1] / "checkpoint.previous.pt").replace(outs[1] / "checkpoint.pt")
    ended = run(tmp_path, outs=outs)
    assert [status for status, _ in ended] == [2, 2]
    assert all("another checkpoint; put --data" in said[-1] for _, said in ended)


@pytest.mark.parametrize("kind, backends", [("cuda", "cpu:gloo,cuda:nccl"), ("cpu", "gloo"), ("mps", "gloo")])
def test_what_lies_in_a_cpus_memory_is_exchanged_by_gloo(monkeypatch, kind, backends):
    """Also where tensors of GPUs are exchanged by NCCL: NCCL alone would refuse the signals."""
    monkeypatch.setattr(cdslm, "ranks", lambda: (0, 2))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    asked = []
    monkeypatch.setattr(cdslm.dist, "init_process_group", lambda backend, timeout: asked.append(backend))
    monkeypatch.setattr(cdslm.dist, "destroy_process_group", lambda: None)
    with cdslm.together(torch.device(kind)):
        assert asked == [backends]


def test_srun_without_the_variables_of_a_launcher_is_recognised(monkeypatch, small, tmp_path):
    """64 processes would each be rank 0 of 1."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "64")
    with pytest.raises(UserError, match="srun has started 64 processes, and each would train alone"):
        train(small())
    assert not (tmp_path / "run").exists()
    for name, value in dict(RANK="0", WORLD_SIZE="64", MASTER_ADDR="here", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="must divide evenly over 64 devices"):
        train(small())


@pytest.mark.parametrize("launched", [False, True])
def test_torchrun_of_one_process_may_send_a_signal_twice(monkeypatch, launched):
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    noted = []
    with own_process.interruptible(noted):
        os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.nullcontext() if launched else pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
    assert noted == 2 * [signal.SIGTERM]


def test_if_a_rank_dies_the_others_stop_with_one_line(tmp_path):
    (status, said), (killed, _) = run(tmp_path, fault=(3, signal.SIGKILL))
    assert (status, killed) == (2, -signal.SIGKILL)
    assert said[-1].startswith("error: rank 0: another rank stopped") and "Traceback" not in " ".join(said)
    assert load(tmp_path / "run/checkpoint.pt")["step"] == 2


def test_each_rank_says_what_is_wrong_in_one_line(tmp_path):
    """Also one that is alone, with the variables of a launcher left over."""
    for rank, (status, said) in enumerate(run(tmp_path, batch_size=3)):
        assert status == 2 and len(said) == 1
        assert said[0].startswith(f"error: rank {rank}: --batch-size 3 must divide evenly over 2 devices")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings, why", [
    (dict(parallel="fsdp"), "torchrun"), (dict(parallel="fsdp", optimizer="muon"), "--optimizer adamw"),
    (dict(batch_size=6, micro_batch=2), "divide evenly")])
def test_what_can_not_be_spread_is_a_users_error(monkeypatch, small, tmp_path, settings, why):
    if why != "torchrun":
        for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1").items():
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=why) as error:
        train(small(**RUN | settings))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_with_a_compiler_that_is_not_there_it_goes_on_too(tmp_path):
    words = flags(**RUN | dict(out=tmp_path / "run", steps=1)) + ["--compile"]
    done = command("cdslm.py", *words, env=os.environ | dict(CXX="/no/such", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("most", [2 ** 25, 2 ** 31])
def test_malloc_maps_as_little_as_the_system_allows(monkeypatch, most):
    asked = {}
    def mallopt(what, size):
        if what == -3 and size > most:
            return 0
        asked[what] = size
        return 1
    monkeypatch.setattr(own_process.ctypes, "CDLL", lambda name: type("libc", (), {"mallopt": staticmethod(mallopt)}))
    own_process.keep_memory()
    assert asked == {-1: 2 ** 30, -3: min(most, 2 ** 30)}


def test_ranks_share_the_work_of_muon(monkeypatch):
    from lab import muon
    torch.manual_seed(0)
    for count, ranks in ((1, 2), (4, 2), (5, 3)):
        matrices, shares = torch.randn(count, 6, 4), []
        monkeypatch.setattr(muon.dist, "get_world_size", lambda: ranks)
        monkeypatch.setattr(muon.dist, "all_gather", lambda whole, mine: shares.append(mine))
        for rank in range(ranks):
            monkeypatch.setattr(muon.dist, "get_rank", lambda: rank)
            muon.orthogonalize_shared(matrices, torch.float32)
        assert [len(part) for part in shares] == [-(-count // ranks)] * ranks
        assert torch.equal(torch.cat(shares)[:count], cdslm.orthogonalize(matrices, torch.float32))
