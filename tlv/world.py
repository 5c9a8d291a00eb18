"""The toy world: scenes with one to three moving objects, drawn and encoded as real H.264 clips.

The default data of the workbook. A scene is sampled from a seed, drawn frame by frame on a torus
(what leaves at one edge comes back at the other) and written as MP4, so that a model meets the
codec as it would with published clips. The torus is a choice with a reason: an object's place in
any single frame then says nothing about the direction it moves in.

Taught in notebook 00. Questions and captions about a scene: `tlv.questions`. Planted defects:
`tlv.defects`.
"""

import math
from dataclasses import asdict, dataclass, replace

import numpy as np

SIZE = 64  # pixels, height and width; decord 0.6 cannot read clips 48 pixels wide
FPS = 8  # frames per second
MIN_SECONDS, MAX_SECONDS = 2, 8

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 240),
    "yellow": (235, 215, 50),
    "purple": (170, 60, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "ring", "bar", "pillar")  # told apart by few pixels
SIZES = {"small": 8.0, "large": 12.0}  # radius in pixels
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PLACES = (  # one word each: options that share words are hard to tell apart
    "northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast",
)  # fmt: skip
CLEAR = 2.0  # pixels from a line between two places; nearer, the place has no plain answer
NUM_THINGS_SHARES = (0.55, 0.35, 0.1)  # of the scenes with one, two and three things
TRAIN_SHARES = (0.35, 0.5, 0.15)  # in training: what goes with what is learnt from several things
EVENTS = ("appears", "leaves", "changes colour")

# Shape-colour pairs that no training clip and no backbone ever sees: the test of composition.
HELD_OUT_PAIRS = (("red", "ring"), ("green", "pillar"), ("blue", "circle"), ("yellow", "bar"))
SEEN_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS)


@dataclass(frozen=True)
class Thing:
    """One object: what it looks like, where it starts (pixels), how it moves (pixels per frame)."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    direction: str | None = None  # None: it stays still
    speed: float = 0.0

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def position(self, frame) -> tuple[np.ndarray, np.ndarray]:
        """Centre at `frame` (a number or an array of them), in pixels on the torus."""
        dx, dy = DIRECTIONS[self.direction] if self.direction else (0, 0)
        frame = np.asarray(frame, dtype=float)
        return (self.x + dx * self.speed * frame) % SIZE, (self.y + dy * self.speed * frame) % SIZE


@dataclass(frozen=True)
class Event:
    """Something that happens to thing number `thing` at `frame`, and is over at frame `until`.

    A thing that appears can be seen in these frames only, one that leaves in all others.
    """

    kind: str
    thing: int
    frame: int
    until: int
    colour: str | None = None  # the passing colour, where the kind is "changes colour"

    def is_on(self, frame) -> np.ndarray:
        """Whether each of the frames is one of the event's."""
        frame = np.asarray(frame)
        return (frame >= self.frame) & (frame < self.until)


@dataclass(frozen=True)
class Scene:
    """All that a clip shows. No two things share a colour; events are in order, things from north
    to south."""

    num_frames: int
    things: tuple[Thing, ...]
    events: tuple[Event, ...] = ()
    background: tuple[int, int, int] = (30, 30, 30)

    def is_visible(self, thing: int, frame) -> np.ndarray:
        """Whether a thing can be seen at each of the frames."""
        frame = np.asarray(frame)
        shown = np.ones(frame.shape, dtype=bool)
        for event in self.events:
            if event.thing == thing and event.kind == "appears":
                shown &= event.is_on(frame)
            if event.thing == thing and event.kind == "leaves":
                shown &= ~event.is_on(frame)
        return shown

    def colours_of(self, thing: int) -> tuple[str, ...]:
        """Every colour that a thing has, in order of time."""
        changed = tuple(
            e.colour for e in self.events if e.thing == thing and e.kind == "changes colour"
        )
        return (self.things[thing].colour, *changed)

    def colour_at(self, thing: int, frame: int) -> str:
        for event in self.events:
            if event.thing == thing and event.kind == "changes colour" and event.is_on(frame):
                return event.colour
        return self.things[thing].colour

    def pairs(self) -> set[tuple[str, str]]:
        """Every shape-colour pair that the clip shows at any time."""
        return {
            (colour, thing.shape)
            for i, thing in enumerate(self.things)
            for colour in self.colours_of(i)
        }

    @property
    def is_still(self) -> bool:
        """Nothing moves and nothing happens: a clip that video training has no use for."""
        return not self.events and not any(thing.direction for thing in self.things)

    def to_dict(self) -> dict:
        return asdict(self)


