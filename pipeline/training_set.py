"""Training examples from a grid: profiles as the instrument would deliver them, drawn anew for every batch.

A grid holds clean profiles at fine wavelengths. An observation is smoothed by the instrument, sampled
coarsely, noisy, comes at any heliocentric angle, and its two lines are calibrated against each other only to
some per cent. Each batch goes through the steps of a real pixel: CRISP's transmission profile and its own
wavelengths, photon noise, a calibration error between the lines, linear interpolation onto the network's
points, division by the joint maximum. A bulk Doppler shift, which moves the velocity at all heights and both
lines together, is exact physics as well. Between the grid's values of mu profiles follow a cubic spline: with
nine values from 0.2 to 1 within 0.3 % of the maximum for nine atmospheres of ten, and within 2 % for each
of 40 (root mean square over the line at the worst mu).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.linalg import block_diag
from torch import Tensor

from inn.layout import Layout
from inn.scaling import scale_atmosphere
from pipeline.crisp.instrument import response_matrix
from pipeline.crisp.wavelengths import LIGHT_SPEED
from pipeline.errors import InputError, MisuseError
from pipeline.grids.store import open_grid, split
from pipeline.spectra import sampling_matrix, window_matrix

CRISP_WAVELENGTHS: dict[str, NDArray[np.float64]] = {
    "halpha": np.linspace(6564.584 - 1.4, 6564.584 + 1.4, 15),
    "ca8542": np.linspace(8544.44 - 1.2, 8544.44 + 1.2, 25),
}
"""Vacuum wavelengths (Angstrom) at which CRISP scans the two lines in the F-CHROMA observations."""


@dataclass(frozen=True)
class Augmentation:
    """What an observation adds to a clean profile, and how much of it.

    Parameters
    ----------
    noise : pair of float
        Photon noise (one standard deviation, as a fraction of each line's maximum): drawn per example,
        evenly in its logarithm, between these.
    calibration_error : pair of float
        Relative error of one line's intensity against the other's: its standard deviation is drawn evenly
        between these for each example, and is told to the network.
    doppler : float
        Standard deviation of a bulk velocity that is added at all heights, km/s.
    doppler_steps : int
        Number of bulk velocities, evenly spaced between plus and minus 2.5 standard deviations, among which
        it is drawn; odd, so that zero is among them.
    transmission : bool
        Whether profiles pass CRISP's transmission profile before they are sampled.

    Raises
    ------
    MisuseError
        `doppler_steps` is not an odd number.
    """

    noise: tuple[float, float] = (0.003, 0.02)
    calibration_error: tuple[float, float] = (0.0, 0.2)
    doppler: float = 1.5
    doppler_steps: int = 11
    transmission: bool = True

    def __post_init__(self) -> None:
        if self.doppler_steps < 1 or self.doppler_steps % 2 == 0:
            raise MisuseError(
                "zero must be among the bulk velocities",
                where="doppler_steps",
                found=self.doppler_steps,
                expected="an odd number",
            )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Augmentation:
        """Settings as a model's record holds them."""
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
        }
        return cls(**settings)

    @property
    def velocities(self) -> NDArray[np.float64]:
        """Bulk velocities among which an example's is drawn, km/s."""
        if self.doppler == 0.0 or self.doppler_steps < 2:
            return np.zeros(1)
        return self.doppler * np.linspace(-2.5, 2.5, self.doppler_steps)

    @property
    def velocity_weights(self) -> NDArray[np.float64]:
        """Probability of each of `velocities`."""
        if self.doppler == 0.0:
            return np.ones(1)
        weights = np.exp(-0.5 * (self.velocities / self.doppler) ** 2)
        normalised: NDArray[np.float64] = weights / weights.sum()
        return normalised


class Batch(NamedTuple):
    """Examples for a network, one row each.

    Attributes
    ----------
    atmosphere : Tensor, shape (n, atmosphere_size)
        Network units.
    lines : Tensor, shape (n, lines_size)
        At the network's points, divided by their joint maximum.
    mu : Tensor, shape (n,)
    calibration_error : Tensor, shape (n,)
        Relative error between the lines, one standard deviation.
    microturbulence : Tensor, shape (n,)
        km/s; 0 where the grid does not say.
    """

    atmosphere: Tensor
    lines: Tensor
    mu: Tensor
    calibration_error: Tensor
    microturbulence: Tensor


