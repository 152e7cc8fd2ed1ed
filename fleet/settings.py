"""Settings of the control plane: one TOML file, checked whole before anything starts."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from host.link import Broker
from host.settings import FilePath, Settings


class FleetSettings(Settings):
    """`fleet.toml`."""

    directory: FilePath
    """Library of releases and the database."""
    desired_key: FilePath
    trust: FilePath
    api_socket: FilePath = Path("/run/amperage/fleet.sock")
    broker: Broker | None = None
    """Absent: a private Mosquitto on a free port of this machine."""
    root: Annotated[str, StringConstraints(pattern=r"^[^+#/]+(/[^+#/]+)*$", strict=True)] = "amperage"
    rollout_deadline_s: Annotated[float, Field(gt=0)] = 3600.0
    """A node that has not ended by then counts as failed."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
