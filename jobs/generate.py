"""Draw the planned synthetic images into shards.

    python -m jobs.generate runs/isic --task 3/16
"""

from skinsynth.stages import main

if __name__ == "__main__":
    main("generate")
