"""Plan a run: the same code for `samray label` and its `--dry-run`.

The order is part of the contract: everything that can be refused is refused before anything is written to OUTPUT,
because a written plan ties OUTPUT to this run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from samray import storage
from samray.config.labels import WAYS
from samray.errors import ConfigError
from samray.inputs.listing import check_readable
from samray.inputs.prompt_file import MatchedPrompts, PromptFile
from samray.labels.phrases import distinct
from samray.labels.ways import Inputs, labels_identity, read_inputs
from samray.output.append import InputChanges, join_images
from samray.output.destination import check_is_folder
from samray.output.plan import Plan, load_plan, make_plan, preview_plan
from samray.output.schema import has_geo
from samray.output.shards import shard_versions
from samray.pipeline.preflight import check_label

if TYPE_CHECKING:
    from samray.config import Config
    from samray.inputs.skipped import Skipped
    from samray.sam.weights_file import WeightsFile


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """A planned run, before anything is started."""

    plan: Plan
    """The plan in OUTPUT; in a dry run on a new OUTPUT an unwritten plan, whose images cannot be read."""
    config: Config
    """The settings; in an OUTPUT of an older version, with its mask settings (`Config.as_begun`)."""
    weights: WeightsFile | None
    """The weights of the SAM that the actors will load; None if they load another network."""
    is_new: bool
    """Whether OUTPUT had no run before."""
    is_checked: bool
    """Whether `check_label` has passed: a resuming run checks only if it has work to do."""
    changes: InputChanges
    """Differences between INPUT and the plan."""
    prompts: MatchedPrompts | None
    """The user prompts, if config.input.prompts names a file."""
    labels: Inputs | None
    """Inputs for names, if config.labels asks for them."""
    versions: dict[int, str | None]
    """Finished shard -> version of its file."""
    preview: Preview | None = None
    """In a dry run on a new OUTPUT: what only a new listing shows."""

    @property
    def skipped(self) -> Skipped:
        """Files that the listing of INPUT left out: now, or when the plan was made."""
        return self.plan.skipped if self.changes.skipped is None else self.changes.skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """A listing of INPUT without a written plan."""

    input_uri: str
    output_uri: str
    """INPUT and OUTPUT as given."""
    num_unreadable: int
    """Images that cannot be read according to the listing."""
    first_problem: str | None
    """Why the first of them cannot be read."""


def plan_run(
    input_uri: str,
    output_uri: str,
    config: Config,
    *,
    append: bool = False,
    redo_changed: bool = False,
    with_model: bool = True,
    dry_run: bool = False,
) -> RunPlan:
    """Plan a run and write the plan to OUTPUT, or use the plan that is there.

    append, redo_changed: as for `samray.label`. with_model: whether the actors load the networks of config.
    dry_run: write nothing, and check neither weights nor Ray, but an adapter.
    Raises: ConfigError, before anything is written, if the run cannot start or differs from OUTPUT's; StorageError.
    """
    from samray.sam.weights_file import WeightsFile

    storage.configure(config.storage)
    check_is_folder(output_uri)
    is_new = not storage.exists(storage.join(output_uri, "_samray", "run.json"))
    run = {} if is_new else load_plan(output_uri).run
    begun = None if is_new else run["identity"]
    if begun is not None:  # settings without a value of the user follow it, not a newer preset or default
        config = config.as_begun(begun)
    joining = append or redo_changed
    weights = WeightsFile(config.model.name, config.model.checkpoint, config.model.adapter)
    weights_to_load = weights if with_model and config.labels.needs_sam else None
    is_checked = not dry_run and (is_new or joining)  # a resuming run may have no work to do
    if is_checked:
        check_label(
            input_uri, output_uri, config, weights_to_load, with_model=with_model, is_new=is_new, has_geo=has_geo(run)
        )
    if is_new and not dry_run:
        storage.check_output(output_uri)  # before listing INPUT, which may take long
    # Read once, here: it may change during the run, and its content is a part of the run's identity.
    prompt_file, labels = _prompts_and_labels(config)
    identity = _identity_of_dry_run(config, begun, weights) if dry_run else run_identity(config, weights)
    identity |= labels_identity(config, labels, begun) | (prompt_file.identity if prompt_file else {})
    if is_new and dry_run:  # the only case without a plan in OUTPUT
        return _preview(input_uri, output_uri, config, identity, prompt_file, labels)
    check = functools.partial(_check_images, input_uri=input_uri, prompt_file=prompt_file)
    plan = make_plan(input_uri, output_uri, config, identity, joining=joining, check=check)
    changes = InputChanges(listed=is_new)
    if joining and not is_new:  # a new run has just listed INPUT
        ways = {"append": append, "redo_changed": redo_changed, "dry_run": dry_run}
        plan, changes = join_images(plan, input_uri, config, identity, **ways)
    if not dry_run:
        storage.remove_leftovers(plan.output)  # unfinished files of processes that were killed
    return RunPlan(
        plan=plan,
        config=config,
        weights=weights_to_load,
        is_new=is_new,
        is_checked=is_checked,
        changes=changes,
        labels=labels,
        versions=finished_shards(plan),
        prompts=prompt_file.match(plan.read_images(["uri", "file_name"])) if prompt_file else None,
    )


def _prompts_and_labels(config: Config) -> tuple[PromptFile | None, Inputs | None]:
    """The prompt file, its texts spelled as the categories, and what naming needs.

    Raises: ConfigError if they do not fit together, StorageError.
    """
    prompt_file = None if config.input.prompts is None else PromptFile.read(config.input.prompts)
    texts = {} if prompt_file is None else distinct(prompt_file.prompts)
    labels = read_inputs(config, list(texts.values()) if texts else None)
    if prompt_file is None or labels is None:
        return prompt_file, labels
    by = config.labels.by
    if by is not None and not WAYS[by].takes_clicks and any(prompt.text is None for prompt in prompt_file.prompts):
        raise ConfigError(
            f"input.prompts {storage.redact(prompt_file.uri)} has points or boxes, but labels.by={by} takes texts "
            "alone; for one mask per click or box, each named afterwards, label without labels.by, then run samray name"
        )
    return prompt_file.spelled(labels.categories or ()), labels


def run_identity(config: Config, weights: WeightsFile | None = None) -> dict[str, Any]:
    """Identity that a run must share with the run that it resumes: the settings, and the weights by content.

    weights: those of config's model, if available, to hash them only once.
    """
    if not config.labels.needs_sam:
        return config.identity()
    if weights is None:
        from samray.sam.weights_file import WeightsFile

        weights = WeightsFile(config.model.name, config.model.checkpoint, config.model.adapter)
    identity = config.identity()
    return {**identity, "model": {**identity["model"], **weights.identity}}


def finished_shards(plan: Plan) -> dict[int, str | None]:
    """Shard -> version of its file, for existing shards of the plan. Raises: StorageError."""
    # Another run may be adding shards to this output: shards outside this plan are not this run's.
    return {shard: version for shard, version in shard_versions(plan.output).items() if shard < plan.num_shards}


def _check_images(images: pa.Table, input_uri: str, prompt_file: PromptFile | None) -> None:
    """Raises: ConfigError if no image can be read, or none has prompts; checked before the plan is written."""
    check_readable(images, input_uri)
    if prompt_file:
        prompt_file.match(images)


def _identity_of_dry_run(config: Config, begun: Mapping[str, Any] | None, weights: WeightsFile) -> dict[str, Any]:
    """Like `run_identity`, but with the weights of the existing run, because they may not be on this machine yet.

    The adapter, a small file, is checked. Raises: ConfigError, StorageError.
    """
    identity = config.identity()
    if begun is not None and config.labels.needs_sam:
        # Taken from the run, so that comparing with it finds no difference.
        identity["model"]["checkpoint_sha256"] = begun.get("model", {}).get("checkpoint_sha256")
    if config.labels.needs_sam and config.model.adapter is not None:
        from samray.sam.checkpoints import check_adapter

        check_adapter(weights, weights.known_sha256)
        identity["model"]["adapter_sha256"] = weights.adapter_sha256
    return identity


def _preview(
    input_uri: str,
    output_uri: str,
    config: Config,
    identity: Mapping[str, Any],
    prompt_file: PromptFile | None,
    labels: Inputs | None,
) -> RunPlan:
    """The plan of a dry run on a new OUTPUT."""
    plan, images = preview_plan(input_uri, output_uri, config, identity)
    check_readable(images, input_uri)
    problems = images["problem"].drop_null()
    first_problem = problems[0].as_py() if len(problems) else None
    return RunPlan(
        plan=plan,
        config=config,
        weights=None,
        is_new=True,
        is_checked=False,
        changes=InputChanges(listed=True),
        labels=labels,
        versions={},
        prompts=prompt_file.match(images) if prompt_file else None,
        preview=Preview(
            input_uri=input_uri, output_uri=output_uri, num_unreadable=len(problems), first_problem=first_problem
        ),
    )
