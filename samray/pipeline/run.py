"""The main job, `samray.label`: plan, fetch, label, write, and check the result."""

from __future__ import annotations

import functools
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samray import storage
from samray.config import Config
from samray.inputs.local_copies import remove_unused
from samray.output.append import missing_shards, stale_shards
from samray.output.credentials import read_credentials
from samray.output.failures import FailureCounts, failures_of_shards
from samray.output.schema import has_geo
from samray.output.shards import mark_success
from samray.output.tile_files import remove_left_tiles
from samray.pipeline.drive import Run, drive
from samray.pipeline.plan_run import RunPlan, finished_shards, plan_run
from samray.pipeline.preflight import check_label
from samray.pipeline.report import LabelReport, no_masks
from samray.progress import ProgressView

if TYPE_CHECKING:
    import ray.data

    from samray.cluster.control import StopRequest
    from samray.cluster.sizes import Sizes
    from samray.output.plan import Plan
    from samray.pipeline.labeler import MakeLabeler
    from samray.pipeline.tiling import Size

MEASURED_HERE = 4
"""Shards of which the driver itself reads the sizes of the images: fewer than a stage of Ray Data takes to start."""

MAX_LOOKS = 3
"""Attempts on an output that other runs change while this one ends."""


def label(
    input: str | Path,
    output: str | Path,
    config: Config | None = None,
    *,
    retry_failed: bool = False,
    append: bool = False,
    redo_changed: bool = False,
    progress: bool = True,
) -> LabelReport:
    """Label every image of input into Parquet shards under output, or finish an earlier run.

    retry_failed: also label the failed images of finished shards again. append: list input again, and label images that
    the output does not have yet, by URI, into new shards; input may differ from before. redo_changed: list input again,
    and label images again whose size or ETag changed. progress: show progress on stderr.
    Without config the settings are `Config()`: the embedded model with its mask settings.
    Raises ConfigError before anything starts, StorageError if storage is unavailable. An exit_code of 130 or 143 in the
    report means that a signal ended the run early; call again to resume.
    """
    report = label_with(
        input,
        output,
        config or Config(),
        retry_failed=retry_failed,
        append=append,
        redo_changed=redo_changed,
        progress=progress,
    )
    if report.warning:
        warnings.warn(report.warning, stacklevel=2)
    return report


def label_with(
    input: str | Path,
    output: str | Path,
    config: Config,
    *,
    retry_failed: bool = False,
    append: bool = False,
    redo_changed: bool = False,
    progress: bool = True,
    make_labeler: MakeLabeler | None = None,
    with_model: bool | None = None,
    on_plan: Callable[[RunPlan], None] = lambda planned: None,
) -> LabelReport:
    """`label`, with make_labeler(config, num_threads) to create the labeler of each actor.

    with_model: whether the labeler loads the networks of config; by default only without make_labeler.
    on_plan is called with the plan before anything is started.
    """
    started = time.monotonic()
    with_model = make_labeler is None if with_model is None else with_model
    planned = plan_run(str(input), str(output), config, append=append, redo_changed=redo_changed, with_model=with_model)
    on_plan(planned)
    report = finish_run(
        planned,
        check=lambda: check_label(
            str(input),
            str(output),
            planned.config,
            planned.weights,
            with_model=with_model,
            is_new=False,
            has_geo=has_geo(planned.plan.run),
        ),
        credentials=functools.partial(read_credentials, planned.plan, str(input), planned.config),
        retry_failed=retry_failed,
        progress=progress,
        make_labeler=make_labeler,
    )
    report.wall_s = time.monotonic() - started
    if report.num_labelled and not report.num_masks:
        report.warning = no_masks(report.num_labelled, planned.config)
    return report


def finish_run(
    planned: RunPlan,
    *,
    check: Callable[[], None],
    credentials: Callable[[Iterable[int]], dict[int, dict[str, str]]],
    retry_failed: bool = False,
    progress: bool = True,
    make_labeler: MakeLabeler | None = None,
    reads_images: bool = True,
    before_success: Callable[[], None] = lambda: None,
) -> LabelReport:
    """Run what is left of a planned run.

    check: called if there is work and the plan is not checked yet; raises ConfigError if it cannot be done.
    credentials(shards): as `read_credentials`. reads_images: whether the labeler is given the images' bytes.
    before_success: called before the output is marked as finished; may raise. Raises: what these raise, StorageError.
    """
    work = _find_work(planned, retry_failed)
    report = _begin_report(planned, work)
    stopped_by = None
    if work.todo:
        # A finished run needs neither weights nor a cluster, so both are checked only if there is work to do.
        if not planned.is_checked:
            check()
        if not planned.is_new:
            storage.check_output(planned.plan.output)
        num_done = sum(planned.plan.num_images_of(shard) for shard in planned.versions)
        with ProgressView(planned.plan.num_images, num_done, enabled=progress) as view:
            run = Run(
                plan=planned.plan,
                config=planned.config,
                todo=work.todo,
                prompts=planned.prompts.by_shard(planned.plan, work.todo) if planned.prompts else None,
                credentials=credentials(work.todo),
                labels=planned.labels,
                retry_failed=retry_failed,
                report=report,
                history=work.history,
                view=view,
                make_labeler=make_labeler,
                reads_images=reads_images,
            )
            stopped_by = _run_on_ray(run)
            if run.tiles:
                with suppress(OSError):
                    remove_unused()  # copies of images, if an actor was ended while it had one
            # Retried shards exist before and after, so a listing cannot show which of them are still to be done.
            work.retries -= run.committed
        before_success()
    if planned.config.masks.tile is not None:
        remove_left_tiles(planned.plan.output)
    # Also without work to do: `_SUCCESS` may be missing after a run that was killed at its end.
    failures, report.num_missing_shards = _conclude(planned.plan, work.history)
    report.add_failures(failures)
    report.exit_code, report.problem = _how_it_ended(planned, work, report, stopped_by)
    return report


