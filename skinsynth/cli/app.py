"""What all commands share: the application, the arguments that many take, and paths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from skinsynth.run import RunDir

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="From a small, unbalanced set of dermoscopy images to a large, screened one, and to a report that says whether it helped.")

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/demo.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="changes to it, for example finetune.steps=200 run=runs/mine")]

RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="run folder, for example runs/isic")]
DatasetFolder = Annotated[str, typer.Argument(metavar="DATASET", help="dataset folder, for example shards/isic-synthetic")]
Stage = Annotated[str, typer.Argument(metavar="STAGE", help="for example finetune or classify/hybrid")]


def version(wanted: bool) -> None:
    if wanted:
        from skinsynth import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def path_of(path: str) -> Path:
    from pathlib import Path

    return Path(path)


def run_folder(path: str) -> RunDir:
    from pathlib import Path

    from skinsynth.run import RunDir

    run = RunDir(Path(path))
    run.config()  # says so where this is no run folder
    return run
