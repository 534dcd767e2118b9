import dataclasses
import json

import pytest

import cdslm
from cdslm import SIZES, Config, parse
from cdslm import UserError


def test_help_names_every_field_and_its_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')} " in text
        assert field.metadata["help"][:20] in text


@pytest.mark.parametrize("size", SIZES)
def test_a_size_names_depth_width_and_windows(size):
    config = Config(size=size)
    assert config.width == (192 if size == "tiny" else 128 * config.depth)
    assert config.ctx_frames % config.patch_size == config.gen_frames % config.patch_size == 0
    assert config.ctx_frames == round(80 * config.ctx_seconds) and config.gen_frames == round(80 * config.gen_seconds)
    assert config.out == f"out/{size}"
    assert [name for name, value in vars(config).items() if value is None] == ["compile"]         # known with the device


def test_large_sizes_are_the_papers():
    depths = {"base": 4, "medium": 8, "large": 12, "xl": 16, "11b": 27, "16b": 30}
    for size, depth in depths.items():
        config = Config(size=size)
        assert (config.depth, config.ctx_seconds, config.gen_seconds, config.predict) == (depth, 10, 30, "v")


def test_flags_override_the_size():
    config = parse(["--size", "small", "--steps", "7", "--predict", "v", "--zero-terminal-snr", "--ctx-drop", "0.1"])
    assert config == Config(size="small", steps=7, predict="v", zero_terminal_snr=True, ctx_drop=0.1)


def test_data_may_be_several_folders():
    assert parse(["--data", "a", "b c", "--steps", "7"]) == Config(data=["a", "b c"], steps=7)
    assert parse(["--data", "toy"]) == Config()


def test_defaults_of_the_paper():
    config = Config()
    assert (config.ctx_drop, config.latent_dim, config.seed) == (0.0, 0, 0)


@pytest.mark.parametrize("patch", [1, 2, 3, 5, 7, 8])
def test_windows_are_whole_patches_whatever_the_patch(patch):
    config = Config(patch_size=patch)
    assert config.ctx_frames % patch == config.gen_frames % patch == 0
    assert abs(config.gen_frames - 240) < patch


@pytest.mark.parametrize("arguments", [
    "--size huge", "--steps 0", "--steps x", "--steps 1.5", "--lr 0", "--lr nan", "--lr inf", "--batch-size -1",
    "--predict eps", "--schedule sigmoid", "--decoder mp3", "--dtype fp8", "--ctx-drop 1.5", "--ctx-drop -0.1",
    "--ema 1.5", "--toy-hours 0", "--toy-words 1", "--toy-languages 0", "--seed -1", "--patch-size 0", "--width 100",
    "--gen-seconds 0", "--ctx-seconds 0.01", "--min-snr-gamma 0", "--clip 0", "--eval-every 0", "--latent-dim -1",
    "--batch-size 8 --micro-batch 3", "--no-such-flag 1", "--steps", "stray", "--ste 5",
])
def test_a_bad_value_is_a_users_error_of_one_line_that_names_it(arguments):
    with pytest.raises(UserError) as error:
        parse(arguments.split())
    message = str(error.value)
    assert "\n" not in message
    assert arguments.split()[0].lstrip("-").split("-")[0] in message


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_a_users_error(small, device):
    with pytest.raises(UserError, match="--device"):
        cdslm.decide(small(device=device))


def test_what_was_asked_for_is_decided(small):
    device, dtype = cdslm.decide(small(device="cpu", dtype="bf16"))
    assert (str(device), str(dtype)) == ("cpu", "torch.bfloat16")


def test_a_dry_run_says_what_would_be_and_makes_nothing(monkeypatch, capsys, tmp_path):
    out = tmp_path / "none"
    monkeypatch.setattr("sys.argv", ["cdslm.py", "--size", "16b", "--dry-run", "--json", "--out", str(out)])
    cdslm.main()
    facts = json.loads(capsys.readouterr().out)
    assert abs(facts["parameters"] / 15.8e9 - 1) < 0.03
    assert facts["flops_per_step"] > 0
    assert not out.exists()
