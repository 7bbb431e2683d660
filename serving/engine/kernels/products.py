"""Some rows times packed weights: the weights are read once, as fast as the memory gives them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import prange, types
from numba.extending import overload

from serving.engine.kernels.compiling import Floats, Ints, compiled
from serving.engine.kernels.llvm_builder import FLOAT_BYTES
from serving.engine.kernels.tiles import MAX_TILE_ROWS, set_bf16_products_64, set_products_64
from serving.engine.kernels.vectors import address

Panels = npt.NDArray[np.float32] | npt.NDArray[np.int32]

LANES = 64
"""Neighbouring outputs that packed weights keep together."""

_overload: Any = overload  # its types know no options


def _multiply_panel(num_rows: int, x: int, size_in: int, panel: int, out: int, out_row: int, panels: Panels) -> None:
    """One panel at an address times 1 to MAX_TILE_ROWS rows. What follows is compiled in its place."""
    raise AssertionError("only compiled code calls this")


@_overload(_multiply_panel)  # type: ignore[untyped-decorator]
def _choose_product(
    num_rows: int, x: int, size_in: int, panel: int, out: int, out_row: int, panels: Panels
) -> Callable[..., None]:
    # Called with the types of such arguments; numba wants the same names in what it returns.
    def of_floats(num_rows: int, x: int, size_in: int, panel: int, out: int, out_row: int, panels: Panels) -> None:
        set_products_64(num_rows, x, size_in, 1, panel, LANES, out, out_row, size_in)

    def of_bf16(num_rows: int, x: int, size_in: int, panel: int, out: int, out_row: int, panels: Panels) -> None:
        set_bf16_products_64(num_rows, x, size_in, 1, panel, LANES, out, out_row, size_in // 2)

    return of_floats if panels.dtype == types.float32 else of_bf16


@compiled(parallel=True)
def multiply_rows(panels: Panels, x: Floats, out: Floats) -> None:
    """`x` `(n, in)` times weights, into `out` `(n, out)`.

    `panels` are the weights `(out / LANES, in, LANES)`, the last panel filled up. Or int32 `(out / LANES, in / 2,
    LANES)`, each of two weights in bf16 that follow each other, the first in the lower half.
    """
    num_rows, num_out = out.shape
    size_in = x.shape[1]
    num_groups = (num_rows + MAX_TILE_ROWS - 1) // MAX_TILE_ROWS
    for index in prange(panels.shape[0]):
        first_lane = index * LANES
        num_lanes = min(LANES, num_out - first_lane)
        # The last panel may have more columns than there are outputs.
        products = np.empty((num_rows if num_lanes < LANES else 0, LANES), np.float32)
        is_whole = num_lanes == LANES
        target = address(out) + first_lane * FLOAT_BYTES if is_whole else address(products)
        row_stride = num_out if is_whole else LANES
        row = 0
        for group in range(num_groups):
            count = (num_rows - row) // (num_groups - group)
            _multiply_panel(
                count,
                address(x) + row * size_in * FLOAT_BYTES,
                size_in,
                address(panels[index]),
                target + row * row_stride * FLOAT_BYTES,
                row_stride,
                panels,
            )
            row += count
        for row in range(len(products)):
            for lane in range(num_lanes):
                out[row, first_lane + lane] = products[row, lane]


@compiled(parallel=True)
def take_rows(panels: Panels, indices: Ints, out: Floats) -> None:
    """Some of the weights' rows, into `out` `(n, in)`; `panels` as in `multiply_rows`, of float32."""
    for row in prange(out.shape[0]):
        panel, lane = indices[row] // LANES, indices[row] % LANES
        for at in range(out.shape[1]):
            out[row, at] = panels[panel, at, lane]
