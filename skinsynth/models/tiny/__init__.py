"""The built-in base model: a small Stable Diffusion in diffusers layout, trained on drawn lesions only (see README.md)."""
from pathlib import Path

WEIGHTS: Path = Path(__file__).parent / "weights"
