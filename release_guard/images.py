"""Images in data sets: decoding, identity, near duplicates. Shapes: N and M images."""

import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import nn

from release_guard.errors import ModelError

_BRIGHTER = 8  # grey levels: less is what re-encoding changes
_NEAR_BITS = 8  # of 256: JPEG at quality 85 changes fewer in 99.9 % of 28x28 pictures of clothes


def decode(cell: Any, where: str) -> PIL.Image.Image:
    """The image in a cell of a data set, turned upright.

    Args:
        cell: Encoded bytes, or a mapping with `bytes` or the `path` of a local file.
        where: Data set and row, to begin messages with.

    Raises:
        ModelError: No image, one that cannot be decoded, or more than 8 bits a channel.
    """
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, "")
    try:
        if data is None and path and "://" not in path:
            data = Path(path).read_bytes()
        if not isinstance(data, bytes):
            advice = "use parquet with encoded images, or a folder of images"
            raise ModelError(f"{where} holds no image but {type(cell).__name__}; {advice}")
        image = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
        image.load()
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ModelError(f"{where}: image cannot be decoded ({error}); remove the row") from None
    if image.mode[0] in "IF":
        raise ModelError(f"{where}: image has more than 8 bits a channel; convert it to 8 bits")
    return image


def content(image: PIL.Image.Image) -> bytes:
    """Size and colours: the same for every file format and colour mode."""
    return struct.pack("<II", *image.size) + image.convert("RGB").tobytes()


def near_share(mine: Any, theirs: Any) -> float:
    """Share of images that look like one of theirs, re-encoded, resized or brightened.

    Takes time in N x M.

    Args:
        mine: Bytes, (N, channels, height, width).
        theirs: The same for M images.
    """
    theirs_M4 = _sketches(theirs)
    near = 0
    for sketch_4 in _sketches(mine):
        distances_M = np.bitwise_count(theirs_M4 ^ sketch_4).sum(axis=1, dtype=np.uint16)
        near += int(distances_M.min()) <= _NEAR_BITS
    return near / len(mine)


def _sketches(pixels: Any) -> Any:
    """256 bits each: is a place of a grey 16x17 thumbnail brighter than its left neighbour?"""
    thumbnails = [
        nn.functional.adaptive_avg_pool2d(
            torch.tensor(image, dtype=torch.float32).mean(dim=0)[None], (16, 17)
        )
        for image in pixels
    ]
    grey = torch.cat(thumbnails)
    bits = grey[:, :, 1:] > grey[:, :, :-1] + _BRIGHTER
    return np.packbits(bits.flatten(start_dim=1).numpy(), axis=1).view(np.uint64)
