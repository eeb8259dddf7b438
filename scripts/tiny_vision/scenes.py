"""Synthetic scenes: what is in them, how they look, and what may be asked about them."""

import dataclasses
import math
from collections.abc import Sequence

import cv2
import numpy as np

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
# Hue in degrees, saturation range, value range. No colour begins with a vowel: "a" always fits.
PALETTE = {
    "red": (0.0, (0.80, 1.0), (0.75, 1.0)),
    "green": (125.0, (0.70, 1.0), (0.45, 0.80)),
    "blue": (222.0, (0.75, 1.0), (0.70, 1.0)),
    "yellow": (52.0, (0.80, 1.0), (0.88, 1.0)),
    "purple": (287.0, (0.65, 1.0), (0.50, 0.80)),
    "black": (0.0, (0.0, 0.1), (0.0, 0.15)),
}
KINDS = (*SHAPES, "lit lamp", "dark lamp", *(f"digit {n}" for n in range(10)))
CHANGES = ("added", "removed", "moved", "recoloured", "switched")
WIDTH = 640.0
MIN_GAP = 72.0
FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
)


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of a scene, in units of a canvas 640 wide."""

    kind: str
    colour: str
    rgb: tuple[float, float, float]
    x: float
    y: float
    radius: float
    angle: float
    style: int

    @property
    def shape(self) -> bool:
        """True for a circle, square or triangle."""
        return self.kind in SHAPES

    @property
    def noun(self) -> str:
        """How a question calls it: "circle", "lamp" or "digit"."""
        return self.kind if self.shape else ("lamp" if "lamp" in self.kind else "digit")

    @property
    def phrase(self) -> str:
        """How an answer calls it: "a red circle", "a lit lamp" or "the digit 7"."""
        if self.shape:
            return f"a {self.colour} {self.kind}"
        return f"a {self.kind}" if "lamp" in self.kind else f"the {self.kind}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Things on a lit background; `height` is in units of a canvas 640 wide."""

    things: tuple[Thing, ...]
    height: float
    background: tuple[float, float, float]
    slope: tuple[float, float]

    def count(self, kind: str) -> int:
        """How many things of this kind there are."""
        return sum(thing.kind == kind for thing in self.things)

    def from_left(self) -> list[Thing]:
        """The things, leftmost first."""
        return sorted(self.things, key=lambda thing: thing.x)


@dataclasses.dataclass(frozen=True)
class Change:
    """What happened between two scenes; `before` and `after` are None where there is nothing."""

    name: str
    before: Thing | None
    after: Thing | None

    @property
    def answer(self) -> str:
        """The exact answer to "What changed?"."""
        if self.name == "nothing":
            return "nothing"
        if self.before is None:
            assert self.after is not None
            return f"{self.after.phrase} was added"
        if self.name == "switched":
            return f"the lamp was switched {'off' if self.before.kind == 'lit lamp' else 'on'}"
        name = "the " + self.before.phrase.split(" ", 1)[1]
        if self.name == "recoloured":
            assert self.after is not None
            return f"{name} turned {self.after.colour}"
        return f"{name} moved" if self.name == "moved" else f"{name} was removed"


