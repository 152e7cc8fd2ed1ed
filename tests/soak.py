"""A random mix of requests to a runtime, and what each of them is answered.

Prompts are of many lengths and share beginnings; clients read to the end, leave in the middle of a stream, leave before
they read a byte, or ask for more than their time allows. To try an option of the API in the mix, add a line to OPTIONS.
"""

import json
import random
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime_fixtures import MODEL

from host.unix_http import UnixConnection

TARGET = "/v1/completions"
BACK_OFF_S = 0.4


@dataclass(frozen=True, slots=True)
class Option:
    """Fields of a request. Answers that are not greedy are not judged; those that are `exact` may not part at all."""

    name: str
    body: dict[str, Any] = field(default_factory=dict)
    greedy: bool = True
    exact: bool = False


OPTIONS = (
    Option("plain"),
    Option("ignore_eos", {"ignore_eos": True}),
    Option("stop", {"stop": [" and", "."]}),
    Option("logprobs", {"logprobs": 2}),
    Option("deterministic", {"deterministic": True}, exact=True),
    Option("sampled", {"temperature": 0.9, "top_p": 0.9, "min_p": 0.01, "seed": 7}, greedy=False),
)
WAYS = ("whole", "stream", "leave a stream", "leave at once", "leave soon", "too slow", "too long")
WEIGHTS = (6, 6, 4, 2, 2, 1, 1)


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of one request. `tokens` is None unless the answer is whole."""

    option: Option
    way: str
    prompt: list[int]
    status: int
    text: str
    reason: str | None = None
    tokens: int | None = None


def make_prompts(windows: list[list[int]], count: int, chance: random.Random) -> list[list[int]]:
    """Fresh ones, ones that go on where others part, and ones that repeat themselves."""
    prompts = []
    for number in range(count):
        first, second = chance.sample(windows, 2)
        head = first[: chance.choice((16, 40, 128, 200))]
        if number % 3 == 0:
            prompts.append(first[: chance.randint(1, 400)])
        elif number % 3 == 1:
            prompts.append([*head, *second[: chance.randint(1, 150)]])
        else:
            prompts.append(head[:60] * chance.randint(2, 5))
    return prompts


@dataclass(slots=True)
class Mix:
    """Clients that ask until `until_s` (time.monotonic)."""

    address: Path
    prompts: list[list[int]]
    context_tokens: int
    until_s: float
    answered: list[Answered] = field(default_factory=list)
    """What is to be judged, each different answer once."""
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    _seen: set[tuple[Any, ...]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask_on(self, seed: int) -> None:
        """One client."""
        chance = random.Random(seed)
        while time.monotonic() < self.until_s:
            way = chance.choices(WAYS, WEIGHTS)[0]
            try:
                one = self._ask(way, chance.choice(OPTIONS), chance.choice(self.prompts), chance)
            except Exception as error:  # noqa: BLE001  whatever it is, the soak is to tell it and not to hang
                one = None
                with self._lock:
                    self.faults.append(f"{way}: {error!r}")
            with self._lock:
                self.counts[way] += 1
                if one is not None:
                    self._note(one)
            if one is not None and one.status == 429:
                time.sleep(chance.random() * BACK_OFF_S)

    def _note(self, one: Answered) -> None:
        self.counts[f"status {one.status}"] += 1
        self.counts[f"option {one.option.name}"] += 1
        expected = {200, 429, 504} if one.way != "too long" else {400}
        if one.status not in expected:
            self.faults.append(f"{one.way} was answered {one.status}: {one.text[:200]}")
        key = (one.option.name, tuple(one.prompt), one.text, one.tokens, one.reason)
        if one.status == 200 and one.option.greedy and key not in self._seen:
            self._seen.add(key)
            self.answered.append(one)

    def _ask(self, way: str, option: Option, prompt: list[int], chance: random.Random) -> Answered | None:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": chance.randint(1, 100), "temperature": 0} | option.body
        if way == "too slow":
            body |= {"max_tokens": self.context_tokens - len(prompt), "ignore_eos": True}
        elif way == "too long":
            body["max_tokens"] = self.context_tokens - len(prompt) + 1
        if way in ("leave at once", "leave soon"):
            self._send_and_leave(body | {"stream": chance.random() < 0.5}, chance.random() * (way == "leave soon"))
            return None
        connection = UnixConnection(self.address, 60.0)
        try:
            if way in ("whole", "too long"):
                return self._whole(connection, body, way, option)
            most = chance.randint(1, 10) if way == "leave a stream" else None
            return self._stream(connection, body | {"stream": True}, way, option, most)
        finally:
            connection.close()

    def _send_and_leave(self, body: dict[str, Any], after_s: float) -> None:
        data = json.dumps(body).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
            one.connect(str(self.address))
            one.sendall(f"POST {TARGET} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            time.sleep(after_s / 4)

    def _whole(self, connection: UnixConnection, body: dict[str, Any], way: str, option: Option) -> Answered:
        connection.request("POST", TARGET, json.dumps(body))
        reply = connection.getresponse()
        answer: dict[str, Any] = json.loads(reply.read())
        if reply.status != 200:
            return Answered(option, way, body["prompt"], reply.status, json.dumps(answer))
        choice, usage = answer["choices"][0], answer["usage"]
        return Answered(
            option, way, body["prompt"], 200, choice["text"], choice["finish_reason"], usage["completion_tokens"]
        )

    def _stream(
        self, connection: UnixConnection, body: dict[str, Any], way: str, option: Option, most: int | None
    ) -> Answered:
        """Up to `most` pieces of a streamed answer."""
        body["stream_options"] = {"include_usage": True}
        connection.request("POST", TARGET, json.dumps(body))
        reply = connection.getresponse()
        if reply.status != 200:
            return Answered(option, way, body["prompt"], reply.status, reply.read().decode())
        text, pieces, reason, tokens = "", 0, None, None
        while line := reply.readline():
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    if event["error"]["code"] != "deadline_passed":
                        raise AssertionError(event)
                    break
                for choice in event["choices"]:
                    text, reason, pieces = text + choice["text"], choice["finish_reason"], pieces + 1
                tokens = event["usage"]["completion_tokens"] if event.get("usage") else None
            if pieces == most:
                break
        return Answered(option, way, body["prompt"], 200, text, reason, tokens)
