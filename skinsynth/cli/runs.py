"""Commands on configurations and runs."""

from __future__ import annotations

from typing import Annotated

import typer

from skinsynth.cli.app import ConfigFile, Overrides, RunFolder, Stage, app, path_of, run_folder


@app.command()
def launch(config: ConfigFile, overrides: Overrides = None,
           dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the sbatch scripts and submit nothing.")] = False,
           reuse: Annotated[str | None, typer.Option("--reuse", metavar="RUN", help="Take over from this earlier run what would come out the same.")]
           = None,
           until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="End after this stage (or arm, classify/NAME).")]
           = None) -> None:
    """Run the whole chain: prepare, encode, finetune, generate, screen, classify, report.

    The same command again goes on where it stopped. Examples:

    skinsynth launch configs/demo.yaml

    skinsynth launch configs/isic2017.yaml data.metadata=isic/metadata.csv data.images=isic/images run=runs/mine

    skinsynth launch configs/isic2020-sd15.yaml cluster=slurm run=runs/isic

    skinsynth launch configs/isic2020-sd15.yaml cluster=slurm run=runs/isic --dry-run

    skinsynth launch configs/demo.yaml cluster=debug finetune.steps=20 run=runs/try

    skinsynth launch configs/isic2020-sd15.yaml --until screen

    skinsynth launch configs/mine.yaml run=runs/more-arms --reuse runs/mine
    """
    from rich.console import Console

    from skinsynth import config as configs
    from skinsynth import launch as launching
    from skinsynth.errors import UserError

    cfg, console = configs.load(config, overrides), Console()
    earlier = run_folder(reuse) if reuse else None
    if dry_run and earlier:
        raise UserError("--dry-run shows the whole chain, whatever --reuse would take over: give one of them")
    if dry_run:
        typer.echo(launching.dry_run(cfg, until))
        return
    try:
        launching.launch(cfg, console, earlier, until)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    if until not in (None, "report"):
        console.print(f"this was {until} and what it needs; the same command without --until goes on", highlight=False, soft_wrap=True)
    elif cfg.cluster.kind != "slurm":
        console.print(f"report: {cfg.run}/report/index.html", highlight=False, soft_wrap=True)


