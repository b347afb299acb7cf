"""The transformations of a random program: for each, a function, its arguments, and the call."""

from __future__ import annotations

from typing import Any

from tests.laws.bodies import Bodies, Options, Scope
from tests.laws.loops import fori, scan, while_
from tests.laws.program import Block, Line, Node
from tests.laws.world import number


def _take(bodies: Bodies, scope: Scope, inner: Scope, most: int = 2) -> list[tuple[str, str]]:
    """Choose modules to pass: pairs of a parameter and an argument. They are added to the inner scope."""
    rng = bodies.rng
    pairs = []
    count = rng.randint(0, most) if scope.modules else 0
    # The same module may be passed twice.
    for expression, world in rng.choices(scope.modules, k=count) if count else []:
        name = bodies.name("m")
        pairs.append((name, expression))
        inner.scalars += [f"{name}{end}" for end in bodies.world.scalars[world]]
        inner.modules.append((name, world))
        if (expression, world) in scope.owned:
            inner.owned.append((name, world))
    return pairs


def _others(bodies: Bodies, call: list[str]) -> list[str]:
    """The arguments of a call, with other modules of the same kind."""
    found = []
    for argument in call:
        start, _, name = argument.rpartition("=")
        alike = [
            m for m, ends in bodies.world.scalars.items() if ends == bodies.world.scalars.get(name)
        ]
        found.append(f"{start}{'=' if start else ''}{bodies.rng.choice(alike) if alike else name}")
    return found


def _result(bodies: Bodies, scope: Scope, inner: Scope, modules: bool = True) -> tuple[str, str]:
    """The result of a function, and the names that it is assigned to."""
    rng = bodies.rng
    number_ = bodies.expression(inner)
    kind = rng.randrange(6)
    if kind == 0:
        return "None", ""
    name = bodies.name("v")
    if kind in (1, 4) and modules and inner.modules:
        module = rng.choice(inner.modules)[0]
        if kind == 4:
            # A container, a new module, or a Ref of one that came in.
            new = f"Leaf({number_}, array({number(rng, bodies.real)}))"
            second = rng.choice(inner.modules)[0]
            leaves = [f'cell({m}, "w")' for m, w in inner.modules if w in bodies.world.leaves]
            module = rng.choice(
                [
                    new,
                    f"[{module}, {new}]",
                    f'{{"a": {module}, "b": ({second}, {module})}}',
                    *leaves[:1],
                ]
            )
        back = bodies.name("k")
        target = f"{name}, {back} = "
        text = f"{number_}, {module}"
    elif kind == 2:
        second = bodies.name("v")
        target, text = f"{name}, {second} = ", f"{number_}, {bodies.expression(inner)}"
        (scope.varying if scope.mapped else scope.numbers).append(second)
    else:
        target, text = f"{name} = ", number_
    (scope.varying if scope.mapped else scope.numbers).append(name)
    return text, target


def plain(bodies: Bodies, scope: Scope, depth: int) -> list[Node]:
    """`jit`, `remat` or `checkify` of a function, with arguments passed in every way."""
    rng = bodies.rng
    kind = rng.choice(
        ["jit", "jit", "jit", "remat", "checkify", *([""] if bodies.options.direct else [])]
    )
    inner = scope.inner()
    pairs = _take(bodies, scope, inner)
    params, keywords, call = [], [], []
    if rng.random() < 0.5:
        name = bodies.name("x")
        params.append(name)
        call.append(bodies.read(scope))
        (inner.varying if scope.mapped else inner.numbers).append(name)
    partial = ""
    for name, argument in pairs:
        way = rng.choice(["position", "position", "keyword", "default", "kwdefault", "partial"])
        if way in ("default", "kwdefault", "partial"):
            # Not an argument of the call, so its structure is not the function's to change.
            inner.owned = [(m, w) for m, w in inner.owned if m != name]
        if way == "position" and not keywords:
            params.append(name)
            call.append(argument)
        elif way == "default" and not keywords:
            keywords.append(f"{name}={argument}")
        elif way == "kwdefault":
            keywords += [] if "*" in keywords else ["*"]
            keywords.append(f"{name}={argument}")
        elif way == "partial":
            keywords += [] if "*" in keywords else ["*"]
            keywords.append(name)
            partial += f", {name}={argument}"
        else:
            keywords += [] if "*" in keywords else ["*"]
            keywords.append(name)
            call.append(f"{name}={argument}")
    body = bodies.body(inner, depth + 1, rng.randint(1, 3))
    text, target = _result(bodies, scope, inner)
    fn = bodies.name("f")
    nodes: list[Node] = [
        Block(f"def {fn}({', '.join(params + keywords)}):", (*body, Line(f"return {text}")))
    ]
    target = target if not text.startswith("None") else ""
    made = f"partial({fn}{partial})" if partial else fn
    if depth == 0 and kind == "jit":
        compiled = bodies.name("j")
        nodes.append(Line(f"{compiled} = jit({made})", (f"{compiled} = {made}",)))
        again = f"{compiled}({', '.join(call)})"
        bodies.calls.append(target + again)
        for _ in range(2 if pairs else 0):
            bodies.calls.append(f"{target}{compiled}({', '.join(_others(bodies, call))})")
        if partial:
            bodies.routes.append(("partial", compiled))
        if any("=" in k for k in keywords):
            bodies.routes.append(("default", fn))
        nodes.append(Line(target + again))
    else:
        arguments = ", ".join(call)
        called = f"{kind}({made})" if kind else made
        nodes.append(Line(f"{target}{called}({arguments})", (f"{target}{made}({arguments})",)))
    return nodes


