"""`amperage depot`: serve packs at a site; with an upstream, a gateway that fetches each of them once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wire.errors import ConfigError

if TYPE_CHECKING:
    from host.link import Broker

SETTINGS = Path("/etc/amperage/depot.toml")


def _broker(address: str) -> "Broker":
    from host.link import Broker

    host, _, port = address.rpartition(":") if ":" in address else (address, "", "1883")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address} is no HOST or HOST:PORT; for TLS write the broker into the settings")
    return Broker(host=host, port=int(port))


def depot(
    settings: Annotated[Path, typer.Option(help="Settings of the depot.")] = SETTINGS,
    directory: Annotated[
        Path | None, typer.Option(help="Instead of settings: keep everything here, with --upstream and --broker.")
    ] = None,
    upstream: Annotated[str | None, typer.Option(metavar="HOST[:PORT]", help="Broker to fetch from.")] = None,
    broker: Annotated[
        str | None, typer.Option(metavar="HOST[:PORT]", help="Broker of the site; a private one when absent.")
    ] = None,
    name: Annotated[str, typer.Option(help="The gateway's name at the upstream broker.")] = "gateway",
) -> None:
    """Serve the packs of a site until SIGTERM; what is missing is fetched once from the upstream broker."""
    from fleet.gateway import serve_depot
    from fleet.settings import DepotSettings, UpstreamSettings
    from host.logs import configure_logs
    from host.settings import load_settings

    if directory is None and (upstream or broker):
        raise ConfigError("--upstream and --broker go with --directory; else write both into the settings")
    if directory is None:
        chosen = load_settings(DepotSettings, settings)
    else:
        there = UpstreamSettings(name=name, broker=_broker(upstream)) if upstream else None
        here = _broker(broker) if broker else None
        chosen = DepotSettings(directory=directory.resolve(), broker=here, upstream=there)
    configure_logs(chosen.log_level, process="depot")
    serve_depot(chosen)
