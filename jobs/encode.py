"""Encode the chosen training images and all prompts once.

    python -m jobs.encode runs/isic
"""

from skinsynth.stages import main

if __name__ == "__main__":
    main("encode")
