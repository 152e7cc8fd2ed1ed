"""The two sockets: modes, stale files, foreign files, living owners, inheritance."""

import os
import socket
import stat
from pathlib import Path

import pytest

from host.sockets import ADMIN_MODE, PUBLIC_MODE, open_listener
from wire.errors import ConfigError


@pytest.mark.parametrize("mode", [PUBLIC_MODE, ADMIN_MODE])
def test_socket_has_its_mode_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    before = os.umask(0)
    try:
        listener = open_listener(tmp_path / "s", mode, [])
    finally:
        assert os.umask(before) == 0, "the umask was not put back"
    with listener.socket:
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode


def test_socket_that_nobody_answers_on_is_replaced(tmp_path: Path) -> None:
    open_listener(tmp_path / "s", PUBLIC_MODE, []).socket.close()
    assert (tmp_path / "s").exists()
    with open_listener(tmp_path / "s", PUBLIC_MODE, []).socket, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))


def test_socket_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    with (
        open_listener(tmp_path / "s", PUBLIC_MODE, []).socket,
        pytest.raises(ConfigError, match="another process listens"),
    ):
        open_listener(tmp_path / "s", PUBLIC_MODE, [])
    assert (tmp_path / "s").exists()


def test_file_that_is_no_socket_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        open_listener(tmp_path / "s", PUBLIC_MODE, [])
    assert (tmp_path / "s").read_text() == "precious"


def test_path_that_is_too_long_or_has_no_directory_is_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shorten"):
        open_listener(tmp_path / ("x" * 108), PUBLIC_MODE, [])
    with pytest.raises(ConfigError, match="directory must exist"):
        open_listener(Path("/tmp/amperage-no-such-directory/s"), PUBLIC_MODE, [])


def test_inherited_socket_is_taken_by_its_path_and_its_file_stays(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as ours:
        other.bind(str(tmp_path / "other"))
        ours.bind(str(tmp_path / "s"))
        listener = open_listener(tmp_path / "s", PUBLIC_MODE, [other, ours])
        assert listener.socket is ours
        listener.remove()
        assert (tmp_path / "s").exists()


def test_own_socket_file_is_removed_but_not_a_successors(tmp_path: Path) -> None:
    first = open_listener(tmp_path / "s", PUBLIC_MODE, [])
    first.socket.close()
    second = open_listener(tmp_path / "s", PUBLIC_MODE, [])
    if first.inode != second.inode:
        first.remove()
        assert (tmp_path / "s").exists()
    second.socket.close()
    second.remove()
    assert not (tmp_path / "s").exists()
