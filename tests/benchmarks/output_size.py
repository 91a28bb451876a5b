"""What a pixel of a map takes on the disk, and what the rounding costs in accuracy, against alternatives.

    python -m tests.benchmarks.output_size [OBS.zarr] [--pixels N]

OBS.zarr is an observation store; if it is left out, one scan like those of the demo is made. Some of its
pixels are inverted, and the quantiles of all three quantities are encoded in every way of the table, in one
tile as large as the engine's. Beside bytes a pixel: the times to write and to read back the tile, and the
error that the encoding introduces, root mean square over pixels and heights, over the sampling error of the
quantiles themselves. The latter is measured, from what the quantiles of some of the pixels differ from those
of many more draws.

Rounding steps are the spread of each pixel's posterior over the root of the draws, divided by 4 to 64; the
engine's are 1/16 of it (`pipeline.tiles.round_to_error`). Errors are in the logarithm of what is
positive, in km/s for velocities, both divided by the posterior's spread; the table has the ratio of that
quantity and quantile where it is largest.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import zarr
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.storage import MemoryStore

import inn
from inn.layout import QUANTITIES
from inn.posterior import QUANTILES, posterior_quantiles
from inn.sampling import Sampling, choose_sampling
from pipeline import tiles
from pipeline.demo_series import make_series
from pipeline.grids.store import BUNDLED_GRID, open_grid
from pipeline.ingest import ingest
from pipeline.observation import open_observation
from pipeline.results import compressor
from pipeline.spectra import network_lines
from pipeline.tiles import SPREAD, round_to_error

Quantiles = dict[str, NDArray[np.float32]]
"""Of each quantity, (pixels, quantiles, heights)."""

TRUTH = 4096
"""Draws whose quantiles are as good as exact."""
TILE = 64


def blosc(level: int, shuffle: str = "bitshuffle", name: str = "zstd") -> BloscCodec:
    """Make a Blosc compressor."""
    return BloscCodec(cname=name, clevel=level, shuffle=shuffle)


@dataclass(frozen=True)
class Encoding:
    """A way to store a quantity's quantiles.

    Attributes
    ----------
    name : str
        What the table calls it.
    rounding : float or None
        Largest step, in spreads over the root of the draws; None for none.
    codec : zarr codec, optional
        Compressor of a chunk; the engine's if left out.
    together : bool
        Whether all quantiles are in one chunk; the engine has a chunk for each.
    heights_first : bool
        Whether a chunk is ordered height by height, as the engine's are, or pixel by pixel.
    side : int
        Pixels along the sides of a tile.
    """

    name: str
    rounding: float | None = tiles.ROUNDING
    codec: BytesBytesCodec | None = None
    together: bool = False
    heights_first: bool = True
    side: int = TILE


ENCODINGS = (
    Encoding("as the engine does it"),
    Encoding("no rounding", rounding=None),
    *(Encoding(f"steps of 1/{steps}", rounding=1 / steps) for steps in (2, 4, 8, 32, 64)),
    *(Encoding(f"blosc zstd, level {level}", codec=blosc(level)) for level in (1, 5, 7, 9)),
    Encoding("byte shuffle", codec=blosc(3, "shuffle")),
    Encoding("no shuffle", codec=blosc(3, "noshuffle")),
    Encoding("blosc lz4 5", codec=blosc(5, name="lz4")),
    Encoding("zstd 3, no blosc", codec=ZstdCodec(level=3)),
    Encoding("gzip 5", codec=GzipCodec(level=5)),
    Encoding("quantiles in one chunk", together=True),
    *(Encoding(f"tiles of {side} x {side}", side=side) for side in (16, 21, 32)),
    Encoding("tiles of 21 x 21, bit shuffle", codec=blosc(3, "bitshuffle"), side=21),
    Encoding("pixel by pixel", heights_first=False),
)


def pixels_of(path: Path, count: int) -> tuple[NDArray[np.float32], float, inn.ConditionalNetwork]:
    """Lines of a square of pixels in the middle of the first time, all within the field, and their mu."""
    model = inn.load_model()
    dataset = open_observation(path).isel(time=0)
    valid = dataset["valid"].values
    side = min(int(count**0.5), *valid.shape)
    # The square that holds most of the field.
    total = np.pad(valid.astype(int), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    held = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    y, x = np.unravel_index(int(held.argmax()), held.shape)
    here = {"y": slice(int(y), int(y) + side), "x": slice(int(x), int(x) + side)}
    names = [window.name for window in model.layout.lines]
    inside = dataset["valid"].isel(here).values
    intensity = [dataset[name].isel(here).transpose("y", "x", ...).values[inside] for name in names]
    wavelength = [dataset[f"wavelength_{name}"].values for name in names]
    lines, _ = network_lines(*intensity, *wavelength, model.layout)
    return lines[np.isfinite(lines).all(axis=1)], float(dataset["mu"]), model


def invert(
    model: inn.ConditionalNetwork, lines: NDArray[np.float32], mu: float, sampling: Sampling
) -> Quantiles:
    """Quantiles as the engine asks for them: the default ones, which hold those of the spread."""
    return posterior_quantiles(
        model,
        lines,
        mu,
        draws=sampling.draws,
        quantiles=QUANTILES,
        seed=sampling.seed,
        latent=sampling.latent,
    )


def scaled(quantity: str, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Where errors are additive: the logarithm of what is positive."""
    exact = values.astype(np.float64)
    return exact if quantity == "velocity" else np.log(exact)


