"""A verb that has measures of its own below it, and one that runs where none of them is named."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from prefopt.core.errors import nearest

DEFAULT = "evaluate"


class WithDefault(TyperGroup):
    """A group whose command DEFAULT runs where the first word is no other command of it.

    What has the name of a command is reached with a path: `prefopt evaluate ./accuracy`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click: put DEFAULT before words that name no other command; ask for help as always."""
        words = [word for word in args[:2] if not word.startswith("-")]
        if len(words) == 2 and words[0] not in self.commands:
            known = ", ".join(self.list_commands(ctx))
            ctx.fail(
                f'"{words[0]}" is no measure, and a policy alone is followed by options. {nearest(words[0], self.commands)}Measures: {known}.'
            )
        named = bool(args) and (args[0] in ("-h", "--help") or (args[0] in self.commands and args[0] != DEFAULT))
        return super().parse_args(ctx, args if named else [DEFAULT, *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """See click: DEFAULT has no name of its own in usage lines."""
        name, command, rest = super().resolve_command(ctx, args)
        return (None if name == DEFAULT else name), command, rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help of DEFAULT, then the list of the other commands."""
        command = self.commands[DEFAULT]
        with command.make_context(ctx.info_name, [], parent=ctx.parent, resilient_parsing=True) as own:
            command.format_help(own, formatter)
        super().format_help(ctx, formatter)

    def list_commands(self, ctx: Any) -> list[str]:
        """Without DEFAULT, whose help stands above the list."""
        return [name for name in super().list_commands(ctx) if name != DEFAULT]
