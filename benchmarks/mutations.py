"""Ways to damage a file: its bytes, or what they say."""

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image

Mutate = Callable[[Random, bytes], bytes]

# Words that readers of text trip over.
WORDS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "-0",
    "1e400",
    "1.e999",
    ".inf",
    ".nan",
    "1e308",
    "0x1F",
    "1_000",
    "9" * 5000,
    "99999999999999999999",
    "",
    "\0",
    "½",
    "\uff11",
    "yes",
    "null",
    "~",
    "[",
    "{",
    "}",
    "]",
    "&a",
    "*a",
    "!!python/name:os.system",
    "<<",
    "---",
    "2001-99-99",
    "../../etc/passwd",
    "/dev/zero",
    "$HOME",
    "%s",
    "\x1b[31m",
    "\u202e",
    "\ud800",
    "a" * 200_000,
    "n" * 300,
    "a\0b.jpg",
    "/",
    "'",
    '"',
    "<a>",
    "&lol;",
    "]]>",
    "\r",
    "\v",
    "\u2028",
    "True",
    "1:30",
    ".",
    "-",
    "e",
)


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """Flip bits, cut, repeat, move or overwrite."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 32))):
        start = rng.randrange(len(changed) + 1)
        end = min(len(changed), start + rng.choice((1, 4, 64, 1024)))
        piece = bytes(changed[start:end])
        match rng.randrange(7):
            case 0 | 1:
                if piece:
                    changed[start] ^= 1 << rng.randrange(8)
            case 2:
                del changed[start:end]
            case 3:
                del changed[start:]
            case 4:
                changed[start:start] = piece * rng.choice((1, 2, 50))
            case 5:
                changed[start:end] = rng.choice((b"\0", b"\xff", b"\x80")) * len(piece)
            case 6:
                changed[start:end] = rng.randbytes(len(piece))
    return bytes(changed)


def mutate_text(rng: Random, data: bytes) -> bytes:
    """Exchange words, lose and repeat lines, nest, save in another encoding."""
    lines = data.decode("utf-8", "replace").splitlines()
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(lines)) if lines else 0
        match rng.randrange(9) if lines else 4:
            case 0 | 1 | 2:
                separator = rng.choice((" ", ",", ":", ">", "<", '"'))
                words = lines[place].split(separator)
                words[rng.randrange(len(words))] = rng.choice(WORDS)
                lines[place] = separator.join(words)
            case 3:
                lines[place:place] = [lines[place]] * rng.choice((1, 10, 1000))
            case 4:
                lines.insert(place, rng.choice(WORDS))
            case 5:
                del lines[place]
            case 6:
                lines[place] = lines[place] * rng.choice((2, 200))
            case 7:
                rng.shuffle(lines)
            case 8:
                lines[place] = rng.choice(("[", "{a: ", "<a>", "- ", "(")) * 20_000 + lines[place]
    encoding = rng.choice(("utf-8",) * 12 + ("utf-16", "utf-32", "latin-1", "cp037", "utf-8-sig"))
    ending = rng.choice(("\n",) * 6 + ("\r\n", "\r", "\0\n"))
    return (ending.join(lines) + ending).encode(encoding, "replace")


HOSTILE_XML = (
    '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY l0 "lol">'
    + "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    + "]><annotation>&l9;</annotation>",
    (
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
        "<annotation><filename>&x;</filename></annotation>"
    ),
    '<!DOCTYPE a SYSTEM "http://127.0.0.1:1/a.dtd"><annotation/>',
    '<?xml version="1.0" encoding="klingon"?><annotation/>',
    '<?xml version="1.0" encoding="utf-7"?><annotation/>',
    '<?xml version="1.0" encoding="idna"?><annotation/>',
    "<annotation>" + "<a>" * 50_000 + "</a>" * 50_000 + "</annotation>",
    "<annotation>" + "<object/>" * 50_000 + "</annotation>",
    "<annotation " + " ".join(f'a{i}="1"' for i in range(20_000)) + "/>",
    "",
)


def mutate_xml(rng: Random, data: bytes) -> bytes:
    """Mutate as text, exchange a tag or what is in it, or give a document made to harm."""
    if rng.random() < 0.1:
        return rng.choice(HOSTILE_XML).encode()
    if rng.random() < 0.4:
        return mutate_text(rng, data)
    parts = data.decode().split("<")
    for _ in range(rng.choice((1, 2, 3))):
        place = rng.randrange(1, len(parts))
        tag, _, text = parts[place].partition(">")
        match rng.randrange(4):
            case 0:
                parts[place] = f"{tag}>{rng.choice(WORDS)}"
            case 1:
                parts[place] = f"{rng.choice(WORDS)}>{text}"
            case 2:
                parts.insert(place, f"{tag}>{text}<{tag}>")
            case 3:
                del parts[place]
    return "<".join(parts).encode("utf-8", "replace")


HOSTILE_YAML = (
    "a: &a [x, x]\n"
    + "".join(
        f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}]\n"
        for p, c in zip("abcdefghijkl", "bcdefghijklm", strict=True)
    )
    + "names: *m\n",
    "names: &a [*a]\n",
    "&a ? *a : *a",
    "names: " + "[" * 30_000,
    "names: " + "{a: " * 5_000 + "}" * 5_000,
    "!!python/object/apply:os.system [id]",
    "names: !!python/tuple [a, b]",
    "names: !!binary aGk=",
    "names: !!timestamp 2001-99-99",
    "names: !!int " + "9" * 5000,
    "nc: " + "9" * 5000 + "\nnames: [a]",
    "names: {0: a, 999999999999: b}",
    "names: {.inf: a}",
    "names: {[1, 2]: a}",
    "names: {-1: a}",
    "%YAML 9.9\n---\nnames: [a]",
    "--- a\n--- b\n",
    "? [a]\n: b",
    "names:\n  <<: *nothing",
    "names: 7",
    "names:",
    "7",
    "- a",
    "''",
    "\t",
    "names: [[a], {b: c}, null, 1.5, true]",
)


def mutate_yaml(rng: Random, data: bytes) -> bytes:
    """Mutate as text, or give a document made to harm."""
    return rng.choice(HOSTILE_YAML).encode() if rng.random() < 0.25 else mutate_text(rng, data)


def mutate_image(rng: Random, data: bytes) -> bytes:
    """Give a picture of a rare kind, or one whose header lies."""
    if rng.random() < 0.4:
        return _rare_picture(rng)
    if data.startswith(
        b"\x89PNG"
    ):  # the sides, or the bit depth and colour type, with the right checksum
        header = bytearray(data[16:29])
        if rng.random() < 0.6:
            header[:8] = struct.pack(
                ">II", *(rng.choice((0, 1, 60_000, 2**31 - 1, 2**32 - 1)) for _ in "wh")
            )
        else:
            header[8:] = bytes(rng.randrange(20) for _ in header[8:])
        checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
        return data[:16] + bytes(header) + checksum + data[33:]
    if data.startswith(b"\xff\xd8"):
        start = data.find(b"\xff\xc0")
        sides = struct.pack(">HH", *(rng.choice((0, 1, 65_535, 96)) for _ in "hw"))
        return data[: start + 5] + sides + data[start + 9 :]
    return mutate_bytes(rng, data)


def _rare_picture(rng: Random) -> bytes:
    size = rng.choice(((1, 1), (1, 3000), (97, 33), (96, 96)))
    mode = rng.choice(
        (
            "1",
            "L",
            "LA",
            "P",
            "PA",
            "RGB",
            "RGBA",
            "RGBX",
            "CMYK",
            "YCbCr",
            "I",
            "I;16",
            "F",
            "HSV",
            "LAB",
        )
    )
    kind = rng.choice(
        ("PNG", "TIFF", "JPEG", "BMP", "WEBP", "GIF", "PPM", "ICO", "JPEG2000", "TGA", "PCX")
    )
    content = io.BytesIO()
    try:
        picture = Image.new(mode, size, 0 if mode != "F" else float("nan"))
        exif = Image.Exif()
        exif[0x0112] = rng.choice((1, 3, 6, 8, 99, 2**15))
        options = rng.choice(
            ({}, {"exif": exif}, {"save_all": True, "append_images": [picture] * 3})
        )
        picture.save(content, kind, **options)
    except (
        OSError,
        ValueError,
        KeyError,
        struct.error,
        AttributeError,
        TypeError,
    ):  # it has no such mode
        return rng.choice(
            (b"", b"GIF89a", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"II*\0", b"hello\n")
        )
    return content.getvalue()


def mutate_zip(rng: Random, data: bytes) -> bytes:
    """Let names, sizes, flags or methods lie; add what archives of strangers hold."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(rng.choice((0, 1, 3))):
        name, content = rng.choice(list(members.items()))
        match rng.randrange(5):
            case 0:
                members[
                    rng.choice(
                        (
                            "../../out.png",
                            "/etc/x.png",
                            "train/a/\x01.png",
                            "train/" + "d/" * 500 + "x.png",
                        )
                    )
                ] = content
            case 1:
                members["__MACOSX/" + name] = content
            case 2:
                members[name] = mutate_bytes(rng, content)
            case 3:
                members["train/a/huge.png"] = bytes(
                    rng.choice((1, 300_000_000 if rng.random() < 0.02 else 1000))
                )
            case 4:
                del members[name]
    text = io.BytesIO()
    with zipfile.ZipFile(
        text, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    ) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    packed = bytearray(text.getvalue())
    start = packed.find(b"PK\1\2")
    for _ in range(
        rng.choice((0, 1, 2))
    ):  # flags (encryption), method, sizes, offset, of the first entry
        if start >= 0:
            place = start + rng.choice((8, 9, 10, 20, 24, 28, 42))
            packed[place] = rng.randrange(256)
    return bytes(packed)


