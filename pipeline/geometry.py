"""Where pixels lie on the Sun: WCS of observations and maps, mu of every pixel, and derotation.

Everything follows from the helioprojective ``longitude`` and ``latitude`` that every store keeps of its
pixels, so that it holds for observations and maps alike, and for any cut of them along ``y`` and ``x``.
Importing this module gives every `xarray.Dataset` the accessor ``flarefield``:
``open_map("map.zarr").flarefield.wcs``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import astropy.units as u
import numpy as np
import xarray as xr
from astropy.coordinates import ICRS, SkyCoord, get_sun
from astropy.time import Time
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.crisp.scan import SOLAR_RADIUS, Frame, cosine_of_pointing
from pipeline.errors import MisuseError, StoreError

Array = NDArray[np.float64]

ROTATION_AXIS = SkyCoord(286.13 * u.deg, 63.87 * u.deg, frame=ICRS)
"""North pole of the Sun's rotation (Archinal et al. 2018, doi:10.1007/s10569-017-9805-5, table 1)."""

SAMPLES = 64  # pixels along each side from which a frame is found: it has six numbers
COMPLETE = 1.0 - 1e-6  # sums of interpolation weights are one only to rounding
REPRODUCED = 0.05  # arcsec by which a WCS may miss the dataset's own coordinates
WHOLE = 1e-3  # pixels by which a field that fits whole pixels may miss them: coordinates are rounded


def mu_of_pixels(dataset: xr.Dataset) -> xr.DataArray:
    """Cosine of the heliocentric angle of every pixel, where the field is too large for one of its middle.

    Parameters
    ----------
    dataset : xarray.Dataset
        An observation, a map, or a part of one; of its times the first is taken.

    Returns
    -------
    xarray.DataArray
        Over y and x; NaN off the disc.
    """
    longitude, latitude = _coordinates(dataset)
    return xr.DataArray(
        cosine_of_pointing((longitude, latitude), _first_time(dataset)),
        coords={name: dataset[name] for name in ("y", "x") if name in dataset.coords},
        dims=("y", "x"),
        name="mu",
        attrs={"units": "1", "long_name": "cosine of the heliocentric angle"},
    )


def heliographic_latitude(time: np.datetime64) -> float:
    """Heliographic latitude of the Earth, B0, degrees.

    Parameters
    ----------
    time : numpy.datetime64
        UTC.
    """
    sun = get_sun(Time(time, scale="utc"))
    # The Earth is seen from the Sun in the opposite direction.
    return -float(90.0 - SkyCoord(sun.ra, sun.dec, frame=ICRS).separation(ROTATION_AXIS).deg)


