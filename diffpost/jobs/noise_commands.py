"""`diffpost harvest` and `diffpost train-noise`: from the options to the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from diffpost.jobs.console import bad_input, console, line
from diffpost.jobs.options import hdu_of

__all__ = ["HARVEST_HELP", "TRAIN_NOISE_HELP", "harvest", "train_noise"]

HARVEST_HELP = (
    "[bold]Examples[/bold]\n\n"
    "[green]diffpost harvest field1.fits field2.fits --size 64 --out stamps[/green]\n\n"
    "[green]diffpost harvest mosaic.fits --weight wht.fits --dq dq.fits --bad-bits 1,4096 --out stamps[/green]  a further "
    "field into the same folder\n\n"
    "[green]diffpost train-noise stamps --out runs/noise[/green] learns the noise from them."
)
TRAIN_NOISE_HELP = (
    "[bold]Example[/bold]\n\n"
    "[green]diffpost train-noise stamps --out runs/noise[/green]\n\n"
    "then [green]dp.load_noise('runs/noise/prior', unit='MJy/sr')[/green] is the noise of a likelihood. A killed run goes on with the same command; [green]diffpost info "
    "runs/noise/prior[/green] shows what was found (docs/noise.md)."
)


def harvest(
    images: Annotated[
        list[Path], typer.Argument(help="FITS images, each a field.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the stamps; fields are added.")
    ],
    size: Annotated[int, typer.Option(help="Side of a stamp, pixels.")] = 64,
    field: Annotated[
        str | None, typer.Option(help="Name of the field; default: the file's name.")
    ] = None,
    rms: Annotated[Path | None, typer.Option(help="Map of the standard deviation.")] = None,
    weight: Annotated[Path | None, typer.Option(help="Map of the inverse variance.")] = None,
    dq: Annotated[Path | None, typer.Option(help="Map of data quality flags.")] = None,
    bad_bits: Annotated[
        str | None, typer.Option(help="Flags that are bad, such as 1,4096; default: all.")
    ] = None,
    coverage: Annotated[Path | None, typer.Option(help="Map of exposure or of frames.")] = None,
    min_coverage: Annotated[
        float, typer.Option(help="Least coverage, as a share of its median.")
    ] = 0.8,
    max_masked: Annotated[
        float, typer.Option(help="Share of a stamp that may be without data.")
    ] = 0.02,
    grow: Annotated[int, typer.Option(help="Pixels around a source that are not used.")] = 8,
    hdu: Annotated[str | None, typer.Option(help="HDU of the image, number or name.")] = None,
    plane: Annotated[int | None, typer.Option(help="Image of a cube, from 0.")] = None,
    seed: Annotated[int, typer.Option(help="Of what fills pixels without data.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace stamps of the same field.")
    ] = False,
) -> None:
    """Cut stamps of blank sky from images, to learn an instrument's noise from.

    Sources are masked, flags and coverage honoured, and the median of each stamp is subtracted. Maps and --field go with
    one image; several images without maps are done in one call. The folder holds stamps.npz, positions.csv and
    harvest.json.
    """
    from diffpost.jobs.harvest import add_to_folder
    from diffpost.jobs.harvest import harvest as cut

    with bad_input():
        single = {"--field": field, "--rms": rms, "--weight": weight, "--dq": dq}
        single |= {"--coverage": coverage}
        given = [name for name, value in single.items() if value is not None]
        if len(images) > 1 and given:
            raise ValueError(
                f"got {len(images)} images and {', '.join(given)}; maps and names belong to one image: call once for each"
            )
        for image in images:
            found = cut(
                image,
                size=size,
                field=field,
                rms=rms,
                weight=weight,
                dq=dq,
                bad_bits=None if bad_bits is None else _bits(bad_bits),
                coverage=coverage,
                min_coverage=min_coverage,
                max_masked=max_masked,
                grow=grow,
                hdu=hdu_of(hdu),
                plane=plane,
                seed=seed,
            )
            stamps = add_to_folder(out, found, overwrite=overwrite)
            console().print(f"[bold]{escape(str(image))}[/bold]")
            for note in (*found.notes, *(f"warning: {w}" for w in found.warnings)):
                console().print(line(note))
        console().print(
            f"[bold]{escape(str(out))}[/bold] holds {len(stamps)} stamps of {len(stamps.names)} fields."
        )


def train_noise(
    stamps: Annotated[
        list[Path],
        typer.Argument(help="Folders of `diffpost harvest`, or .npz files.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of settings: network, stages, noise, learning_rate, ..."),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Training crops; default: 100,000.")
    ] = None,
    heldout: Annotated[
        list[str] | None,
        typer.Option(help="Field to hold out; repeat for several. Default: a quarter of them."),
    ] = None,
    per_field: Annotated[
        bool,
        typer.Option(
            "--per-field", help="Bring each field to its own standard deviation: other depths."
        ),
    ] = False,
    drop_suspects: Annotated[
        bool, typer.Option("--drop-suspects", help="Leave out stamps that seem to hold sources.")
    ] = False,
    key: Annotated[str, typer.Option(help="Array of the stamps in an .npz.")] = "stamps",
    field_key: Annotated[
        str, typer.Option(help="Array of the stamps' fields in an .npz.")
    ] = "field",
    unit: Annotated[
        str | None, typer.Option(help="Unit of stamps that state none, as BUNIT.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
) -> None:
    """Learn an instrument's noise from stamps of blank sky, or go on with a run that was stopped."""
    from diffpost.io.stamps import read_stamps
    from diffpost.jobs.train_noise import settings_of
    from diffpost.jobs.train_noise import train_noise as learn

    with bad_input():
        found = read_stamps(stamps, key=key, field_key=field_key, unit=unit)
        learn(
            found,
            out,
            settings=settings_of(config),
            heldout=heldout or None,
            per_field=per_field,
            drop_suspects=drop_suspects,
            images=images,
            seed=seed,
            device=device,
            announce=lambda text: console().print(line(text)),
        )
    console().print(f"The noise model is in [bold]{escape(str(out / 'prior'))}[/bold].")


def _bits(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(" ", "").split(",")]
    except ValueError:
        raise ValueError(
            f"cannot read --bad-bits {text!r}; expected flags such as 1,4096"
        ) from None
