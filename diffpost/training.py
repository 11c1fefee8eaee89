r"""Denoising score matching, killed and resumed at will.

A clean image x_0 is disturbed to u = x_0 + nu z and the network learns to undo it,

    L = E [ w(nu) |D(u; nu) - x_0|^2 ],   w(nu) = (nu^2 + d^2) / (nu d)^2

(Vincent 2011; weighting and preconditioning of Karras et al. 2022, arXiv:2206.00364, table 1).  The
minimiser is the posterior mean E[x_0 | u] at every noise level, hence the score by Tweedie's formula.

Every random number of training image g is a function of (seed, g), so the state of a run is the
network, its average (EMA), the optimizer and one counter.  It is written atomically; a run killed at
any moment continues as if nothing had happened.  Several processes share a batch through torchrun.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import tempfile
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch_ema import ExponentialMovingAverage

from diffpost.diagnostics.misspecification import CARD_KEY as REFERENCE_KEY
from diffpost.diagnostics.misspecification import heldout_reference
from diffpost.networks import build_network
from diffpost.networks.denoising_error import CARD_KEY as ERROR_KEY
from diffpost.networks.denoising_error import denoising_error
from diffpost.networks.precondition import NetworkScore
from diffpost.random import normal
from diffpost.sde import sde_from_dict
from diffpost.training_config import Stage, TrainConfig, Turn
from diffpost.training_data import CropStream
from diffpost.training_loss import NOISE_STREAM, denoising_loss, noise_levels
from diffpost.training_progress import TrainingBar, append_row, truncate_rows

__all__ = ["TrainConfig", "Trainer", "train"]


@dataclass(frozen=True)
class _Batch:
    first: int
    images: Tensor
    turn: Turn


@final
class Trainer:
    """A training run in a folder.

    Parameters
    ----------
    config: what to train on what.
    out: folder of the run; made when missing, continued when it holds a checkpoint.
    device: where to train.

    Raises
    ------
    ValueError: for a folder that holds a run of another configuration, a checkpoint that cannot be
        read, or bfloat16 on a CPU that emulates it.
    """

    def __init__(
        self, config: TrainConfig, out: str | os.PathLike[str], *, device: str = "cpu"
    ) -> None:
        from diffpost.io.checkpoints import RESERVED

        if taken := sorted(set(config.card) & {*RESERVED, "training", ERROR_KEY, REFERENCE_KEY}):
            raise ValueError(f"card: the name {', '.join(taken)} is taken; rename it")
        self.config = config
        self.out = Path(out)
        self.device = torch.device(device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self._mixed = _mixed_precision(config.precision, self.device)
        self.crops = CropStream(config.data, config.seed)
        self._check_turns()
        self.heldout = CropStream(config.heldout, config.seed) if config.heldout else None

        torch.manual_seed(config.seed)
        self.net = build_network(config.network).to(self.device)
        if self.device.type == "cpu":
            self.net = self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
        )
        self.ema = ExponentialMovingAverage(self.net.parameters(), decay=config.ema)
        self.step = 0
        self.seen = 0
        self.seen_before = 0
        self._measured: dict[str, Any] = {}
        self._stop = False
        self.out.mkdir(parents=True, exist_ok=True)
        if self.checkpoint_path.exists():
            self._restore()
        elif config.init is not None:
            self._initialise(config.init)
        if self.rank == 0:  # also without a checkpoint: a run may be killed before its first
            for name in ("loss.csv", "heldout.csv"):
                truncate_rows(self.out / name, self.seen)
        self._ddp: nn.Module = (
            nn.parallel.DistributedDataParallel(self.net) if self.world > 1 else self.net
        )

    def _check_turns(self) -> None:
        """Raise before hours are spent, not when a turn comes."""
        for stage in self.config.stages:
            for turn in stage.steps:
                self.crops.check(turn.only)
                if turn.batch % self.world:
                    raise ValueError(
                        f"got a batch of {turn.batch} for {self.world} processes; it must be divisible by their "
                        "number"
                    )

    # The run -------------------------------------------------------------------------------------

    @property
    def checkpoint_path(self) -> Path:
        return self.out / "checkpoint.pt"

    @property
    def total(self) -> int:
        """Training images of the whole run."""
        return sum(stage.images for stage in self.config.stages)

    def stage(self, seen: int) -> tuple[Stage, int]:
        """The stage that training image number `seen` belongs to, and its number in the stage."""
        start = 0
        for stage in self.config.stages:
            if seen < start + stage.images:
                break
            start += stage.images
        return stage, seen - start

    def run(self, *, progress: bool = True, max_steps: int | None = None) -> NetworkScore:
        """Train until every stage is done, or `max_steps` more steps; returns the EMA prior."""
        config = self.config
        previous = self._catch_signals()
        saved = time.monotonic()
        stop_at = None if max_steps is None else self.step + max_steps
        try:
            with ThreadPoolExecutor(1) as pool, self._bar(progress) as bar:
                pending: Future[_Batch] | None = None
                while self.seen < self.total and not self._stop:
                    if stop_at is not None and self.step >= stop_at:
                        break
                    future = pending or pool.submit(self._load, self.seen)
                    batch = future.result()
                    before = self.seen
                    pending = pool.submit(self._load, before + batch.turn.batch)
                    row = self._update(batch)
                    self._log("loss.csv", row)
                    bar(self.seen, row["loss"])
                    crossed = self.seen // config.validate_every != before // config.validate_every
                    if crossed:
                        self.validate()
                    if self._agree(time.monotonic() - saved > config.checkpoint_seconds):
                        self.save()
                        saved = time.monotonic()
                if pending is not None:
                    pending.result()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.save()
        if self.seen >= self.total:
            self._measure()
            self.save()
        return self.prior()

    def _load(self, seen: int) -> _Batch:
        """This process' share of the batch that starts at training image `seen`."""
        stage, offset = self.stage(seen)
        turn = stage.turn(offset)
        share = turn.batch // self.world
        first = seen + self.rank * share
        return _Batch(first, self.crops.batch(first, share, turn.crop, turn.only), turn)

    def _update(self, batch: _Batch) -> dict[str, Any]:
        config = self.config
        numbers = torch.arange(batch.first, batch.first + len(batch.images))
        nsr = noise_levels(batch.turn.noise or config.noise, config.seed, numbers)
        noise = normal(config.seed, numbers, 0, tuple(batch.images.shape[1:]), stream=NOISE_STREAM)
        rate = self._learning_rate(self.stage(self.seen)[0])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.net.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed):
            loss = denoising_loss(
                self._ddp,
                batch.images.to(self.device),
                nsr.to(self.device),
                noise.to(self.device),
                config.sigma_data,
            ).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), config.clip)
        mean_loss = self._mean(loss.detach())
        if not bool(torch.isfinite(norm)):
            raise FloatingPointError(
                f"the gradient is not finite at step {self.step} (loss {mean_loss}); the last "
                f"checkpoint in {self.out} is sound: lower learning_rate, or look for wild pixels "
                "in the data, and start again"
            )
        self.optimizer.step()
        self.ema.update()
        self.step += 1
        self.seen += batch.turn.batch
        return {
            "step": self.step,
            "images": self.seen,
            "crop": batch.turn.crop,
            "loss": mean_loss,
            "gradient": float(norm),
            "learning_rate": rate,
        }

    def _learning_rate(self, stage: Stage) -> float:
        """Linear warm-up, then inverse square root decay, then a linear end to zero."""
        config = self.config
        rate = (stage.learning_rate or config.learning_rate) * min(
            1.0, (self.step + 1) / max(config.warmup, 1)
        )
        rate /= max(1.0, self.seen / config.decay_images) ** 0.5
        left = (self.total - self.seen) / max(config.cooldown * self.total, 1)
        return rate * min(1.0, max(left, 0.0))

    # What comes out ------------------------------------------------------------------------------

    def prior(self, card: dict[str, Any] | None = None) -> NetworkScore:
        """The averaged network as a score model, in the units that the configuration's scale gives."""
        net = build_network(self.config.network)
        net.load_state_dict(self._averaged())
        crop = self.config.stages[-1].crop
        return NetworkScore(
            net,
            sde_from_dict(self.config.sde),
            (self.crops.channels, crop, crop),
            self.config.sigma_data,
            scale=self.config.scale,
            card={
                **self.config.card,
                **self._measured,
                "training": {
                    "images_seen": self.seen_before + self.seen,
                    "images_seen_by_init": self.seen_before,
                    "frames": len(self.crops),
                    "heldout_frames": 0 if self.heldout is None else len(self.heldout),
                    "config": self.config.to_public_dict(),
                    "heldout_loss": self._last_heldout(),
                },
                **(card or {}),
            },
        )

    def validate(self) -> dict[str, float]:
        """Held-out loss of the averaged network at each noise level; appended to heldout.csv."""
        config = self.config
        if self.heldout is None or self.rank != 0:
            return {}
        crop, count = self.stage(max(self.seen - 1, 0))[0].crop, config.validate_images
        numbers = torch.arange(count)
        clean = self.heldout.batch(0, count, crop).to(self.device)
        noise = normal(config.seed, numbers, 1, tuple(clean.shape[1:]), stream=NOISE_STREAM)
        row: dict[str, float] = {"images": self.seen, "crop": crop}
        self.net.eval()
        with self.ema.average_parameters(), torch.no_grad():
            for level in config.validate_levels:
                nsr = torch.full((count,), level, dtype=torch.float64)
                losses = [
                    denoising_loss(
                        self.net,
                        clean[part],
                        nsr[part].to(self.device),
                        noise[part].to(self.device),
                        config.sigma_data,
                    )
                    for part in torch.arange(count).split(64)
                ]
                row[f"{level:g}"] = float(torch.cat(losses).mean())
        self._log("heldout.csv", row)
        if config.sample_images:
            self._draw_samples(crop)
        return row

    def _measure(self) -> None:
        """What moment matching and the misspecification alarm need of the prior, for its card."""
        if self.rank != 0:
            return
        crops = self.crops if self.heldout is None else self.heldout
        on = "training" if self.heldout is None else "held-out"
        crop, prior = self.config.stages[-1].crop, self.prior().with_affine(1.0, 0.0)
        if count := self.config.error_images:
            table = denoising_error(prior, crops.batch(0, count, crop))
            self._measured[ERROR_KEY] = {**table, "measured_on": f"{count} {on} crops"}
        count = self.config.reference_images
        if count and self.heldout is not None:
            try:
                reference = heldout_reference(prior, crops.batch(0, count, crop)).to_dict()
            except ValueError as error:
                # Images that it has no statistic for: the prior is as good without.
                warnings.warn(f"the card gets no reference of likeness: {error}", stacklevel=2)
            else:
                self._measured[REFERENCE_KEY] = {
                    **reference,
                    "measured_on": f"{count} {on} crops",
                }

    def _draw_samples(self, crop: int) -> None:
        """A grid of samples as samples_NNNNNNNNN.png."""
        from diffpost.plot import image_grid
        from diffpost.sample import sample
        from diffpost.samplers import DPMSolver

        prior = self.prior().with_affine(1.0, 0.0).with_shape((self.crops.channels, crop, crop))
        draws = sample(
            prior,
            self.config.sample_images,
            DPMSolver(64, eta=1.0),
            seed=self.config.seed,
            progress=False,
        )
        image_grid(draws.x, self.out / f"samples_{self.seen:09d}.png")

    def save(self) -> None:
        """Write the checkpoint and the prior folder, atomically."""
        if self.rank != 0:
            return
        from diffpost.io.checkpoints import save_prior

        _atomic_save(
            {
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(),
                "step": self.step,
                "seen": self.seen,
                "seen_before": self.seen_before,
                "config": json.dumps(self.config.to_dict()),
            },
            self.checkpoint_path,
        )
        save_prior(self.out / "prior", self.prior())

    # The parts -----------------------------------------------------------------------------------

    def _averaged(self) -> dict[str, Tensor]:
        with self.ema.average_parameters():
            return {key: value.detach().clone() for key, value in self.net.state_dict().items()}

    def _restore(self) -> None:
        try:
            state = torch.load(self.checkpoint_path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"cannot read the checkpoint {self.checkpoint_path} ({error}); move it away to start "
                "this run afresh"
            ) from error
        self.config.check_continues(json.loads(state["config"]), self.out)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.step, self.seen = int(state["step"]), int(state["seen"])
        self.seen_before = int(state.get("seen_before", 0))

    def _initialise(self, init: str) -> None:
        from diffpost.io.checkpoints import load_prior

        prior = load_prior(init)
        if not isinstance(prior, NetworkScore):
            raise ValueError(f"init: {init} is not a prior that this trainer wrote")
        self.net.load_state_dict(prior.net.state_dict())
        self.seen_before = int(prior.card.get("training", {}).get("images_seen", 0))
        self.ema = ExponentialMovingAverage(self.net.parameters(), decay=self.config.ema)

    def _mean(self, loss: Tensor) -> float:
        if self.world > 1:
            loss = loss.clone()
            dist.all_reduce(loss)
            loss /= self.world
        return float(loss)

    def _agree(self, value: bool) -> bool:
        """Rank 0's word, so that every process saves at the same step."""
        if self.world == 1:
            return value
        flag = torch.tensor([float(value)])
        dist.broadcast(flag, 0)
        return bool(flag.item())

    def _catch_signals(self) -> dict[int, Any]:
        """Finish the step and save on the first interrupt."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop = True

        try:
            return {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: the caller handles signals
            return {}

    def _last_heldout(self) -> dict[str, float]:
        path = self.out / "heldout.csv"
        if not path.exists():
            return {}
        with path.open() as file:
            rows = list(csv.DictReader(file))
        return {key: float(value) for key, value in rows[-1].items()} if rows else {}

    def _log(self, name: str, row: dict[str, Any]) -> None:
        if self.rank == 0:
            append_row(self.out / name, row)

    def _bar(self, progress: bool) -> Any:
        return TrainingBar(self.total, self.seen, enabled=progress and self.rank == 0)


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    device: str = "cpu",
    progress: bool = True,
    max_steps: int | None = None,
) -> NetworkScore:
    """Train a prior, or continue the run in `out`; returns the averaged network.

    Under torchrun the processes share each batch: the loss is that of one process with the whole
    batch.  The prior lies in `out/prior` and is read by `diffpost.load_prior`.
    """
    distributed = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    if distributed and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        return Trainer(config, out, device=device).run(progress=progress, max_steps=max_steps)
    finally:
        if distributed:
            dist.destroy_process_group()


def _atomic_save(state: dict[str, Any], path: Path) -> None:
    """torch.save through a temporary file in the same folder: a kill leaves old or new, never half."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _mixed_precision(asked: str | None, device: torch.device) -> bool:
    """Whether to train in mixed precision: where it was asked for and the device does it natively."""
    if asked is None:
        return device.type == "cuda"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    if asked == "bfloat16" and device.type == "cpu" and not native():
        raise ValueError(
            "got precision bfloat16 on a CPU without AVX-512 BF16, where it is a hundred times slower than "
            "float32; leave precision out of the configuration"
        )
    return asked == "bfloat16"
