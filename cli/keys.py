"""`amperage keys`: signing keys and the trust policy that nodes are shipped with."""

from pathlib import Path
from typing import Annotated

import typer

from host.files import write_atomically
from host.keys import create_key
from wire.documents import encode_document
from wire.signing import RoleKeys, TrustPolicy

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _keys() -> None:
    """Make signing keys and the trust policy of nodes."""


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="New folder for release.pem, desired.pem and trust.json.")],
) -> None:
    """Make a release key, a key for desired state, and the trust policy that names both."""
    directory.mkdir(parents=True, exist_ok=True)
    release = create_key(directory / "release.pem")
    desired = create_key(directory / "desired.pem")
    policy = TrustPolicy(release=RoleKeys(keys=(release,)), desired=RoleKeys(keys=(desired,)))
    write_atomically(directory / "trust.json", encode_document(policy), mode=0o644)
    print(f"release key  {release.keyid[:16]}…  {directory / 'release.pem'}   keep it off line")
    print(f"desired key  {desired.keyid[:16]}…  {directory / 'desired.pem'}   for `amperage fleet serve`")
    print(f"trust policy {directory / 'trust.json'}   copy it to every node")
