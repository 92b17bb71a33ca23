"""The command line. Everything heavy is imported where it is used: ``--help`` answers at once, and nothing here loads torch."""

from __future__ import annotations

import typer

from skinsynth import signals
from skinsynth.cli import datasets, runs  # noqa: F401  their commands
from skinsynth.cli.app import app


def main() -> None:
    import os

    from skinsynth.errors import UserError

    red = None if os.environ.get("NO_COLOR") else "red"
    signals.listen()
    try:
        app()
    except UserError as error:
        typer.secho(f"error: {error}", fg=red, err=True)
        raise SystemExit(1) from None
    except OSError as error:
        from skinsynth.stages import explain

        typer.secho(f"error: {explain(error)}", fg=red, err=True)
        raise SystemExit(1) from None
