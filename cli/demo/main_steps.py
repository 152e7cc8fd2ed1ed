"""Steps 1 to 4: a model leaves the operator's hands, answers on two nodes, and is updated under load without a gap."""

from rich.table import Table

from cli.demo.chat import Answer, Load, connect, stream_chat
from cli.demo.facts import Step
from cli.demo.processes import wait_for
from cli.demo.stage import MODEL, Made, Stage
from wire.messages import State

NODES = ["node-1", "node-2"]
ROLLOUT_TIMEOUT_S = 90.0
REQUESTS_DURING_SWAP = 20
ANSWERS_AFTER_SWAP = 6


def forge_release(stage: Stage) -> None:
    """Step 1: import, quantise, pack, sign."""
    with stage.step(1, "Forge: a trained checkpoint becomes a signed release") as step:
        made = stage.made["1.0"] = stage.release(stage.build("1.0", "tales-5m-base"), sequence=1)
        step.figures |= _size_figures(made)
        step.check(
            "int4 release is smaller than its files", made.wire_bytes < made.raw_bytes,
            f"raw {made.raw_bytes:,} B, wire {made.wire_bytes:,} B, {made.bits_per_weight:.2f} bits per weight",
        )  # fmt: skip


def first_rollout(stage: Stage) -> None:
    """Step 2: publish, roll out, and judge both nodes by disk and socket."""
    with stage.step(2, "Fleet: release 1.0 goes to two nodes over MQTT") as step:
        made = stage.made["1.0"]
        for node in NODES:
            stage.site.add_node(node)
        stage.publish(made)
        ended = stage.wait_rollout(stage.order(made, NODES), ROLLOUT_TIMEOUT_S)
        step.check("the rollout succeeded", ended["state"] == "succeeded", ended.get("reason") or ended["state"])
        for node in NODES:
            stage.check_serves(step, node, made)
            _check_lifecycle(stage, step, node, made)
        artifact, manifest, _ = made.manifest_of(delta=False)
        published = len(stage.observer.frames_since(0, artifact))
        step.figures |= {"frames_of_artifact": manifest.frame_count, "frames_published_for_two_nodes": published}


def _check_lifecycle(stage: Stage, step: Step, node: str, made: Made) -> None:
    """Every state of the way was passed and reported, in order."""
    expected = [
        State.ADMITTED, State.FETCHING, State.DECODING, State.PROBING, State.STAGED, State.ACTIVATING, State.SOAKING,
        State.COMMITTED,
    ]  # fmt: skip

    def passed() -> list[State] | None:
        states = [event.after for event in stage.observer.events_of(node) if event.release == made.release]
        return states if State.COMMITTED in states else None

    states = wait_for(f"{node}'s event of {State.COMMITTED}", passed, 20)
    step.check(f"{node}: reported the whole lifecycle in order", states == expected, " → ".join(states))


def chat_over_socket(stage: Stage) -> None:
    """Step 3: the official client streams an answer over the Unix socket."""
    with stage.step(3, "Chat: the official openai client over the Unix socket") as step:
        with connect(stage.site.nodes["node-1"].socket) as client:
            answer = stream_chat(client, MODEL, 80)
        stage.display.say(f"   [italic]…{' '.join(answer.text.split())}[/italic]")
        step.figures |= {"text": answer.text, "tokens": answer.tokens, "tokens_per_s": round(answer.tokens_per_s, 1)}
        step.check("text streamed to its end", bool(answer.text.strip()) and answer.finished, f"{answer.tokens} tokens")
        made = stage.made["1.0"]
        step.check("release 1.0 answered", answer.fingerprints == {made.fingerprint}, _names(answer))
        step.check("speed was measured", answer.tokens_per_s > 0, f"{answer.tokens_per_s:.0f} tokens/s")


