"""The measurements themselves: turns, FLOPs, and (slow) that every part of bench.py runs."""

import os
import re
import subprocess
import sys

import pytest
import torch
from lab.bench import Step, block_flops, blocks_step, our_blocks, race
from tests.conftest import ROOT, command
from torch.utils.flop_counter import FlopCounterMode


def test_contestants_take_turns_and_the_first_turn_is_not_counted():
    order = []
    seconds = race(2, a=lambda: order.append("a"), b=lambda: order.append("b"))
    assert order == list("ababab") and set(seconds) == {"a", "b"} and 0 < seconds["a"] < 1


def test_flops_of_the_blocks_are_those_that_torch_counts(small):
    config = small(depth=2, width=128, batch_size=2)
    step = blocks_step(config, our_blocks)
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == block_flops(config)


def test_a_step_changes_the_model(small):
    step = Step(small())
    before = [parameter.clone() for parameter in step.model.parameters()]
    step()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.model.parameters()))
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_help_waits_for_nothing_that_only_training_needs():
    code = "import sys, cdslm; print(*sys.modules)"
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout.split()
    )
    assert not loaded & {
        "torch.distributed.checkpoint",
        "sympy",
        "scipy",
        "lab.toyspeech",
        "lab.plan",
    }


@pytest.mark.slow
@pytest.mark.parametrize("what", "step parts sampling speed data startup".split())
def test_every_part_prints_a_table_of_numbers(what, trained):
    done = command("lab.bench", what, trained[0], "--quick")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[-2] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert sum(bool(re.search(r"\d", row)) for row in rows) >= 1


@pytest.mark.slow
def test_on_an_emulated_laptop_muon_is_no_slower_than_the_network():
    """On a processor without bf16 torch's own takes 20 times as long as the network."""
    done = command(
        "lab.bench", "parts", "--emulate", "avx2", env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    assert done.returncode == 0, done.stderr
    rows = {
        cells[1].strip(): float(cells[3])
        for line in done.stdout.splitlines()
        if line.startswith("| ") and (cells := line.split("|"))[1].strip() in ("Muon", "AdamW")
    }
    print(done.stdout)
    assert "AVX2, float32" in done.stdout and "bf16 in hardware: False" in done.stdout
    assert rows["AdamW"] < 0.1 and rows["Muon"] < 0.7
