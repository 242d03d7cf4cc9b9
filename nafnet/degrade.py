"""Ways to spoil a picture, and synthetic pictures to spoil: all seeded, so that a run can be made again.

Degradations take and return float32 (H, W, C) in [0, 1] and a `numpy.random.Generator`; they do not clip (a sensor
clips when it stores: see `nafnet.metrics.quantize`). `scene` draws procedural training pictures, so that a denoiser can
be trained without a data set: dead leaves with occlusion (Lee, Mumford, Huang 2001), whose edges and sizes follow the
statistics of natural images, filled with 1/f, oriented and periodic textures, shading, and text-like edges.
"""

import io

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Float32 = npt.NDArray[np.float32]

_OVERSAMPLE = 2  # scenes are drawn at twice their size and reduced, so that edges are antialiased as a lens does
_WORDS = "The quick brown fox 0123456789 NAFNet & Sons, Ltd. 42% off! EXIT Strasse 7 http://"


def gaussian_noise(image: Float32, sigma: float, rng: Generator) -> Float32:
    """Add white Gaussian noise of standard deviation `sigma` (in [0, 1] units: divide an 8-bit sigma by 255)."""
    return image + rng.standard_normal(image.shape, dtype=np.float32) * np.float32(sigma)


def poisson_gaussian_noise(image: Float32, shot: float, read: float, rng: Generator) -> Float32:
    """Add sensor noise of variance `shot * value + read**2` (Foi et al. 2008, Gaussian approximation)."""
    sigma: Float32 = np.sqrt(np.maximum(image, 0) * np.float32(shot) + np.float32(read) ** 2)
    return image + rng.standard_normal(image.shape, dtype=np.float32) * sigma


def motion_blur(image: Float32, length_px: float, angle_degrees: float) -> Float32:
    """Average along a straight line of `length_px`, as a camera that moves at constant speed while it exposes.

    The line lies along the rows at 0 degrees and turns clockwise, as rows count downwards. The picture stays in place.
    """
    radius = int(np.ceil(length_px / 2))
    steps = max(2, 8 * radius)
    along = ((np.arange(steps) + 0.5) / steps - 0.5) * length_px  # middles of equal parts: none counts for more
    angle = np.deg2rad(angle_degrees)
    kernel = np.zeros((2 * radius + 2, 2 * radius + 2))
    rows, columns = radius + along * np.sin(angle), radius + along * np.cos(angle)
    for dy in (0, 1):
        for dx in (0, 1):  # each sample is shared among the four taps around it
            y, x = np.floor(rows).astype(int) + dy, np.floor(columns).astype(int) + dx
            np.add.at(kernel, (y, x), (1 - np.abs(rows - y)) * (1 - np.abs(columns - x)))
    return _convolve(image, kernel, centre=radius)


def defocus_blur(image: Float32, radius_px: float) -> Float32:
    """Average over a disc of `radius_px`, as a lens out of focus."""
    radius = int(np.ceil(radius_px))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    kernel = np.clip(radius_px + 0.5 - np.hypot(x, y), 0, 1)
    return _convolve(image, kernel, centre=radius)


def jpeg(image: Float32, quality: int) -> Float32:
    """Store as JPEG at `quality` (1 to 95, 4:2:0) and read back. RGB or grey."""
    stored = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(stored.squeeze(-1) if stored.shape[-1] == 1 else stored).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer), np.float32).reshape(image.shape) / np.float32(255)


def _convolve(image: Float32, kernel: npt.NDArray[np.float64], *, centre: int) -> Float32:
    """Each channel with a normalised kernel, edges repeated, by FFT."""
    before, after = centre, max(kernel.shape) - centre
    padded = np.pad(image, ((before, after), (before, after), (0, 0)), mode="edge")
    height, width = padded.shape[:2]
    spectrum = np.fft.rfft2((kernel / kernel.sum())[::-1, ::-1], (height, width))
    blurred = np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * spectrum[..., None], (height, width), axes=(0, 1))
    # The flipped kernel's centre sits at (size - 1 - centre); circular wrap stays inside the padding.
    top, left = kernel.shape[0] - 1 - centre + before, kernel.shape[1] - 1 - centre + before
    return blurred[top : top + image.shape[0], left : left + image.shape[1]].astype(np.float32)


