"""The joint network's loss: every term against sums written out, the schedules against the paper's text."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import chi2, ncx2

from inn.joint import JointNetwork
from inn.layout import CA8542, HALPHA, Layout, LineWindow
from inn.losses import (
    NO_TURNING_POINT,
    SEARCHED_BANDWIDTHS,
    backward_losses,
    fade_in,
    forward_losses,
    inverse_multiquadric,
    mmd2,
    prediction_weight,
    squared_distances,
    turning_point,
)

SMALL = Layout(
    np.linspace(0.0, 2.0, 2),
    (
        LineWindow("halpha", HALPHA.rest_wavelength, 1.4, 4),
        LineWindow("ca8542", CA8542.rest_wavelength, 1.0, 4),
    ),
)


def mmd2_by_loops(x, y, bandwidths):
    """Each pair's kernel one by one, as the definition has it."""

    def mean_kernel(first, second, a):
        values = [a * a / (a * a + sum((p - q) ** 2)) for p in first for q in second]
        return sum(values) / len(values)

    return sum(mean_kernel(x, x, a) + mean_kernel(y, y, a) - 2.0 * mean_kernel(x, y, a) for a in bandwidths)


def curve_by_cdist(x, y, bandwidths):
    xx, yy, xy = (cdist(p, q, "sqeuclidean") for p, q in ((x, x), (y, y), (x, y)))
    return np.array(
        [
            (a**2 / (a**2 + xx)).mean() + (a**2 / (a**2 + yy)).mean() - 2 * (a**2 / (a**2 + xy)).mean()
            for a in bandwidths
        ]
    )


def samples(seed, n, m, size, shift=0.4, scale=1.3, dtype=torch.float64):
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(n, size)), shift + scale * generator.normal(size=(m, size))
    return torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype)


