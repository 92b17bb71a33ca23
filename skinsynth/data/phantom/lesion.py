"""What a drawn lesion is: its parameters, how they are sampled, their likelihood ratio and their words.

Benign and malignant lesions differ in the four ABCD features and in nothing else: asymmetry, border irregularity, colours
and diameter. Each feature comes from a unit-variance normal whose mean is shifted by `SHIFT` between the classes; the colour
under all others, by which a small classifier sees most, comes with other odds (`GROUND`). So the likelihood ratio is known
exactly (`log_likelihood_ratio`); with it the best possible classifier has an AUROC of about 0.95.
"""
import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

SHIFT = {"asymmetry": 1.0, "irregularity": 1.1, "colours": 1.0, "diameter": 1.0}  # malignant minus benign, in std
COLOUR_EDGES = (-1.0, -0.1, 0.7, 1.4, 2.1)  # between 1, 2, ... 6 colours, in std around the middle of the classes
MEDIAN_DIAMETER = 6.5  # mm; dermatologists' rule of thumb for the D of ABCD is 6 mm
# How much of the skin's red, green and blue light each lesion colour lets through (white scatters back more than skin).
COLOURS = {
    "tan": (0.84, 0.70, 0.55), "light brown": (0.68, 0.49, 0.36), "dark brown": (0.41, 0.26, 0.19),
    "red": (0.86, 0.50, 0.48), "black": (0.17, 0.13, 0.14), "blue-grey": (0.41, 0.45, 0.55), "white": (1.04, 1.12, 1.16),
}
COLOUR_WEIGHTS = (0.2, 0.3, 0.27, 0.08, 0.06, 0.05, 0.04)
# Odds of the ground colour (tan, light brown, dark brown, red) of benign lesions, of malignant ones, and of the broad kind;
# nobody has a lesion that is white all over.
GROUND = {0: (0.36, 0.42, 0.18, 0.04), 1: (0.12, 0.24, 0.46, 0.18), None: (0.25, 0.37, 0.28, 0.1)}
SKIN_NAMES = ("very light", "light", "medium", "tan", "brown", "dark")


@dataclass(frozen=True)
class Lesion:
    """What `draw` draws. Amounts without a unit lie in 0..1."""
    asymmetry: float       # A: of outline and of colour
    irregularity: float    # B: notches and scallops of the border
    colours: tuple[str, ...]  # C: keys of COLOURS, the ground colour first
    diameter: float        # D: mm
    field: float           # mm that the image's height shows
    x: float               # centre, in image heights from the middle, to the right
    y: float               # centre, in image heights from the middle, downwards
    aspect: float          # short axis / long axis, 0.55..1
    angle: float           # of the long axis, radians
    sharpness: float       # of the border: 0 fades out, 1 ends abruptly
    density: float         # of the pigment, 0.5..1.4; 1 gives the colours of COLOURS
    network: float         # pigment network: brown mesh
    globules: float        # round brown clods
    streaks: float         # radial lines at the border
    skin: float            # tone: 0 very light, 1 dark
    redness: float         # of the skin
    warmth: float          # of the light, -1 bluish..1 yellowish
    shade: float           # unevenness of the light
    hairs: int
    vignette: float        # 0 none, 1 a small round view
    ruler: bool
    bubbles: int           # of the immersion gel


def sample_lesion(rng: Generator, target: int) -> Lesion:
    """A benign (0) or malignant (1) lesion; only the four ABCD features depend on `target`."""
    z = {name: rng.normal((target - 0.5) * shift) for name, shift in SHIFT.items()}
    return Lesion(
        asymmetry=_sigmoid(z["asymmetry"]), irregularity=_sigmoid(z["irregularity"]),
        colours=_pick_colours(rng, 1 + int(np.searchsorted(COLOUR_EDGES, z["colours"])), GROUND[target]),
        diameter=MEDIAN_DIAMETER * math.exp(0.3 * z["diameter"]), field=14.0,
        x=rng.normal(0, 0.06), y=rng.normal(0, 0.04), **_sample_look(rng),
        hairs=int(rng.integers(3, 30)) if rng.random() < 0.3 else 0,
        vignette=rng.uniform(0.2, 1) if rng.random() < 0.3 else 0.0,
        ruler=bool(rng.random() < 0.2), bubbles=int(rng.integers(2, 9)) if rng.random() < 0.12 else 0,
    )


