"""Cut the metadata and images into split, cropped, cleaned shards.

    python -m jobs.prepare runs/isic --task 0/4
"""

from skinsynth.stages import main

if __name__ == "__main__":
    main("prepare")
