"""Check, once and with a time limit, that a Ray cluster responds at an address, before anything is written."""

from __future__ import annotations

import os
from typing import Any, Final

import grpc
from ray._private import services
from ray._private.authentication.authentication_token_setup import AUTH_MODE_ENV_VAR
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from samray.errors import ConfigError

CONNECT_S: Final = 10.0
"""Seconds that a cluster may take to respond. Ray itself would try for many minutes."""

_CLIENT: Final = "ray://"
_HELP: Final = (
    "give the head's address: HOST:6379, ray://HOST:10001, or auto on a machine of the cluster. The dashboard's address"
    " (HOST:8265) is for `ray job submit`"
)


def check_cluster(address: str) -> None:
    """Raises: ConfigError if no Ray cluster responds at address (auto, HOST:PORT, ray://HOST:PORT) within CONNECT_S."""
    target = _host_and_port(address)
    _use_token_if_known()
    channel = init_grpc_channel(target)
    try:
        # A client's server does not answer the head's requests: that it accepts a connection must do.
        if address.startswith(_CLIENT):
            grpc.channel_ready_future(channel).result(timeout=CONNECT_S)
        else:
            stub: Any = NodeInfoGcsServiceStub
            # Asks for nothing that changes the cluster, and also shows a wrong token.
            stub(channel).GetClusterId(GetClusterIdRequest(), timeout=CONNECT_S)
    except (grpc.RpcError, grpc.FutureTimeoutError) as error:
        raise ConfigError(_sentence(address, target, error)) from None
    finally:
        channel.close()


def _host_and_port(address: str) -> str:
    """Raises: ConfigError if address is not one, or if it is auto and no Ray runs on this machine."""
    try:
        if not address.startswith(_CLIENT):
            target: str = services.canonicalize_bootstrap_address_or_die(address)
            services.extract_ip_port(target)
            return target
        host, separator, port = address.removeprefix(_CLIENT).partition("?")[0].rpartition(":")
        # ray://HOST has a default port: what was split off as the port is then the host.
        if not host:
            host, port = port, "" if separator else "10001"
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError("expected ray://HOST:PORT")
        return f"{host}:{port}"
    except ConnectionError:
        raise ConfigError(
            f"cluster.address={address}: auto needs exactly one Ray on this machine, or RAY_ADDRESS; {_HELP}"
        ) from None
    except Exception as error:
        raise ConfigError(
            f"cluster.address={address!r} is not the address of a Ray cluster ({error}); {_HELP}"
        ) from None


def _use_token_if_known() -> None:
    """Send an existing token, as `ray.init` does a moment later."""
    if AUTH_MODE_ENV_VAR not in os.environ and AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        os.environ[AUTH_MODE_ENV_VAR] = "token"
        RayConfig.initialize("")


def _sentence(address: str, target: str, error: Exception) -> str:
    where = target if target == address else f"{address} ({target})"
    code = error.code() if isinstance(error, grpc.Call) else None
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return (
            f"the Ray cluster at {where} requires a token and rejected ours: set RAY_AUTH_MODE=token, and"
            " RAY_AUTH_TOKEN to the content of ~/.ray/auth_token on the cluster's head"
        )
    if code in (None, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return f"no Ray cluster responds at {where} (tried for up to {CONNECT_S:g} s): {_HELP}"
    return f"the server at {where} is not a Ray cluster of this Ray version ({code}): {_HELP}"