def sample_broad(rng: Generator) -> Lesion:
    """A lesion from wide, flat ranges, close up and without a class: what the base model learns from."""
    diameter = rng.uniform(2, 14)
    return Lesion(
        asymmetry=rng.beta(1.1, 1.5), irregularity=rng.beta(1.1, 1.7),
        colours=_pick_colours(rng, int(rng.choice(6, p=(0.2, 0.27, 0.23, 0.15, 0.1, 0.05))) + 1, GROUND[None]),
        diameter=diameter, field=diameter / rng.uniform(0.3, 0.85),
        x=rng.normal(0, 0.03), y=rng.normal(0, 0.03), **_sample_look(rng),
        hairs=int(rng.integers(2, 14)) if rng.random() < 0.08 else 0,
        vignette=rng.uniform(0, 0.6) if rng.random() < 0.06 else 0.0,
        ruler=False, bubbles=int(rng.integers(1, 5)) if rng.random() < 0.04 else 0,
    )


def log_likelihood_ratio(lesion: Lesion) -> float:
    """log p(lesion | malignant) / p(lesion | benign), exact for `sample_lesion`: the score of the best possible classifier."""
    z = {"asymmetry": _logit(lesion.asymmetry), "irregularity": _logit(lesion.irregularity),
         "diameter": math.log(lesion.diameter / MEDIAN_DIAMETER) / 0.3}
    edges = (-math.inf, *COLOUR_EDGES, math.inf)
    low, high, half = edges[len(lesion.colours) - 1], edges[len(lesion.colours)], SHIFT["colours"] / 2
    count = math.log((_normal_cdf(high - half) - _normal_cdf(low - half)) / (_normal_cdf(high + half) - _normal_cdf(low + half)))
    ground = list(COLOURS).index(lesion.colours[0])
    return sum(SHIFT[name] * value for name, value in z.items()) + count + math.log(GROUND[1][ground] / GROUND[0][ground])


def caption(lesion: Lesion) -> str:
    """The visible attributes in words, e.g. "a dermoscopy image of a large dark brown skin lesion with irregular border ..."."""
    size = ("small", "medium-sized", "large")[int(np.searchsorted((4.5, 8.0), lesion.diameter))]
    signs = [f"{_grade(lesion.irregularity, 'regular', 'slightly irregular', 'irregular')} border"]
    signs += ["asymmetric shape"] if lesion.asymmetry > 0.6 else ["symmetric shape"] if lesion.asymmetry < 0.35 else []
    signs += ["sharp edge"] if lesion.sharpness > 0.7 else ["fading edge"] if lesion.sharpness < 0.3 else []
    signs += [f"{len(lesion.colours)} colours"] if len(lesion.colours) > 2 else []
    signs += [name for name, amount in (("pigment network", lesion.network), ("globules", lesion.globules),
                                        ("streaks", lesion.streaks), ("hair", lesion.hairs)) if amount > 0.35]
    listed = ", ".join(signs[:-1]) + " and " + signs[-1] if len(signs) > 1 else signs[0]
    skin = SKIN_NAMES[round(lesion.skin * (len(SKIN_NAMES) - 1))]
    return f"a dermoscopy image of a {size} {' and '.join(lesion.colours[:3])} skin lesion with {listed} on {skin} skin"


def _sample_look(rng: Generator) -> dict[str, float]:
    """Everything that says nothing about the class."""
    def sometimes(p: float) -> float:
        return rng.uniform(0.4, 1) if rng.random() < p else rng.uniform(0, 0.3)
    return {
        "aspect": rng.uniform(0.6, 1), "angle": rng.uniform(0, math.pi), "sharpness": rng.beta(1.6, 1.6),
        "density": rng.uniform(0.6, 1.3), "network": sometimes(0.45), "globules": sometimes(0.3), "streaks": sometimes(0.15),
        "skin": rng.beta(1.1, 2.4), "redness": rng.beta(1.3, 2), "warmth": float(np.clip(rng.normal(0, 0.45), -1, 1)),
        "shade": rng.uniform(0, 1)}


def _pick_colours(rng: Generator, count: int, odds: tuple[float, ...]) -> tuple[str, ...]:
    names = list(COLOURS)
    ground = names[rng.choice(len(odds), p=odds)]
    rest = [i for i, name in enumerate(names) if name != ground]
    weights = np.array(COLOUR_WEIGHTS)[rest]
    return (ground, *(names[i] for i in rng.choice(rest, count - 1, replace=False, p=weights / weights.sum())))


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _normal_cdf(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def _grade(value: float, low: str, middle: str, high: str) -> str:
    return low if value < 0.35 else middle if value < 0.6 else high
