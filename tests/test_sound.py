import timeit

import numpy as np
import pytest
import soundfile
import torch

from cdslm import DECODER_FFT, HOP, RATE, UserError, istft, load_audio, log_mel, mel_bank, resample, save_audio, stft

RATES = [8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000]
LENGTHS = [1, 299, 300, 301, 599, 600, 24_000, 24_001, 71_999]


def decibels(error, signal):
    return 20 * np.log10(np.sqrt(np.mean(np.square(error)) / np.mean(np.square(signal))) + 1e-12)


@pytest.mark.parametrize("samples", LENGTHS)
def test_a_wave_of_n_samples_has_n_over_300_frames_rounded_up(samples):
    mel = log_mel(torch.randn(2, samples))
    assert mel.shape == (2, -(-samples // 300), 80)
    assert torch.isfinite(mel).all()


@pytest.mark.parametrize("samples", [300, 301, 600, 6000, 24_001])
def test_stft_and_back_is_the_wave(samples):
    wave = torch.randn(2, samples)
    back = istft(stft(wave, DECODER_FFT))
    assert back.shape == (2, -(-samples // HOP) * HOP)
    assert (back[:, :samples] - wave).abs().max() < 1e-5


def test_stft_is_torchs_own_with_zeros_around():
    wave = torch.randn(1, 3000)
    theirs = torch.stft(wave, 2048, 300, 1200, torch.hann_window(1200), center=True, pad_mode="constant",
                        return_complex=True)[..., :-1]
    assert torch.allclose(stft(wave), theirs, atol=1e-4)


def test_frame_i_hears_sample_300_i():
    wave = torch.zeros(1, 30 * HOP)
    wave[0, 17 * HOP] = 1
    assert stft(wave).abs().sum(1)[0].argmax() == 17


def test_silence_is_the_floor():
    assert torch.allclose(log_mel(torch.zeros(1, 3000)), torch.tensor(1e-5).log())


def test_a_tone_lights_its_band():
    filters = pytest.importorskip("librosa").mel_frequencies(82, fmin=0, fmax=12_000)[1:-1]
    for hertz in (220, 1000, 5000):
        tone = torch.sin(2 * torch.pi * hertz * torch.arange(RATE) / RATE)[None]
        band = log_mel(tone)[0, 40].argmax()
        assert abs(int(band) - int(np.abs(filters - hertz).argmin())) <= 1


@pytest.mark.parametrize("fft", [2048, DECODER_FFT])
def test_mel_bank_is_librosas(fft):
    librosa = pytest.importorskip("librosa")
    theirs = librosa.filters.mel(sr=RATE, n_fft=fft, n_mels=80, fmin=0, fmax=12_000, htk=False, norm="slaney")
    assert np.abs(mel_bank(fft).numpy() - theirs).max() < 1e-6 * theirs.max()


def librosas(wave):
    """(N,) samples -> (T, 80) mel, not yet logarithmic."""
    librosa = pytest.importorskip("librosa")
    mel = librosa.feature.melspectrogram(y=wave, sr=RATE, n_fft=2048, hop_length=300, win_length=1200, power=1,
                                         n_mels=80, pad_mode="constant")[:, :-1]
    return np.maximum(mel, 1e-5).T


def test_log_mel_is_librosas():
    wave = torch.randn(1, 12_000) * 0.1
    theirs = librosas(wave[0].numpy())
    assert np.abs(log_mel(wave)[0].exp().numpy() / theirs - 1).max() < 1e-4


@pytest.mark.slow
def test_log_mel_is_as_fast_as_librosas():
    pytest.importorskip("librosa")
    wave, times = torch.randn(1, 10 * RATE) * 0.1, {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, mel in {"ours": lambda: log_mel(wave), "librosa's": lambda: np.log(librosas(wave[0].numpy()))}.items():
        times[name] = min(timeit.repeat(mel, number=1, repeat=10))
    torch.set_num_threads(threads)
    print(", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in times.items()), "for 10 s of sound")
    assert times["ours"] <= times["librosa's"]


@pytest.mark.parametrize("rate", RATES + [24_000])
def test_resampled_length_is_exact(rate):
    for samples in (1, 2, 7, 300, rate - 1, rate, rate + 1, 12_345):
        assert len(resample(torch.zeros(samples), rate)) == -(-samples * RATE // rate)


def bursts(rate, frequencies, seconds=1.0):
    """Tones under a smooth window, (N,): quiet at both ends, where resamplers differ in what they assume."""
    t = np.arange(round(seconds * rate)) / rate
    return np.hanning(len(t)) ** 2 * sum(np.sin(2 * np.pi * f * t + i) for i, f in enumerate(frequencies))


@pytest.mark.parametrize("rate", RATES + [24_000])
def test_the_passband_is_kept_to_60_dB(rate):
    """Against the same tones made at 24 kHz in the first place."""
    frequencies = np.array([0.01, 0.1, 0.3, 0.5, 0.7, 0.85]) * min(rate, RATE) / 2
    ours, ideal = resample(torch.from_numpy(bursts(rate, frequencies)), rate).numpy(), bursts(RATE, frequencies)
    assert len(ours) == len(ideal)
    assert decibels(ours - ideal, ideal) < -60


@pytest.mark.parametrize("rate", RATES)
def test_the_passband_is_the_reference_resamplers_to_60_dB(rate):
    soxr = pytest.importorskip("soxr")
    wave = bursts(rate, np.linspace(0.02, 0.8, 9) * min(rate, RATE) / 2)
    theirs = soxr.resample(wave, rate, RATE, quality="VHQ")
    ours = resample(torch.from_numpy(wave), rate).numpy()
    count = min(len(ours), len(theirs))
    assert abs(len(ours) - len(theirs)) <= 1
    assert decibels(ours[:count] - theirs[:count], theirs[:count]) < -60


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate > RATE])
def test_what_24_kHz_cannot_hold_is_gone_by_60_dB(rate):
    high = bursts(rate, np.linspace(1.05, min(1.8, 0.95 * rate / RATE), 5) * RATE / 2)
    assert decibels(resample(torch.from_numpy(high), rate).numpy(), high) < -60


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate < RATE])
def test_a_low_rate_gains_no_images(rate):
    wave = bursts(rate, np.linspace(0.1, 0.9, 5) * rate / 2)
    spectrum = np.abs(np.fft.rfft(resample(torch.from_numpy(wave), rate).numpy()))
    above = int(len(spectrum) * rate / RATE * 1.02)
    assert decibels(spectrum[above:], spectrum[:above]) < -60


@pytest.mark.parametrize("rate", [8000, 44_100])
def test_a_long_recording_is_read_without_a_seam(tmp_path, rate):
    """Recordings are read a minute at a time; nobody should hear it."""
    tone = lambda r: 0.5 * np.sin(2 * np.pi * 440.3 * np.arange(70 * r) / r + 0.7)
    soundfile.write(tmp_path / "long.wav", tone(rate), rate, subtype="FLOAT")
    ours = load_audio(tmp_path / "long.wav").numpy()
    assert len(ours) == 70 * RATE
    assert np.abs(ours - tone(RATE))[RATE:69 * RATE].max() < 1e-3


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_channels_are_averaged(tmp_path, channels):
    wave = np.random.default_rng(0).standard_normal((2400, channels)).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "many.wav", wave, RATE, subtype="FLOAT")
    assert decibels(load_audio(tmp_path / "many.wav").numpy() - wave.mean(1), wave.mean(1)) < -30


@pytest.mark.parametrize("suffix, limit", [("wav", -65), ("flac", -65), ("ogg", -10), ("mp3", -10)])
def test_formats_sound_alike(tmp_path, suffix, limit):
    wave = bursts(RATE, [300, 700, 1500]).astype(np.float32) * 0.1
    soundfile.write(tmp_path / f"x.{suffix}", wave, RATE)
    ours = load_audio(tmp_path / f"x.{suffix}").numpy()
    if suffix == "mp3":  # may begin with the encoder's delay
        delay = np.argmax(np.correlate(ours, wave[6000:18_000], "valid")) - 6000
        ours = np.pad(ours, (2400, 2400))[2400 + delay:][:len(wave)]
    count = min(len(ours), len(wave))
    assert count > 0.99 * len(wave)
    assert decibels(ours[:count] - wave[:count], wave) < limit


def test_a_recording_at_24_kHz_is_read_as_it_is(tmp_path):
    wave = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * 0.2
    soundfile.write(tmp_path / "x.wav", wave, RATE, subtype="FLOAT")
    assert np.abs(load_audio(tmp_path / "x.wav").numpy() - wave).max() < 1e-6


def test_saving_and_loading_is_exact_to_16_bits_and_never_clips(tmp_path):
    wave = torch.randn(5000) * 0.2
    save_audio(tmp_path / "x.wav", wave)
    assert (load_audio(tmp_path / "x.wav") - wave).abs().max() < 3e-4
    save_audio(tmp_path / "loud.wav", 10 * wave)
    loud = load_audio(tmp_path / "loud.wav")
    assert torch.corrcoef(torch.stack([loud, wave]))[0, 1] > 0.9999


def test_a_file_that_is_not_sound_is_a_users_error(tmp_path):
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "nothing.wav").write_bytes(b"")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "slow.wav", np.zeros(100), 4000)
    for name in ("text", "nothing", "empty", "nan", "slow", "missing"):
        with pytest.raises(UserError, match=f"{name}.wav: ") as error:
            load_audio(tmp_path / f"{name}.wav")
        assert "\n" not in str(error.value)
