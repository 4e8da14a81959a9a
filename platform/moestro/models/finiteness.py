"""Whether weights are finite, told from their bytes as fast as memory is read.

As unsigned integers, the bits of floating-point numbers put negative ones above all others, as signed ones positive
ones; either way those of larger magnitude stand higher, and infinity and NaN at the end. So two maxima tell.
"""

import numpy as np
import torch

_BITS: dict[torch.dtype, tuple[type[np.unsignedinteger], type[np.signedinteger], int]] = {
    torch.float64: (np.uint64, np.int64, 0x7FF0 << 48),
    torch.float32: (np.uint32, np.int32, 0x7F80 << 16),
    torch.bfloat16: (np.uint16, np.int16, 0x7F80),
    torch.float16: (np.uint16, np.int16, 0x7C00),
    torch.float8_e5m2: (np.uint8, np.int8, 0x7C),
    torch.float8_e4m3fn: (np.uint8, np.int8, 0x7F),
}
"""By type: integers of its size, and the bits of the least positive entry that is not finite."""


def is_finite(data: memoryview, dtype: torch.dtype) -> bool:
    """Whether `data`, the bytes of whole entries of `dtype`, holds neither NaN nor infinity. Integers never do."""
    if dtype == torch.float8_e8m0fnu:  # powers of two without sign or infinity; the last one is NaN
        return int(np.frombuffer(data, np.uint8).max(initial=0)) < 0xFF
    if dtype not in _BITS or not data:
        return True
    unsigned, signed, limit = _BITS[dtype]
    words = np.frombuffer(data, unsigned)
    sign = 1 << (8 * dtype.itemsize - 1)
    return int(words.max()) < sign + limit and int(words.view(signed).max()) < limit
