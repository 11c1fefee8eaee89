"""The command line: it parses, calls the library, and says what happened.

Exit codes: 0 done; 2 bad input or nothing may be written, told on stderr, nothing written over;
130 interrupted, finished draws kept for --resume.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from diffpost.jobs import bench_command, imaging_command, noise_commands, options
from diffpost.jobs.console import bad_input, console, keeping
from diffpost.jobs.options import Inference, hdu_of, plain

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
        "[green]diffpost lens lens.fits --psf psf.fits --noise rms.fits --model lens.yaml --out lens[/green]  "
        "reconstructs the source behind a gravitational lens, and the lens.\n\n"
        "[green]diffpost image target.uvfits --cell 0.03 --size 64 --out target[/green]  images the visibilities of an "
        "interferometer.\n\n"
        "[green]diffpost calibrate --operator psf:1.5 --noise-std 0.03 --out check[/green]  tests whether the "
        "draws' scatter may be believed, for your prior, PSF and noise.\n\n"
        "[green]diffpost info galaxies-64[/green]  says what the prior has seen and what it should not "
        "be used for."
    ),
    epilog="Exit codes: 0 done, 2 bad input (nothing written over), 130 interrupted (--resume goes on).",
)


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


@app.command(
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "A galaxy at pixel (512, 480), 64 pixels wide; noise and sky are measured:\n\n"
        "[green]diffpost deconvolve field.fits --psf star.fits --cutout 512,480,64 --out m51[/green]\n\n"
        "By position, with an rms map, at twice the sampling:\n\n"
        "[green]diffpost deconvolve field.fits --psf psf.fits --noise rms.fits "
        "--center 3.5866 -30.3892 --size 96 --oversample 2 --out spiral[/green]\n\n"
        "With noise learned from the instrument's blank sky (diffpost train-noise):\n\n"
        "[green]diffpost deconvolve field.fits --psf psf.fits --noise-model runs/f115w --cutout 351,222,48 "
        "--out faint[/green]\n\n"
        "The maps carry the world coordinates of the image; run.json records what was inferred."
    )
)
def deconvolve(
    image: options.Image,
    psf: options.PsfImage,
    out: options.RequiredOut,
    noise: options.Noise = None,
    noise_std: options.NoiseStd = None,
    weight: options.Weight = None,
    noise_model: options.NoiseModel = None,
    sky_std: options.SkyStd = None,
    cutout: options.Cutout = None,
    center: options.Center = None,
    size: options.Size = None,
    oversample: options.Oversample = 1,
    prior: options.Prior = options.PRIOR,
    samples: options.Draws = options.DRAWS,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    moves: options.Moves = None,
    batch_size: options.Batch = options.BATCH,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    hdu: options.Hdu = None,
    plane: options.Plane = None,
    psf_plane: options.PsfPlane = None,
    psf_oversample: options.PsfOversample = None,
    psf_background: options.PsfBackground = None,
    keep_psf_center: options.KeepPsfCenter = False,
    background: options.Background = "smooth",
    keep_neighbours: options.KeepNeighbours = False,
    exptime: options.Exptime = None,
    psf_error: options.PsfError = 0.0,
    scale: options.Scale = None,
) -> None:
    """Posterior samples of the image behind IMAGE: blur and noise taken out, uncertainty kept."""
    arguments = {key: plain(value) for key, value in locals().items()}
    with bad_input():
        _one_of(noise=noise, noise_std=noise_std, weight=weight, noise_model=noise_model)
        target: dict[str, Any] = {
            "cutout": None if cutout is None else _parse_cutout(cutout),
            "center": center,
            "size": size,
            "oversample": oversample,
            "hdu": hdu_of(hdu),
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
            "weight": weight,
            "noise_model": noise_model,
            "sky_std": sky_std,
        }
        _run(
            image,
            psf,
            noise if noise is not None else noise_std,
            target,
            Inference(prior, samples, seed, steps, batch_size, resume, overwrite),
            out=out,
            arguments=arguments,
            title=image.name,
            moves=moves,
        )


@app.command()
def demo(
    target: Annotated[
        str, typer.Option(help="spiral or dwarf, both of HST's Abell 2744 field (F105W).")
    ] = "spiral",
    out: options.Out = None,
    prior: options.Prior = options.PRIOR,
    samples: options.Draws = options.DRAWS,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    batch_size: options.Batch = options.BATCH,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Deconvolve a shipped HST galaxy: the spiral of Abell 2744, whole, at native sampling.

    Neighbours are masked by the same rule as anywhere (segments of a deblended detection that are not
    the target's, grown by 3 pixels) and shown hatched in summary.png; the cluster's diffuse light is
    subtracted as a smooth background.
    """
    from diffpost.jobs.demo import demo_target

    arguments = {key: plain(value) for key, value in locals().items() if key != "demo_target"}
    with bad_input():
        chosen = demo_target(target)
        _run(
            chosen.image,
            chosen.psf,
            chosen.noise,
            chosen.keywords,
            Inference(prior, samples, seed, steps, batch_size, resume, overwrite),
            out=out or Path(f"diffpost-demo-{target}"),
            arguments=arguments,
            title=chosen.title,
        )


