"""Train one arm's classifier.

    python -m jobs.classify runs/isic --arm hybrid --seed 0
"""

from skinsynth.stages import main

if __name__ == "__main__":
    main("classify")
