"""How close the emulator comes to Lightweaver's lines, and what stands in its way.

    python -m tests.benchmarks.emulator [--model MODEL] [--grid GRID.zarr] [--fresh FRESH.zarr] [--floor 20]

Mean squared error of the normalised lines (all points of both) of simulations that were not trained on, at
every mu of the grid, and beside it

- a lookup: the lines of the nearest training atmosphere at the same mu, by Euclidean distance of electron
  density, temperature, velocity (network units) and microturbulence, each divided by its standard deviation
  as the emulator does;
- the learning curve: emulators trained by the recipe on nested parts of the training simulations, all by the
  same schedule, chosen on the same validation part;
- the floor that 50 heights set: lines of the same atmospheres, synthesised anew from temperature and velocity
  at the network's heights and what lies on straight lines between them (of log T and of v), with the grid's
  microturbulence and law of density, against the grid's lines. Electrons come from charge conservation, as in
  the grid. It is what exact transfer makes of an atmosphere's vector without knowing more, and no bound for
  an emulator, which can learn where between two heights the family's transition region lies: nearly all of
  the error comes from there. So a second floor takes the true temperature between the heights, and the
  velocity alone from the points. The control, the same synthesis from the parameters themselves, shows what
  the solver's settings and the store's rounding contribute.

Printed, and written to NAME.json and NAME.png.
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from inn.checkpoint import BUNDLED, load_model, model_hash
from inn.emulator import Emulator
from inn.layout import Layout
from inn.training import LeastSquaresTrainer
from pipeline.errors import InputError
from pipeline.grids import atmosphere, lightweaver
from pipeline.grids.atmosphere import PARAMETERS, AtmosphereParameters, SampledAtmosphere
from pipeline.grids.store import BUNDLED_GRID, open_grid, split
from pipeline.progress import Progress
from pipeline.recipes import RECIPES, Recipe
from pipeline.training_set import Batch, TrainingSet, content_hash

PAPER = 5.73e-5
"""The published network's forward error on its own held-out snapshots (Osborne et al. 2019, section 4)."""

Array = NDArray[np.float64]


def converged(path: Path, part: str | None = None) -> xr.Dataset:
    """Converged samples of a grid, of one part if asked for."""
    with open_grid(path) as store:
        chosen = store["converged"].to_numpy().copy()
        if part is not None:
            chosen &= split(store["simulation"].to_numpy()) == part
        return store.isel(sample=np.flatnonzero(chosen)).load()


def errors_by_mu(emulated: Tensor, clean: Batch) -> Array:
    """Mean squared error at each mu, shape (mu,), of lines in the order of `TrainingSet.clean`."""
    angles = int(clean.mu.unique().numel())
    squares = (emulated - clean.lines).double().square().mean(dim=-1)
    means: Array = squares.reshape(-1, angles).mean(dim=0).numpy()
    return means


def emulate(emulator: Emulator, clean: Batch) -> Tensor:
    """The emulator's lines."""
    with torch.no_grad():
        lines: Tensor = emulator(clean.atmosphere, clean.microturbulence, clean.mu)
    return lines


def nearest_lines(library: Batch, wanted: Batch) -> Tensor:
    """Lines of the library's nearest atmospheres at the same mu; both in the order of `TrainingSet.clean`."""
    angles = int(library.mu.unique().numel())

    def features(batch: Batch) -> Tensor:
        return torch.cat((batch.atmosphere, batch.microturbulence[:, None]), dim=-1)[::angles].double()

    known, asked = features(library), features(wanted)
    scale = known.std(dim=0).clamp_min(0.02)
    place = torch.cdist(asked / scale, known / scale).argmin(dim=1)
    lines = library.lines.reshape(-1, angles, library.lines.shape[-1])
    return lines[place].reshape(-1, library.lines.shape[-1])


def trained(recipe: Recipe, train: TrainingSet, validation: TrainingSet, epochs: int | None) -> Emulator:
    """An emulator by the recipe, with seed 0."""
    settings = recipe if epochs is None else recipe.with_epochs(epochs)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        emulator = Emulator(train.layout, **settings.emulator)
    clean = train.clean()
    emulator.fit_statistics(clean.atmosphere, clean.microturbulence, clean.mu, clean.lines)
    schedule = settings.emulator_schedule
    with Progress(f"emulator of {len(train)} simulations", schedule.epochs, "epochs") as progress:
        trainer = LeastSquaresTrainer(emulator, train.draw_clean, [validation.clean()], schedule)
        trainer.run(lambda _: progress.advance(1))
    return emulator


