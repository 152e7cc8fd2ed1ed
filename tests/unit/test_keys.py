"""host/keys.py against wire/signing.py, and `amperage keys init`."""

import json
import stat
from pathlib import Path

import pytest

from cli.main import main
from host.keys import create_key, load_signer
from wire.documents import parse_document
from wire.errors import ArtifactError, Code, ConfigError
from wire.signing import PublicKey, Role, RoleKeys, TrustPolicy, open_envelope


def _policy(*, release: PublicKey, desired: PublicKey) -> TrustPolicy:
    return TrustPolicy(release=RoleKeys(keys=(release,)), desired=RoleKeys(keys=(desired,)))


def test_signed_payload_opens_for_its_role_only(tmp_path: Path) -> None:
    public = create_key(tmp_path / "key.pem")
    signer = load_signer(tmp_path / "key.pem")
    assert signer.public == public
    policy = _policy(release=public, desired=public)
    envelope = signer.sign(Role.RELEASE, b'{"schema":1}')
    assert open_envelope(envelope, Role.RELEASE, policy) == b'{"schema":1}'
    with pytest.raises(ArtifactError) as refused:
        open_envelope(envelope, Role.DESIRED, policy)
    assert refused.value.code is Code.BAD_DOCUMENT


def test_payload_of_another_key_is_an_unknown_signer(tmp_path: Path) -> None:
    mine = create_key(tmp_path / "mine.pem")
    create_key(tmp_path / "stranger.pem")
    envelope = load_signer(tmp_path / "stranger.pem").sign(Role.DESIRED, b"{}")
    with pytest.raises(ArtifactError) as refused:
        open_envelope(envelope, Role.DESIRED, _policy(release=mine, desired=mine))
    assert refused.value.code is Code.UNKNOWN_SIGNER


def test_altered_payload_is_a_bad_signature(tmp_path: Path) -> None:
    public = create_key(tmp_path / "key.pem")
    envelope = json.loads(load_signer(tmp_path / "key.pem").sign(Role.RELEASE, b"{}"))
    envelope["payload"] = "e30K"  # the same object and a newline
    with pytest.raises(ArtifactError) as refused:
        open_envelope(json.dumps(envelope).encode(), Role.RELEASE, _policy(release=public, desired=public))
    assert refused.value.code is Code.BAD_SIGNATURE


def test_payload_that_no_document_can_hold_is_refused_before_signing(tmp_path: Path) -> None:
    create_key(tmp_path / "key.pem")
    with pytest.raises(ArtifactError, match="too long"):
        load_signer(tmp_path / "key.pem").sign(Role.RELEASE, bytes(50_000))


def test_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    create_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="never overwritten"):
        create_key(path)
    assert path.read_bytes() == before


def test_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    create_key(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_signer(tmp_path / "key.pem")


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", bytes(5000)]
)
def test_file_that_is_no_key_is_a_config_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="keys init"):
        load_signer(path)


def test_missing_key_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keys init"):
        load_signer(tmp_path / "none.pem")


def test_keys_init_makes_a_policy_that_trusts_its_keys(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["keys", "init", str(tmp_path / "keys")])
    assert ended.value.code == 0
    policy = parse_document(TrustPolicy, (tmp_path / "keys" / "trust.json").read_bytes())
    for role, name in ((Role.RELEASE, "release.pem"), (Role.DESIRED, "desired.pem")):
        envelope = load_signer(tmp_path / "keys" / name).sign(role, b"{}")
        assert open_envelope(envelope, role, policy) == b"{}"


def test_keys_init_over_existing_keys_fails_with_config_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_key(tmp_path / "release.pem")
    with pytest.raises(SystemExit) as ended:
        main(["keys", "init", str(tmp_path)])
    assert ended.value.code == 78
    assert "release.pem" in capsys.readouterr().err
    assert not (tmp_path / "desired.pem").exists()


def test_unknown_command_is_told_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["flete"])
    assert ended.value.code == 2
    assert "keys" in capsys.readouterr().err
