"""What drawing a token costs the engine's thread, beside llama.cpp's samplers and a plain computation in numpy.

Rows are made up: logits fall with the logarithm of a token's rank, as those of language models do, in random places. A
figure is microseconds per token of a batch of 8 rows. llama.cpp gets its candidates filled in by numpy, which costs it
less than its own loop would. The last rows tell the floor: one pass over the logits, and one exponential of each.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.children import LLAMA, PEERS
from benchmarks.harness import PeerAbsent, Row, Subject, at_most, measure, row, rows_against
from runtime.sampling import Sampler, Sampling, score

Float = NDArray[np.float32]
ROWS, STEPS = 8, 12
VOCABULARIES = (49_152, 4_096)
CASES = {
    "greedy": Sampling(temperature=0.0),
    "temperature 0.8": Sampling(temperature=0.8, seed=1),
    "top_p 0.9": Sampling(temperature=0.8, top_p=0.9, seed=1),
    "top_k 40": Sampling(temperature=0.8, top_k=40, seed=1),
    "min_p 0.05": Sampling(temperature=0.8, min_p=0.05, seed=1),
}


def run() -> Sequence[Row]:
    """Rows of every case and vocabulary, and of a token's log probabilities."""
    told: list[Row] = []
    for size in VOCABULARIES:
        logits = _logits(size)
        for name, sampling in CASES.items():
            sampler = Sampler(sampling)
            subjects = {
                "ours": _microseconds(sampler.draw, logits),
                "llama.cpp": _llama(sampling, logits),
                "numpy, plainly": _microseconds(_plain(sampling), logits),
            }
            figures = measure(subjects)
            plain = figures.pop("numpy, plainly")
            metric = f"{name}, {size}"
            told += rows_against(metric, "us", "ours", figures, at_most(1.0, ratio=True))
            told += rows_against(metric, "us", "ours", {"ours": figures["ours"], "numpy, plainly": plain})
        others: dict[str, Callable[[Float], object]] = {
            "5 log probabilities": lambda row: score(row, 3, 5),
            "floor: largest of the logits": np.max,
            "floor: exponential of each logit": np.exp,
        }
        for name, work in others.items():
            samples = measure({"ours": _microseconds(work, logits)})["ours"]
            assert samples is not None
            told.append(row(f"{name}, {size}", "us", samples))
    return told


def _logits(size: int) -> Float:
    chance = np.random.default_rng(size)
    falling = -1.5 * np.log(np.arange(1, size + 1)) + chance.standard_normal((STEPS, ROWS, size)) * 0.5
    return chance.permuted(falling.astype(np.float32), axis=2)


def _microseconds(draw: Callable[[Float], object], logits: Float) -> Subject:
    def subject() -> float:
        began_s = time.process_time()
        for step in logits:
            for one in step:
                draw(one)
        return (time.process_time() - began_s) / (STEPS * ROWS) * 1e6

    return subject


def _plain(sampling: Sampling) -> Callable[[Float], int]:
    """As the definitions say, in float64, sorting everything."""
    chance = np.random.default_rng(1)

    def draw(row: Float) -> int:
        if sampling.temperature == 0.0:
            return int(np.argmax(row))
        shares = np.exp((row.astype(np.float64) - row.max()) / sampling.temperature)
        order = np.argsort(-shares)
        sorted_shares = shares[order] * (shares[order] >= sampling.min_p)
        if sampling.top_k:
            sorted_shares[sampling.top_k :] = 0
        sorted_shares /= sorted_shares.sum()
        sums = np.cumsum(sorted_shares)
        if sampling.top_p < 1.0:
            sorted_shares[np.searchsorted(sums, sampling.top_p) + 1 :] = 0
            sums = np.cumsum(sorted_shares)
        return int(order[np.searchsorted(sums, chance.random() * sums[-1], side="right")])

    return draw


def _llama(sampling: Sampling, logits: Float) -> Subject:
    """llama.cpp's chain for the same request; raises PeerAbsent on use where it is not built."""
    try:
        api, chain = _llama_chain(sampling)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error)

        def absent() -> float:
            raise PeerAbsent(reason)

        return absent
    import ctypes

    dtype = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    candidates = np.zeros(logits.shape[2], dtype)
    identities = np.arange(logits.shape[2], dtype=np.int32)
    pointer = candidates.ctypes.data_as(ctypes.POINTER(api.llama_token_data))

    def draw(row: Float) -> int:
        candidates["id"], candidates["logit"] = identities, row
        array = api.llama_token_data_array(pointer, candidates.size, -1, False)
        api.llama_sampler_apply(chain, ctypes.byref(array))
        return int(array.selected)

    return _microseconds(draw, logits)


def _llama_chain(sampling: Sampling) -> tuple[Any, Any]:
    import os

    os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(LLAMA / "build" / "bin"))
    for path in (str(PEERS), str(LLAMA / "src")):
        if path not in sys.path:
            sys.path.append(path)
    import llama_cpp as api  # type: ignore[import-not-found]

    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    if sampling.temperature == 0.0:
        parts = [api.llama_sampler_init_greedy()]
    else:
        parts = [api.llama_sampler_init_top_k(sampling.top_k)] if sampling.top_k else []
        parts += [api.llama_sampler_init_top_p(sampling.top_p, 1)] if sampling.top_p < 1.0 else []
        parts += [api.llama_sampler_init_min_p(sampling.min_p, 1)] if sampling.min_p else []
        parts += [api.llama_sampler_init_temp(sampling.temperature), api.llama_sampler_init_dist(1)]
    for part in parts:
        api.llama_sampler_chain_add(chain, part)
    return api, chain