def nested(simulation: NDArray[np.generic], fractions: list[float], seed: int = 0) -> list[NDArray[np.intp]]:
    """Samples of growing shares of the simulations, each part holding those before."""
    names = np.unique(simulation)
    order = np.random.default_rng(seed).permutation(names)
    return [
        np.flatnonzero(np.isin(simulation, order[: max(round(share * names.size), 1)]))
        for share in fractions
    ]  # fmt: skip


def whole(sample: xr.Dataset) -> AtmosphereParameters:
    """The parameters of one sample."""
    return AtmosphereParameters(*(float(sample[f"parameter_{item.name}"]) for item in PARAMETERS))


def from_points(sample: xr.Dataset) -> SampledAtmosphere:
    """One sample as its heights hold it."""
    return SampledAtmosphere(
        *whole(sample).values(),
        heights=tuple(sample["height"].values.tolist()),
        temperatures=tuple(sample["temperature"].values.tolist()),
        velocities=tuple(sample["velocity"].values.tolist()),
    )


def velocity_from_points(sample: xr.Dataset) -> SampledAtmosphere:
    """One sample with the true temperature at all heights, and the velocity as its heights hold it."""
    parameters = whole(sample)
    fine = np.linspace(atmosphere.BOTTOM, atmosphere.TOP, 20_001)  # steps of 0.5 km
    velocity = np.interp(fine, sample["height"].values, sample["velocity"].values)
    return SampledAtmosphere(
        *parameters.values(),
        heights=tuple(fine.tolist()),
        temperatures=tuple(atmosphere.temperature(parameters, fine).tolist()),
        velocities=tuple(velocity.tolist()),
    )


