"""Chat templates that only copy what was said: for these one rendering serves all conversations of the same turns.

Most templates look at who speaks and copy what is said. Which ones do is read from the template itself: `only_copies`
follows the contents of messages through it and is true only where they reach nothing but the output (or the question
whether they are empty). Everything that it does not know counts as looking at them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import jinja2
from jinja2 import nodes

from prefopt.data.groups import Turn

_HOLE = re.compile("\ue0f2(\\d+)\ue0f3")
_KEPT = 4096

_UNKNOWN = (
    nodes.Macro,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.AssignBlock,
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.Extends,
    nodes.Block,
    nodes.ScopedEvalContextModifier,
)
_SAME_FOR_ALL_TEXTS = ("defined", "undefined", "none", "string", "mapping")
_NEIGHBOURS: tuple[object, ...] = ("previtem", "nextitem", "changed", "cycle")

Render = Callable[[Sequence[str]], str]


_Parts = tuple[list[str], list[tuple[int, int]]]  # of a text, and which of them are holes for which content


class Skeletons:
    """Renderings of one template with holes for the contents of the turns."""

    def __init__(self) -> None:
        self.known: dict[tuple[object, ...], _Parts] = {}
        self.tails: dict[tuple[object, ...], _Parts | None] = {}

    def filled(self, turns: Sequence[Turn], contents: Sequence[str], about: object, render: Render) -> str:
        """`render(contents)` for a template that `only_copies`; it is called only for turns of a new kind.

        `about` is what else the rendering depends on. Whatever `render` raises, it raises.
        """
        key = (about, *kinds(turns, contents))
        if key not in self.known:
            if len(self.known) >= _KEPT:
                self.known.clear()
            self.known[key] = _parts(render(_with_holes(contents)))
        return _filled(self.known[key], contents)

    def behind(
        self, before: tuple[object, ...], turn: Turn, content: str, about: object, opening: Render, whole: Render
    ) -> str | None:
        """What the template writes for `turn` behind the opening of a conversation; None where it does not say so by itself.

        `before`: the kinds of the turns of the opening. `opening` and `whole` render these turns, and these and `turn`, for
        contents of them; they are called only for turns of a new kind.
        """
        key = (about, before, *kinds((turn,), (content,)))
        if key not in self.tails:
            if len(self.tails) >= _KEPT:
                self.tails.clear()
            holes = _with_holes(["" if isinstance(kind, tuple) else "x" for kind in before] + [content])
            first, both = opening(holes[:-1]), whole(holes)
            parts = _parts(both.removeprefix(first))
            own = both.startswith(first) and all(place == len(before) for _, place in parts[1])
            self.tails[key] = (parts[0], [(number, 0) for number, _ in parts[1]]) if own else None
        found = self.tails[key]
        return None if found is None else _filled(found, (content,))


def kinds(turns: Sequence[Turn], contents: Sequence[str]) -> tuple[object, ...]:
    """What a template that `only_copies` can tell of turns: who speaks, and whether something is said."""
    return tuple([turn.role if content else (turn.role,) for turn, content in zip(turns, contents, strict=True)])


def _with_holes(contents: Sequence[str]) -> list[str]:
    return [f"\ue0f2{place}\ue0f3" if content else "" for place, content in enumerate(contents)]


def _parts(text: str) -> _Parts:
    parts = _HOLE.split(text)
    return parts, [(number, int(parts[number])) for number in range(1, len(parts), 2)]


def _filled(skeleton: _Parts, contents: Sequence[str]) -> str:
    pieces = skeleton[0].copy()
    for number, place in skeleton[1]:
        pieces[number] = contents[place]
    return "".join(pieces)


def only_copies(template: str) -> bool:
    """Whether a chat template does nothing with the contents of its messages but write them, each as it is.

    False where the template cannot be parsed, or asks for the time.
    """
    try:
        body = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateError:
        return False
    if any(body.find_all(_UNKNOWN)) or any(name.name == "strftime_now" for name in body.find_all(nodes.Name)):
        return False
    parts = [*body.find_all(nodes.Getattr), *body.find_all(nodes.Getitem)]
    if any(_name(part) in _NEIGHBOURS for part in parts):
        return False
    flow = _Flow()
    while True:
        known = flow.size
        try:
            flow.follow(body, "other")
        except _LooksAtContents:
            return False
        if flow.size == known:
            return True


def _name(node: nodes.Expr) -> object:
    """What is taken of a value by `value.name` or `value["name"]`; None where only the rendering tells."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) else None


class _LooksAtContents(Exception):
    """The template does something with contents, or may do it."""