class TrainingSet:
    """Atmospheres of some simulations of a grid, with their profiles at the instrument's wavelengths.

    Parameters
    ----------
    grid : xarray.Dataset
        A training grid, or some samples of one, all of them converged.
    layout : Layout
        Heights and line windows of the network that learns from it.
    augmentation : Augmentation
        What an observation adds.
    wavelengths : dict of str to array
        The instrument's vacuum wavelengths (Angstrom) of each line.

    Raises
    ------
    InputError
        The grid's heights or wavelengths do not suit the layout.
    """

    def __init__(
        self,
        grid: xr.Dataset,
        layout: Layout,
        augmentation: Augmentation | None = None,
        wavelengths: dict[str, NDArray[np.float64]] | None = None,
    ) -> None:
        self.layout = layout
        self.augmentation = Augmentation() if augmentation is None else augmentation
        axes = CRISP_WAVELENGTHS if wavelengths is None else wavelengths
        heights = grid["height"].to_numpy()
        if heights.shape != layout.heights.shape or not np.allclose(heights, layout.heights, atol=1e-6):
            raise InputError(
                "the grid's heights are not the network's",
                where="height",
                found=f"{heights.size} from {heights.min():g} to {heights.max():g} Mm",
                expected=f"{layout.heights.size} from {layout.heights[0]:g} to {layout.heights[-1]:g} Mm",
                remedy="interpolate the grid's atmospheres onto the network's heights",
            )
        self.simulation: NDArray[np.generic] = grid["simulation"].to_numpy()
        order = np.argsort(grid["mu"].to_numpy())
        self.mu = torch.from_numpy(grid["mu"].to_numpy()[order].astype(np.float32))
        self._electron_density = torch.from_numpy(grid["electron_density"].to_numpy().astype(np.float64))
        self._temperature = torch.from_numpy(grid["temperature"].to_numpy().astype(np.float64))
        self._velocity = torch.from_numpy(grid["velocity"].to_numpy().astype(np.float64))
        if "parameter_microturbulence" in grid:
            microturbulence = grid["parameter_microturbulence"].to_numpy().astype(np.float32)
        else:
            microturbulence = np.zeros(self.simulation.size, dtype=np.float32)
        self._microturbulence = torch.from_numpy(microturbulence)
        parts, matrices, self._line_sizes = [], [], []
        for window in layout.lines:
            axis = _used(axes[window.name], window.wavelengths)
            offsets = grid[f"wavelength_{window.name}"].to_numpy().astype(np.float64)
            profiles = grid[window.name].to_numpy()[:, order]
            parts.append(
                self._shifted(
                    window.name, profiles, offsets, axis - window.rest_wavelength, window.rest_wavelength
                )
            )
            matrices.append(window_matrix(axis, window))
            self._line_sizes.append(axis.size)
        # (samples, bulk velocities, mu, wavelengths): both lines one after the other
        self._profiles = torch.from_numpy(np.concatenate(parts, axis=-1))
        self._to_network = torch.from_numpy(block_diag(*matrices).astype(np.float32))
        self._bulk = torch.from_numpy(self.augmentation.velocities)
        self._bulk_weights = torch.from_numpy(self.augmentation.velocity_weights)

    def __len__(self) -> int:
        return int(self.simulation.size)

    def _shifted(
        self,
        line: str,
        profiles: NDArray[np.floating],
        offsets: NDArray[np.float64],
        axis: NDArray[np.float64],
        rest: float,
    ) -> NDArray[np.float32]:
        """Profiles (samples, bulk velocities, mu, axis) of atmospheres that move as a whole."""
        velocities = self.augmentation.velocities

        def measure(seen: NDArray[np.float64]) -> NDArray[np.float64]:
            if self.augmentation.transmission:
                return response_matrix(line, offsets, seen)
            return sampling_matrix(offsets, seen)

        shape = (profiles.shape[0], velocities.size, profiles.shape[1], axis.size)
        result = np.empty(shape, dtype=np.float32)
        for number, velocity in enumerate(velocities):
            for angle, mu in enumerate(self.mu.tolist()):
                # Upflow shifts the profile to the blue, so that a fixed wavelength sees its redder part.
                seen = axis + rest * mu * velocity / LIGHT_SPEED
                try:
                    matrix = measure(seen)
                except InputError as error:
                    raise InputError(
                        f"the grid's {line} profiles are too short for observations that move",
                        where=f"wavelength_{line}",
                        found=f"{offsets.min():.3f} to {offsets.max():.3f} Angstrom from rest",
                        expected=f"{seen.min():.3f} to {seen.max():.3f}, for {velocity:+.1f} km/s",
                        remedy="train with a smaller bulk Doppler shift (Augmentation.doppler; the recipe "
                        "radynversion has none), or synthesise a wider range",
                    ) from error
                result[:, number, angle] = profiles[:, angle].astype(np.float32) @ matrix.T.astype(np.float32)
        return result

    def atmospheres(self, samples: Tensor | None = None, bulk: Tensor | None = None) -> Tensor:
        """Atmospheres in network units, shape (n, atmosphere_size), float32.

        Parameters
        ----------
        samples : Tensor of int, shape (n,), optional
            Which ones; all if left out.
        bulk : Tensor, shape (n,), optional
            Velocity added at all heights, km/s.

        Returns
        -------
        Tensor
        """
        chosen = torch.arange(len(self)) if samples is None else samples
        velocity = self._velocity[chosen]
        if bulk is not None:
            velocity = velocity + bulk[:, None]
        scaled: Tensor = scale_atmosphere(self._electron_density[chosen], self._temperature[chosen], velocity)
        return scaled.float()

    def _at_angle(self, samples: Tensor, bulk: Tensor, mu: Tensor) -> Tensor:
        """Profiles (n, wavelengths) between the grid's angles."""
        weights = torch.from_numpy(angle_weights(self.mu.numpy(), mu.numpy()).astype(np.float32))
        return torch.einsum("na,naw->nw", weights, self._profiles[samples, bulk])

    def _network_lines(self, profiles: Tensor) -> Tensor:
        lines = profiles @ self._to_network.T
        return lines / lines.amax(dim=-1, keepdim=True)

    def observe(self, samples: Tensor, mu: Tensor, generator: torch.Generator) -> Batch:
        """Observe chosen samples at chosen angles, with everything else drawn.

        Parameters
        ----------
        samples : Tensor of int, shape (n,)
        mu : Tensor, shape (n,)
            Cosine of the heliocentric angle, within the grid's.
        generator : torch.Generator
            Source of all random numbers.

        Returns
        -------
        Batch
            n examples.
        """
        count, settings = len(samples), self.augmentation
        bulk = torch.multinomial(self._bulk_weights, count, replacement=True, generator=generator)
        profiles = self._at_angle(samples, bulk, mu)
        low, high = settings.calibration_error
        calibration_error = low + (high - low) * torch.rand(count, generator=generator)
        factor = torch.exp(calibration_error * torch.randn(count, generator=generator))
        low, high = settings.noise
        noise = low * (high / low) ** torch.rand(count, generator=generator)
        first = self._line_sizes[0]
        observed = []
        for line in (profiles[:, :first], profiles[:, first:] * factor[:, None]):
            level = (noise * line.amax(dim=-1))[:, None]
            observed.append(line + level * torch.randn(line.shape, generator=generator))
        return Batch(
            self.atmospheres(samples, self._bulk[bulk]),
            self._network_lines(torch.cat(observed, dim=-1)),
            mu,
            calibration_error,
            self._microturbulence[samples],
        )

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Draw a batch: samples with replacement, angles evenly over the grid's range of mu.

        Parameters
        ----------
        count : int
            Examples.
        generator : torch.Generator
            Source of all random numbers.

        Returns
        -------
        Batch
            `count` examples, observed as `observe` does.
        """
        samples = torch.randint(len(self), (count,), generator=generator)
        return self.observe(samples, self.draw_mu(count, generator), generator)

    def draw_each(self, generator: torch.Generator) -> Batch:
        """Observe every sample once, at an angle drawn as `draw` does.

        Parameters
        ----------
        generator : torch.Generator
            Source of all random numbers.

        Returns
        -------
        Batch
            In the samples' order.
        """
        return self.observe(torch.arange(len(self)), self.draw_mu(len(self), generator), generator)

    def draw_mu(self, count: int, generator: torch.Generator) -> Tensor:
        """Angles, evenly spread over the grid's range of mu, shape (count,).

        Parameters
        ----------
        count : int
            Examples.
        generator : torch.Generator
            Source of all random numbers.

        Returns
        -------
        Tensor, shape (count,)
            Cosines of the heliocentric angle.
        """
        low, high = float(self.mu[0]), float(self.mu[-1])
        return low + (high - low) * torch.rand(count, generator=generator)

    def clean(self) -> Batch:
        """Every sample at every angle of the grid, at rest and without noise, angles varying fastest.

        Returns
        -------
        Batch
            As many examples as samples times angles.
        """
        samples = torch.arange(len(self)).repeat_interleave(len(self.mu))
        mu = self.mu.repeat(len(self))
        still = torch.full_like(samples, int(np.abs(self.augmentation.velocities).argmin()))
        return Batch(
            self.atmospheres(samples),
            self._network_lines(self._at_angle(samples, still, mu)),
            mu,
            torch.zeros_like(mu),
            self._microturbulence[samples],
        )

    def draw_clean(self, count: int, generator: torch.Generator) -> Batch:
        """Draw a batch with bulk velocities but without noise or calibration error, for an emulator.

        Parameters
        ----------
        count : int
            Examples.
        generator : torch.Generator
            Source of all random numbers.

        Returns
        -------
        Batch
            `count` examples; samples and angles as `draw` takes them.
        """
        samples = torch.randint(len(self), (count,), generator=generator)
        mu = self.draw_mu(count, generator)
        bulk = torch.multinomial(self._bulk_weights, count, replacement=True, generator=generator)
        return Batch(
            self.atmospheres(samples, self._bulk[bulk]),
            self._network_lines(self._at_angle(samples, bulk, mu)),
            mu,
            torch.zeros_like(mu),
            self._microturbulence[samples],
        )


def angle_weights(angles: NDArray[np.floating], mu: NDArray[np.floating]) -> NDArray[np.float64]:
    """Weights of a grid's angles in a profile between them: a cubic spline in mu.

    Parameters
    ----------
    angles : ndarray, shape (m,)
        The grid's values of mu, increasing.
    mu : ndarray, shape (n,)
        Those wanted, within them.

    Returns
    -------
    ndarray, shape (n, m)
        ``profile(mu) = weights @ profiles``; each row sums to one.
    """
    if angles.size == 1:
        return np.ones((mu.size, 1))
    # A spline is linear in its values: its weights are those of the unit vectors.
    weights: NDArray[np.float64] = CubicSpline(angles.astype(np.float64), np.eye(angles.size))(mu)
    return weights


def _used(axis: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The part of an instrument's axis that linear interpolation onto the points takes anything from."""
    first = max(int(np.searchsorted(axis, points[0], side="right")) - 1, 0)
    last = min(int(np.searchsorted(axis, points[-1], side="left")), axis.size - 1)
    return axis[first : last + 1]


