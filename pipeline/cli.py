"""The `flarefield` command: arguments in, one function of the pipeline called, errors a person can act on."""

from __future__ import annotations

import glob
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from pipeline.errors import FlareFieldError, MisuseError
from pipeline.provenance import flarefield_version

if TYPE_CHECKING:
    from pipeline.validation import Scores

# In a pipe or a file there is no width to keep to: tables there are not cut short.
console = Console(width=None if sys.stdout.isatty() else 140, emoji=False)
errors = Console(stderr=True, emoji=False)

MAX_SEED = 2**32 - 1
"""Of a command that makes further seeds of the one it is given."""


class _Commands(TyperGroup):
    """Commands, some of which have names of two words."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401
        if (name := " ".join(args[:2])) in self.commands and len(args) > 1:
            return name, self.commands[name], args[2:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Posterior maps of flare atmospheres (electron density, temperature, velocity against height) from "
    "SST/CRISP scans in H-alpha and Ca II 8542.",
    epilog="Example: [bold]flarefield ingest crisp/*.fits obs.zarr && flarefield invert obs.zarr map.zarr[/]",
)
grid_app = typer.Typer(no_args_is_help=True, help="Make and look at training grids.")
app.add_typer(grid_app, name="grid")


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"flarefield {flarefield_version()}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error and the cluster's own log.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Declare the options that every command has; `main` acts on ``--debug`` wherever it stands."""


def _call() -> str:
    """The command line, as stores record it."""
    return shlex.join(["flarefield", *sys.argv[1:]])


ClusterOption = Annotated[
    str,
    typer.Option(
        "--cluster",
        metavar="local|cuda|FILE|ADDRESS",
        help="Where to run: `local` (the CPU's cores), `cuda` (this machine's GPUs), a YAML file such as "
        "those in deploy/, or a scheduler's address.",
    ),
]
MediumOption = Annotated[
    Literal["air", "vacuum"] | None,
    typer.Option(
        help="What the files' wavelengths are measured in, where they do not say.", show_default=False
    ),
]
GenericOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.yaml",
        help="A description of FITS or NetCDF files of other instruments, such as deploy/ibis.yaml. Where a "
        "file says otherwise it is refused, unless the description has such as `overrides: [unit]`.",
        show_default=False,
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Start over where the output exists.")]


