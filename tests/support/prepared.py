"""Prepared pairs without a folder for them."""

import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

from dpo_plugin.data.audit import Audit
from dpo_plugin.data.prepare import Preparation
from dpo_plugin.data.stored import FEATURES


def in_memory(preparation: Preparation) -> tuple[Dataset, Audit]:
    audit = Audit()
    table = pa.Table.from_batches(preparation.batches(audit), FEATURES.arrow_schema)
    return Dataset(InMemoryTable(table)), audit