def ends(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The quantiles whose half distance is the spread, each (pixels, heights)."""
    low, high = (values[:, QUANTILES.index(level)] for level in SPREAD)
    return low, high


def spread(quantity: str, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Half the distance of the quantiles `SPREAD`, where errors are additive: (pixels, 1, heights)."""
    low, high = (scaled(quantity, end) for end in ends(values))
    return 0.5 * (high - low)[:, None]


def rounded(quantiles: Quantiles, rounding: float | None, draws: int) -> Quantiles:
    """Round as the engine does, with another step."""
    if rounding is None:
        return quantiles
    step = rounding / math.sqrt(draws)
    return {
        quantity: round_to_error(values, *ends(values), step, positive=quantity != "velocity")
        for quantity, values in quantiles.items()
    }


def worst_error(quantiles: Quantiles, exact: Quantiles, sampling: dict[str, NDArray[np.float64]]) -> float:
    """Root mean square error over the sampling error, of the quantity and quantile where it is largest."""
    worst = 0.0
    for quantity, values in quantiles.items():
        truth = exact[quantity]
        error = (scaled(quantity, values) - scaled(quantity, truth)) / spread(quantity, truth)
        worst = max(worst, float((np.sqrt(np.mean(error**2, axis=(0, 2))) / sampling[quantity]).max()))
    return worst


def sampling_errors(drawn: Quantiles, truth: Quantiles) -> dict[str, NDArray[np.float64]]:
    """What quantiles are off, in spreads, of each quantity and quantile: the median pixel and height's."""
    return {
        quantity: np.median(
            np.abs(scaled(quantity, drawn[quantity]) - scaled(quantity, truth[quantity]))
            / spread(quantity, truth[quantity]),
            axis=(0, 2),
        )
        for quantity in QUANTITIES
    }


def stored(quantiles: Quantiles, encoding: Encoding) -> tuple[float, float, float]:
    """Bytes a pixel of one encoding, and the seconds to write and to read all of it."""
    store = MemoryStore()
    group = zarr.create_group(store)
    pixels, levels, heights = quantiles["temperature"].shape
    side = min(encoding.side**2, pixels)
    chunks = (side, levels if encoding.together else 1, heights)
    whole = pixels - pixels % side  # what is left over is no tile of the engine's
    for quantity in quantiles:
        group.create_array(
            quantity,
            shape=(whole, levels, heights),
            dtype="float32",
            chunks=chunks,
            shards=(side, levels, heights),
            filters=[TransposeCodec(order=(1, 2, 0))] if encoding.heights_first else None,
            compressors=encoding.codec or compressor(math.prod(chunks)),
            fill_value=np.nan,
        )
    started = time.perf_counter()
    for quantity, values in quantiles.items():
        group[quantity][:] = values[:whole]
    written = time.perf_counter()
    for quantity, values in quantiles.items():
        np.testing.assert_array_equal(group[quantity][:], values[:whole])
    read = time.perf_counter()
    size = sum(len(value) for key, value in store._store_dict.items() if not key.endswith("zarr.json"))
    return size / whole, written - started, read - written


def demo_observation(folder: Path) -> Path:
    """Make an observation of one scan, as the demo's, in a folder."""
    with open_grid(BUNDLED_GRID) as grid:
        files = make_series(folder / "crisp", grid, scans=1).files
    return Path(ingest(files, folder / "obs.zarr", call="the benchmark of the output's size").path)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("observation", type=Path, nargs="?", help="an observation store")
    parser.add_argument("--pixels", type=int, default=TILE**2, help="how many to invert, at most")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        observation = given.observation or demo_observation(Path(folder))
        lines, mu, model = pixels_of(observation, given.pixels)
    chosen = choose_sampling(model, quantiles=QUANTILES)
    exact = invert(model, lines, mu, chosen)
    some = lines[:: max(1, len(lines) // 256)]
    many = choose_sampling(model, draws=TRUTH, quantiles=QUANTILES)
    sampling = sampling_errors(invert(model, some, mu, chosen), invert(model, some, mu, many))

    draws = f"{chosen.draws} {chosen.latent} draws"
    table = Table(title=f"{len(lines)} pixels, {draws}: {len(QUANTILES)} quantiles of three quantities")
    for heading in (
        "encoding",
        "bytes a pixel",
        "over the engine's",
        "error / sampling error",
        "write",
        "read",
    ):
        table.add_column(heading, justify="left" if heading == "encoding" else "right")
    first: tuple[float, float, float] | None = None
    for encoding in ENCODINGS:
        quantiles = rounded(exact, encoding.rounding, chosen.draws)
        found = stored(quantiles, encoding)
        first = first or found
        table.add_row(
            encoding.name,
            f"{found[0]:,.0f}",
            *(f"{found[0] / first[0]:.2f} x",),
            f"{worst_error(quantiles, exact, sampling):.3f}",
            *(f"{one / base:.2f} x" for one, base in zip(found[1:], first[1:], strict=True)),
        )
    console = Console()
    console.print(table)
    console.print("sampling error of each quantile, in spreads of the posterior (the median):")
    for quantity, values in sampling.items():
        console.print(f"  {quantity.replace('_', ' ')}: {', '.join(f'{value:.3f}' for value in values)}")


if __name__ == "__main__":
    main()
