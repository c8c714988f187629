"""Read and write safetensors files: the length of a JSON header, the header, and the tensors' bytes one after another.

The format: https://huggingface.co/docs/safetensors/index#format.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["is_safetensors", "read_safetensors", "write_safetensors"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like one: a length that fits into the file, then a brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and 8 + int.from_bytes(start[:8], "little") <= path.stat().st_size


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a file, on the CPU; ValueError says what is wrong with it."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or start > len(data):
        raise ValueError(f"its header should end at byte {start}, but it has {len(data)}")
    try:
        header: dict[str, Any] = json.loads(data[8:start])
        header.pop("__metadata__", None)
        return {name: _tensor(name, entry, memoryview(data)[start:]) for name, entry in header.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header is not JSON: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its header does not describe tensors: {error!r}") from None


def write_safetensors(tensors: Mapping[str, Tensor], file: BinaryIO) -> None:
    """Write contiguous tensors on the CPU in the order given."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise ValueError(f"`{name}` must have one of the dtypes {', '.join(map(str, names))}, got {tensor.dtype}.")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin aligned
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _tensor(name: str, entry: Mapping[str, Any], data: memoryview) -> Tensor:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"the dtype of {name!r} is {entry['dtype']!r}, which is unknown here")
    dtype, shape = DTYPES[entry["dtype"]], list(entry["shape"])
    if not 0 <= begin <= end <= len(data):
        raise ValueError(f"{name!r} should be in bytes {begin}..{end}, but there are {len(data)}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name!r} should have shape {shape} and {entry['dtype']}, but has {end - begin} bytes")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data[begin:end], dtype=torch.uint8).clone().view(dtype).reshape(shape)
