import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from release_guard import images
from release_guard.errors import ModelError


def encode(image: PIL.Image.Image, form: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def picture() -> PIL.Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, size=(6, 6), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((32, 32), PIL.Image.Resampling.BICUBIC)


def test_format_and_colour_mode_do_not_change_the_content(picture: PIL.Image.Image) -> None:
    forms = [
        encode(picture),
        encode(picture, "BMP"),
        encode(picture.convert("RGB")),
        encode(picture.convert("RGBA")),
    ]
    contents = {images.content(images.decode(form, "row 0")) for form in forms}
    assert len(contents) == 1


def test_one_pixel_and_the_size_change_the_content(picture: PIL.Image.Image) -> None:
    dotted = picture.copy()
    dotted.putpixel((3, 3), 255 - dotted.getpixel((3, 3)))
    turned = PIL.Image.frombytes("L", (64, 16), picture.tobytes())
    assert len({images.content(image) for image in (picture, dotted, turned)}) == 3


def test_cells_may_be_bytes_a_mapping_or_a_local_path(
    picture: PIL.Image.Image, tmp_path: Path
) -> None:
    data = encode(picture)
    path = tmp_path / "some.png"
    path.write_bytes(data)
    cells = [data, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
    assert {images.content(images.decode(cell, "")) for cell in cells} == {images.content(picture)}


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (b"not an image", "row 7: image cannot be decoded"),
        ({"bytes": None, "path": "https://example.org/a.png"}, "row 7 holds no image"),
        ({"bytes": None, "path": "nowhere.png"}, "row 7: image cannot be decoded"),
        ([[0, 1], [1, 0]], "row 7 holds no image but list"),
    ],
)
def test_cells_without_an_image(cell: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        images.decode(cell, "row 7")


def test_truncated_image_is_refused(picture: PIL.Image.Image) -> None:
    with pytest.raises(ModelError, match="cannot be decoded"):
        images.decode(encode(picture)[:-40], "row 7")


def test_deep_colours_are_refused() -> None:
    deep = PIL.Image.fromarray(np.full((4, 4), 60000, dtype=np.uint16))
    with pytest.raises(ModelError, match="more than 8 bits"):
        images.decode(encode(deep), "row 7")


def test_reencoded_and_brightened_images_are_near(picture: PIL.Image.Image) -> None:
    jpeg = images.decode(encode(picture, "JPEG", quality=85), "")
    brighter = picture.point(lambda value: value * 0.9 + 20)
    theirs = np.stack([np.asarray(picture)])[:, None]
    for copied in (jpeg, brighter):
        assert images.near_share(np.asarray(copied)[None, None], theirs) == 1


def test_another_image_is_not_near(picture: PIL.Image.Image) -> None:
    mine = np.stack([np.asarray(picture), np.asarray(picture.rotate(90))])[:, None]
    assert images.near_share(mine, mine[:1]) == 0.5
