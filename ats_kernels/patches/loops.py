"""A few small patches on the CPU as a compiled loop, which reads pixels as they are stored and pads with zeros."""

from ats_kernels.loops import compiled, kept


@compiled()
def _copy(memory, start, step, out, to, count):
    if step == 1:
        for i in range(count):
            out[to + i] = memory[start + i]
    else:
        for i in range(count):
            out[to + i] = memory[start + i * step]


@compiled()
def _inside(start, length, limit):
    """The part of a patch that lies inside the image, along one axis; empty at 0."""
    low, high = min(max(-start, 0), length), min(length, limit - start)
    return (low, high) if low < high else (0, 0)


@kept()
def read(memory, sb, sc, sh, sw, channels, height, width, ph, pw, offsets, channels_last, out):
    """Patches at offsets (B, N, 2) of an image (B, C, H, W) to `out`, and how many of them cross its border.

    `memory` is the image's from its first pixel on, with strides (sb, sc, sh, sw). `out` holds (B, N, C, ph, pw), or
    (B, N, ph, pw, C) with the channels last.
    """
    images, draws, _ = offsets.shape
    at = crossing = 0
    for b in range(images):
        for n in range(draws):
            # Farther out reads the same, and does not overflow.
            y, x = min(max(offsets[b, n, 0], -ph), height), min(max(offsets[b, n, 1], -pw), width)
            top, bottom = _inside(y, ph, height)
            left, right = _inside(x, pw, width)
            if bottom - top < ph or right - left < pw:
                crossing += 1
                out[at : at + channels * ph * pw] = 0
            first = b * sb + y * sh + x * sw
            for i in range(top, bottom):
                if channels_last:
                    for j in range(left, right):
                        _copy(memory, first + i * sh + j * sw, sc, out, at + (i * pw + j) * channels, channels)
                else:
                    for c in range(channels):
                        start = first + c * sc + i * sh + left * sw
                        _copy(memory, start, sw, out, at + (c * ph + i) * pw + left, right - left)
            at += channels * ph * pw
    return crossing