@app.command(
    "ingest",
    epilog="Example: [bold]flarefield ingest '2014-09-06/crisp_l2_*.fits' obs.zarr[/]"
    "\n\nWith quiet Sun in the field: [bold]flarefield ingest 2014-09-06 obs.zarr --calibrate quiet-sun "
    "--wavelength-zero quiet-sun[/]"
    "\n\nOf another instrument: [bold]flarefield ingest --generic deploy/ibis.yaml 'ibis/*.fits' obs.zarr[/]"
    "\n\nTo an object store: [bold]flarefield ingest 2014-09-06 s3://bucket/obs.zarr[/]",
)
def ingest_command(
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Files, directories or globs, in any order.")
    ],
    output: Annotated[
        str, typer.Argument(metavar="OBS.zarr", help="The observation store to write, or its URL (s3://...).")
    ],
    tolerance: Annotated[
        float, typer.Option(help="Largest time between the scans of a pair, in seconds.", min=0.0)
    ] = 15.0,
    medium: MediumOption = None,
    generic: GenericOption = None,
    calibrate: Annotated[
        Literal["none", "quiet-sun"],
        typer.Option(
            help="Scale each line by the quiet Sun in the field, so that the lines' relative calibration is "
            "measured and its error known; refused where there is too little quiet Sun.",
        ),
    ] = "none",
    wavelength_zero: Annotated[
        Literal["none", "quiet-sun"],
        typer.Option(
            help="Put the quiet Sun's line cores where the atlas has them: velocities are then "
            "relative to the quiet Sun's surface there."
        ),
    ] = "none",
    min_contrast: Annotated[
        float,
        typer.Option(
            help="Flag the scans whose granulation has less contrast than this (`flarefield inspect` says "
            "what they have), in either line: `poor_seeing`; they are kept.",
            min=0.0,
        ),
    ] = 0.0,
    align_series: Annotated[
        bool,
        typer.Option(
            "--align-series",
            help="Bring all times onto one, too, by H-alpha. Times for which that cannot be found out with "
            "confidence are not moved, and flagged.",
        ),
    ] = False,
    largest_jump: Annotated[
        float,
        typer.Option(help="Pixels between two scans that --align-series takes for the telescope's.", min=0.0),
    ] = 40.0,
    alignment_figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the displacements, of the lines and along the series, to this file (.png, .pdf).",
            show_default=False,
        ),
    ] = None,
    common_time: Annotated[
        bool,
        typer.Option(
            "--common-time",
            help="Interpolate Ca II in time to H-alpha's, between the scans before and after; times where "
            "that is not possible keep their own (`ca8542_interpolated`).",
        ),
    ] = False,
    cluster: ClusterOption = "local",
    overwrite: OverwriteOption = False,
) -> None:
    """Pair, mask and align CRISP scans of both lines; write an observation store."""
    from pipeline.cluster import load_config
    from pipeline.ingest import ingest

    report = ingest(
        sources,
        output,
        cluster=load_config(cluster),
        tolerance=tolerance,
        calibrate=calibrate,
        wavelength_zero=wavelength_zero,
        min_contrast=min_contrast,
        align_series=align_series,
        largest_jump=largest_jump,
        common_time=common_time,
        medium=medium,
        description=generic,
        overwrite=overwrite,
        call=_call(),
    )
    _say(report.summary())
    if alignment_figure is not None:
        from pipeline import figures
        from pipeline.observation import open_observation

        with open_observation(output) as observation:
            figures.save_figure(figures.alignment_figure(observation), alignment_figure)
        _say(f"{alignment_figure}: written")


@app.command(
    "inspect",
    epilog="Example: [bold]flarefield inspect '2014-09-06/*.fits'[/]"
    "\n\nTimes of poor seeing: [bold]flarefield inspect '2014-09-06/*.fits' --min-contrast 0.05[/]",
)
def inspect_command(
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Files, directories or globs, in any order.")
    ],
    tolerance: Annotated[
        float, typer.Option(help="Largest time between the scans of a pair, in seconds.", min=0.0)
    ] = 15.0,
    medium: MediumOption = None,
    generic: GenericOption = None,
    every: Annotated[
        bool, typer.Option("--all", help="Look at the intensities of every scan, not of three of each kind.")
    ] = False,
    min_contrast: Annotated[
        float,
        typer.Option(
            help="Name the times at which the granulation has less contrast than this, of all scans: those "
            "that `flarefield ingest` with the same option flags `poor_seeing`.",
            min=0.0,
        ),
    ] = 0.0,
) -> None:
    """Say what files are, what is wrong with them, and what ingest would do; exit 1 if any cannot be used."""
    from pipeline.inspect import inspect, show

    inspection = inspect(
        sources,
        medium=medium,
        description=generic,
        tolerance=tolerance,
        every=every,
        min_contrast=min_contrast,
    )
    show(inspection, console)
    if inspection.refused:
        raise typer.Exit(1)


