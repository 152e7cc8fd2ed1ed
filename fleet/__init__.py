"""The control plane: depot, library of releases, rollouts, telemetry, REST API. Nodes never import it."""
