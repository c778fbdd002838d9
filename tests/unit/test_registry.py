import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo_plugin import ReferenceStrategy, hookimpl, hookspecs
from dpo_plugin.errors import RegistrationError, UnknownNameError
from dpo_plugin.model.references import NoReference
from dpo_plugin.registry import _KINDS, build_manager, build_registry, get_registry
from dpo_plugin.samples.scorers import BatchScorer

HOOKS = [hook for hook, _ in _KINDS.values()]


def provider(hook: str, things: object) -> SimpleNamespace:
    def implementation():
        return things

    implementation.__name__ = hook
    return SimpleNamespace(**{hook: hookimpl(implementation)})


@pytest.mark.parametrize("hook", HOOKS)
def test_a_third_party_name_is_found_with_its_owner(hook: str):
    theirs = NoReference if hook == "dpo_reference_strategies" else print
    manager = build_manager()
    manager.register(provider(hook, {"theirs": theirs}), name="their-package")
    field = next(field for field, (name, _) in _KINDS.items() if name == hook)
    names = getattr(build_registry(manager), field)
    assert names["theirs"] is theirs
    assert names.owner("theirs") == "their-package"


@pytest.mark.parametrize("name", ["report", "types"])
def test_a_format_may_have_the_name_of_a_module_of_the_package(name: str):
    manager = build_manager()
    manager.register(provider("dpo_preference_formats", {name: print}), name="their-package")
    assert build_registry(manager).formats.find(name, "datasets[0].type: dpo_plugin") is print


@pytest.mark.parametrize("hook", HOOKS)
def test_a_name_taken_twice_names_both_owners(hook: str):
    manager = build_manager()
    theirs = NoReference if hook == "dpo_reference_strategies" else print
    manager.register(provider(hook, {"same": theirs}), name="first-package")
    manager.register(provider(hook, {"same": theirs}), name="second-package")
    with pytest.raises(RegistrationError, match=r"'same' is registered twice.*(first|second)-package.*(first|second)"):
        build_registry(manager)


class Empty(ReferenceStrategy):
    pass


class Silent(BatchScorer):
    pass


@pytest.mark.parametrize(
    ("hook", "things", "says"),
    [
        ("dpo_metrics", ["a"], "returned list, not a mapping name → metric"),
        ("dpo_metrics", None, "returned NoneType, not a mapping"),
        ("dpo_losses", {"mine": 0.5}, "gives loss 'mine', which is a float"),
        ("dpo_losses", {3: print}, "gives loss 3, whose name is no text"),
        ("dpo_losses", {" ": print}, "gives loss ' ', whose name is no text"),
        ("dpo_preference_formats", {"mine": Path}, "gives preference format 'mine', which is a type"),
        ("dpo_health_checks", {"mine": None}, "gives health check 'mine', which is a NoneType"),
        ("dpo_reference_strategies", {"mine": print}, "'mine', which is a builtin_function_or_method"),
        ("dpo_reference_strategies", {"mine": Path}, "the class Path, which is no subclass of ReferenceStrategy"),
        ("dpo_reference_strategies", {"mine": Empty}, "the class Empty, which does not define active or run"),
        ("dpo_scorers", {"mine": Path}, "the class Path, which is no subclass of BatchScorer"),
        ("dpo_scorers", {"mine": Silent}, "the class Silent, which does not define __call__"),
        ("dpo_scorers", {"mine": "length"}, "gives scorer 'mine', which is a str"),
    ],
)
def test_a_hook_that_returns_the_wrong_thing_is_refused(hook, things, says):
    manager = build_manager()
    manager.register(provider(hook, things), name="their-package")
    with pytest.raises(RegistrationError, match=rf"^hook {hook} of 'their-package' .*{says}"):
        build_registry(manager)


def test_a_hook_that_raises_is_refused():
    def dpo_losses():
        raise KeyError("beta")

    manager = build_manager()
    manager.register(SimpleNamespace(dpo_losses=hookimpl(dpo_losses)), name="their-package")
    with pytest.raises(RegistrationError, match=r"^hook dpo_losses of 'their-package' raised KeyError: 'beta'. Update"):
        build_registry(manager)


GOOD = "from dpo_plugin import hookimpl\n@hookimpl\ndef dpo_losses():\n    return {'theirs': print}\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Writes a distribution with one entry point of ours into a folder on the path, as pip would."""

    def write(package, module, needs="dpo-plugin", point="theirs"):
        name = package.replace("-", "_")
        metadata = tmp_path / f"{name}-2.0.dist-info"
        metadata.mkdir()
        text = f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.0\nRequires-Dist: {needs}\nRequires-Dist: numpy\n"
        (metadata / "METADATA").write_text(text, encoding="utf-8")
        (metadata / "entry_points.txt").write_text(f"[dpo_plugin]\n{point} = {name}\n", encoding="utf-8")
        (tmp_path / f"{name}.py").write_text(module, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    return write


def test_an_installed_package_is_found(install):
    install("their-package", GOOD, needs="dpo-plugin>=0.1,<9")
    assert build_registry(build_manager()).losses.owner("theirs") == "theirs"


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("1 / 0", "does not import: ZeroDivisionError: division by zero. Update, mend or uninstall its package."),
        ("from dpo_plugin import not_yet", "does not import: ImportError: cannot import name 'not_yet'"),
        ("import no_such_module", "does not import: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)", "does not import: SystemExit: 3"),
        (GOOD.replace("losses", "lozzes"), ".*dpo_lozzes.* The hooks are: dpo_preference_formats, .*"),
        (GOOD.replace("dpo_losses()", "dpo_losses(config)"), ".*config.* The hooks are: "),
    ],
)
def test_an_entry_point_that_cannot_be_used_is_named_with_its_package(install, module, says):
    install("their-package", module)
    with pytest.raises(RegistrationError, match=rf"^the entry point 'theirs' of their-package 2.0:? {says}"):
        build_registry(build_manager())


def test_a_package_that_needs_another_version_is_refused_before_it_is_imported(install):
    install("their-package", "1 / 0", needs="DPO_Plugin>=9.1")
    says = (
        r"^their-package 2.0 needs dpo-plugin>=9.1, and dpo-plugin \d.* is installed. Run: pip install --upgrade 'dpo-"
    )
    with pytest.raises(RegistrationError, match=says):
        build_manager()


def test_an_entry_points_name_taken_twice_names_both_packages(install):
    install("their-package", GOOD)
    install("other-package", GOOD)
    says = r"^the entry point 'theirs' is offered by (their|other)-package 2.0 and by (their|other)-package 2.0\. Un"
    with pytest.raises(RegistrationError, match=says):
        build_manager()


def test_an_entry_point_cannot_take_the_place_of_ours(install):
    install("their-package", GOOD, point="builtins")
    with pytest.raises(RegistrationError, match=r"^the entry point 'builtins' is offered by .* and by .*\. Uninstall"):
        build_manager()


def test_an_unknown_name_lists_the_known_and_suggests_one():
    with pytest.raises(UnknownNameError, match=r"'sigmoyd'.*Known: .*hinge.*Write: dpo_loss_type: sigmoid"):
        get_registry().losses.find("sigmoyd", "dpo_loss_type")


def test_every_hook_is_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text(encoding="utf-8")
    hooks = [name for name in vars(hookspecs) if name.startswith("dpo_")]
    assert sorted(hooks) == sorted(HOOKS)
    assert not [hook for hook in hooks if f"`{hook}`" not in text]
