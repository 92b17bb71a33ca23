"""The ``skinsynth`` command, and ``python -m skinsynth``."""


def main() -> None:
    """Imports inside: a Ctrl-C while they go on is as quiet as one later."""
    try:
        from skinsynth import cli

        cli.main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
