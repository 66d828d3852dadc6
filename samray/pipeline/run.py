"""The main job, `samray.label`: plan, fetch, label, write, and count what is there at the end."""

from __future__ import annotations

import functools
import json
import queue
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samray import storage
from samray.cluster.errors import plain_error
from samray.config import Config
from samray.inputs.listing import check_readable
from samray.inputs.prompt_file import MatchedPrompts, PromptFile
from samray.output.append import News, join_images, missing_shards, stale_shards
from samray.output.credentials import read_credentials
from samray.output.destination import check_is_folder
from samray.output.failures import SAVE_EVERY_S, FailureCounts, failures_of_shards
from samray.output.plan import Plan, load_plan, make_plan
from samray.output.shards import mark_success, shard_versions
from samray.pipeline.metrics import record
from samray.pipeline.preflight import check_label
from samray.pipeline.report import LabelReport, ShardSummary, no_masks
from samray.progress import ProgressView

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from samray.cluster.control import StopRequest
    from samray.cluster.sizes import Sizes
    from samray.pipeline.labeler import ShardLabeler
    from samray.prompts import Prompt

    MakeLabeler = Callable[[Config, int], ShardLabeler]

POLL_S = 0.5

MAX_LOOKS = 3
"""At an output that other runs change while this one ends."""

GIVE_UP_S = 20.0
"""How long a labeler may take, after the drain's time is up, to come to the end of a group of images and notice."""