@dataclass(slots=True)
class _Work:
    """The remaining work of a plan."""

    todo: dict[int, bool]
    """Shard -> whether it is finished, and only some of its images must be labelled again."""
    retries: set[int]
    """The finished shards among them; a shard is removed when it is committed again."""
    history: FailureCounts
    """Known failed images of each shard."""


def _find_work(planned: RunPlan, retry_failed: bool) -> _Work:
    """The shards that are missing, or have changed or (with retry_failed) failed images. Raises: StorageError."""
    plan = planned.plan
    history = FailureCounts.load(plan.output)
    failures = failures_of_shards(plan.output, planned.versions, history)
    # Shards with images that were changed by --redo-changed, until they are labelled again.
    retries = stale_shards(plan, planned.versions)
    if retry_failed:
        retries |= {shard for shard, reasons in failures.items() if reasons}
    missing = missing_shards(plan, planned.versions)
    return _Work({shard: shard in retries for shard in sorted(missing | retries)}, retries, history)


def _begin_report(planned: RunPlan, work: _Work) -> LabelReport:
    """The report of a run before its first shard."""
    plan = planned.plan
    return LabelReport(
        plan.output,
        plan.num_images,
        plan.num_shards,
        num_shards_skipped=plan.num_shards - len(work.todo),
        skipped=planned.skipped.redacted(),
        num_named=None if planned.labels is None or planned.labels.categories is None else 0,
        num_images_not_found=planned.prompts.num_unknown if planned.prompts else 0,
        gpu_price_per_hour=planned.config.cluster.gpu_price_per_hour,
    )


def _run_on_ray(run: Run) -> StopRequest | None:
    """Label the shards of run.todo; returns the signal that ended it early, if any."""
    from samray.cluster.control import end_run_state, start_run_state, stop_on_signals
    from samray.cluster.session import running_ray
    from samray.cluster.sizes import check_fits, choose_sizes, cluster_nodes, data_settings
    from samray.pipeline.large_images import parts_of

    config = run.config.cluster
    run.view.update(note="starting Ray")
    # Signals first: Ctrl-C while Ray starts or ends would leave a part of it behind. Ray Data's settings before Ray:
    # otherwise, after a second Ctrl-C, it logs tracebacks until Ray is gone.
    with stop_on_signals() as stop, data_settings(config), running_ray(config) as is_fixed:
        stop.listen()
        run.tiles = _measure_images(run)
        # Parts of large images are rows of their own, for other actors than that of the shard.
        num_rows = len(run.todo) + sum(
            len(parts_of(sizes_of_shard, run.config)) for sizes_of_shard in run.tiles.values()
        )
        sizes = choose_sizes(config, cluster_nodes(), num_rows, run.config.model.device)
        if is_fixed:
            # A cluster may grow, so nothing is refused there.
            sizes = check_fits(sizes, cluster_nodes(), run.config.model.device)
        state = start_run_state()
        drive(build_pipeline(run, sizes, state), run, state, stop)
        if stop.signum is None:  # after a signal, labelling actors may still ask it whether to begin a shard
            end_run_state(state)
        return stop if stop.signum is not None else None


def _measure_images(run: Run) -> dict[int, dict[int, Size]]:
    """`Run.tiles`: reads the headers of the images to label, if they may be labelled in tiles. Raises: StorageError."""
    from samray.cluster.tasks import run_tasks
    from samray.pipeline.large_images import MeasureTask

    if run.config.masks.tile is None or not run.reads_images or not run.config.finds_masks:
        return {}
    run.view.update(note="reading the sizes of the images")
    task = MeasureTask(run.plan, run.config, run.retry_failed)
    items = [(shard, retry, run.credentials.get(shard, {})) for shard, retry in run.todo.items()]
    on_ray = len(items) > MEASURED_HERE
    return {shard: sizes for shard, sizes in run_tasks(task, items, on_ray=on_ray) if sizes}