def torus_distance(a: Thing, b: Thing, frames: np.ndarray) -> np.ndarray:
    """Distance in pixels between two things' centres at each frame, the short way round."""
    (ax, ay), (bx, by) = a.position(frames), b.position(frames)
    dx = (ax - bx + SIZE / 2) % SIZE - SIZE / 2
    dy = (ay - by + SIZE / 2) % SIZE - SIZE / 2
    return np.hypot(dx, dy)


def sample_scene(
    rng: np.random.Generator,
    *,
    pairs=SEEN_PAIRS,
    must_have=None,
    num_things: int | None = None,
    shares=NUM_THINGS_SHARES,
    event_share: float = 0.9,
    kinds=EVENTS,
) -> Scene:
    """Draw a scene: number of things, their looks, motion and events, so that none ever overlap
    and something always moves or happens.

    `pairs` are the shape-colour pairs allowed; `must_have`, where given, is a pool of pairs of
    which one thing takes one; `shares` are those of one, two and three things, where `num_things`
    does not say; events are of one of `kinds`. Rejection of overlapping draws is invariant to a
    shift of the whole scene, so each thing's place stays uniform on the torus whatever its
    direction.
    """
    # Number and sizes are fixed first: redrawing would prefer few and small things.
    sizes = [pick(rng, list(SIZES)) for _ in range(num_things or _draw_number(rng, shares))]
    while True:
        num_frames = int(rng.integers(MIN_SECONDS * FPS, MAX_SECONDS * FPS + 1))
        things = _draw_things(rng, sizes, num_frames)
        if things is None:
            continue
        looks = _draw_looks(rng, pairs, must_have, len(sizes))
        things = [replace(t, colour=c, shape=s) for t, (c, s) in zip(things, looks, strict=True)]
        things.sort(key=lambda thing: (thing.y, thing.x))  # a clip has one caption, not many
        scene = Scene(num_frames, tuple(things), (), draw_background(rng))
        if len(sizes) >= 2 and rng.random() < event_share:
            scene = replace(scene, events=_draw_events(rng, scene, pairs, kinds))
        if not scene.is_still:
            return scene


def pick(rng, items):
    """One of `items`, each as likely; None where there are none."""
    # `rng.choice` would make an array of them each time.
    return items[rng.integers(len(items))] if items else None


def _draw_number(rng, shares) -> int:
    return 1 + int(rng.choice(len(shares), p=shares))


def _draw_things(rng, sizes, num_frames: int) -> list[Thing] | None:
    """Things of these sizes, still without looks; None as soon as two of them would overlap."""
    things, frames = [], np.arange(num_frames)
    for size in sizes:
        direction = pick(rng, list(DIRECTIONS)) if rng.random() < 0.65 else None
        # Under half a width over the clip, however long it lasts: on a torus, more than half of
        # one would look like a step the other way.
        speed = rng.uniform(0.3, 0.45) * SIZE / num_frames if direction else 0.0
        x, y = rng.uniform(0, SIZE, size=2).tolist()
        reaches = [SIZES[size] + SIZES[other.size] + 1 for other in things]
        # Most overlap from the first frame on: seen at once, without an array.
        if any(_is_near(x - o.x, y - o.y, r) for o, r in zip(things, reaches, strict=True)):
            return None
        new = Thing("", "", size, x, y, direction, speed)
        for other, reach in zip(things, reaches, strict=True):
            if torus_distance(new, other, frames).min() <= reach:
                return None
        things.append(new)
    return things


def _is_near(dx: float, dy: float, reach: float) -> bool:
    """Whether an offset is at most `reach` long, the short way round."""
    half = SIZE / 2
    return math.hypot((dx + half) % SIZE - half, (dy + half) % SIZE - half) <= reach


