"""`amperage keys`: signing keys and the trust policy that nodes are shipped with."""

import json
from pathlib import Path
from typing import Annotated

import typer

from host.files import make_directory, write_atomically
from host.keys import create_key
from wire.documents import encode_document
from wire.errors import ConfigError
from wire.signing import RoleKeys, TrustPolicy

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

RELEASE_KEY = "release.pem"
DESIRED_KEY = "desired.pem"
TRUST_FILE = "trust.json"


@app.callback()
def _keys() -> None:
    """Make signing keys and the trust policy of nodes."""


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Folder for release.pem, desired.pem and trust.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the keys' identities as JSON.")] = False,
) -> None:
    """Make a release key, a key for desired state, and the trust policy that names both."""
    make_directory(directory, mode=0o700)
    taken = [name for name in (RELEASE_KEY, DESIRED_KEY, TRUST_FILE) if (directory / name).exists()]
    if taken:
        raise ConfigError(
            f"{directory} holds {', '.join(taken)} already; keys are never overwritten, name another folder"
        )
    release = create_key(directory / RELEASE_KEY)
    desired = create_key(directory / DESIRED_KEY)
    policy = TrustPolicy(release=RoleKeys(keys=(release,)), desired=RoleKeys(keys=(desired,)))
    write_atomically(directory / TRUST_FILE, encode_document(policy), mode=0o644)
    if as_json:
        print(json.dumps({"directory": str(directory), "release": release.keyid, "desired": desired.keyid}))
        return
    print(f"release key  {release.keyid[:16]}…  {directory / RELEASE_KEY}   keep it off line")
    print(f"desired key  {desired.keyid[:16]}…  {directory / DESIRED_KEY}   for `amperage fleet serve`")
    print(f"trust policy {directory / TRUST_FILE}   copy it to every node and to the control plane")
