"""The command line: it parses, calls the library, and says what happened.

Exit codes: 0 done; 2 bad input or nothing may be written, told on stderr, nothing written over;
130 interrupted, finished draws kept for --resume.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["app", "main"]

app = typer.Typer(
    name="diffpost",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Posterior samples of what is behind a blurred, noisy image, with a prior learned from "
        "galaxies.\n\n"
        "[bold]Start here[/bold]\n\n"
        "[green]diffpost demo[/green]  deconvolves a spiral galaxy of the shipped HST images, in "
        "minutes, into [i]diffpost-demo-spiral/[/i].\n\n"
        "[green]diffpost deconvolve galaxy.fits --psf star.fits --cutout 512,480,64 --out m51[/green]  "
        "does your own: [i]m51/summary.png[/i] is the picture, [i]m51/samples.fits[/i] the draws.\n\n"
        "[green]diffpost info galaxies-64[/green]  says what the prior has seen and what it should not "
        "be used for."
    ),
    epilog="Exit codes: 0 done, 2 bad input (nothing written over), 130 interrupted (--resume goes on).",
)

_INTERRUPTED = 130
_BAD_INPUT = 2
_BATCH = 4  # draws at once: more are not faster on a CPU, and a batch is what an interruption loses


def _console(stderr: bool = False) -> Console:
    # Made when needed: the streams may have been replaced, as tests do.
    return Console(stderr=stderr, soft_wrap=True, highlight=False)


@contextlib.contextmanager
def _bad_input() -> Iterator[None]:
    """What the user can mend ends with one paragraph and exit code 2, not with a traceback."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename and str(error.filename) not in text:
            text = f"{text}: {error.filename}"
        _console(stderr=True).print(f"[bold red]error:[/bold red] {escape(text)}")
        raise typer.Exit(_BAD_INPUT) from error


