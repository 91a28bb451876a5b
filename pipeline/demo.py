"""The demo: a short series whose atmosphere is known, ingested, inverted and compared with it."""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import xarray as xr
from distributed import Client
from rich.console import Console
from rich.table import Table

from inn.checkpoint import load_model
from pipeline.cluster import LocalConfig, connect
from pipeline.comparison import as_json, compare
from pipeline.demo_series import make_series
from pipeline.errors import MisuseError
from pipeline.grids.store import BUNDLED_GRID, open_grid
from pipeline.ingest import ingest
from pipeline.invert import invert
from pipeline.observation import open_observation
from pipeline.provenance import provenance
from pipeline.report import write_report
from pipeline.results import open_map
from pipeline.training_set import content_hash

logger = logging.getLogger("flarefield")


@dataclass(frozen=True)
class DemoReport:
    """What the demo leaves behind.

    Attributes
    ----------
    directory : Path
        Holds ``crisp/`` (the FITS files), ``truth.zarr``, ``obs.zarr``, ``map.zarr``, ``comparison.json``,
        pictures (PNG) and ``report.html``.
    comparison : xarray.Dataset
        As `pipeline.comparison.compare` returns it.
    page : Path
        The report.
    seconds : float
        Time taken.
    """

    directory: Path
    comparison: xr.Dataset
    page: Path
    seconds: float


def run_demo(
    directory: str | Path,
    *,
    client: Client | None = None,
    grid: str | Path | None = None,
    model: str | Path | None = None,
    seed: int = 0,
    scans: int = 3,
) -> DemoReport:
    """Make a short series, ingest and invert it, compare the map with the truth, and show all on one page.

    Parameters
    ----------
    directory : path
        Where everything goes: nothing yet, an empty directory, or an earlier demo, which is replaced.
    client : distributed.Client, optional
        The cluster; all cores of this machine if left out.
    grid : path, optional
        The grid store whose held-out part is painted; the bundled one if left out.
    model : path, optional
        The model directory; the bundled one if left out.
    seed : int
        Decides the scene and the noise.
    scans : int
        Scans of each line.

    Returns
    -------
    DemoReport

    Raises
    ------
    MisuseError
        The directory holds something else than a demo.
    FlareFieldError
        What `make_series`, `pipeline.ingest.ingest` and `pipeline.invert.invert` raise.
    """
    folder = Path(directory).absolute()
    _check_directory(folder)
    if client is None:
        with connect(LocalConfig()) as own:
            return run_demo(folder, client=own, grid=grid, model=model, seed=seed, scans=scans)
    started = time.monotonic()
    grid_path = BUNDLED_GRID if grid is None else Path(grid)
    call = f"run_demo({folder.name}, seed={seed}, scans={scans})"
    series, observation, map_store = folder / "crisp", folder / "obs.zarr", folder / "map.zarr"
    shutil.rmtree(series, ignore_errors=True)
    with open_grid(grid_path) as store:
        made = make_series(series, store, seed=seed, scans=scans)
    grid_hash = content_hash(grid_path)
    held_out = load_model(model).record.get("grid", {}).get("sha256") == grid_hash
    if not held_out:
        logger.warning("the model was not trained on the grid that paints the demo: its physics may be known")
    truth = made.dataset.assign_attrs(provenance(call, {"grid": grid_hash}), held_out=held_out)
    with warnings.catch_warnings():
        # Not yet in Zarr's specification; xarray reads it, and every reader may ignore it.
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        truth.to_zarr(folder / "truth.zarr", mode="w", zarr_format=3)
    logger.info("%d files of a series made in %s", len(made.files), series)
    ingested = ingest(made.files, observation, cluster=client, call=call, overwrite=True)
    logger.info(ingested.summary())
    inverted = invert(observation, map_store, model=model, cluster=client, overwrite=True, call=call)
    logger.info(inverted.summary())
    with open_map(map_store) as found, open_observation(observation) as observed:
        comparison = compare(found, truth, observed)
        (folder / "comparison.json").write_text(json.dumps(as_json(comparison), indent=2) + "\n")
        page = write_report(
            found,
            folder / "report.html",
            observation=observed,
            truth=truth,
            comparison=comparison,
            pictures=folder,
            overwrite=True,
        )
    report = DemoReport(folder, comparison, page, time.monotonic() - started)
    _show(report)
    return report


def _check_directory(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(parents=True)
    elif not folder.is_dir() or (any(folder.iterdir()) and not (folder / "truth.zarr").is_dir()):
        raise MisuseError(
            "this holds something else than a demo",
            where=folder,
            expected="nothing, an empty directory, or an earlier demo (which is replaced)",
            remedy="choose another directory",
        )


def _show(report: DemoReport) -> None:
    """Print how the map compares with the truth."""
    comparison = report.comparison
    low, high = comparison.attrs["heights"]
    table = Table(title=f"Posterior medians against the truth, {low:g} to {high:g} Mm", title_justify="left")
    for name in ("region", "pixels", "quantity", "ratio", "corr."):
        table.add_column(name, justify="left" if name in ("region", "quantity") else "right", no_wrap=True)
    for interval in comparison["interval"].values:
        table.add_column(f"{100 * interval:.0f} %", justify="right", no_wrap=True)
    for region in comparison["region"].values:
        for number, quantity in enumerate(comparison["quantity"].values):
            values = comparison.sel(region=region, quantity=quantity)
            table.add_row(
                str(region) if number == 0 else "",
                f"{int(values['pixels']):,}" if number == 0 else "",
                str(quantity).replace("_", " "),
                f"{float(values['error_ratio']):.2f}",
                f"{float(values['correlation']):.2f}",
                *(f"{100 * float(share):.0f} %" for share in values["coverage"].values),
            )
    shift = max(float(abs(comparison[f"shift_error_{axis}"]).max()) for axis in ("y", "x"))
    console = Console()
    console.print(table)
    novel = 100 * float(comparison["novel"].sel(region="ribbon"))
    console.print(
        "ratio: median error over that of a constant answer, the region's median truth\n"
        "corr.: correlation of median and truth; %: share of true values in that interval\n"
        f"Ca II's displacement found to {shift:.2f} pixels, the valid field to "
        f"{float(comparison['valid_error'].max()):.1f} pixels (at its edge two are not to be extrapolated)\n"
        f"{novel:.1f} % of the ribbons' pixels flagged novel\n"
        f"{report.page} shows it all ({report.seconds:.0f} s)",
        highlight=False,
        soft_wrap=True,
    )
