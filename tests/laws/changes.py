"""Changes by ordinary Python between two calls, and functions that must see them.

Two changes are not tried, because only a walk at each call could see them: `object.__setattr__(module, ...)` from outside
the class, and replacing the `__code__` of a function in place.
"""

from __future__ import annotations

import random

from tests.laws.bodies import Bodies, Scope
from tests.laws.program import Block, Line, Node
from tests.laws.routes import Routes
from tests.laws.things import TWINS
from tests.laws.world import World


def eager(bodies: Bodies, scope: Scope) -> list[Node]:
    """A change of the modules themselves, outside all functions."""
    rng = bodies.rng
    kind = rng.random()
    if kind < 0.4:
        return bodies.surgery(scope)
    if kind < 0.55 and bodies.world.settings:
        return twin(rng, bodies.world)
    if kind < 0.65:
        pool = rng.choice([bodies.world.refs, bodies.world.leaves, bodies.world.plains])
        if len(pool) > 1:
            a, b = rng.sample(pool, 2)
            return [Line(f"{a}, {b} = {b}, {a}")]
    return bodies.simple(scope)


def twin(rng: random.Random, world: World) -> list[Node]:
    """Replace a setting with one that Python calls equal, or that is easily mistaken for it."""
    name = rng.choice(list(world.settings))
    group = next((g for g in TWINS if world.settings[name] in g), TWINS[0])
    setting = world.settings[name] = rng.choice(group)
    if rng.random() < 0.25:
        return [Line(f'vars({name})["mode"] = {setting}')]
    return [Line(f"{name}.mode = {setting}")]


# How to call a function that is not compiled, by the parameters that it then has; "{}" is the function.
_EAGER = (
    ("x", "y = cond(array(1) > 0, {0}, {0}, array(3))"),
    ("x", "y = cond(array(1) > 0, lambda x: {0}(x), lambda x: {0}(x), array(3))"),
    ("x", "y = switch(array(1), [{0}, {0}, {0}], array(3))"),
    ("x", "y = map_({0}, array([1, 2]))"),
    ("c, x", "y, _ = scan({0}, array(1), array([1, 2, 3]))"),
    ("c, x", "y, _ = scan(lambda c, x: {0}(c, x), array(1), array([1, 2, 3]))"),
    ("i, c", "y = fori_loop(0, 2, {0}, array(1))"),
    ("i, c", "y = fori_loop(0, 2, lambda i, c: {0}(i, c), array(1))"),
    ("c", "y = while_loop(lambda c: c < 2, lambda c: (c + 1) + 0 * {0}(c), array(0))"),
    ("x", "y = remat({0})(array(3))"),
    ("x", "y = vmap({0})(array([1, 2]))"),
)


def fresh(bodies: Bodies) -> tuple[list[Node], list[Node]]:
    """A prelude and steps of law 5: a function, called again after changes of the steps to its modules."""
    rng = bodies.rng
    routes = Routes(bodies)
    params, read, wrap = routes.route()
    fn, made, compiled, net = (bodies.name(p) for p in ("f", "g", "j", "n"))
    scope = bodies.top()
    inner = scope.inner()
    inner.owned = []
    body: list[Node] = [Line(f"{net} = {read}")]
    found = rng.choice([net, read])
    write = rng.choice(
        [f"bump({found})", f"{found}.step(array(1)) if hasattr({found}, 'step') else None"]
    )
    if rng.random() < 0.5:
        write = _nested(rng, write)
    prelude = list(routes.prelude)
    seen = f"total({net})"
    if rng.random() < 0.35:
        seen = _with_variable(bodies, routes, prelude, seen)
    if rng.random() < 0.4:
        given, call = rng.choice(_EAGER)
        own = "x" if "x" in given else "c"
        result = f"mix({seen}, {own})"
        if given == "c, x":
            result = f"mix({seen}, c), None"
        call = call.format(made)
        if "vmap" not in call and rng.random() < 0.8:
            body += _lines(write)
    else:
        given, arguments = "", ""
        if rng.random() < 0.8:
            body += _lines(write)
        if rng.random() < 0.3:
            body += bodies.simple(inner)
        other = bodies.expression(inner) if rng.random() < 0.3 else 1
        result = f"mix({seen}, {other})"
        if rng.random() < 0.25:
            given, arguments = "x", rng.choice(bodies.world.modules)
        call = f"y = {compiled}({arguments})"
    params = ", ".join(p for p in (given, params) if p)
    prelude.append(Block(f"def {fn}({params}):", (*body, Line(f"return {result}"))))
    prelude.append(Line(f"{made} = {wrap.format(fn)}"))
    if compiled in call:
        kind = rng.choice(["jit({})", "jit({})", "jit({})", "jit(remat({}))", "jit(jit({}))"])
        prelude.append(Line(f"{compiled} = {kind.format(made)}", (f"{compiled} = {made}",)))
    steps: list[Node] = [Line(call)]
    changes = [c.replace("FN", fn).replace("MADE", made) for c in routes.changes]
    for _ in range(rng.randint(1, 4)):
        change = rng.choice(changes) if rng.random() < 0.85 else None
        if change is None:
            steps += eager(bodies, scope)
        elif change.startswith("if "):
            head, _, line = change.partition(": ")
            steps.append(Block(f"{head}:", (Line(line),)))
        else:
            steps.append(Line(change))
        if rng.random() < 0.85:
            steps.append(Line(call))
    steps.append(Line(call))
    return prelude, steps