def scene(seed: int, size_px: int = 384) -> npt.NDArray[np.uint8]:
    """Draw one procedural picture (size_px, size_px, 3), uint8 sRGB. The same seed gives the same picture."""
    rng = np.random.default_rng([seed, 0x5CE7E])
    canvas_px = size_px * _OVERSAMPLE
    palette = _palette(rng)
    textures = [_texture(rng, canvas_px) for _ in range(4)]
    canvas = _fill(rng, palette, textures, canvas_px, canvas_px)
    # A power law of radii (r^-3) makes the scene look alike at every scale, as photographs do.
    smallest, largest = canvas_px * rng.uniform(0.006, 0.03), canvas_px * rng.uniform(0.2, 0.7)
    leaves = int(np.exp(rng.uniform(np.log(40), np.log(500))))
    out_of_focus = int(leaves * rng.uniform(0.2, 0.8)) if rng.random() < 0.5 else -1
    for leaf in range(leaves):
        if leaf == out_of_focus:  # what lies behind is blurred, what comes after is sharp: depth of field
            canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(2, 10)))
        radius = (smallest**-2 + rng.random() * (largest**-2 - smallest**-2)) ** -0.5
        _paint_leaf(rng, canvas, radius, palette, textures)
    for _ in range(int(rng.integers(0, 4)) if rng.random() < 0.5 else 0):
        _paint_text(rng, canvas, palette)
    for _ in range(int(rng.integers(0, 12)) if rng.random() < 0.4 else 0):
        _paint_line(rng, canvas, palette)
    if rng.random() < 0.4:  # lens softness
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3.0)))
    return _develop(rng, canvas.resize((size_px, size_px), Image.Resampling.LANCZOS))


def _palette(rng: Generator) -> Float32:
    """A few colours (n, 3) in [0, 1] around a common tint: channels of natural pictures move together."""
    n = int(rng.integers(3, 12))
    light = rng.beta(1.1, 1.3, (n, 1))
    saturation = rng.choice([0.03, 0.08, 0.18])
    chroma = rng.normal(0, saturation, (n, 3)) + rng.normal(0, 0.05, (1, 3))
    colours: Float32 = np.clip(light + chroma - chroma.mean(1, keepdims=True), 0, 1).astype(np.float32)
    return colours


def _texture(rng: Generator, size_px: int) -> Float32:
    """One grey texture (size_px, size_px), zero mean, unit deviation: 1/f clouds, grain, fur, or a grating."""
    kind = rng.choice(["clouds", "oriented", "grating", "clouds"])
    if kind == "grating":
        y, x = np.mgrid[0:size_px, 0:size_px].astype(np.float32)
        angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(5), np.log(80)))
        bend = rng.uniform(0, 6) * np.sin(2 * np.pi * y / rng.uniform(100, 800))
        phase = 2 * np.pi * ((x + bend) * np.cos(angle) + y * np.sin(angle)) / period
        wave = np.sin(phase)
        if rng.random() < 0.4:  # a check or weave
            wave = wave * np.sin(2 * np.pi * (y * np.cos(angle) - x * np.sin(angle)) / period)
        elif rng.random() < 0.4:
            wave = np.tanh(4 * wave)  # stripes with edges
        return _standardize(wave)
    fy, fx = np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None, :]
    if kind == "oriented":  # stretched along one direction: fur, grass, brushed metal, water
        angle, stretch = rng.uniform(0, np.pi), rng.uniform(3, 12)
        fy, fx = (
            (fy * np.cos(angle) - fx * np.sin(angle)) * stretch,
            fy * np.sin(angle) + fx * np.cos(angle),
        )
    frequency = np.hypot(fy, fx)
    frequency[0, 0] = 1
    # A picture's amplitude spectrum falls as 1/f; flatter is grain, steeper is cloud.
    amplitude = np.minimum(frequency, 1.0) ** -rng.uniform(0.6, 1.9)
    amplitude *= np.exp(-((frequency * rng.uniform(1.0, 6.0)) ** 2))
    amplitude[0, 0] = 0
    spectrum = amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape))
    field = np.fft.irfft2(spectrum, (size_px, size_px)).astype(np.float32)
    return _standardize(field)


def _standardize(field: npt.NDArray[np.floating]) -> Float32:
    unit: Float32 = ((field - field.mean()) / (field.std() + 1e-6)).astype(np.float32)
    return unit


