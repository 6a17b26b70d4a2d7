"""Rotary angles: the frequency of each pair of a head's elements, as transformers computes it.

Shape legend: F = head_dim / 2 frequencies.
"""

from __future__ import annotations

import math

import torch

from gpg_megatron.shapes import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling


def inverse_frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> torch.Tensor:
    """float32 [F], radians for each position, on the CPU; as transformers', bit by bit.

    Args:
        theta: base of the angles.
        head_dim: elements of a head that are rotated.
        scaling: None: theta ** (-2 i / head_dim).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain_F = 1.0 / (theta**exponents)
    match scaling:
        case None:
            return plain_F
        case LinearScaling():
            return plain_F / scaling.factor
        case Llama3Scaling():
            return _llama3(plain_F, scaling)
        case YarnScaling():
            return _yarn(theta, theta**exponents, scaling)


def _llama3(plain_F: torch.Tensor, s: Llama3Scaling) -> torch.Tensor:
    """Long waves are slowed down, short ones stay, those between are mixed (Llama 3.1)."""
    wavelength_F = 2 * math.pi / plain_F
    longest, shortest = (s.original_length / x for x in (s.low_freq_factor, s.high_freq_factor))
    slowed_F = torch.where(wavelength_F > longest, plain_F / s.factor, plain_F)
    smooth_F = (s.original_length / wavelength_F - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    mixed_F = (1 - smooth_F) * slowed_F / s.factor + smooth_F * slowed_F
    between_F = (wavelength_F >= shortest) & (wavelength_F <= longest)
    return torch.where(between_F, mixed_F, slowed_F)


def _yarn(theta: float, powers_F: torch.Tensor, s: YarnScaling) -> torch.Tensor:
    """Elements that turn rarely within the original length are slowed down, those that turn often
    stay, with a ramp between (arXiv 2309.00071, section 3.2)."""
    head_dim = 2 * len(powers_F)

    def element(turns: float) -> float:
        """Which turns so often within the original length."""
        whole = math.log(s.original_length / (turns * 2 * math.pi))
        return (head_dim * whole) / (2 * math.log(theta))

    low, high = element(s.beta_fast), element(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp_F = ((torch.arange(len(powers_F), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept_F = 1 - ramp_F
    return 1.0 / (s.factor * powers_F) * (1 - kept_F) + 1.0 / powers_F * kept_F
