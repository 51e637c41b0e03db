"""Images with more than 8 bits per channel."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, TiffImagePlugin
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor
from transformers.image_utils import load_image

from hf_tokenmixup.data import ImageClassificationData, collate
from hf_tokenmixup.data.image_cache import decode_image

MIN_SAMPLE, MAX_SAMPLE, S_MIN_SAMPLE, S_MAX_SAMPLE, PHOTOMETRIC, ORIENTATION = 280, 281, 340, 341, 262, 274


def constant(value, kind=np.uint16):
    return np.full((4, 4), value, kind)


def tiff(values, **tags):
    """A TIFF file of these values with tags by number, `_281=4095`."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        directory[int(name[1:])] = value
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", tiffinfo=directory)
    return buffer.getvalue()


def raw_tiff(values, bits, sample_format=1, photometric=1, byte_order="<", samples=1):
    """An uncompressed TIFF file, for what Pillow does not write."""
    entries = [(256, 4, 4), (257, 4, 4), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
               (277, 3, samples), (278, 4, 4), (279, 4, len(values)), (339, 3, sample_format)]  # fmt: skip
    shorts = {3: "HH", 4: "I"}
    packed = b""
    for tag, kind, value in entries:
        number = struct.pack(byte_order + shorts[kind], *((value, 0) if kind == 3 else (value,)))
        packed += struct.pack(byte_order + "HHI", tag, kind, 1) + number
    mark = b"II*\0" if byte_order == "<" else b"MM\0*"
    directory = struct.pack(byte_order + "H", len(entries)) + packed + bytes(4)
    return mark + struct.pack(byte_order + "I", 8 + len(values)) + values + directory


def png(values, *, significant=None):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    content = buffer.getvalue()
    if significant is None:
        return content
    chunk = b"sBIT" + bytes([significant])
    chunk = struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content[:33] + chunk + content[33:]


def png_16(values, color_type):
    """A PNG file of 16 bits per channel, which Pillow does not write for colors."""
    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def pgm(value, most):
    return f"P5 4 4 {most}\n".encode() + constant(value, ">u2").tobytes()


