"""Finds the verb that was typed, or says which one was meant."""

from typing import Any

from typer.core import TyperGroup

# What others call it -> what it is called here.
MEANT = {
    "train": "run",
    "fit": "run",
    "finetune": "run",
    "fine-tune": "run",
    "start": "run",
    "launch": "run",
    "simulate": "run",
    "resume": "run CONFIG --resume",
    "demo": "run demo",
    "new": "init",
    "create": "init",
    "evaluate": "eval",
    "test": "eval",
    "score": "eval",
    "estimate": "plan",
    "cost": "plan",
    "dry-run": "plan",
    "check": "plan",
    "combine": "merge",
    "average": "merge",
    "fuse": "merge",
    "inspect": "merge --inspect",
    "save": "export",
    "convert": "export",
    "push": "export",
    "benchmark": "compare",
    "sweep": "compare",
    "tune": "compare",
    "list": "methods",
    "aggregators": "methods",
    "info": "doctor",
    "env": "doctor",
    "version": "--version",
    "help": "--help",
}


class Steps(TyperGroup):
    """The steps of a verb that has several, in the order in which they are taken."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the steps."""
        return list(self.commands)


class Verbs(TyperGroup):
    """The verbs; an unknown one is answered by the one that was meant."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return name, command and rest of what was typed."""
        meant = MEANT.get(args[0].lower()) if args and args[0] not in self.commands else None
        if meant is not None:
            ctx.fail(f"No such command '{args[0]}'. Did you mean 'flexlora {meant}'?")
        return super().resolve_command(ctx, args)