def mutate_tar(rng: Random, data: bytes) -> bytes:
    """Add links, devices, sparse files and sizes that lie; pack in any way."""
    text = io.BytesIO()
    kind = rng.choice(("", "gz", "bz2", "xz"))
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as source,
        tarfile.open(fileobj=text, mode=f"w:{kind}") as target,
    ):
        for member in source:
            content = source.extractfile(member)
            if rng.random() < 0.1:
                member.name = rng.choice(
                    (
                        "../../x.png",
                        "/etc/x.png",
                        "train/a/" + "n" * 300 + ".png",
                        "train/a/0\0.png",
                        "train/cat/0.png/0.png",
                        ".",
                        "train/\udcff.png",
                    )
                )
            if "\0" in member.name:  # which only this header can hold
                member.pax_headers = {"path": member.name}
            if rng.random() < 0.1:
                member.type = rng.choice(
                    (
                        tarfile.SYMTYPE,
                        tarfile.LNKTYPE,
                        tarfile.FIFOTYPE,
                        tarfile.CHRTYPE,
                        tarfile.GNUTYPE_SPARSE,
                        b"Z",
                    )
                )
                member.linkname = rng.choice(("/etc/passwd", "../..", member.name, ""))
            target.addfile(member, content if member.isreg() else None)
    packed = bytearray(text.getvalue())
    if not kind and rng.random() < 0.5:  # the size of the first member, with the right checksum
        packed[124:136] = rng.choice(
            (b"77777777777\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"not a size\0\0")
        )
        packed[148:156] = b" " * 8
        packed[148:156] = b"%06o\0 " % sum(packed[:512])
    return bytes(packed)


def mutate_rows(rng: Random, data: bytes) -> bytes:
    """As text, with the quotes and fields of CSV."""
    text = data.decode().replace(
        rng.choice((",", "\n", "a", "1")),
        rng.choice(('"', ",,,", '","', "\n\n", ";", "\t")),
        rng.randrange(1, 4),
    )
    return mutate_text(rng, text.encode())


def noise_picture(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """Return a picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
