"""lab.roofline: what a GPU would be told to do, counted without one."""
import pytest
import torch

from cdslm import Config, UserError, count
from lab.roofline import main, step


def test_flops_are_those_that_the_trainer_counts():
    """Both count a pass without self-conditioning; attention backward is 2.5 times forward here, 2 times there."""
    config = Config(size="base", batch_size=2)
    parts, launches = step(config)
    flops = sum(flops for flops, _ in parts.values()) * 1e12
    assert flops == pytest.approx(2 * count(config)["flops"], rel=0.1)
    assert launches > 100


def test_bytes_grow_with_the_batch_and_micro_batches_launch_more():
    whole, launches = step(Config(size="tiny", batch_size=8))
    twice, same = step(Config(size="tiny", batch_size=16))
    split, more = step(Config(size="tiny", batch_size=16, micro_batch=8))
    assert same == launches and more == 2 * launches
    assert 1.8 < twice["element by element"][1] / whole["element by element"][1] <= 2
    assert split["element by element"][1] == pytest.approx(2 * whole["element by element"][1])
    assert split["norm, AdamW, EMA"] == whole["norm, AdamW, EMA"]


def test_attention_is_one_kernel_forward_and_one_backward():
    """The bytes: queries, keys, values and result forward; the same and their gradients backward."""
    config = Config(size="tiny", batch_size=1)
    parts, _ = step(config)
    tokens = (config.ctx_frames + config.gen_frames) // config.patch_size
    tensor = tokens * config.width * torch.bfloat16.itemsize
    assert parts["attention"][1] * 1e9 == pytest.approx(config.depth * 12 * tensor)


def test_the_program_prints_what_bounds_a_step_and_refuses_nonsense(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["roofline", "--size", "tiny"])
    main()
    assert "so a step takes" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["roofline", "--bandwidth", "0"])
    with pytest.raises(UserError, match="more than 0"):
        main()
