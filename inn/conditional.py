"""The recommended network: a conditional flow between latents and atmospheres, given the lines.

An atmosphere of 150 numbers has far fewer degrees of freedom than that. Its densities become electron
pressures, which change little where a transition region makes densities and temperatures jump; all numbers
are brought to normal scores, divided by what the lines leave open of each, and rotated onto the principal
components of the training atmospheres. The leading ones go through a coupling flow that sees the lines, and
the others, which hold what little variance is left, keep the Gaussian of the training set. Together that is a
bijection between 150 latents and the 150 numbers of an atmosphere, for given lines.

What depends on the pixel alone (the lines, mu, the calibration error) is brought to a short context vector
once, and enters the coupling networks as a bias of their hidden layers; what depends on the draw alone (the
Gaussian components) is computed once for all pixels. What remains for every pair of a pixel and a draw is
small: about 0.3 MFLOP with the default widths, against 24 for the joint network.

Atmospheres made of a few parameters lie on a thin sheet, and a flow that is to learn how thin spends itself
on it. So they are blurred in training, each to a degree of its own that the flow is told, and asked for
without blur (Kim, Lee, Lee & Kim 2020, "SoftFlow", arXiv:2006.04604).
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
from inn.latent import TunedLatents
from inn.layout import QUANTITIES, Layout
from inn.marginals import NormalScores
from inn.novelty import Novelty
from inn.precision import in_full, linear_in_full
from inn.preview import Preview
from inn.splines import Spline

FAINTEST = 1e-3
"""Normalised intensity below which a line's logarithm is held constant."""

SMALLEST_SCALE = 0.05
"""Smallest scale by which a number of an atmosphere is divided before the rotation."""

SMALLEST_SPREAD = 1e-3
"""Smallest standard deviation of a principal component, in scaled numbers."""

REGRESSORS = 40, 20
"""Leading components of the conditions, and those of them whose products count too, in the regression that
says what the lines leave open."""

RIDGE = 1e-3
"""Variance of a regressor, in units of its own, that is added against chance correlations."""