@app.command(
    "invert",
    epilog="Example: [bold]flarefield invert obs.zarr map.zarr --draws 256[/]"
    "\n\nWhat it will take: [bold]flarefield invert obs.zarr map.zarr --dry-run[/]"
    "\n\nA part, without what an earlier map calls novel: [bold]flarefield invert obs.zarr part.zarr "
    "--region 200:400,150:300 --times 0:10 --skip novel --skip-from map.zarr[/]"
    "\n\nA first look, to choose it: [bold]flarefield invert obs.zarr look.zarr --preview[/]",
)
def invert_command(
    context: typer.Context,
    observation: Annotated[
        str,
        typer.Argument(
            metavar="OBS.zarr", help="An observation store, made by `flarefield ingest`, or its URL."
        ),
    ],
    output: Annotated[
        str | None,
        typer.Argument(
            metavar="MAP.zarr",
            help="The map store to write, or to go on with, or its URL (s3://...).",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model directory or its URL; the bundled model if left out.", show_default=False),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="local|cuda|FILE|ADDRESS",
            help="Where to run: `local` (the CPU's cores), `cuda` (this machine's GPUs), a YAML file such as "
            "those in deploy/, or a scheduler's address. If left out: GPUs where any are found, the CPU's "
            "cores where not.",
            show_default=False,
        ),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            help="Posterior draws of each pixel; as many as --accuracy takes if left out.",
            min=2,
            show_default=False,
        ),
    ] = None,
    accuracy: Annotated[
        float | None,
        typer.Option(
            help="Wanted error of the quantiles that comes of drawing (root mean square at 5, 50 and 95 %, "
            "in units of the posterior's own spread, without the few numbers whose posterior has two states "
            "far apart). Taken are the fewest draws that reach it of those measured for this network (16, "
            "32, 64, ...), or more, by the law of independent draws, where none of them does. 0.13 if "
            "neither this nor --draws is given.",
            min=0.0,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the draws. The latents that a network brings with it have none: with a seed, more "
            "are drawn in their place.",
            min=0,
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(
            help="Of matrix products: half precision is faster where the processor or GPU can do it, and is "
            "taken for networks that lose nothing by it; --precision float32 insists on the full one.",
            show_default=False,
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Have torch compile the network on every worker: sampling takes two thirds of its time, "
            "after some seconds at the beginning. Needs a C++ compiler there, whose the last bits are.",
        ),
    ] = False,
    gaussian: Annotated[bool, typer.Option("--gaussian", help="Independent Gaussian latents.")] = False,
    quantiles: Annotated[
        str, typer.Option(help="Levels between 0 and 1, separated by commas.")
    ] = "0.05,0.16,0.5,0.84,0.95",
    tile: Annotated[int, typer.Option(help="Pixels along both sides of a tile.", min=1)] = 64,
    calibration_error: Annotated[
        float | None,
        typer.Option(
            help="Relative error between the lines' intensities; if left out, what the observation says "
            "(`flarefield ingest --calibrate quiet-sun`), or else the network's own.",
            min=0.0,
            show_default=False,
        ),
    ] = None,
    interpolation: Annotated[
        Literal["linear", "pchip"],
        typer.Option(help="Between wavelengths: straight lines, as in training, or monotone cubics."),
    ] = "linear",
    preview: Annotated[
        bool,
        typer.Option(
            "--preview",
            help="A first look in an eighth of the time: quantiles by a network that was taught by the "
            "sampled posterior, off by what the map then says; no draws, no misfit.",
        ),
    ] = False,
    region: Annotated[
        str | None,
        typer.Option(
            metavar="Y0:Y1,X0:X1",
            help="Only this rectangle: rows and columns from 0, the second of each not in it "
            "(200:400,150:300); or in arcsec on the map's own axes y and x (-5:5,-12.5:0arcsec). An end left "
            "out is the field's. The map keeps the whole field's dimensions.",
            show_default=False,
        ),
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(
            metavar="RANGES",
            help="Only these times, by their indices from 0: 0:10 (10 is not in it), 3,5,8 or 0:90:10.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FLAG",
            help="Not the pixels that have this flag in the map of --skip-from, by its name in "
            "`flag_meanings`; may be repeated, or several separated by commas.",
            show_default=False,
        ),
    ] = None,
    skip_from: Annotated[
        str | None,
        typer.Option(
            metavar="MAP.zarr",
            help="An earlier map of the same observation, whose flags --skip names. Pixels that it has not "
            "come to, or was not asked for, are not skipped, and the command says how many these are.",
            show_default=False,
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Compute nothing for the map: say how many tiles and pixels are to be done, how large it "
            "will be and how long it takes, by inverting a few pixels on the cluster; exit code 1 if it does "
            "not fit.",
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Invert nothing: compare every tile of a map (the last store named) with its journal; exit "
            "code 1 if any is missing, damaged or failed.",
        ),
    ] = False,
) -> None:
    """Invert every pixel of an observation, or a part; the same command again does what is missing."""
    if check:
        from pipeline.check import check_map

        given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("LINE")]
        if ignored := sorted({*given} - {"observation", "output", "check"}):
            raise MisuseError(
                "--check only looks at a map: other options mean nothing to it",
                found=", ".join(f"--{name.replace('_', '-')}" for name in ignored),
                expected="flarefield invert --check MAP.zarr",
                remedy="leave them out",
            )
        checked = check_map(output or observation)
        _say(checked.summary())
        if not checked.sound:
            raise typer.Exit(1)
        return
    if output is None:
        raise MisuseError(
            "no map to write was named",
            expected="flarefield invert OBS.zarr MAP.zarr, or flarefield invert --check MAP.zarr",
        )
    from pipeline.cluster import load_config
    from pipeline.invert import invert, plan_inversion

    settings: dict[str, Any] = {
        "model": model,
        "cluster": None if cluster is None else load_config(cluster),
        "draws": draws,
        "seed": seed,
        "latent": "gaussian" if gaussian else None,
        "accuracy": accuracy,
        "precision": precision,
        "compiled": compiled,
        "quantiles": _numbers("--quantiles", quantiles, "0.05,0.5,0.95"),
        "tile": tile,
        "calibration_error": calibration_error,
        "interpolation": interpolation,
        "preview": preview,
        "region": region,
        "times": times,
        "skip": skip or (),
        "skip_from": skip_from,
        "overwrite": overwrite,
    }
    if dry_run:
        plan = plan_inversion(observation, output, **settings)
        _say(plan.summary())
        if not plan.fits:
            raise typer.Exit(1)
        return
    report = invert(observation, output, call=_call(), **settings)
    _say(report.summary())
    if report.failed:
        raise typer.Exit(1)


