"""Which cells a cell needs: found from the names that cells bind, use and change.

A student copies the setup cell and one later cell. Where that cell uses what others
made, these have to come along: the slice of a cell is the least that must run for it,
in the order of the page. It is exact for names, and blind to what a function changes in
its arguments; `make copy-test` runs the slices.
"""

import ast
import builtins
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

BUILTIN = {*dir(builtins), "__name__", "display"}
CHANGING = {
    *("add", "append", "clear", "discard", "extend", "insert", "pop", "remove"),
    *("reverse", "sort", "update"),
}
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@dataclass
class Names(ast.NodeVisitor):
    """The names of a piece of code: what it binds, needs from before, and changes."""

    binds: set[str] = field(default_factory=set)
    needs: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)  # needed when a function is called
    changes: set[str] = field(default_factory=set)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.binds.add(node.id)
        elif node.id not in self.binds:
            self.needs.add(node.id)

    def visit_Assign(self, node: ast.Assign) -> None:
        for part in [node.value, *node.targets]:
            self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        for part in filter(None, [node.annotation, node.value, node.target]):
            self.visit(part)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self.visit(node.target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        if isinstance(node.target, ast.Name):
            self.visit(ast.Name(node.target.id, ast.Load()))
        self.visit(node.target)

    def visit_For(self, node: ast.For) -> None:
        for part in [node.iter, node.target, *node.body, *node.orelse]:
            self.visit(part)

    def visit_alias(self, node: ast.alias) -> None:
        self.binds.add(node.asname or node.name.split(".")[0])

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self.binds |= {node.name} if node.name else set()
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.place(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.place(node)

    def place(self, node: ast.Subscript | ast.Attribute) -> None:
        """A part of an object: to store into it changes the object."""
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            self.change(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        """A method that changes its object gives nothing, and so stands alone."""
        self.generic_visit(node)
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            if call.func.attr in CHANGING:
                self.change(call.func)

    def change(self, node: ast.expr) -> None:
        """The object of which `node` is a part is changed."""
        while not isinstance(node, ast.Name):
            if isinstance(node, ast.Subscript | ast.Attribute):
                node = node.value
            elif isinstance(node, ast.Call):
                node = node.func
            else:
                return
        if node.id not in self.binds:
            self.changes.add(node.id)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in [*node.decorator_list, *filter(None, [node.returns])]:
            self.visit(part)
        self.later |= self.function(node.args, node.body)
        self.binds.add(node.name)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Most are called where they stand, so that their body is read now."""
        self.needs |= self.function(node.args, [node.body]) - self.binds

    def function(self, listed: ast.arguments, body: Sequence[ast.AST]) -> set[str]:
        """What a function's body reads from outside; its defaults are read now."""
        args = [*listed.posonlyargs, *listed.args, *listed.kwonlyargs]
        args += filter(None, [listed.vararg, listed.kwarg])
        defaults = [*listed.defaults, *listed.kw_defaults]
        for part in filter(None, [*defaults, *(arg.annotation for arg in args)]):
            self.visit(part)
        inner = Names({arg.arg for arg in args})
        for part in body:
            inner.visit(part)
        return (inner.needs | inner.later) - inner.binds

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in [*node.decorator_list, *node.bases, *node.keywords]:
            self.visit(part)
        inner = Names({node.name})
        for part in node.body:
            inner.visit(part)
        self.needs |= inner.needs - self.binds
        self.later |= inner.later
        self.binds.add(node.name)

    def comprehension(self, node: Comprehension) -> None:
        """Its variables are its own, and all it reads is read now."""
        inner = Names(set(self.binds))
        for loop in node.generators:
            for part in [loop.iter, loop.target, *loop.ifs]:
                inner.visit(part)
        whole = isinstance(node, ast.DictComp)
        for part in [node.key, node.value] if whole else [node.elt]:
            inner.visit(part)
        self.needs |= inner.needs
        self.later |= inner.later - (inner.binds - self.binds)
        self.changes |= inner.changes

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension


class Cell(NamedTuple):
    """What one cell has to do with others."""

    binds: frozenset[str]
    needs: frozenset[str]  # when it runs
    later: frozenset[str]  # when the functions that it defines run
    changes: frozenset[str]  # of what others bind


def read(source: str) -> Cell:
    """The names of a cell's code."""
    names = Names()
    names.visit(ast.parse(source))
    needs, later = names.needs - BUILTIN, names.later - BUILTIN
    changes = names.changes - names.binds - BUILTIN
    return Cell(*map(frozenset, (names.binds, needs, later, changes)))


class Slice(NamedTuple):
    """The cells that must run for a cell, itself the last, and what none has."""

    cells: tuple[int, ...]
    missing: frozenset[str]


def slice_of(cells: Sequence[Cell], place: int) -> Slice:
    """The least that must run for the cell at `place`; the setup cell always does."""
    chain, todo, missing = {0, place}, [0, place], set()
    while todo:
        i = todo.pop()
        wanted = [(name, i, i) for name in cells[i].needs]
        # what a function reads may be of its own cell, and changed by a later one
        wanted += [(name, i + 1, place + 1) for name in cells[i].later]
        for name, start, until in wanted:
            makers = makers_of(name, cells, start, until)
            missing |= set() if makers else {name}
            todo += makers - chain
            chain |= makers
    return Slice(tuple(sorted(chain)), frozenset(missing))


def makers_of(name: str, cells: Sequence[Cell], start: int, until: int) -> set[int]:
    """The cells that make `name` what the cell at `start` sees before cell `until`.

    These are the last before it that binds the name, and all since that bind or change
    it: a function sees a name as it is when the function runs.
    """
    before = [i for i in range(start) if name in cells[i].binds]
    since = range(before[-1] if before else 0, until)
    made = {i for i in since if name in cells[i].binds | cells[i].changes}
    return made if any(name in cells[i].binds for i in made) else set()


def changed(cells: Sequence[Cell]) -> set[str]:
    """The names of which a later cell changes what an earlier one made."""
    return set().union(*(cell.changes for cell in cells))


def bound_late(cells: Sequence[Cell]) -> set[str]:
    """The names that a function looks up and only a later cell than its own binds."""
    late, bound = set(), set()
    for cell in cells:
        bound |= cell.binds
        late |= cell.later - bound
    return late
