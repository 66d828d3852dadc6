"""The trainer of the embedded model: synthetic scenes in, safetensors out.

One process, one device, a plain loop. The schedule follows whichever budget is used up faster, steps or minutes, so
that a run anneals in the time it is given, on whatever machine, and also when it was stopped and taken up again.
"""

import copy
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from samray.errors import ConfigError
from samray.evaluate.scenes import evaluate_clicks, heldout_scenes
from samray.sam.checkpoints import find_spec, load_model
from samray.sam.sam import Sam
from samray.sam.spec import TinyVitSpec
from samray.scene_paint import Source
from samray.scenes import Scene
from samray.train.clicks import Collated, SceneExamples, corrective_clicks
from samray.train.losses import Losses, sam_loss

WEIGHTS_FILE, STATE_FILE, METRICS_FILE = "weights.safetensors", "state.pt", "metrics.jsonl"
_LOG_EVERY_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train. The defaults made the embedded model."""

    model: str = "tiny"
    init: str | None = None
    """Weights to begin with, any checkpoint of the model; None begins with random ones."""
    minutes: float = 90.0
    """Time budget, summed over resumed runs."""
    steps: int = 1_000_000
    batch_size: int = 4
    """Scenes a step."""
    prompts_per_scene: int = 16
    first_image_size: int = 256
    """Input side in the first part of the budget, pixels: small scenes are cheap, and what is learnt carries over."""
    first_fraction: float = 0.5
    """How much of the budget that part is; the rest trains at the model's own input size."""
    learning_rate: float = 8e-4
    warmup_steps: int = 200
    weight_decay: float = 0.05
    max_grad_norm: float = 2.0
    ema_decay: float = 0.999
    box_fraction: float = 0.06
    """Steps whose prompts are boxes in place of clicks."""
    refine_fraction: float = 0.08
    """Steps with a second round: the answer is given back as a mask prompt with one corrective click."""
    single_weight: float = 0.25
    """Of the single mask's loss in a step with one click; it is 1 where the prompt is not ambiguous."""
    seed: int = 0
    bfloat16: bool = True
    """Autocast: about 1.4 times as fast on a CPU with AVX-512 BF16."""
    num_workers: int = 1
    threads: int | None = None
    save_every_minutes: float = 5.0
    validate_every_minutes: float = 5.0
    validation_scenes: int = 48