def _with_variable(bodies: Bodies, routes: Routes, prelude: list[Node], seen: str) -> str:
    """Let a function read a number, a text or an array from a variable, and change that variable."""
    rng = bodies.rng
    variable, helper = bodies.name("d"), bodies.name("h")
    value = variable
    if rng.random() < 0.4:
        # An attribute of an object, whose name may appear nowhere in the function.
        box = bodies.name("box")
        prelude.append(Line(f"{box} = OtherBox()"))
        variable, name = f"{box}.late", rng.choice(['"late"', '"".join(["la", "te"])'])
        value = rng.choice([variable, f"getattr({box}, {name})", f"getattr({box}, {name})"])
    if rng.random() < 0.3:
        values, read = [f"array({n})" for n in (1, 2, 1)], value
    else:
        values, read = rng.choice(TWINS), f"tag({value})"
    prelude.append(Line(f"{variable} = {rng.choice(values)}"))
    if rng.random() < 0.3:
        prelude.append(Block(f"def {helper}():", (Line(f"return {read}"),)))
        read = f"{helper}()"
    routes.changes += [f"{variable} = {rng.choice(values)}" for _ in range(4)]
    return f"mix({seen}, {read})"


def _lines(text: str) -> list[Node]:
    nodes: list[Node] = []
    for line in text.split("\n"):
        if line.startswith("    "):
            last = nodes.pop()
            assert isinstance(last, Block)
            nodes.append(Block(last.head, (*last.body, Line(line.strip()))))
        elif line.endswith(":"):
            nodes.append(Block(line, ()))
        else:
            nodes.append(Line(line))
    return nodes


def _nested(rng: random.Random, write: str) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return f"def inner():\n    {write}\njit(inner)()"
    if kind == 1:
        return f"def inner():\n    {write}\ncond(array(1) > 0, inner, inner)"
    if kind == 2:
        return f"def inner(i, c):\n    {write}\n    return c\nfori_loop(0, 2, inner, None)"
    return f"def inner(c, x):\n    {write}\n    return c, None\nscan(inner, None, None, length=2)"


def settings(bodies: Bodies) -> tuple[list[Node], list[Node]]:
    """A prelude and steps of law 6: a setting is replaced by its twin, and the same function called again."""
    rng, world = bodies.rng, bodies.world
    if not world.plains:
        world.add("p0 = Plain()")
        world.plains.append("p0")
        world.scalars["p0"] = []
    name = rng.choice(world.plains)
    group = rng.choice(TWINS)
    first = rng.choice(group)
    place = rng.choice(["mode", "mode", "mode", "late", "kids", "table", "pair", "meta", "static"])
    fn, compiled = bodies.name("f"), bodies.name("j")

    def put(setting: str, i: int) -> list[Node]:
        if place in ("mode", "late"):
            way = rng.random()
            if way < 0.15:
                return [Line(f'vars({name})["{place}"] = {setting}')]
            if way < 0.35 and i:
                return [Line(f"del {name}.{place}"), Line(f"{name}.{place} = {setting}")]
            return [Line(f"{name}.{place} = {setting}")]
        if place == "kids":
            return [Line(f"{name}.kids = [{setting}]" if i == 0 else f"{name}.kids[0] = {setting}")]
        if place == "table":
            made = f'{name}.table = {{"a": {setting}}}'
            return [Line(made if i == 0 else f'{name}.table["a"] = {setting}')]
        if place == "pair":
            return [Line(f"{name}.pair = ({setting}, 1)")]
        if place == "meta":
            return [
                Line(
                    f"{name}.x = Ref(array(1), {setting})"
                    if i == 0 or rng.random() < 0.7
                    else f"{name}.x = Ref(array(2), {setting})"
                )
            ]
        return [Line(f"setting = {setting}")]

    if place == "meta":
        read = f"tag({name}.x.collection)"
    elif place == "static":
        read = "tag(s)"
    else:
        read = f"total({name})"
    value = read if not bodies.real else f"{read} / 100"
    params = "m, s" if place == "static" else "m"
    arguments = f"{name}, setting" if place == "static" else name
    options = ", static_argnums=1" if place == "static" else ""
    if rng.random() < 0.3 and place != "static":
        params = arguments = ""
    body = (Line(f"return mix({value.replace(name, 'm') if params else value}, array(1))"),)
    prelude: list[Node] = [*put(first, 0), Block(f"def {fn}({params}):", body)]
    steps: list[Node] = []
    call = f"y = {compiled}({arguments})"
    if place != "static" and rng.random() < 0.3:
        operands = f", {arguments}" if arguments else ""
        call = rng.choice(
            [
                f"y = cond(array(1) > 0, {fn}, {fn}{operands})",
                f"y, ys = scan(lambda c, x: (c, {fn}({arguments})), array(1), None, length=2)",
                f"y, k = fori_loop(0, 1, lambda i, c: ({fn}({'c[1]' if arguments else ''}), c[1]), (array(1), {name}))",
            ]
        )
    else:
        steps.append(Line(f"{compiled} = jit({fn}{options})", (f"{compiled} = {fn}",)))
    for i in range(rng.randint(1, 3)):
        steps.append(Line(call))
        steps += put(rng.choice(group), i + 1)
    steps.append(Line(call))
    return prelude, steps


def between(bodies: Bodies, scope: Scope) -> list[Node]:
    """Something between the calls of a program of law 3 or 4."""
    if bodies.calls and bodies.rng.random() < 0.6:
        return [Line(bodies.rng.choice(bodies.calls))]
    return eager(bodies, scope)