def _draw_looks(rng, pairs, must_have, count: int) -> list[tuple[str, str]]:
    """Colour and shape of each of `count` things, no colour twice, in random order."""
    chosen = [pick(rng, must_have)] if must_have else []
    for index in rng.permutation(len(pairs)).tolist():
        if len(chosen) == count:
            break
        if all(pairs[index][0] != colour for colour, _ in chosen):
            chosen.append(pairs[index])
    return [chosen[index] for index in rng.permutation(count)]


def draw_background(rng) -> tuple[int, int, int]:
    """A dark grey with a tint."""
    return tuple(int(v) for v in rng.integers(15, 60) + rng.integers(-8, 9, size=3))


def _draw_events(rng, scene: Scene, pairs, kinds) -> tuple[Event, ...]:
    """Two events of one kind on two things, each about a fifth of the clip long.

    They pass, and the second begins where the first ends: a frame shows one of them, not which.
    """
    kind = pick(rng, kinds)
    length = rng.uniform(0.2, 0.24)
    start = rng.uniform(0.05, 0.95 - 2 * length)
    taken = {thing.colour for thing in scene.things}
    events = []
    for number, thing in enumerate(rng.permutation(len(scene.things))[:2]):
        colour = None
        if kind == "changes colour":
            shape = scene.things[thing].shape
            free = [c for c, s in pairs if s == shape and c not in taken]
            colour = free[rng.integers(len(free))]
            taken.add(colour)
        begin = start + number * length
        frame, until = (round(at * scene.num_frames) for at in (begin, begin + length))
        events.append(Event(kind, int(thing), frame, until, colour))
    return tuple(events)


def draw_shape(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Coverage in 0..1 of pixels at offsets dx, dy from the centre; edges are smooth."""
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "ring":
        distance = abs(np.hypot(dx, dy) - 0.75 * radius) - 0.25 * radius
    elif shape == "bar":  # lying
        distance = np.maximum(abs(dx) - radius, abs(dy) - 0.4 * radius)
    elif shape == "pillar":  # standing
        distance = np.maximum(abs(dx) - 0.4 * radius, abs(dy) - radius)
    else:
        raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")
    return np.clip(0.5 - distance, 0, 1)


def render(scene: Scene, frames=None) -> np.ndarray:
    """Draw a scene. Returns uint8 RGB, (T, H, W, 3); `frames` picks some, default all."""
    frames = np.arange(scene.num_frames) if frames is None else np.asarray(frames)
    shape = (len(frames), SIZE, SIZE)
    pixels = np.tile(np.float32(scene.background), (len(frames) * SIZE * SIZE, 1))  # (T H W, 3)
    grid = np.arange(SIZE) + 0.5
    for i, thing in enumerate(scene.things):
        x, y = thing.position(frames)
        dx = (grid - x[:, None] + SIZE / 2) % SIZE - SIZE / 2  # (T, W)
        dy = (grid - y[:, None] + SIZE / 2) % SIZE - SIZE / 2  # (T, H)
        reach = SIZES[thing.size] + 0.5  # nothing of it lies farther from its centre
        near = np.flatnonzero((abs(dy) < reach)[:, :, None] & (abs(dx) < reach)[:, None])  # (P,)
        t, row, column = np.unravel_index(near, shape)
        cover = draw_shape(thing.shape, dx[t, column], dy[t, row], SIZES[thing.size])  # (P,)
        cover = (cover * scene.is_visible(i, frames)[t])[:, None]  # (P, 1)
        paint = np.array([COLOURS[scene.colour_at(i, f)] for f in frames], dtype=np.float32)
        below = pixels.take(near, axis=0)  # (P, 3)
        pixels[near] = below + cover * (paint.take(t, axis=0) - below)
    return pixels.round().astype(np.uint8).reshape(*shape, 3)  # (T, H, W, 3)


def place_name(x: float, y: float) -> str:
    """The ninth of the frame that a point lies in: "northwest" ... "centre" ... "southeast"."""
    return PLACES[int(y * 3 // SIZE) * 3 + int(x * 3 // SIZE)]


def is_place_clear(x: float, y: float) -> bool:
    """Whether a centre lies at least CLEAR pixels from every line between two places."""
    cell = SIZE / 3
    return all(min(v % cell, cell - v % cell) >= CLEAR for v in (x, y))
