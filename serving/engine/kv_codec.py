"""How the KV of a block is turned into the dtype it is stored in, and back.

    engine's dtype   no codec: `kv_pool` copies bytes, and every bit comes back
    another float    a cast, to nearest; what would overflow becomes the largest number
    int8             per token and head: scale = largest magnitude / 127, value = round(kv / scale)

A stored block is laid out as `cache.extent.KVShape` says. What is no number is never turned into one that looks
right: NaN is still NaN after a cast, and with int8 an infinity or a NaN makes the scale infinite or NaN, and so
its whole head of that token. A head of zeros has scale 0 and comes back as zeros. Only an infinity becomes the largest
number in those casts that could overflow, as in CUDA's saturating conversions.

Conversions run on the KV's device, so that a device hands over the small form. On a CPU they release the
interpreter lock, and they use as many threads as the calling thread has been given: one, in a loader.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from cache.extent import KVShape

Bytes = npt.NDArray[np.uint8]

STORED_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in KVShape.DTYPES}
INT8_MAX = 127


class KVCodec(Protocol):
    """Converts blocks `(num_layers, 2, num_tokens, num_kv_heads, head_dim)`, which need not be contiguous."""

    def encode(self, kv: torch.Tensor, out: Bytes) -> None:
        """Write a block into `out`, contiguous bytes of exactly its stored size."""

    def decode(self, stored: Bytes, kv: torch.Tensor) -> None:
        """Fill `kv` with the first tokens of a stored block, which may be read-only and hold more tokens."""


def make_codec(engine_dtype: torch.dtype, shape: KVShape) -> KVCodec | None:
    """The codec between the engine's dtype and the stored one; None if they are the same."""
    stored_dtype = STORED_DTYPES[shape.dtype]
    if stored_dtype == engine_dtype:
        return None
    return Int8Codec(shape) if stored_dtype == torch.int8 else CastCodec(engine_dtype, shape)


class CastCodec:
    """Stores KV in another floating point dtype."""

    def __init__(self, engine_dtype: torch.dtype, shape: KVShape) -> None:
        self._shape = shape
        self._dtype = STORED_DTYPES[shape.dtype]
        self._limit = _largest_in_both(engine_dtype, self._dtype)

    def encode(self, kv: torch.Tensor, out: Bytes) -> None:
        if self._limit is not None:
            kv = kv.clamp(-self._limit, self._limit)
        torch.from_numpy(out).view(self._dtype).view(kv.shape).copy_(kv)

    def decode(self, stored: Bytes, kv: torch.Tensor) -> None:
        rows = stored.reshape(kv.shape[0], 2, -1)[:, :, : kv.shape[2] * self._shape.row_bytes]
        codes = _tensor_of(rows, kv.device)
        if self._dtype == torch.float8_e4m3fn and kv.device.type == "cpu" and not _has_float8_nan(codes):
            values = _float8_as_float16(codes)
        else:
            values = codes.view(self._dtype)
        kv.copy_(values.view(kv.shape))


class Int8Codec:
    """Stores KV as int8 with a float32 scale for each token and head."""

    def __init__(self, shape: KVShape) -> None:
        self._num_values = shape.num_kv_heads * shape.head_dim
        self._scale_bytes = shape.row_bytes - self._num_values

    def encode(self, kv: torch.Tensor, out: Bytes) -> None:
        num_layers, _, num_tokens, _, _ = kv.shape
        scales = kv.abs().amax(-1).float() / INT8_MAX
        # Below the smallest normal number a reciprocal overflows; so small a head is stored as zeros.
        factors = scales.reciprocal().masked_fill_(scales < torch.finfo(torch.float32).tiny, 0.0)
        rounded = (kv * factors.unsqueeze(-1)).round_()
        planes = out.reshape(num_layers, 2, -1)
        values = planes[:, :, : num_tokens * self._num_values].view(np.int8)
        torch.from_numpy(values).copy_(rounded.view(values.shape))
        planes[:, :, num_tokens * self._num_values :] = _bytes_of(scales).reshape(num_layers, 2, -1)

    def decode(self, stored: Bytes, kv: torch.Tensor) -> None:
        num_layers, _, num_tokens, num_heads, _ = kv.shape
        planes = stored.reshape(num_layers, 2, -1)
        num_stored = planes.shape[2] // (self._num_values + self._scale_bytes)
        first_scale = num_stored * self._num_values
        values = _tensor_of(planes[:, :, : num_tokens * self._num_values], kv.device)
        scales = _tensor_of(planes[:, :, first_scale : first_scale + num_tokens * self._scale_bytes], kv.device)
        scales = scales.view(torch.float32).view(num_layers, 2, num_tokens, num_heads, 1)
        torch.mul(values.view(torch.int8).view(kv.shape), scales, out=kv)


def _largest_in_both(engine_dtype: torch.dtype, stored_dtype: torch.dtype) -> float | None:
    """Largest number that both dtypes can hold; None where (almost) no number of the engine's can be too large."""
    if torch.float32 in (engine_dtype, stored_dtype) and stored_dtype in (torch.float32, torch.bfloat16):
        return None
    largest = min(torch.finfo(engine_dtype).max, torch.finfo(stored_dtype).max)
    for dtype in (engine_dtype, stored_dtype):
        number = torch.tensor(largest).to(dtype)
        if float(number) > largest:  # 65504, the largest of float16, is rounded up to 65536 in bfloat16
            largest = float(torch.nextafter(number, torch.zeros_like(number)))
    return largest


def _tensor_of(rows: Bytes, device: torch.device) -> torch.Tensor:
    """A contiguous, aligned copy of our own: torch refuses read-only arrays, and stored payloads are read-only."""
    return torch.from_numpy(rows.copy()).to(device)


def _bytes_of(tensor: torch.Tensor) -> Bytes:
    array: Bytes = tensor.cpu().numpy().view(np.uint8)
    return array


def _has_float8_nan(codes: torch.Tensor) -> bool:
    return bool(((codes & 0x7F) == 0x7F).any())


def _float8_as_float16(codes: torch.Tensor) -> torch.Tensor:
    """`float8_e4m3fn` codes, uint8 and none of them NaN, as the same numbers in float16. Twice as fast as torch's own.

    Shifted left by 7 bits a code is a float16 with the same sign, exponent and fraction, but 15 is subtracted from
    that exponent where it should be 7: so the number is that times 2**8.
    """
    halves = codes.view(torch.int8).to(torch.int16)
    halves <<= 7
    halves &= ~0x4000  # where the shift has put a copy of the sign
    return halves.view(torch.float16).mul_(256)