def resynthesised(
    samples: xr.Dataset, known: Callable[[xr.Dataset], AtmosphereParameters], title: str
) -> xr.Dataset:
    """The same samples, their lines from what `known` makes of each; those that fail are left out."""
    maker = json.loads(samples.attrs["fingerprint"])["maker"]
    if maker["name"] != "lightweaver" or maker["family"] != atmosphere.FAMILY_VERSION:
        raise InputError(
            "only atmospheres of the family that this version makes can be synthesised anew",
            where="the grid's maker", found=maker, expected=f"family {atmosphere.FAMILY_VERSION}",
        )  # fmt: skip
    for line, offsets in (
        ("halpha", lightweaver.HALPHA_OFFSETS),
        ("ca8542", lightweaver.CA8542_OFFSETS),
    ):
        stored = samples[f"wavelength_{line}"].values
        if stored.shape != offsets.shape or not np.allclose(stored, offsets):
            raise InputError("the grid has other wavelengths than this version's synthesis", where=line)
    angles = [index for index, mu in enumerate(lightweaver.MU) if np.isclose(samples["mu"], mu).any()]
    result = samples.copy(deep=True)
    good = []
    with Progress(title, samples.sizes["sample"], "atmospheres") as progress:
        for row in range(samples.sizes["sample"]):
            made = lightweaver.synthesise(known(samples.isel(sample=row)))
            if made.status == 0:
                good.append(row)
                result["halpha"].values[row] = made.halpha[angles]
                result["ca8542"].values[row] = made.ca8542[angles]
            progress.advance(1)
    return result.isel(sample=good)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a model with an emulator")
    parser.add_argument("--grid", type=Path, default=BUNDLED_GRID, help="the grid it was trained on")
    parser.add_argument(
        "--fresh", type=Path, help="a grid to score on; the test part of the other if left out"
    )
    parser.add_argument("--recipe", default="conditional", help="whose emulator the learning curve trains")
    parser.add_argument(
        "--fractions", default="0.125,0.25,0.5,1", help="of the training simulations; or none"
    )
    parser.add_argument("--epochs", type=int, help="of each emulator; the recipe's if left out")
    parser.add_argument(
        "--floor", type=int, default=20, help="atmospheres to synthesise anew, 3 s each; or 0"
    )
    parser.add_argument("--output", type=Path, default=Path("emulator"), help="NAME of .json and .png")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    console = Console()
    layout = Layout()
    recipe = RECIPES[options.recipe]

    train_samples = converged(options.grid, "train")
    held_out_samples = converged(options.grid, "test") if options.fresh is None else converged(options.fresh)
    held_out = TrainingSet(held_out_samples, layout, recipe.augmentation)
    clean = held_out.clean()
    emulator = load_model(options.model).emulator
    if not isinstance(emulator, Emulator):
        raise InputError("the model has no emulator", where=options.model)
    library = TrainingSet(train_samples, layout, recipe.augmentation).clean()
    own = errors_by_mu(emulate(emulator, clean), clean)
    looked_up = errors_by_mu(nearest_lines(library, clean), clean)
    written: dict[str, object] = {
        "model": {"path": str(options.model), "sha256": model_hash(options.model)},
        "grid": {"path": str(options.grid), "sha256": content_hash(options.grid)},
        "held_out": str(options.fresh or "test part"),
        "simulations": {"training": len(train_samples["sample"]), "held out": len(held_out)},
        "mu": held_out.mu.tolist(),
        "emulator": {"mse": float(own.mean()), "by_mu": own.tolist()},
        "lookup": {"mse": float(looked_up.mean()), "by_mu": looked_up.tolist()},
        "paper": PAPER,
    }
    table = Table(title=f"Squared error, {len(held_out):,} held-out simulations")
    for heading in ("mu", "emulator", "nearest atmosphere", "ratio"):
        table.add_column(heading, justify="right")
    for name, ours, theirs in (
        *zip([f"{mu:.2f}" for mu in held_out.mu.tolist()], own, looked_up, strict=True),
        ("all", own.mean(), looked_up.mean()),
    ):
        table.add_row(name, f"{ours:.2e}", f"{theirs:.2e}", f"{theirs / ours:.1f} x")
    console.print(table)

    curve: list[tuple[int, float, float]] = []
    if options.fractions != "none":
        validation = TrainingSet(converged(options.grid, "validation"), layout, recipe.augmentation)
        fractions = [float(share) for share in options.fractions.split(",")]
        for chosen in nested(train_samples["simulation"].values, fractions):
            part = TrainingSet(train_samples.isel(sample=chosen), layout, recipe.augmentation)
            learned = trained(recipe, part, validation, options.epochs)
            curve.append(
                (
                    len(part),
                    float(errors_by_mu(emulate(learned, clean), clean).mean()),
                    float(errors_by_mu(nearest_lines(part.clean(), clean), clean).mean()),
                )
            )
        table = Table(title="Learning curve")
        for heading in ("training simulations", "emulator", "nearest atmosphere", "ratio"):
            table.add_column(heading, justify="right")
        for count, ours, theirs in curve:
            table.add_row(f"{count:,}", f"{ours:.2e}", f"{theirs:.2e}", f"{theirs / ours:.1f} x")
        console.print(table)
        written["learning_curve"] = [
            {"simulations": count, "emulator": ours, "lookup": theirs} for count, ours, theirs in curve
        ]

    floor: float | None = None
    if options.floor:
        rows = np.random.default_rng(0).permutation(len(held_out))[: options.floor]
        common = [index for index, mu in enumerate(held_out_samples["mu"].values) if mu in lightweaver.MU]
        chosen_samples = held_out_samples.isel(sample=np.sort(rows), mu=common)
        table = Table(title="The floor of 50 heights")
        for heading in ("lines of", "atmospheres", "mean", "median"):
            table.add_column(heading, justify="left" if heading == "lines of" else "right")
        results = {}
        for name, known in (
            ("points", from_points),
            ("points' velocity, true temperature", velocity_from_points),
            ("parameters (control)", whole),
        ):
            again = resynthesised(chosen_samples, known, f"synthesising from {name}")
            kept = chosen_samples.sel(sample=again["sample"])
            truth, made = (TrainingSet(part, layout, recipe.augmentation).clean() for part in (kept, again))
            for what, lines in ((name, made.lines), ("emulator, the same", emulate(emulator, truth))):
                each = (lines - truth.lines).double().square().mean(dim=-1).reshape(len(kept["sample"]), -1)
                results[what] = each.mean(dim=1).numpy()
        for what, each in results.items():
            table.add_row(what, str(each.size), f"{each.mean():.2e}", f"{np.median(each):.2e}")
        console.print(table)
        floor = float(results["points"].mean())
        written["floor"] = {
            what: {"mse": float(each.mean()), "median": float(np.median(each)), "each": each.tolist()}
            for what, each in results.items()
        }
    console.print(
        f"[dim]the paper's network, on its own held-out snapshots of 81 simulations: {PAPER:.2e}[/]"
    )
    options.output.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")
    if curve:
        learning_figure(curve, floor).savefig(options.output.with_suffix(".png"), dpi=130)


def learning_figure(curve: list[tuple[int, float, float]], floor: float | None) -> Figure:
    """Errors against the number of training simulations."""
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = figure.subplots()
    counts, ours, theirs = zip(*curve, strict=True)
    axes.loglog(counts, theirs, "s--", color="#8d6e4b", label="nearest training atmosphere")
    axes.loglog(counts, ours, "o-", color="#20639b", label="emulator")
    if floor is not None:
        axes.axhline(floor, color="#3b7f5c", linewidth=1.0, label="exact transfer, 50 heights interpolated")
    axes.set(xlabel="training simulations", ylabel="mean squared error of normalised lines")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower left")
    return figure


if __name__ == "__main__":
    main()
