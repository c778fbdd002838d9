from pathlib import Path
from types import SimpleNamespace

import pluggy
import pytest

from dpo_plugin import hookimpl, hookspecs
from dpo_plugin.errors import RegistrationError, UnknownNameError
from dpo_plugin.registry import _KINDS, build_manager, build_registry, get_registry

HOOKS = [hook for hook, _ in _KINDS.values()]


def provider(hook: str, things: object) -> SimpleNamespace:
    def implementation():
        return things

    implementation.__name__ = hook
    return SimpleNamespace(**{hook: hookimpl(implementation)})


@pytest.mark.parametrize("hook", HOOKS)
def test_a_third_party_name_is_found_with_its_owner(hook: str):
    manager = build_manager()
    manager.register(provider(hook, {"theirs": print}), name="their-package")
    field = next(field for field, (name, _) in _KINDS.items() if name == hook)
    names = getattr(build_registry(manager), field)
    assert names["theirs"] is print
    assert names.owner("theirs") == "their-package"


@pytest.mark.parametrize("name", ["report", "types"])
def test_a_format_may_have_the_name_of_a_module_of_the_package(name: str):
    manager = build_manager()
    manager.register(provider("dpo_preference_formats", {name: print}), name="their-package")
    assert build_registry(manager).formats.find(name, "datasets[0].type: dpo_plugin") is print


@pytest.mark.parametrize("hook", HOOKS)
def test_a_name_taken_twice_names_both_owners(hook: str):
    manager = build_manager()
    manager.register(provider(hook, {"same": 1}), name="first-package")
    manager.register(provider(hook, {"same": 2}), name="second-package")
    with pytest.raises(RegistrationError, match=r"'same' is registered twice.*(first|second)-package.*(first|second)"):
        build_registry(manager)


def test_a_hook_that_returns_no_mapping_is_refused():
    manager = build_manager()
    manager.register(provider("dpo_metrics", ["a"]), name="their-package")
    with pytest.raises(RegistrationError, match="their-package.*list"):
        build_registry(manager)


def test_a_misspelled_hook_is_refused():
    manager = pluggy.PluginManager("dpo_plugin")
    manager.add_hookspecs(hookspecs)
    manager.register(provider("dpo_metricz", {}), name="their-package")
    with pytest.raises(pluggy.PluginValidationError, match="dpo_metricz"):
        manager.check_pending()


def test_an_unknown_name_lists_the_known_and_suggests_one():
    with pytest.raises(UnknownNameError, match=r"'sigmoyd'.*Known: .*hinge.*Write: dpo_loss_type: sigmoid"):
        get_registry().losses.find("sigmoyd", "dpo_loss_type")


def test_every_hook_is_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text(encoding="utf-8")
    hooks = [name for name in vars(hookspecs) if name.startswith("dpo_")]
    assert sorted(hooks) == sorted(HOOKS)
    assert not [hook for hook in hooks if f"`{hook}`" not in text]
