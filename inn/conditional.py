"""The recommended network: a conditional flow between latents and atmospheres, given the lines.

An atmosphere of 150 numbers has far fewer degrees of freedom than that. Brought to normal scores, it is
rotated onto the principal components of the training atmospheres; the leading ones go through a coupling flow
that sees the lines, and the others, which hold what little variance is left, keep the Gaussian of the
training set. Together that is a bijection between 150 latents and the 150 numbers of an atmosphere, for given
lines.

What depends on the pixel alone (the lines, mu, the calibration error) is brought to a short context vector
once, and enters the coupling networks as a bias of their hidden layers; what depends on the draw alone (the
Gaussian components) is computed once for all pixels. What remains for every pair of a pixel and a draw is
small: about 0.3 MFLOP with the default widths, against 24 for the joint network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from inn.coupling import soft_clamp
from inn.emulator import Emulator
from inn.errors import MisuseError
from inn.layout import Layout
from inn.marginals import NormalScores
from inn.novelty import Novelty

FAINTEST = 1e-3
"""Normalised intensity below which a line's logarithm is held constant."""

SMALLEST_SCALE = 0.02
"""Smallest scale (network units) by which a number of an atmosphere is divided before the rotation."""

SMALLEST_SPREAD = 1e-3
"""Smallest standard deviation of a principal component, in scaled numbers."""

DEFAULT_CALIBRATION_ERROR = 0.05
"""Relative error between the two lines that is assumed where none is given."""


