"""The logger of the host room; axolotl shows INFO only of loggers whose name begins with its own."""

from axolotl.utils.logging import get_logger

LOG = get_logger("axolotl.dpo_plugin")