def read(content, caplog):
    """The middle pixel, and whether there was a warning."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pixel = decode_image({"bytes": content, "path": None}, "Image 0").getpixel((2, 2))
    assert pixel[0] == pixel[1] == pixel[2]
    return pixel[0], bool(caplog.records)


TWELVE = bytes([0x80, 0x08, 0x00]) * 8  # 2048 twice in 3 bytes


@pytest.mark.parametrize(
    "content, expected",
    [
        pytest.param(tiff(constant(2048), _281=4095), 128, id="MaxSampleValue of 12 bits"),
        pytest.param(tiff(constant(2048), _281=4095, _274=1), 128, id="with an orientation"),
        pytest.param(tiff(constant(2048), _340=1024, _341=3072), 128, id="SMinSampleValue and SMaxSampleValue"),
        pytest.param(tiff(constant(51.0, np.float32), _340=-49.0, _341=151.0), 128, id="range of floats"),
        pytest.param(tiff(constant(100, np.int32), _280=0, _281=200), 128, id="MaxSampleValue of int32"),
        pytest.param(raw_tiff(TWELVE, 12), 128, id="BitsPerSample of 12"),
        pytest.param(raw_tiff(constant(20000, ">u2").tobytes(), 16, byte_order=">"), 78, id="big-endian"),
        pytest.param(raw_tiff(constant(20000, "<u2").tobytes(), 16, photometric=0), 177, id="black is 65535"),
        pytest.param(png(constant(20000)), 78, id="16-bit PNG"),
        pytest.param(png(constant(32768), significant=12), 128, id="sBIT of 12, scaled to 16"),
        pytest.param(png(constant(2049), significant=12), 128, id="sBIT of 12, not scaled"),
        pytest.param(pgm(2048, 4095), 128, id="PGM of 12 bits"),
    ],
)  # fmt: skip
def test_decode_image_stated_range_scales_without_warning(content, expected, caplog):
    assert read(content, caplog) == (expected, False)


@pytest.mark.parametrize(
    "content, expected",
    [
        pytest.param(tiff(constant(2048)), 8, id="12 bits in 16"),
        pytest.param(tiff(constant(100)), 100, id="8 bits in 16"),
        pytest.param(png(constant(100)), 100, id="8 bits in a 16-bit PNG"),
        pytest.param(tiff(constant(100, np.int32)), 100, id="8 bits in int32"),
        pytest.param(tiff(constant(25700, np.int32)), 100, id="16 bits in int32"),
        pytest.param(tiff(constant(2**30, np.int32)), 128, id="int32"),
        pytest.param(raw_tiff(constant(3 * 2**30, "<u4").tobytes(), 32), 191, id="uint32"),
        pytest.param(raw_tiff(constant(16384, "<i2").tobytes(), 16, 2), 128, id="int16"),
        pytest.param(raw_tiff(constant(-16384, ">i2").tobytes(), 16, 2, byte_order=">"), 64, id="negative int16"),
        pytest.param(tiff(constant(0.5, np.float32)), 128, id="floats up to 1"),
        pytest.param(tiff(constant(-0.5, np.float32)), 64, id="floats from -1 to 1"),
        pytest.param(tiff(constant(100, np.float32)), 100, id="floats up to 255"),
        pytest.param(tiff(constant(25700, np.float32)), 100, id="floats up to 65535"),
        pytest.param(tiff(constant(2048), _281=100), 8, id="a stated range that is exceeded"),
        pytest.param(tiff(constant(20000, np.int32), _280=5, _281=5), 78, id="a stated range that is empty"),
        pytest.param(png_16(np.full((4, 4, 3), 2048), 2), 8, id="12 bits in 16 of colors"),
    ],
)
def test_decode_image_unknown_range_warns(content, expected, caplog):
    assert read(content, caplog) == (expected, True)


def test_decode_image_floats_without_scale_use_value_range(caplog):
    values = np.linspace(-1000, 3000, 16, dtype=np.float32).reshape(4, 4)
    image = decode_image({"bytes": tiff(values), "path": None}, "Image 0")
    assert (image.getpixel((0, 0))[0], image.getpixel((3, 3))[0]) == (0, 255)
    assert "from -1000 to 3000" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_decode_image_nonfinite_values_raise(value):
    values = constant(0.5, np.float32)
    values[1, :3] = value
    with pytest.raises(ValueError, match=r"Image 7 \(x.tif\) cannot be decoded: .*3 of its 16 values are NaN or inf"):
        decode_image({"bytes": tiff(values), "path": "x.tif"}, "Image 7")


def test_decode_image_stated_range_of_colors(caplog):
    content = png_16(np.full((4, 4, 3), 20000), 2)
    assert read(content, caplog) == (78, False)
    raw = np.full((4, 4), 20000, ">u2").tobytes()
    assert read(raw_tiff(raw, 16, byte_order=">"), caplog) == (78, False)


def ordinary():
    gray = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    color = Image.fromarray(np.stack([gray, 255 - gray, gray // 2], -1))
    clear = color.convert("RGBA")
    clear.putalpha(Image.fromarray(gray))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return {
        "bilevel": (Image.fromarray(gray > 100), "PNG", {}),
        "bilevel TIFF": (Image.fromarray(gray > 100), "TIFF", {}),
        "gray": (Image.fromarray(gray), "TIFF", {}),
        "LA": (clear.convert("LA"), "PNG", {}),
        "RGBA": (clear, "WEBP", {"lossless": True}),
        "palette": (color.quantize(16), "PNG", {}),
        "palette with transparency": (color.quantize(16), "PNG", {"transparency": bytes([0, 100])}),
        "GIF": (color.quantize(16), "GIF", {}),
        "CMYK": (color.convert("CMYK"), "TIFF", {}),
        "LAB": (Image.new("LAB", (4, 4), (100, 120, 140)), "TIFF", {}),
        "turned": (color, "JPEG", {"exif": exif}),
        "animated": (color, "GIF", {"save_all": True, "append_images": [Image.new("RGB", (4, 4))]}),
        "several pages": (color, "TIFF", {"save_all": True, "append_images": [Image.new("RGB", (4, 4))]}),
        "BMP": (color, "BMP", {}),
    }


@pytest.mark.parametrize("name", ordinary())
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_decode_image_matches_transformers_load_image(name, tmp_path, caplog):
    image, kind, options = ordinary()[name]
    image.save(tmp_path / "image", kind, **options)
    expected = np.asarray(load_image(str(tmp_path / "image")))
    for value in (
        {"bytes": None, "path": str(tmp_path / "image")},
        {"bytes": (tmp_path / "image").read_bytes(), "path": None},
    ):
        assert np.array_equal(np.asarray(decode_image(value, "Image 0")), expected)
    assert not caplog.records


@pytest.mark.parametrize("workers, cache", [(0, 0), (2, 0), (0, 1.0)])
def test_images_of_unknown_range_warn_once_per_split(workers, cache, capfd, caplog):
    images = [{"bytes": tiff(constant(2048)), "path": f"{i}.tif"} for i in range(12)]
    rows = {"image": images, "label": [0] * 12}
    dataset = Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": Value("int64")}))
    handler = logging.StreamHandler()
    logging.getLogger("hf_tokenmixup").addHandler(handler)
    try:
        data = ImageClassificationData(dataset, pil_to_tensor, split="scans", cache_gib=cache)
        for _ in range(2):
            list(DataLoader(data, 3, num_workers=workers, collate_fn=collate))
    finally:
        logging.getLogger("hf_tokenmixup").removeHandler(handler)
    logged = capfd.readouterr().err
    assert logged.count("Images of split 'scans' such as") == 1 and ".tif hold integers from 2048 to 2048" in logged