def build_pipeline(run: Run, sizes: Sizes, state: Any) -> ray.data.Dataset:
    """The five stages (source, fetch, label, write, after the plan). Each row is one shard throughout."""
    import ray.data

    from samray.cluster.sizes import IO_CPUS
    from samray.pipeline.actor import LabelActor
    from samray.pipeline.fetch import fetch_shard, shards_to_do, source_table
    from samray.pipeline.labeler import build_labeler
    from samray.pipeline.large_images import parts_of
    from samray.pipeline.write import write_shard

    # Tells this driver's attempt marks from those of another one on the same OUTPUT.
    run_id = uuid.uuid4().hex[:12]
    # Each actor checks the weights that it loads: its machine may have another file at the same path.
    model = run.plan.run["identity"].get("model", {})
    digests = {key: model.get(key) for key in ("checkpoint_sha256", "adapter_sha256")}
    # One row per shard: Ray retries a whole shard, and memory holds as many shards as there are tasks.
    one_shard: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "udf_modifying_row_count": False}
    parts = {shard: parts_of(sizes, run.config) for shard, sizes in run.tiles.items()}
    shards: Any = shards_to_do(source_table(run.todo, run.prompts, run.credentials, run.tiles, parts))
    # A fixed number of fetch tasks bounds how far reading is ahead of labelling.
    fetched = shards.map_batches(
        fetch_shard,
        fn_kwargs={
            "plan": run.plan,
            "config": run.config,
            "retry_failed": run.retry_failed,
            "reads_images": run.reads_images,
        },
        compute=ray.data.TaskPoolStrategy(size=sizes.num_fetch_tasks),
        num_cpus=IO_CPUS,
        **one_shard,
    )
    labelled = fetched.map_batches(
        LabelActor,
        fn_constructor_kwargs={
            "plan": run.plan,
            "config": run.config,
            "run_id": run_id,
            "state": state,
            "num_threads": sizes.num_threads,
            # A path and a digest, never a tensor: weights in the arguments would be sent to every actor.
            "make_labeler": run.make_labeler or functools.partial(build_labeler, **digests, labels=run.labels),
        },
        compute=ray.data.ActorPoolStrategy(min_size=sizes.min_actors, max_size=sizes.max_actors),
        num_cpus=sizes.actor_cpus,
        num_gpus=sizes.actor_gpus,
        **one_shard,
    )
    # Tasks of their own, so that an actor with a GPU does not wait for storage.
    written: ray.data.Dataset = labelled.map_batches(
        write_shard,
        fn_kwargs={"plan": run.plan, "config": run.config, "run_id": run_id},
        compute=ray.data.TaskPoolStrategy(size=sizes.num_write_tasks),
        num_cpus=IO_CPUS,
        **one_shard,
    )
    return written


def _conclude(plan: Plan, history: FailureCounts) -> tuple[Counter[str], int]:
    """Check the output again: only what is stored, not what was counted, decides how the run ended.

    Returns the failed images by reason, and the number of shards that are missing or must be labelled again.
    `_SUCCESS` is valid for the whole output and exactly the files that were checked: if another run changes some,
    checks again, and then leaves it to that run.
    """
    for _ in range(MAX_LOOKS):
        versions = finished_shards(plan)
        failures = Counter[str]()
        for of_shard in failures_of_shards(plan.output, versions, history, trust_success=False).values():
            failures.update(of_shard)
        num_missing = len(missing_shards(plan, versions)) + len(stale_shards(plan, versions))
        # False from mark_success: another run has changed the output since.
        if num_missing or mark_success(
            plan.output,
            seen=versions,
            generation=plan.last_generation,
            digests=history.digests(versions),
            num_images=plan.num_images,
            num_failed=failures.total(),
        ):
            break
    return failures, num_missing


def _how_it_ended(
    planned: RunPlan, work: _Work, report: LabelReport, stopped_by: StopRequest | None
) -> tuple[int, str | None]:
    """The exit code, and the problem as a sentence or ""."""
    plan, num_missing = planned.plan, report.num_missing_shards
    allowed = planned.config.output.max_failed_fraction
    # A signal after the last shard has interrupted nothing.
    if stopped_by is not None and num_missing:
        return stopped_by.exit_code, f"interrupted with {num_missing} of {plan.num_shards} shards left"
    if stopped_by is not None and work.retries:
        number = f"{len(work.retries)} shard{'' if len(work.retries) == 1 else 's'}"
        return stopped_by.exit_code, f"interrupted with the failed images of {number} left to retry"
    if num_missing:
        return 1, f"{num_missing} of {plan.num_shards} shards are missing"
    if report.num_failed > allowed * plan.num_images:
        return 1, (
            f"{report.num_failed} of {plan.num_images} images failed, more than output.max_failed_fraction={allowed:g}"
        )
    return 0, None
