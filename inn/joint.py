"""The published network: atmosphere with zeros <-> latent, zeros and spectral lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from inn.coupling import AffineCoupling, FixedPermutation
from inn.errors import MisuseError, ModelError
from inn.layout import Layout


class JointNetwork(nn.Module):
    """The invertible network of Osborne, Armstrong & Fletcher (2019), ApJ 873, 128, section 2.

    One bijection of vectors of ``width`` components: ``[electron density, temperature, velocity, zeros]`` on
    the atmosphere's side, ``[latent, zeros, H-alpha, Ca II 8542]`` on the lines' side, by affine coupling
    blocks with a fixed permutation between each two. `forward` and `inverse` take and return the physical
    parts; `forward_padded` and `inverse_padded` the whole vectors, which alone are exact inverses of each
    other: a network is trained to make the padding zero, never made to.

    The weights' initial values are the published ones.

    Parameters
    ----------
    layout : Layout
        Heights and line windows.
    latent_size : int
        Components of the latent space.
    width : int
        Components of the padded vectors.
    blocks : int
        Number of coupling blocks.

    Raises
    ------
    ModelError
        If the width holds less than an atmosphere, or than the latent space and the lines.

    References
    ----------
    doi:10.3847/1538-4357/ab07b4
    """

    def __init__(self, layout: Layout, latent_size: int = 150, width: int = 384, blocks: int = 5) -> None:
        super().__init__()
        needed = max(layout.atmosphere_size, latent_size + layout.lines_size)
        if width < needed or latent_size < 1 or blocks < 1:
            raise ModelError(
                "the network's vectors do not hold what they should",
                found=f"width {width}, latent size {latent_size}, {blocks} coupling blocks",
                expected=f"a width of at least {needed}, and at least one latent component and one block",
            )
        self.layout = layout
        self.latent_size = latent_size
        self.width = width
        self.record: dict[str, Any] = {}
        self.novelty: nn.Module | None = None
        self.emulator: nn.Module | None = None
        self.latents: nn.Module | None = None
        self.preview: nn.Module | None = None
        self.steps = nn.ModuleList([AffineCoupling(width)])
        for index in range(blocks - 1):
            self.steps.extend([FixedPermutation.published(index, width), AffineCoupling(width)])

    @property
    def latent_slice(self) -> slice:
        """Where the lines' side of the padded vectors holds the latent."""
        return slice(0, self.latent_size)

    @property
    def lines_slice(self) -> slice:
        """Where the lines' side of the padded vectors holds the lines; its padding lies before."""
        return slice(self.width - self.layout.lines_size, self.width)

    @property
    def atmosphere_slice(self) -> slice:
        """Where the atmosphere's side of the padded vectors holds the atmosphere; its padding lies after."""
        return slice(0, self.layout.atmosphere_size)

    def architecture(self) -> dict[str, Any]:
        """Return the constructor's arguments but the layout, as JSON holds them."""
        return {"latent_size": self.latent_size, "width": self.width, "blocks": (len(self.steps) + 1) // 2}

    @classmethod
    def from_architecture(cls, layout: Layout, architecture: Mapping[str, Any]) -> JointNetwork:
        """Build a network, with new weights, from what `architecture` returned."""
        return cls(layout, **architecture)

    def forward(self, atmosphere: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the lines an atmosphere emits, and the latent that tells it from others that emit the same.

        Parameters
        ----------
        atmosphere : torch.Tensor
            Shape (n, 150), in network units.

        Returns
        -------
        lines : torch.Tensor
            Shape (n, 60), relative to their joint maximum.
        latent : torch.Tensor
            Shape (n, latent_size).

        Raises
        ------
        MisuseError
            If the last dimension is not an atmosphere's.
        """
        joined = self.forward_padded(self.pad_atmosphere(atmosphere))
        return joined[..., self.lines_slice], joined[..., self.latent_slice]

    def inverse(
        self,
        lines: torch.Tensor,
        latent: torch.Tensor,
        mu: torch.Tensor | float | None = None,
        calibration_error: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Infer one atmosphere for each pair of observed lines and latent.

        Parameters
        ----------
        lines : torch.Tensor
            Shape (n, 60), relative to their joint maximum.
        latent : torch.Tensor
            Shape (n, latent_size): draws of a standard normal distribution.
        mu, calibration_error : torch.Tensor or float, optional
            Taken so that all networks are called alike, and without effect: this network was trained for one
            viewing angle and for lines known without error.

        Returns
        -------
        torch.Tensor
            Shape (n, 150), in network units.

        Raises
        ------
        MisuseError
            If a last dimension is not the lines' or the latent's.
        """
        return self.inverse_padded(self.pad_lines(lines, latent))[..., self.atmosphere_slice]

    def inverse_draws(
        self,
        lines: torch.Tensor,
        latent: torch.Tensor,
        mu: torch.Tensor | float | None = None,
        calibration_error: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Atmospheres of every pixel with every one of the same latents.

        The first half of the padded vectors holds nothing but latent and padding, so that the last block's
        subnets on it, a tenth of all products, are computed once for all pixels.

        Parameters
        ----------
        lines : torch.Tensor
            Shape (n, 60).
        latent : torch.Tensor
            Shape (draws, latent_size): shared by all pixels.
        mu, calibration_error : torch.Tensor or float, optional
            As for `inverse`: without effect.

        Returns
        -------
        torch.Tensor
            Shape (n, draws, 150), in network units.

        Raises
        ------
        MisuseError
            If a last dimension is not the lines' or the latent's.
        """
        self._expect("lines", lines, self.layout.lines_size)
        self._expect("latent", latent, self.latent_size)
        last, before = self.steps[-1], self.steps[:-1]
        assert isinstance(last, AffineCoupling)
        first_half = last.halves[0]
        if self.latent_size <= first_half <= self.width - self.layout.lines_size:
            padded = self.pad_lines(lines.new_zeros((len(latent), self.layout.lines_size)), latent)
            own = self.pad_lines(lines, latent.new_zeros((len(lines), self.latent_size)))
            x = last.inverse_halves(padded[:, :first_half], own[:, None, first_half:])
        else:  # latents reach into the second half, or lines into the first
            pairs = (len(lines), len(latent), -1)
            x = last.inverse(self.pad_lines(lines[:, None].expand(pairs), latent.expand(pairs)))
        for step in reversed(cast("list[AffineCoupling | FixedPermutation]", list(before))):
            x = step.inverse(x)
        return x[..., self.atmosphere_slice]

    def forward_padded(self, x: torch.Tensor) -> torch.Tensor:
        """Transform padded vectors of the atmosphere's side, shape (n, width), to the lines' side."""
        for step in self.steps:
            x = step(x)
        return x

    def inverse_padded(self, y: torch.Tensor) -> torch.Tensor:
        """Transform padded vectors of the lines' side, shape (n, width), to the atmosphere's side."""
        for step in reversed(cast("list[AffineCoupling | FixedPermutation]", list(self.steps))):
            y = step.inverse(y)
        return y

    def pad_atmosphere(self, atmosphere: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Join atmospheres, shape (n, 150), and their padding, zeros if left out, to shape (n, width)."""
        self._expect("atmosphere", atmosphere, self.layout.atmosphere_size)
        if padding is None:
            padding = atmosphere.new_zeros((*atmosphere.shape[:-1], self.width - self.layout.atmosphere_size))
        return torch.cat((atmosphere, padding), dim=-1)

    def pad_lines(
        self, lines: torch.Tensor, latent: torch.Tensor, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Join lines (n, 60), latent (n, latent_size) and padding, zeros if left out, to shape (n, width)."""
        self._expect("lines", lines, self.layout.lines_size)
        self._expect("latent", latent, self.latent_size)
        if padding is None:
            free = self.width - self.latent_size - self.layout.lines_size
            padding = lines.new_zeros((*lines.shape[:-1], free))
        return torch.cat((latent, padding, lines), dim=-1)

    @staticmethod
    def _expect(name: str, vectors: torch.Tensor, size: int) -> None:
        if vectors.shape[-1] != size:
            raise MisuseError(
                "the vectors do not have the network's length",
                where=name,
                found=f"shape {tuple(vectors.shape)}",
                expected=f"(..., {size})",
            )

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.architecture().items())
        return f"JointNetwork({self.layout!r}, {arguments})"
