"""What is kept of prompts and answers: in blocks, and in the slots that requests left."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_fixtures import QUEUE, engine_fixture, load, reference_fixture, text_fixture  # noqa: F401  pytest finds them
from engine_requests import ask, ask_at_once, check_greedy, prompts

from runtime.engine import Engine
from runtime.generation import Reason
from runtime.model import PREFILL_TOKENS, Model
from runtime.prefix import BLOCK_TOKENS
from runtime.slots import READ_ANEW
from runtime.stats import Stats
from runtime.text import Text


def test_prompt_that_begins_like_one_that_runs_is_copied_and_answers_alike(
    engine: Engine, reference: Model, text: Text
) -> None:
    donor, long = prompts(text)[3], prompts(text)[3]
    alike = [*long[: PREFILL_TOKENS + 20], *long[5:25]]
    running = ask(engine, donor, 200)
    assert running.some.wait(20)
    again, parted = ask(engine, donor, 10), ask(engine, alike, 10)
    assert again.wait().reason is parted.wait().reason is Reason.LENGTH
    assert running.end is None, "the donor was meant to be still running"
    assert running.generation.cached == 0
    assert again.generation.cached == len(donor) - READ_ANEW
    assert parted.generation.cached == (PREFILL_TOKENS + 20) // BLOCK_TOKENS * BLOCK_TOKENS
    check_greedy(reference, donor, again.tokens)
    check_greedy(reference, alike, parted.tokens)
    assert running.wait().reason is Reason.LENGTH
    check_greedy(reference, donor, running.tokens)


def test_prompts_that_begin_alike_are_not_read_twice_in_one_step(engine: Engine, text: Text) -> None:
    beginning = prompts(text)[3][:32]
    asked = ask_at_once(engine, [[*beginning, 7], [*beginning, 8]], 5)
    for one in asked:
        one.wait()
    assert [one.generation.cached for one in asked] == [0, 33 - READ_ANEW]


def test_conversation_that_goes_on_is_not_read_again(engine: Engine, reference: Model, text: Text) -> None:
    prompt = prompts(text)[1]
    first = ask(engine, prompt, 60)
    first.wait()
    going_on = [*prompt, *first.tokens, *prompt]
    second = ask(engine, going_on, 10)
    second.wait()
    assert second.generation.cached == len(prompt) + 60 - 1  # the last token of an answer is never read
    check_greedy(reference, going_on, second.tokens)


def test_what_a_request_left_in_its_slot_is_gone_on_with_until_its_memory_is_given_back(
    engine: Engine, reference: Model, text: Text
) -> None:
    prompt = prompts(text)[3]
    parted = [*prompt[:70], *prompts(text)[1]]
    expected = [(prompt, 0), (parted, 70), (prompt, len(prompt) - READ_ANEW)]
    for tokens, cached in expected:  # the third is kept in blocks; its slot has but the 70
        one = ask(engine, tokens, 12)
        one.wait()
        check_greedy(reference, tokens, one.tokens)
        assert one.generation.cached == cached
    same = ask(engine, prompt, 12)
    same.wait()
    assert (same.generation.cached, same.tokens) == (len(prompt) - READ_ANEW, one.tokens)
    engine._slab.trim()
    again = ask(engine, [*prompt, *one.tokens], 5)
    again.wait()
    assert again.generation.cached % BLOCK_TOKENS == 0
    check_greedy(reference, [*prompt, *one.tokens], again.tokens)
    apart = ask(engine, [*prompt[: BLOCK_TOKENS - 1], *prompts(text)[1]], 5)
    apart.wait()
    assert apart.generation.cached == 0  # the first words of many are the same


def test_slot_that_an_answer_moved_out_of_has_what_that_one_read(engine: Engine, reference: Model, text: Text) -> None:
    short, long, other = prompts(text)[1], prompts(text)[4], prompts(text)[2][90::-1]
    for all_prompts, counts in (([short, other], (40, 3)), ([short, long], (3, 60))):
        asked = [ask(engine, prompt, count) for prompt, count in zip(all_prompts, counts, strict=True)]
        for one in asked:
            one.wait()  # the long one moves from slot 1, which had the other, to slot 0 when the short one leaves
    first, second = ask(engine, long, 60), ask(engine, other, 20)
    for prompt, one in ((long, first), (other, second)):
        one.wait()
        check_greedy(reference, prompt, one.tokens)


def test_prompt_of_whole_blocks_still_reads_its_last_token(engine: Engine, reference: Model, text: Text) -> None:
    prompt = prompts(text)[2]
    assert len(prompt) % BLOCK_TOKENS == 0
    for _ in range(2):
        one = ask(engine, prompt, 5)
        assert one.wait().reason is Reason.LENGTH
        check_greedy(reference, prompt, one.tokens)
    assert one.generation.cached == len(prompt) - READ_ANEW  # of its slot
    ask(engine, [7], 1).wait()
    one = ask(engine, prompt, 5)
    one.wait()
    check_greedy(reference, prompt, one.tokens)
    assert one.generation.cached == len(prompt) - BLOCK_TOKENS  # of the blocks


def test_prefixes_of_answers_that_ended_make_room(text: Text) -> None:
    engine = Engine("small", load(kept_blocks=2), Stats(), max_queue=QUEUE)
    for number, prompt in enumerate((prompts(text)[2], [7, *prompts(text)[2]])):
        for again in range(2):
            ask(engine, [9], 1).wait()  # or the slot would still have it
            one = ask(engine, prompt, 1)
            one.wait()
            assert one.generation.cached == again * 2 * BLOCK_TOKENS, f"prompt {number}"
    engine.close()


def test_without_memory_for_prefixes_everything_is_read(reference: Model, text: Text) -> None:
    engine = Engine("bare", load(kept_blocks=0), Stats(), max_queue=QUEUE)
    prompt = prompts(text)[2]
    for _ in range(2):
        one = ask(engine, prompt, 3)
        one.wait()
        assert one.generation.cached == 0
        check_greedy(reference, prompt, one.tokens)
    engine.close()
