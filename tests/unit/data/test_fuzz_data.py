"""Samples of the campaigns in tests/fuzz; FUZZ_CASES=2000 runs them whole."""

import os

import pytest

from dpo_plugin.data.render import Renderer
from tests.fuzz import prepared, rows

CASES = int(os.environ.get("FUZZ_CASES", "0"))


@pytest.mark.parametrize("kind", rows.KINDS)
def test_hostile_rows_are_kept_as_given_or_counted(tokenizer, tmp_path, kind):
    renderer = Renderer(tokenizer)
    found = set()
    for number, case in enumerate(rows.cases(1, CASES or 240)):
        if case.kind == kind:
            folder = tmp_path / str(number)
            folder.mkdir()
            found.add(rows.check(case, renderer, folder))
    assert found == {"read"}


def test_damaged_folders_never_give_other_ids():
    found = prepared.run(1, CASES or 90)
    assert found.total() == (CASES or 90)
    assert {name.split()[1] for name in found} <= {"same", "DataError"}
    assert not [name for name in found if name.endswith("DataError") and name.split()[0] not in ("beside", "forbid")]
