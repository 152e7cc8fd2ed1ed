"""What one would write without this project: paho, QoS 0, 120 KiB per message. The peer of `bench transfer`.

`receive` takes messages until COUNT came; with --keep it also hashes each, writes it and calls fdatasync, after every
--sync-bytes or once at the end. `send` publishes a file. A plain subscriber has no credit, and Mosquitto drops QoS 0
messages beyond its queue; so that the peer ends at all, its sender stays within WINDOW messages of what was received,
too many ever to wait for one that keeps up.
"""

import argparse
import hashlib
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path

from paho.mqtt.client import Client, MQTTMessage, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from wire.manifest import FRAME_BYTES

DATA, RECEIVED = "plain/data", "plain/received"
WINDOW = 256
REPORT_EVERY = 32
AHEAD = 8
"""Messages given to paho ahead of the socket."""
TIMEOUT_S = 60.0


def _connected(port: int, topic: str) -> tuple[Client, threading.Event]:
    """A client whose event is set once the broker confirmed the subscription."""
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv311)
    subscribed = threading.Event()
    client.on_subscribe = lambda *_: subscribed.set()
    client.connect("127.0.0.1", port)
    client.subscribe(topic)
    return client, subscribed


def send(port: int, path: Path) -> None:
    """Publish `path` in pieces of FRAME_BYTES; begins when a line comes on stdin."""
    client, subscribed = _connected(port, RECEIVED)
    received, changed = [0], threading.Condition()

    def on_received(_client: Client, _data: object, message: MQTTMessage) -> None:
        with changed:
            received[0] = int(message.payload)
            changed.notify()

    client.on_message = on_received
    client.loop_start()
    subscribed.wait(TIMEOUT_S)
    print("ready", flush=True)
    sys.stdin.readline()
    print(time.time(), flush=True)
    with path.open("rb") as file:
        waiting: deque[MQTTMessageInfo] = deque()
        number = 0
        while piece := file.read(FRAME_BYTES):
            number += 1
            least = number - WINDOW
            with changed:
                changed.wait_for(lambda least=least: received[0] >= least, TIMEOUT_S)  # type: ignore[misc]
            waiting.append(client.publish(DATA, piece))
            if len(waiting) > AHEAD:
                waiting.popleft().wait_for_publish(TIMEOUT_S)
    sys.stdin.readline()
    client.disconnect()


def receive(port: int, count: int, keep: Path | None, sync_bytes: int) -> None:
    """Take `count` messages; prints the wall clock when the last one was dealt with."""
    client, subscribed = _connected(port, DATA)
    descriptor = os.open(keep, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) if keep else -1
    taken = [0, 0]

    def on_message(_client: Client, _data: object, message: MQTTMessage) -> None:
        taken[0] += 1
        if keep:
            hashlib.sha256(message.payload).digest()
            taken[1] += os.write(descriptor, message.payload)
            if taken[0] == count or 0 < sync_bytes <= taken[1]:
                os.fdatasync(descriptor)
                taken[1] = 0
        if taken[0] == count:
            print(time.time(), flush=True)
            client.disconnect()
        elif taken[0] % REPORT_EVERY == 0:
            client.publish(RECEIVED, str(taken[0]))

    client.on_message = on_message
    threading.Thread(target=lambda: subscribed.wait(TIMEOUT_S) and print("ready", flush=True), daemon=True).start()
    client.loop_forever()


def main() -> int:
    """One side of one transfer."""
    parser = argparse.ArgumentParser(prog="benchmarks.plain_paho")
    parser.add_argument("side", choices=("send", "receive"))
    parser.add_argument("port", type=int)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--count", type=int)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--sync-bytes", type=int, default=0)
    options = parser.parse_args()
    if options.side == "send":
        send(options.port, options.file)
    else:
        receive(options.port, options.count, options.keep, options.sync_bytes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