def departure(bodies: Bodies, scope: Scope, depth: int) -> list[Node]:
    """A function that changes something and then lets it go, where another name still holds it."""
    rng = bodies.rng
    found = [(m, w) for m, w in scope.owned if w in bodies.world.plains]
    if not found:
        return plain(bodies, scope, depth)
    module, name, fn = rng.choice(found)[0], bodies.name("m"), bodies.name("f")
    # What is held here is not named in the function, which could find it without its argument.
    held = rng.choice(scope.modules)[0]
    holder = bodies.name("h")
    new = f"array({number(rng, bodies.real)})"
    leaf = f"Leaf({new}, {new})"
    changes = {
        held: [
            "{}.level = 3",
            f"{{}}.extra = Ref({new})",
            f"{{}}.extra = {leaf}",
            f"{{}}.arr = {new}",
            "{}.late = {}",
            f'{{}}.late = [{{}}, "{rng.choice("ab")}"]',
        ],
        f"[{held}]": [f"{{}}.append({leaf})", "{}.reverse()", "{}.append(1)", "{}[:] = [{}]"],
        f'{{"a": {held}}}': [f'{{}}["z"] = {leaf}', '{}.pop("a")', '{}["a"] = 2', "{}.update(b=1)"],
    }
    what = rng.choice(list(changes))
    place = rng.choice(["head", "late", "net"])
    way = rng.choice(["{}", "{}", "[{}]", "({}, 1)", '{{"k": {}}}'])
    inner = {"{}": "", "[{}]": "[0]", "({}, 1)": "[0]", '{{"k": {}}}': '["k"]'}[way]
    change = rng.choice(changes[what])
    at = f"{name}.{place}{inner}"
    gone = [f"{name}.{place} = None", f"del {name}.{place}", f"{name}.{place} = {leaf}"]
    if way == "[{}]":
        gone.append(f"{name}.{place}.clear()")
    lines = [change.replace("{}", at), rng.choice(gone)]
    if rng.random() < 0.3:
        lines.insert(rng.randrange(3), f"{name}.level = 2")
    kind = rng.choice(["jit", "jit", "remat", "checkify"])
    body = [Line(line) for line in lines]
    # Only the surroundings know it by that name, in its container too.
    return [
        Line(f"{holder} = {what}"),
        Line(f"{module}.{place} = {way.format(holder)}"),
        Block(f"def {fn}({name}):", (*body, Line("return None"))),
        Line(f"{kind}({fn})({module})", (f"{fn}({module})",)),
    ]


def method(bodies: Bodies, scope: Scope, depth: int) -> list[Node]:
    """A bound method, or a module as a function."""
    if not scope.modules or scope.locked:
        return bodies.simple(scope)
    rng = bodies.rng
    module, world = rng.choice(scope.modules)
    if world in bodies.world.leaves and ".c" not in bodies.world.scalars[world]:
        return bodies.simple(scope)
    kind = rng.choice(["jit", "remat"])
    fn = rng.choice([f"{module}.step", module])
    value = bodies.read(scope, varying=False)
    name = bodies.name("v")
    scope.numbers.append(name)
    if depth == 0 and kind == "jit":
        compiled = bodies.name("j")
        bodies.calls.append(f"{name} = {compiled}({value})")
        bodies.routes.append(("method", world))
        return [
            Line(f"{compiled} = jit({fn})", (f"{compiled} = {fn}",)),
            Line(f"{name} = {compiled}({value})"),
        ]
    return [Line(f"{name} = {kind}({fn})({value})", (f"{name} = {fn}({value})",))]


