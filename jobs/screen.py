"""Drop broken, blank and copied images; measure the distance to the real ones.

    python -m jobs.screen runs/isic
"""

from skinsynth.stages import main

if __name__ == "__main__":
    main("screen")
