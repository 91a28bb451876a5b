"""Rational-quadratic splines: against the published formula's properties, autograd and their own inverse."""

import numpy as np
import pytest
import torch

from inn.splines import EDGE, Spline

BINS = 8


def curves(count: int, strength: float = 2.0, bins: int = BINS, dtype=torch.float64) -> Spline:
    generator = torch.Generator().manual_seed(11)
    raw = torch.randn(count, Spline.parameters(bins), generator=generator, dtype=torch.float64)
    return Spline.from_parameters((strength * raw).to(dtype))


def values(count: int, each: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(12)
    return (2.5 * torch.randn(count, each, generator=generator, dtype=torch.float64)).to(dtype)


def test_zeros_are_the_identity():
    spline = Spline.from_parameters(torch.zeros(3, Spline.parameters(BINS), dtype=torch.float64))
    points = values(3, 200)
    torch.testing.assert_close(spline.forward(points), points, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("bins", [2, 8])
def test_inverse_undoes_forward(dtype, tolerance, bins):
    spline, points = curves(40, bins=bins, dtype=dtype), values(40, 100, dtype)
    returned, log_slope = spline.inverse(spline.forward(points))
    torch.testing.assert_close(returned, points, rtol=0, atol=tolerance)
    assert torch.isfinite(log_slope).all()


def test_the_slope_is_that_of_autograd():
    spline, points = curves(40), values(40, 100).requires_grad_()
    (slope,) = torch.autograd.grad(spline.forward(points).sum(), points)
    _, log_slope = spline.inverse(spline.forward(points).detach())
    torch.testing.assert_close(-log_slope, slope.log(), rtol=0, atol=1e-8)
    assert (slope > 0).all()


def test_curves_pass_through_their_knots_with_the_slopes_there():
    spline = curves(5)
    at_knots = spline.left.clone().requires_grad_()
    (slope,) = torch.autograd.grad(spline.forward(at_knots).sum(), at_knots)
    torch.testing.assert_close(spline.forward(spline.left), spline.right, rtol=0, atol=1e-12)
    torch.testing.assert_close(slope[:, 1:-1], spline.slope[:, 1:-1], rtol=1e-9, atol=0)


def test_one_bin_is_the_ratio_of_quadratics_written_out():
    # Gregory & Delbourgo 1982, equation 2.3, for one interval, evaluated in NumPy.
    spline = Spline(
        torch.tensor([[-EDGE, 1.0, EDGE]], dtype=torch.float64),
        torch.tensor([[-EDGE, -2.0, EDGE]], dtype=torch.float64),
        torch.tensor([[1.0, 0.3, 1.0]], dtype=torch.float64),
    )
    x = np.linspace(1.0, EDGE, 11)
    theta, height, delta, d0, d1 = (x - 1.0) / 3.0, 6.0, 2.0, 0.3, 1.0
    top = delta * theta**2 + d0 * theta * (1 - theta)
    expected = -2.0 + height * top / (delta + (d0 + d1 - 2 * delta) * theta * (1 - theta))
    np.testing.assert_allclose(spline.forward(torch.from_numpy(x)[None])[0].numpy(), expected, rtol=1e-12)


def test_beyond_the_edge_nothing_changes():
    spline = curves(2)
    far = torch.tensor([[-9.0, -EDGE, EDGE, 40.0]], dtype=torch.float64).expand(2, -1)
    torch.testing.assert_close(spline.forward(far), far, rtol=0, atol=1e-12)
    returned, log_slope = spline.inverse(far)
    torch.testing.assert_close(returned, far, rtol=0, atol=1e-12)
    assert (log_slope[:, [0, 3]] == 0).all()
