"""A model in training: one step at a time, and the state for resuming. No Ray, no files."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from samray.errors import ConfigError
from samray.sam.adapter import metadata as adapter_metadata
from samray.sam.checkpoints import load_model
from samray.sam.encoder_start import load_encoder
from samray.sam.frames import FRAMES
from samray.sam.precision import auto_dtype
from samray.sam.sam import Sam, to_device
from samray.sam.spec import ModelSpec
from samray.sam.text_projection import initial_state
from samray.sam.weights_file import find_spec
from samray.scenes.scene import Scene
from samray.train.examples import Frame
from samray.train.interaction import Batch, seed_of
from samray.train.lora import SCALE, adapter_tensors, add_adapter
from samray.train.objectives import Evaluation, objective_of
from samray.train.optimizer import (
    add_drop_path,
    learning_rate,
    make_optimizer,
    train_mode,
    update_average,
)
from samray.train.settings import LORA, TrainConfig, TrainSettings
from samray.train.store import Position

Wrap = Callable[[nn.Module], nn.Module]


@dataclass(slots=True)
class Means:
    """Means of the metrics since the last line of the log."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    since: float = field(default_factory=time.monotonic)
    """Start of the rate measurement, by this process's clock."""
    counted: int = 0
    """Steps since then, including those without finite gradients, which do not count in the means."""

    def add(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def flush(self) -> tuple[float, dict[str, float]]:
        """Steps per second and the means; resets both."""
        now = time.monotonic()
        rate = self.counted / max(now - self.since, 1e-9)
        means = {name: total / max(1, self.count) for name, total in self.sums.items()}
        self.sums, self.count, self.since, self.counted = {}, 0, now, 0
        return rate, means


def size_due(config: TrainConfig, spec: ModelSpec, position: Position) -> tuple[int, float]:
    """The current input side in pixels, and the progress at which it changes."""
    if position.progress(config) < config.first_fraction:
        return config.first_image_size, config.first_fraction
    return spec.image_size, 1.0


def frame_of(spec: ModelSpec, image_size: int) -> Frame:
    """The sizes of examples for a model at this input size."""
    sized = dataclasses.replace(spec, image_size=image_size)
    return Frame(image_size, 4 * sized.grid, FRAMES[spec.frame].is_padded)


def check_settings(settings: TrainSettings) -> ModelSpec:
    """The model's row of the table. Raises: ConfigError if settings and model do not fit."""
    spec, config = find_spec(settings.model.name), settings.train
    if config.first_fraction > 0:
        if not spec.encoder.takes_any_size:
            raise ConfigError(
                f"train.first_fraction = {config.first_fraction:g} needs a model with a TinyViT; {spec.name} has"
                " positions learnt for one input size: set train.first_fraction=0"
            )
        if config.first_image_size % spec.stride:
            raise ConfigError(
                f"train.first_image_size = {config.first_image_size} is not allowed; for {spec.name} it takes a"
                f" multiple of {spec.stride}"
            )
    if config.distill_from is not None:
        teacher = find_spec(config.distill_from)
        for what, of_student, of_teacher in (
            ("channels", spec.embed_dim, teacher.embed_dim),
            ("cells per side", spec.grid, teacher.grid),
            ("input pixels per side", spec.image_size, teacher.image_size),
        ):
            if of_student != of_teacher:
                raise ConfigError(
                    f"train.distill_from = {teacher.name!r} does not fit {spec.name}: its embeddings have {of_teacher}"
                    f" {what}, those of {spec.name} {of_student}"
                )
        if teacher.decoder != spec.decoder:
            raise ConfigError(
                f"train.distill_from = {teacher.name!r} does not fit {spec.name}: the mask decoder is copied from the"
                f" teacher, and {teacher.name} ({teacher.family}) has another one than {spec.name} ({spec.family})"
            )
        if teacher.name == spec.name or config.first_fraction > 0:
            raise ConfigError("train.distill_from must differ from model.name, and needs train.first_fraction=0")
    objective_of(settings).check(spec)
    return spec


class Learner:
    """The model, its running average, the optimizer and the position.

    identity: of the run (train.json); the initial weights must have its SHA-256. image_size: input side in pixels.
    state: from `Store.read_state`; None to begin. wrap: makes the loss data parallel. stream: this worker's number.
    keeps_average: whether this worker keeps the average; one is enough.
    """

    def __init__(
        self,
        settings: TrainSettings,
        spec: ModelSpec,
        *,
        identity: Mapping[str, Any] | None = None,
        image_size: int,
        device: torch.device,
        state: Mapping[str, Any] | None = None,
        wrap: Wrap = lambda module: module,
        stream: int = 0,
        keeps_average: bool = True,
    ) -> None:
        config = settings.train
        self.config, self.spec, self.device, self.stream = config, spec, device, stream
        self.position = Position() if state is None else state["position"]
        self.means = Means()
        # Random initial weights are the same in every run and every worker.
        torch.manual_seed(config.seed)
        self.objective = objective_of(settings)
        self.sam = Sam(dataclasses.replace(spec, image_size=image_size))
        # Before the state is loaded, which has these parts, too.
        self.objective.extend(self.sam, identity or {})
        teacher = None
        if config.distill_from is not None:
            # The file may have been replaced since the driver hashed it.
            sha256 = (identity or {}).get("train", {}).get("distill_checkpoint_sha256")
            teacher = load_model(config.distill_from, config.distill_checkpoint, device, sha256=sha256)
        self.base_sha256 = (identity or {}).get("model", {}).get("checkpoint_sha256", "")
        if state is None:
            self._begin(settings, teacher, identity or {})
        if config.trainable == LORA:
            add_adapter(self.sam, config.lora_rank)
        if state is not None:
            self.sam.load_state_dict(state["model"])
            self.means.sums, self.means.count = dict(state["sums"]), state["count"]
        self.sam.to(device)
        self.objective.set_trainable(self.sam)
        train_mode(self.sam)
        self.average: Sam | None = None
        if keeps_average:
            # Copied before drop path is added: the average is never trained.
            self.average = copy.deepcopy(self.sam).eval().requires_grad_(False)
            if state is not None:
                self.average.load_state_dict(state["ema"])
        add_drop_path(self.sam, config.drop_path)
        # After the weights are on their device, where the optimizer keeps its state.
        self.optimizer = make_optimizer(self.sam, config)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        dtype = autocast_dtype(settings, device)
        self.step_loss = self.objective.make_loss(self.sam, dtype, teacher)
        if state is not None:
            self.step_loss.memory = dict(state["memory"])
        # Last, because data parallel training looks up what learns when it wraps the module.
        self.loss: nn.Module = wrap(self.step_loss)

    def _begin(self, settings: TrainSettings, teacher: Sam | None, identity: Mapping[str, Any]) -> None:
        """The initial weights: random, or from a checkpoint; parts that distillation does not train come from the
        teacher."""
        if not self.config.from_scratch:
            sha256 = identity.get("model", {}).get("checkpoint_sha256")
            begun = load_model(settings.model.name, settings.model.checkpoint, device="cpu", sha256=sha256)
            self.sam.load_state_dict(initial_state(begun.state_dict(), self.sam.state_dict()))
        if self.config.encoder_checkpoint is not None:
            sha256 = identity.get("train", {}).get("encoder_checkpoint_sha256")
            load_encoder(self.sam, self.config.encoder_checkpoint, sha256=sha256)
        if teacher is not None:
            self.sam.prompt_encoder.load_state_dict(teacher.prompt_encoder.state_dict())
            self.sam.mask_decoder.load_state_dict(teacher.mask_decoder.state_dict())

    @property
    def progress(self) -> float:
        """Used fraction of the budget, 0 to 1."""
        return self.position.progress(self.config)

    @property
    def learning_rate(self) -> float:
        """The last step's rate, before each layer's scale."""
        group = self.optimizer.param_groups[-1]
        return float(group["lr"] / group["lr_scale"])

    def step(self, batch: Batch, progress: float | None = None) -> dict[str, float]:
        """Train one step on a batch (on the CPU or the device). Returns its metrics.

        progress: over all workers, which must use the same value.
        """
        rate = learning_rate(self.config, self.position.step, self.progress if progress is None else progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        # From the step's number: a resumed run drops the same branches.
        torch.manual_seed(seed_of("drop path", self.config.seed, self.position.step, self.stream))
        batch = {key: to_device(value, self.device) for key, value in batch.items()}
        self.optimizer.zero_grad(set_to_none=True)
        total, figures = self.loss(batch, self.position.step, self.stream)
        total.backward()
        # Otherwise data parallel training's zeros would still move these weights, by momentum and decay.
        for parameter in self.step_loss.idle:
            parameter.grad = None
        learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # float() waits for the GPU, here and for the metrics below.
        norm = float(torch.nn.utils.clip_grad_norm_(learning, self.config.max_grad_norm))
        # Also if the step is skipped below: the batches go on.
        self.position.step += 1
        metrics = {name: float(value) for name, value in figures.items()} | {"grad_norm": norm}
        self.means.counted += 1
        if math.isfinite(norm):  # one bad image must not end a long run
            self.optimizer.step()
            self.means.add(metrics)
            if self.average is not None:
                update_average(self.average, self.sam, self.config.ema_decay, self.position.step)
        return metrics

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs except the position, as tensors and plain values."""
        assert self.average is not None
        return {
            "model": self.sam.state_dict(),
            "ema": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sums": dict(self.means.sums),
            "count": self.means.count,
            "memory": self.step_loss.memory,
        }

    def average_at_own_size(self) -> Sam:
        """The running average, at the model's own input size."""
        assert self.average is not None
        if self.average.spec == self.spec:
            return self.average
        # The weights fit: only a model that takes any size is trained at another one.
        sam = Sam(self.spec)
        # With what the objective has added to it.
        sam.prompt_encoder.text_projection = copy.deepcopy(self.average.prompt_encoder.text_projection)
        sam.load_state_dict(self.average.state_dict())
        return sam.to(self.device).eval().requires_grad_(False)

    def evaluate(self, scenes: Iterable[Scene]) -> Evaluation:
        """Validate the running average on held-out images."""
        return self.objective.evaluate(self.average_at_own_size(), scenes)

    def weights(self) -> dict[str, Tensor]:
        """The running average; trained weights in half precision.

        Frozen weights keep their exact values, which keeps earlier embeddings valid; they are halved only if that is
        lossless. Buffers are unchanged: halving would make the random positions less accurate and save nothing. Of an
        adapter only what was added.
        """
        assert self.average is not None
        if self.config.trainable == LORA:
            return adapter_tensors(self.average.state_dict())
        learns = {name: parameter.requires_grad for name, parameter in self.sam.named_parameters()}
        weights = {}
        for name, value in self.average.state_dict().items():
            halved = value.half() if name in learns else value
            weights[name] = halved if learns.get(name, True) or torch.equal(halved.float(), value) else value
        return {name: value.cpu().contiguous() for name, value in weights.items() if self.objective.is_written(name)}

    def metadata(self) -> dict[str, str]:
        """Metadata of the file of the weights."""
        steps = {"steps": str(self.position.step)}
        if self.config.trainable == LORA:
            return adapter_metadata(self.spec.name, self.base_sha256, SCALE) | steps
        return {"model": self.spec.name} | steps


def autocast_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype:
    """The dtype for autocast from `model.dtype`; the weights are always float32."""
    name = settings.model.dtype
    if name == "auto":
        return auto_dtype(device)
    return torch.bfloat16 if name == "bfloat16" else torch.float32
