"""Images in every form and mode, and every way in which one cannot be used."""

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pivot_plugin.data.images import OVERLARGE, TOO_SMALL, ImageAccess, image_set_key
from pivot_plugin.errors import DataError
from tests.helpers import picture
from tests.helpers.images import encoded, png_header


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_grey_palette_and_cmyk_keep_their_colours() -> None:
    colours = Image.new("RGB", (8, 8), (200, 40, 60))
    grey = Image.new("L", (8, 8), 90)
    opened = ImageAccess().open
    assert (pixels(opened(encoded(grey))) == 90).all()
    assert (
        np.abs(pixels(opened(encoded(colours.convert("P", palette=Image.Palette.ADAPTIVE)))) - [200, 40, 60]).max() <= 2
    )
    assert np.abs(pixels(opened(encoded(colours.convert("CMYK"), "TIFF"))) - [200, 40, 60]).max() <= 2
    assert (pixels(opened(encoded(colours.convert("RGBA")))) == [200, 40, 60]).all()


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    eight = pixels(ImageAccess().open(encoded(Image.fromarray(ramp))))[..., 0]
    assert np.abs(eight - ramp / 257).max() <= 1


def test_sixteen_bit_images_that_are_dark_are_not_taken_for_eight_bits() -> None:
    dark = Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))
    assert pixels(ImageAccess().open(encoded(dark))).max() <= 200


def test_an_animated_gif_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (10, 10), colour) for colour in ("red", "blue", "green")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(ImageAccess().open(gif)) == [255, 0, 0]).all()


def test_a_turned_photograph_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert ImageAccess().open(encoded(picture(20, 10, 1), "JPEG", exif=exif)).size == (10, 20)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("side", [10_000, 30_000])
def test_a_huge_image_is_refused_before_it_is_decoded(side: int) -> None:
    with pytest.raises(DataError, match=r"row 3.*(x 10000 pixels|decompression bomb|over-large)") as caught:
        ImageAccess().open(png_header(side, side), "row 3")
    assert caught.value.kind == OVERLARGE


def test_a_smaller_limit_can_be_set() -> None:
    with pytest.raises(DataError, match="30 x 20 pixels, more than 500"):
        ImageAccess(max_pixels=500).open(encoded(picture(30, 20, 1)))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty image"),
        (b"this is text", "unreadable image"),
        (encoded(picture(60, 60, 1))[:-2000], "unreadable image"),
        (encoded(picture(60, 60, 1), "JPEG")[:700], "unreadable image"),
        (encoded(picture(60, 60, 1), "WEBP")[:-500], "unreadable image"),
        (encoded(picture(60, 60, 1), "GIF")[:900], "unreadable image"),
    ],
)
def test_what_is_no_whole_image_is_said_by_opening_and_by_checking(content: bytes, kind: str) -> None:
    access = ImageAccess()
    for look in (lambda: access.open(content, "row 1"), lambda: access.key(content, "row 1")):
        with pytest.raises(DataError, match="row 1") as caught:
            look()
        assert caught.value.kind == kind


def test_a_text_file_under_an_image_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"row 0: image 'cat.jpg' .*unreadable"):
        ImageAccess(tmp_path).open("cat.jpg", "row 0")


