"""Image files through Pillow: the right pixels the right way up, or one error that names the file."""

import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from ats.datasets.image_files import default_folder, read_image, read_size
from ats.paths import user_path
from ats.sources import decoding
from ats.sources.decoding import decode, read_header

ORIENTED = {  # EXIF's orientations: the upright picture from the stored one
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}


def colours(height=5, width=7, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def rgb(path):
    return read_image(path).permute(1, 2, 0).numpy()


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height, width, depth, colour, rows, *, before=b"", after=b""):
    """A PNG written by hand, of kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", data) + after + chunk(b"IEND")
    )  # fmt: skip


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_orientation_is_applied_by_reading_and_by_sizes(orientation, suffix, tmp_path):
    """A camera stores its sensor's rows and says how it was held: boxes and labels are of the upright picture."""
    stored, path = colours(), tmp_path / f"x{suffix}"
    Image.fromarray(stored).save(path, exif=exif(orientation), **({"lossless": True} if suffix == ".webp" else {}))
    expected = ORIENTED[orientation](stored)
    np.testing.assert_array_equal(rgb(path), expected)
    assert read_size(path) == expected.shape[:2]


@pytest.mark.parametrize("orientation", ORIENTED)
def test_orientation_of_jpeg(orientation, tmp_path):
    Image.fromarray(colours(16, 24)).save(tmp_path / "plain.jpg", quality=95)
    Image.fromarray(colours(16, 24)).save(tmp_path / "x.jpg", quality=95, exif=exif(orientation))
    expected = ORIENTED[orientation](rgb(tmp_path / "plain.jpg"))
    np.testing.assert_array_equal(rgb(tmp_path / "x.jpg"), expected)
    assert read_size(tmp_path / "x.jpg") == expected.shape[:2]


def test_orientation_behind_the_pixels_of_a_png(tmp_path):
    """eXIf may follow IDAT; the size must not depend on where it is, nor on its being an EXIF chunk."""
    stored = colours()
    rows = [row.tobytes() for row in stored]
    late = chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "late.png").write_bytes(png(5, 7, 8, 2, rows, after=late))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    Image.fromarray(stored).save(tmp_path / "xmp.png", pnginfo=text)
    for name in ("late.png", "xmp.png"):
        assert read_size(tmp_path / name) == (7, 5)
        np.testing.assert_array_equal(rgb(tmp_path / name), np.rot90(stored, -1))


def test_damaged_exif_names_no_orientation(tmp_path):
    Image.fromarray(colours()).save(tmp_path / "x.png", exif=b"Exif\0\0MM\0\x2b\0\0")
    np.testing.assert_array_equal(rgb(tmp_path / "x.png"), colours())
    assert read_size(tmp_path / "x.png") == (5, 7)


