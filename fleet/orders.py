"""Desired state of nodes: build it, sign it, keep it. The only place where generations are made.

Invariant: the generation of a node only goes up, past what was sent last and past what the node has reported; what is
signed is in the database before it is published, so a restart sends the same bytes again.
"""

from collections.abc import Iterable, Mapping

from fleet.database import Database, DesiredRow
from host.keys import Signer
from wire.documents import encode_document
from wire.messages import Desired, DesiredModel, Reported
from wire.signing import Role


class Orders:
    """Signs with the online key; callers hold the controller's lock and publish what they get."""

    def __init__(self, database: Database, signer: Signer) -> None:
        self._database = database
        self._signer = signer

    def change(
        self, model: str, releases: Mapping[str, str | None], reported: Mapping[str, Reported]
    ) -> list[tuple[DesiredRow, str | None]]:
        """Order every node of `releases` (by name) to run that release of `model`, or None to run it no more.

        Returns the signed rows, stored, each with the release that was ordered before.
        """
        changed = []
        for node, release in releases.items():
            before = self._database.desired(node)
            models = dict(before.models) if before else {}
            previous = models.pop(model, None)
            if release is not None:
                models[model] = release
            changed.append((self._sign(node, models, before, reported.get(node)), previous))
        self._database.save_desired(row for row, _ in changed)
        return changed

    def assert_again(self, node: str, reported: Reported) -> DesiredRow | None:
        """The same state under a higher generation, when the node has accepted one that is not ours; else None."""
        before = self._database.desired(node)
        if before is None or reported.generation <= before.generation:
            return None
        row = self._sign(node, before.models, before, reported)
        self._database.save_desired([row])
        return row

    def forget_failed(self, model: str, nodes: Iterable[tuple[str, str, str | None]]) -> None:
        """Let the next order build on what (node, failed release, previous release) ran before; nothing is sent.

        The nodes ended the failed release by themselves; named again under a new generation they would try it again.
        """
        rows = []
        for node, failed, previous in nodes:
            before = self._database.desired(node)
            if before is None or before.models.get(model) != failed:
                continue
            models = {name: release for name, release in before.models.items() if name != model}
            if previous is not None:
                models[model] = previous
            rows.append(DesiredRow(node, before.generation, before.envelope, models))
        self._database.save_desired(rows)

    def _sign(
        self, node: str, models: Mapping[str, str], before: DesiredRow | None, reported: Reported | None
    ) -> DesiredRow:
        generation = max(before.generation if before else 0, reported.generation if reported else 0) + 1
        wanted = tuple(DesiredModel(model=name, release=release) for name, release in sorted(models.items()))
        desired = Desired(node=node, generation=generation, models=wanted)
        envelope = self._signer.sign(Role.DESIRED, encode_document(desired))
        return DesiredRow(node, generation, envelope, dict(models))