def test_a_confined_folder_is_not_left(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    picture(9, 9, 1).save(tmp_path / "secret.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    access = ImageAccess(inside, confined=True)
    for name in ("../secret.png", "link.png", str(tmp_path / "secret.png")):
        with pytest.raises(DataError, match="lies outside") as caught:
            access.open(name)
        assert caught.value.kind == "path outside its folder"
    assert ImageAccess(inside).open("../secret.png").size == (9, 9)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    picture(12, 9, 1).save(tmp_path / "a.png")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_address_is_fetched_only_when_allowed(web: str) -> None:
    with pytest.raises(DataError, match=r"is a URL.*allow_urls=True \(--allow-urls\)"):
        ImageAccess().open(f"{web}/a.png")
    allowed = ImageAccess(allow_urls=True)
    assert allowed.open(f"{web}/a.png").size == (12, 9)
    with pytest.raises(DataError, match=r"row 2: .*cannot be fetched.*404"):
        allowed.open(f"{web}/missing.png", "row 2")
    with pytest.raises(DataError, match="no http address"):
        allowed.open("file:///etc/passwd")


def test_keys_tell_images_apart_and_depend_on_their_order() -> None:
    first, second = encoded(picture(9, 9, 1)), encoded(picture(9, 9, 2))
    key = ImageAccess().key
    assert key(first) != key(second)
    assert image_set_key([key(first), key(second)]) != image_set_key([key(second), key(first)])
    assert image_set_key([]) == ""
    assert key(picture(9, 9, 1)) == key(picture(9, 9, 1)) != key(picture(9, 9, 2))


def test_a_key_is_that_of_what_the_model_is_shown() -> None:
    key, shown = ImageAccess().key, picture(20, 10, 1)
    # the same in other files
    assert key(shown) == key(encoded(shown)) == key(encoded(shown, "BMP")) == key(encoded(shown, "WEBP", lossless=True))
    # equal indices into two palettes
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8)
    palettes = [Image.fromarray(indices, "P") for _ in range(2)]
    for seed, image in enumerate(palettes):
        image.putpalette(np.random.default_rng(seed).integers(0, 255, 768, dtype=np.uint8).tobytes())
    assert palettes[0].tobytes() == palettes[1].tobytes()
    assert key(palettes[0]) != key(palettes[1])
    # equal pixels of which one lies on its side
    upright, lying = picture(12, 12, 1), picture(12, 12, 1)
    lying.getexif()[0x0112] = 6
    assert upright.tobytes() == lying.tobytes()
    assert key(upright) != key(lying)


def test_numbers_with_a_fraction_and_of_32_bits_are_scaled_or_refused() -> None:
    opened = ImageAccess().open
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    for values in (ramp, ramp * 255):
        image = Image.fromarray(values)
        assert image.mode == "F"
        assert np.abs(pixels(opened(image))[..., 0] - ramp * 255).max() <= 1
        assert np.abs(pixels(opened(encoded(image, "TIFF")))[..., 0] - ramp * 255).max() <= 1
    for values in (ramp * 1000, ramp - 0.5, ramp / 0 * 0, (ramp.astype(np.int32) + 1) * 2**24):
        with np.errstate(all="ignore"), pytest.raises(DataError, match=r"row 4: an image.* pixels from .*nobody knows"):
            opened(Image.fromarray(values), "row 4")


@pytest.mark.parametrize("size", [(0, 0), (0, 9), (1, 300), (3, 50), (5, 1500)])
def test_what_is_too_small_for_a_picture_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=f"row 4: an image .*{size[0]} x {size[1]} pixels") as caught:
        ImageAccess().open(Image.new("RGB", size), "row 4")
    assert caught.value.kind == TOO_SMALL


def test_a_smaller_limit_after_a_larger_one_holds() -> None:
    content = encoded(picture(30, 20, 1))
    ImageAccess().key(content)
    with pytest.raises(DataError, match="30 x 20 pixels, more than 500"):
        ImageAccess(max_pixels=500).key(content)


@pytest.mark.parametrize("form", ["ICO", "DDS", "TGA", "PCX", "SGI", "IM", "PDF"])
def test_formats_that_pictures_do_not_come_in_are_not_opened(form: str) -> None:
    with pytest.raises(DataError, match=r"row 1: an image .*unreadable"):
        ImageAccess().open(encoded(picture(20, 20, 1), form), "row 1")


def test_pipes_devices_and_folders_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), (Path("/dev/zero"), "device"), (tmp_path, "folder")):
        with pytest.raises(DataError, match=f"row 1: image .* is a {kind}"):
            ImageAccess().open(path, "row 1")


def test_a_file_is_not_read_beyond_what_its_pixels_can_take(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(10_000_000_000)
    with pytest.raises(DataError, match="10,000,000,000 bytes or more") as caught:
        ImageAccess().open(tmp_path / "large.png")
    assert caught.value.kind == OVERLARGE
