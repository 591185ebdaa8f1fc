"""megadit's one YAML: configurations, overrides and studies are read and written here, with the values as written.

The scalars of YAML 1.2's core schema (https://yaml.org/spec/1.2.2, section 10.3) in place of PyYAML's YAML 1.1, where
``010`` is 8, ``1:30`` is 90 and ``no`` is false. A scalar without quotes stays the text that was written until the key
it belongs to says what is wanted (``config.values``), so that a class called ``no``, ``007`` or ``1e3`` keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

from megadit.files.text import has_lone_surrogate

_MOST_NODES = 100_000  # after aliases are followed; the largest study of ours has hundreds
_DEEPEST = 100  # lists and sections inside one another; what walks over values later calls itself for each
_INSIDE = (0, 0)  # nodes and levels of what is being counted
_SHOWN = 60  # characters of a text in a message
_TAG = "tag:yaml.org,2002:"
# Texts that YAML 1.1, YAML 1.2 or megadit may take for a number or a truth value.
_AMBIGUOUS = re.compile(r"[-+.0-9].*|y|n|yes|no|on|off|true|false|null|~", re.IGNORECASE)


class Plain(str):
    """The text of a scalar that stands without quotes; ``config.values`` knows what it means where it stands."""

    __slots__ = ()


class YamlError(ValueError):
    """The text is not YAML as megadit takes it: one phrase, with the line where it is known."""


def parse_yaml(text: str, *, comments: bool = True) -> Any:
    """What ``text`` holds: dicts with text keys, lists, None, text, and ``Plain`` for what has no quotes.

    ``comments=False`` refuses text behind the value, which YAML would drop as a comment: a value on a command line
    has none. Raises YamlError, also for a key that is there twice.
    """
    try:
        if not comments:
            _refuse_rest(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise YamlError(_phrase(error)) from None


def dump_yaml(values: Any) -> str:
    """``values`` as YAML text that this reader and those of YAML 1.1 read alike; keys keep their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def shortened(text: str) -> str:
    """``text`` as a message of one line may show it."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _refuse_rest(text: str) -> None:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    remainder = text[node.end_mark.index :].strip() if node is not None else text.strip()
    if remainder:
        raise YamlError(f"drops {shortened(remainder)!r} as a comment: put the value in quotes")


def _phrase(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character {chr(error.character)!r} at position {error.position} is not allowed"
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    hint = "; indent with spaces" if "'\\t'" in (error.problem or "") else ""
    return f"{error.problem or error.context}{hint} (line {error.problem_mark.line + 1})"


def _problem(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with another idea of scalars, and bounds: keys once and of text, no cycles, few aliases.

    Of scalars without quotes only null is told apart, and ``<<`` before a mapping; all others keep their text.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node with all in it. Raises ConstructorError where it lies too deep, or there are too many."""
        self._depth, self._nodes = self._depth + 1, self._nodes + 1
        if self._depth > _DEEPEST:
            problem = f"is nested too deeply: more than {_DEEPEST} levels"
            raise _problem(problem, self.peek_event().start_mark)
        if self._nodes > _MOST_NODES:
            raise _problem(f"holds more than {_MOST_NODES} values", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Any:
        """The document, bounded. Raises yaml.MarkedYAMLError."""
        node = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        """A dict whose keys are the texts that were written. Raises ConstructorError for one that is there twice."""
        if not isinstance(node, yaml.MappingNode):
            raise _problem("what is tagged as a section is none", node.start_mark)
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a key is a list or a section", key.start_mark)
            if key.tag == f"{_TAG}merge":
                continue
            key.tag = f"{_TAG}str"
            if key.value in keys:
                raise _problem(f"the key {key.value} is there twice", key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _count(node: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(nodes, levels) of ``node`` with every alias followed. Raises ConstructorError for cycles and too many of each.

    An alias stands behind what it repeats, so that this calls itself for the levels of the text alone.
    """
    counted = known.get(id(node))
    if counted == _INSIDE:
        raise _problem("an alias stands inside what it repeats", node.start_mark)
    if counted is not None:
        return counted
    known[id(node)] = _INSIDE
    total, levels = 1, 0
    inside = node.value if not isinstance(node, yaml.ScalarNode) else ()
    for item in inside:
        for part in item if isinstance(item, tuple) else (item,):
            nodes, depth = _count(part, known)
            total, levels = total + nodes, max(levels, depth)
    limit = (_MOST_NODES, "values") if total > _MOST_NODES else (_DEEPEST, "levels") if levels >= _DEEPEST else None
    if limit is not None:
        problem = f"more than {limit[0]} {limit[1]} once its aliases are followed"
        raise _problem(problem, node.start_mark)
    known[id(node)] = total, levels + 1
    return known[id(node)]


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))  # which refuses a list or section that a tag calls text
    if has_lone_surrogate(text):  # by an escape, "\ud83d"
        raise _problem("a text holds half a surrogate pair, which is no character", node.start_mark)
    return Plain(text) if node.style is None else text


def _refused(loader: _Loader, node: yaml.Node) -> Any:
    raise _problem(f"the tag {node.tag} is not read here", node.start_mark)


_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"<<\Z"), ["<"])
for _name in ("null", "seq", "map"):
    _Loader.add_constructor(f"{_TAG}{_name}", getattr(yaml.SafeLoader, f"construct_yaml_{_name}"))
for _name in ("str", "int", "float", "bool", "merge"):
    _Loader.add_constructor(f"{_TAG}{_name}", _text)
_Loader.add_constructor(None, _refused)


class _Dumper(yaml.SafeDumper):
    """``yaml.SafeDumper`` that writes ``Plain`` as it stood, and quotes each text that may read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """A value that stands twice is written twice: ``&id001`` is nothing that people edit."""
        return True


def _write_plain(dumper: _Dumper, value: Plain) -> yaml.ScalarNode:
    node = dumper.represent_scalar(f"{_TAG}str", str(value))
    node.tag = dumper.resolve(yaml.ScalarNode, str(value), (True, False))  # so that it needs no quotes
    return node


def _write_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(f"{_TAG}str", value, style="'" if _AMBIGUOUS.fullmatch(value) else None)


_Dumper.add_representer(Plain, _write_plain)
_Dumper.add_representer(str, _write_text)
