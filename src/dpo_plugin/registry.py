"""What is registered, by whom: one plugin manager, built once, on first use."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

import pluggy

from dpo_plugin import hookspecs
from dpo_plugin.errors import RegistrationError, UnknownNameError

T = TypeVar("T")


@dataclass(frozen=True)
class Registered(Generic[T]):
    """A registered thing and the distribution or module that brought it."""

    value: T
    owner: str


class Names(Mapping[str, Any]):
    """A mapping name → thing that knows the owners and explains an unknown name."""

    def __init__(self, kind: str, entries: Mapping[str, Registered[Any]]):
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def owner(self, name: str) -> str:
        """The owner of a registered name."""
        return self._entries[name].owner

    def find(self, name: str, where: str) -> Any:
        """The thing of that name.

        Args:
            name: As written in the YAML.
            where: The YAML key it was found under, for the message.

        Raises:
            UnknownNameError: With the known names and the closest one.
        """
        if name in self._entries:
            return self[name]
        known = sorted(self._entries)
        close = difflib.get_close_matches(name, known, n=1)
        write = close[0] if close else (known[0] if known else "")
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


_KINDS = {
    "formats": ("dpo_preference_formats", "preference format"),
    "reference_strategies": ("dpo_reference_strategies", "reference strategy"),
    "losses": ("dpo_losses", "loss"),
    "metrics": ("dpo_metrics", "metric"),
    "health_checks": ("dpo_health_checks", "health check"),
}


def build_registry(manager: pluggy.PluginManager) -> Registry:
    """Call every hook of a plugin manager once.

    Raises:
        RegistrationError: If a name is taken twice (both owners are named), a hook returns no mapping, or a format has
            the name of a module of the package.
    """
    return Registry(**{field: _collect(manager, hook, kind) for field, (hook, kind) in _KINDS.items()})


def _collect(manager: pluggy.PluginManager, hook: str, kind: str) -> Names:
    entries: dict[str, Registered[Any]] = {}
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        owner = implementation.plugin_name
        things = implementation.function()
        if not isinstance(things, Mapping):
            raise RegistrationError(
                f"hook {hook} of {owner!r} returned {type(things).__name__}, not a mapping name → {kind}. "
                f"Write: return {{'<name>': <{kind}>}}"
            )
        for name, value in things.items():
            if name in entries:
                raise RegistrationError(
                    f"{kind} {name!r} is registered twice: by {entries[name].owner!r} and by {owner!r}. "
                    f"Uninstall one of them, or let one choose another name in its {hook}."
                )
            if hook == "dpo_preference_formats" and find_spec(f"dpo_plugin.{name}"):
                raise RegistrationError(
                    f"{kind} {name!r} of {owner!r} cannot be found as `type: dpo_plugin.{name}`, which is a module of "
                    f"dpo_plugin. Let {owner} choose another name in its {hook}."
                )
            entries[name] = Registered(value, owner)
    return Names(kind, entries)


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