@app.command(
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "A prior of 32 x 32 pixels under a Gaussian PSF of 1.5 pixels, with the controls that show what the "
        "tests would find:\n\n"
        "[green]diffpost calibrate --prior galaxies-32 --operator psf:1.5 --noise-std 0.03 --controls "
        "--out check[/green]\n\n"
        "Your own PSF, binned by two, a fifth of the pixels lost, held-out images as truths:\n\n"
        "[green]diffpost calibrate --prior runs/mine/prior --psf star.fits --operator bin:2,mask:0.2 "
        "--noise-std 0.05 --truths heldout.npy --out mine[/green]\n\n"
        "[i]check/report.html[/i] explains what was found; [i]check/verdict.json[/i] has the p-values."
    )
)
def calibrate(
    noise_std: options.ModelNoise,
    out: options.RequiredOut,
    operator: options.Operators = None,
    psf: options.CalibrationPsf = None,
    prior: options.Prior = options.SMALL_PRIOR,
    size: options.ModelSize = None,
    simulations: options.Simulations = options.SIMULATIONS,
    samples: options.Draws = options.CALIBRATION_DRAWS,
    truths: options.Truths = None,
    truth_steps: options.TruthSteps = options.TRUTH_STEPS,
    method: options.Method = options.RECOMMENDED,
    steps: options.Steps = None,
    controls: options.Controls = False,
    level: options.Level = 0.05,
    seed: options.Seed = 0,
    batch_size: options.Batch = options.CALIBRATION_BATCH,
    device: options.Device = "cpu",
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Test whether posterior draws are calibrated, on data simulated from known truths.

    Truths are drawn from the prior, seen through the operator with noise, and each is compared with the
    posterior draws that its data give: do error bars of 68% hold the truth in 68% of cases, at every level,
    for the image, its flux, peak and size? Takes as long as simulations x samples draws; it can be
    interrupted, and goes on with --resume.
    """
    given = dict(locals())
    with bad_input():
        from diffpost.jobs.calibration import CalibrationPlan, run_calibration
        from diffpost.jobs.outputs import OutputFolder

        folder = OutputFolder(out, record="verdict.json")
        folder.check(overwrite=overwrite, resume=resume)
        places = ("out", "resume", "overwrite")
        plan = CalibrationPlan(**{name: v for name, v in given.items() if name not in places})
        arguments = {name: plain(value) for name, value in given.items()}
        with keeping(folder):
            run_calibration(plan, folder, console(), sys.argv, arguments, resume=resume)


@app.command(
    epilog=(
        "[bold]The lens model[/bold]\n\n"
        "[green]mass: {main: {profile: SIE, q: {uniform: [0.3, 1]}, phi: {circular: 3.14159}, Rein: {uniform: [1, 2]}}}[/green]\n\n"
        "and, if wanted, the lens' own light, [green]light: {bulge: {profile: Sersic, centre: main, n: 4, "
        "Re: {lognormal: [1, 0.5]}, flux: {lognormal: [500, 1]}}}[/green]; [green]pixel: 0.05[/green], [green]mask: {inner: 0.3, outer: 2.5}[/green], "
        "[green]source: {size: 64, pixel: 0.025}[/green], [green]oversample: 2[/green] (docs/lensing.md); lengths in "
        "arcsec.\n\n"
        "[bold]Example[/bold]\n\n"
        "[green]diffpost lens lens.fits --psf psf.fits --noise rms.fits --cutout 140,140,120 --model lens.yaml "
        "--out lens[/green]\n\n"
        "[i]lens/summary.png[/i] and [i]lens/corner.png[/i] are the pictures, [i]lens/parameters.csv[/i] the table, "
        "[i]lens/source_samples.fits[/i] the draws."
    )
)
def lens(
    image: options.Image,
    psf: options.PsfImage,
    model: options.LensModelFile,
    out: options.RequiredOut,
    noise: options.Noise = None,
    noise_std: options.NoiseStd = None,
    weight: options.Weight = None,
    cutout: options.Cutout = None,
    center: options.Center = None,
    size: options.Size = None,
    mask: options.LensMask = None,
    prior: options.Prior = options.PRIOR,
    samples: options.Draws = options.DRAWS,
    chains: options.Chains = options.CHAINS,
    draws: options.ChainDraws = options.CHAIN_DRAWS,
    warmup: options.Warmup = None,
    restarts: options.Restarts = options.RESTARTS,
    turns: options.Turns = 0,
    fixed: options.Fixed = False,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    batch_size: options.Batch = options.BATCH,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    hdu: options.Hdu = None,
    plane: options.Plane = None,
    psf_plane: options.PsfPlane = None,
    background: options.Background = "none",
    exptime: options.Exptime = None,
    psf_error: options.PsfError = 0.0,
) -> None:
    """Posterior samples of the source behind a gravitational lens, and of the lens.

    Parameters of the lens are those of the YAML file --model: profiles of caustics, each parameter a number or a prior. Its
    own light is fitted where the file has a section `light`; otherwise it must have been subtracted from IMAGE.
    """
    given = dict(locals())
    with bad_input():
        from diffpost.jobs.lens_command import run_lens
        from diffpost.jobs.outputs import OutputFolder

        _one_of(noise=noise, noise_std=noise_std, weight=weight)
        folder = OutputFolder(out)
        folder.check(overwrite=overwrite, resume=resume)
        if cutout is not None:
            given["cutout"] = _parse_cutout(cutout)
        arguments = {name: plain(value) for name, value in given.items()}
        with keeping(folder):
            run_lens(given, folder, console(), sys.argv, arguments, resume=resume)


app.command(epilog=imaging_command.IMAGE_HELP)(imaging_command.image)


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

    screen = console()
    with bad_input():
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
    screen.print(table)


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
    seed: Annotated[
        int | None, typer.Option(help="Seed of the run; default: the one of --config, or 0.")
    ] = None,
) -> None:
    """Train a prior on your own images, or go on with a run that was stopped."""
    from diffpost.jobs.train import train_config
    from diffpost.training import train as train_prior

    with bad_input():
        train_prior(train_config(data, config, seed), out, device=device)
    console().print(f"The prior is in [bold]{escape(str(out / 'prior'))}[/bold].")


app.command(epilog=noise_commands.HARVEST_HELP)(noise_commands.harvest)
app.command("train-noise", epilog=noise_commands.TRAIN_NOISE_HELP)(noise_commands.train_noise)
app.command()(bench_command.bench)


# The job ----------------------------------------------------------------------------------------


def _run(
    image: Path,
    psf: Path,
    noise: Path | float | None,
    target: dict[str, Any],
    inference: Inference,
    *,
    out: Path,
    arguments: dict[str, Any],
    title: str,
    moves: int | None = None,
) -> None:
    from diffpost.jobs.outputs import OutputFolder

    screen = console()
    folder = OutputFolder(out)
    folder.check(overwrite=inference.overwrite, resume=inference.resume)

    from diffpost.deconvolve import load, solve
    from diffpost.jobs.outputs import run_record
    from diffpost.jobs.problem import prepare
    from diffpost.jobs.report import report
    from diffpost.jobs.setup import set_up

    start = time.perf_counter()
    model = load(inference.prior)
    setup = set_up(prepare(image, psf, noise, **target), model)
    for note in setup.problem.notes:
        screen.print(f"[dim]·[/dim] {escape(note)}")
    prepared = time.perf_counter() - start
    with keeping(folder):
        checkpoint = folder.start(resume=inference.resume)
        result = solve(
            setup,
            samples=inference.samples,
            steps=inference.steps,
            moves=moves,
            seed=inference.seed,
            batch_size=inference.batch_size,
            checkpoint=checkpoint,
            prepared=prepared,
            title=title,
            announce=lambda text: screen.print(f"[dim]·[/dim] {escape(text)}"),
        )
        inputs = {"image": str(image), "psf": str(psf)}
        for name, path in (("noise", noise), ("weight", target.get("weight"))):
            if isinstance(path, Path):
                inputs[name] = str(path)
        record = run_record(
            result, command=sys.argv, arguments=arguments, inputs=inputs, prior=inference.prior
        )
        folder.write(result, record)
    report(screen, result, folder.path)


def _one_of(**noises: Any) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in noises.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"got {' and '.join(given)}; give one of them")


def _parse_cutout(text: str) -> tuple[float, float, int]:
    parts = text.replace(" ", "").split(",")
    try:
        x, y, size = parts
        return float(x), float(y), int(size)
    except ValueError:
        raise ValueError(
            f"cannot read --cutout {text!r}; expected x,y,size in pixels, such as 512,480,64"
        ) from None


def main() -> None:
    """Entry point of the `diffpost` command."""
    app()


if __name__ == "__main__":
    main()