def small_network():
    """A network that is far from the identity, in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = JointNetwork(SMALL, latent_size=6, width=20, blocks=3).double()
        with torch.no_grad():
            for values in network.parameters():
                values.normal_(std=0.3)
    return network


def test_kernel_by_hand():
    assert float(inverse_multiquadric(torch.tensor(9.0), 4.0)) == pytest.approx(16.0 / 25.0)
    assert float(inverse_multiquadric(torch.tensor(0.0), 0.5)) == 1.0


def test_squared_distances_where_vectors_are_much_longer_than_their_differences():
    # As atmospheres are: log ne about 12, log T about 5 at fifty heights each.
    generator = np.random.default_rng(1)
    offset = np.repeat([12.0, 5.0, 0.0], 50)
    x, y = (offset + 0.05 * generator.normal(size=(n, 150)) for n in (40, 30))
    expected = cdist(x.astype(np.float32), y.astype(np.float32), "sqeuclidean")
    found = squared_distances(torch.from_numpy(x).float(), torch.from_numpy(y).float())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    same = squared_distances(torch.from_numpy(x).float(), torch.from_numpy(x).float())
    assert float(same.min()) >= 0.0
    assert float(same.diagonal().max()) < 1e-5


@pytest.mark.parametrize("bandwidths", [(8.0, 11.0), (1.4, 2.0, 5.5, 7.0), (2.3,)])
def test_mmd_is_the_sum_over_all_pairs(bandwidths):
    x, y = samples(2, 13, 9, 5)
    expected = mmd2_by_loops(x.numpy(), y.numpy(), bandwidths)
    assert float(mmd2(x, y, bandwidths)) == pytest.approx(expected, rel=1e-12)
    assert float(mmd2(x.float(), y.float(), bandwidths)) == pytest.approx(expected, rel=1e-4)
    if len(bandwidths) == 1:
        assert float(mmd2(x, y, bandwidths[0])) == float(mmd2(x, y, bandwidths))
    assert float(mmd2(x, x, bandwidths)) == pytest.approx(0.0, abs=1e-14)


def expected_kernel(a, variance, shift, size):
    """Mean kernel of the difference of two Gaussians: |difference|^2 is variance x noncentral chi^2."""
    distribution = ncx2(size, shift**2 / variance) if shift else chi2(size)
    nodes, weights = np.polynomial.legendre.leggauss(300)
    end = distribution.ppf(1 - 1e-10)
    squares = 0.5 * end * (nodes + 1.0)
    kernel = np.asarray(a)[..., None] ** 2 / (np.asarray(a)[..., None] ** 2 + variance * squares)
    return 0.5 * end * (kernel * distribution.pdf(squares)) @ weights


def test_mmd_of_gaussians_is_the_integral():
    n, size, scale, shift, a = 60, 4, 1.5, 0.8, 1.7
    within_x = expected_kernel(a, 2.0, 0.0, size)
    within_y = expected_kernel(a, 2.0 * scale**2, 0.0, size)
    between = expected_kernel(a, 1.0 + scale**2, shift, size)
    # A vector's pair with itself has kernel 1: the bias of the estimate.
    expected = within_x + within_y - 2 * between + (1 - within_x) / n + (1 - within_y) / n
    generator = torch.Generator().manual_seed(3)
    offset = torch.tensor([shift, 0.0, 0.0, 0.0], dtype=torch.float64)
    found = []
    for _ in range(300):
        x, y = torch.randn(2, n, size, generator=generator, dtype=torch.float64)
        found.append(float(mmd2(x, offset + scale * y, a)))
    error = np.std(found) / np.sqrt(len(found))
    assert error < 0.05 * expected
    assert np.mean(found) == pytest.approx(expected, abs=4 * error)


def test_gradient_of_mmd_by_finite_differences():
    x, y = samples(4, 4, 5, 2)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mmd2(x, y, (0.9, 2.0)), (x,))


@pytest.mark.parametrize(
    ("seed", "n", "m", "size", "shift", "scale"),
    [
        (5, 60, 60, 4, 0.9, 1.0),
        (6, 80, 50, 12, 0.0, 1.6),
        (7, 70, 70, 3, 3.0, 0.2),
        (8, 50, 50, 40, 0.5, 1.2),
    ],
)
def test_turning_point_is_the_one_that_trying_all_finds(seed, n, m, size, shift, scale):
    x, y = samples(seed, n, m, size, shift, scale)
    curve = curve_by_cdist(x.numpy(), y.numpy(), SEARCHED_BANDWIDTHS)
    peaks = np.flatnonzero((curve[1:-1] > curve[:-2]) & (curve[1:-1] > curve[2:])) + 1
    expected = SEARCHED_BANDWIDTHS[peaks[-1]] if peaks.size else NO_TURNING_POINT
    assert peaks.size
    assert turning_point(x, y) == expected
    # Single precision must not make turning points of its own where kernels are wide.
    assert turning_point(x.float(), y.float()) == pytest.approx(expected, rel=0.01)
    order = np.random.default_rng(0).permutation(SEARCHED_BANDWIDTHS)
    assert turning_point(x, y, order) == expected


def test_turning_point_of_large_samples_is_the_distributions():
    shift, size = 1.5, 3
    searched = np.geomspace(0.5, 20.0, 60)
    difference = expected_kernel(searched, 2.0, 0.0, size) - expected_kernel(searched, 2.0, shift, size)
    expected = searched[np.argmax(difference)]
    generator = torch.Generator().manual_seed(9)
    x, y = torch.randn(2, 600, size, generator=generator, dtype=torch.float64)
    y[:, 0] += shift
    assert turning_point(x, y, searched) == pytest.approx(expected, rel=0.1)


def test_without_a_turning_point():
    # Of one point each the discrepancy is 2 d^2 / (a^2 + d^2): it rises all the way down.
    x, y = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert turning_point(x, y) == 2.0
    assert turning_point(x, y, otherwise=7.0) == 7.0
    # Distributions wider than any bandwidth: it falls all the way down, and its largest value is no peak.
    assert turning_point(*samples(5, 60, 60, 4, 0.9, 1.0), (0.05, 0.1, 1.0)) == 2.0


def test_bandwidths_searched_are_the_paper_s():
    assert SEARCHED_BANDWIDTHS.size == 2000
    assert SEARCHED_BANDWIDTHS[[0, -1]] == pytest.approx([0.5, 500.0])
    ratios = SEARCHED_BANDWIDTHS[1:] / SEARCHED_BANDWIDTHS[:-1]
    np.testing.assert_allclose(ratios, 1000.0 ** (1 / 1999), rtol=1e-10)


def test_fade_in_is_the_paper_s():
    # min(n / (0.4 x 800), 1)^3
    expected = {0: 0.0, 32: 0.001, 160: 0.125, 240: 0.421875, 319: 0.99065, 320: 1.0, 321: 1.0, 12_000: 1.0}
    assert {n: round(fade_in(n, 800), 5) for n in expected} == {n: round(xi, 5) for n, xi in expected.items()}


def test_weight_of_the_squared_errors_is_the_paper_s():
    # "The initial 800 epochs ... 4000 ... batches of 400 epochs up to 4800 epochs, increasing by 1000 each
    # batch ... repeated with batches of 600 epochs up to a total of 12,000."
    stages = [(0, 800, 4000)]
    for number in range(10):
        stages.append((800 + 400 * number, 1200 + 400 * number, 5000 + 1000 * number))
    for number in range(12):
        stages.append((4800 + 600 * number, 5400 + 600 * number, 15_000 + 1000 * number))
    assert stages[10] == (4400, 4800, 14_000)
    assert stages[-1] == (11_400, 12_000, 26_000)
    tabulated = [weight for start, stop, weight in stages for _ in range(start, stop)]
    assert [prediction_weight(n) for n in range(12_000)] == tabulated


def test_forward_terms_by_hand():
    network = small_network()
    generator = torch.Generator().manual_seed(10)
    x, target = torch.randn(2, 7, 20, generator=generator, dtype=torch.float64)
    error, discrepancy, latent = forward_losses(network, x, target, (0.8, 3.0))
    out = network.forward_padded(x).detach().numpy()
    goal = target.numpy()
    squares = [(out[i, j] - goal[i, j]) ** 2 for i in range(7) for j in range(6, 20)]
    assert error.item() == pytest.approx(np.mean(squares), rel=1e-12)
    # The last eight of the twenty are the lines, the first six the latent.
    lines_and_latent = [np.hstack((rows[:, 12:], rows[:, :6])) for rows in (out, goal)]
    assert discrepancy.item() == pytest.approx(mmd2_by_loops(*lines_and_latent, (0.8, 3.0)), rel=1e-11)
    np.testing.assert_allclose(latent, out[:, :6])
    assert not latent.requires_grad


def test_the_latent_s_discrepancy_leaves_the_lines_alone():
    network = small_network()
    x, target = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    parameters = list(network.parameters())
    _, discrepancy, _ = forward_losses(network, x, target, 2.0)
    found = torch.autograd.grad(discrepancy, parameters)
    constant = network.forward_padded(x).detach()[:, 12:]
    goal = torch.cat((target[:, 12:], target[:, :6]), dim=1)
    step = 1e-6
    # Finite differences with the lines held fixed, for a few weights of every matrix.
    for values, gradient in list(zip(parameters, found, strict=True))[::7]:
        flat = values.data.view(-1)
        ends = []
        for sign in (1.0, -1.0):
            flat[0] += sign * step
            moved = network.forward_padded(x).detach()
            ends.append(curve_by_cdist(torch.cat((constant, moved[:, :6]), dim=1), goal, [2.0])[0])
            flat[0] -= sign * step
        assert float(gradient.view(-1)[0]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-8)


def test_backward_terms_by_hand():
    network = small_network()
    x, returned, drawn = 0.5 * torch.randn(
        3, 7, 20, generator=torch.Generator().manual_seed(12), dtype=torch.float64
    )
    error, discrepancy = backward_losses(network, x, returned, drawn, (1.4, 2.0))
    found = network.inverse_padded(returned).detach().numpy()
    squares = [(found[i, j] - float(x[i, j])) ** 2 for i in range(7) for j in range(20)]
    assert error.item() == pytest.approx(np.mean(squares), rel=1e-12)
    sampled = network.inverse_padded(drawn).detach().numpy()
    expected = mmd2_by_loops(sampled[:, :6], x.numpy()[:, :6], (1.4, 2.0))
    assert discrepancy.item() == pytest.approx(expected, rel=1e-11)
