"""What a calibration writes: the verdict, the pictures, the numbers, and a page that explains them.

verdict.json      each test's p-value and decision, the controls, sizes of what is wrong, and what
                  made them: arguments, seeds, hashes, versions
report.html       one page for a browser, with the pictures inside
coverage.png ranks.png
simulations.npz   what was kept of each simulation, from which everything above follows
"""

from __future__ import annotations

import base64
import json
import math
import platform
import re
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffpost._version import __version__
from diffpost.jobs.outputs import file_hash, versions
from diffpost.jobs.simulations import MISFIT, NARROWER, SHIFT, WIDER

if TYPE_CHECKING:
    from diffpost.calibrate import Calibration, Test

__all__ = ["FAULTS", "html_page", "verdict", "write_calibration"]

FAULTS = {
    "wider": f"{WIDER - 1:.0%} too wide",
    "narrower": f"{1 - NARROWER:.0%} too narrow",
    "shifted": f"shifted by {SHIFT:g} standard deviations",
    "prior": "draws of the prior, data ignored",
}
_ASKS = {
    "coverage": "Do regions that claim to hold the truth with probability α hold it in a share α of cases? "
    "Regions are balls about a point made from the data.",
    "total flux": "Is the true total flux as often below a draw's as above, at every level?",
    "peak": "The same for the brightest pixel.",
    "half-light radius": "The same for the radius that holds half of the light.",
    MISFIT: "Does the truth fit its data as well as the draws do (χ²)? Draws that ignore the data, or fit "
    "their noise, are found out here.",
}


