"""The engine over simulated ports: whole lifecycles, judged by the disk and by what was published."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_simulators import MODEL, NODE, TOPICS, Node, Publisher, sign

from agent.lifecycle import BOUNDS
from agent.unpack import is_time_to_unpack
from wire.digest import digest_of
from wire.documents import encode_document
from wire.errors import ArtifactError, Code, DeployError
from wire.messages import Ack, FrameMessage, State, Status
from wire.serving import ProbeVerdict
from wire.signing import Role

WHOLE_WAY = [
    State.ADMITTED, State.FETCHING, State.DECODING, State.PROBING, State.STAGED, State.ACTIVATING, State.SOAKING,
    State.COMMITTED,
]  # fmt: skip


@pytest.fixture
def publisher() -> Publisher:
    return Publisher()


@pytest.fixture
def node(tmp_path: Path, publisher: Publisher) -> Node:
    node = Node(tmp_path, publisher)
    node.start()
    return node


def deploy(node: Node, version: str, generation: int, **more):
    made = node.publisher.make(version, **more)
    node.broker.offer(made)
    node.order(generation, made)
    node.run_until(lambda: node.journal.desired()[0] == generation)
    return made


def ended(node: Node, made):
    return lambda: node.row.release == made.digest and node.row.state in (
        State.COMMITTED, State.FAILED, State.ROLLED_BACK, State.CANCELLED
    )  # fmt: skip


def test_release_that_is_right_passes_every_state_and_serves(node):
    made = deploy(node, "1.0", 1)
    node.run_until(ended(node, made))
    node.turn()
    assert [event.after for event in node.events()] == WHOLE_WAY
    assert node.store.served(MODEL).decoded == made.decoded
    assert node.runtime.serving == {MODEL: made.decoded}
    directory = node.store.version_path(made.decoded)
    assert (directory / "weights.bin").read_bytes() == made.files["weights.bin"]
    assert (directory / "weights.bin").stat().st_mode & 0o777 == 0o440
    assert directory.stat().st_mode & 0o777 == 0o550
    report = node.reported().models[0]
    assert (report.state, report.serving, report.release) == (State.COMMITTED, made.decoded, made.digest)
    assert not list(node.store.staging_directory.iterdir())
    assert not list(node.store.work_directory.iterdir())


def test_index_frames_are_asked_for_before_any_other(node):
    made = deploy(node, "1.0", 1)
    node.run_until(ended(node, made))
    first = node.broker.wants[0]
    assert list(first.missing_frames()) == list(range(len(made.manifest.index_frames)))
    assert [frame for _, frame in node.broker.sent] == list(range(made.manifest.frame_count))


def test_golden_mismatch_fails_and_old_version_keeps_serving(node):
    old = deploy(node, "1.0", 1)
    node.run_until(ended(node, old))
    bad = node.publisher.make("2.0")
    node.runtime.verdicts[bad.decoded] = ProbeVerdict.GOLDEN_MISMATCH
    deploy(node, "2.0", 2)
    node.run_until(ended(node, bad))
    node.turn()
    assert (node.row.state, node.row.reason) == (State.FAILED, Code.GOLDEN_MISMATCH)
    assert node.store.served(MODEL).decoded == old.decoded
    assert node.runtime.loads == [old.decoded]
    assert not node.store.has_version(bad.decoded)
    report = node.reported().models[0]
    assert (report.state, report.reason, report.serving) == (State.FAILED, "golden_mismatch", old.decoded)


def test_load_failure_puts_the_old_serving_json_back(node):
    old = deploy(node, "1.0", 1)
    node.run_until(ended(node, old))
    before = node.store.serving_path.read_bytes()
    bad = node.publisher.make("2.0")
    node.runtime.refuses.add(bad.decoded)
    deploy(node, "2.0", 2)
    node.run_until(ended(node, bad))
    assert (node.row.state, node.row.reason) == (State.ROLLED_BACK, Code.LOAD_FAILED)
    assert node.store.serving_path.read_bytes() == before
    assert node.runtime.loads == [old.decoded, bad.decoded, old.decoded]


def test_first_release_that_cannot_load_leaves_nothing_serving(node):
    bad = node.publisher.make("1.0")
    node.runtime.refuses.add(bad.decoded)
    deploy(node, "1.0", 1)
    node.run_until(ended(node, bad))
    assert node.row.state is State.ROLLED_BACK
    assert node.store.serving().models == ()
    assert node.runtime.unloads == [MODEL]


@pytest.mark.parametrize("harm", ["failures", "restart", "silence", "slow"])
def test_regression_in_the_soak_rolls_back(tmp_path, publisher, harm):
    node = Node(tmp_path, publisher, soak_s=30.0)
    node.start()
    made = deploy(node, "1.0", 1)
    node.run_until(lambda: node.row.state is State.SOAKING)
    node.run_until(lambda: node.engine._runner._stage._next_poll_s is not None)
    if harm == "failures":
        node.runtime.failures = 5
    elif harm == "restart":
        node.runtime.pid += 1
    elif harm == "slow":
        node.runtime.tokens_per_s = 20.0
    else:
        node.runtime.reachable = False
    node.run_until(lambda: node.row.reason is not None)
    node.runtime.reachable = True
    node.run_until(ended(node, made))
    assert (node.row.state, node.row.reason) == (State.ROLLED_BACK, Code.REGRESSION)
    assert node.store.serving().models == ()


def test_runtime_that_is_away_is_waited_for(node):
    node.runtime.reachable = False
    made = deploy(node, "1.0", 1)
    node.run_until(lambda: node.row.state is State.PROBING)
    node.run_until(lambda: node.engine._runner._trouble is not None)
    assert node.row.state is State.PROBING
    node.runtime.reachable = True
    node.run_until(ended(node, made))
    assert node.row.state is State.COMMITTED


def test_state_without_outcome_fails_at_its_deadline(tmp_path, publisher):
    node = Node(tmp_path, publisher, deadlines={"probing": 0.3})
    node.start()
    node.runtime.reachable = False
    made = deploy(node, "1.0", 1)
    node.run_until(ended(node, made))
    assert (node.row.state, node.row.reason) == (State.FAILED, Code.DEADLINE_PASSED)
    assert "runtime" in node.row.detail


def test_missing_release_document_fails_at_the_deadline(tmp_path, publisher):
    node = Node(tmp_path, publisher, deadlines={"admitted": 0.3})
    node.start()
    made = publisher.make("1.0")
    node.order(1, made)
    node.run_until(lambda: node.journal.deployments() and ended(node, made)())
    assert (node.row.state, node.row.reason) == (State.FAILED, Code.DOCUMENT_MISSING)


def test_strangers_release_fails_typed_and_is_rejected(node):
    stranger = Publisher(seed=2)
    made = stranger.make("1.0")
    node.broker.offer(made)
    node.order(1, made)
    node.run_until(lambda: node.journal.deployments() and ended(node, made)())
    node.turn()
    assert (node.row.state, node.row.reason) == (State.FAILED, Code.UNKNOWN_SIGNER)
    assert [rejection.code for rejection in node.reported().rejections] == ["unknown_signer"]
    assert node.broker.sent == []


@pytest.mark.parametrize(
    ("forge", "code"),
    [
        (lambda publisher, made: publisher.desired(1, made), Code.STALE_GENERATION),
        (lambda publisher, made: publisher.desired(9, made, node="node-2"), Code.WRONG_NODE),
        (lambda publisher, made: Publisher(seed=3).desired(9, made), Code.UNKNOWN_SIGNER),
        (lambda publisher, made: sign(publisher.release_key, Role.DESIRED, b"{}"), Code.UNKNOWN_SIGNER),
        (lambda publisher, made: b"{", Code.BAD_DOCUMENT),
    ],
)
def test_desired_state_that_is_wrong_is_rejected_and_changes_nothing(node, publisher, forge, code):
    made = deploy(node, "1.0", 2)
    node.run_until(ended(node, made))
    before = node.journal.desired()
    node.broker.put(TOPICS.desired(NODE), forge(publisher, publisher.make("2.0")))
    node.run_until(lambda: node.reporter._rejections)
    node.turn()
    assert [rejection.code for rejection in node.reported().rejections] == [code]
    assert node.journal.desired() == before
    assert node.store.served(MODEL).decoded == made.decoded
    assert node.control.acked.count(TOPICS.desired(NODE)) == 2


def test_same_desired_state_again_changes_nothing(node):
    made = deploy(node, "1.0", 1)
    node.run_until(ended(node, made))
    events = len(node.events())
    node.order(1, made)
    node.run_until(lambda: node.control.acked.count(TOPICS.desired(NODE)) == 2)
    node.turn()
    assert len(node.events()) == events
    assert not node.reporter._rejections


def test_newer_generation_cancels_a_fetch_and_closes_its_link(node):
    first = node.publisher.make("1.0")
    node.broker.offer(first)
    node.broker.tamper = lambda message: [message] if message.frame < 2 else []
    node.order(1, first)
    node.run_until(lambda: node.verified(first) and len(node.verified(first)) >= 2)
    bulk = node.links.made[-1]
    node.broker.tamper = None
    second = deploy(node, "2.0", 2)
    node.run_until(ended(node, second))
    node.turn()
    assert bulk.stopped
    ends = [(e.release, e.after, e.reason) for e in node.events() if e.after in (State.CANCELLED, State.COMMITTED)]
    assert ends == [(first.digest, State.CANCELLED, "superseded"), (second.digest, State.COMMITTED, None)]
    assert len(node.broker.wants[-1].missing_frames()) == 0
    assert node.verified(first) is None


def test_decoding_begins_before_the_last_frame_and_is_told_of_every_one(node):
    made = deploy(node, "1.0", 1)
    node.run_until(ended(node, made))
    (decode,) = node.decoder.begun
    frames = made.manifest.frame_count
    assert sorted(decode.frames) == list(range(frames))
    assert len(decode.frames) > len(made.manifest.index_frames)
    assert "early" in decode.order.into.name


def test_decoding_that_began_early_ends_with_a_cancelled_fetch(node):
    first = node.publisher.make("1.0")
    node.broker.offer(first)
    node.broker.tamper = lambda message: [message] if message.frame < 4 else []
    node.order(1, first)
    node.run_until(lambda: node.decoder.begun)
    (early,) = node.decoder.begun
    assert early.order.into.exists()
    node.order(2, None)
    node.run_until(lambda: node.journal.desired()[0] == 2)
    assert early.cancelled
    assert not early.order.into.exists()


def test_decoding_that_began_early_and_failed_is_done_again(node):
    """Whatever killed it: the frames are all there, and nothing of them is fetched again."""
    real, begun = node.decoder.decode, []

    def decode(order):
        begun.append(order.into.name)
        if len(begun) == 1:
            raise DeployError(Code.DECODER_CRASHED, "killed for memory")
        real(order)

    node.decoder.decode = decode
    made = deploy(node, "1.0", 1)
    node.run_until(ended(node, made))
    assert node.row.state is State.COMMITTED
    assert ["early" in name for name in begun] == [True, False]
    assert len(node.broker.sent) == made.manifest.frame_count


def test_unpacking_waits_until_it_can_be_done_with_the_last_frame():
    """A thin link: 1,000 frames at one a second; decoding 200 MB takes 10 s on a slow core."""
    assert not is_time_to_unpack(100, 900, 100.0, 200_000_000)
    assert is_time_to_unpack(981, 19, 981.0, 200_000_000)
    assert is_time_to_unpack(1, 999, 0.001, 200_000_000)
    assert not is_time_to_unpack(0, 1000, 0.0, 200_000_000)


def test_damaged_and_foreign_frames_are_refused_counted_and_never_written(node):
    def tamper(message: FrameMessage) -> list[FrameMessage]:
        broken = bytes([message.data[0] ^ 1]) + message.data[1:]
        return [
            FrameMessage(message.epoch, 1 << 40, message.frame, broken),
            FrameMessage(message.epoch, 1 << 40, 5000, message.data),
            message,
        ]

    node.broker.tamper = tamper
    made = deploy(node, "1.0", 1)
    node.run_until(ended(node, made))
    node.turn()
    assert node.row.state is State.COMMITTED
    assert node.reported().frames_refused == 2 * made.manifest.frame_count
    assert max(want.seen_seq for want in node.broker.wants) <= made.manifest.frame_count


def test_staging_that_the_disk_damaged_is_fetched_again_where_it_is_damaged(node):
    made = node.publisher.make("1.0")
    node.broker.offer(made)
    real, harmed = node.decoder.decode, []

    def decode(order):
        if not harmed:
            data = bytearray(order.pack.read_bytes())
            data[made.manifest.frame_range(3)[0] + 5] ^= 255
            order.pack.write_bytes(data)
            harmed.append(True)
        real(order)

    node.decoder.decode = decode
    node.order(1, made)
    node.run_until(lambda: node.journal.deployments() and ended(node, made)())
    assert node.row.state is State.COMMITTED
    assert [frame for _, frame in node.broker.sent].count(3) == 2
    assert len(node.broker.sent) == made.manifest.frame_count + 1


def test_artifact_that_never_decodes_fails_with_the_decoders_code(node):
    node.decoder.error = ArtifactError(Code.BAD_SECTION, "section 3 does not decode")
    made = deploy(node, "1.0", 1)
    node.run_until(ended(node, made))
    assert (node.row.state, node.row.reason) == (State.FAILED, Code.BAD_SECTION)


def test_model_that_is_no_longer_wanted_is_unloaded(node):
    made = deploy(node, "1.0", 1)
    node.run_until(ended(node, made))
    node.order(2, None)
    node.run_until(lambda: node.runtime.unloads == [MODEL])
    node.turn()
    assert node.store.serving().models == ()
    assert node.store.versions() == frozenset()
    assert node.reported().models == ()


def test_delta_is_taken_when_its_base_is_here_and_two_versions_are_kept(node):
    made = [deploy(node, "1.0", 1)]
    node.run_until(ended(node, made[-1]))
    for generation, version in ((2, "2.0"), (3, "3.0")):
        made.append(deploy(node, version, generation, base=made[-1]))
        node.run_until(ended(node, made[-1]))
        assert node.row.state is State.COMMITTED
        assert node.row.base == made[-2].decoded
    assert node.store.versions() == {made[-1].decoded, made[-2].decoded}
    assert [request.incumbent for request in node.runtime.probes] == [None, made[0].decoded, made[1].decoded]


def test_order_back_to_the_kept_version_fetches_nothing(node):
    old = deploy(node, "1.0", 1)
    node.run_until(ended(node, old))
    new = deploy(node, "2.0", 2)
    node.run_until(ended(node, new))
    sent = len(node.broker.sent)
    node.order(3, old)
    node.run_until(lambda: ended(node, old)() and node.row.state is State.COMMITTED)
    assert len(node.broker.sent) == sent
    assert node.runtime.serving == {MODEL: old.decoded}


def test_node_without_the_memory_is_refused_before_byte_one(node):
    made = deploy(node, "1.0", 1, ram_bytes=1 << 40)
    node.run_until(ended(node, made))
    assert (node.row.state, node.row.reason) == (State.FAILED, Code.UNFIT_NODE)
    assert node.broker.sent == []


@pytest.mark.parametrize("disk", ["normal", "small"])
def test_packed_weights_are_named_when_they_were_proved_and_none_ordered_on_a_small_disk(tmp_path, publisher, disk):
    node = Node(tmp_path, publisher, disk=disk)
    node.start()
    made = deploy(node, "1.0", 1)
    node.run_until(ended(node, made))
    assert [probe.prepack for probe in node.runtime.probes] == [disk == "normal"]
    proved = digest_of(made.decoded.encode()) if disk == "normal" else None
    assert node.store.served(MODEL).prepack == proved


def test_reports_stay_until_they_are_acknowledged(node):
    made = deploy(node, "1.0", 1)
    node.run_until(ended(node, made))
    node.turn()
    last = node.events()[-1]
    assert (last.first, last.seq) == (1, len(WHOLE_WAY))
    node.broker.put(TOPICS.ack(NODE), encode_document(Ack(acks={node.journal.boot_id: 6})))
    node.run_until(lambda: len(node.journal.reports(100)) == 2)
    published = len(node.events())
    node.reporter.offer_again()
    node.turn()
    again = node.events()[published:]
    assert [(event.first, event.seq) for event in again] == [(7, 7), (7, 8)]


def test_status_says_online_with_its_session_and_offline_at_an_orderly_end(node):
    node.turn()
    topic = TOPICS.status(NODE)
    first = Status.model_validate_json(node.broker.of(topic)[0])
    assert (first.online, first.session, first.boot_id) == (True, 1, node.journal.boot_id)
    node.engine.finish()
    assert Status.model_validate_json(node.broker.retained[topic]).online is False


def test_order_that_changes_in_the_soak_puts_the_old_version_back_first(tmp_path, publisher):
    node = Node(tmp_path, publisher, soak_s=30.0)
    node.start()
    first = deploy(node, "1.0", 1)
    node.run_until(lambda: node.row.state is State.SOAKING)
    node.order(2, second := publisher.make("2.0"))
    node.broker.offer(second)
    node.run_until(lambda: node.row.release == second.digest and node.row.state is State.SOAKING)
    node.turn()
    ends = [(event.release, event.after, event.reason) for event in node.events() if event.reason]
    assert ends == [(first.digest, State.ROLLED_BACK, Code.SUPERSEDED)]
    assert node.runtime.unloads == [MODEL]
    assert node.store.served(MODEL).decoded == second.decoded


def test_roll_back_that_was_decided_is_finished_by_the_next_start(node):
    old = deploy(node, "1.0", 1)
    node.run_until(ended(node, old))
    bad = node.publisher.make("2.0")
    node.runtime.refuses.add(bad.decoded)
    real = node.runtime.load

    def load_until_decided(model):
        node.runtime.reachable = node.row.reason is None  # once the roll-back is decided, nobody answers
        real(model)

    node.runtime.load = load_until_decided
    deploy(node, "2.0", 2)
    node.run_until(lambda: node.row.reason is not None)
    assert node.row.state is State.ACTIVATING
    node.boot()
    node.start()
    node.run_until(ended(node, bad))
    assert (node.row.state, node.row.reason) == (State.ROLLED_BACK, Code.LOAD_FAILED)
    assert node.store.served(MODEL).decoded == old.decoded
    assert node.runtime.loads == [old.decoded]


def test_state_that_crashes_the_agent_again_and_again_fails(node):
    node.runtime.reachable = False
    made = deploy(node, "1.0", 1)
    node.run_until(lambda: node.row.state is State.PROBING)
    for _ in range(BOUNDS[State.PROBING].attempts):
        node.boot()
        node.runtime.reachable = False
        node.start()
    node.turn()
    assert (node.row.release, node.row.state) == (made.digest, State.FAILED)
    assert node.row.reason == Code.ATTEMPTS_EXHAUSTED


def test_second_failed_order_is_tried_again_only_by_a_newer_generation(node):
    bad = node.publisher.make("1.0")
    node.runtime.verdicts[bad.decoded] = ProbeVerdict.CRASHED
    deploy(node, "1.0", 1)
    node.run_until(ended(node, bad))
    node.runtime.verdicts.clear()
    node.order(1, bad)
    node.run_until(lambda: node.control.acked.count(TOPICS.desired(NODE)) == 2)
    node.turn()
    assert (node.row.state, node.row.reason) == (State.FAILED, Code.PROBE_CRASHED)
    node.order(2, bad)
    node.run_until(lambda: node.row.state is State.COMMITTED)


def test_serving_json_that_is_damaged_is_put_aside_and_the_order_activated_anew(node):
    made = deploy(node, "1.0", 1)
    node.run_until(ended(node, made))
    node.store.serving_path.write_bytes(b"{not json")
    node.boot()
    node.start()
    node.run_until(lambda: node.store.served(MODEL) is not None and ended(node, made)())
    assert node.store.served(MODEL).decoded == made.decoded
    assert digest_of(node.broker.retained[TOPICS.document(made.digest)]) == made.digest