LEAVE_S = 2.0
"""How long what is left may take to run dry: that ends more quietly than being cut off, but may be a million shards."""


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
    """Label every image of input into Parquet shards under output, or finish what an earlier run left undone.

    retry_failed: also label the failed images of finished shards again. append: list input again, and label what the
    output does not have yet, by URI, into new shards; input may be another one than before. redo_changed: list input
    again, and label those images again whose size or etag has changed. progress: show it, on stderr.
    Without config the settings are `Config()`: the embedded model with its own mask settings.
    Raises ConfigError before anything starts, StorageError when storage stays away. A report with exit_code 130 or
    143 means that a signal ended the run early; calling again resumes.
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
    on_plan: Callable[[Plan, set[int], News, MatchedPrompts | None], None] = lambda plan, done, news, prompts: None,
) -> LabelReport:
    """`label`, with make_labeler(config, num_threads) making the labeler of each actor.

    on_plan is called with the plan, the shards found done, what joined, and the prompts of a person where
    config.input.prompts has such, before anything is started.
    """
    started = time.monotonic()
    storage.configure(config.storage)
    check_is_folder(str(output))
    is_new = not storage.exists(storage.join(str(output), "_samray", "run.json"))
    if not is_new:
        config = config.as_begun(load_plan(str(output)).run["identity"])
    joining = append or redo_changed
    with_model = make_labeler is None
    if is_new or joining:  # before anything is written: it would tie OUTPUT to what cannot be done
        check_label(str(input), str(output), config, with_model=with_model, is_new=is_new)
    if is_new:
        storage.check_output(str(output))
    given = None if config.input.prompts is None else PromptFile.read(config.input.prompts)
    identity = run_identity(config) | (given.identity if given else {})

    def check(images: pa.Table) -> None:
        check_readable(images, str(input))
        if given:
            given.match(images)

    plan, news = make_plan(str(input), str(output), config, identity, joining=joining, check=check), News(listed=is_new)
    if joining and not is_new:
        plan, news = join_images(plan, str(input), config, identity, append=append, redo_changed=redo_changed)
    storage.remove_leftovers(plan.output)
    # Another run may be adding to this output.
    versions = {shard: v for shard, v in shard_versions(plan.output).items() if shard < plan.num_shards}
    done = set(versions)
    prompts = given.match(plan.read_images(["uri", "file_name"])) if given else None
    on_plan(plan, done, news, prompts)
    history = FailureCounts.load(plan.output)
    failures = failures_of_shards(plan.output, versions, history)
    retries = stale_shards(plan, done)
    if retry_failed:
        retries |= {shard for shard, reasons in failures.items() if reasons}
    todo = {shard: shard in retries for shard in range(plan.num_shards) if shard not in done or shard in retries}

    report = LabelReport(plan.output, plan.num_images, plan.num_shards, num_shards_skipped=plan.num_shards - len(todo))
    report.skipped = (plan.skipped if news.skipped is None else news.skipped).redacted()
    report.num_images_not_found = prompts.num_unknown if prompts else 0
    report.gpu_price_per_hour = config.cluster.gpu_price_per_hour
    stopped_by = None
    if todo:
        if not (is_new or joining):
            check_label(str(input), str(output), config, with_model=with_model, is_new=False)
        if not is_new:
            storage.check_output(plan.output)
        num_done = sum(plan.num_images_of(shard) for shard in done)
        with ProgressView(plan.num_images, num_done, enabled=progress) as view:
            by_shard = prompts.by_shard(plan, todo) if prompts else None
            credentials = read_credentials(plan, str(input), config, todo)
            run = _Run(plan, config, todo, by_shard, credentials, retry_failed, report, history, view, make_labeler)
            stopped_by = _run_on_ray(run)
            retries -= run.committed
    report.wall_s = time.monotonic() - started
    if report.num_labelled and not report.num_masks:
        report.warning = no_masks(report.num_labelled, config)
    return _conclude(plan, config, report, history, retries, stopped_by)


def run_identity(config: Config) -> dict[str, Any]:
    """What a run must share with the one whose output it resumes: settings, and the checkpoint by content."""
    from samray.sam.checkpoints import checkpoint_sha256

    identity = config.identity()
    sha256 = checkpoint_sha256(config.model.name, config.model.checkpoint)
    return {**identity, "model": {**identity["model"], "checkpoint_sha256": sha256}}


@dataclass
class _Run:
    plan: Plan
    config: Config
    todo: Mapping[int, bool]
    """Shard -> whether it is finished, and only some of its images are to be labelled again."""
    prompts: Mapping[int, Mapping[int, list[Prompt]]] | None
    """Of a person: shard -> place in it -> list."""
    credentials: Mapping[int, Mapping[str, str]]
    """Shard -> those in the URIs of its images, which the plan does not keep."""
    retry_failed: bool
    report: LabelReport
    history: FailureCounts
    view: ProgressView
    make_labeler: MakeLabeler | None
    committed: set[int] = field(default_factory=set)
    """Shards of todo, so far."""


def _run_on_ray(run: _Run) -> StopRequest | None:
    """Label the shards of run.todo; returns the signal that ended it early, if one did."""
    from samray.cluster.control import start_run_state, stop_on_signals
    from samray.cluster.session import running_ray
    from samray.cluster.sizes import check_fits, choose_sizes, cluster_nodes, data_settings

    config = run.config.cluster
    run.view.update(note="starting Ray")
    # Signals first: a Ctrl-C while Ray starts or ends would leave a part of it behind. Ray Data's settings before Ray:
    # cut off by a second Ctrl-C, it logs tracebacks until Ray is gone.
    with stop_on_signals() as stop, data_settings(config), running_ray(config) as is_fixed:
        stop.listen()
        sizes = choose_sizes(config, cluster_nodes(), len(run.todo), run.config.model.device)
        if is_fixed:
            sizes = check_fits(sizes, cluster_nodes(), run.config.model.device)
        state = start_run_state()
        _drive(build_pipeline(run, sizes, state), run, state, stop)
        return stop if stop.signum is not None else None


def build_pipeline(run: _Run, sizes: Sizes, state: Any) -> ray.data.Dataset:
    """The five stages, of which the plan is the first: source, fetch, label, write. One row is one shard throughout."""
    import ray.data

    from samray.cluster.sizes import IO_CPUS
    from samray.pipeline.actor import LabelActor
    from samray.pipeline.fetch import fetch_shard, shards_to_do, source_table
    from samray.pipeline.labeler import build_labeler
    from samray.pipeline.write import write_shard

    run_id = uuid.uuid4().hex[:12]
    sha256 = run.plan.run["identity"]["model"].get("checkpoint_sha256")
    one_shard: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "udf_modifying_row_count": False}
    shards: Any = shards_to_do(source_table(run.todo, run.prompts, run.credentials))
    fetched = shards.map_batches(
        fetch_shard,
        fn_kwargs={"plan": run.plan, "config": run.config, "retry_failed": run.retry_failed},
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
            "make_labeler": run.make_labeler or functools.partial(build_labeler, checkpoint_sha256=sha256),
        },
        compute=ray.data.ActorPoolStrategy(min_size=sizes.min_actors, max_size=sizes.max_actors),
        num_cpus=sizes.actor_cpus,
        num_gpus=sizes.actor_gpus,
        **one_shard,
    )
    written: ray.data.Dataset = labelled.map_batches(
        write_shard,
        fn_kwargs={
            "plan": run.plan,
            "config": run.config,
            "run_id": run_id,
        },
        compute=ray.data.TaskPoolStrategy(size=sizes.num_write_tasks),
        num_cpus=IO_CPUS,
        **one_shard,
    )
    return written


def _drive(dataset: ray.data.Dataset, run: _Run, state: Any, stop: StopRequest) -> None:
    """Count what is committed until all is, or until a stop is asked for and what was in flight is committed.

    The data set runs in a thread of its own, so that this one stays free for signals and the progress bar.
    """
    import ray

    rows: queue.SimpleQueue[dict[str, Any] | BaseException | None] = queue.SimpleQueue()
    halt = threading.Event()
    stream = threading.Thread(target=_stream, args=(dataset, rows, halt), name="samray-stream", daemon=True)
    stream.start()
    num_before = num_committed = run.view.num_done
    num_failed = 0
    deadline = drained_at = None

    def show(num_done: int) -> None:
        run.view.update(num_done=num_done, num_failed=num_failed)
        record("samray_run_images", run.plan.num_images)
        record("samray_run_images_done", num_done)
        record("samray_run_images_failed", num_failed)

    try:
        while True:
            for row in _waiting(rows):
                if isinstance(row, BaseException):
                    raise plain_error(row)
                if row is None:
                    show(num_committed)
                    return
                state.end.remote(row["shard"])
                if row["summary"] is not None:
                    summary = ShardSummary.from_json(row["summary"])
                    run.report.add(summary)
                    num_failed += sum(summary.failures.values())
                    run.committed.add(row["shard"])
                    run.history.set(row["shard"], row["version"], json.loads(row["failures"]), row["digest"])
                    num_committed += 0 if run.todo[row["shard"]] else run.plan.num_images_of(row["shard"])
            if stop.signum is not None:
                deadline = deadline or time.monotonic() + run.config.cluster.drain_timeout_s
                # Said each time: a state actor that was restarted has forgotten it.
                state.stop.remote(abandon=time.monotonic() > deadline)
            try:
                under_way: dict[int, int] = ray.get(state.snapshot.remote(), timeout=5.0)
                is_known = True
            except ray.exceptions.RayError:
                under_way, is_known = {}, False
            if deadline is not None:
                if (is_known and not under_way) or time.monotonic() > deadline + GIVE_UP_S:
                    drained_at = drained_at or time.monotonic()
                    if time.monotonic() > drained_at + LEAVE_S:
                        break
                else:
                    drained_at = None
                run.view.update(note=f"stopping, {len(under_way)} shard{'s' * (len(under_way) != 1)} in flight")
            elif under_way or num_committed > num_before:
                run.view.update(note="labelling")
            else:
                run.view.update(note="loading the model")
            run.history.save(SAVE_EVERY_S)
            show(num_committed + sum(n for shard, n in under_way.items() if not run.todo.get(shard)))
        halt.set()
        stream.join(timeout=GIVE_UP_S)  # it must not find Ray gone: it would start another
    finally:
        halt.set()
        run.history.save()


def _stream(dataset: ray.data.Dataset, rows: queue.SimpleQueue[Any], halt: threading.Event) -> None:
    """Run the data set, putting its rows, and at the end None or the error, where the driver's main thread waits.

    If that thread is cut off, this one finds Ray gone: it must not start another.
    """
    import ray
    from ray._private import auto_init_hook

    before, auto_init_hook.enable_auto_connect = auto_init_hook.enable_auto_connect, False
    try:
        bundle: Any
        # iter_batches has three threads hand each other what one row a shard does not need.
        for bundle in dataset.iter_internal_ref_bundles():
            for block in ray.get([entry.ref for entry in bundle.blocks]):
                for row in block.to_pylist():
                    rows.put(row)
            if halt.is_set():
                return
        rows.put(None)
    except BaseException as error:  # whatever it is, the main thread is the one to raise it
        rows.put(error)
    finally:
        auto_init_hook.enable_auto_connect = before


def _waiting(rows: queue.SimpleQueue[Any]) -> Iterator[Any]:
    """What is in the queue now; waits a moment for the first."""
    try:
        yield rows.get(timeout=POLL_S)
        while True:
            yield rows.get_nowait()
    except queue.Empty:
        return


def _conclude(
    plan: Plan,
    config: Config,
    report: LabelReport,
    history: FailureCounts,
    retries_left: set[int],
    stopped_by: StopRequest | None,
) -> LabelReport:
    """Look again at what is there; that, and nothing counted on the way, decides how the run ended.

    `_SUCCESS` stands for the whole output, and for the very files that were looked at: if another run changes some in
    the meantime, it is looked at again, and then left to that run.
    """
    for _ in range(MAX_LOOKS):
        versions = {shard: v for shard, v in shard_versions(plan.output).items() if shard < plan.num_shards}
        failures = Counter[str]()
        for of_shard in failures_of_shards(plan.output, versions, history, trust_success=False).values():
            failures.update(of_shard)
        num_missing = len(missing_shards(plan, versions)) + len(stale_shards(plan, versions))
        if num_missing or mark_success(
            plan.output,
            seen=versions,
            generation=plan.last_generation,
            digests=history.digests(versions),
            num_images=plan.num_images,
            num_failed=failures.total(),
        ):
            break
    report.add_failures(failures)
    report.num_missing_shards = num_missing
    allowed = config.output.max_failed_fraction
    if stopped_by is not None and report.num_missing_shards:
        report.exit_code = stopped_by.exit_code
        report.problem = f"interrupted with {report.num_missing_shards} of {plan.num_shards} shards to do"
    elif stopped_by is not None and retries_left:
        report.exit_code = stopped_by.exit_code
        number = f"{len(retries_left)} shard{'s' * (len(retries_left) != 1)}"
        report.problem = f"interrupted with the failed images of {number} still to be tried again"
    elif report.num_missing_shards:
        report.exit_code = 1
        report.problem = f"{report.num_missing_shards} of {plan.num_shards} shards are missing"
    elif report.num_failed > allowed * plan.num_images:
        report.exit_code = 1
        report.problem = (
            f"{report.num_failed} of {plan.num_images} images failed, more than output.max_failed_fraction={allowed:g}"
        )
    return report