def _version(wanted: bool) -> None:
    if wanted:
        from diffpost._version import __version__

        typer.echo(f"diffpost {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# Options that deconvolve and demo share.
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the results.")]
Prior = Annotated[
    str, typer.Option(help="Name of a shipped prior, or a folder.", rich_help_panel="Inference")
]
Draws = Annotated[
    int,
    typer.Option("--samples", "-n", min=1, help="Posterior draws.", rich_help_panel="Inference"),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0, help="Seed: the same seed gives the same draws.", rich_help_panel="Inference"
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Noise levels of the sampler; default: the library's.",
        rich_help_panel="Inference",
    ),
]
Batch = Annotated[
    int,
    typer.Option(
        "--batch-size",
        min=1,
        help="Draws computed together; changes no draw.",
        rich_help_panel="Inference",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace results in --out, once the new ones are complete."),
]


@app.command(
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "A galaxy at pixel (512, 480), 64 pixels wide; noise and sky are measured:\n\n"
        "[green]diffpost deconvolve field.fits --psf star.fits --cutout 512,480,64 --out m51[/green]\n\n"
        "By position, with an rms map, at twice the sampling:\n\n"
        "[green]diffpost deconvolve field.fits --psf psf.fits --noise rms.fits "
        "--center 3.5866 -30.3892 --size 96 --oversample 2 --out spiral[/green]\n\n"
        "The maps carry the world coordinates of the image; run.json records what was inferred."
    )
)
def deconvolve(
    image: Annotated[Path, typer.Argument(help="FITS image, linear in flux.", show_default=False)],
    psf: Annotated[
        Path,
        typer.Option(
            help="FITS image of a star or a PSF.", show_default=False, rich_help_panel="PSF"
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results.", show_default=False)
    ],
    noise: Annotated[
        Path | None,
        typer.Option(
            help="FITS map of the standard deviation; inf and NaN mask pixels.",
            rich_help_panel="Noise",
        ),
    ] = None,
    noise_std: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of every pixel. Neither: from the header or the sky.",
            rich_help_panel="Noise",
        ),
    ] = None,
    cutout: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y,SIZE",
            help="Centre (pixels from 0; DS9 counts from 1) and width in pixels.",
            rich_help_panel="Target",
        ),
    ] = None,
    center: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="RA DEC",
            help="Centre in degrees, or 00:14:20.0 -30:23:16.",
            rich_help_panel="Target",
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Width of the cutout in pixels.", rich_help_panel="Target")
    ] = None,
    oversample: Annotated[
        int,
        typer.Option(
            min=1, help="Model pixels per image pixel, along a side.", rich_help_panel="Target"
        ),
    ] = 1,
    prior: Prior = "galaxies-64",
    samples: Draws = 16,
    seed: Seed = 0,
    steps: Steps = None,
    batch_size: Batch = _BATCH,
    resume: Resume = False,
    overwrite: Overwrite = False,
    hdu: Annotated[
        str | None, typer.Option(help="HDU of the image, number or name.", rich_help_panel="Target")
    ] = None,
    plane: Annotated[
        int | None, typer.Option(help="Image of a cube, from 0.", rich_help_panel="Target")
    ] = None,
    psf_plane: Annotated[
        int | None, typer.Option(help="Image of a PSF cube, from 0.", rich_help_panel="PSF")
    ] = None,
    psf_oversample: Annotated[
        float | None,
        typer.Option(
            help="PSF pixels per image pixel; default: from the headers.", rich_help_panel="PSF"
        ),
    ] = None,
    psf_background: Annotated[
        float | None,
        typer.Option(
            help="Sky in the PSF image; default: median of its border if significant.",
            rich_help_panel="PSF",
        ),
    ] = None,
    keep_psf_center: Annotated[
        bool,
        typer.Option(
            "--keep-psf-center",
            help="Do not move the PSF's centroid to its centre.",
            rich_help_panel="PSF",
        ),
    ] = False,
    background: Annotated[
        str,
        typer.Option(
            help="What to subtract as sky: smooth, constant or none.", rich_help_panel="Target"
        ),
    ] = "smooth",
    keep_neighbours: Annotated[
        bool,
        typer.Option(
            "--keep-neighbours",
            help="Model the neighbours, do not mask them.",
            rich_help_panel="Target",
        ),
    ] = False,
    exptime: Annotated[
        float | None,
        typer.Option(
            help="Exposure time (s) for the Poisson noise of images in electrons/s.",
            rich_help_panel="Noise",
        ),
    ] = None,
    psf_error: Annotated[
        float,
        typer.Option(
            help="Error of the PSF as a fraction of the local flux, added to the noise; 0.01 to 0.03 "
            "suits a star in an undersampled image.",
            rich_help_panel="PSF",
        ),
    ] = 0.0,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Flux per model pixel that the prior calls 1; default: inferred.",
            rich_help_panel="Target",
        ),
    ] = None,
) -> None:
    """Posterior samples of the image behind IMAGE: blur and noise taken out, uncertainty kept."""
    arguments = {key: _plain(value) for key, value in locals().items()}
    with _bad_input():
        if noise is not None and noise_std is not None:
            raise ValueError("got --noise and --noise-std; give one of them")
        target: dict[str, Any] = {
            "cutout": None if cutout is None else _parse_cutout(cutout),
            "center": center,
            "size": size,
            "oversample": oversample,
            "hdu": int(hdu) if hdu is not None and hdu.lstrip("-").isdigit() else hdu,
            "plane": plane,
            "psf_plane": psf_plane,
            "psf_oversample": psf_oversample,
            "psf_background": psf_background,
            "recentre_psf": not keep_psf_center,
            "background": background,
            "keep_neighbours": keep_neighbours,
            "exptime": exptime,
            "psf_error": psf_error,
            "scale": scale,
        }
        _run(
            image,
            psf,
            noise if noise is not None else noise_std,
            target,
            out=out,
            prior=prior,
            samples=samples,
            seed=seed,
            steps=steps,
            batch_size=batch_size,
            resume=resume,
            overwrite=overwrite,
            arguments=arguments,
            title=image.name,
        )


