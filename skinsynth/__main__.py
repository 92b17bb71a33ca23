"""``python -m skinsynth`` is the ``skinsynth`` command."""

from skinsynth.cli import main

if __name__ == "__main__":
    main()