def _fill(rng: Generator, palette: Float32, textures: list[Float32], height: int, width: int) -> Image.Image:
    """A patch of one colour, or of two that flow into each other, with shading and perhaps a texture."""
    n = len(palette)
    colour = palette[rng.integers(n)] + rng.normal(0, 0.03, 3).astype(np.float32)
    patch = np.broadcast_to(colour.astype(np.float32), (height, width, 3)).copy()
    if rng.random() < 0.6:  # light falls off across the surface
        direction = rng.normal(0, 0.25, 2).astype(np.float32)
        slope_y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None, None] * direction[0]
        slope_x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :, None] * direction[1]
        patch *= 1 + slope_y + slope_x
    if rng.random() < 0.75:
        texture = textures[rng.integers(len(textures))]
        top = int(rng.integers(texture.shape[0] - height + 1))
        left = int(rng.integers(texture.shape[1] - width + 1))
        piece = texture[top : top + height, left : left + width, None]
        other = palette[rng.integers(n)] - colour if rng.random() < 0.3 else np.ones(3, np.float32)
        strength = np.exp(rng.uniform(np.log(0.008), np.log(0.15)))
        patch += piece * (other * strength).astype(np.float32)
    return Image.fromarray((np.clip(patch, 0, 1) * 255 + 0.5).astype(np.uint8))


def _paint_leaf(rng: Generator, canvas: Image.Image, radius: float, palette: Float32, textures: list[Float32]) -> None:
    centre = rng.random(2) * canvas.width
    size = min(int(2 * radius) + 3, canvas.width)
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    kind = rng.choice(["ellipse", "polygon", "blob", "bar"])
    turn = rng.uniform(0, 2 * np.pi)
    if kind == "bar":
        half = np.array([1.0, rng.uniform(0.05, 0.4)])
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
        x, y = corners[:, 0], corners[:, 1]
    else:
        sides = int(rng.integers(3, 8)) if kind == "polygon" else 48
        angles = np.sort(rng.random(sides)) * 2 * np.pi if kind == "polygon" else np.linspace(0, 2 * np.pi, sides)
        reach = np.ones(sides)
        if kind == "blob":
            for wave in range(2, 6):
                reach += rng.normal(0, 0.25 / wave) * np.cos(wave * angles + rng.uniform(0, 2 * np.pi))
            reach /= reach.max()
        squeeze = rng.uniform(0.3, 1.0) if kind == "ellipse" else 1.0
        x, y = reach * np.cos(angles), reach * np.sin(angles) * squeeze
    xy = np.stack([x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)], 1)
    draw.polygon([(float(px), float(py)) for px, py in xy * size / 2 + size / 2], fill=255)
    if rng.random() < 0.25:  # shadows, folds and things out of focus have soft edges
        mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.02, 0.25) * radius))
    corner = (int(centre[0] - size / 2), int(centre[1] - size / 2))
    canvas.paste(_fill(rng, palette, textures, size, size), corner, mask)


def _paint_text(rng: Generator, canvas: Image.Image, palette: Float32) -> None:
    font = ImageFont.load_default(size=float(rng.uniform(14, 110)))
    start = int(rng.integers(len(_WORDS) - 12))
    label = Image.new("L", (canvas.width, 160))
    ImageDraw.Draw(label).text((4, 4), _WORDS[start : start + int(rng.integers(4, 24))], fill=255, font=font)
    label = label.rotate(float(rng.uniform(-25, 25)), expand=True, resample=Image.Resampling.BICUBIC)
    corner = tuple(int(v) for v in rng.integers(-canvas.width // 8, canvas.width * 3 // 4, 2))
    canvas.paste(_colour(rng, palette), (corner[0], corner[1]), label)


def _paint_line(rng: Generator, canvas: Image.Image, palette: Float32) -> None:
    ends = [float(v) for v in rng.random(4) * canvas.width]
    ImageDraw.Draw(canvas).line(ends, fill=_colour(rng, palette), width=int(rng.integers(1, 9)))


def _colour(rng: Generator, palette: Float32) -> tuple[int, int, int]:
    red, green, blue = (palette[rng.integers(len(palette))] * 255).astype(int)
    return int(red), int(green), int(blue)


def _develop(rng: Generator, image: Image.Image) -> npt.NDArray[np.uint8]:
    """Exposure, contrast and a slow change of light over the whole picture."""
    pixels = np.asarray(image, np.float32) / 255
    size_px = pixels.shape[0]
    ramp = np.linspace(-1, 1, size_px, dtype=np.float32)
    slope_y, slope_x = rng.normal(0, 0.2, 2).astype(np.float32)
    light = np.exp(slope_y * ramp[:, None, None] + slope_x * ramp[None, :, None])
    pixels = np.clip(pixels * light, 0, 1) ** np.float32(np.exp(rng.normal(0, 0.3)))
    stored: npt.NDArray[np.uint8] = (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
    return stored
