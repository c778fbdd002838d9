"""The audit in a few lines of text."""

from dpo_plugin.data.audit import DUPLICATE, Audit, audit_lines


def test_kept_rows_of_how_many():
    audit = Audit(read=5)
    audit.shapes["conversations"] = 5
    audit.kept.update({"made": 3})
    audit.cut.update({"made": 1})
    for row in (2, 4):
        audit.leave_out(row, "made", DUPLICATE, "as row 1")
    assert audit_lines([{"where": "datasets[0]", "path": "rows.jsonl", **audit.to_dict()}])[:2] == [
        "datasets[0] rows.jsonl: 5 rows read as conversations 5",
        "  kept 3 of 5 rows, of them cut 1; left out: duplicate 2",
    ]
