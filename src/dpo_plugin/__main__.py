"""``python -m dpo_plugin …``: the commands of ``axolotl dpo`` without the host's banner, so that JSON can be piped."""

from dpo_plugin.host.commands.cli import dpo

if __name__ == "__main__":
    dpo(prog_name="python -m dpo_plugin")
