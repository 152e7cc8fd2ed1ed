"""The control plane's REST API as the operator's command uses it."""

import json
from pathlib import Path
from typing import Any

from host.unix_http import request
from wire.errors import AmperageError, Code

UPLOAD_TIMEOUT_S = 600.0


class FleetClient:
    """Calls on the API socket; every refusal becomes an AmperageError with the server's code."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def get(self, target: str) -> Any:
        """A resource as plain JSON values."""
        return self._call("GET", target, None)

    def post(self, target: str, body: dict[str, Any]) -> Any:
        """Send an order."""
        return self._call("POST", target, json.dumps(body).encode())

    def publish(self, directory: Path) -> Any:
        """Upload a release directory: documents, packs, then the envelope that makes it a release."""
        for manifest in sorted(directory.glob("*.manifest.json")):
            digest = manifest.name.removesuffix(".manifest.json")
            self._call("PUT", f"/api/documents/{digest}", manifest.read_bytes())
            with (directory / f"{digest}.pack").open("rb") as pack:
                self._call("PUT", f"/api/packs/{digest}", pack)
        return self._call("POST", "/api/releases", (directory / "release.json").read_bytes())

    def _call(self, method: str, target: str, body: Any) -> Any:
        answer = request(self._socket, method, target, body, timeout_s=UPLOAD_TIMEOUT_S)
        try:
            value = json.loads(answer.body)
        except ValueError as error:
            raise AmperageError(Code.INTERNAL, f"the control plane answered {answer.status}; see its log") from error
        if answer.status != 200:
            code = value.get("code", "internal") if isinstance(value, dict) else "internal"
            known = Code(code) if code in set(Code) else Code.INTERNAL
            raise AmperageError(known, str(value.get("error", value)))
        return value
