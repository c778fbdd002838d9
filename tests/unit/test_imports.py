import subprocess
import sys

import pytest


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_axolotl():
    assert not loaded_by("import dpo_plugin") & {"torch", "axolotl", "transformers", "trl", "peft"}


@pytest.mark.parametrize("room", ["types", "data.formats", "data.render", "model.references", "compute.logps"])
def test_rooms_below_the_host_load_neither_axolotl_nor_trl(room: str):
    assert not loaded_by(f"import dpo_plugin.{room}") & {"axolotl", "trl"}


def test_registry_loads_neither_axolotl_nor_trl():
    assert not loaded_by("from dpo_plugin.registry import get_registry; get_registry()") & {"axolotl", "trl"}


def test_an_import_error_of_the_plugin_is_not_swallowed_by_the_host(monkeypatch: pytest.MonkeyPatch):
    import dpo_plugin
    from dpo_plugin.errors import DPOPluginError

    monkeypatch.setitem(dpo_plugin._LAZY, "Missing", "dpo_plugin.no_such_module")
    with pytest.raises(DPOPluginError, match="pip install"):
        dpo_plugin.Missing  # noqa: B018
