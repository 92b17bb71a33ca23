"""Commands on datasets and single images."""

from __future__ import annotations

from typing import Annotated

import typer

from skinsynth.cli.app import DatasetFolder, app, path_of, run_folder


@app.command(rich_help_panel="Datasets")
def verify(dataset: DatasetFolder, as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Read all of a dataset: is every planned image there once, none else, and every checksum right? Ends with 1 where not.

    Examples:

    skinsynth verify shards/isic-synthetic

    skinsynth verify shards/isic-train --json | jq .problems
    """
    import json
    import sys

    from skinsynth.data import verify as verifying

    def tell(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {of} shards", end="\n" if done == of else "", file=sys.stderr, flush=True)

    found = verifying.verify(path_of(dataset), tell)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        planned = "" if found.planned is None else f" of {found.planned:,} planned ({found.left_out:,} left out with a reason)"
        typer.echo(f"{dataset}: {found.kind}, {found.images:,} images{planned} in {found.shards:,} shards, {found.bytes:,} bytes")
        shown = found.problems[: verifying.SHOWN]
        more = [f"... and {len(found.problems) - len(shown)} more (--json lists all)"] if len(found.problems) > len(shown) else []
        typer.echo("\n".join([*shown, *more, *found.notes, *([] if found.problems else ["all as it should be"])]))
    raise typer.Exit(int(bool(found.problems)))


@app.command(rich_help_panel="Datasets")
def show(dataset: DatasetFolder, key: Annotated[str, typer.Argument(metavar="KEY", help="for example syn-00412907")],
         picture: Annotated[str | None, typer.Option(metavar="FILE", help="Where to write its JPEG; else KEY.jpg in the present folder.")] = None,
         as_json: Annotated[bool, typer.Option("--json", help="For scripts; writes no picture unless told where.")] = False) -> None:
    """Where an image comes from: prompt, seed, class, weights, what trained them; and the picture itself as a file.

    Examples:

    skinsynth show shards/isic-synthetic syn-00412907

    skinsynth show shards/isic-synthetic syn-00412907 --json | jq '{prompt, seed, weights_sha256}'
    """
    import json

    from skinsynth.data import export as exporting
    from skinsynth.files import write_bytes

    facts, jpeg = exporting.show(path_of(dataset), key)
    if picture or not as_json:
        facts["picture"] = picture or f"{key}.jpg"
        write_bytes(path_of(facts["picture"]), jpeg)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        width = max(map(len, facts))
        typer.echo("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))


@app.command(rich_help_panel="Datasets")
def export(dataset: DatasetFolder, folder: Annotated[str, typer.Argument(metavar="DIR", help="a new folder")],
           form: Annotated[str, typer.Option("--format", help="siim: images/ and metadata.csv in the SIIM-ISIC columns; imagefolder: as Hugging Face "
                                             "datasets reads it")] = "siim",
           only: Annotated[str | None, typer.Option(metavar="FILE", help="Those listed there, for example runs/isic/screen/accepted.json")] = None,
           ) -> None:
    """Write a dataset as plain image files with a table. Mind the inode quota: one file for each image.

    Examples:

    skinsynth export shards/isic-synthetic exported --only runs/isic/screen/accepted.json

    skinsynth export shards/isic-synthetic exported --format imagefolder
    """
    from skinsynth.data import export as exporting
    from skinsynth.errors import UserError
    from skinsynth.files import read_json, sha256_or_none

    if form not in ("siim", "imagefolder"):
        raise UserError(f"--format {form}: expected siim or imagefolder")
    listed = read_json(path_of(only)) if only else None
    if only and not (isinstance(listed, dict) and isinstance(listed.get("keys"), list)):
        raise UserError(f"--only {only}: no such file, or no list of keys as screen writes it (RUN/screen/accepted.json)")
    made_for = (listed or {}).get("manifest_sha256")
    if made_for and made_for != sha256_or_none(path_of(dataset) / "manifest.json"):  # every run's images have the same names
        raise UserError(f"--only {only} says what is accepted of another dataset than {dataset}, or of it before it was made anew: take that run's "
                        "list, or screen again")
    count = exporting.export(path_of(dataset), path_of(folder), form, set(listed["keys"]) if listed is not None else None)
    typer.echo(f"{count:,} images in {folder}")


@app.command(rich_help_panel="Datasets")
def regenerate(dataset: DatasetFolder, keys: Annotated[list[str], typer.Argument(metavar="KEY", help="for example syn-00412907")],
               run: Annotated[str | None, typer.Option(metavar="RUN", help="The run that made it; else as the dataset says.")] = None,
               to: Annotated[str, typer.Option(metavar="DIR", help="Where the PNG files go.")] = ".") -> None:
    """Draw images of a dataset once more, from the same weights and seeds, and compare them with the shards. Ends with 1 where one differs.

    Example: skinsynth regenerate shards/isic-synthetic syn-00412907 syn-00000003 --to again
    """
    from skinsynth import stages
    from skinsynth.errors import UserError
    from skinsynth.files import read_json

    made_by = read_json(path_of(dataset) / "provenance.json")
    if run is None and made_by is None:
        raise UserError(f"{dataset} does not say which run made it: give --run RUN")
    if run is None and not (path_of(made_by["run"]) / "config.yaml").is_file():
        raise UserError(f"the run that made {dataset}, {made_by['run']}, is not there any more: give --run RUN, if it lies elsewhere now")
    folder = run_folder(run or made_by["run"])
    cfg = folder.config()
    stages.before_torch(cfg, folder, "generate")  # the last bits depend on the number of threads
    from skinsynth.data import export as exporting

    for key in keys:
        exporting.show(path_of(dataset), key)  # a misspelt one is told before anything slow
    from skinsynth.stages import generate

    differ = 0
    for key, pixels in generate.regenerate(cfg, folder, keys).items():
        same = generate.save_png(pixels, path_of(to) / f"{key}.png", cfg.generate.quality, exporting.show(path_of(dataset), key)[1])
        told = "the same as in the shard" if same else "NOT the same as in the shard (another kind of device, or number of CPU threads?)"
        typer.echo(f"{path_of(to) / f'{key}.png'}: {told}")
        differ += not same
    raise typer.Exit(int(differ > 0))


@app.command(rich_help_panel="Datasets")
def withdraw(group: Annotated[str, typer.Option("--group", metavar="ID", help="patient or lesion of the metadata, or group of the datasets")],
             shards: Annotated[str, typer.Option(metavar="DIR", help="The datasets.")] = "shards",
             runs: Annotated[str, typer.Option(metavar="DIR", help="The runs.")] = "runs",
             dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what descends from it.")] = False,
             as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """A patient withdraws: say which images, weights and synthetic images descend from them, and mark these so that no stage reads them.

    Images that must stay together (a patient's, of the same lesion, copies) are one group, and all of it is marked.

    Example: skinsynth withdraw --group IP_4698288 --dry-run
    """
    import json
    from dataclasses import asdict

    from skinsynth import withdraw as withdrawing

    found = withdrawing.find(group, path_of(shards), path_of(runs))
    if not dry_run:
        withdrawing.withdraw(group, found, path_of(shards))
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=1))
        return
    for one in found:
        size = "all of it" if one.keys is None else f"{len(one.keys)} samples"
        typer.echo(f"{one.folder}: {one.kind}, " + (f"{size}: {one.why}" if one.why else "of unknown descent: nobody can tell, so it is not marked"))
    marked = [one for one in found if one.why]
    if not marked:
        typer.echo(f"nothing in {shards} and {runs} is known to descend from group {group}" +
                   ("" if dry_run else "; it is noted, and nothing that is prepared there later has them"))
    elif dry_run:
        typer.echo("nothing was marked (--dry-run)")
    else:
        made = ", ".join(sorted({one.folder for one in marked if one.kind in ("latents", "synthetic images")}))
        typer.echo(f"marked in {len(marked)} folders; delete what is to be made again without them (a run's encode, finetune, generate, screen, "
                   f"classify, report{f'; and {made}' if made else ''}), then launch again")
