"""What is registered, by whom: one plugin manager, built once, on first use."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pluggy

from dpo_plugin import hookspecs
from dpo_plugin.errors import RegistrationError, UnknownNameError


class Names(dict[str, Any]):
    """Name → thing, which also knows who brought each thing and explains an unknown name."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self._owners: dict[str, str] = {}

    def add(self, name: str, value: Any, owner: str) -> None:
        """Add a thing and the distribution or module that brought it."""
        self[name] = value
        self._owners[name] = owner

    def owner(self, name: str) -> str:
        """The owner of a registered name."""
        return self._owners[name]

    def find(self, name: str, where: str) -> Any:
        """The thing of that name.

        Args:
            name: As written in the YAML.
            where: The YAML key it was found under, for the message.

        Raises:
            UnknownNameError: With the known names and the closest one.
        """
        if name in self:
            return self[name]
        known = sorted(self)
        write = (difflib.get_close_matches(name, known, n=1) or known)[0]
        raise UnknownNameError(
            f"`{where}` names the {self.kind} {name!r}, which nobody registered. "
            f"Known: {', '.join(known)}. Write: {where}: {write}"
        )


@dataclass(frozen=True)
class Registry:
    """Everything the hooks returned."""

    formats: Names
    reference_strategies: Names
    losses: Names
    metrics: Names
    health_checks: Names
    scorers: Names


_KINDS = {
    "formats": ("dpo_preference_formats", "preference format"),
    "reference_strategies": ("dpo_reference_strategies", "reference strategy"),
    "losses": ("dpo_losses", "loss"),
    "metrics": ("dpo_metrics", "metric"),
    "health_checks": ("dpo_health_checks", "health check"),
    "scorers": ("dpo_scorers", "scorer"),
}


def build_registry(manager: pluggy.PluginManager) -> Registry:
    """Call every hook of a plugin manager once.

    Raises:
        RegistrationError: If a name is taken twice (both owners are named), or a hook returns no mapping.
    """
    return Registry(**{field: _collect(manager, hook, kind) for field, (hook, kind) in _KINDS.items()})


def _collect(manager: pluggy.PluginManager, hook: str, kind: str) -> Names:
    names = Names(kind)
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        owner = implementation.plugin_name
        things = implementation.function()
        if not isinstance(things, Mapping):
            raise RegistrationError(
                f"hook {hook} of {owner!r} returned {type(things).__name__}, not a mapping name → {kind}. "
                f"Write: return {{'<name>': <{kind}>}}"
            )
        for name, value in things.items():
            if name in names:
                raise RegistrationError(
                    f"{kind} {name!r} is registered twice: by {names.owner(name)!r} and by {owner!r}. "
                    f"Uninstall one of them, or let one choose another name in its {hook}."
                )
            names.add(name, value, owner)
    return names


def build_manager() -> pluggy.PluginManager:
    """A plugin manager with everything that is installed under the entry-point group ``dpo_plugin``.

    Raises:
        RegistrationError: If an entry point does not import or implements a hook that does not exist.
    """
    manager = pluggy.PluginManager("dpo_plugin")
    manager.add_hookspecs(hookspecs)
    try:
        manager.load_setuptools_entrypoints("dpo_plugin")
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = ", ".join(hook for hook, _ in _KINDS.values())
        raise RegistrationError(f"{error}. The hooks are: {known}.") from error
    except ImportError as error:
        raise RegistrationError(
            f"an entry point of the group `dpo_plugin` does not import: {error}. Fix or uninstall its package."
        ) from error
    if manager.get_plugin("builtins") is None:
        raise RegistrationError(
            "dpo_plugin's own entry point is missing: the package is on the path but not installed. "
            "Run: pip install dpo-plugin"
        )
    return manager


@cache
def get_registry() -> Registry:
    """The registry of this process."""
    return build_registry(build_manager())
