"""python -m skinsynth.data.phantom shards/phantom-raw --images 700 --seed 0"""
import argparse
from pathlib import Path

from skinsynth.data.phantom.dataset import write_dataset


def main() -> None:
    parser = argparse.ArgumentParser(prog="skinsynth.data.phantom", description="Draw an ISIC-like dataset whose truth is known.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=700)
    parser.add_argument("--malignant", type=float, default=0.25, help="share of malignant lesions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--height", type=int, default=144)
    parser.add_argument("--width", type=int, default=192)
    options = parser.parse_args()
    try:
        write_dataset(**vars(options))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
    print(f"{options.images} images, {options.folder / 'metadata.csv'}")


if __name__ == "__main__":
    main()
