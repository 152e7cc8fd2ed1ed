"""Inputs of golden runs that are made from a seed: the same numbers in the forge and on every node.

PCG64's raw numbers are part of numpy's promise of compatibility (NEP 19, bit generators); its distributions are not, so
that they are spelt out here: 24 bits of each raw number, scaled.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire.golden import InputValues
from wire.manifest import Datatype

DTYPES: dict[Datatype, np.dtype[Any]] = {
    Datatype.BOOL: np.dtype("?"), Datatype.UINT8: np.dtype("<u1"), Datatype.UINT16: np.dtype("<u2"),
    Datatype.UINT32: np.dtype("<u4"), Datatype.UINT64: np.dtype("<u8"), Datatype.INT8: np.dtype("<i1"),
    Datatype.INT16: np.dtype("<i2"), Datatype.INT32: np.dtype("<i4"), Datatype.INT64: np.dtype("<i8"),
    Datatype.FP16: np.dtype("<f2"), Datatype.FP32: np.dtype("<f4"), Datatype.FP64: np.dtype("<f8"),
}  # fmt: skip
"""numpy's types, little-endian as the protocol's binary data is."""
RANDOM_BITS = 24

Array = NDArray[Any]


def make_input(told: InputValues, datatype: Datatype) -> Array:
    """The array that `told` means; raises ValueError when its numbers do not fill its shape."""
    if told.values is not None:
        return np.asarray(told.values).astype(DTYPES[datatype]).reshape(told.shape)
    raw = np.random.PCG64(told.seed).random_raw(math.prod(told.shape))
    share = (raw >> (64 - RANDOM_BITS)).astype(np.float64) / (1 << RANDOM_BITS)
    numbers = told.low + share * (told.high - told.low)
    if DTYPES[datatype].kind != "f":
        numbers = np.floor(numbers)
    return numbers.astype(DTYPES[datatype]).reshape(told.shape)
