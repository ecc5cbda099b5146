"""Audio: digits spoken by a formant synthesiser, hums and sirens, and log-mel features.

Speech is a source and a filter. The source is a train of glottal pulses at the pitch f0, or breath.
The filter is the vocal tract: the resonances (formants) of the phoneme, divided by the length of
the tract. Consonants such as S add a band of noise. The synthesiser works on frames of 20 ms every
10 ms: it multiplies the spectrum of the source by the filter of the frame, and overlap-adds the
frames to sound at 16 kHz. Each word has a random position in its second and a random loudness, with
the noise of a room.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from einops import rearrange, repeat

from .style import HOME, Style
from .things import Things

RATE, HOP = 16_000, 160
TURN = 2 * math.pi
ECHO = RATE // 12  # delay of the echo, in samples
BANDS, STEPS = 16, 8  # log-mel bands and time steps per second: 128 numbers

# phoneme: milliseconds, formants F1 F2 F3 (Hz), voicing, friction, centre and width of it (Hz)
PHONEMES = {
    "AA": (110, 730, 1150, 2500, 1.0, 0.0, 0, 1),
    "AH": (90, 620, 1220, 2550, 1.0, 0.0, 0, 1),
    "AO": (130, 570, 840, 2410, 1.0, 0.0, 0, 1),
    "EH": (100, 530, 1840, 2480, 1.0, 0.0, 0, 1),
    "EY": (90, 480, 2000, 2550, 1.0, 0.0, 0, 1),
    "IH": (80, 390, 1990, 2550, 1.0, 0.0, 0, 1),
    "IY": (110, 280, 2250, 2950, 1.0, 0.0, 0, 1),
    "OW": (110, 480, 950, 2400, 1.0, 0.0, 0, 1),
    "UW": (140, 310, 870, 2250, 1.0, 0.0, 0, 1),
    "R": (70, 420, 1250, 1600, 0.7, 0.0, 0, 1),
    "W": (70, 300, 650, 2200, 0.6, 0.0, 0, 1),
    "N": (80, 280, 1500, 2500, 0.4, 0.0, 0, 1),
    "V": (50, 300, 1100, 2300, 0.3, 0.2, 5000, 2500),
    "Z": (80, 300, 1700, 2600, 0.3, 0.5, 6000, 1200),
    "S": (120, 300, 1700, 2600, 0.0, 0.9, 6000, 1200),
    "F": (100, 300, 1100, 2300, 0.0, 0.3, 5000, 2800),
    "TH": (90, 300, 1400, 2500, 0.0, 0.25, 5500, 2500),
    "T": (30, 350, 1800, 2700, 0.0, 0.8, 4500, 1500),
    "K": (40, 350, 1900, 2500, 0.0, 0.7, 2200, 900),
    "-": (50, 350, 1700, 2600, 0.0, 0.0, 0, 1),  # closure before T and K
}
SMOOTH = np.hanning(9)[1:-1].astype(np.float32) / 4  # articulation takes about 40 ms
VOICES = {0: 40, 1: 20, 2: 20, 3: 20}  # speakers per split


class Voice(NamedTuple):
    """A speaker: pitch in Hz, length of the vocal tract (1 = average), pace, share of breath."""

    f0: float
    tract: float
    pace: float
    breath: float


def voices(seed: int, split: int, style: Style = HOME) -> list[Voice]:
    """Draw the speakers of a split, who are in no other split."""
    key = (split, *style.name.encode())
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
    speakers = []
    for _ in range(VOICES[split]):
        size = rng.uniform(-1, 1)  # large speakers have low voices and long tracts
        f0 = style.pitch * 2 ** (-0.6 * size + rng.uniform(-0.2, 0.2))
        tract = style.tract + 0.12 * size + rng.uniform(-0.04, 0.04)
        speakers.append(Voice(f0, tract, rng.uniform(*style.pace), rng.uniform(*style.breath)))
    return speakers


def record(
    digits: np.ndarray, voice: Voice, rng: np.random.Generator, style: Style = HOME
) -> np.ndarray:
    """Synthesise one clip: digits [T] to sound [T, 16000]."""
    T = len(digits)
    spoken = digits >= 0
    sound = np.zeros((T, RATE), dtype=np.float32)
    sound[~spoken] = _background(T - int(spoken.sum()), rng)
    words = _speak(digits[spoken], voice, rng, style.things)
    for segment, word in zip(np.flatnonzero(spoken), words, strict=True):
        start = rng.integers(0, RATE - len(word))
        sound[segment, start : start + len(word)] = word
    if style.clutter:
        below = np.flatnonzero(spoken & (rng.random(T) < style.clutter))
        sound[below] += _gain(_draw(rng, len(below), -12, 0)) * _background(len(below), rng)
    if style.echo:
        sound[:, ECHO:] += style.echo * sound[:, :-ECHO]
    level, snr = _draw(rng, T, -6, 6), _draw(rng, T, 1, 21)  # decibels
    return _gain(level) * (sound + _gain(-snr) * _room(T, rng))


def hear(sound: np.ndarray) -> np.ndarray:
    """Compute log-mel features of sound [T, 16000]: [T, 128], eight steps of sixteen bands."""
    blocks = rearrange(sound, "t (steps samples) -> t steps samples", steps=STEPS)
    blocks = blocks * np.hanning(RATE // STEPS).astype(np.float32)
    power = np.abs(np.fft.rfft(blocks)) ** 2 / blocks.shape[-1]  # [T, 8, 1001]
    features = np.log(power @ _mel_filters() + 1e-3)
    return rearrange(features, "t steps bands -> t (steps bands)")


def _draw(rng: np.random.Generator, T: int, low: float, high: float) -> np.ndarray:
    """Draw one number for each of T segments: [T, 1]."""
    return rng.uniform(low, high, (T, 1)).astype(np.float32)


def _gain(decibels: np.ndarray) -> np.ndarray:
    """Convert decibels to a factor of the amplitude."""
    return 10 ** (decibels / 20)


def _speak(
    digits: np.ndarray, voice: Voice, rng: np.random.Generator, things: Things
) -> np.ndarray:
    """Speak digits [S], or other things: sound [S, samples] of power 1 during the word."""
    S, frames = len(digits), things.frames
    mouth = np.empty((S, frames, 7), dtype=np.float32)
    for track, digit in zip(mouth, digits, strict=True):
        track[:] = _articulate(things.sounds[digit], voice, rng, frames)
    formants, voicing = mouth[..., :3] / voice.tract, mouth[..., 3:4]
    friction, centre, width = mouth[..., 4:5], mouth[..., 5:6], mouth[..., 6:7]
    f = np.fft.rfftfreq(2 * HOP, 1 / RATE).astype(np.float32)  # [161]
    tract = voicing * _resonances(f, formants) / np.sqrt(1 + (f / 1000) ** 2)
    hiss = friction * np.exp(-(((f - centre) / width) ** 2) / 2) / 2
    pulses = _spectra(_pulses(S, voice, rng, frames))
    breath = _spectra(rng.standard_normal((S, frames * HOP), dtype=np.float32))
    spectra = pulses * tract + breath * (voice.breath * tract + hiss)  # [S, frames, 161]
    sound = _overlap_add(np.fft.irfft(spectra))
    lasting = np.count_nonzero(voicing + friction, axis=1) * HOP
    return sound * np.sqrt(lasting / (sound**2).sum(1, keepdims=True)).astype(np.float32)


def _articulate(phonemes: str, voice: Voice, rng: np.random.Generator, frames: int) -> np.ndarray:
    """Interpolate the phonemes of one word: [frames, 7], by the last columns of PHONEMES."""
    table = np.array([PHONEMES[phoneme] for phoneme in phonemes.split()], dtype=np.float32)
    milliseconds, targets = table[:, 0], table[:, 1:]
    targets[:, :3] *= rng.uniform(0.95, 1.05, (len(table), 3))
    steps = milliseconds * rng.uniform(0.8, 1.2, len(table)) / voice.pace / 10
    track = np.repeat(targets, np.maximum(steps.round().astype(int), 2), axis=0)[: frames - 6]
    length = len(track)
    track = np.pad(track, ((6, frames - length), (0, 0)), mode="edge")
    track[:6, 3:5] = track[6 + length :, 3:5] = 0  # silence before and after
    return np.lib.stride_tricks.sliding_window_view(track, len(SMOOTH), axis=0) @ SMOOTH


def _resonances(f: np.ndarray, formants: np.ndarray) -> np.ndarray:
    """Magnitude of the tract with formants [..., 3] (Hz) at the frequencies f [F]: [..., F]."""
    gain = np.ones((*formants.shape[:-1], len(f)), dtype=np.float32)
    for k, bandwidth in enumerate((80, 110, 160)):
        centre = formants[..., k, None]
        half = (bandwidth / 2) ** 2
        gain *= (centre**2 + half) ** 2 / (((f - centre) ** 2 + half) * ((f + centre) ** 2 + half))
    return np.sqrt(gain)


def _pulses(S: int, voice: Voice, rng: np.random.Generator, frames: int) -> np.ndarray:
    """Glottal pulses at a falling pitch: [S, samples] of power about 1."""
    time = np.arange(frames * HOP) / RATE
    pitch, fall = voice.f0 * rng.uniform(0.9, 1.2, (S, 1)), voice.f0 * rng.uniform(0, 0.2, (S, 1))
    turns = np.floor(pitch * time - fall * time**2)
    return np.diff(turns, axis=1, prepend=0).astype(np.float32) * math.sqrt(RATE / voice.f0)


def _spectra(sound: np.ndarray) -> np.ndarray:
    """Spectra of the windowed frames: sound [S, samples] to [S, frames, 161]."""
    padded = np.pad(sound, ((0, 0), (0, HOP)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2 * HOP, axis=1)[:, ::HOP]
    window = np.hanning(2 * HOP + 1)[:-1].astype(np.float32)
    return np.fft.rfft(frames * window)


def _overlap_add(frames: np.ndarray) -> np.ndarray:
    """Add half-overlapping frames [S, frames, 320]: sound [S, 11200]."""
    sound = frames[..., :HOP].copy()
    sound[:, 1:] += frames[:, :-1, HOP:]
    return rearrange(sound, "s frames hop -> s (frames hop)")


def _background(S: int, rng: np.random.Generator) -> np.ndarray:
    """Hums and sirens: [S, 16000] of power about 1."""
    time = np.arange(RATE, dtype=np.float32) / RATE
    siren = _draw(rng, S, 0, 1) < 0.5
    pitch = np.where(siren, _draw(rng, S, 300, 1500), _draw(rng, S, 50, 250))
    depth = np.where(siren, _draw(rng, S, 0.1, 0.5), np.float32(0.01))
    sweep = np.sin(TURN * (_draw(rng, S, 0.5, 4) * time + _draw(rng, S, 0, 1)))
    phase = np.cumsum(TURN / RATE * pitch * (1 + depth * sweep), axis=1)
    tones = np.sum([_draw(rng, S, 0, 1) * np.sin(k * phase) for k in (1, 2, 3, 5)], axis=0)
    swell = np.sin(TURN * (_draw(rng, S, 0.5, 3) * time + _draw(rng, S, 0, 1)))
    return tones * (1 + swell / 2)


def _room(T: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of a room, stronger at low frequencies: [T, 16000] of power 1.

    It is the sum of three white noises, of which two are held for 8 and 64 samples.
    """
    noise = rng.standard_normal((T, RATE), dtype=np.float32)
    for held in (8, 64):
        slow = rng.standard_normal((T, RATE // held), dtype=np.float32)
        noise += repeat(slow, "t n -> t (n held)", held=held)
    return noise / math.sqrt(3)


@cache
def _mel_filters() -> np.ndarray:
    """Sixteen triangular filters, equally spaced in mel from 60 to 7600 Hz: [1001, 16]."""
    f = np.fft.rfftfreq(RATE // STEPS, 1 / RATE)
    lowest, highest = (2595 * math.log10(1 + hertz / 700) for hertz in (60, 7600))
    mel = np.linspace(lowest, highest, BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    low, peak, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (f[:, None] - low) / (peak - low), (high - f[:, None]) / (high - peak)
    return np.maximum(np.minimum(rising, falling), 0).astype(np.float32)
