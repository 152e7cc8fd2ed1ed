"""Steps 5 to 7: a node killed mid-fetch, a release that is wrong, a flipped bit on the wire, a stranger's signature."""

import json
import shutil
from pathlib import Path

import numpy as np

from cli.demo.facts import Step
from cli.demo.main_steps import NODES, ROLLOUT_TIMEOUT_S
from cli.demo.processes import run_command, succeed, wait_for
from cli.demo.stage import MODEL, Stage
from forge.build import reseal_version
from host.keys import load_signer
from wire.bitmap import Bitmap
from wire.documents import encode_document
from wire.errors import Code
from wire.manifest import VersionDocument
from wire.messages import Desired, DesiredModel, FrameMessage, ModelReport, State
from wire.signing import Role

THIRD = "node-3"
CAP_BYTES_PER_S = 200_000
JOURNALLED_BEFORE_KILL = 5
MISSING_AT_KILL = 10
DAMAGE_SEED = 3


def kill_and_resume(stage: Stage) -> None:
    """Step 5: SIGKILL a third node's agent mid-fetch; nothing that its journal holds crosses the wire again."""
    with stage.step(5, "Kill: a third node at 200 KB/s is SIGKILLed mid-fetch and resumes") as step:
        made = stage.made["2.0"]
        artifact, manifest, _ = made.manifest_of(delta=False)
        node = stage.site.add_node(THIRD, bandwidth_limit_bytes_per_s=CAP_BYTES_PER_S)
        identity = stage.order(made, [THIRD])

        def enough() -> Bitmap | None:
            seen = stage.journalled(THIRD, artifact)
            return seen if seen is not None and len(seen) >= JOURNALLED_BEFORE_KILL else None

        wait_for(f"{JOURNALLED_BEFORE_KILL} journalled frames on {THIRD}", enough, 60)
        node.agent.kill()
        verified = stage.journalled(THIRD, artifact) or Bitmap(manifest.frame_count)
        missing = verified.complement()
        step.check(
            "killed with enough behind and enough ahead",
            len(verified) >= JOURNALLED_BEFORE_KILL and len(missing) >= MISSING_AT_KILL,
            f"{len(verified)} frames journalled, {len(missing)} missing",
        )
        mark = _wait_until_silent(stage, artifact)
        node.agent.start()
        ended = stage.wait_rollout(identity, ROLLOUT_TIMEOUT_S)
        step.check("the rollout succeeded", ended["state"] == "succeeded", ended.get("reason") or ended["state"])
        after = [frame.frame for frame in stage.observer.frames_since(mark, artifact)]
        again = [frame for frame in after if frame in verified]
        step.figures |= {
            "frames": manifest.frame_count, "journalled_at_kill": len(verified), "missing_at_kill": len(missing),
            "frames_seen_after_restart": len(after), "verified_frames_fetched_again": len(again),
        }  # fmt: skip
        step.check("0 verified frames crossed the wire again", not again, f"{len(again)} again")
        step.check(
            "the observer saw exactly the missing frames after the restart", sorted(after) == list(missing),
            f"{len(after)} seen, {len(missing)} were missing",
        )  # fmt: skip
        stage.check_serves(step, THIRD, made)


def _wait_until_silent(stage: Stage, artifact: str, quiet_polls: int = 20) -> int:
    """Wait until the depot has noticed that nobody listens; returns the observer's mark."""
    last, still = -1, 0

    def silent() -> bool:
        nonlocal last, still
        now = len(stage.observer.frames_since(0, artifact))
        still = still + 1 if now == last else 0
        last = now
        return still >= quiet_polls

    wait_for("silence on the frames topic", silent, 30)
    return stage.observer.frame_count()


def refuse_bad_release(stage: Stage) -> None:
    """Step 6: golden vectors of the good weights, one layer's nibbles shuffled, signed by the right key."""
    with stage.step(6, "Refuse: release 3.0 is signed and loads, but one layer is wrong") as step:
        served = stage.made["2.0"]
        good = stage.build("3.0", "tales-5m-finetuned-400", scales_of=served, name="3.0-good")
        spoiled = good.with_name("3.0")
        layer = spoil_one_layer(good, spoiled)
        made = stage.made["3.0"] = stage.release(spoiled, sequence=3, base=served)
        stage.publish(made)
        identity = stage.order(made, NODES, max_failures=len(NODES) - 1)  # let every node judge for itself
        ended = stage.wait_rollout(identity, ROLLOUT_TIMEOUT_S)
        step.figures |= {"shuffled_tensor": layer, "rollout": ended["state"], "reason": ended.get("reason")}
        step.check(
            "the rollout stopped by itself and says why",
            ended["state"] == "stopped" and Code.GOLDEN_MISMATCH in str(ended.get("reason")), ended.get("reason"),
        )  # fmt: skip
        for node in NODES:
            reasons = [event.reason for event in stage.observer.events_of(node) if event.release == made.release]
            step.check(f"{node}: refused it as golden_mismatch", Code.GOLDEN_MISMATCH in reasons, reasons[-1])
            stage.check_serves(step, node, stage.made["2.0"])


