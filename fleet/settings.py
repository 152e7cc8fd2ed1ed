"""Settings of the control plane: one TOML file, checked whole before anything starts."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from host.link import Broker
from host.settings import FilePath, Settings

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


def settings_in(directory: Path) -> FleetSettings:
    """Settings for trying out: everything in one directory, with the keys of `amperage keys init DIRECTORY/keys`."""
    keys = directory / "keys"
    return FleetSettings(
        directory=directory, desired_key=keys / "desired.pem", trust=keys / "trust.json",
        api_socket=directory / "api.sock",
    )  # fmt: skip
