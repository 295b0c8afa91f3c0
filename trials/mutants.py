"""Mutation testing of the core: are faults found that somebody might well make?

    PYTHONPATH=benchmarks .venv/bin/python trials/mutants.py [--sample N] [--seed SEED]
        [--minutes M] [--only MODULE] [--out FILE] [--again]

A mutant is a module with one small fault: a comparison, an operator, a number, a
condition or a check that is another one. Of all that there are a sample is drawn, and
each is given to the tests of its module, in a process forked from this one, which has
imported JAX already and computed nothing. The first failure kills it, and so does
running for too long. Compiled programs are kept between mutants.

Writes the survivors and the score with its 95 % interval (Wilson 1927). Those known to
compute the same as the module do are told apart, with the reason; they do not count.
"""

import argparse
import ast
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mutants_equivalent import EQUIVALENT
from provenance import Start, commit, versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT = 240.0  # seconds after which a mutant counts as killed
WARM = (
    *("jax", "jax.numpy", "jax.scipy.special", "equinox", "flowjax.bijections"),
    *("flowjax.distributions", "optax", "optimistix", "diffrax", "scipy.stats"),
    *("sklearn.datasets", "matplotlib.pyplot", "hypothesis", "beartype", "pytest"),
    *("IPython", "PIL.Image", "ot", "tqdm"),
)
COPIED = ("gauss_flows", "tests", "tools", "_ext", "_style.py", "pyproject.toml")
_LAYERS = "test_inverse_log_det|test_gradients|test_identity|test_mask"
_TRAINING = {
    "test_defaults": "fit",
    "test_train": "",
    "test_streaming": "same_bits|many_seeds|bad_row|dtype|failure",
    "test_records": "of_a_run|a_run_tells|told_before",
    "test_checkpoint": "resumes|often|setting|other_data",
}
TESTS: dict[str, dict[str, str]] = {  # module: files, and which tests of them
    "masks": {"test_masks": "", "test_defaults": "masks"},
    "spline": {
        "test_spline": "",
        "test_defaults": "spline",
        "test_coupling": "flowjax|spline",
        "test_bijections": rf"({_LAYERS}).*\[(spline|diagonal, spline)",
        "test_rbig": "knots|number_of_bins|bin_too_narrow",
    },
    "transformers": {
        "test_coupling": "",
        "test_defaults": "",
        "test_diagonal": "",
        "test_rbig": "marginals|standardises|bounded|centres|number_of_bins|knots",
        "test_bijections": rf"({_LAYERS}).*\[(diagonal|affine)",
    },
    "linear": {
        "test_linear": "",
        "test_defaults": "Rotation|Permutation|Linear",
        "test_bijections": rf"({_LAYERS}).*\[(rotation|permutation|PLU)",
        "test_columns": r"side_by_side.*(rotation|permutation|PLU)",
    },
    "coupling": {
        "test_coupling": "",
        "test_defaults": "Coupling",
        "test_masks": "",
        "test_bijections": rf"({_LAYERS}).*\[(additive|affine|mixture|deep)",
        "test_rbig": "standardises|centres|kernels",
    },
    "_plan": _TRAINING,
    "train": _TRAINING,
    "_loop": _TRAINING,
}


class Site(NamedTuple):
    """One fault that can be put into a module, by a change of its syntax tree."""

    line: int
    what: str
    apply: Callable[[], None]


class Mutant(NamedTuple):
    """A module and the index of a site in it."""

    module: str
    index: int
    line: int
    what: str
    code: str


_SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def sites(tree: ast.AST) -> list[Site]:
    """All faults of a module, in the order of its lines."""
    found = [site for node in reached(tree) for site in faults(node)]
    return sorted(found, key=lambda site: site.line)