@app.command()
def status(run: RunFolder, watch: Annotated[bool, typer.Option("--watch", help="Keep it live until the run ends.")] = False,
           as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Where a run is: each stage's state (asked of Slurm), how far, how fast, how long it has to go, and why it failed.

    Examples:

    skinsynth status runs/isic

    skinsynth status runs/isic --watch

    skinsynth status runs/isic --json | jq '.stages[] | {node, state, left}'
    """
    import json

    from rich.console import Console

    from skinsynth import status as states

    folder = run_folder(run)
    found, complaint = states.rows(folder)
    if as_json:
        typer.echo(json.dumps(states.as_json(folder, found, complaint), indent=1))
    elif watch:
        try:
            states.watch(folder, Console())
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    else:
        states.show(Console(), folder, found, complaint)


@app.command()
def logs(run: RunFolder, stage: Stage, task: Annotated[int | None, typer.Option(help="One task of an array.")] = None,
         follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it grows, until Ctrl-C.")] = False) -> None:
    """Print what a stage's latest job said.

    Examples:

    skinsynth logs runs/isic finetune -f

    skinsynth logs runs/isic generate --task 17

    skinsynth logs runs/isic classify/hybrid
    """
    from skinsynth import status as states

    try:
        for text in states.read_log(run_folder(run), stage, task, follow):
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def cancel(run: RunFolder,
           stage: Annotated[str | None, typer.Argument(metavar="STAGE", help="only this one, and what waits for it")] = None) -> None:
    """Stop a run, or one of its stages: its Slurm jobs, or the local launch. What is done is kept; launch again goes on.

    Examples:

    skinsynth cancel runs/isic

    skinsynth cancel runs/isic generate
    """
    from rich.console import Console

    from skinsynth import launch as launching

    launching.cancel(run_folder(run), stage, Console())


@app.command()
def config(config: ConfigFile, overrides: Overrides = None,
           write: Annotated[bool, typer.Option("--write", help="Also make the run folder, for jobs that are submitted by hand.")] = False) -> None:
    """Print the whole configuration, with every default, as a run would get it. Nothing is started.

    Example: skinsynth config configs/demo.yaml finetune.steps=200
    """
    from pathlib import Path

    from skinsynth import config as configs
    from skinsynth.run import RunDir

    cfg = configs.load(config, overrides)
    if write:
        RunDir(Path(cfg.run)).create(cfg)
    typer.echo(configs.dump(cfg), nl=False)


@app.command()
def estimate(config: ConfigFile, overrides: Overrides = None,
             earlier: Annotated[str | None, typer.Option("--from", metavar="RUN", help="Take the speeds that this earlier run measured.")] = None,
             as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """What a run will take, stage by stage, before anything is submitted: images, shards, bytes, hours, time against its limit.

    Speeds come from an earlier run, or from published figures, and each says which. Examples:

    skinsynth estimate configs/isic2020-sd15.yaml cluster=slurm

    skinsynth estimate configs/isic2020-sd15.yaml cluster=slurm --from runs/isic-small

    skinsynth estimate configs/demo.yaml --json | jq '.stages[] | {node, hours, warnings}'
    """
    import json
    from pathlib import Path

    from rich.console import Console

    from skinsynth import config as configs
    from skinsynth import estimate as estimating
    from skinsynth.run import RunDir

    cfg = configs.load(config, overrides)
    found = estimating.estimate(cfg, RunDir(Path(earlier)) if earlier else None)
    if as_json:
        typer.echo(json.dumps(estimating.as_json(cfg, found), indent=1))
    else:
        estimating.show(Console(), cfg, found)


@app.command()
def doctor(config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML file; without one only this machine is looked at")] = None,
           overrides: Overrides = None,
           submit: Annotated[bool, typer.Option("--submit", help="Also look at the compute nodes, by one short Slurm job.")] = False,
           wait: Annotated[float, typer.Option(help="Seconds that this job may take, its time in the queue included.")] = 600,
           checksums: Annotated[bool, typer.Option("--checksums", help="Also read all shards that are there and compare their sha256.")] = False,
           as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Find out what would keep a run from working here: one line for each check, and what to do. Ends with 1 where one fails.

    Examples:

    skinsynth doctor

    skinsynth doctor configs/isic2020-sd15.yaml cluster=slurm

    skinsynth doctor configs/isic2020-sd15.yaml cluster=slurm --submit --wait 1800
    """
    import json
    from dataclasses import asdict

    from skinsynth.doctor import check, login
    from skinsynth.doctor import submit as job
    from skinsynth.errors import UserError

    if submit and not config:
        raise UserError("--submit needs a CONFIG, for the resources of finetune and for the folders to look at")
    found, cfg = login.login(config, overrides, checksums)
    if not as_json:
        typer.echo("\n".join(map(str, found)))
    try:
        on_nodes = job.look(cfg, wait, lambda line: typer.echo(line, err=True)) if submit and cfg else []
    except KeyboardInterrupt:
        typer.echo("stopped; the job is cancelled", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found + on_nodes], indent=1))
    elif on_nodes:
        typer.echo("\n".join(map(str, job.together(on_nodes))))
    raise typer.Exit(int(check.failed(found + on_nodes)))


@app.command()
def report(runs: Annotated[list[str], typer.Argument(metavar="RUN", help="one run folder, or several to compare")],
           to: Annotated[str, typer.Option(metavar="DIR", help="Where the page of several runs goes.")] = "comparison") -> None:
    """Write the report of a run as it is now, unfinished or not; or one page that compares several runs.

    Examples:

    skinsynth report runs/isic

    skinsynth report runs/isic runs/isic-lora runs/derm-t2im --to runs/compared
    """
    from skinsynth.run import Task

    folders = [run_folder(run) for run in runs]
    if len(folders) > 1:
        from skinsynth.pages import several

        typer.echo(several.reports([folder.path for folder in folders], path_of(to)))
        return
    from skinsynth.stages import report as reporting

    reporting.report(folders[0].config(), folders[0], Task())
    typer.echo(folders[0].path / "report" / "index.html")


@app.command()
def pull(config: ConfigFile, overrides: Overrides = None) -> None:
    """Fetch the base model and the classifier of a configuration into the local Hugging Face cache, where there is internet.

    What is there already is not fetched again, and of a repository only what is read. Examples:

    skinsynth pull configs/isic2020-sd15.yaml

    skinsynth pull configs/isic2020-sd15.yaml model.base=owner/name
    """
    from skinsynth import config as configs
    from skinsynth.models import hub

    hub.pull(configs.load(config, overrides), typer.echo)
