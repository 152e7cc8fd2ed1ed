"""The control plane: depot, library, rollouts, telemetry store, API. Imports wire, codec and host only."""