def test_the_size_of_a_png_is_read_without_decoding_it(tmp_path, monkeypatch):
    Image.fromarray(colours()).save(tmp_path / "x.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert read_size(tmp_path / "x.png") == (5, 7)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "L", "RGB"])
def test_colours_below_transparency_do_not_reach_a_model(kind, tmp_path):
    """A white picture for whoever looks at it: what its transparent pixels hold must not be seen by a network."""
    path = tmp_path / "x.png"
    if kind == "RGBA":
        pixels = np.dstack([colours(), np.zeros((5, 7), np.uint8)])
        pixels[0, 0] = (10, 20, 30, 255)
        pixels[0, 1] = (0, 100, 200, 51)  # a fifth
        Image.fromarray(pixels).save(path)
        expected = {(0, 0): (10, 20, 30), (0, 1): (204, 224, 244)}
    elif kind == "LA":
        pixels = np.dstack([colours()[..., 0], np.zeros((5, 7), np.uint8)])
        pixels[0, 0] = (10, 255)
        Image.fromarray(pixels, "LA").save(path)
        expected = {(0, 0): (10, 10, 10)}
    elif kind == "P":
        image = Image.fromarray(np.zeros((5, 7), np.uint8), "P")
        image.putpalette([200, 0, 0, 1, 2, 3])
        image.putpixel((0, 0), 1)
        image.save(path, transparency=0)
        expected = {(0, 0): (1, 2, 3)}
    elif kind == "L":
        pixels = np.full((5, 7), 9, np.uint8)
        pixels[0, 0] = 70
        Image.fromarray(pixels).save(path, transparency=9)
        expected = {(0, 0): (70, 70, 70)}
    else:
        pixels = np.full((5, 7, 3), (9, 8, 7), np.uint8)
        pixels[0, 0] = (70, 8, 7)
        Image.fromarray(pixels).save(path, transparency=(9, 8, 7))
        expected = {(0, 0): (70, 8, 7)}
    wanted = np.full((5, 7, 3), 255, np.uint8)
    for place, colour in expected.items():
        wanted[place] = colour
    np.testing.assert_array_equal(rgb(path), wanted)


def test_transparency_on_a_background_and_as_a_channel(tmp_path):
    pixels = np.dstack([colours(), np.arange(35, dtype=np.uint8).reshape(5, 7) * 7])
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(decode(tmp_path / "x.png", None), pixels)
    assert read_header(tmp_path / "x.png", keep_alpha=True).channels == 4
    share = pixels[..., 3:] / 255
    mixed = pixels[..., :3] * share + np.array([0, 128, 255]) * (1 - share)
    np.testing.assert_allclose(decode(tmp_path / "x.png", (0, 128, 255)), mixed, atol=0.5 + 1e-9)
    with pytest.raises(ValueError, match=r"from 0 to 255, or one for each of the 3 channels of .*x\.png; got \(0, 0\)"):
        decode(tmp_path / "x.png", (0, 0))


def deep_files(folder):
    """Files deeper than 8 bits, with what they hold (H, W), or None where they must be refused, and their mode."""
    ramp = np.linspace(0, 65535, 60).astype(np.uint16).reshape(5, 12)
    signed = (ramp.astype(np.int32) - 32768).astype(np.int16)
    floats = np.linspace(-1, 2, 60, dtype=np.float32).reshape(5, 12)
    Image.fromarray(ramp).save(folder / "grey16.png")
    yield "grey16.png", ramp, "I;16"
    Image.fromarray(ramp).save(folder / "grey16.tif")
    yield "grey16.tif", ramp, "I;16"
    Image.fromarray(floats).save(folder / "float.tif")
    yield "float.tif", floats, "F"
    (folder / "grey16.pgm").write_bytes(b"P5\n# a comment\n12 5\n65535\n" + ramp.astype(">u2").tobytes())
    yield "grey16.pgm", ramp, "I"
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(folder / "ct.tif", signed)
    yield "ct.tif", signed, "I"
    tifffile.imwrite(folder / "int32.tif", signed.astype(np.int32))
    yield "int32.tif", None, "I"
    tifffile.imwrite(folder / "signed8.tif", (signed // 256).astype(np.int8))
    yield "signed8.tif", None, "L"
    tifffile.imwrite(folder / "float64.tif", floats.astype(np.float64))
    yield "float64.tif", None, None
    tifffile.imwrite(folder / "white0.tif", ramp, photometric="miniswhite")
    yield "white0.tif", None, "I;16"
    tifffile.imwrite(folder / "rgb16.tif", np.dstack([ramp] * 3), photometric="rgb")
    yield "rgb16.tif", None, "RGB"
    wide = np.dstack([ramp] * 3).astype(">u2")
    (folder / "rgb16.png").write_bytes(png(5, 12, 16, 2, [row.tobytes() for row in wide]))
    yield "rgb16.png", None, "RGB"
    (folder / "rgb16.ppm").write_bytes(b"P6 12 5 65535\n" + wide.tobytes())
    yield "rgb16.ppm", None, "RGB"
    transparent = np.dstack([ramp, ramp]).astype(">u2")
    (folder / "la16.png").write_bytes(png(5, 12, 16, 4, [row.tobytes() for row in transparent]))
    yield "la16.png", None, r"(LA|RGBA)"
    Image.fromarray(ramp).save(folder / "grey16.jp2")
    yield "grey16.jp2", ramp, "I;16"


def test_deep_files_are_read_right_or_refused(tmp_path):
    """A 16-bit ramp must not come out as 17 levels, nor signed CT with all air at 0."""
    for name, values, mode in deep_files(tmp_path):
        path = tmp_path / name
        if values is None:
            kind = rf"of mode {mode} holds .*bits a channel" if mode else r"is .*of no kind that Pillow knows"
            known = name not in ("int32.tif", "signed8.tif")  # numbers that no tensor of images has
            mend = "read it with rasterio" if known else "rasterio, which is here, cannot read it either"
            with pytest.raises(ValueError, match=rf"{name} {kind}.* {mend}"):
                decode(path)
        else:
            header = read_header(path)
            pixels = decode(path)
            assert (header.height, header.width, header.channels, header.dtype) == (5, 12, 1, values.dtype)
            np.testing.assert_array_equal(pixels, values[..., None], strict=True)
        with pytest.raises(ValueError, match=rf"{name} "):
            read_image(path)  # data sets are of bytes
        if values is not None:
            assert read_size(path) == (5, 12)


def test_other_modes_are_colours(tmp_path):
    """CMYK, YCbCr, bilevel and grey: (3, H, W) bytes, as Pillow converts them."""
    picture = Image.fromarray(colours(16, 24))
    for mode, suffix in (("CMYK", ".tif"), ("YCbCr", ".jpg"), ("1", ".png"), ("L", ".png"), ("P", ".gif")):
        path = tmp_path / f"{mode}{suffix}"
        picture.convert(mode).save(path)
        with Image.open(path) as file:
            expected = np.asarray(file.convert("RGB"))
        np.testing.assert_array_equal(rgb(path), expected)


def test_a_large_image_is_read(tmp_path, monkeypatch):
    """What Pillow takes for a decompression bomb is what this library is for; its limit is as before afterwards."""
    Image.fromarray(colours(40, 30)).save(tmp_path / "x.png")
    Image.fromarray(colours(40, 30)).save(tmp_path / "x.tif", compression="tiff_deflate")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("x.png", "x.tif"):
            np.testing.assert_array_equal(rgb(tmp_path / name), colours(40, 30))
            assert read_size(tmp_path / name) == (40, 30)
        threads = [threading.Thread(target=lambda: [rgb(tmp_path / "x.png") for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(Image.DecompressionBombError), Image.open(tmp_path / "x.png"):
        pass


def test_more_than_memory_is_refused_before_decoding(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(png(100_000, 100_000, 8, 2, [b""]))
    monkeypatch.setattr(decoding, "memory_size", lambda: 2**33)
    assert read_size(tmp_path / "x.png") == (100_000, 100_000)
    with pytest.raises(ValueError, match=r"x\.png of 100000×100000 pixels would take 37 GiB decoded, more than"):
        read_image(tmp_path / "x.png")


def damaged_files():
    """Bytes of many formats cut and flipped, so that each decoder's own kind of exception is met."""
    picture = Image.fromarray(colours(24, 32))
    for kind in (
        "PNG",
        "JPEG",
        "TIFF",
        "WEBP",
        "GIF",
        "BMP",
        "JPEG2000",
        "PPM",
        "TGA",
        "SGI",
        "ICO",
        "PCX",
        "DDS",
        "AVIF",
    ):
        file = io.BytesIO()
        (picture.convert("P") if kind == "GIF" else picture).save(file, kind)
        data = file.getvalue()
        yield kind, data[: len(data) // 2]
        yield kind, data[:20]
        random = np.random.default_rng(0)
        for _ in range(8):
            flipped = bytearray(data)
            for place in random.integers(0, min(len(data), 400), 4):
                flipped[place] = random.integers(256)
            yield kind, bytes(flipped)


def test_whatever_a_decoder_raises_is_one_error_that_names_the_file(tmp_path):
    """Pillow lets out SyntaxError, struct.error, KeyError, OverflowError, MemoryError …: users see ValueError."""
    path, refused = tmp_path / "x", []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, data in damaged_files():
            path.write_bytes(data)
            for read in (read_image, read_size):
                try:
                    read(path)
                except ValueError as error:
                    refused.append((kind, str(error)))
    assert len(refused) > 80
    assert [error for error in refused if str(path) not in error[1]] == []
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"damaged, cut short or no image"):
        read_image(path)
    with pytest.raises(FileNotFoundError, match="gone"):
        read_size(tmp_path / "gone")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        read_image(tmp_path)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Only shells replace it; elsewhere a folder named ~ would be looked for, or made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(colours()).save(tmp_path / "x.png")
    assert read_size("~/x.png") == (5, 7)
    np.testing.assert_array_equal(rgb("~/x.png"), colours())
    monkeypatch.setenv("ATS_DATA", "~/data")
    assert default_folder("colon-cancer") == tmp_path / "data" / "colon-cancer"
    assert user_path(Path("~")) == tmp_path
    assert user_path("a/~b") == Path("a/~b")
    with pytest.raises(ValueError, match="~nobody-of-this-name/x"):
        user_path("~nobody-of-this-name/x")
    with pytest.raises(TypeError, match="expected a path, as text or a Path, got 3"):
        user_path(3)


def test_every_loader_takes_a_tilde(tmp_path, monkeypatch):
    from ats.datasets import colon_cancer, mnist, speed_limits
    from ats.datasets.synthetic.write import write_colon_cancer, write_german

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_colon_cancer("~/colon", 4, size=64)
    write_german("~/german", 8, 4, size=(100, 150))
    assert len(colon_cancer.load_colon_cancer("~/colon")) == 4
    assert len(speed_limits.load_speed_limits("~/german", "train")) > 0
    os.symlink(mnist.BUNDLED, tmp_path / "digits")
    assert torch.equal(mnist.load_digits("test", "~/digits").images, mnist.load_digits("test").images)
    monkeypatch.setattr(mnist, "MIRRORS", ())
    with pytest.raises(ConnectionError, match=str(tmp_path / "none")):
        mnist.fetch_mnist("~/none")
    assert not (tmp_path / "~").exists()


def test_importing_ats_imports_no_reader():
    code = (
        "import sys, ats; print([m for m in ('PIL', 'openslide', 'rasterio', 'scipy', 'tifffile') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