@app.command()
def demo(
    target: Annotated[
        str, typer.Option(help="spiral or dwarf, both of HST's Abell 2744 field (F105W).")
    ] = "spiral",
    out: Out = None,
    prior: Prior = "galaxies-64",
    samples: Draws = 16,
    seed: Seed = 0,
    steps: Steps = None,
    batch_size: Batch = _BATCH,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Deconvolve a shipped HST galaxy: the spiral of Abell 2744, whole, at native sampling.

    Neighbours are masked by the same rule as anywhere (segments of a deblended detection that are not
    the target's, grown by 3 pixels) and shown hatched in summary.png; the cluster's diffuse light is
    subtracted as a smooth background.
    """
    from diffpost.jobs.demo import demo_target

    arguments = {key: _plain(value) for key, value in locals().items() if key != "demo_target"}
    with _bad_input():
        chosen = demo_target(target)
        _run(
            chosen.image,
            chosen.psf,
            chosen.noise,
            chosen.keywords,
            out=out or Path(f"diffpost-demo-{target}"),
            prior=prior,
            samples=samples,
            seed=seed,
            steps=steps,
            batch_size=batch_size,
            resume=resume,
            overwrite=overwrite,
            arguments=arguments,
            title=chosen.title,
        )


@app.command()
def info(
    prior: Annotated[str, typer.Argument(help="Name of a shipped prior, or a folder.")],
    config: Annotated[
        bool, typer.Option("--config", help="Also the settings of its training.")
    ] = False,
) -> None:
    """What a prior was trained on, what its scale means, and what it should not be used for."""
    from diffpost.io.checkpoints import load_prior
    from diffpost.jobs.report import readable

    console = _console()
    with _bad_input():
        model = load_prior(prior)
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("prior", escape(prior))
    table.add_row(
        "images", f"{tuple(model.shape)}; sides divisible by {getattr(model, 'stride', 1)}"
    )
    table.add_row("process", escape(repr(model.sde)))
    net = getattr(model, "net", None)
    if net is not None:
        table.add_row("parameters", f"{sum(p.numel() for p in net.parameters()):,}")
    for key, value in (getattr(model, "card", None) or {}).items():
        if key == "training" and isinstance(value, dict) and not config:
            value = {k: v for k, v in value.items() if k != "config"}
        table.add_row(escape(str(key)), escape(readable(value)))
    console.print(table)


@app.command(
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "[green]diffpost train images/ --out runs/mine[/green]  a folder of FITS, PNG, JPEG or TIFF, or "
        "an .npy, .npz, HDF5 or zarr file\n\n"
        "[green]diffpost train images/ --out runs/mine --config mine.yaml[/green]  network, crops and "
        "length of the run from a file; the shipped priors' own are in diffpost/priors/*/config.yaml\n\n"
        "A killed run goes on with the same command. [green]diffpost info runs/mine/prior[/green] shows "
        "the result."
    )
)
def train(
    data: Annotated[Path, typer.Argument(help="Training images.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the run.", show_default=False)
    ],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
) -> None:
    """Train a prior on your own images, or go on with a run that was stopped."""
    from diffpost.jobs.train import train_config
    from diffpost.training import train as train_prior

    with _bad_input():
        train_prior(train_config(data, config, seed), out, device=device)
    _console().print(f"The prior is in [bold]{escape(str(out / 'prior'))}[/bold].")


# The job ----------------------------------------------------------------------------------------


def _run(
    image: Path,
    psf: Path,
    noise: Path | float | None,
    target: dict[str, Any],
    *,
    out: Path,
    prior: str,
    samples: int,
    seed: int,
    steps: int | None,
    batch_size: int,
    resume: bool,
    overwrite: bool,
    arguments: dict[str, Any],
    title: str,
) -> None:
    from diffpost.jobs.outputs import OutputFolder

    console = _console()
    folder = OutputFolder(out)
    folder.check(overwrite=overwrite, resume=resume)

    from diffpost.deconvolve import load, sampler_of, solve
    from diffpost.jobs.outputs import run_record
    from diffpost.jobs.problem import prepare
    from diffpost.jobs.report import report

    start = time.perf_counter()
    model = load(prior)
    problem = prepare(image, psf, noise, **target)
    for note in problem.notes:
        console.print(f"[dim]·[/dim] {escape(note)}")
    prepared = time.perf_counter() - start
    try:
        checkpoint = folder.start(resume=resume)
        result = solve(
            problem,
            model,
            samples=samples,
            sampler=None if steps is None else sampler_of(steps),
            seed=seed,
            batch_size=batch_size,
            checkpoint=checkpoint,
            prepared=prepared,
            title=title,
            announce=lambda text: console.print(f"[dim]·[/dim] {escape(text)}"),
        )
        inputs = {"image": str(image), "psf": str(psf)}
        if isinstance(noise, Path):
            inputs["noise"] = str(noise)
        record = run_record(
            result, command=sys.argv, arguments=arguments, inputs=inputs, prior=prior
        )
        folder.write(result, record)
    except OSError as error:
        raise folder.explain(error) from None
    except KeyboardInterrupt:
        kept = f"finished draws are kept in {folder.partial}"
        command = shlex.join(["diffpost", *(a for a in sys.argv[1:] if a != "--resume")])
        _console(stderr=True).print(
            f"\n[bold yellow]interrupted:[/bold yellow] {escape(kept)}; go on with\n  "
            f"{escape(command)} --resume"
        )
        raise typer.Exit(_INTERRUPTED) from None
    report(console, result, folder.path)


def _parse_cutout(text: str) -> tuple[float, float, int]:
    parts = text.replace(" ", "").split(",")
    try:
        x, y, size = parts
        return float(x), float(y), int(size)
    except ValueError:
        raise ValueError(
            f"cannot read --cutout {text!r}; expected x,y,size in pixels, such as 512,480,64"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def main() -> None:
    """Entry point of the `diffpost` command."""
    app()


if __name__ == "__main__":
    main()