LATENT_SCALES = 0.5, 2.0
"""Narrowest and widest that `ConditionalNetwork.calibrate` makes a latent."""

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
        raw, shift = self.last(hidden).to(kept.dtype).chunk(2, dim=-1)
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
    bins : int
        Bins of the splines (`inn.splines`) by which the context shapes each component by itself. Affine
        steps alone make posteriors that are bounded, or have two peaks, too smooth.
    normal_scores : bool
        Whether components are those of the normal scores (`inn.marginals`) of electron pressure, temperature
        and velocity, or of the bare numbers.
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
        bins: int = 8,
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
            "bins": bins,
            "normal_scores": normal_scores,
            "default_calibration_error": default_calibration_error,
        }
        features = 2 * layout.lines_size + 2
        self.embed = nn.Sequential(
            nn.Linear(features + 1, embedding),  # and the blur
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Linear(embedding, embedding),
            nn.LeakyReLU(),
            nn.Dropout(dropout),
            nn.Linear(embedding, context),
        )
        # A first guess of every component, of its spread and of its shape, from the context alone.
        self.guess = nn.Linear(context, (2 + Spline.parameters(bins)) * components)
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
        self.register_buffer("latent_scale", torch.ones(components))
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_scale", torch.ones(features))
        self.novelty: Novelty | None = None
        self.emulator: Emulator | None = None
        self.latents: TunedLatents | None = None
        self.preview: Preview | None = None
        self.record: dict[str, Any] = {}

    atmosphere_mean: Tensor
    atmosphere_scale: Tensor
    rotation: Tensor
    component_scale: Tensor
    latent_scale: Tensor
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
            self.scores.fit(_with_pressure(atmosphere))
        features = self._features(lines.double(), mu.double(), calibration_error.double())
        self.feature_mean.copy_(features.mean(dim=0))
        self.feature_scale.copy_(features.std(dim=0).clamp_min(1e-3))
        values = self.to_scores(atmosphere).double()
        mean = values.mean(dim=0)
        # What the lines know well must be kept, however little of the variance it is. What hardly varies (the
        # photosphere) is not blown up.
        standard = (features - self.feature_mean) / self.feature_scale
        scale = _left_open(values - mean, standard).clamp_min(SMALLEST_SCALE)
        variance, rotation = torch.linalg.eigh(torch.cov(((values - mean) / scale).T))
        spread = variance.clamp_min(0.0).sqrt().flip(0)
        self.atmosphere_mean.copy_(mean)
        self.atmosphere_scale.copy_(scale)
        self.rotation.copy_(rotation.flip(1))
        # Components without variance still get some: a bijection in float32 cannot divide by nothing.
        self.component_scale.copy_(spread.clamp_min(SMALLEST_SPREAD))

    @torch.no_grad()
    def calibrate(self, atmosphere: Tensor, lines: Tensor, mu: Tensor, calibration_error: Tensor) -> None:
        """Widen or narrow each latent so that its central 68 % hold 68 % of held-out examples.

        A flow is surer of its training set than of other atmospheres. One factor for each leading component,
        from simulations that it was not trained on, makes up for that (as one temperature does for
        classifiers: Guo et al. 2017, arXiv:1706.04599).

        Parameters
        ----------
        atmosphere : Tensor, shape (n, atmosphere_size)
            Network units.
        lines : Tensor, shape (n, lines_size)
        mu, calibration_error : Tensor, shape (n,)
        """
        self.latent_scale.fill_(1.0)
        latent = self.latent(atmosphere, lines, mu, calibration_error)[:, : self.components].double()
        levels = torch.special.ndtr(latent.new_tensor([-1.0, 1.0]))
        low, high = torch.quantile(latent, levels, dim=0)
        self.latent_scale.copy_((0.5 * (high - low)).clamp(*LATENT_SCALES))

    def to_scores(self, atmosphere: Tensor) -> Tensor:
        """Normal scores (..., atmosphere_size) of electron pressure, temperature and velocity of atmospheres.

        Without normal scores, the atmospheres themselves.
        """
        return atmosphere if self.scores is None else self.scores(_with_pressure(atmosphere))

    def to_components(self, atmosphere: Tensor) -> Tensor:
        """Whitened principal components (n, atmosphere_size), by falling variance, of atmospheres."""
        standard = (self.to_scores(atmosphere) - self.atmosphere_mean) / self.atmosphere_scale
        return standard @ self.rotation / self.component_scale

    def from_components(self, components: Tensor) -> Tensor:
        """Atmospheres in network units from whitened principal components: the inverse of `to_components`."""
        standard = (components * self.component_scale) @ self.rotation.T
        scores = standard * self.atmosphere_scale + self.atmosphere_mean
        return scores if self.scores is None else _with_density(self.scores.inverse(scores))

    def from_scores(self, scores: Tensor) -> Tensor:
        """Network units of numbers (..., atmosphere_size) on the scale of `score_draws`.

        Each ascends with its own number alone, so that quantiles may be taken before.
        """
        if self.scores is None:
            return scores
        size = self.layout.atmosphere_size // len(QUANTITIES)
        return torch.cat((scores[..., :size], self.scores.inverse(scores[..., size:], slice(size, None))), -1)

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
        blur: Tensor | None = None,
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
        blur : Tensor, shape (n,), optional
            How much training blurs the atmosphere, as a share of the most it does; not at all if left out.

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
        standard = (features - self.feature_mean) / self.feature_scale
        if blur is None:
            blur = standard.new_zeros(count)
        with in_full(lines.device):  # once for a pixel, and all its draws would share the error
            embedded: Tensor = self.embed(torch.cat((standard, blur[:, None]), dim=-1))
        return embedded

    # The flow on the leading components

    def _guess(self, context: Tensor) -> tuple[Tensor, Tensor, Spline]:
        """Mean and logarithm of the spread (n, components), and shape, of each component."""
        numbers = linear_in_full(self.guess, context)
        parts = numbers.reshape(len(context), self.components, -1)
        # Bounded, lest a rare draw lands beyond all numbers.
        return parts[..., 0], 3.0 * torch.tanh(parts[..., 1] / 3.0), Spline.from_parameters(parts[..., 2:])

    def normalise_components(self, leading: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of leading components, and the logarithm of the Jacobian determinant.

        Parameters
        ----------
        leading : Tensor, shape (n, components)
            Whitened.
        context : Tensor, shape (n, context)

        Returns
        -------
        latent : Tensor, shape (n, components)
        log_determinant : Tensor, shape (n,)
        """
        mean, log_spread, shape = self._guess(context)
        values, log_slope = shape.inverse(((leading - mean) * (-log_spread).exp())[..., None])
        log_determinant = log_slope.sum(dim=(-2, -1)) - log_spread.sum(dim=-1)
        halves = [values[:, 0::2, 0], values[:, 1::2, 0]]
        for index, step in enumerate(self.steps):
            kept, changed = index % 2, 1 - index % 2
            log_scale, shift = step(halves[kept], context)
            halves[changed] = halves[changed] * log_scale.exp() + shift
            log_determinant = log_determinant + log_scale.sum(dim=-1)
        latent = values.new_empty(values.shape[:-1])
        latent[:, 0::2], latent[:, 1::2] = halves
        return latent / self.latent_scale, log_determinant - self.latent_scale.log().sum()

    def generate_components(self, latent: Tensor, context: Tensor) -> Tensor:
        """Leading components (n, components) from as many latents: the inverse of `normalise_components`."""
        return self._columns(latent[:, None], context)[..., 0]

    def _columns(self, latent: Tensor, context: Tensor) -> Tensor:
        """Leading components (n, components, draws) from latents (n or 1, draws, components)."""
        latent = latent * self.latent_scale
        halves = [latent[..., 0::2], latent[..., 1::2]]
        for index in reversed(range(len(self.steps))):
            kept, changed = index % 2, 1 - index % 2
            log_scale, shift = self.steps[index](halves[kept], context[:, None])
            halves[changed] = (halves[changed] - shift) * log_scale.neg().exp()
        values = latent.new_empty((context.shape[0], self.components, latent.shape[1]))
        values[:, 0::2], values[:, 1::2] = (half.transpose(1, 2) for half in halves)
        mean, log_spread, shape = self._guess(context)
        return shape.forward(values) * log_spread.exp()[..., None] + mean[..., None]

    def components_log_prob(self, leading: Tensor, context: Tensor) -> Tensor:
        """Logarithm of the density (n,) of leading components (n, components) given contexts (n, context)."""
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
        """Atmospheres as `inverse_draws` returns them, but temperature and velocity in normal scores.

        `from_scores` brings them to network units, number by number.

        Returns
        -------
        Tensor, shape (n, draws, atmosphere_size)
            Laid out with the draws contiguous, as sorting them wants it.
        """
        context = self.context(lines, mu, calibration_error)
        leading = self._columns(latent[None, :, : self.components], context)
        scaled_rotation = self.atmosphere_scale[:, None] * self.rotation * self.component_scale
        shared = scaled_rotation[:, self.components :] @ latent[:, self.components :].T
        shared = shared + self.atmosphere_mean[:, None]
        with in_full(lines.device):
            columns = scaled_rotation[:, : self.components] @ leading + shared
        if self.scores is not None:
            size = self.layout.atmosphere_size // len(QUANTITIES)
            both = self.scores.inverse_columns(columns[:, : 2 * size], slice(2 * size))
            columns = torch.cat((both[:, :size] - both[:, size:], columns[:, size:]), dim=1)
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
            volume = volume - self.scores.log_slope(_with_pressure(atmosphere)).sum(dim=-1)
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


def _with_pressure(atmosphere: Tensor) -> Tensor:
    """Atmospheres (network units) whose density has become the logarithm of the electron pressure."""
    size = atmosphere.shape[-1] // len(QUANTITIES)
    density, others = atmosphere[..., :size], atmosphere[..., size:]
    return torch.cat((density + others[..., :size], others), dim=-1)


def _with_density(atmosphere: Tensor) -> Tensor:
    """Undo `_with_pressure`."""
    size = atmosphere.shape[-1] // len(QUANTITIES)
    pressure, others = atmosphere[..., :size], atmosphere[..., size:]
    return torch.cat((pressure - others[..., :size], others), dim=-1)


def _left_open(values: Tensor, conditions: Tensor) -> Tensor:
    """Standard deviation of each number about a quadratic regression on the conditions.

    Parameters
    ----------
    values : Tensor, shape (n, numbers)
        About their means.
    conditions : Tensor, shape (n, m)
        About their means.
    """
    linear, square = (min(count, *conditions.shape) for count in REGRESSORS)
    leading = torch.linalg.svd(conditions, full_matrices=False).U[:, :linear] * len(conditions) ** 0.5
    first, second = torch.triu_indices(square, square, device=values.device)
    products = leading[:, first] * leading[:, second]
    regressors = torch.cat((torch.ones_like(leading[:, :1]), leading, products), dim=1)
    normal = regressors.T @ regressors
    normal.diagonal().add_(RIDGE * len(values))
    residual = values - regressors @ torch.linalg.solve(normal, regressors.T @ values)
    spread: Tensor = residual.square().mean(dim=0).sqrt()
    return spread


def _log_normal(values: Tensor) -> Tensor:
    return -0.5 * values.square().sum(dim=-1) - 0.5 * values.shape[-1] * math.log(2.0 * math.pi)
