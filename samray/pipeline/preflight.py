"""Checks before Ray starts and before OUTPUT is written: a failed start leaves nothing behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from samray.inputs.rasters import check_extra
from samray.output.destination import check_apart, check_space, check_writable

_MANY_SHARDS: Final = 1_000_000
"""The number of shards is not known yet."""

if TYPE_CHECKING:
    from samray.config import ClusterConfig, Config
    from samray.sam.weights_file import WeightsFile


def check_label(
    input_uri: str,
    output_uri: str,
    config: Config,
    weights: WeightsFile | None,
    *,
    with_model: bool,
    is_new: bool,
    has_geo: bool = False,
) -> None:
    """Raises: ConfigError if a run could not start or finish: locations, disk, weights, device, Ray.

    weights: those of config's SAM; None if the actors do not load it. with_model: whether they load any network of
    config. is_new: whether OUTPUT has no run yet. has_geo: whether its run stores where images are.
    """
    if is_new:
        check_apart(input_uri, output_uri)
    for name in ("bands", "stretch"):
        if getattr(config.input, name) is not None:
            check_extra(f"input.{name}")
    if has_geo:  # the rest of the run would have none
        check_extra("the column geo of this OUTPUT")
    embeddings = () if config.output.embeddings == "none" else ("embeddings",)
    check_writable(output_uri, "_samray", "annotations", *embeddings)
    check_weights(weights)
    check_ray(config, with_model=with_model)


def check_weights(weights: WeightsFile | None) -> None:
    """Raises: ConfigError if the actors could not load these weights; None: they load none."""
    # Reading them imports torch, which takes a second: not for those that their digest identifies.
    if weights is not None and not weights.is_known:
        from samray.sam import checkpoints

        checkpoints.check_weights(weights)


def check_fan_out(output_uri: str, ray_wanted: bool | None, address: str | None) -> None:
    """Raises: ConfigError if OUTPUT cannot be written, or a given cluster does not respond.

    ray_wanted: False to do everything in this process; then no cluster is checked.
    """
    from samray.config import ClusterConfig

    check_writable(output_uri)
    # As `running_ray` decides it.
    named = address or os.environ.get("RAY_ADDRESS")
    if ray_wanted is not False and named:
        machine_nodes(ClusterConfig(address=address))


def check_ray(config: Config, *, with_model: bool) -> None:
    """Raises: ConfigError if the cluster does not respond, or is too small or, with_model, without the device."""
    from samray.cluster.sizes import check_fits, choose_sizes

    nodes, device = machine_nodes(config.cluster), config.model.device
    # No device, or the CPU, needs no check: importing torch for it would take a second.
    if with_model and device not in (None, "cpu"):
        from samray.sam.checkpoints import check_device

        check_device(device, here=nodes is not None)
    # A cluster may grow: only a Ray on this machine can be refused as too small.
    if nodes is not None:
        check_fits(choose_sizes(config.cluster, nodes, _MANY_SHARDS, device), nodes, device)


def machine_nodes(config: ClusterConfig) -> list[dict[str, float]] | None:
    """The nodes of the Ray from `running_ray`, if it is a Ray on only this machine; None for a cluster.

    Raises: ConfigError if a cluster to join does not respond, or if this machine's disk is full.
    """
    import ray

    from samray.cluster.address import check_cluster
    from samray.cluster.session import cluster_address, is_fixed, this_machine
    from samray.cluster.sizes import cluster_nodes

    if ray.is_initialized():
        return cluster_nodes() if is_fixed() else None
    address = cluster_address(config)
    if address is not None:
        check_cluster(address)
        return None
    # A private Ray writes its logs there, and objects that do not fit into memory.
    check_space(Path(tempfile.gettempdir()), "the local Ray's folder (TMPDIR)")
    return [this_machine()]
