"""The autoencoder: shapes, silence, chunks, and held-out speech side by side with Griffin-Lim."""
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from cdslm import AudioAutoencoder, Config, decide, fit_autoencoder, new_autoencoder, open_autoencoder, save
from lab.listener import load_listener
from cdslm import DECODER_FFT, HOP, MELS, RATE, UserError, griffin_lim, istft, keyed, log_mel, open_corpus, stft, unmel

REAL = Path(__file__).parents[2] / "shared/data/fsdd"
CPU = torch.device("cpu")


def shaped(seed=0, **options):
    """A neural autoencoder that shapes at random: untrained ones pass the source on as it is."""
    torch.manual_seed(seed)
    model = AudioAutoencoder(**options).eval().requires_grad_(False)
    for parameter in model.shaper[-1].parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def babble(seconds=2.0, batch=2):
    """(B, N) pulses under a slow envelope: something voiced."""
    time = torch.arange(round(seconds * RATE)) / RATE
    pitch = torch.tensor([120.0, 210.0])[:batch, None]
    return 0.05 * (torch.cos(2 * torch.pi * pitch * time) > 0.95) * (0.6 + 0.4 * torch.sin(2 * torch.pi * 3 * time))


@pytest.mark.parametrize("options", [{}, {"decoder": "griffinlim"}, {"latent_dim": 16}])
@pytest.mark.parametrize("samples", [1, 299, 300, 301, 24_000])
def test_shapes(options, samples):
    model = new_autoencoder(Config(**options)).eval()
    frames = model.encode(torch.zeros(2, samples))
    assert frames.shape == (2, -(-samples // HOP), options.get("latent_dim") or MELS)
    assert model.decode(frames).shape == (2, frames.shape[1] * HOP)


@pytest.mark.parametrize("decoder", ["neural", "griffinlim"])
def test_silence_stays_silent(decoder):
    model = AudioAutoencoder(decoder=decoder)
    with torch.no_grad():
        assert model.decode(model.encode(torch.zeros(1, RATE))).abs().max() < 1e-3  # -60 dBFS


def test_decoding_twice_gives_the_same_samples():
    model = shaped()
    frames = model.encode(babble())
    assert torch.equal(model.decode(frames), model.decode(frames))


@pytest.mark.parametrize("make", [shaped, lambda: AudioAutoencoder(decoder="griffinlim")], ids=["neural", "griffinlim"])
def test_pieces_equal_the_whole(make):
    """Also at the seams, where a click would be: the largest difference anywhere is below -80 dB."""
    model = make()
    frames = model.encode(babble(6.0) * 4)
    whole = model.decode(frames)
    assert (whole - model.decode(frames, piece=100)).abs().max() < 1e-4


def test_a_long_sequence_is_never_decoded_at_once(monkeypatch):
    """Whatever its length, no more than a piece and its margins are turned into a spectrum at a time."""
    sizes, spectrum = [], AudioAutoencoder.spectrum
    monkeypatch.setattr(AudioAutoencoder, "spectrum", lambda self, mel, *rest: (
        sizes.append(mel.shape[1]), spectrum(self, mel, *rest))[1])
    assert shaped().decode(torch.randn(1, 700, MELS), piece=100, margin=20).shape == (1, 700 * HOP)
    assert sizes == [120] + 5 * [140] + [120]


def test_batch_does_not_matter():
    model = shaped()
    frames = model.encode(babble())
    assert (model.decode(frames)[1:] - model.decode(frames[1:])).abs().max() < 1e-4


def test_the_way_back_is_exact():
    wave = babble()[:, :47_700]
    assert (istft(stft(wave, DECODER_FFT)) - wave).abs().max() < 1e-5


def test_unmel_has_that_mel():
    """Mel inversion gives magnitudes of nearly the same mel, and more rounds come nearer."""
    mel = log_mel(babble())
    from cdslm import mel_bank
    errors = [((mel_bank(DECODER_FFT) @ unmel(mel, rounds)).clamp(min=1e-5).log().mT - mel).abs().mean()
              for rounds in (0, 3, 30)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("latent_dim", [0, 16])
def test_training_lowers_its_loss(small, latent_dim):
    config = small(decoder="neural", latent_dim=latent_dim, decoder_steps=8)
    corpus = open_corpus(config)
    wave = torch.from_numpy(corpus.windows("audio", "valid", range(0, 8000, 1000), 48))
    losses = []
    for steps in (0, config.decoder_steps):
        config.decoder_steps = steps
        model = fit_autoencoder(config, corpus, CPU)
        torch.manual_seed(0)
        losses.append(float(model.decoder_loss(wave)))
    assert losses[1] < 0.8 * losses[0]


def test_latents_are_alive_and_silence_stays_silent(small):
    """Each latent has deviation 1 on speech, mel comes back, and digital silence decodes below -60 dBFS."""
    config = small(latent_dim=16, decoder_steps=30)                         # 120 for the bottleneck
    model = fit_autoencoder(config, corpus := open_corpus(config), CPU)
    mel = torch.from_numpy(corpus.windows("mel", "valid", range(0, 8000, 250), 48))
    frames = model.from_mel(mel)
    assert 0.4 < frames.std((0, 1)).min() and frames.std((0, 1)).max() < 2
    assert (model.to_mel(frames) * model.mel_stats[1] + model.mel_stats[0] - mel).abs().mean() < 1
    assert model.decode(model.encode(torch.zeros(1, RATE))).abs().max() < 1e-3


def test_an_autoencoder_of_another_shape_is_one_clear_line(small):
    config = small()
    Path(config.out).mkdir()
    open_autoencoder(config, corpus := open_corpus(config), CPU)
    with pytest.raises(UserError, match="autoencoder.pt: of a run with another"):
        open_autoencoder(small(latent_dim=16), corpus, CPU)
    save(Path(config.out) / "autoencoder.pt", other=1)
    with pytest.raises(UserError, match="autoencoder.pt: of a run with another"):
        open_autoencoder(config, corpus, CPU)


# --- quality, on held-out speech, by judges that were not trained on --------------------------------------------------

def perceived(reference, guess):
    """Mean PESQ (wide band) and STOI of (B, N) samples."""
    pesq, pystoi = pytest.importorskip("pesq"), pytest.importorskip("pystoi")
    signal = pytest.importorskip("scipy.signal")
    scores = []
    for pair in zip(reference, guess):
        a, b = (signal.resample_poly(x.double().numpy(), 2, 3) for x in pair)      # 16 kHz
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores.append((pesq.pesq(16_000, a, b, "wb", on_error=1), pystoi.stoi(a, b, 16_000)))
    return np.mean([score for score in scores if score[0] > 0], axis=0)


def distances(wave, guess):
    """Multi-resolution STFT distance (spectral convergence + log magnitude, mean of three) and L1 of log-mel."""
    total = 0.0
    for fft in (512, 1024, 2048):
        a, b = stft(guess, fft, fft // 4, fft).abs(), stft(wave, fft, fft // 4, fft).abs()
        total += float((a - b).norm() / b.norm() + ((a + 1e-4).log() - (b + 1e-4).log()).abs().mean()) / 3
    return total, float((log_mel(guess) - log_mel(wave)).abs().mean())


def by_griffin_lim(iterations):
    """The yardstick: the same mel inversion, a random phase, fast Griffin-Lim."""
    def decode(mel):
        magnitude = unmel(mel)
        turns = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0))
        return istft(griffin_lim(magnitude, torch.polar(torch.ones_like(turns), 2 * torch.pi * turns), iterations))
    return decode


@torch.no_grad()
def judge(name, decode, waves):
    """{judge: value} of a function from log-mel (B, T, 80) to samples; printed, too."""
    mel, times = log_mel(waves), []
    for _ in range(3):
        started = time.process_time()
        guess = decode(mel)
        times.append(time.process_time() - started)
    row = dict(zip(("pesq", "stoi", "mrstft", "mel"), (*perceived(waves, guess), *distances(waves, guess))))
    row["real time"] = waves.numel() / RATE / min(times)
    print(f"{name:>32}  " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    return row


def held_out(corpus, count=10):
    """(count, N) windows of 4 s of the validation split that hold speech."""
    waves = torch.from_numpy(corpus.windows("audio", "valid", [keyed(7, "bench", i) for i in range(4 * count)], 320))
    return waves[waves.square().mean(1).sqrt() > 0.005][:count]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["toy", REAL], ids=["toy", "real"])
def test_decoder_beats_griffin_lim(data):
    if data == REAL and not REAL.is_dir():
        pytest.skip("no recordings here")
    corpus = open_corpus(config := Config(data=str(data), toy_hours=1.0))
    waves, started = held_out(corpus), time.perf_counter()
    model = fit_autoencoder(config, corpus, CPU)
    model.shaper.to(decide(config)[1])                     # as it is loaded
    print(f"\n{config.decoder_steps} steps in {time.perf_counter() - started:.0f} s")
    theirs, _ = (judge(f"Griffin-Lim {n}", by_griffin_lim(n), waves) for n in (32, 100))
    ours = judge("learned decoder", lambda mel: model.decode(model.from_mel(mel)), waves)
    assert ours["pesq"] >= theirs["pesq"]
    assert ours["mrstft"] <= 0.9 * theirs["mrstft"] and ours["mel"] <= 0.9 * theirs["mel"]
    assert ours["real time"] >= 4 * theirs["real time"]       # about 6 where nothing else uses the memory
    frames = model.encode(waves)
    assert (model.decode(frames) - model.decode(frames, piece=100)).abs().max() < 1e-4
    assert model.decode(model.encode(torch.zeros(1, RATE))).abs().max() < 1e-3         # silence, at -60 dBFS
    if data == "toy":
        ear = load_listener()
        heard, *again = (ear.hear(log_mel(wave))["frames"] for wave in (waves, model.decode(frames),
                                                                        by_griffin_lim(32)(log_mel(waves))))
        ours, theirs = (float(np.mean(np.asarray(x) == np.asarray(heard))) for x in again)
        print(f"frames of the same phone: {ours:.4f}, Griffin-Lim 32 {theirs:.4f}")
        assert ours >= theirs - 0.005
    noise = torch.randn(log_mel(waves).shape, generator=torch.Generator().manual_seed(3))
    for level in (0.1, 0.2):                            # generated frames are not clean
        worse = log_mel(waves) + level * noise * model.mel_stats[1]
        sounds = model.decode(model.from_mel(worse)), by_griffin_lim(32)(worse)
        a, b = (float(perceived(waves, sound)[0]) for sound in sounds)
        print(f"noise of {level} on the frames: PESQ {a:.2f}, Griffin-Lim 32 {b:.2f}")
        assert a > b
