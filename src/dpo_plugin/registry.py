"""What is registered, by whom: one plugin manager, built once, on first use."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

import pluggy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dpo_plugin import hookspecs
from dpo_plugin.errors import RegistrationError, UnknownNameError
from dpo_plugin.model.references import ReferenceStrategy
from dpo_plugin.samples.scorers import BatchScorer


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
_CLASSES: Mapping[str, tuple[type, Sequence[str]]] = {
    "dpo_reference_strategies": (ReferenceStrategy, ("active", "run")),
    "dpo_scorers": (BatchScorer, ("__call__",)),
}
"""Hook → the class that its things may extend, and methods of which they must define one."""

_MEND = "Update, mend or uninstall its package."


def build_registry(manager: pluggy.PluginManager) -> Registry:
    """Call every hook of a plugin manager once.

    Raises:
        RegistrationError: If a hook raises or returns no mapping, a thing is not of its hook's kind, or a name is taken
            twice (both owners are named).
    """
    return Registry(**{field: _collect(manager, hook, kind) for field, (hook, kind) in _KINDS.items()})


def _collect(manager: pluggy.PluginManager, hook: str, kind: str) -> Names:
    names = Names(kind)
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        owner = implementation.plugin_name
        try:
            things = implementation.function()
        except Exception as error:  # a third party's code
            raise RegistrationError(f"hook {hook} of {owner!r} raised {_named(error)}. {_MEND}") from error
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
            if wrong := _not_of_kind(name, value, hook):
                raise RegistrationError(f"hook {hook} of {owner!r} gives {kind} {name!r}, {wrong}. {_MEND}")
            names.add(name, value, owner)
    return names


def _not_of_kind(name: Any, value: Any, hook: str) -> str:
    """Say what is wrong with a registered thing; empty if it can be what its hook is for."""
    if not isinstance(name, str) or not name.strip():
        return "whose name is no text"
    if isinstance(value, type) and hook in _CLASSES:
        kind, methods = _CLASSES[hook]
        if not issubclass(value, kind):
            return f"the class {value.__name__}, which is no subclass of {kind.__name__}"
        own = any(getattr(value, method) is not getattr(kind, method) for method in methods)
        return "" if own else f"the class {value.__name__}, which does not define {' or '.join(methods)}"
    if hook == "dpo_reference_strategies" or not callable(value) or isinstance(value, type):
        return f"which is a {type(value).__name__}"
    return ""


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


# ── entry points ──


def build_manager() -> pluggy.PluginManager:
    """A plugin manager with everything that is installed under the entry-point group ``dpo_plugin``.

    Raises:
        RegistrationError: If an entry point does not import, implements a hook that does not exist, has a name that is
            taken, or is of a package that needs another version of ours.
    """
    manager = pluggy.PluginManager("dpo_plugin")
    manager.add_hookspecs(hookspecs)
    packages: dict[str, str] = {}
    for point in entry_points(group="dpo_plugin"):
        package = _package(point)
        if point.name in packages:
            raise RegistrationError(
                f"the entry point {point.name!r} is offered by {packages[point.name]} and by {package}. "
                "Uninstall one of them, or let one choose another name in its pyproject.toml."
            )
        packages[point.name] = package
        _register(manager, point, package)
    if manager.get_plugin("builtins") is None:
        raise RegistrationError(
            "dpo_plugin's own entry point is missing: the package is on the path but not installed. "
            "Run: pip install dpo-plugin"
        )
    return manager


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a package without metadata"


def _register(manager: pluggy.PluginManager, point: EntryPoint, package: str) -> None:
    """Import what an entry point names, and let it implement hooks."""
    if needs := _unmet(point):
        raise RegistrationError(
            f"{package} needs {needs}, and dpo-plugin {version('dpo-plugin')} is installed. "
            f"Run: pip install --upgrade '{needs}', or uninstall {package}"
        )
    which = f"the entry point {point.name!r} of {package}"
    try:
        manager.register(point.load(), name=point.name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = ", ".join(hook for hook, _ in _KINDS.values())
        raise RegistrationError(f"{which}: {' '.join(str(error).split())}. The hooks are: {known}.") from error
    except (Exception, SystemExit) as error:  # a third party's code
        raise RegistrationError(f"{which} does not import: {_named(error)}. {_MEND}") from error


def _unmet(point: EntryPoint) -> str:
    """What the package of an entry point requires of ours and does not get; pip checks that only when it installs."""
    for line in (point.dist.requires or []) if point.dist else []:
        requirement = Requirement(line)
        ours = canonicalize_name(requirement.name) == "dpo-plugin"
        if ours and not requirement.specifier.contains(version("dpo-plugin"), prereleases=True):
            return f"dpo-plugin{requirement.specifier}"
    return ""


@cache
def get_registry() -> Registry:
    """The registry of this process."""
    return build_registry(build_manager())