def open_parts(
    grid: str | Path, layout: Layout, augmentation: Augmentation | None = None
) -> dict[str, TrainingSet]:
    """Open a grid and split its converged samples by simulation.

    Parameters
    ----------
    grid : path
        A grid store.
    layout : Layout
        The network's.
    augmentation : Augmentation, optional
        What an observation adds.

    Returns
    -------
    dict of str to TrainingSet
        ``"train"``, ``"validation"`` and ``"test"``.

    Raises
    ------
    InputError
        A part has no samples, or the grid does not suit the layout.
    """
    with open_grid(grid) as store:
        samples = store.isel(sample=np.flatnonzero(store["converged"].to_numpy())).load()
    names = split(samples["simulation"].to_numpy())
    sets = {}
    for part in ("train", "validation", "test"):
        chosen = np.flatnonzero(names == part)
        if chosen.size == 0:
            raise InputError(
                f"the grid has no simulation for the {part} part",
                where=grid,
                found=f"{samples.sizes['sample']} converged samples",
                remedy="make a larger grid: simulations are split 80/10/10",
            )
        sets[part] = TrainingSet(samples.isel(sample=chosen), layout, augmentation)
    return sets


def content_hash(grid: str | Path) -> str:
    """SHA-256 of everything a network can learn from a grid: its variables' names, shapes and numbers.

    Parameters
    ----------
    grid : path
        A grid store.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    StoreError
        It is not a readable grid.
    """
    digest = hashlib.sha256()
    with open_grid(grid) as store:
        for name in sorted(str(name) for name in store.variables):
            values = np.ascontiguousarray(store[name].to_numpy())
            digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()


def grid_description(grid: str | Path) -> dict[str, str]:
    """What a grid says of itself that users of a network trained on it must know.

    Parameters
    ----------
    grid : path
        A grid store.

    Returns
    -------
    dict of str to str
        What it tells of ``title``, ``height_zero``, ``statistical_equilibrium``, and its ``settings``' hash.

    Raises
    ------
    StoreError
        It is not a readable grid.
    """
    with open_grid(grid) as store:
        told = {name: store.attrs.get(name) for name in ("title", "height_zero", "statistical_equilibrium")}
        told["settings"] = (store.attrs.get("made_from") or {}).get("settings")
    return {name: str(value) for name, value in told.items() if value is not None}