def reached(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run: no types, no decorators, and no text of messages."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                yield from reached(child)


def faults(node: ast.AST) -> Iterator[Site]:
    """The faults of one node."""
    line = getattr(node, "lineno", 0)

    def put(name: str, new: Any, what: str) -> Site:
        return Site(line, what, lambda: setattr(node, name, new))

    match node:
        case ast.Compare(ops=[op]) | ast.BinOp(op=op) | ast.BoolOp(op=op):
            if new := _SWAPS.get(type(op)):
                name, value = (
                    ("ops", [new()]) if isinstance(node, ast.Compare) else ("op", new())
                )
                yield put(name, value, f"{type(op).__name__} -> {new.__name__}")
        case ast.Constant(value=bool(value)):
            yield put("value", not value, f"{value} -> {not value}")
        case ast.Constant(value=int(value) | float(value)):
            yield put("value", value + 1, f"{value} -> {value + 1}")
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            opposite = ast.UnaryOp(ast.Not(), test)
            yield put("test", opposite, "condition negated")
        case ast.Expr(value=ast.Call()):
            yield put("value", ast.Constant(None), "call left out")
    for name, child in ast.iter_fields(node):
        if isinstance(child, ast.UnaryOp):
            what = f"{type(child.op).__name__} left out"
            yield Site(child.lineno, what, _setter(node, name, child.operand))


def _setter(node: ast.AST, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(node, name, value)


def mutants(module: str) -> list[Mutant]:
    """All mutants of a module."""
    source = path_of(ROOT, module).read_text()
    lines = source.splitlines()
    return [
        Mutant(module, i, site.line, site.what, lines[site.line - 1].strip())
        for i, site in enumerate(sites(ast.parse(source)))
    ]


def mutated(mutant: Mutant) -> str:
    """The source of a mutant."""
    tree = ast.parse(path_of(ROOT, mutant.module).read_text())
    sites(tree)[mutant.index].apply()
    return ast.unparse(ast.fix_missing_locations(tree))


def path_of(root: Path, module: str) -> Path:
    """Where a module of the package lies."""
    return root / "gauss_flows" / f"{module}.py"


class Selection:
    """A plugin that keeps the tests of a module, in the order of its files."""

    def __init__(self, files: dict[str, str]):
        self.files = files

    def pytest_collection_modifyitems(self, items: list) -> None:
        """Keep what is wanted."""
        order = [*self.files]
        kept = [i for i in items if re.search(self.files[i.path.stem], i.name)]
        items[:] = sorted(kept, key=lambda item: order.index(item.path.stem))


def run_tests(folder: Path, module: str) -> int:
    """The exit code of a module's tests in a copy of the project."""
    import pytest

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    files = [f"tests/{name}.py" for name in TESTS[module]]
    quiet = ["-x", "-q", "-p", "no:cacheprovider", "--no-header"]
    quiet += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is warm
    quiet += ["-o", "addopts=--jaxtyping-packages=gauss_flows,beartype.beartype"]
    return int(pytest.main([*quiet, *files], plugins=[Selection(TESTS[module])]))


def forked(folder: Path, module: str, *, as_it_is: bool = False) -> str:
    """The outcome of a module's tests in a process of its own.

    Only the package as it is leaves compiled modules, for all mutants to come.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of forks; it has computed nothing
        child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 70
        sys.dont_write_bytecode = not as_it_is
        try:
            code = run_tests(folder, module)
        finally:
            sys.stdout.flush()
            os._exit(code)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if status == 0 else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "too long"


def copy_project(folder: Path) -> None:
    """What the tests need, in a folder where a module may be changed."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        else:
            shutil.copy2(ROOT / name, folder / name)


def try_mutant(folder: Path, mutant: Mutant) -> dict[str, Any]:
    """Whether the tests of its module find a mutant."""
    path = path_of(folder, mutant.module)
    begin = time.perf_counter()
    path.write_text(mutated(mutant))
    outcome = forked(folder, mutant.module)
    shutil.copy2(path_of(ROOT, mutant.module), path)  # with its time, for bytecode
    row = mutant._asdict() | {"outcome": outcome}
    if outcome == "survived" and (reason := EQUIVALENT.get(name_of(mutant))):
        row |= {"outcome": "equivalent", "reason": reason}
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def name_of(mutant: Mutant) -> tuple[str, str, str]:
    """What a mutant is known by, whatever its line's number."""
    return mutant.module, mutant.code, mutant.what


def interval(killed: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, killed / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    spread = math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    half = z / (1 + z**2 / n) * spread
    return middle - half, middle + half


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The score and what it is made of."""
    counts = {"killed": 0, "too long": 0, "survived": 0, "equivalent": 0}
    for row in rows:
        counts[row["outcome"]] += 1
    killed = counts["killed"] + counts["too long"]
    n = killed + counts["survived"]
    low, high = interval(killed, n) if n else (0.0, 1.0)
    score = killed / n if n else math.nan
    return {**counts, "score": score, "low": low, "high": high}


def warm_up() -> None:
    """Import what takes long, and compute nothing, so that forking is safe."""
    for name in WARM:
        __import__(name)


def measure(chosen: list[Mutant], seconds: float) -> list[dict[str, Any]]:
    """Try mutants until all are done or the time is over."""
    end, rows = time.monotonic() + seconds, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        for module in {mutant.module: None for mutant in chosen}:
            begin = time.perf_counter()
            if forked(folder, module, as_it_is=True) != "survived":
                sys.exit(f"{module}: {(folder / 'log.txt').read_text()[-2000:]}")
            print(f"{module} as it is: {time.perf_counter() - begin:.0f} s", flush=True)
        for mutant in chosen:
            if time.monotonic() > end:
                break
            rows.append(try_mutant(folder, mutant))
            print(*rows[-1].values(), sep=" | ", flush=True)
    return rows


def main() -> None:
    """Draw a sample, try it, and write what survived."""
    parser = argparse.ArgumentParser(description="Mutation testing of the core.")
    parser.add_argument("--sample", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", choices=[*TESTS], help="one module")
    parser.add_argument("--out", type=Path, default=HERE / "results/mutation.json")
    parser.add_argument("--again", action="store_true", help="the survivors only")
    args = parser.parse_args()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    with tempfile.TemporaryDirectory() as cache:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        result = again(args.out) if args.again else sampled(args)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("score", "low", "high")}))


def sampled(args: argparse.Namespace) -> dict[str, Any]:
    """Draw a sample and try it."""
    modules = [args.only] if args.only else [*TESTS]
    everything = [mutant for module in modules for mutant in mutants(module)]
    size = min(args.sample, len(everything))
    chosen = random.Random(args.seed).sample(everything, size)
    start = Start()
    warm_up()
    rows = measure(chosen, 60 * args.minutes)
    return {
        **start.told(versions("jax", "equinox", "pytest")),
        "seed": args.seed,
        "of": {module: len(mutants(module)) for module in modules},
        "tried": len(rows),
        **summary(rows),
        "survivors": [r for r in rows if r["outcome"] in ("survived", "equivalent")],
    }


def again(file: Path) -> dict[str, Any]:
    """Try survivors of a finished run once more, and note which are found by now.

    Those that have a reason beside them already are left as they are.
    """
    result = json.loads(file.read_text())
    old = result["survivors"]
    for row in [row for row in old if "reason" not in row and not same_as(row)]:
        row |= {"reason": "the line has changed since"}
    still_open = [row for row in old if "reason" not in row]
    here = [mutant for row in still_open if (mutant := same_as(row))]
    warm_up()
    for row, mutant, tried in zip(
        still_open, here, measure(here, math.inf), strict=True
    ):
        match tried["outcome"]:
            case "equivalent":
                row |= {"outcome": "equivalent", "reason": EQUIVALENT[name_of(mutant)]}
            case "killed" | "too long":
                row |= {"reason": "found by a test written since", "at": commit()}
    found = result["killed"] * [{"outcome": "killed"}]
    found += result["too long"] * [{"outcome": "too long"}]
    return result | summary([*found, *old])


def same_as(row: dict[str, Any]) -> Mutant | None:
    """The mutant of today that a row tells of: of several, that of the nearest line."""
    name = (row["module"], row["code"], row["what"])
    known = [mutant for mutant in mutants(row["module"]) if name_of(mutant) == name]
    return min(known, key=lambda m: abs(m.line - row["line"])) if known else None


if __name__ == "__main__":
    main()
