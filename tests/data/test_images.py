"""Images in every form and mode, and every way in which one cannot be used."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pivot_plugin.data.images import OVERLARGE, ImageAccess, content_key
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
    for look in (lambda: access.open(content, "row 1"), lambda: access.check(content, content, "row 1")):
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
    assert content_key([first]) != content_key([second])
    assert content_key([first, second]) != content_key([second, first])
    assert content_key([]) == ""
    assert content_key([picture(9, 9, 1)]) == content_key([picture(9, 9, 1)]) != content_key([picture(9, 9, 2)])