def update_under_load(stage: Stage) -> None:
    """Step 4: a delta goes out while requests run; a stream stays on the release that it began with."""
    with stage.step(4, "Update: release 2.0 as a delta, swapped under load") as step:
        old = stage.made["1.0"]
        built = stage.build("2.0", "tales-5m-finetuned-50", scales_of=old)
        made = stage.made["2.0"] = stage.release(built, sequence=2, base=old)
        step.figures |= _size_figures(made)
        delta_bytes = made.delta_bytes or 0
        step.check(
            "the delta is smaller than the full artifact", 0 < delta_bytes < made.wire_bytes,
            f"delta {delta_bytes:,} B beside full {made.wire_bytes:,} B",
        )  # fmt: skip
        stage.publish(made)
        load = Load(stage.site.nodes["node-1"].socket, MODEL)
        load.start()
        try:
            wait_for("answers of release 1.0", lambda: load.count(old.fingerprint) >= ANSWERS_AFTER_SWAP, 30)
            ended = stage.wait_rollout(stage.order(made, NODES), ROLLOUT_TIMEOUT_S)
            step.check("the rollout succeeded", ended["state"] == "succeeded", ended.get("reason") or ended["state"])
            wait_for("answers of release 2.0", lambda: load.count(made.fingerprint) >= ANSWERS_AFTER_SWAP, 30)
            wait_for("enough requests", lambda: len(load.answers) >= REQUESTS_DURING_SWAP, 30)
        finally:
            load.stop()
        _judge_swap(step, load, old, made)
        _judge_delta_fetch(stage, step, made)
        for node in NODES:
            stage.check_serves(step, node, made)


def _judge_swap(step: Step, load: Load, old: Made, new: Made) -> None:
    """No request failed, no answer mixes releases, and a stream that was open across the swap ended on the old one."""
    answers = sorted(load.answers, key=lambda answer: answer.started_s)
    step.figures |= {"requests": len(answers), "failed": len(load.failures)}
    step.check(
        f"at least {REQUESTS_DURING_SWAP} requests ran and none failed",
        len(answers) >= REQUESTS_DURING_SWAP and not load.failures,
        f"{len(answers)} ran, {len(load.failures)} failed {'; '.join(load.failures[:2])}".strip(),
    )
    mixed = [answer for answer in answers if len(answer.fingerprints) != 1]
    step.check("no answer mixes two releases", not mixed, f"{len(mixed)} mixed")
    first_new_s = min((a.started_s for a in answers if new.fingerprint in a.fingerprints), default=float("inf"))
    across = [
        a for a in answers if old.fingerprint in a.fingerprints and a.started_s < first_new_s < a.ended_s and a.finished
    ]
    step.figures["streams_open_across_the_swap"] = len(across)
    step.check("a stream open across the swap ended on release 1.0", bool(across), f"{len(across)} such streams")
    late = [answer for answer in answers if answer.started_s > first_new_s]
    strays = [answer for answer in late if old.fingerprint in answer.fingerprints]
    step.check(
        "every later answer is release 2.0's", bool(late) and not strays, f"{len(late)} later, {len(strays)} strays"
    )


def _judge_delta_fetch(stage: Stage, step: Step, made: Made) -> None:
    """The nodes really took the delta: its frames crossed the wire and the full artifact's did not."""
    delta, manifest, _ = made.manifest_of(delta=True)
    full, _, _ = made.manifest_of(delta=False)
    seen_delta, seen_full = len(stage.observer.frames_since(0, delta)), len(stage.observer.frames_since(0, full))
    step.figures |= {"delta_frames": manifest.frame_count, "delta_frames_published": seen_delta}
    step.check(
        "the observer saw the delta's frames and none of the full artifact's",
        seen_delta >= manifest.frame_count and seen_full == 0, f"{seen_delta} and {seen_full}",
    )  # fmt: skip


def _size_figures(made: Made) -> dict[str, object]:
    return {
        "version": made.version, "raw_bytes": made.raw_bytes, "wire_bytes": made.wire_bytes,
        "bits_per_weight": made.bits_per_weight, "delta_wire_bytes": made.delta_bytes,
    }  # fmt: skip


def _names(answer: Answer) -> str:
    return ", ".join(sorted(answer.fingerprints))


def size_table(stage: Stage) -> Table:
    """Raw and wire bytes of every release that was made."""
    table = Table("release", "raw bytes", "wire bytes", "bits per weight", "delta bytes", title="What was shipped")
    for made in stage.made.values():
        delta = f"{made.delta_bytes:,}" if made.delta_bytes else "–"
        table.add_row(made.version, f"{made.raw_bytes:,}", f"{made.wire_bytes:,}", f"{made.bits_per_weight:.2f}", delta)
    return table