def colour_rgb(colour: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """One shade of a named colour, 0..255."""
    hue, saturation, value = PALETTE[colour]
    hsv = np.array(
        [[[(hue + rng.uniform(-7, 7)) % 360, rng.uniform(*saturation), rng.uniform(*value)]]],
        np.float32,
    )
    red, green, blue = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255
    return float(red), float(green), float(blue)


def random_radius(kind: str, rng: np.random.Generator) -> float:
    """A radius that keeps the thing readable in a 336-pixel view."""
    if kind in SHAPES:
        return float(rng.uniform(36, 72))
    return float(rng.uniform(55, 80) if "lamp" in kind else rng.uniform(80, 125))


def free_place(
    things: Sequence[Thing], radius: float, height: float, rng: np.random.Generator, gap: float
) -> tuple[float, float] | None:
    """A centre that overlaps nothing and is clear of the others in x; None if none came up."""
    for _ in range(60):
        x = float(rng.uniform(radius + 4, WIDTH - radius - 4))
        y = float(rng.uniform(radius + 4, height - radius - 4))
        if all(
            abs(x - other.x) >= gap
            and math.hypot(x - other.x, y - other.y) > radius + other.radius + 6
            for other in things
        ):
            return x, y
    return None


def random_thing(
    kind: str, things: Sequence[Thing], height: float, rng: np.random.Generator
) -> Thing | None:
    """A new thing placed clear of the others; None if it does not fit."""
    radius = min(random_radius(kind, rng), height * 0.42)
    place = free_place(things, radius, height, rng, MIN_GAP)
    if place is None:
        return None
    colour = COLOURS[rng.integers(len(COLOURS))]
    return Thing(
        kind,
        colour,
        colour_rgb(colour, rng),
        *place,
        radius,
        float(rng.uniform(-14, 14)),
        int(rng.integers(1 << 16)),
    )


def random_kinds(rng: np.random.Generator) -> list[str]:
    """The kinds of a scene: shapes alone, or a lamp or a digit with fewer shapes."""
    kinds: list[str] = []
    special = rng.random()
    if special < 0.26:
        kinds.append("lit lamp" if rng.random() < 0.5 else "dark lamp")
    elif special < 0.54:
        kinds.append(f"digit {rng.integers(10)}")
    low, high = (1, 3) if not kinds else (0, 2)
    favourite = SHAPES[rng.integers(3)]
    kinds += [
        favourite if rng.random() < 0.3 else SHAPES[rng.integers(3)]
        for _ in range(rng.integers(low, high + 1))
    ]
    return kinds


def random_scene(rng: np.random.Generator, height: float = 480.0) -> Scene:
    """A scene of one to three things."""
    things: list[Thing] = []
    for kind in random_kinds(rng):
        thing = random_thing(kind, things, height, rng)
        if thing is not None:
            things.append(thing)
    base = rng.uniform(205, 252)
    background = tuple(float(v) for v in np.clip(base + rng.uniform(-14, 14, 3), 190, 255))
    slope = (float(rng.uniform(-22, 22)), float(rng.uniform(-22, 22)))
    return Scene(tuple(things), height, background, slope)


def random_change(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Change]:
    """The scene after one random change, and the change."""
    for _ in range(20):
        name = ("nothing", *CHANGES)[rng.choice(6, p=(0.1, 0.2, 0.17, 0.22, 0.17, 0.14))]
        change = _try_change(scene, name, rng)
        if change is not None:
            kept = [thing for thing in scene.things if thing is not change.before]
            kept += [change.after] if change.after is not None else []
            return dataclasses.replace(scene, things=tuple(kept)), change
    return scene, Change("nothing", None, None)


def _try_change(scene: Scene, name: str, rng: np.random.Generator) -> Change | None:
    if name == "nothing":
        return Change(name, None, None)
    if name == "added":
        lamp = rng.random() < 0.15 and all(thing.shape for thing in scene.things)
        kind = "lit lamp" if lamp else SHAPES[rng.integers(3)]
        after = random_thing(kind, scene.things, scene.height, rng)
        return None if after is None or len(scene.things) > 2 else Change(name, None, after)
    wanted = {"recoloured": lambda t: t.shape, "switched": lambda t: t.noun == "lamp"}
    things = [thing for thing in scene.things if wanted.get(name, lambda _: True)(thing)]
    if not things:
        return None
    before = things[rng.integers(len(things))]
    if name == "removed":
        return Change(name, before, None)
    if name == "switched":
        kind = "dark lamp" if before.kind == "lit lamp" else "lit lamp"
        return Change(name, before, dataclasses.replace(before, kind=kind))
    if name == "recoloured":
        colour = [c for c in COLOURS if c != before.colour][rng.integers(5)]
        return Change(
            name, before, dataclasses.replace(before, colour=colour, rgb=colour_rgb(colour, rng))
        )
    others = [thing for thing in scene.things if thing is not before]
    place = free_place(others, before.radius, scene.height, rng, MIN_GAP)
    if place is None or math.hypot(place[0] - before.x, place[1] - before.y) < 80:
        return None
    return Change(name, before, dataclasses.replace(before, x=place[0], y=place[1]))


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Every question with one sure answer, as (question, answer)."""
    asked = [("Describe the scene.", describe(scene))]
    asked += [(f"How many {kind}s are there?", str(scene.count(kind))) for kind in SHAPES]
    asked.append(("How many shapes are there?", str(sum(t.shape for t in scene.things))))
    for thing in scene.things:
        if thing.shape and scene.count(thing.kind) == 1:
            asked.append((f"What colour is the {thing.kind}?", thing.colour))
        if thing.noun == "lamp":
            asked.append(("Is the lamp lit or dark?", thing.kind.split()[0]))
        if thing.noun == "digit":
            asked.append(("What digit is shown?", thing.kind.split()[1]))
        if thing.noun == "lamp" or (thing.shape and scene.count(thing.kind) == 1):
            asked += _relations(scene, thing)
    return asked


def _relations(scene: Scene, thing: Thing) -> list[tuple[str, str]]:
    others = [other for other in scene.things if other is not thing]
    asked = []
    for side, axis, sign in (
        ("left of", "x", -1),
        ("right of", "x", 1),
        ("above", "y", -1),
        ("below", "y", 1),
    ):
        offsets = [sign * (getattr(other, axis) - getattr(thing, axis)) for other in others]
        there = [other for other, off in zip(others, offsets, strict=True) if off > 0]
        if others and len(there) <= 1 and all(abs(offset) >= 60 for offset in offsets):
            answer = there[0].phrase if there else "nothing"
            asked.append((f"What is {side} the {thing.noun}?", answer))
    return asked


def describe(scene: Scene) -> str:
    """The things from left to right: "a red circle, a lit lamp and a blue square"."""
    phrases = [thing.phrase for thing in scene.from_left()]
    if not phrases:
        return "nothing"
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]]) if phrases[1:] else phrases[0]


def render(scene: Scene, width: int, height: int) -> np.ndarray:
    """The scene as uint8 RGB (height, width, 3), stretched to that size."""
    across = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :, None] * scene.slope[0]
    down = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None, None] * scene.slope[1]
    image = np.clip(np.float32(scene.background) + across + down, 0, 255).astype(np.uint8)
    scale = np.array([width / WIDTH, height / scene.height])
    for thing in scene.things:
        if thing.noun == "lamp":
            _draw_lamp(image, thing, scale)
        elif thing.noun == "digit":
            _draw_digit(image, thing, scale)
        else:
            _fill(image, shape_outline(thing), scale, thing.rgb)
    return image


def shape_outline(thing: Thing) -> np.ndarray:
    """The outline of a circle, square or triangle as (points, 2)."""
    sides, start = {"circle": (40, 0.0), "square": (4, 45.0), "triangle": (3, -90.0)}[thing.kind]
    angles = np.radians(np.arange(sides) * 360 / sides + start + thing.angle)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * thing.radius + (thing.x, thing.y)


def _fill(
    image: np.ndarray, outline: np.ndarray, scale: np.ndarray, rgb: tuple[float, float, float]
) -> None:
    points = np.round((outline * scale - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(image, [points], rgb, cv2.LINE_AA, 4)


def _disc(x: float, y: float, radius: float) -> np.ndarray:
    angles = np.arange(32) * math.tau / 32
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radius + (x, y)


def _draw_lamp(image: np.ndarray, thing: Thing, scale: np.ndarray) -> None:
    lit, r = thing.kind == "lit lamp", thing.radius
    bulb_y, bulb_r = thing.y - 0.15 * r, 0.48 * r
    box = np.array([[-0.24, 0.28], [0.24, 0.28], [0.2, 0.85], [-0.2, 0.85]]) * r
    _fill(image, box + np.array([thing.x, thing.y]), scale, (95.0, 95.0, 100.0))
    if lit:
        for angle in np.radians(np.arange(-210, 31, 40)):
            along = np.array([math.cos(angle), math.sin(angle)])
            aside = np.array([-along[1], along[0]]) * 0.05 * r
            near, far = along * 0.6 * r, along * 0.88 * r
            ray = np.array([near - aside, far - aside, far + aside, near + aside])
            _fill(image, ray + np.array([thing.x, bulb_y]), scale, (250.0, 165.0, 20.0))
    _fill(image, _disc(thing.x, bulb_y, bulb_r), scale, (95.0, 95.0, 100.0))
    inner = (255.0, 225.0, 90.0) if lit else (60.0, 62.0, 70.0)
    _fill(image, _disc(thing.x, bulb_y, bulb_r * 0.86), scale, inner)


def _draw_digit(image: np.ndarray, thing: Thing, scale: np.ndarray) -> None:
    mask = np.zeros((160, 160), np.uint8)
    text, font, thick = thing.kind.split()[1], FONTS[thing.style % 4], 9 + thing.style // 4 % 9
    (across, down), _ = cv2.getTextSize(text, font, 4.6, thick)
    cv2.putText(mask, text, (80 - across // 2, 80 + down // 2), font, 4.6, 255, thick, cv2.LINE_AA)
    width, height = np.maximum(np.round(2 * thing.radius * scale), 8).astype(int)
    mask = cv2.resize(mask, (int(width), int(height)), interpolation=cv2.INTER_AREA)
    left = round(thing.x * scale[0] - width / 2)
    top = round(thing.y * scale[1] - height / 2)
    y0, x0 = max(top, 0), max(left, 0)
    part = image[y0 : top + height, x0 : left + width]
    alpha = mask[y0 - top :, x0 - left :][: part.shape[0], : part.shape[1], None] / np.float32(255)
    part[:] = (part * (1 - alpha) + np.float32(thing.rgb) * alpha).astype(np.uint8)


def photograph(image: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """The image as a small camera would give it: gain, a little blur, noise."""
    gain = np.float32(1 + strength * rng.uniform(-0.06, 0.06))
    noise = rng.standard_normal((64, 64, 3), np.float32)
    noise = np.tile(noise, (image.shape[0] // 64 + 1, image.shape[1] // 64 + 1, 1))
    noise = noise[: image.shape[0], : image.shape[1]] * np.float32(strength * rng.uniform(0, 7))
    if rng.random() < 0.4 * strength:
        image = cv2.GaussianBlur(image, (3, 3), 0)
    return np.clip(image * gain + noise, 0, 255).astype(np.uint8)
