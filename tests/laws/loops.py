"""The loops of a random program: `scan`, `map`, `fori_loop` and `while_loop`."""

from __future__ import annotations

from tests.laws.bodies import Bodies, Scope
from tests.laws.program import Block, Line, Node
from tests.laws.world import number

_CARRY = "a carried module that comes back at another place, or a new one, has no fixed identity"


def _carry(bodies: Bodies, scope: Scope, inner: Scope) -> tuple[str, list[str], str, list[str]]:
    """A carry: its first value, lines that take it apart, what the body returns, the names that take it."""
    rng = bodies.rng
    c = bodies.name("c")
    kind = rng.randrange(8)
    mapped = scope.mapped
    (inner.varying if mapped else inner.numbers).append(c)
    start = bodies.read(scope)
    if kind <= 3 or not scope.modules:
        return start, [c], c, [bodies.name("v")]
    if kind == 4:
        inner.numbers.remove(c) if not mapped else inner.varying.remove(c)
        return "None", [], "None", []
    module, world = rng.choice(scope.modules)
    name = bodies.name("m")
    inner.scalars += [f"{name}{end}" for end in bodies.world.scalars[world]]
    inner.modules.append((name, world))
    if kind <= 6:
        return (
            f"({start}, {module})",
            [c, name],
            f"{c}, {name}",
            [bodies.name("v"), bodies.name("k")],
        )
    alike = [(m, w) for m, w in scope.modules if w in bodies.world.leaves and m != module]
    if world in bodies.world.leaves and alike and rng.random() < 0.5:
        bodies.may["CarryError"] = _CARRY
        (inner.varying if mapped else inner.numbers).remove(c)
        second, w2 = rng.choice(alike)
        other = bodies.name("m")
        inner.modules.append((other, w2))
        return (
            f"({module}, {second})",
            [name, other],
            f"{other}, {name}",
            [
                bodies.name("k"),
                bodies.name("k"),
            ],
        )
    bodies.may["CarryError"] = _CARRY
    fresh = f"clone({name})"
    return f"({start}, {module})", [c, name], f"{c}, {fresh}", [bodies.name("v"), bodies.name("k")]


def _loop_body(
    bodies: Bodies, inner: Scope, depth: int, parts: list[str], carry: str, c: str
) -> tuple[list[Node], str]:
    nodes: list[Node] = []
    if len(parts) > 1:
        nodes.append(Line(f"{', '.join(parts)} = {c}"))
    elif parts:
        nodes.append(Line(f"{parts[0]} = {c}"))
    nodes += bodies.body(inner, depth + 1, bodies.rng.randint(1, 3))
    pieces = carry.split(", ")
    if parts and pieces[0].startswith("c") and not pieces[0].startswith("clone"):
        pieces[0] = f"mix({pieces[0]}, {bodies.read(inner)})"
    return nodes, f"({', '.join(pieces)})" if len(pieces) > 1 else pieces[0]


def scan(bodies: Bodies, scope: Scope, depth: int) -> list[Node]:
    """`scan`, or `map`, over an array, a stack of modules, or nothing."""
    rng = bodies.rng
    inner = scope.inner()
    start, parts, carry, targets = _carry(bodies, scope, inner)
    x = bodies.name("x")
    values = ", ".join(number(rng, bodies.real) for _ in range(3))
    kind = rng.choice(["array", "array", "none", "stack"])
    stack = bodies.world.stacks and not scope.mapped and not scope.locked
    xs = f"array([{values}])"
    tail = ""
    if kind == "stack" and stack and not any(m.startswith("s") for m, _ in scope.modules):
        xs = bodies.world.stacks[0]
        inner.scalars += [f"{x}.w", f"{x}.c"]
        inner.modules.append((x, xs))
        bodies.may.setdefault("AxisError", "a stack that is sliced and read whole by closure")
    elif kind == "none":
        xs, tail = "None", ", length=3"
    else:
        (inner.varying if scope.mapped else inner.numbers).append(x)
    nodes, back = _loop_body(bodies, inner, depth, parts, carry, "c")
    y = rng.choice(["None", bodies.expression(inner), bodies.expression(inner)])
    fn = bodies.name("f")
    if not parts and rng.random() < 0.5 and xs != "None":
        ys = bodies.name("ys")
        nodes.append(Line(f"return {y}"))
        call = f"{ys} = map_({fn}, {xs})"
        if depth == 0:
            bodies.calls.append(call)
        return [Block(f"def {fn}({x}):", tuple(nodes)), Line(call)]
    nodes.append(Line(f"return {back}, {y}"))
    ys = bodies.name("ys")
    left = "_" if not targets else targets[0] if len(targets) == 1 else f"({', '.join(targets)})"
    _count_numbers(scope, targets)
    call = f"{left}, {ys} = scan({fn}, {start}, {xs}{tail})"
    first = "None" if xs == "None" else f"{xs}[0]"
    simpler = (f"{left}, {ys} = {fn}({start}, {first})",) if "s0" not in xs else ()
    if depth == 0:
        bodies.calls.append(call)
    return [Block(f"def {fn}(c, {x}):", tuple(nodes)), Line(call, simpler)]


