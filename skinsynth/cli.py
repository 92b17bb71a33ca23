"""The command line. Everything heavy is imported where it is used: ``--help`` answers at once, and nothing here loads torch."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="From a small, unbalanced set of dermoscopy images to a large, screened one, and to a report that says whether it helped.")

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/demo.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changes to it, for example finetune.steps=200 run=runs/mine")]


def version(wanted: bool) -> None:
    if wanted:
        from skinsynth import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


@app.command()
def launch(config: ConfigFile, overrides: Overrides = None) -> None:
    """Run the whole chain: prepare, encode, finetune, generate, screen, classify, report.

    The same command again goes on where it stopped. Examples:

    skinsynth launch configs/demo.yaml

    skinsynth launch configs/isic2017.yaml data.metadata=isic/metadata.csv data.images=isic/images run=runs/mine

    skinsynth launch configs/demo.yaml cluster=debug finetune.steps=20 run=runs/try
    """
    from rich.console import Console

    from skinsynth import config as configs
    from skinsynth.launch import launch as start

    console = Console()
    try:
        path = start(configs.load(config, overrides), console)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


@app.command()
def config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the whole configuration, with every default, as a run would get it. Nothing is started.

    Example: skinsynth config configs/demo.yaml finetune.steps=200
    """
    from skinsynth import config as configs

    typer.echo(configs.dump(configs.load(config, overrides)), nl=False)


def main() -> None:
    from skinsynth.errors import UserError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is a Ctrl-C
    try:
        app()
    except UserError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from None