def write_calibration(
    result: Calibration,
    folder: Path,
    *,
    command: list[str] | None = None,
    arguments: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    prior: str | None = None,
    operator: tuple[str, ...] = (),
) -> None:
    """Write every product into an existing folder, verdict.json last.

    command, arguments: of the command line; inputs: name -> path of files that were read; prior: its
    name; operator: what it does, in words.
    """
    from diffpost import plot

    pictures = {"coverage.png": folder / "coverage.png", "ranks.png": folder / "ranks.png"}
    plot.coverage(result.coverage, path=pictures["coverage.png"])
    plot.ranks(result.ranks, names=list(result.experiment.names), path=pictures["ranks.png"])
    arrays: dict[str, Any] = {name: values.numpy() for name, values in result.record.items()}
    np.savez(folder / "simulations.npz", **arrays)
    record = verdict(
        result,
        command=command,
        arguments=arguments,
        inputs=inputs,
        prior=prior,
        operator=operator,
    )
    images = {name: path.read_bytes() for name, path in pictures.items()}
    (folder / "report.html").write_text(html_page(record, images), encoding="utf-8")
    (folder / "verdict.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def verdict(
    result: Calibration,
    *,
    command: list[str] | None = None,
    arguments: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    prior: str | None = None,
    operator: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What was found and what made it, as JSON values; the same arguments and versions reproduce it."""
    from diffpost.deconvolve import prior_hash

    run = result.experiment
    card = getattr(run.prior, "card", None) or {}
    ratio, spread = result.error_over_spread
    truth_chi2, draws_chi2 = result.reduced_chi2
    seconds = result.timings.get("sample", 0.0)
    made = int(result.timings.get("simulations", 0))
    return {
        "calibrated": result.calibrated,
        "level": result.level,
        "correction": "Holm, over the tests of this run",
        "tests": [asdict(test) for test in result.tests],
        "controls": {
            name: {"rejected": _any(tests), "tests": [asdict(test) for test in tests]}
            for name, tests in result.controls.items()
        },
        "sizes": {
            "error_over_spread": [_number(ratio), _number(spread)],
            "offsets": {
                name: {"mean": _number(mean), "rms": _number(rms)}
                for name, (mean, rms) in result.offsets().items()
            },
            "reduced_chi2": {"truths": _number(truth_chi2), "draws": _number(draws_chi2)},
        },
        "coverage": {
            "alpha": result.coverage.alpha.tolist(),
            "ecp": result.coverage.ecp.tolist(),
        },
        "simulations": result.simulations,
        "samples": run.samples,
        "seed": run.seed,
        "prior": {
            "name": prior or card.get("name") or type(run.prior).__name__,
            "sha256": prior_hash(run.prior),
            "shape": list(run.prior.shape),
        },
        "truths": "drawn from the prior" if run.truths is None else run.truths_hash(),
        "truth_sampler": repr(run.truth_sampler) if run.truths is None else None,
        "operator": {"repr": repr(run.operator), "words": list(operator)},
        "noise": repr(run.noise),
        "real_operator": repr(run.real_operator) if run.real_operator is not run.operator else None,
        "real_noise": repr(run.real_noise) if run.real_noise is not run.noise else None,
        "guidance": repr(run.guidance),
        "sampler": repr(run.sampler),
        "calls_per_draw": result.calls,
        "jacobian_products_per_draw": result.vjps,
        "batch_size": run.batch_size,
        "seconds_per_simulation": _number(seconds / made) if made else None,
        "diffpost": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "arguments": arguments or {},
        "inputs": {
            name: {"path": path, "sha256": file_hash(path) if Path(path).is_file() else None}
            for name, path in (inputs or {}).items()
        },
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": str(run.prior.device),
        },
    }


def _any(tests: tuple[Test, ...]) -> bool:
    return any(test.rejected for test in tests)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# The page -------------------------------------------------------------------------------------

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b1b1f;background:#fff;max-width:60rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.6rem;margin:0 0 .5rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.verdict{padding:.8rem 1rem;border-left:.4rem solid;margin:1rem 0;font-size:1.05rem}
.good{border-color:#1f7a4d;background:#eef7f1}.bad{border-color:#b3261e;background:#fbeeed}
table{border-collapse:collapse;width:100%;margin:.5rem 0}th,td{text-align:left;vertical-align:top;
padding:.3rem .8rem .3rem 0;border-bottom:1px solid #ddd}th{font-weight:600}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.no{color:#b3261e;font-weight:600}.dim{color:#5f5f68}figure{margin:1rem 0}img{max-width:100%}
figcaption{color:#5f5f68;font-size:.92em}code,pre{font-size:.88em}pre{white-space:pre-wrap;
background:#f5f5f7;padding:.6rem}
@media print{body{margin:0;font-size:12px}}
"""


def html_page(record: dict[str, Any], images: dict[str, bytes]) -> str:
    """The page of a verdict, with the PNG pictures inside."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'><title>Is it calibrated?</title>",
        f"<style>{_STYLE}</style></head><body>",
        "<h1>Are these posterior draws calibrated?</h1>",
        _headline(record),
        "<h2>What was done</h2>",
        _setup(record),
        "<h2>What the tests say</h2>",
        _tests(record),
        _figure(
            images["coverage.png"],
            "Expected coverage",
            "Credibility that a region claims, and the share of simulations whose truth it holds. The regions are "
            "balls about a point near the truth that is made from the data alone. Exact draws follow the diagonal "
            "and stay in the grey band. A curve above it: the draws lie farther out than the truths, being too "
            "wide, displaced, or deaf to the data. Below it: they lie closer in than the truths, being too "
            "narrow.",
        ),
        _figure(
            images["ranks.png"],
            "Ranks of the truths among their draws",
            "Flat where calibrated. A heap in the middle: error bars too large. Heaps at both ends: too small. "
            "A slope: the draws are too high (truths at low ranks) or too low. Of the misfit: at low ranks the draws "
            "fit worse than the truth, at high ranks they fit the noise.",
        ),
        "<h2>How large is what is wrong</h2>",
        _sizes(record),
        "<h2>What this number of simulations would have found</h2>",
        _controls(record),
        "<h2>What cannot be seen here</h2>",
        _blind(record),
        "<h2>Making it again</h2>",
        _again(record),
        "</body></html>",
    ]
    return "\n".join(parts)


def _headline(record: dict[str, Any]) -> str:
    rejected = [test for test in record["tests"] if test["rejected"]]
    own = record["truths"] == "drawn from the prior"
    who = "the draws" if own else "prior and draws together"
    if not rejected:
        text = (
            f"<b>Nothing wrong was found</b> with {who} in {record['simulations']} simulations: no test "
            f"rejects at a level of {record['level']:g} for all of them together."
        )
        caught = [c["rejected"] for c in record["controls"].values()]
        if caught:
            text += (
                f" The same tests reject {sum(caught)} of {len(caught)} sets of draws that were made wrong "
                "on purpose (below)."
            )
        return f"<p class='verdict good'>{text}</p>"
    names = ", ".join(
        f"{escape(t['name'])} (p {escape(_relation(t['p_value']))})" for t in rejected
    )
    text = (
        f"<b>Not calibrated.</b> {len(rejected)} of {len(record['tests'])} tests reject {who} at a level of "
        f"{record['level']:g} for all of them together: {names}."
    )
    if not own:
        text += (
            " The truths do not come from the prior, so it may be the prior that is wrong for them; the "
            "same run without --truths judges the sampler alone."
        )
    return f"<p class='verdict bad'>{text}</p>"


def _setup(record: dict[str, Any]) -> str:
    own = record["truths"] == "drawn from the prior"
    height, width = record["prior"]["shape"][-2:]
    origin = (
        f"draws of the prior itself, by a finer integrator ({_code(str(record['truth_sampler']))})"
        if own
        else "images that were given (--truths), not draws of the prior"
    )
    words = ", then ".join(record["operator"]["words"]) or record["operator"]["repr"]
    intro = (
        f"<p>{record['simulations']} times, a true image was taken, seen through the instrument, and noise "
        f"added. From these data alone, {record['samples']} posterior draws were made. If they are what they "
        "claim to be, nobody could tell the truth from one more draw: it lies among them at random.</p>"
    )
    rows = [
        ("truths", origin),
        ("prior", f"{escape(record['prior']['name'])}, {width} × {height} pixels"),
        ("instrument", escape(words)),
        ("noise", _noise(record)),
        (
            "method",
            f"{_code(record['guidance'])}, {_code(record['sampler'])}, "
            f"{record['calls_per_draw']} network evaluations a draw",
        ),
    ]
    for key, name in (("real_operator", "instrument"), ("real_noise", "noise")):
        if record[key] is not None:
            rows.append(
                (f"true {name}", f"<code>{escape(record[key])}</code>, not what was assumed")
            )
    return intro + _table([f"<th>{a}</th><td>{b}</td>" for a, b in rows])


def _noise(record: dict[str, Any]) -> str:
    std = record["arguments"].get("noise_std")
    return (
        _code(record["noise"])
        if std is None
        else f"white, standard deviation {std:g} in units of the prior's scale"
    )


def _tests(record: dict[str, Any]) -> str:
    rows = [
        "<th>test</th><th>question</th><th class='n'>p</th><th class='n'>adjusted</th><th></th>"
    ]
    for test in record["tests"]:
        asks = _ASKS.get(test["name"], "Does the truth lie among the draws at random?")
        said = "<span class='no'>rejected</span>" if test["rejected"] else "passed"
        rows.append(
            f"<td>{escape(test['name'])}</td><td class='dim'>{escape(asks)}</td>"
            f"<td class='n'>{escape(_p(test['p_value']))}</td><td class='n'>{escape(_p(test['adjusted']))}</td><td>{said}</td>"
        )
    note = (
        "<p class='dim'>p: the chance that exact draws look as bad or worse. Adjusted: by Holm's method for the "
        f"number of tests; rejected where that is at most {record['level']:g}, which happens to exact draws "
        f"in at most {record['level']:.0%} of runs.</p>"
    )
    return _table(rows) + note


def _sizes(record: dict[str, Any]) -> str:
    sizes = record["sizes"]
    ratio, error = sizes["error_over_spread"]
    chi2 = sizes["reduced_chi2"]
    rows = [
        "<th></th><th class='n'>found</th><th class='n'>calibrated</th>",
        "<td>error of the mean image over what the draws' scatter claims (rms over pixels)</td>"
        f"<td class='n'>{_value(ratio)} ± {_value(error)}</td><td class='n'>1</td>",
        "<td>χ² a datum, of the draws</td>"
        f"<td class='n'>{_value(chi2['draws'], 3)}</td><td class='n'>{_value(chi2['truths'], 3)} (the truths')</td>",
    ]
    spread = record["simulations"] ** -0.5
    for name, z in sizes["offsets"].items():
        if name != MISFIT:
            rows.append(
                f"<td>{escape(name)}: truth − mean, in standard deviations of the draws: mean, rms</td>"
                f"<td class='n'>{_value(z['mean'])}, {_value(z['rms'])}</td>"
                f"<td class='n'>0 ± {spread:.2f}, about 1</td>"
            )
    return _table(rows)


def _controls(record: dict[str, Any]) -> str:
    if not record["controls"]:
        return (
            "<p>Not tried. With <code>--controls</code> draws that are wrong on purpose are judged by the same "
            "tests, which shows how large a fault has to be to be found.</p>"
        )
    names = [test["name"] for test in record["tests"]]
    rows = ["<th>draws made wrong</th>" + "".join(f"<th class='n'>{escape(n)}</th>" for n in names)]
    missed = []
    for control, found in record["controls"].items():
        by_name = {test["name"]: test for test in found["tests"]}
        cells = []
        for name in names:
            test = by_name.get(name)
            if test is None:
                cells.append("<td class='n dim'>blind</td>")
                continue
            text = escape(_p(test["p_value"]))
            cells.append(f"<td class='n'>{f'<b>{text}</b>' if test['rejected'] else text}</td>")
        if not found["rejected"]:
            missed.append(FAULTS[control])
        rows.append(f"<td>{escape(FAULTS[control])}</td>{''.join(cells)}")
    end = (
        f"<p class='no'>Not found in {record['simulations']} simulations: {escape('; '.join(missed))}. A fault of "
        "that size may hide here; make more simulations.</p>"
        if missed
        else f"<p>Each of these faults is found in {record['simulations']} simulations.</p>"
    )
    if not record["calibrated"]:
        end = (
            "<p>As the draws are rejected before they are spoilt, this says little about what else would have been "
            "found.</p>"
        )
    return (
        "<p>The same draws, spoilt by a known amount, and the p-values that they get; bold: rejected. Blind: "
        "a statistic of the image alone cannot tell the prior from the posterior.</p>"
        + _table(rows)
        + end
    )


def _blind(record: dict[str, Any]) -> str:
    own = record["truths"] == "drawn from the prior"
    items = [
        "A wrong instrument. Data were simulated with the PSF and the noise that the posterior assumes; real "
        "data may have others.",
        "What moves none of the statistics above and changes no distance much, such as faults in a few pixels.",
        "Single objects. Coverage holds on average over the truths: it can be too small for one kind and too "
        "large for another.",
        "Faults smaller than the controls that were found.",
    ]
    if record["real_operator"] is not None or record["real_noise"] is not None:
        items[0] = "Faults of the instrument other than the one that was simulated."
    if own:
        items.insert(
            0,
            "A wrong prior. Truths were drawn from the prior itself, so this judges the sampler alone; real "
            "galaxies may differ from the prior. <code>--truths</code> with held-out images judges both.",
        )
        items.insert(
            1,
            f"Errors that truths and draws share: both come from the same network, the truths by "
            f"{_code(str(record['truth_sampler']))}.",
        )
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _again(record: dict[str, Any]) -> str:
    import shlex

    given = record["command"]
    line = "" if not given else f"<pre>{escape(shlex.join(['diffpost', *given[1:]]))}</pre>"
    versions_ = ", ".join(f"{escape(k)} {escape(v)}" for k, v in record["versions"].items())
    return (
        f"{line}<p class='dim'>diffpost {record['diffpost']}, seed {record['seed']}, prior SHA-256 "
        f"{record['prior']['sha256'][:16]}…, {versions_}, {escape(record['machine']['platform'])}, "
        f"{escape(record['created'])}. Everything is in verdict.json; simulations.npz holds the fraction and "
        "the ranks of each simulation.</p>"
    )


def _table(rows: list[str]) -> str:
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _figure(image: bytes, name: str, text: str) -> str:
    data = base64.b64encode(image).decode()
    return (
        f"<figure><img alt='{escape(name)}' src='data:image/png;base64,{data}'>"
        f"<figcaption><b>{escape(name)}.</b> {escape(text)}</figcaption></figure>"
    )


def _code(text: str) -> str:
    """An object's description without the settings that were left alone."""
    return f"<code>{escape(re.sub(r'(, )?[a-z_]+=None', '', text))}</code>"


def _relation(value: float) -> str:
    text = _p(value)
    return text if text.startswith("<") else f"= {text}"


def _p(value: float) -> str:
    if value < 1e-12:
        return "< 1e-12"
    return f"{value:.1e}" if value < 1e-3 else f"{value:.2g}"


def _value(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