class _Flow:
    """Where the messages and their contents go. Names count as what they were ever set to, wherever that was.

    Contexts: "output" (written as it is), "truth" (asked whether it is empty), "list" and "message" (asked for a part),
    "other".
    """

    def __init__(self) -> None:
        self.lists = {"messages"}
        self.messages: set[str] = set()
        self.contents: set[str] = set()

    @property
    def size(self) -> int:
        return len(self.lists) + len(self.messages) + len(self.contents)

    def kind(self, node: nodes.Node) -> str:
        """What the value of an expression is: "list", "message", "content", or "" for what the contents do not reach."""
        match node:
            case nodes.Name():
                names = (("list", self.lists), ("message", self.messages), ("content", self.contents))
                return next((kind for kind, known in names if node.name in known), "")
            case nodes.Getitem():
                inner = self.kind(node.node)
                if inner == "list":
                    return "list" if isinstance(node.arg, nodes.Slice) else "message"
                if inner == "message":
                    return "content" if _name(node) in (None, "content") else ""
            case nodes.Getattr():
                if self.kind(node.node) == "message":
                    return "content" if node.attr == "content" else ""
            case nodes.Add():
                return "content" if "content" in (self.kind(node.left), self.kind(node.right)) else ""
            case nodes.Concat():
                return "content" if any(self.kind(part) == "content" for part in node.nodes) else ""
            case nodes.CondExpr():
                branches = [self.kind(branch) for branch in (node.expr1, node.expr2) if branch is not None]
                return next((kind for kind in branches if kind), "")
        return ""

    def follow(self, node: nodes.Node, context: str) -> None:
        """Go through `node`, whose value is used in `context`. Raises where contents are looked at."""
        match node:
            case nodes.Output():
                self._all(node.nodes, "output")
            case nodes.For():
                self._for(node)
            case nodes.Assign():
                self._assign(node)
            case nodes.If():
                self.follow(node.test, "truth")
                self._all([*node.body, *node.elif_, *node.else_], "other")
            case nodes.CondExpr():
                self.follow(node.test, "truth")
                self._all([branch for branch in (node.expr1, node.expr2) if branch is not None], context)
            case nodes.And() | nodes.Or():
                self._all([node.left, node.right], "truth" if context == "truth" else "other")
            case nodes.Not():
                self.follow(node.node, "truth")
            case nodes.Add() | nodes.Concat():
                parts = node.nodes if isinstance(node, nodes.Concat) else [node.left, node.right]
                self._all(parts, "output" if context == "output" else "other")
            case nodes.Filter() if (
                node.name in ("length", "count") and node.node is not None and self.kind(node.node) == "list"
            ):
                self._all([*node.args, *node.kwargs], "other")
                self.follow(node.node, "list")
            case nodes.Test() if node.name in _SAME_FOR_ALL_TEXTS and not node.args:
                self.follow(node.node, {"content": "truth", "": "other"}.get(kind := self.kind(node.node), kind))
            case nodes.Getitem() | nodes.Getattr():
                self._part(node, context)
            case nodes.Name():
                self._used(self.kind(node), context)
            case _:
                self._all(node.iter_child_nodes(), "other")

    def _all(self, parts: object, context: str) -> None:
        for part in parts:  # type: ignore[attr-defined]
            self.follow(part, context)

    def _used(self, kind: str, context: str) -> None:
        allowed = {"": None, "list": ("list", "truth"), "message": ("message",), "content": ("output", "truth")}[kind]
        if allowed is not None and context not in allowed:
            raise _LooksAtContents

    def _call(self, kind: str, name: str) -> None:
        kinds = {"list": self.lists, "message": self.messages, "content": self.contents}
        kinds[kind].add(name)
        if sum(name in known for known in kinds.values()) > 1:
            raise _LooksAtContents

    def _part(self, node: nodes.Getitem | nodes.Getattr, context: str) -> None:
        inner = self.kind(node.node)
        self.follow(node.node, inner if inner in ("list", "message") else "other")
        if isinstance(node, nodes.Getitem):
            self.follow(node.arg, "other")
        methods = {"list": list, "message": dict}.get(inner)
        if methods is not None and hasattr(methods, str(_name(node))):
            raise _LooksAtContents
        self._used(self.kind(node), context)

    def _for(self, node: nodes.For) -> None:
        inner = self.kind(node.iter)
        if node.recursive or inner in ("message", "content"):
            raise _LooksAtContents
        self.follow(node.iter, "list" if inner == "list" else "other")
        if inner == "list":
            if not isinstance(node.target, nodes.Name):
                raise _LooksAtContents
            self._call("message", node.target.name)
        if node.test is not None:
            self.follow(node.test, "truth")
        self._all([*node.body, *node.else_], "other")

    def _assign(self, node: nodes.Assign) -> None:
        kind = self.kind(node.node)
        if kind:
            if not isinstance(node.target, nodes.Name):
                raise _LooksAtContents
            self._call(kind, node.target.name)
        self.follow(node.node, {"list": "list", "message": "message", "content": "output"}.get(kind, "other"))
