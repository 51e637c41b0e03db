"""The private members of other libraries: each is as the list has it, and no other is used."""

import ast
import importlib
import inspect
import pkgutil
import re
from functools import cache
from pathlib import Path

import pytest
from helpers.private_members import PRIVATE_MEMBERS

import hf_tokenmixup

LISTED = {(member.owner, member.name) for member in PRIVATE_MEMBERS}
# Documented as public: of named tuples, and of the operating system's module.
PUBLIC = {"_replace", "_asdict", "_fields", "_exit"}
ROOT = Path(hf_tokenmixup.__file__).parent
ADVICE = "use a public member, or see tests/helpers/private_members.py"


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in PUBLIC


@cache
def source_of(owner):
    try:
        return inspect.getsource(owner)
    except (OSError, TypeError):
        return ""


def owns(owner, name):
    """Whether a class or module has an attribute, on itself or on its instances."""
    bases = getattr(owner, "__mro__", ())
    return hasattr(owner, name) or any(re.search(rf"\bself\.{name}\b", source_of(base)) for base in bases)


@cache
def defines(base, name):
    """Whether a class has an attribute that it does not inherit, on itself or on its instances."""
    return name in vars(base) or bool(re.search(rf"\bself\.{name}\b[^=\n(]*=[^=]", source_of(base)))


def resolve(full_name):
    module, _, name = full_name.rpartition(".")
    return getattr(importlib.import_module(module), name) if module else importlib.import_module(full_name)


OWNERS = {member.owner: resolve(member.owner) for member in PRIVATE_MEMBERS}

# Libraries of extras. A module that needs one is checked where it is installed.
OPTIONAL_LIBRARIES = ("gradio",)


def own_modules():
    for module in pkgutil.walk_packages(hf_tokenmixup.__path__, "hf_tokenmixup."):
        if not module.name.endswith("__main__"):
            try:
                yield importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name not in OPTIONAL_LIBRARIES:
                    raise


def is_own(cls):
    return cls.__module__.partition(".")[0] == "hf_tokenmixup"


@cache
def own_classes():
    return {
        cls: {base for base in cls.__mro__ if not is_own(base) and base is not object}
        for module in own_modules()
        for cls in vars(module).values()
        if inspect.isclass(cls) and cls.__module__ == module.__name__
    }


@cache
def named_in(cls):
    """The private names that the source of a class defines, or reads from `self`, `cls` and `super()`."""
    source = source_of(cls)
    read = re.findall(r"(?:\bself|\bcls|\bsuper\(\))\.(_[a-zA-Z]\w*)", source)
    # Python adds some to a class by itself.
    defined = vars(cls).keys() & set(re.findall(r"\b_[a-zA-Z]\w*", source))
    return {name for name in {*defined, *read} if is_private(name)}


def private_uses(source):
    """The private names that a module takes from something other than itself, each with its line."""
    tree = ast.parse(source)
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node, ast.Name):
                defined.add(node.id)
            elif isinstance(node.value, ast.Name) and node.value.id == "self":
                defined.add(node.attr)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute) and node.attr not in defined:
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            names = [word.value for word in node.args[1:2] if isinstance(word, ast.Constant)]
        yield from ((name, node.lineno) for name in names if is_private(name) and name not in defined)


# Private names that any of our own classes has: a module may read those of its bases from elsewhere in the package.
INHERITED = {
    name
    for cls, foreign in own_classes().items()
    for base in cls.__mro__
    if is_own(base)
    for name in vars(base)
    if is_private(name) and not any(defines(other, name) for other in foreign)
}


@pytest.mark.parametrize("member", PRIVATE_MEMBERS, ids=lambda member: f"{member.owner}.{member.name}")
def test_private_member_of_the_installed_library_is_as_listed(member):
    owner = resolve(member.owner)
    assert owns(owner, member.name), f"{member.owner} has no {member.name}. Needed for: {member.reason} {ADVICE}"
    if member.parameters is not None:
        function = inspect.getattr_static(owner, member.name)
        function = getattr(function, "__func__", function)
        found = " ".join(inspect.signature(function).parameters)
        assert found == member.parameters, (
            f"{member.owner}.{member.name} takes ({found}) in place of ({member.parameters}). {ADVICE}"
        )


def test_private_members_inherited_by_own_classes_are_listed():
    """Also where one of ours is called like one of a library by accident."""
    listed = {(base, name) for owner, name in LISTED for base in getattr(OWNERS[owner], "__mro__", ())}
    found = set()
    for cls, foreign in own_classes().items():
        for name in {name for base in cls.__mro__ if is_own(base) for name in named_in(base)}:
            having = [base for base in foreign if defines(base, name)]
            if having and not any((base, name) in listed for base in having):
                found.add(f"{cls.__name__} uses or overrides {having[0].__name__}.{name}")
    assert not found, f"{sorted(found)}: {ADVICE}"


def test_private_members_of_other_objects_are_listed():
    names = {name for _, name in LISTED}
    found = [
        f"{path.relative_to(ROOT)}, line {line}: {name}"
        for path in sorted(ROOT.rglob("*.py"))
        for name, line in private_uses(path.read_text(encoding="utf-8"))
        if name not in names and name not in INHERITED
    ]
    assert not found, f"{found}: {ADVICE}"


def test_private_members_that_are_listed_are_used():
    source = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py"))
    unused = [f"{owner}.{name}" for owner, name in sorted(LISTED) if not re.search(rf"\b{name}\b", source)]
    assert not unused, f"{unused}: not used any more, remove from tests/helpers/private_members.py"


@pytest.mark.parametrize(
    "source, found",
    [
        ("trainer._tr_loss", ["_tr_loss"]),
        ("from torch._dynamo import x", ["_dynamo"]),
        ("from peft.utils import _get_submodules", ["_get_submodules"]),
        ("import torch._inductor.config", ["_inductor"]),
        ("getattr(model, '_hook', None)", ["_hook"]),
        ("class A:\n  def __init__(self): self._mine = 1\n  def see(self): return self._mine", []),
        ("def _helper(): pass\n_helper()\nrow._replace(a=1)", []),
    ],
)
def test_private_uses_are_found_in_every_form(source, found):
    assert [name for name, _ in private_uses(source)] == found


def test_deprecated_names_of_checkpointing_are_used_in_one_module():
    """A warning about them is ignored, as peft causes it too."""
    old = re.compile(r"\.(is_gradient_checkpointing|gradient_checkpointing_(enable|disable))\b")
    using = {path.name for path in ROOT.rglob("*.py") if old.search(path.read_text(encoding="utf-8"))}
    assert using == {"gradient_checkpointing.py"}
