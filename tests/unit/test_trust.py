"""What SECURITY.md promises of the plugin's own code, read off its syntax trees."""

import ast

import pytest

from tests.unit.test_imports import TREES

UNPICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "np.load"}


def faults(tree: ast.AST) -> list[str]:
    """Imports of what unpickles, calls that run text or bytes, and switches that are always on."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            found += [name for name in names if name.partition(".")[0] in UNPICKLE]
        elif isinstance(node, ast.Call):
            found += [ast.unparse(node)] * (ast.unparse(node.func) in CALLS)
            found += [
                f"{keyword.arg}={ast.unparse(keyword.value)}"
                for keyword in node.keywords
                if keyword.arg in ("trust_remote_code", "shell", "allow_pickle")
                and ast.unparse(keyword.value) == "True"
            ]
            if ast.unparse(node.func).endswith("Environment") and not _escapes(node):
                found.append(ast.unparse(node))
    return found


def _escapes(call: ast.Call) -> bool:
    return any(keyword.arg == "autoescape" and ast.unparse(keyword.value) == "True" for keyword in call.keywords)


def test_our_code_unpickles_nothing_runs_no_text_and_escapes_what_it_renders():
    assert not {file.name: found for file, tree in TREES.items() if (found := faults(tree))}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(file)",
        "yaml.load(text)",
        "subprocess.run(line, shell=True)",
        "AutoConfig.from_pretrained(base, trust_remote_code=True)",
        "jinja2.Environment()",
        "eval(text)",
    ],
)
def test_what_would_be_found(line):
    assert faults(ast.parse(line))