@xr.register_dataset_accessor("flarefield")  # type: ignore[no-untyped-call]
class FlareField:
    """What FlareField knows about a dataset: ``dataset.flarefield.wcs``.

    Parameters
    ----------
    dataset : xarray.Dataset
        An observation, a map, or a part of one.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self._dataset = dataset

    @property
    def wcs(self) -> WCS:
        """The pixels' place on the sky, as an astropy WCS of two axes (x, then y, as in FITS).

        It is that of the dataset's first time: take ``dataset.isel(time=3).flarefield.wcs`` for another. A
        cut along ``y`` or ``x``, also with a step, has the WCS of what is left. With sunpy, it is a frame as
        seen from the Earth at that time.

        Raises
        ------
        StoreError
            The dataset does not say where its pixels are.
        MisuseError
            It has one row or one column only, which does not tell the pixels' orientation; or no time,
            or pixels that are no regular cut of an image.
        """
        return celestial_wcs(self._dataset)


def celestial_wcs(dataset: xr.Dataset) -> WCS:
    """The WCS that gives a dataset's pixels their helioprojective longitude and latitude.

    The frame is gnomonic (TAN) about the same reference point as the H-alpha header's (Thompson 2006,
    doi:10.1051/0004-6361:20054262): the point at which the coordinates ``x`` and ``y`` are zero.

    Parameters
    ----------
    dataset : xarray.Dataset
        An observation, a map, or a part of one, with two rows and two columns at least.

    Returns
    -------
    astropy.wcs.WCS
        Of the first of the dataset's times. Its auxiliary values place the observer: the Earth.

    Raises
    ------
    StoreError
        The dataset does not say where its pixels are.
    MisuseError
        It has one row or one column only, no time, or pixels that are no regular cut of an image.
    """
    longitude, latitude = _coordinates(dataset)
    rows, columns = longitude.shape
    if min(rows, columns) < 2:
        raise MisuseError(
            "one row or column of pixels does not tell how they are oriented",
            where="wcs",
            found=f"{rows} x {columns} pixels (y, x)",
            expected="two rows and two columns at least",
            remedy="take the WCS of a larger part",
        )
    axes = [dataset[name].to_numpy() for name in ("y", "x") if name in dataset.coords]
    ends = [
        (longitude[0, 0], latitude[0, 0]),
        (longitude[0, -1], latitude[0, -1]),
        (longitude[-1, 0], latitude[-1, 0]),
    ]
    if not all(np.isfinite(values).all() for values in (longitude, latitude, *axes)):
        raise _irregular("pixels without coordinates")
    if any(values[0] == values[-1] for values in axes) or len(set(ends)) < 3:
        raise _irregular("the first and the last pixel at one place")
    row, column = (
        np.linspace(0, size - 1, min(size, SAMPLES)).round().astype(int) for size in (rows, columns)
    )
    sampled = (longitude[np.ix_(row, column)], latitude[np.ix_(row, column)])
    y, x = (values.ravel().astype(np.float64) for values in np.meshgrid(row, column, indexing="ij"))
    reference = (_pixel_of_zero(dataset, "x"), _pixel_of_zero(dataset, "y"))
    through = Frame.through(x, y, sampled[0].ravel(), sampled[1].ravel(), reference)
    matrix = through.matrix
    step = (_step(dataset, "x", matrix[:, 0]), _step(dataset, "y", matrix[:, 1]))
    rotation = matrix / np.array(step)[:, None]
    wcs = Frame(reference, through.reference_value, step, (_pair(rotation[0]), _pair(rotation[1]))).wcs
    x, y = np.meshgrid(np.arange(columns, dtype=np.float64), np.arange(rows, dtype=np.float64))
    found = through.coordinates(x, y)
    missed = float(np.hypot(found[0] - longitude, found[1] - latitude).max())
    if not missed <= REPRODUCED:
        raise _irregular(f"pixels up to {missed:.2g} arcsec from where a WCS puts them")
    time = _first_time(dataset)
    wcs.wcs.dateavg = Time(time, scale="utc").isot
    wcs.wcs.dateobs = wcs.wcs.dateavg
    wcs.wcs.aux.rsun_ref = SOLAR_RADIUS
    wcs.wcs.aux.dsun_obs = float(get_sun(Time(time, scale="utc")).distance.to_value(u.m))
    wcs.wcs.aux.hgln_obs = 0.0
    wcs.wcs.aux.hglt_obs = heliographic_latitude(time)
    wcs.wcs.set()
    return wcs


def _irregular(found: str) -> MisuseError:
    return MisuseError(
        "the pixels are no regular cut of an image, so that no WCS says where they are",
        where="wcs",
        found=found,
        expected=f"longitude and latitude of all pixels, as a WCS gives them to {REPRODUCED} arcsec",
        remedy="cut with slices along y and x, and pad or roll nothing",
    )


def derotated(dataset: xr.Dataset) -> xr.Dataset:
    """Turn a rotated field so that x points to solar west and y to solar north.

    The new frame has the old one's pixel size and holds the whole field; its axes are x and y, still in
    arcsec from the reference point. Its pixels begin at the field's outermost corners, so that a field that
    is not turned, or by right angles, keeps its pixels, every one with its own number. Else, numbers are
    interpolated linearly between the four pixels around each new one, and NaN unless all four have one:
    nothing is made up at borders or around bad pixels, at the price of one pixel there. Linear interpolation
    averages neighbours: photon noise falls by up to one half, and so does the finest detail. ``valid`` is
    true where all four pixels are. Flags (what has ``flag_masks``) are those of all pixels that have a part
    in the new one, ``outside_field`` among them, where there is that flag, if one of the four is not in the
    old field. Other whole numbers are the nearest pixel's.

    Parameters
    ----------
    dataset : xarray.Dataset
        An observation, a map, or a part of one. Dask arrays stay lazy.

    Returns
    -------
    xarray.Dataset
        With new ``x``, ``y``, ``longitude`` and ``latitude``, and ``derotated_by`` (degrees, counterclockwise
        on the sky, from solar x to the frame's own x axis; a mirrored frame is mirrored back, too) among its
        attributes. The FITS headers that it may carry describe the old frame.

    Raises
    ------
    StoreError
        The dataset does not say where its pixels are.
    MisuseError
        It has one row or one column only.
    """
    old = celestial_wcs(dataset)
    rows, columns = dataset.sizes["y"], dataset.sizes["x"]
    frame = Frame.from_wcs(old, (rows, columns), "the dataset's coordinates")
    reference, size = np.array(frame.reference_pixel), np.abs(frame.scale)
    matrix = frame.matrix
    if abs(matrix[0, 1]) > abs(matrix[0, 0]):
        size = size[::-1]
    corners = np.array([[0, 0], [columns - 1, 0], [0, rows - 1], [columns - 1, rows - 1]], dtype=float)
    plane = (corners - reference) @ matrix.T
    first = plane.min(axis=0) / size
    steps = np.ceil(plane.max(axis=0) / size - first - WHOLE).astype(int)
    shape = (int(steps[1]) + 1, int(steps[0]) + 1)
    # The old pixel of a new one; NumPy's order is (y, x).
    back = np.linalg.inv(matrix) @ np.diag(size)
    transform = back[::-1, ::-1], (back @ first + reference)[::-1]
    whole = transform[0].round(), transform[1].round()
    ends = np.array([[0, 0], [shape[0], 0], [0, shape[1]]]).T
    missed = (transform[0] - whole[0]) @ ends + (transform[1] - whole[1])[:, None]
    if np.abs(missed).max() < WHOLE:
        transform = whole
    new = Frame(
        (-float(first[0]), -float(first[1])),
        frame.reference_value,
        (float(size[0]), float(size[1])),
        ((1.0, 0.0), (0.0, 1.0)),
    )
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    longitude, latitude = new.coordinates(x, y)

    variables: dict[Any, Any] = {}
    for name, variable in dataset.variables.items():
        if name in ("x", "y", "longitude", "latitude"):
            continue
        if not {"y", "x"} <= set(variable.dims):
            variables[name] = variable
            continue
        moved = _moved(xr.DataArray(variable), transform, shape)
        variables[name] = moved.transpose(*variable.dims).variable
    coordinates = {name: variables.pop(name) for name in list(variables) if name in dataset.coords}
    attributes = {name: dict(dataset[name].attrs) for name in ("x", "y", "longitude", "latitude")}
    for name in ("longitude", "latitude"):
        if "pointing" in attributes[name] and f"pointing_{name}" in dataset.variables:
            attributes[name]["pointing"] = float(dataset[f"pointing_{name}"].to_numpy().flat[0])
    angle = float(np.rad2deg(np.arctan2(matrix[1, 0], matrix[0, 0])))
    return xr.Dataset(
        variables,
        coords={
            **coordinates,
            "x": ("x", (first[0] + np.arange(shape[1])) * size[0], attributes["x"]),
            "y": ("y", (first[1] + np.arange(shape[0])) * size[1], attributes["y"]),
            "longitude": (("y", "x"), longitude, attributes["longitude"]),
            "latitude": (("y", "x"), latitude, attributes["latitude"]),
        },
        attrs={**dataset.attrs, "derotated_by": angle},
    )


def _moved(array: xr.DataArray, transform: tuple[Array, Array], shape: tuple[int, int]) -> xr.DataArray:
    settings = {"flags": "flag_masks" in array.attrs, "outside": _outside_flag(array)}
    result: xr.DataArray = xr.apply_ufunc(
        _resampled,
        array,
        kwargs={"transform": transform, "shape": shape, **settings},
        input_core_dims=[["y", "x"]],
        output_core_dims=[["y", "x"]],
        exclude_dims={"y", "x"},
        vectorize=True,
        dask="parallelized",
        dask_gufunc_kwargs={
            "output_sizes": {"y": shape[0], "x": shape[1]},
            "allow_rechunk": True,
        },
        output_dtypes=[array.dtype],
        keep_attrs=True,
    )
    return result


def _resampled(
    image: NDArray[Any],
    transform: tuple[Array, Array],
    shape: tuple[int, int],
    flags: bool,
    outside: int,
) -> NDArray[Any]:
    """One image (y, x) in the new frame."""

    def moved(old: NDArray[Any], order: int = 1, beyond: float = 0.0) -> NDArray[Any]:
        matrix, offset = transform
        # The other modes take what is off the border by rounding alone for outside.
        return np.asarray(
            ndimage.affine_transform(
                old, matrix, offset, shape, order=order, mode="grid-constant", cval=beyond
            )
        )

    if flags:
        result = np.zeros(shape, image.dtype)
        some = int(np.bitwise_or.reduce(image, axis=None)) | outside
        for bit in (1 << place for place in range(some.bit_length()) if some >> place & 1):
            weight = moved((image & bit != 0).astype(np.float64), beyond=float(outside & bit != 0))
            result[weight > 1.0 - COMPLETE] |= image.dtype.type(bit)
        return result
    if image.dtype.kind not in "fb":
        return moved(image, order=0)
    number = np.isfinite(image) if image.dtype.kind == "f" else image
    complete = moved(number.astype(np.float64)) >= COMPLETE
    if image.dtype.kind == "b":
        return np.asarray(complete)
    values = moved(np.where(number, image, 0).astype(np.float64))
    return np.where(complete, values, np.nan).astype(image.dtype)


def _outside_flag(array: xr.DataArray) -> int:
    meanings = str(array.attrs.get("flag_meanings", "")).split()
    masks = np.atleast_1d(array.attrs.get("flag_masks", []))
    return next(
        (int(mask) for name, mask in zip(meanings, masks, strict=False) if name == "outside_field"), 0
    )


def _coordinates(dataset: xr.Dataset) -> tuple[Array, Array]:
    """Longitude and latitude of the pixels at the dataset's first time, arcsec, (y, x)."""
    missing = [name for name in ("longitude", "latitude", "time") if name not in dataset.variables]
    if missing or set(dataset["longitude"].dims) != {"y", "x"} or set(dataset["latitude"].dims) != {"y", "x"}:
        raise StoreError(
            "the dataset does not say where its pixels are",
            found=f"no {', '.join(missing)}" if missing else f"longitude over {dataset['longitude'].dims}",
            expected="longitude and latitude over y and x, and time, as in an observation or a map",
        )
    if dataset["time"].size == 0 or np.isnat(_first_time(dataset)):
        raise MisuseError(
            "without a time the pixels have no place on the Sun",
            where="wcs",
            found="no first time",
            expected="one time at least",
            remedy="select a time that there is",
        )
    found = []
    for name in ("longitude", "latitude"):
        values = dataset[name].transpose("y", "x").to_numpy().astype(np.float64)
        pointing = f"pointing_{name}"
        # The pixels' coordinates are at one time of the whole series, of which this may be a part.
        if pointing in dataset.variables and "pointing" in dataset[name].attrs:
            values = (
                values + float(dataset[pointing].to_numpy().flat[0]) - float(dataset[name].attrs["pointing"])
            )
        found.append(values)
    return found[0], found[1]


def _pair(numbers: Iterable[float]) -> tuple[float, float]:
    first, second = numbers
    return float(first), float(second)


def _first_time(dataset: xr.Dataset) -> np.datetime64:
    return np.datetime64(dataset["time"].to_numpy().flat[0])


def _pixel_of_zero(dataset: xr.Dataset, axis: str) -> float:
    """Zero-based pixel at which a coordinate is zero; the first where there is no coordinate."""
    if axis not in dataset.coords:
        return 0.0
    values = dataset[axis].to_numpy().astype(np.float64)
    return float(-values[0] * (values.size - 1) / (values[-1] - values[0]))


def _step(dataset: xr.Dataset, axis: str, column: Array) -> float:
    """Size of a pixel along an axis, arcsec: the coordinate's, or what the sky says where there is none."""
    if axis not in dataset.coords:
        return float(np.hypot(*column))
    values = dataset[axis].to_numpy().astype(np.float64)
    return float((values[-1] - values[0]) / (values.size - 1))
