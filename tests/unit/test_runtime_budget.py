"""The arithmetic of memory for keys and values: what is left, whose share it is, and which slab fits it."""

from pathlib import Path

import pytest

from runtime.budget import Room, Sharing, available_bytes, heap_bytes, plan_slab
from runtime.prefix import BLOCK_TOKENS
from runtime.settings import RuntimeSettings
from runtime.slab import Shape, token_bytes
from wire.errors import Code, DeployError
from wire.manifest import DecoderConfig

MIB = 1 << 20
CONFIG = DecoderConfig(layers=8, hidden_size=512, kv_heads=8, head_size=64, vocab_size=4096, context_tokens=4096)
TOKEN = 2 * 8 * 8 * 64 * 4


def settings(**changes: int) -> RuntimeSettings:
    return RuntimeSettings(store=Path("/store"), **({"prefix_cache_bytes": 0} | changes))


def plan(left_bytes: int | None, sharing: Sharing | None = None, weights: int = 0, **changes: int) -> Shape:
    room = Room(left_bytes, "MemAvailable", weights, sharing or Sharing())
    shape, arithmetic = plan_slab(CONFIG, settings(**changes), room)
    assert str(shape.tokens) in arithmetic
    return shape


def held_bytes(shape: Shape) -> int:
    return (shape.tokens + shape.kept_blocks * BLOCK_TOKENS) * token_bytes(CONFIG)


def node(tmp_path: Path, available_kb: int, **files: str) -> Path:
    for name, text in {"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable:   {available_kb} kB\n", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_enough_memory_gives_every_slot_its_whole_context() -> None:
    assert token_bytes(CONFIG) == TOKEN
    shape = plan(4 << 30, prefix_cache_bytes=64 * MIB)
    assert (shape.slots, shape.capacity, shape.tokens) == (4, 4096, 4 * 4096)
    assert shape.kept_blocks == 64 * MIB // (BLOCK_TOKENS * TOKEN)
    assert shape.bound_by == "the model's own"


@pytest.mark.parametrize("left_mib", [33, 40, 64, 100, 257, 300, 515, 1000, 1025, 1600])
@pytest.mark.parametrize("prefix_mib", [0, 16, 128, 4000])
@pytest.mark.parametrize("promised_mib", [0, 3])
def test_slab_and_prefixes_never_hold_more_than_half_of_what_is_left(
    left_mib: int, prefix_mib: int, promised_mib: int
) -> None:
    sharing = Sharing(promised_bytes=promised_mib * MIB)
    shape = plan((left_mib + promised_mib) * MIB, sharing, prefix_cache_bytes=prefix_mib * MIB)
    assert held_bytes(shape) <= left_mib * MIB // 2
    assert 512 <= shape.capacity <= shape.tokens
    assert shape.slots == 4


def test_short_memory_runs_fewer_at_once_before_it_shortens_the_context() -> None:
    assert plan(2 * 5000 * TOKEN) == Shape(4, 4096, 0, 5000, "the model's own")
    assert plan(2 * 5000 * TOKEN, context_tokens=1000) == Shape(4, 1000, 0, 4000, "by context_tokens")
    shorter = plan(2 * 3000 * TOKEN)
    assert (shorter.capacity, shorter.tokens) == (2816, 3000)
    assert "kv_cache_bytes" in shorter.bound_by


def test_weights_and_promises_to_others_are_taken_off_first_and_the_rest_is_shared() -> None:
    alone = plan(2 * 4096 * TOKEN)
    left = 2 * (2 * 4096 * TOKEN) + 7 * MIB + 5 * MIB
    assert plan(left, Sharing(7 * MIB, to_come=1), weights=5 * MIB) == alone


def test_sessions_count_by_where_their_packed_weights_are() -> None:
    assert heap_bytes(100 * MIB, 1, mapped=False) == 150 * MIB
    assert heap_bytes(100 * MIB, 2, mapped=True) == 60 * MIB


def test_setting_is_taken_as_it_is_unless_there_is_less() -> None:
    asked = 2000 * TOKEN
    assert plan(8 << 30, kv_cache_bytes=asked).tokens == 2000
    assert plan(None, kv_cache_bytes=asked).tokens == 2000
    assert plan(1000 * TOKEN, kv_cache_bytes=asked).tokens == 1000


def test_node_that_says_nothing_of_its_memory_gets_what_the_settings_ask_for() -> None:
    assert plan(None).tokens == 4 * 4096


@pytest.mark.parametrize("changes", [{}, {"kv_cache_bytes": 511 * TOKEN}, {"prefix_cache_bytes": 64 * MIB}])
def test_version_without_room_for_one_request_is_refused_with_the_arithmetic(changes: dict[str, int]) -> None:
    with pytest.raises(DeployError) as refusal:
        plan(2 * 511 * TOKEN + 3 * MIB, Sharing(MIB), weights=2 * MIB, **changes)
    assert refusal.value.code is Code.LOAD_FAILED
    assert f"511 tokens of {TOKEN} bytes, and one request needs 512" in refusal.value.message
    assert "kv_cache_bytes" in refusal.value.message
    if "kv_cache_bytes" not in changes:
        assert "34.9 MiB left (MemAvailable) - 2.0 MiB for weights - 1.0 MiB promised" in refusal.value.message


def test_prefixes_give_way_to_the_one_sensible_request() -> None:
    assert plan(2 * 600 * TOKEN, prefix_cache_bytes=64 * MIB) == plan(2 * 600 * TOKEN)


def test_available_is_what_the_tightest_limit_leaves(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/system.slice"
    root = node(tmp_path, 8 << 20, **{
        "proc/self/cgroup": "0::/system.slice/runtime.service\n",
        f"{group}/memory.max": "max\n", f"{group}/memory.current": "1\n",
        f"{group}/runtime.service/memory.max": f"{1000 * MIB}\n",
        f"{group}/runtime.service/memory.high": f"{900 * MIB}\n",
        f"{group}/runtime.service/memory.current": f"{700 * MIB}\n",
        f"{group}/runtime.service/memory.stat": f"anon 1\ninactive_file {50 * MIB}\nactive_file {60 * MIB}\n",
    })  # fmt: skip
    assert available_bytes(root) == (250 * MIB, "memory.high of runtime.service")
    (root / group / "memory.max").write_text(f"{300 * MIB}\n")
    (root / group / "memory.current").write_text(f"{290 * MIB}\n")
    assert available_bytes(root) == (10 * MIB, "memory.max of system.slice")
    (root / "proc/meminfo").write_text("MemAvailable: 4 kB\n")
    assert available_bytes(root) == (4096, "MemAvailable")


def test_limits_of_the_first_hierarchy_count_too(tmp_path: Path) -> None:
    root = node(tmp_path, 8 << 20, **{
        "proc/self/cgroup": "4:memory:/box\n1:cpu:/\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{500 * MIB}\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{400 * MIB}\n",
        "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 7\ntotal_inactive_file {20 * MIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{400 * MIB}\n",
    })  # fmt: skip
    assert available_bytes(root) == (120 * MIB, "memory.limit_in_bytes of box")


def test_nothing_to_read_is_unknown_and_not_nothing(tmp_path: Path) -> None:
    assert available_bytes(tmp_path)[0] is None