class _Step(nn.Module):
    """One affine coupling step: some components are scaled and shifted, given the others and the context.

    The last layer starts at zero, so that an untrained step is the identity.
    """

    def __init__(self, kept: int, changed: int, context: int, hidden: int) -> None:
        super().__init__()
        # The hidden layers' biases come with the context.
        self.first = nn.Linear(kept, hidden, bias=False)
        self.second = nn.Linear(hidden, hidden, bias=False)
        self.last = nn.Linear(hidden, 2 * changed)
        self.first_context = nn.Linear(context, hidden)
        self.second_context = nn.Linear(context, hidden)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, kept: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the scale, and the shift, of the changed components."""
        hidden = _product_plus(kept, self.first.weight, self.first_context(context))
        hidden = functional.leaky_relu(hidden, inplace=True)
        hidden = _product_plus(hidden, self.second.weight, self.second_context(context))
        hidden = functional.leaky_relu(hidden, inplace=True)
        raw, shift = self.last(hidden).chunk(2, dim=-1)
        return soft_clamp(raw), shift


class ConditionalNetwork(nn.Module):
    """Bijection between latents and atmospheres, given lines, mu and their relative calibration error.

    Parameters
    ----------
    layout : Layout
        Heights and line windows.
    components : int
        Leading principal components of the atmosphere that the flow models.
    steps : int
        Coupling steps.
    hidden : int
        Width of the coupling networks' two hidden layers.
    context : int
        Length of the context vector.
    embedding : int
        Width of the network that makes the context from the lines.
    dropout : float
        Share of the embedding's hidden units dropped in training. The coupling networks drop none: their
        exponentials would make of that noise a bias when it is gone.
    tails : bool
        Whether the context also gives each component a skewness and a weight of its tails (sinh-arcsinh
        transformation: Jones & Pewsey 2009, Biometrika 96, 761, doi:10.1093/biomet/asp053). Affine steps
        alone make posteriors with a sharp peak and far tails too wide in the middle.
    normal_scores : bool
        Whether components are those of the numbers' normal scores (`inn.marginals`) or of the numbers.
    default_calibration_error : float
        Relative error between the two lines that is assumed where none is given.

    Notes
    -----
    The principal components and the standardisation of the conditions are buffers, which `fit_statistics`
    takes from the training set; a new network holds the identity.
    """

    def __init__(
        self,
        layout: Layout,
        components: int = 32,
        steps: int = 6,
        hidden: int = 128,
        context: int = 64,
        embedding: int = 128,
        dropout: float = 0.0,
        tails: bool = False,
        normal_scores: bool = False,
        default_calibration_error: float = DEFAULT_CALIBRATION_ERROR,
    ) -> None:
        super().__init__()
        size = layout.atmosphere_size
        if not 2 <= components <= size:
            raise MisuseError(
                "the flow needs two components at least, and no more than an atmosphere has numbers",
                where="components",
                found=components,
                expected=f"2 to {size}",
            )
        self.layout = layout
        self.latent_size = size
        self.components = components
        self.default_calibration_error = default_calibration_error
        self._architecture: dict[str, Any] = {
            "components": components,
            "steps": steps,
            "hidden": hidden,
            "context": context,
            "embedding": embedding,
            "dropout": dropout,
            "tails": tails,
            "normal_scores": normal_scores,
            "default_calibration_error": default_calibration_error,
        }
        features = 2 * layout.lines_size + 2
        self.embed = nn.Sequential(
            nn.Linear(features, embedding),
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Linear(embedding, embedding),
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Linear(embedding, context),
        )
        # A first guess of every component and of its spread (and tails), from the context alone.
        self.tails = tails
        self.guess = nn.Linear(context, (4 if tails else 2) * components)
        nn.init.zeros_(self.guess.weight)
        nn.init.zeros_(self.guess.bias)
        # Even components change given the odd ones, then the odd ones given the even, and so on.
        halves = ((components + 1) // 2, components // 2)
        self.steps = nn.ModuleList(
            _Step(halves[index % 2], halves[1 - index % 2], context, hidden) for index in range(steps)
        )
        self.scores = NormalScores(size) if normal_scores else None
        self.register_buffer("atmosphere_mean", torch.zeros(size))
        self.register_buffer("atmosphere_scale", torch.ones(size))
        self.register_buffer("rotation", torch.eye(size))
        self.register_buffer("component_scale", torch.ones(size))
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_scale", torch.ones(features))
        self.novelty: Novelty | None = None
        self.emulator: Emulator | None = None
        self.record: dict[str, Any] = {}

    atmosphere_mean: Tensor
    atmosphere_scale: Tensor
    rotation: Tensor
    component_scale: Tensor
    feature_mean: Tensor
    feature_scale: Tensor

    def architecture(self) -> dict[str, Any]:
        """Constructor arguments besides the layout, as JSON holds them."""
        return dict(self._architecture)

    @classmethod
    def from_architecture(cls, layout: Layout, architecture: Mapping[str, Any]) -> Self:
        """Build an untrained network from what `architecture` returned."""
        return cls(layout, **architecture)

    # Statistics of the training set

    def fit_statistics(
        self, atmosphere: Tensor, lines: Tensor, mu: Tensor, calibration_error: Tensor
    ) -> None:
        """Take the principal components and the standardisation of the conditions from a training set.

        Parameters
        ----------
        atmosphere : Tensor, shape (n, atmosphere_size)
            Network units.
        lines : Tensor, shape (m, lines_size)
            Normalised lines with the noise the network will see.
        mu, calibration_error : Tensor, shape (m,)
            The conditions of `lines`.
        """
        if self.scores is not None:
            self.scores.fit(atmosphere)
        values = self.to_scores(atmosphere).double()
        mean = values.mean(dim=0)
        # Every number counts alike, but those that hardly vary (the photosphere's) are not blown up.
        scale = (values - mean).square().mean(dim=0).sqrt().clamp_min(SMALLEST_SCALE)
        variance, rotation = torch.linalg.eigh(torch.cov(((values - mean) / scale).T))
        spread = variance.clamp_min(0.0).sqrt().flip(0)
        self.atmosphere_mean.copy_(mean)
        self.atmosphere_scale.copy_(scale)
        self.rotation.copy_(rotation.flip(1))
        # Components without variance still get some: a bijection in float32 cannot divide by nothing.
        self.component_scale.copy_(spread.clamp_min(SMALLEST_SPREAD))
        features = self._features(lines.double(), mu.double(), calibration_error.double())
        self.feature_mean.copy_(features.mean(dim=0))
        self.feature_scale.copy_(features.std(dim=0).clamp_min(1e-3))

    def to_scores(self, atmosphere: Tensor) -> Tensor:
        """Normal scores (..., atmosphere_size) of atmospheres; without them, the atmospheres themselves."""
        return atmosphere if self.scores is None else self.scores(atmosphere)

    def from_scores(self, scores: Tensor) -> Tensor:
        """Atmospheres in network units from normal scores: undoes `to_scores`, and ascends in each number."""
        return scores if self.scores is None else self.scores.inverse(scores)

    def to_components(self, atmosphere: Tensor) -> Tensor:
        """Whitened principal components (n, atmosphere_size), by falling variance, of atmospheres."""
        standard = (self.to_scores(atmosphere) - self.atmosphere_mean) / self.atmosphere_scale
        return standard @ self.rotation / self.component_scale

    def from_components(self, components: Tensor) -> Tensor:
        """Atmospheres in network units from whitened principal components: the inverse of `to_components`."""
        standard = (components * self.component_scale) @ self.rotation.T
        return self.from_scores(standard * self.atmosphere_scale + self.atmosphere_mean)

    # Conditions

    def _features(self, lines: Tensor, mu: Tensor, calibration_error: Tensor) -> Tensor:
        return torch.cat(
            (
                lines,
                lines.clamp_min(FAINTEST).log10(),
                mu[:, None],
                calibration_error[:, None],
            ),
            dim=-1,
        )

    def context(
        self,
        lines: Tensor,
        mu: Tensor | float | None,
        calibration_error: Tensor | float | None = None,
    ) -> Tensor:
        """What the flow needs to know of each pixel.

        Parameters
        ----------
        lines : Tensor, shape (n, lines_size)
            Normalised lines.
        mu : Tensor, shape (n,), or float
            Cosine of the heliocentric angle.
        calibration_error : Tensor, shape (n,), or float, optional
            Relative error between the lines, one standard deviation.

        Returns
        -------
        Tensor, shape (n, context)

        Raises
        ------
        MisuseError
            `mu` is missing.
        """
        if mu is None:
            raise MisuseError(
                "this network is conditioned on mu",
                where="mu",
                found="none",
                expected="the cosine of the heliocentric angle, one number per pixel",
                remedy="pass mu; an observation store holds it as mu(time)",
            )
        if calibration_error is None:
            calibration_error = self.default_calibration_error
        count = lines.shape[0]
        features = self._features(
            lines,
            torch.as_tensor(mu, dtype=lines.dtype, device=lines.device).expand(count),
            torch.as_tensor(calibration_error, dtype=lines.dtype, device=lines.device).expand(count),
        )
        embedded: Tensor = self.embed((features - self.feature_mean) / self.feature_scale)
        return embedded

    # The flow on the leading components

    def _guess(self, context: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Mean, logarithm of the spread, and skewness with logarithm of the tails' weight, if any."""
        mean, raw, *tails = self.guess(context).chunk(4 if self.tails else 2, dim=-1)
        # Bounded, lest a rare draw lands beyond all numbers.
        bounded = (0.5 * torch.tanh(tails[0]), 0.5 * torch.tanh(tails[1])) if tails else None
        return mean, 3.0 * torch.tanh(raw / 3.0), bounded

    def normalise_components(self, leading: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of leading components, and the logarithm of the Jacobian determinant.

        Parameters
        ----------
        leading : Tensor, shape (..., components)
            Whitened.
        context : Tensor, broadcastable to shape (..., context)

        Returns
        -------
        latent : Tensor, shape (..., components)
        log_determinant : Tensor, shape (...)
        """
        mean, log_spread, tails = self._guess(context)
        values = (leading - mean) * (-log_spread).exp()
        log_determinant = -log_spread.sum(dim=-1)
        if tails is not None:
            skewness, log_weight = tails
            angle = (values.asinh() - skewness) * (-log_weight).exp()
            slope = angle.cosh().log() - log_weight - 0.5 * values.square().log1p()
            values = angle.sinh()
            log_determinant = log_determinant + slope.sum(dim=-1)
        halves = [values[..., 0::2], values[..., 1::2]]
        for index, step in enumerate(self.steps):
            kept, changed = index % 2, 1 - index % 2
            log_scale, shift = step(halves[kept], context)
            halves[changed] = halves[changed] * log_scale.exp() + shift
            log_determinant = log_determinant + log_scale.sum(dim=-1)
        return _interleave(halves), log_determinant

    def generate_components(self, latent: Tensor, context: Tensor) -> Tensor:
        """Leading components from latents: the inverse of `normalise_components`."""
        halves = [latent[..., 0::2], latent[..., 1::2]]
        for index in reversed(range(len(self.steps))):
            kept, changed = index % 2, 1 - index % 2
            log_scale, shift = self.steps[index](halves[kept], context)
            halves[changed] = (halves[changed] - shift) * log_scale.neg().exp()
        mean, log_spread, tails = self._guess(context)
        values = _interleave(halves)
        if tails is not None:
            skewness, log_weight = tails
            values = (values.asinh() * log_weight.exp() + skewness).sinh()
        return values * log_spread.exp() + mean

    def components_log_prob(self, leading: Tensor, context: Tensor) -> Tensor:
        """Logarithm of the density of leading components (..., components) given the context: shape (...)."""
        latent, log_determinant = self.normalise_components(leading, context)
        return _log_normal(latent) + log_determinant

    # The whole bijection

    def inverse(
        self,
        lines: Tensor,
        latent: Tensor,
        mu: Tensor | float | None = None,
        calibration_error: Tensor | float | None = None,
    ) -> Tensor:
        """Atmospheres of given lines and latents.

        Parameters
        ----------
        lines : Tensor, shape (n, lines_size)
            H-alpha, then Ca II 8542, divided by their joint maximum.
        latent : Tensor, shape (n, latent_size)
            Standard normal.
        mu : Tensor, shape (n,), or float
            Cosine of the heliocentric angle; required.
        calibration_error : Tensor, shape (n,), or float, optional
            Relative error between the lines, one standard deviation.

        Returns
        -------
        Tensor, shape (n, atmosphere_size)
            Network units.
        """
        context = self.context(lines, mu, calibration_error)
        leading = self.generate_components(latent[..., : self.components], context)
        return self.from_components(torch.cat((leading, latent[..., self.components :]), dim=-1))

    def inverse_draws(
        self,
        lines: Tensor,
        latent: Tensor,
        mu: Tensor | float | None = None,
        calibration_error: Tensor | float | None = None,
    ) -> Tensor:
        """Atmospheres of every pixel with every one of the same latents.

        Parameters
        ----------
        lines, mu, calibration_error
            As for `inverse`.
        latent : Tensor, shape (draws, latent_size)
            Shared by all pixels.

        Returns
        -------
        Tensor, shape (n, draws, atmosphere_size)
            Network units.
        """
        return self.from_scores(self.score_draws(lines, latent, mu, calibration_error))

    def score_draws(
        self,
        lines: Tensor,
        latent: Tensor,
        mu: Tensor | float | None = None,
        calibration_error: Tensor | float | None = None,
    ) -> Tensor:
        """Atmospheres as `inverse_draws` returns them, but in normal scores.

        They ascend with the numbers in network units, so that quantiles may be taken before `from_scores`.

        Returns
        -------
        Tensor, shape (n, draws, atmosphere_size)
            Laid out with the draws contiguous, as sorting them wants it.
        """
        context = self.context(lines, mu, calibration_error)
        leading = self.generate_components(latent[None, :, : self.components], context[:, None])
        scaled_rotation = self.atmosphere_scale[:, None] * self.rotation * self.component_scale
        shared = scaled_rotation[:, self.components :] @ latent[:, self.components :].T
        shared = shared + self.atmosphere_mean[:, None]
        columns = scaled_rotation[:, : self.components] @ leading.transpose(1, 2) + shared
        return columns.transpose(1, 2)

    def latent(
        self,
        atmosphere: Tensor,
        lines: Tensor,
        mu: Tensor | float | None = None,
        calibration_error: Tensor | float | None = None,
    ) -> Tensor:
        """Latents (n, latent_size) of atmospheres (n, atmosphere_size), given lines: undoes `inverse`."""
        components = self.to_components(atmosphere)
        context = self.context(lines, mu, calibration_error)
        leading, _ = self.normalise_components(components[..., : self.components], context)
        return torch.cat((leading, components[..., self.components :]), dim=-1)

    def log_prob(
        self,
        atmosphere: Tensor,
        lines: Tensor,
        mu: Tensor | float | None = None,
        calibration_error: Tensor | float | None = None,
    ) -> Tensor:
        """Logarithm of the posterior density of atmospheres, per unit volume of network units.

        Parameters
        ----------
        atmosphere : Tensor, shape (n, atmosphere_size)
            Network units.
        lines, mu, calibration_error
            As for `inverse`.

        Returns
        -------
        Tensor, shape (n,)
        """
        components = self.to_components(atmosphere)
        context = self.context(lines, mu, calibration_error)
        leading = self.components_log_prob(components[..., : self.components], context)
        others = _log_normal(components[..., self.components :])
        # The rotation leaves volumes as they are.
        volume = self.atmosphere_scale.log().sum() + self.component_scale.log().sum()
        if self.scores is not None:
            volume = volume - self.scores.log_slope(atmosphere).sum(dim=-1)
        return leading + others - volume


def _product_plus(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Values times weights, plus a bias that is the context's: one for each pixel.

    With draws (pixels or 1, draws, n) the product and the sum are one operation, and each pixel's product is
    its own: nearly twice as fast as one large product with the sum after it, measured, and a pixel's numbers
    do not depend on where in a batch it stands.
    """
    if values.ndim < 3:
        return functional.linear(values, weight) + bias
    pixels, draws = bias.shape[0], values.shape[1]
    return torch.baddbmm(bias, values.expand(pixels, draws, -1), weight.T.expand(pixels, -1, -1))


def _interleave(halves: list[Tensor]) -> Tensor:
    """Even and odd components back in one vector."""
    even, odd = halves
    joined = even.new_empty((*(even[..., 0] + odd[..., 0]).shape, even.shape[-1] + odd.shape[-1]))
    joined[..., 0::2] = even
    joined[..., 1::2] = odd
    return joined


def _log_normal(values: Tensor) -> Tensor:
    return -0.5 * values.square().sum(dim=-1) - 0.5 * values.shape[-1] * math.log(2.0 * math.pi)