def _count_numbers(scope: Scope, targets: list[str]) -> None:
    found = [t for t in targets if t.startswith("v")]
    (scope.varying if scope.mapped else scope.numbers).extend(found)


def fori(bodies: Bodies, scope: Scope, depth: int) -> list[Node]:
    """`fori_loop`."""
    rng = bodies.rng
    inner = scope.inner()
    start, parts, carry, targets = _carry(bodies, scope, inner)
    i = bodies.name("i")
    # A whole number has no derivative.
    inner.numbers.append(f"{i} / 10" if bodies.real else i)
    nodes, back = _loop_body(bodies, inner, depth, parts, carry, "c")
    nodes.append(Line(f"return {back}"))
    fn = bodies.name("f")
    left = "" if not targets else f"{', '.join(targets)} = "
    _count_numbers(scope, targets)
    steps = rng.choice(["1", "3", "3", "4", "0"])
    call = f"{left}fori_loop(0, {steps}, {fn}, {start})"
    if depth == 0:
        bodies.calls.append(call)
    return [
        Block(f"def {fn}({i}, c):", tuple(nodes)),
        Line(call, (f"{left}{fn}(array(0), {start})",)),
    ]


def while_(bodies: Bodies, scope: Scope, depth: int) -> list[Node]:
    """`while_loop`, which counts in its carry."""
    rng = bodies.rng
    inner = scope.inner()
    n = bodies.name("n")
    inner.numbers.append(n)
    nodes: list[Node] = []
    module = rng.choice(scope.modules) if scope.modules and rng.random() < 0.4 else None
    parts = [n]
    if module:
        name = bodies.name("m")
        parts.append(name)
        inner.scalars += [f"{name}{end}" for end in bodies.world.scalars[module[1]]]
        inner.modules.append((name, module[1]))
    nodes.append(Line(f"{', '.join(parts)} = c" if module else f"{n} = c"))
    nodes += bodies.body(inner, depth + 1, rng.randint(1, 3))
    nodes.append(Line(f"return {', '.join([f'{n} + 1', *parts[1:]])}"))
    fn, test = bodies.name("f"), bodies.name("t")
    count = rng.randint(1, 3)
    condition = f"{'c[0]' if module else 'c'} < {count}"
    if rng.random() < 0.4:
        condition = f"({condition}) & ({bodies.read(scope, varying=False)} < 96)"
    start = f"(array(0), {module[0]})" if module else "array(0)"
    targets = [bodies.name("v"), bodies.name("k")][: len(parts)]
    _count_numbers(scope, targets)
    call = f"{', '.join(targets)} = while_loop({test}, {fn}, {start})"
    if depth == 0:
        bodies.calls.append(call)
    return [
        Block(f"def {test}(c):", (Line(f"return {condition}"),)),
        Block(f"def {fn}(c):", tuple(nodes)),
        Line(call, (f"{', '.join(targets)} = {fn}({start})",)),
    ]
