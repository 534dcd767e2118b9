"""From recordings, or toy speech, to windows of log-mel frames: all that happens before the model.

    Sound     a file -> 24 kHz samples -> 80 log-mel bands, 80 frames a second; and, by signal processing alone, back
    Corpus    a folder of recordings, or the toy corpus -> a cache on disk -> windows for training and validation

    corpus = open_corpus(Config(data="my_recordings"))
    corpus.windows("mel", "train", [keyed(0, "mine", i) for i in range(32)], 320)      # (32, 320, 80) log-mel frames

Nothing here knows of diffusion or of networks; `cdslm.py` is the system, and begins where this ends.
"""
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend: printed as one line, exit status 2."""


def keyed(seed, purpose, index):
    """A 63-bit integer that depends on (seed, purpose, index) alone. All randomness of training comes from here, so the
    data and noise of a step do not depend on what ran before, how often we validate or how many devices share it."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(*words):
    """The same, as a number in [0, 1)."""
    return keyed(*words) / 2 ** 63


def keyed_noise(seed, purpose, index, shape, device):
    """Standard normal noise that depends on (seed, purpose, index) and the kind of device alone."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(keyed(seed, purpose, index)), device=device)


@contextlib.contextmanager
def replacing(path, keep=None):
    """Write a file whole or not at all: yields a temporary path that becomes `path` unless something goes wrong. What
    was there before is kept under the name `keep`. One process at a time: see `lock`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")            # what a killed run leaves, the next one writes over
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch and libsndfile raise the latter, and don't say why
        full = path.parent.is_dir() and shutil.disk_usage(path.parent).free < 2 ** 20
        why = "the disk is full" if full else getattr(error, "strerror", None) or reason(error)
        raise UserError(f"{path} could not be written ({why}); what was there is kept") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_room(path, size, purpose):
    """Raise UserError if `size` bytes more don't fit on the disk where `path` is, or will be."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if size > free:
        raise UserError(f"{path} has {free / 2 ** 30:.2f} GiB free, {size / 2 ** 30:.2f} are needed for {purpose}")


def lock(path, wait=False):
    """Hold a file, for this process alone, until it is closed. None if another process holds it, unless we `wait`."""
    file = open(path, "a")
    try:
        import fcntl  # not on Windows, where keeping two runs apart is left to the user
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except ImportError:
        pass
    except BlockingIOError:
        return file.close()
    return file


# ----------------------------------------------------------------------------------------------------------------------
# Sound. Log-mel frames as in the paper: 24 kHz, window 1200 (50 ms), hop 300 (12.5 ms), 80 bands: 80 frames a second.
# CHOICE: FFT 2048, Slaney's mel scale from 0 to 12 kHz, magnitudes, natural logarithm with a floor at 1e-5.

RATE, HOP, WINDOW, FFT, MELS, FLOOR = 24_000, 300, 1200, 2048, 80, 1e-5
FRAME_RATE = RATE // HOP
DECODER_FFT = WINDOW       # on the way back frames are not padded with zeros, so that every bin tells something new
AUDIO_FILES = set(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .caf .w64 .rf64 .sph".split())


def mel_bank(fft=FFT):
    """Slaney's triangles, each of unit area: (80, fft/2 + 1). Linear below 1 kHz, then logarithmic (1998)."""
    step = math.log(6.4) / 27
    mel = torch.linspace(0, 15 + math.log(RATE / 2 / 1000) / step, MELS + 2, dtype=torch.float64)
    edges = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * step))
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hertz = torch.linspace(0, RATE / 2, fft // 2 + 1, dtype=torch.float64)
    triangles = torch.minimum((hertz - low) / (mid - low), (high - hertz) / (high - mid)).clamp(min=0)
    return (triangles * 2 / (high - low)).float()


def stft(wave, fft=FFT, hop=HOP, window=WINDOW):
    """(B, N) -> (B, fft/2 + 1, T) complex, T = ceil(N/hop), frame i centred on sample i * hop, zeros beyond it."""
    frames = -(-wave.shape[-1] // hop)
    wave = F.pad(wave, (fft // 2, frames * hop - wave.shape[-1] + fft // 2))
    taper = torch.hann_window(window, device=wave.device)
    return torch.stft(wave, fft, hop, window, taper, center=False, return_complex=True)[..., :frames]


def log_mel(wave):
    """(B, N) samples at 24 kHz -> (B, T, 80) log-mel frames, T = ceil(N/300). Digital silence is log(1e-5)."""
    bank = mel_bank().to(wave.device).T
    pieces = [piece.abs().mT @ bank for piece in stft(wave).split(128, dim=-1)]     # small ones stay in the cache
    return torch.cat(pieces, dim=1).clamp(min=FLOOR).log()


def resample(wave, rate, new_rate=RATE):
    """(N,) at `rate` Hz -> (ceil(N * new_rate / rate),): the same spectrum, cut off or continued with zeros."""
    if rate == new_rate:
        return wave
    seconds = len(wave) // rate + 2                           # whole seconds are whole numbers of samples at both rates
    spectrum = torch.fft.rfft(F.pad(wave, (0, seconds * rate - len(wave))))
    shared = min(rate, new_rate) * seconds // 2
    spectrum = F.pad(spectrum[:shared], (0, new_rate * seconds // 2 + 1 - shared))
    return torch.fft.irfft(spectrum, seconds * new_rate)[:-(-len(wave) * new_rate // rate)] * (new_rate / rate)


def reason(error):
    """The first line of an error's message, or failing that its kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_audio(path, start=0, stop=math.inf):
    """Yield seconds `start` to `stop` of a recording, a minute at a time: mono (the mean of the channels), 24 kHz,
    float32 (N,). Raises UserError with the reason if it can't be read or holds NaN."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            rate, end = file.samplerate, min(file.frames, stop * file.samplerate)
            if not 8000 <= rate <= 192_000:
                raise UserError(f"{path}: {rate} Hz is outside 8 to 192 kHz")
            for at in range(start * rate, math.ceil(end), 60 * rate):
                before = min(at, rate)                         # minutes overlap by a second, so that none has an edge
                if at:                                         # some formats can't go back
                    file.seek(at - before)
                piece = file.read(min(61 * rate, math.ceil(end) - at) + before, dtype="float32", always_2d=True)
                if len(piece) <= before:
                    break                                      # the header promised more
                if not np.isfinite(piece).all():
                    raise UserError(f"{path}: contains NaN or infinite samples")
                samples = -(-(min(60 * rate, len(piece) - before)) * RATE // rate)
                mono = torch.from_numpy(piece.clip(-1, 1).mean(1))
                yield resample(mono, rate)[before * RATE // rate:][:samples]
    except (soundfile.SoundFileError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not readable as audio ({reason(error)})") from None


def load_audio(path):
    """A whole recording as (N,) float32 at 24 kHz. Raises UserError if it is not audio, or empty."""
    pieces = list(read_audio(path))
    if not pieces:
        raise UserError(f"{path}: contains no samples")
    return torch.cat(pieces)


def save_audio(path, wave):
    """Write (N,) samples at 24 kHz as a 16-bit WAV; louder than full scale is turned down, never clipped."""
    wave = wave.detach().float().cpu().numpy()
    with replacing(path) as temporary:
        soundfile.write(temporary, wave / max(1.0, np.abs(wave).max(initial=0)), RATE, format="WAV", subtype="PCM_16")


def unmel(mel, iterations=3):
    """(B, T, 80) log-mel -> (B, 601, T) magnitudes, none negative, with that mel (Richardson, 1972; Lucy, 1974)."""
    bank, mel = mel_bank(DECODER_FFT).to(mel.device), mel.exp().mT          # (80, 601), (B, 80, T)
    spread = bank.T / bank.sum(0)[:, None].clamp(min=1e-8)
    magnitude = (spread @ (mel / bank.sum(1)[:, None])).clamp(min=1e-7)
    for _ in range(iterations):
        magnitude = (magnitude * (spread @ (mel / (bank @ magnitude)))).clamp(min=1e-7)
    return magnitude


@torch.no_grad()
def pitch(magnitude, low=60, high=420):
    """(B, 601, T) magnitudes -> (B, T) pitch in Hz and (B, T) how periodic, at most 1: the comb that fits best, below
    5 kHz, and to magnitudes so compressed that no formant drowns the others. A comb every 0.8 %."""
    bins = torch.arange(2, 5000 * DECODER_FFT // RATE, device=magnitude.device)
    hertz = low * (high / low) ** torch.linspace(0, 1, 256, device=magnitude.device)
    combs = torch.cos(2 * math.pi * bins * RATE / DECODER_FFT / hertz[:, None])             # (256, bins)
    heard = magnitude[:, 2:2 + len(bins)] ** 0.7
    voiced, best = (combs @ heard / heard.sum(1, keepdim=True)).max(1)
    return F.pad(hertz[best], (2, 2), mode="replicate").unfold(1, 5, 1).median(-1).values, voiced  # no octave jumps


def pulses(hertz, start, turns):
    """(B, T) pitch -> (B, 300 T) pulses, with harmonics up to 12 kHz, and their phase: `turns` at frame `start`."""
    hertz = F.interpolate(hertz[:, None].cpu().double(), scale_factor=HOP, mode="linear")[:, 0]
    phase = F.pad((hertz / RATE).cumsum(1), (1, 0))                        # on the CPU: not every device has doubles
    phase = phase[:, 1:] - phase[:, start * HOP, None] + turns
    phase = phase - phase.round()
    count, swing = RATE / 2 / hertz.float(), torch.sin(math.pi * phase.float())     # how many harmonics there are
    return count.sqrt() * torch.exp(-0.5 * (count * swing) ** 2), phase


def istft(spectrum):
    """(B, n + 1, T) complex -> (B, n/2 T) samples; inverse of `stft(wave, 2n, n/2, 2n)`. At 24 kHz n is 600."""
    fft = 2 * spectrum.shape[1] - 2
    window = torch.hann_window(fft, device=spectrum.device)
    return torch.istft(spectrum, fft, fft // 4, fft, window, center=True, length=fft // 4 * spectrum.shape[-1])


def griffin_lim(magnitude, source, iterations=32, momentum=0.99):
    """(B, n + 1, T) magnitudes, and a spectrum whose phases are to begin with -> spectrum with phases that agree better
    between frames (Perraudin et al., 2013). Of the lowest n + 1 bins alone, too: they are speech at a lower rate."""
    fft, phase, before = 2 * magnitude.shape[1] - 2, source.sgn(), None
    for _ in range(iterations):
        after = stft(istft(magnitude * phase), fft, fft // 4, fft)
        phase, before = (after if before is None else after - before * (momentum / (1 + momentum))).sgn(), after
    return magnitude * phase


def low_griffin_lim(magnitude, source, low=60):
    """The same in eight steps below 1.2 kHz, where phase matters most and a step costs a fifteenth, and two of all."""
    phases = griffin_lim(magnitude[:, :low + 1], source[:, :low + 1], 8)[:, :low]
    return griffin_lim(magnitude, torch.cat([phases, source[:, low:]], dim=1), 2)


def stft_distance(guess, wave):
    """Multi-resolution distance of (B, N) samples: spectral convergence and log magnitude (Yamamoto et al., 2020)."""
    total = 0
    for fft in (512, 1024, 2048):
        a, b = (stft(x, fft, fft // 4, fft).abs() for x in (guess, wave))
        total = total + 3 * (a - b).norm() / b.norm().clamp(min=1e-3)
        total = total + F.l1_loss((a + 1e-4).log(), (b + 1e-4).log())
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Corpus. A source, a folder or the toy corpus, is a list of stretches of speech: half an hour of one recording at the
# most, or short neighbours of one folder joined up to a minute. They are cached once in shards of about half an hour:
# int16 audio, which the decoder learns from, and float16 log-mel. A hash of its name and place decides whether a minute
# is for training or for validation; where the two meet in one recording, a second is left out.

CACHE_VERSION, SHARD_SECONDS, BLOCK_SECONDS, VALIDATION_SHARE = 2, 1800, 60, 0.06


def fingerprint(text):
    """Eight hexadecimal digits that stand for a text, such as a list of files."""
    return hashlib.blake2b(os.fsencode(text), digest_size=4).hexdigest()


def printable(name):
    """A file name as it can be printed on one line, and hashed, whatever is in it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def cache_root():
    """Where corpora are cached: $CDSLM_CACHE, or ~/.cache/cdslm."""
    return Path(os.environ.get("CDSLM_CACHE") or Path.home() / ".cache" / "cdslm")


@dataclass
class Stretch:
    """Speech that belongs together; `parts` are (path, first second, last second), or numbers of toy utterances."""
    name: str
    seconds: float
    parts: list
    minute: int = 0        # where in the recording it begins


@dataclass
class Source:
    """What there is to learn from: `read(stretch)` gives samples (N,) int16; `contents` changes when they do."""
    name: str
    contents: str
    stretches: list
    read: callable
    skipped: dict          # {file: why it can't be used}


def pcm(wave):
    """(N,) samples -> int16, as they are cached."""
    return (wave.clamp(-1, 1) * 32767).round().short()


def toy_source(config):
    """The toy corpus: stretches of 20 s, or longer where windows are, each a speaker of its own."""
    from lab.toyspeech import VERSION, ToySpeech
    toy, seconds = ToySpeech(config.toy_languages, config.toy_words), 20.0
    while seconds < 1.25 * (config.ctx_seconds + config.gen_seconds):         # so that a window can begin anywhere
        seconds += 10
    count = max(2, round(config.toy_hours * 3600 / seconds))
    stretches = [Stretch(f"utterance {i}", seconds, [i]) for i in range(count)]
    bits = ", ".join(f"{toy.entropy_per_phone(language):.2f}" for language in range(config.toy_languages))
    print(f"toy speech, version {VERSION}: {config.toy_words} words a language; {bits} bits a phone in each")
    name = f"toy-{config.toy_languages}x{config.toy_words}-{count}" + (f"x{seconds:.0f}s" if seconds > 20 else "")
    return Source(name, f"{CACHE_VERSION} {VERSION}", stretches,
                  lambda stretch: pcm(torch.from_numpy(toy.utterance(stretch.parts[0], stretch.seconds).wave)), {})


def check_data(config):
    """Raise UserError if one of the folders of `config.data` is not there."""
    for name in [config.data] if isinstance(config.data, str) else config.data:
        if name != "toy" and not Path(name).is_dir():
            raise UserError(f"--data {name}: no such folder")


def folder_source(folder):
    """A folder of recordings: long ones in half hours, short neighbours joined. Unreadable ones are `skipped`."""
    root, stretches, skipped, prints = Path(folder), [], {}, [str(CACHE_VERSION)]
    def closed(error):  # a folder that may not be read
        skipped[printable(os.path.relpath(error.filename, root))] = error.strerror

    files = sorted(Path(folder, name) for folder, folders, names in os.walk(root, onerror=closed)
                   for name in folders + names if Path(name).suffix.lower() in AUDIO_FILES)
    for path in files:
        name = printable(path.relative_to(root).as_posix())
        try:
            stat = path.stat()
            if not path.is_file():
                raise UserError("not a file")                  # a pipe would keep us waiting
            seconds = soundfile.info(path).duration
            if not 0 < seconds <= stat.st_size:
                raise UserError("its header promises more than it holds" if seconds else "contains no samples")
        except Exception as error:  # whatever a broken file makes the reader raise is that file's problem
            skipped[name] = printable(reason(error))
            continue
        prints.append(f"{name} {stat.st_size} {stat.st_mtime_ns}")
        last = stretches[-1] if stretches else None
        if last and last.parts[-1][0].parent == path.parent and last.seconds + seconds <= BLOCK_SECONDS:
            last.parts.append((path, 0, seconds))
            last.seconds += seconds
            continue
        for start in range(0, math.ceil(seconds), SHARD_SECONDS):
            stop = min(start + SHARD_SECONDS, seconds)
            stretches.append(Stretch(name, stop - start, [(path, start, stop)], start // 60))
    if not stretches:
        why = f"none of its {len(files)} audio files can be read" if files else "no wav, flac, ogg or mp3 in it"
        raise UserError(f"--data {folder}: {why}")

    def read(stretch):
        waves = [torch.zeros(0, dtype=torch.int16)]
        for path, start, stop in stretch.parts:
            try:
                waves += [pcm(wave) for wave in read_audio(path, start, stop)]
            except UserError as error:
                skipped[printable(path.relative_to(root).as_posix())] = printable(reason(error))
        return torch.cat(waves)

    where = str(root.resolve())
    name = f"{re.sub(r'[^A-Za-z0-9]', '-', Path(where).name)}-{fingerprint(where)}"
    return Source(name, "\n".join(prints), stretches, read, skipped)


def build_cache(source):
    """Cache every stretch of a source and return the open shards. A shard is complete once its .json is there, so an
    interrupted build goes on where it stopped. A source that has changed has another name, and is cached anew."""
    folder = cache_root() / f"{source.name}-{fingerprint(source.contents)}"
    for old in set(cache_root().glob(f"{source.name}-{'[0-9a-f]' * 8}")) - {folder}:
        print(f"{source.name} has changed since it was cached: caching it anew")
        shutil.rmtree(old)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache {folder}: {error.strerror}; set CDSLM_CACHE to a folder that can be written") from None
    ends = itertools.accumulate(stretch.seconds for stretch in source.stretches)
    groups = itertools.groupby(zip(ends, source.stretches), lambda pair: pair[0] // SHARD_SECONDS)
    plan = {folder / f"{int(number):05d}": [stretch for _, stretch in pairs] for number, pairs in groups}
    shards = {stem: open_shard(stem) for stem in plan}
    if not all(shards.values()):
        with lock(folder / ".lock", wait=True):                # another process may be making them
            shards = {stem: open_shard(stem) for stem in plan}
            missing = sum(s.seconds for stem, stretches in plan.items() if not shards[stem] for s in stretches)
            check_room(folder, missing * (2 * RATE + 2 * MELS * FRAME_RATE), "the cache; CDSLM_CACHE moves it")
            make_shards({stem: stretches for stem, stretches in plan.items() if not shards[stem]}, source)
            shards = {stem: shards[stem] or open_shard(stem) for stem in plan}
    return list(shards.values())


def make_shards(plan, source):
    """Build {stem: stretches}, as many recordings at once as there are processors."""
    total = round(sum(stretch.seconds for stretches in plan.values() for stretch in stretches))
    with (tqdm(total=total, desc="caching speech", unit="s", disable=not total) as bar,
          concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool):
        for stem, stretches in plan.items():
            if Path(f"{stem}.json").exists():
                print(f"warning: {stem} in the cache is damaged; making it again")
            build_shard(stem, source, stretches, pool)
            bar.update(round(sum(stretch.seconds for stretch in stretches)))


def build_shard(stem, source, stretches, pool):
    """Write a shard: STEM.audio.npy (N,) int16, STEM.mel.npy (N/300, 80) float16, and last STEM.json, what is in it."""
    def samples(stretch):
        wave = source.read(stretch)
        return F.pad(wave, (0, -len(wave) % HOP)).numpy()

    def frames(start):  # a minute, heard with a little of its surroundings so that minutes join without a seam
        first, last = max(0, start - 8 * HOP), min(len(audio), start + 60 * RATE + 8 * HOP)
        mel = log_mel(torch.from_numpy(audio[first:last]).float()[None] / 32767)[0]
        return mel[(start - first) // HOP:][:60 * FRAME_RATE].half().numpy()

    waves = list(pool.map(samples, stretches))
    lengths, audio = [len(wave) // HOP for wave in waves], np.concatenate(waves)
    del waves                                                   # a long recording is held in memory only once
    minutes = list(pool.map(frames, range(0, len(audio), 60 * RATE)))
    arrays = {"audio": audio, "mel": np.concatenate(minutes) if minutes else np.zeros((0, MELS), np.float16)}
    for kind, array in arrays.items():
        with replacing(f"{stem}.{kind}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
    contents = {"stretches": [[s.name, s.minute, length] for s, length in zip(stretches, lengths)],
                "skipped": dict(source.skipped)}
    with replacing(f"{stem}.json") as temporary:
        temporary.write_text(json.dumps(contents | {"seal": seal(contents | arrays)}))


class Stored:
    """An array on the disk. Rows are read when they are asked for: nothing stays open, or in memory."""

    def __init__(self, path, array):
        self.path, self.offset, self.dtype, self.shape = path, array.offset, array.dtype, array.shape

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(len(self))
        width = math.prod(self.shape[1:])
        place = self.offset + start * width * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, (stop - start) * width, offset=place).reshape(-1, *self.shape[1:])


def seal(shard):
    """What a shard is known by: its contents, the types and shapes of its arrays, and 64 frames spread over each."""
    arrays = [shard["audio"].reshape(-1, HOP), shard["mel"].reshape(-1, MELS)]
    frames = [(a.dtype.str, a.shape, a[::len(a) // 64 + 1].tobytes()) for a in arrays]
    return fingerprint(f"{shard['stretches']} {shard['skipped']} {frames}")


def open_shard(stem):
    """A shard: its contents, and its arrays, left on the disk. None if it isn't there, or isn't as it was written."""
    try:
        shard = json.loads(Path(f"{stem}.json").read_text())
        arrays = {kind: np.load(f"{stem}.{kind}.npy", "r", allow_pickle=False) for kind in ("mel", "audio")}
        if seal(shard | arrays) == shard["seal"]:
            return shard | {kind: Stored(f"{stem}.{kind}.npy", array) for kind, array in arrays.items()}
    except Exception as error:  # whatever a damaged file makes the readers raise; but not what the disk does
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise


class Corpus:
    """A cache, split into "train" and "valid" and served as windows. Any integer key names a window of a split; keys
    that are uniform make every start of a window equally likely."""

    def __init__(self, shards, window):
        self.shards, self.skipped, stretches = shards, {}, []
        for number, shard in enumerate(shards):
            self.skipped |= shard["skipped"]
            start = 0
            for name, minute, frames in shard["stretches"]:
                stretches.append((name, minute, number, start, frames))
                start += frames
        self.runs, self.tables = self.split(stretches, window), {}

    @staticmethod
    def split(stretches, window):
        """{split: its runs of neighbouring blocks, rows of (shard, first frame, frames)}."""
        total = sum(frames for *_, frames in stretches)
        size = max(BLOCK_SECONDS * FRAME_RATE, 3 * window)
        size = size if total > 20 * size else 2 * window                      # little speech is split more finely
        blocks = [(name, uniform(0, name, (minute * 60 * FRAME_RATE + at) // size),
                   shard, start + at, min(size, frames - at))
                  for name, minute, shard, start, frames in stretches for at in range(0, frames, size)]
        usable = sorted({chance for _, chance, _, _, frames in blocks if frames >= window})
        if len(usable) < 2:
            raise UserError(f"too little speech: {total / FRAME_RATE:.1f} s, where training and validation each need a "
                            f"stretch of {window / FRAME_RATE:g} s; add some, or shorten --gen-seconds")
        limit = min(max(VALIDATION_SHARE, usable[0]), usable[-2])             # at least one block for each
        runs, before = {"train": [], "valid": []}, (None, None, None)
        for name, chance, shard, start, frames in blocks:
            split = "valid" if chance <= limit else "train"
            if before == (name, shard, split):
                runs[split][-1][2] += frames
            else:
                if before[0] == name and before[2] != split:
                    runs[before[2]][-1][2] -= min(FRAME_RATE, runs[before[2]][-1][2])   # the second between them
                runs[split].append([shard, start, frames])
            before = name, shard, split
        return {split: np.array(rows) for split, rows in runs.items()}

    def hours(self, split):
        """Hours of speech in a split."""
        return self.runs[split][:, 2].sum() / FRAME_RATE / 3600

    def windows(self, kind, split, keys, frames):
        """Windows, float32: "mel" (len(keys), frames, 80) or "audio" (len(keys), 300 * frames)."""
        if (split, frames) not in self.tables:
            long = self.runs[split][self.runs[split][:, 2] >= frames]
            self.tables[split, frames] = long, np.cumsum(long[:, 2] - frames + 1)
        runs, ends = self.tables[split, frames]
        hop, cut = {"mel": 1, "audio": HOP}[kind], []
        for key in keys:
            place = key % int(ends[-1])
            row = np.searchsorted(ends, place, side="right")
            shard, start, length = runs[row]
            start += place - (ends[row] - (length - frames + 1))
            cut.append(self.shards[shard][kind][start * hop:(start + frames) * hop])
        return np.stack(cut).astype(np.float32) / {"mel": 1, "audio": 32767}[kind]

    def mel_stats(self):
        """Mean and standard deviation of the training set's log-mel over all bands, and how many bands are alive."""
        mel = self.windows("mel", "train", [keyed(0, "statistics", i) for i in range(512)], 32)
        if mel.std() < 1e-3:
            raise UserError("the recordings are silent")
        return float(mel.mean()), float(mel.std()), int((np.quantile(mel, 0.99, (0, 1)) > math.log(FLOOR) + 2).sum())


def open_corpus(config):
    """Build or find the cache of each of `config.data` and return the Corpus of all."""
    names = [config.data] if isinstance(config.data, str) else config.data
    check_data(config)
    sources = [toy_source(config) if name == "toy" else folder_source(name) for name in names]
    window = config.ctx_frames + config.gen_frames
    Corpus.split([(s.name, s.minute, i, 0, int(s.seconds * FRAME_RATE)) for i, s in enumerate(
        stretch for source in sources for stretch in source.stretches)], window)     # is there enough speech?
    shards = [shard for source in sources for shard in build_cache(source)]
    corpus = Corpus(shards, window)
    for source in sources:
        corpus.skipped |= source.skipped
    if corpus.skipped:
        named = "; ".join(f"{name} ({why})" for name, why in list(corpus.skipped.items())[:5])
        print(f"left out {len(corpus.skipped)} files that can't be used: {named}{'; ...' * (len(corpus.skipped) > 5)}")
    print(f"{corpus.hours('train'):.2f} hours of speech to learn from, {corpus.hours('valid'):.2f} held out; "
          f"{corpus.mel_stats()[2]} of {MELS} bands are alive")
    return corpus