def spoil_one_layer(source: Path, out: Path) -> str:
    """Copy a version and shuffle the packed nibbles of one middle layer's tensor; returns the tensor's name.

    The model still loads and its logits stay finite; version.json is made anew, golden.json is the good model's.
    """
    out.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, out / path.name)  # content only: the copies are writable
    document = VersionDocument.model_validate_json((out / "version.json").read_bytes())
    columns = document.tensors
    packed = [row for row, dtype in enumerate(columns.dtype) if dtype == "u4"]
    row = next(row for row in packed if ".2." in columns.name[row])
    weights = np.memmap(out / document.files[columns.file[row]].path, dtype=np.uint8, mode="r+")
    start = columns.offset[row]
    tensor = weights[start : start + columns.size_bytes(row)]
    tensor[:] = np.random.default_rng(DAMAGE_SEED).permutation(tensor)
    weights.flush()
    del tensor, weights
    reseal_version(out)
    return columns.name[row]


def flipped_bit_and_stranger(stage: Stage) -> None:
    """Step 7: a damaged frame during a fetch, and a release by a stranger's key on the real topics."""
    with stage.step(7, "Attack: a flipped bit on the wire, a release by a stranger's key") as step:
        _inject_flipped_bit(stage, step)
        _offer_strangers_release(stage, step)


def _inject_flipped_bit(stage: Stage, step: Step) -> None:
    served = stage.made["2.0"]
    built = stage.build("4.0", "tales-5m-finetuned-400", scales_of=served)
    made = stage.made["4.0"] = stage.release(built, sequence=4, base=served)
    stage.publish(made)
    before = _frames_refused(stage)
    artifact, manifest, pack = made.manifest_of(delta=True)
    mark = stage.observer.frame_count()
    identity = stage.order(made, [THIRD])
    wait_for("the first frame of 4.0", lambda: stage.observer.frames_since(mark, artifact), 30)
    target = manifest.frame_count - 1
    start, end = manifest.frame_range(target)
    data = bytearray(pack.read_bytes()[start:end])
    data[len(data) // 2] ^= 0x10
    epoch = stage.observer.frames_since(mark, artifact)[-1].epoch
    forged = FrameMessage(epoch, 1 << 40, target, bytes(data))
    stage.observer.publish(stage.observer.topics.frames(artifact), forged.encode(), qos=0)
    ended = stage.wait_rollout(identity, ROLLOUT_TIMEOUT_S)
    refused = _frames_refused(stage) - before
    step.figures["frames_refused"] = refused
    step.check("the flipped frame was refused and counted", refused == 1, f"{refused} refused")
    step.check("the fetch completed all the same", ended["state"] == "succeeded", ended.get("reason") or ended["state"])
    stage.check_serves(step, THIRD, made)


def _frames_refused(stage: Stage) -> int:
    reported = stage.observer.report_of(THIRD)
    return reported.frames_refused if reported else 0


def _offer_strangers_release(stage: Stage, step: Step) -> None:
    """The control plane refuses it; put on the node's own topics, past the control plane, the node does too."""
    stranger = stage.directory / "stranger"
    succeed(["keys", "init", str(stranger)])
    made = stage.release(stage.made["1.0"].directory, sequence=5, key=stranger / "release.pem")
    done = run_command(["fleet", "publish", str(made.release_directory), "--api", str(stage.api), "--json"])
    refusal = (done.stdout + done.stderr).strip()
    step.check(
        "the control plane refuses it with a typed error", done.returncode != 0 and Code.UNKNOWN_SIGNER in refusal,
        refusal[-160:],
    )  # fmt: skip
    topics = stage.observer.topics
    reported = stage.observer.report_of(THIRD)
    generation = (reported.generation if reported else 0) + 1
    stage.observer.publish(
        topics.document(made.release), (made.release_directory / "release.json").read_bytes(), retain=True
    )
    desired = Desired(node=THIRD, generation=generation, models=(DesiredModel(model=MODEL, release=made.release),))
    signer = load_signer(stage.keys / "desired.pem")
    stage.observer.publish(topics.desired(THIRD), signer.sign(Role.DESIRED, encode_document(desired)), retain=True)

    def refused() -> ModelReport | None:
        report = stage.model_report(THIRD)
        return report if report and report.release == made.release and report.state is State.FAILED else None

    report = wait_for(f"{THIRD}'s refusal", refused, 30)
    step.check(f"{THIRD} refuses it with a typed error", report.reason == Code.UNKNOWN_SIGNER, report.reason)
    stage.check_serves(step, THIRD, stage.made["4.0"])
    step.figures["stranger"] = {"control_plane": json.dumps(refusal[-160:]), "node": report.reason}