def _numbers(option: str, text: str, example: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise MisuseError(
            f"{option} takes numbers separated by commas",
            where=option,
            found=text,
            expected=f"for example {example}",
        ) from None


@app.command("report", epilog="Example: [bold]flarefield report map.zarr map.html[/]")
def report_command(
    map_store: Annotated[str, typer.Argument(metavar="MAP.zarr", help="A map store, or its URL.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.html", help="The page to write.")],
    observation: Annotated[
        str | None,
        typer.Option(
            help="The observation store, or its URL, to show its profiles and images.", show_default=False
        ),
    ] = None,
    time: Annotated[
        int | None, typer.Option(help="Index of the scan to show; the last if left out.", show_default=False)
    ] = None,
    height: Annotated[float, typer.Option(help="Height of the maps, in Mm.")] = 1.0,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a page with the maps, profiles and flags of a map store."""
    from pipeline.observation import open_observation
    from pipeline.report import write_report
    from pipeline.results import open_map

    written = write_report(
        open_map(map_store),
        output,
        observation=None if observation is None else open_observation(observation),
        time=time,
        height=height,
        overwrite=overwrite,
    )
    _say(f"{written}: written")


@app.command("demo", epilog="Example: [bold]flarefield demo demo[/]")
def demo_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where everything is left.")],
    seed: Annotated[int, typer.Option(help="Decides the scene and the noise.", min=0, max=MAX_SEED)] = 0,
    scans: Annotated[int, typer.Option(help="Scans of the series.", min=1)] = 3,
    model: Annotated[
        Path | None, typer.Option(help="Model directory; the bundled model if left out.", show_default=False)
    ] = None,
    cluster: ClusterOption = "local",
) -> None:
    """Make a short series of a two-ribbon flare, invert it, and compare with the truth."""
    from pipeline.cluster import connect, load_config
    from pipeline.demo import run_demo

    with connect(load_config(cluster)) as client:
        run_demo(directory, client=client, seed=seed, scans=scans, model=model)


@grid_app.command(
    "lightweaver", epilog="Example: [bold]flarefield grid lightweaver grid.zarr --samples 5120[/]"
)
def grid_lightweaver_command(
    output: Annotated[
        Path, typer.Argument(metavar="GRID.zarr", help="The grid store to write, go on with or enlarge.")
    ],
    samples: Annotated[int, typer.Option(help="Number of atmospheres.", min=1)] = 5120,
    first: Annotated[int, typer.Option(help="Index of the first atmosphere in the design.", min=0)] = 0,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the design; the bundled grid's if left out.",
            min=0,
            max=MAX_SEED,
            show_default=False,
        ),
    ] = None,
    cluster: ClusterOption = "local",
) -> None:
    """Synthesise flare atmospheres and their lines (non-LTE, statistical equilibrium) with Lightweaver."""
    from pipeline.cluster import load_config
    from pipeline.grids.atmosphere import DESIGN_SEED
    from pipeline.grids.lightweaver import make_lightweaver_grid

    written = make_lightweaver_grid(
        output,
        samples=samples,
        first=first,
        seed=DESIGN_SEED if seed is None else seed,
        cluster=load_config(cluster),
        call=_call(),
    )
    _say(f"{written}: complete")


@grid_app.command(
    "radyn", epilog="Example: [bold]flarefield grid radyn 'fchroma/radyn_out.*.cdf' grid.zarr --stride 5[/]"
)
def grid_radyn_command(
    sources: Annotated[
        list[str], typer.Argument(metavar="CDF...", help="RADYN's output, one file a run; files or globs.")
    ],
    output: Annotated[
        Path, typer.Argument(metavar="GRID.zarr", help="The grid store to write, go on with or enlarge.")
    ],
    stride: Annotated[int, typer.Option(help="Take every so many snapshots (each 0.1 s).", min=1)] = 1,
    heights: Annotated[
        str | None,
        typer.Option(
            help="Heights in Mm, ascending, separated by commas; the network's if left out.",
            show_default=False,
        ),
    ] = None,
    continuum: Annotated[
        bool, typer.Option(help="Add the continuum to the lines, as what is observed holds it.")
    ] = True,
    cluster: ClusterOption = "local",
) -> None:
    """Turn runs of RADYN (F-CHROMA's CDF files) into a grid: every snapshot, both lines, every ray."""
    from pipeline.cluster import load_config
    from pipeline.grids.radyn import make_radyn_grid

    report = make_radyn_grid(
        _expanded(sources),
        output,
        stride=stride,
        heights=None if heights is None else _numbers("--heights", heights, "0,0.5,1.0"),
        continuum=continuum,
        cluster=load_config(cluster),
        call=_call(),
    )
    _say(report.summary())
    if not report.complete:
        raise typer.Exit(1)


@grid_app.command(
    "published", epilog="Example: [bold]flarefield grid published DoublePicoGigaPickle50.pickle grid.zarr[/]"
)
def grid_published_command(
    source: Annotated[Path, typer.Argument(metavar="FILE.pickle", help="The paper's training data.")],
    output: Annotated[
        Path, typer.Argument(metavar="GRID.zarr", help="The grid store to write, or to go on with.")
    ],
    cluster: ClusterOption = "local",
) -> None:
    """Turn the paper's released training data into a grid; no code in the file is executed."""
    from pipeline.cluster import LocalConfig, load_config
    from pipeline.grids.published import make_published_grid

    config = load_config(cluster)
    # To read the file is nearly all the work, and every worker would do it.
    written = make_published_grid(
        source, output, cluster=None if config == LocalConfig() else config, call=_call()
    )
    _say(f"{written}: complete")


@grid_app.command("show", epilog="Example: [bold]flarefield grid show grid.zarr --figure grid.png[/]")
def grid_show_command(
    grid: Annotated[Path, typer.Argument(metavar="GRID.zarr", help="A grid store.")],
    figure: Annotated[
        Path | None,
        typer.Option(help="Picture to write: profile families, atmospheres against height."),
    ] = None,
    mu: Annotated[
        float | None,
        typer.Option(help="Cosine of the heliocentric angle of the profiles; the largest if left out."),
    ] = None,
) -> None:
    """Tell what a grid holds, in words and in a picture."""
    from pipeline.grids.coverage import show_grid

    show_grid(grid, figure, mu=mu, console=console)
    if figure is not None:
        _say(f"{figure}: written")


def _expanded(sources: Sequence[str]) -> list[str]:
    """Files of patterns that no shell has expanded."""
    found: list[str] = []
    for source in sources:
        matches = sorted(glob.glob(source)) if not Path(source).exists() else [source]
        if not matches:
            raise MisuseError("no such file", where=source, remedy="name files, or a pattern in quotes")
        found += matches
    return found


@app.command("validate", epilog="Example: [bold]flarefield validate model fresh.zarr report.html[/]")
def validate_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory.")],
    grid: Annotated[
        Path,
        typer.Argument(
            metavar="GRID.zarr", help="Simulations; of the model's own grid the test part counts."
        ),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="REPORT", help="The HTML page to write; numbers beside it.")
    ],
    draws: Annotated[int, typer.Option(help="Posterior draws of each observation.", min=15)] = 255,
    seed: Annotated[int, typer.Option(help="Seed of observations and draws.", min=0, max=MAX_SEED)] = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Score a network on simulations: do its intervals hold the truth as often as they say?"""
    from pipeline.validation import validate

    scores = validate(model, grid, output, draws=draws, seed=seed, overwrite=overwrite, call=_call())
    console.print(_calibration(scores))
    _say(f"{output}: written")


def _calibration(scores: Scores) -> Table:
    """Table of coverage, ranks and CRPS, averaged over the heights where there is something to infer."""
    from inn.calibration import LEVELS
    from inn.layout import QUANTITIES

    table = Table(title=f"{scores.simulations:,} simulations")
    table.add_column("quantity")
    for heading in (*(f"{100 * level:.0f} % covers" for level in LEVELS), "uniform ranks", "CRPS"):
        table.add_column(heading, justify="right")
    for row, quantity in enumerate(QUANTITIES):
        table.add_row(
            quantity.replace("_", " "),
            *(
                f"{100 * share:.1f} ± {100 * error:.1f} %"
                for share, error in zip(scores.mean_coverage[row], scores.coverage_error[row], strict=True)
            ),
            f"{100 * scores.uniform[row]:.0f} % of heights",
            f"{scores.mean_crps[row]:.4f} ± {scores.crps_error[row]:.4f}",
        )
    return table


@app.command(
    "train",
    epilog="Example: [bold]flarefield train grid.zarr model --recipe conditional --seed 1[/]"
    "\n\nHow it is doing: [bold]flarefield train status model[/]"
    "\n\nA new preview for a network as it is: [bold]flarefield train grid.zarr new --preview-of model[/]",
)
def train_command(
    grid: Annotated[Path, typer.Argument(metavar="GRID.zarr", help="A grid store.")],
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The model directory to write, or to go on with.")
    ],
    recipe: Annotated[
        str, typer.Option(help="`conditional` (recommended) or `radynversion` (the paper's).")
    ] = "conditional",
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=MAX_SEED)] = 0,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs; the recipe's if left out. The paper's curriculum is scaled to them.",
            min=1,
            show_default=False,
        ),
    ] = None,
    preview_of: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="A model that was trained on this grid: its network stays as it is, and is taught a new "
            "preview.",
            show_default=False,
        ),
    ] = None,
    cluster: ClusterOption = "local",
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Return at once; only on a cluster that goes on without this command."),
    ] = False,
    checkpoint_every: Annotated[
        float, typer.Option(metavar="SECONDS", help="Least time between two checkpoints.", min=0.0)
    ] = 60.0,
    checkpoint_epochs: Annotated[
        int | None,
        typer.Option(help="Epochs after which there is one in any case.", min=1, show_default=False),
    ] = None,
) -> None:
    """Train a network on a grid, score it on held-out simulations, and save it as a model.

    The same command again goes on where an earlier one was interrupted.
    """
    from pipeline.cluster import load_config
    from pipeline.train_job import train

    record = train(
        grid,
        model,
        recipe=recipe,
        seed=seed,
        epochs=epochs,
        preview_of=preview_of,
        call=_call(),
        cluster=load_config(cluster),
        detach=detach,
        checkpoint_seconds=checkpoint_every,
        checkpoint_epochs=checkpoint_epochs,
    )
    if record is None:
        _say(f"{model}: submitted; see `flarefield train status {shlex.quote(str(model))}`")
        return
    console.print(_scores(record["metrics"]))
    _say(f"{model}: written")


@app.command("train status", epilog="Example: [bold]flarefield train status model[/]")
def train_status_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model directory of a training.")],
) -> None:
    """Tell how a training is doing; exit code 1 if it is dead, stopped or failed."""
    from pipeline.train_job import training_status

    status = training_status(model)
    _say(status.summary())
    if not status.good:
        raise typer.Exit(1)


def _scores(metrics: dict[str, Any]) -> Table:
    """Table of a network's scores on held-out simulations."""
    first, last = metrics["all"]["heights"]
    table = Table(title=f"Held-out simulations, {first} to {last} Mm")
    for heading in ("examples", "quantity", "error / climatology's", "correlation", "50 %", "68 %", "90 %"):
        table.add_column(heading, justify="left" if heading in ("examples", "quantity") else "right")
    for group in ("all", "emission"):
        for name, score in metrics.get(group, {}).items():
            if isinstance(score, dict):
                table.add_row(
                    f"{group} ({metrics[group]['examples']})",
                    name.replace("_", " "),
                    f"{score['error_ratio']:.2f}",
                    f"{score['correlation']:.2f}",
                    *(f"{100 * share:.0f} %" for share in score["coverage"].values()),
                )
    return table


@app.command(
    "import-weights",
    epilog="Example: [bold]flarefield import-weights Radynversion_1.1.1.pth.tar model --line-points 31[/]",
)
def import_weights_command(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="FILE", help="A checkpoint of the published network.")
    ],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model directory to write.")],
    line_points: Annotated[
        int | None,
        typer.Option(
            help="Wavelengths of each line, where the file does not say (30).", min=2, show_default=False
        ),
    ] = None,
    latent: Annotated[
        int | None,
        typer.Option(help="Latent size, where the file does not say (150).", min=1, show_default=False),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn a checkpoint of the published network (either layout) into a model; no code in it is executed."""
    from inn import import_weights, save_model
    from pipeline.recipes import measure_imported

    if model.exists() and not overwrite:
        raise MisuseError("the output exists", where=model, remedy="give another name, or --overwrite")
    network = import_weights(checkpoint, line_points=line_points, latent=latent)
    measure_imported(network)
    save_model(network, model)
    _say(f"{model}: {network}")


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _start_log(debug: bool) -> None:
    logger = logging.getLogger("flarefield")
    if errors.is_terminal:
        handler: logging.Handler = RichHandler(console=errors, show_path=False, show_level=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    if not debug:
        # A cluster says much that its user can do nothing about, and tells of errors that we report.
        # Dask reads this when it is imported, here and in the worker processes.
        os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (the `flarefield` script).

    Parameters
    ----------
    arguments : sequence of str, optional
        The arguments; by default those of the process.

    Raises
    ------
    SystemExit
        Always: code 0 done, 1 failed, 2 misused.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    _start_log(debug)
    try:
        app(args=[argument for argument in given if argument != "--debug"], prog_name="flarefield")
    except Exception as error:
        if debug:
            raise
        if isinstance(error, FlareFieldError):
            message, code = str(error), error.exit_code
        else:
            message = f"{type(error).__name__}: {error}\n  remedy: run again with --debug to see where"
            code = 1
        errors.print(f"[bold red]error[/]: {escape(message)}", highlight=False, soft_wrap=True)
        raise SystemExit(code) from None


if __name__ == "__main__":
    main()
