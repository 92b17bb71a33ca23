"""Train one arm's classifier.

    python -m jobs.classify runs/isic --arm hybrid
"""

from skinsynth.stages import main

if __name__ == "__main__":
    main("classify")
