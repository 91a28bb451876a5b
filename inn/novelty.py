"""How unusual a pixel's profiles are among those a network was trained on.

A network answers everything it is asked, also about profiles that no atmosphere of its training grid shows.
The novelty of a profile is a tail probability: the share of profiles of held-out simulations, observed with
the same noise, that lie at least as far from the training profiles. Below one per cent a pixel is flagged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from inn.errors import ModelError
from inn.layout import Layout
from inn.posterior import as_lines

NOVEL = 0.01
"""Tail probability below which a pixel's profiles are called novel."""

NEIGHBOURS = 4
"""Training profiles whose mean distance is taken: one alone may be an oddity itself."""

BATCH = 256
"""Profiles whose distances to all references are held at once on a CPU."""

DEVICE_BATCH = 4096
"""The same on any device but the CPU (not measured)."""

GROUPS = 256
"""Groups of references, of each of which the nearest is found first."""


class Novelty(nn.Module):
    """Distance to the nearest training profiles, as a tail probability.

    Profiles are projected onto the leading principal components of the training profiles, each divided by its
    spread there. Projection alone would hide whatever lies outside of those components, so what they leave
    over (its root mean square over the points, divided by its spread) is one more dimension.

    Parameters
    ----------
    layout : Layout
        Line windows.
    components : int
        Principal components of the profiles.
    references : int
        Number of training profiles.
    calibration : int
        Number of distances of held-out profiles.
    """

    def __init__(
        self, layout: Layout, components: int = 12, references: int = 0, calibration: int = 0
    ) -> None:
        super().__init__()
        self.layout = layout
        self._architecture = {
            "components": components,
            "references": references,
            "calibration": calibration,
        }
        size = layout.lines_size
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("projection", torch.eye(size)[:, :components].clone())
        self.register_buffer("spread", torch.ones(components))
        self.register_buffer("remainder_spread", torch.ones(()))
        # Half precision is a thousandth of a distance, and halves what the bundled model weighs.
        self.register_buffer("references", torch.zeros(references, components + 1, dtype=torch.float16))
        self.register_buffer("calibration", torch.zeros(calibration))

    mean: Tensor
    projection: Tensor
    spread: Tensor
    remainder_spread: Tensor
    references: Tensor
    calibration: Tensor

    def architecture(self) -> dict[str, Any]:
        """Constructor arguments besides the layout, as JSON holds them."""
        return dict(self._architecture)

    @classmethod
    def from_architecture(cls, layout: Layout, architecture: Mapping[str, Any]) -> Self:
        """Build an empty measure, for weights to be loaded, from what `architecture` returned."""
        return cls(layout, **architecture)

    @classmethod
    def fitted(cls, layout: Layout, training: Tensor, held_out: Tensor, components: int = 12) -> Self:
        """Take references from training profiles, and the scale of distances from held-out ones.

        Parameters
        ----------
        layout : Layout
            Line windows.
        training : Tensor, shape (n, lines_size)
            Normalised profiles of the training simulations, with noise.
        held_out : Tensor, shape (m, lines_size)
            Profiles of other simulations, with the same noise.
        components : int
            Principal components of the profiles.

        Raises
        ------
        ModelError
            There are too few profiles for a probability of one per cent to mean anything.
        """
        if held_out.shape[0] < round(1.0 / NOVEL) or training.shape[0] <= max(components, NEIGHBOURS):
            raise ModelError(
                "too few profiles to measure novelty",
                found=f"{training.shape[0]} training and {held_out.shape[0]} held-out profiles",
                expected=f"more than {components} and at least {round(1.0 / NOVEL)}",
                remedy="use a larger grid",
            )
        measure = cls(layout, components, training.shape[0], held_out.shape[0])
        values = training.double()
        mean = values.mean(dim=0)
        _, singular, rotation = torch.linalg.svd(values - mean, full_matrices=False)
        measure.mean.copy_(mean)
        measure.projection.copy_(rotation[:components].T)
        spread = singular[:components] / (len(values) - 1) ** 0.5
        measure.spread.copy_(spread.clamp_min(1e-4))
        remainder = measure._remainder(training.to(measure.mean))
        measure.remainder_spread.copy_(remainder.square().mean().sqrt().clamp_min(1e-4))
        measure.references.copy_(measure.coordinates(training.to(measure.mean)))
        measure.calibration.copy_(measure.distance(held_out.to(measure.mean)).sort().values)
        return measure.eval()

    def _remainder(self, lines: Tensor) -> Tensor:
        centred = lines - self.mean
        inside = centred @ self.projection
        return (centred - inside @ self.projection.T).square().mean(dim=-1).sqrt()

    def coordinates(self, lines: Tensor) -> Tensor:
        """Whitened components and what they leave over: (n, lines_size) to (n, components + 1)."""
        inside = ((lines - self.mean) @ self.projection) / self.spread
        return torch.cat((inside, (self._remainder(lines) / self.remainder_spread)[:, None]), dim=-1)

    def distance(self, lines: Tensor) -> Tensor:
        """Mean distance to the nearest training profiles, in whitened units: (n, lines_size) to (n,)."""
        references = self.references.to(lines)
        # Whole groups: what is added to the last ones is infinitely far away.
        missing = -references.shape[0] % GROUPS
        squares = functional.pad(references.square().sum(dim=-1), (0, missing), value=torch.inf)
        # A product with one more dimension is the square distance, less the point's own square.
        columns = torch.vstack((functional.pad(-2.0 * references, (0, 0, 0, missing)).T, squares))
        batch = BATCH if lines.device.type == "cpu" else DEVICE_BATCH
        separation = lines.new_empty((batch, columns.shape[1]))
        distance = lines.new_empty((len(lines),))
        for start in range(0, len(lines), batch):
            some = lines[start : start + batch]
            # All batches have the same shape, so that no profile's bits depend on how many there are.
            points = self.coordinates(functional.pad(some, (0, 0, 0, batch - len(some))))
            torch.mm(functional.pad(points, (0, 1), value=1.0), columns, out=separation)
            nearest = _smallest(separation.reshape(batch, -1, GROUPS), NEIGHBOURS)
            square = (nearest + points.square().sum(dim=-1, keepdim=True)).clamp_min(0.0)
            distance[start : start + batch] = square.sqrt().mean(dim=-1)[: len(some)]
        return distance

    def forward(self, lines: Tensor) -> Tensor:
        """Tail probabilities (n,) of profiles (n, lines_size): see `tail_probability`."""
        distance = self.distance(lines)
        # Held-out distances that are at least as large: sorted, all from the first that is not smaller.
        below = torch.searchsorted(self.calibration, distance.contiguous(), side="left")
        count = self.calibration.numel()
        return (1.0 + (count - below).to(distance)) / (1.0 + count)

    def tail_probability(self, lines: ArrayLike | Tensor) -> NDArray[np.float32]:
        """Probability that a profile of the training family lies at least as far out as each of these.

        Parameters
        ----------
        lines : array_like or Tensor, shape (pixels, lines_size)
            Normalised profiles, as the network takes them.

        Returns
        -------
        ndarray, shape (pixels,), float32
            (1 + number of held-out distances at least as large) / (1 + their number): never zero, and evenly
            distributed between 0 and 1 for profiles of the family itself. NaN where a profile is not finite.

        Raises
        ------
        MisuseError
            The lines have another number of points.
        """
        tensor = as_lines(lines, self.layout).to(self.mean)
        good = tensor.isfinite().all(dim=1)
        result = tensor.new_full(good.shape, torch.nan)
        with torch.inference_mode():
            if good.any():
                result[good] = self(tensor[good])
        return result.float().cpu().numpy()


def _smallest(values: Tensor, count: int) -> Tensor:
    """Smallest `count` numbers of each row (n, members, groups), ascending.

    They lie in the groups whose smallest members are the smallest: to look at these alone takes a fifth of
    the time of looking at all, and finds the same.
    """
    groups = values.amin(dim=1).topk(count, dim=-1, largest=False).indices
    few = values.gather(2, groups[:, None].expand(-1, values.shape[1], -1)).flatten(1)
    return few.topk(count, dim=-1, largest=False).values
