"""Drawn dermoscopy images whose truth is known: for the demo, the tests and the built-in base model."""
from skinsynth.data.phantom.dataset import write_dataset
from skinsynth.data.phantom.draw import draw
from skinsynth.data.phantom.lesion import Lesion, caption, log_likelihood_ratio, sample_broad, sample_lesion

__all__ = ["Lesion", "caption", "draw", "log_likelihood_ratio", "sample_broad", "sample_lesion", "write_dataset"]