class Trainer:
    """Trains `config.model` into the folder `output`; takes up what lies there already.

    Raises ConfigError for an unknown model, and if `output` holds another model's state.
    """

    def __init__(self, output: str | os.PathLike[str], config: TrainConfig, source: Source | None = None) -> None:
        self.spec = find_spec(config.model)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config, self.source, self.output = config, source, Path(output)
        self.output.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(config.seed)
        self._stop = False
        self._build(self._read_state())

    def _build(self, state: dict[str, Any] | None) -> None:
        """The model, its average and the optimizer, at the input size that is due, from `state` or from nothing.

        No weight depends on the input size of a TinyViT.
        """
        self.step, self.scenes, self.elapsed_s = 0, 0, 0.0
        if state is not None:
            self.step, self.scenes, self.elapsed_s = state["step"], state["scenes"], state["elapsed_s"]
        early = self.progress < self.config.first_fraction and isinstance(self.spec.encoder, TinyVitSpec)
        self.until = self.config.first_fraction if early else 1.0
        image_size = self.config.first_image_size if early else self.spec.image_size
        self.model = Sam(dataclasses.replace(self.spec, image_size=image_size)).to(self.device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.low_res = 4 * self.model.spec.grid
        self.optimizer = _make_optimizer(self.model, self.config)
        if state is None and self.config.init is not None:
            begun = load_model(self.config.model, self.config.init, device="cpu").state_dict()
            self.model.load_state_dict(begun)
            self.ema.load_state_dict(begun)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])

    # --- the loop ----------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train until the budget is used up or a signal comes. Returns the last validation figures."""
        before = {s: signal.signal(s, self._request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._fit()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _fit(self) -> dict[str, Any]:
        validation = list(heldout_scenes(self.config.validation_scenes, self.spec.image_size, self.source))
        while self.progress < 1 and not self._stop:
            self._fit_at_one_size(validation)
            self.save()
            self._build(self._read_state())
        figures = evaluate_clicks(self.ema, validation)
        self._record("validation", figures)
        return figures

    def _fit_at_one_size(self, validation: list[Scene]) -> None:
        config = self.config
        started = saved = validated = time.monotonic()
        elapsed_before = self.elapsed_s
        log = _Average()
        for batch in self._loader():
            if self.progress >= self.until or self._stop:
                break
            losses, grad_norm = self._train_step(batch)
            self.step += 1
            self.scenes += config.batch_size
            now = time.monotonic()
            self.elapsed_s = elapsed_before + now - started
            log.add(losses, grad_norm)
            if self.step % _LOG_EVERY_STEPS == 0:
                self._record("train", {"lr": self._learning_rate(), **log.flush(config.batch_size)})
            if now - validated > 60 * config.validate_every_minutes:
                self._record("validation", evaluate_clicks(self.ema, validation))
                validated = time.monotonic()
            if now - saved > 60 * config.save_every_minutes:
                self.save()
                saved = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the budget that is used up, 0 to 1."""
        return min(1.0, max(self.step / self.config.steps, self.elapsed_s / (60 * self.config.minutes)))

    def _learning_rate(self) -> float:
        warmup = min(1.0, (self.step + 1) / self.config.warmup_steps)
        return self.config.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * self.progress))

    def _loader(self) -> DataLoader[Collated]:
        config = self.config
        dataset = SceneExamples(self.source, self.model.image_size, self.low_res, config.prompts_per_scene)
        first = config.seed * 2**40 + self.scenes
        return DataLoader(
            dataset,
            batch_size=config.batch_size,
            sampler=range(first, first + config.steps * config.batch_size),
            num_workers=config.num_workers,
            worker_init_fn=_ignore_interrupt,
            prefetch_factor=4 if config.num_workers else None,
        )

    # --- one step ----------------------------------------------------------------------------------------------------

    def _train_step(self, batch: Collated) -> tuple[Losses, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16):
            losses = self._forward({key: value.to(self.device) for key, value in batch.items()})
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if math.isfinite(norm):  # one bad scene must not end a run of hours
            self.optimizer.step()
            self._update_ema()
        return losses, norm

    def _forward(self, batch: Collated) -> Losses:
        """Losses of a batch; what kind of prompt it gets is drawn from the step's number, so that runs repeat."""
        generator = torch.Generator().manual_seed(self.config.seed * 2**32 + self.step)
        kind = float(torch.rand((), generator=generator))
        use_boxes = kind < self.config.box_fraction
        refine = 0 <= kind - self.config.box_fraction < self.config.refine_fraction
        encoder, points = self.model.prompt_encoder, batch["points"]
        clicks, labels = points.unsqueeze(2), torch.ones((*points.shape[:2], 1), dtype=torch.long, device=self.device)
        embeddings = self.model.encode_images(self._normalise(batch["image"], batch["input_hw"]))
        sparse = encoder.encode_boxes(batch["boxes_xyxy"]) if use_boxes else encoder.encode_points(clicks, labels)
        logits, iou = self.model.decode_batch(embeddings, sparse)
        targets = (batch["targets"].float() / 255).flatten(0, 1)
        logits, iou = logits.flatten(0, 1), iou.flatten(0, 1)
        losses = sam_loss(logits, iou, targets, single_weight=1.0 if use_boxes else self.config.single_weight)
        if not refine:
            return losses
        best = iou[:, 1:].argmax(dim=1) + 1
        answer = logits.detach()[torch.arange(len(best)), best]
        stride = self.model.image_size / self.low_res
        extra, extra_labels = corrective_clicks(answer.float().cpu(), targets.cpu(), stride, generator)
        clicks = torch.cat([clicks, extra.to(self.device).view_as(clicks)], dim=2)
        labels = torch.cat([labels, extra_labels.to(self.device).view_as(labels)], dim=2)
        logits, iou = self.model.decode_batch(embeddings, encoder.encode_points(clicks, labels), answer[:, None])
        second = sam_loss(logits.flatten(0, 1), iou.flatten(0, 1), targets, single_weight=1.0)
        losses.total = losses.total + second.total  # the figures stay those of the first click
        return losses

    def _normalise(self, images: Tensor, input_hw: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 and (B, 2) -> (B, 3, S, S), zero where padded, as `Sam.preprocess` gives them."""
        pixels = (images.permute(0, 3, 1, 2).float() - self.model.pixel_mean) / self.model.pixel_std
        place = torch.arange(images.shape[1], device=images.device)
        inside = (place[:, None] < input_hw[:, :1, None]) & (place < input_hw[:, 1:, None])
        return pixels * inside[:, None]

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for average, current in zip(_tensors(self.ema), _tensors(self.model), strict=True):
            if average.is_floating_point():
                average.lerp_(current, 1 - decay)
            else:
                average.copy_(current)

    # --- what lies on disk -------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the averaged weights, and all that a resumed run needs; each file appears whole or not at all."""
        # Half precision for parameters only: it would cost the random positions accuracy and gain no space.
        parameters = {name for name, _ in self.ema.named_parameters()}
        weights = {k: v.half() if k in parameters else v for k, v in self.ema.state_dict().items()}
        weights = {k: v.cpu().contiguous() for k, v in weights.items()}
        metadata = {
            "model": self.config.model,
            "steps": str(self.step),
            "scenes": str(self.scenes),
        }
        self._replace(WEIGHTS_FILE, lambda path: save_file(weights, path, metadata))
        state = {
            "name": self.config.model,
            "step": self.step,
            "scenes": self.scenes,
            "elapsed_s": self.elapsed_s,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self._replace(STATE_FILE, lambda path: torch.save(state, path))

    def _replace(self, name: str, write: Callable[[Path], None]) -> None:
        temporary = self.output / f"{name}.{os.getpid()}.tmp"
        write(temporary)
        os.replace(temporary, self.output / name)

    def _read_state(self) -> dict[str, Any] | None:
        path = self.output / STATE_FILE
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        if state["name"] != self.config.model:
            raise ConfigError(
                f"{path} is the state of {state['name']!r}, not of {self.config.model!r}; use another folder"
            )
        return state

    def _record(self, kind: str, figures: dict[str, Any]) -> None:
        place = {"kind": kind, "step": self.step, "minutes": round(self.elapsed_s / 60, 2)}
        line = {**place, "progress": round(self.progress, 4), **figures}
        with (self.output / METRICS_FILE).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        shown = " ".join(f"{k}={v:.4g}" for k, v in line.items() if isinstance(v, int | float))
        print(f"{kind}: {shown}", flush=True)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True


class _Average:
    """Means of the figures since the last line of the log."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []
        self._since = time.monotonic()

    def add(self, losses: Losses, grad_norm: float) -> None:
        figures = (losses.mask, losses.score, losses.iou_scored, losses.iou_oracle)
        self._rows.append((*(float(f) for f in figures), grad_norm))

    def flush(self, scenes_per_row: int) -> dict[str, float]:
        names = ("mask_loss", "score_loss", "iou_scored", "iou_oracle", "grad_norm")
        means = {n: round(sum(c) / len(c), 5) for n, c in zip(names, zip(*self._rows, strict=True), strict=True)}
        now = time.monotonic()
        means["scenes_per_s"] = round(len(self._rows) * scenes_per_row / (now - self._since), 2)
        self._rows, self._since = [], now
        return means


def _make_optimizer(model: Sam, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW without decay on biases, norms and the single-vector embeddings."""
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for parameter in model.parameters():
        (decayed if parameter.ndim >= 2 and min(parameter.shape[:2]) > 1 else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)


def _tensors(model: Sam) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process finishes its step and saves, the workers end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