def branch(bodies: Bodies, scope: Scope, depth: int) -> list[Node]:
    """`cond` or `switch`."""
    rng = bodies.rng
    count = 2 if rng.random() < 0.7 else 3
    nodes: list[Node] = []
    names = []
    shape = rng.choice(["none", "one", "two"])
    passed = rng.choice(scope.modules) if scope.modules and rng.random() < 0.4 else None
    for _ in range(count):
        inner = scope.inner()
        x, params = bodies.name("x"), []
        params.append(x)
        (inner.varying if scope.mapped else inner.numbers).append(x)
        if passed:
            name = bodies.name("m")
            params.append(name)
            inner.scalars += [f"{name}{end}" for end in bodies.world.scalars[passed[1]]]
            inner.modules.append((name, passed[1]))
            if passed in scope.owned and rng.random() < 0.2:
                inner.owned.append((name, passed[1]))
                bodies.may["BranchError"] = "branches that leave different structures behind"
        body = bodies.body(inner, depth + 1, rng.randint(0, 2))
        out = {
            "none": "None",
            "one": f"mix({x}, {bodies.read(inner)})",
            "two": f"mix({x}, {bodies.read(inner)}), mix({x}, {bodies.read(inner)})",
        }[shape]
        fn = bodies.name("f")
        names.append(fn)
        nodes.append(Block(f"def {fn}({', '.join(params)}):", (*body, Line(f"return {out}"))))
    operands = [bodies.read(scope), *([passed[0]] if passed else [])]
    pred = bodies.predicate(scope)
    which = f"{bodies.read(scope, varying=False)} % 4" if not bodies.real else rng.choice("0125")
    targets = [bodies.name("v") for _ in range({"none": 0, "one": 1, "two": 2}[shape])]
    (scope.varying if scope.mapped else scope.numbers).extend(targets)
    target = ", ".join(targets) + (" = " if targets else "")
    operands_ = ", ".join(operands)
    call = f"switch({which}, [{', '.join(names)}], {operands_})"
    if count == 2:
        call = f"cond({pred}, {', '.join(names)}, {operands_})"
    simpler = tuple(f"{target}{fn}({operands_})" for fn in names)
    if depth == 0:
        bodies.calls.append(target + call)
    return [*nodes, Line(target + call, simpler)]


def lanes(bodies: Bodies, scope: Scope, depth: int) -> list[Node]:
    """`vmap` over an array, with a stack of modules and modules that all lanes share."""
    rng = bodies.rng
    inner = scope.inner()
    inner.mapped = True
    x = bodies.name("x")
    inner.varying.append(x)
    values = ", ".join(number(rng, bodies.real) for _ in range(3))
    params, call, axes = [x], [f"array([{values}])"], ["0"]
    if bodies.world.stacks and not scope.locked and rng.random() < 0.6:
        name = bodies.name("m")
        params.append(name)
        call.append(bodies.world.stacks[0])
        axes.append("0")
        inner.lanes += [f"{name}.w", f"{name}.c"]
    for name, argument in _take(bodies, scope, inner, 1):
        params.append(name)
        call.append(argument)
        axes.append("None")
    inner.owned = []
    body = bodies.body(inner, depth + 1, rng.randint(1, 3))
    fn, out = bodies.name("f"), bodies.name("ys")
    result = f"mix({x}, {bodies.read(inner)})"
    call_ = f"{out} = vmap({fn}, in_axes=({', '.join(axes)},))({', '.join(call)})"
    if depth == 0:
        bodies.calls.append(call_)
    return [
        Block(f"def {fn}({', '.join(params)}):", (*body, Line(f"return {result}"))),
        Line(call_),
    ]


def slope(bodies: Bodies, scope: Scope, depth: int) -> list[Node]:
    """`grad` with respect to the parameters of a module, or to a number."""
    rng = bodies.rng
    inner = scope.inner()
    # Closed-over Refs are constants.
    inner.locked = inner.locked + inner.scalars or ["array(0.5)"]
    inner.varying = inner.varying + inner.lanes
    inner.scalars, inner.lanes = [], []
    leaves = [(m, w) for m, w in scope.modules if w in bodies.world.leaves]
    name = bodies.name("m")
    if leaves and rng.random() < 0.8:
        module, world = rng.choice(leaves)
        inner.modules = [(name, world)]
        inner.scalars = [f"{name}{end}" for end in bodies.world.scalars[world]]
        read = f"{name}.w"
    else:
        module, read = bodies.read(scope), name
        inner.modules = []
        inner.numbers.append(name)
    body = bodies.body(inner, depth + 1, rng.randint(1, 3))
    fn, out = bodies.name("f"), bodies.name("g")
    call = f"{out} = as_dict(grad({fn})({module}))"
    if depth == 0:
        bodies.calls.append(call)
    return [
        Block(f"def {fn}({name}):", (*body, Line(f"return mix({bodies.read(inner)}, {read})"))),
        Line(call),
    ]


def kinds(options: Options, scope: Scope, real: bool) -> dict[Any, float]:
    """The statements that may stand at a place, and how likely each is."""
    return {
        plain: options.plain * 2,
        method: options.plain * 0.3,
        departure: options.surgery * 2 if scope.owned and not scope.locked else 0,
        branch: options.branches,
        scan: options.loops,
        fori: options.loops * 0.7,
        # JAX has no reverse derivative of a `while`.
        while_: 0 if scope.locked else options.loops * 0.5,
        lanes: 0 if scope.mapped else options.lanes,
        slope: options.lanes * 2 if real and not scope.locked else 0,
    }
