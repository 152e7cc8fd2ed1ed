"""Settings of the control plane and of a depot by itself: one TOML file, checked whole before anything starts."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from host.link import Broker
from host.schedule import Schedule
from host.settings import FilePath, Settings
from wire.manifest import Name

API_SOCKET = Path("/run/amperage-fleet/api.sock")


class FleetSettings(Settings):
    """`fleet.toml`."""

    directory: FilePath
    """Library of releases and the database."""
    desired_key: FilePath
    trust: FilePath
    api_socket: FilePath = API_SOCKET
    broker: Broker | None = None
    """Absent: a private Mosquitto on this machine, for trying out."""
    private_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the private Mosquitto; 0 means any free one."""
    root: Annotated[str, StringConstraints(pattern=r"^[^+#/]+(/[^+#/]+)*$", strict=True)] = "amperage"
    rollout_deadline_s: Annotated[float, Field(gt=0)] = 3600.0
    """A node that has not ended by then counts as failed."""
    keep_reports_s: Annotated[float, Field(gt=0)] = 30 * 86_400.0
    """Events and telemetry are forgotten after this time."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class UpstreamSettings(Settings):
    """Where a gateway gets everything from, and for whom."""

    name: Name
    """The gateway's own name at the upstream broker, as if it were a node."""
    broker: Broker
    nodes: Annotated[frozenset[Name], Field(strict=False)] = frozenset()
    """For whom reports and orders are carried; empty: for every node that speaks at the site's broker."""
    bandwidth_limit_bytes_per_s: Annotated[int, Field(ge=0)] = 0
    """For frames, outside the hours of `bandwidth`; 0 means no limit."""
    bandwidth: Schedule = Schedule()


class DepotSettings(Settings):
    """`depot.toml`: a depot by itself, at a gateway with `upstream`."""

    directory: FilePath
    """Library of packs and manifests."""
    broker: Broker | None = None
    """The site's. Absent: a private Mosquitto on this machine, for trying out."""
    private_port: Annotated[int, Field(ge=0, le=65535)] = 0
    root: Annotated[str, StringConstraints(pattern=r"^[^+#/]+(/[^+#/]+)*$", strict=True)] = "amperage"
    """Topic root, the same at both brokers."""
    upstream: UpstreamSettings | None = None
    """Absent: nothing but the library is served."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @model_validator(mode="after")
    def _check_loop(self) -> Self:
        here, there = self.broker, self.upstream.broker if self.upstream else None
        if here and there and (here.host, here.port) == (there.host, there.port):
            raise ValueError("broker and upstream.broker are the same; a gateway stands between two")
        return self


def settings_in(directory: Path) -> FleetSettings:
    """Settings for trying out: everything in one directory, with the keys of `amperage keys init DIRECTORY/keys`."""
    keys = directory / "keys"
    return FleetSettings(
        directory=directory, desired_key=keys / "desired.pem", trust=keys / "trust.json",
        api_socket=directory / "api.sock",
    )  # fmt: skip
