"""`amperage forge` as tests call it, in this process."""

import typer

from cli.forge import app


def forge(*arguments: object) -> None:
    """Run the command; raises what it raises."""
    typer.main.get_command(app).main([str(argument) for argument in arguments], standalone_mode=False)
