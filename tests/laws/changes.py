"""What ordinary Python changes between two calls, and functions that have to see it."""

from __future__ import annotations

import random

from tests.laws.bodies import Bodies, Scope
from tests.laws.program import Block, Line, Node
from tests.laws.things import TWINS
from tests.laws.world import World, number


def eager(bodies: Bodies, scope: Scope) -> list[Node]:
    """A change of the modules themselves, outside of every function."""
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
    """A setting is replaced by one that Python calls equal, or that is easily taken for it."""
    name = rng.choice(list(world.settings))
    group = next((g for g in TWINS if world.settings[name] in g), TWINS[0])
    setting = world.settings[name] = rng.choice(group)
    if rng.random() < 0.25:
        return [Line(f'vars({name})["mode"] = {setting}')]
    return [Line(f"{name}.mode = {setting}")]


class Routes:
    """A function that finds a module by some steps, and the ways to change each of them."""

    def __init__(self, bodies: Bodies):
        self.bodies = bodies
        self.rng = bodies.rng
        self.prelude: list[Node] = []
        self.changes: list[str] = []

    def any_module(self) -> str:
        """A module of the world."""
        return self.rng.choice(self.bodies.world.modules)

    def module(self) -> str:
        """A module of the world, or a new one."""
        rng = self.rng
        if rng.random() < 0.4:
            real = self.bodies.real
            return f"Leaf(array({number(rng, real)}), array({number(rng, real)}))"
        return self.any_module()

    def anything(self) -> str:
        """A module, or nothing."""
        return "None" if self.rng.random() < 0.12 else self.module()

    def route(self) -> tuple[str, str, str]:
        """A way to a module: parameters of the function, what reads the module, what wraps the function."""
        return self.rng.choice(_ROUTES)(self)

    def holder(self) -> tuple[str, str, str]:
        """An attribute of a plain object, of its class or of a base of that; it may not be there at first."""
        rng = self.rng
        cls = rng.choice(["Box", "SubBox", "SubBox"])
        box = self.bodies.name("box")
        self.prelude.append(Line(f"{box} = {cls}()"))
        owners = [box, "Box", *(["SubBox"] if cls == "SubBox" else [])]
        for owner in owners:
            if rng.random() < 0.45:
                self.prelude.append(Line(f"{owner}.net = {self.anything()}"))
        for owner in owners:
            self.changes += [f"{owner}.net = {self.anything()}" for _ in range(2)]
            self.changes.append(f'if "net" in vars({owner}): del {owner}.net')
        self.changes.append(f"{box}.__class__ = {rng.choice(['SubBox', 'OtherBox', 'Box'])}")
        self.changes.append(f"{box}.late = {self.anything()}")
        self.changes.append(
            f"{rng.choice(['Box', 'SubBox'])}.pick = lambda self: {self.any_module()}"
        )
        self.changes.append(f'{box}.__dict__["net"] = {self.anything()}')
        reads = [f'getattr({box}, "net", None)', f"{box}.pick()"]
        if cls == "SubBox":
            reads.append(f'getattr(super(SubBox, {box}), "net", None)')
        return "", rng.choice(reads[:2] if rng.random() < 0.9 else reads), "{}"

    def of_class(self) -> tuple[str, str, str]:
        """An attribute of a class, read of the class."""
        cls = self.rng.choice(["Box", "SubBox"])
        if self.rng.random() < 0.6:
            self.prelude.append(Line(f"Box.net = {self.anything()}"))
        for owner in ("Box", cls, cls):
            self.changes.append(f"{owner}.net = {self.anything()}")
        self.changes.append(f'if "net" in vars({cls}): del {cls}.net')
        return "", f'getattr({cls}, "net", None)', "{}"

    def module_class(self) -> tuple[str, str, str]:
        """A setting that a module's class has, and that the module may come to have."""
        rng = self.rng
        module = self.bodies.name("q")
        cls = rng.choice(["Plain", "Over", "Over"])
        self.prelude.append(Line(f"{module} = {cls}()"))
        self.prelude.append(Line(f"{module}.head = {self.any_module()}"))
        for owner in ("Plain", "Over", module):
            values = ['"fast"', "1", "True", "2", "Mode.FAST"]
            self.changes += [f"{owner}.level = {rng.choice(values)}"]
            self.changes.append(f'if "level" in vars({owner}): del {owner}.level')
        new = "lambda self, x: mix(x, tag(self.level))"
        self.changes.append(f"{rng.choice(['Plain', 'Over'])}.step = {new}")
        self.changes.append(f"{rng.choice(['Plain', 'Over'])}.__call__ = {new}")
        self.changes.append('if "step" in vars(Over): del Over.step')
        self.bodies.world.plains.append(module)
        self.bodies.world.scalars[module] = []
        return "", module, "{}"

    def cell(self) -> tuple[str, str, str]:
        """A name of the function's surroundings."""
        name = self.bodies.name("net")
        self.prelude.append(Line(f"{name} = {self.anything()}"))
        self.changes += [f"{name} = {self.anything()}" for _ in range(2)]
        return "", name, "{}"

    def container(self) -> tuple[str, str, str]:
        """An item of a list or a dict, which may be long."""
        rng = self.rng
        name = self.bodies.name("items")
        if rng.random() < 0.5:
            size = rng.choice([1, 3, 40, 200])
            self.prelude.append(Line(f"{name} = [{rng.choice(['None', '0'])}] * {size}"))
            at = rng.choice([0, size - 1])
            if rng.random() < 0.6:
                self.prelude.append(Line(f"{name}[{at}] = {self.module()}"))
            self.changes += [f"{name}[{at}] = {self.anything()}" for _ in range(2)]
            self.changes.append(f"{name}[:] = [{self.any_module()}] * len({name})")
            self.changes.append(f"{name}.reverse()")
            return "", f"{name}[{at}]", "{}"
        self.prelude.append(Line(f"{name} = {{}}"))
        if rng.random() < 0.6:
            self.prelude.append(Line(f'{name}["net"] = {self.module()}'))
        self.changes += [f'{name}["net"] = {self.anything()}', f'{name}.pop("net", None)']
        self.changes.append(f"{name}.update(net={self.anything()}, other=1)")
        return "", f'{name}.get("net")', "{}"

    def default(self) -> tuple[str, str, str]:
        """A default of the function."""
        name = self.bodies.name("d")
        self.changes += [f"FN.__defaults__ = ({self.anything()},)" for _ in range(2)]
        return f"{name}={self.anything()}", name, "{}"

    def kwdefault(self) -> tuple[str, str, str]:
        """A default of a parameter that is given by keyword only."""
        name = self.bodies.name("d")
        self.changes.append(f"FN.__kwdefaults__ = dict({name}={self.anything()})")
        self.changes.append(f'FN.__kwdefaults__["{name}"] = {self.anything()}')
        return f"*, {name}={self.anything()}", name, "{}"

    def partial(self) -> tuple[str, str, str]:
        """A keyword of a partial."""
        name = self.bodies.name("d")
        self.changes += [f'MADE.keywords["{name}"] = {self.anything()}' for _ in range(2)]
        return f"*, {name}", name, f"partial({{}}, {name}={self.anything()})"

    def helper(self) -> tuple[str, str, str]:
        """A function that the function calls."""
        name, inner = self.bodies.name("h"), self.bodies.name("net")
        self.prelude.append(Line(f"{inner} = {self.module()}"))
        if self.rng.random() < 0.5:
            self.prelude.append(Block(f"def {name}():", (Line(f"return {inner}"),)))
        else:
            self.prelude.append(Block(f"def {name}(n={inner}):", (Line("return n"),)))
            self.changes.append(f"{name}.__defaults__ = ({self.anything()},)")
        self.changes.append(f"{name} = lambda: {self.any_module()}")
        self.changes.append(f"{inner} = {self.module()}")
        return "", f"{name}()", "{}"

    def attribute(self) -> tuple[str, str, str]:
        """An attribute of a module that is closed over."""
        module = self.bodies.name("q")
        self.prelude.append(Line(f"{module} = Plain()"))
        self.prelude.append(Line(f"{module}.head = {self.module()}"))
        self.changes.append(f"{module}.head = {self.module()}")
        self.changes.append(f"{module}.extra = {self.module()}")
        self.changes.append(f"{module}.kids = [{self.module()}]")
        self.changes.append(f"{module} = {self.any_module()}")
        self.changes.append(f'vars({module})["head"] = {self.module()}')
        return "", module, "{}"


_ROUTES = (
    Routes.holder,
    Routes.holder,
    Routes.holder,
    Routes.of_class,
    Routes.module_class,
    Routes.cell,
    Routes.container,
    Routes.default,
    Routes.kwdefault,
    Routes.partial,
    Routes.helper,
    Routes.attribute,
)


def fresh(bodies: Bodies) -> tuple[list[Node], list[Node]]:
    """A prelude and steps of law 5: a compiled function, called again after changes of what leads to its modules."""
    rng = bodies.rng
    routes = Routes(bodies)
    params, read, wrap = routes.route()
    fn, made, compiled, net = (bodies.name(p) for p in ("f", "g", "j", "n"))
    scope = bodies.top()
    inner = scope.inner()
    inner.owned = []
    body: list[Node] = [Line(f"{net} = {read}")]
    write = rng.choice(
        [f"bump({net})", f"{net}.step(array(1)) if hasattr({net}, 'step') else None"]
    )
    if rng.random() < 0.5:
        write = _nested(rng, write)
    if rng.random() < 0.8:
        body += _lines(write)
    if rng.random() < 0.3:
        body += bodies.simple(inner)
    body.append(
        Line(f"return mix(total({net}), {bodies.expression(inner) if rng.random() < 0.3 else 1})")
    )
    arguments = ""
    if rng.random() < 0.25:
        params = f"x, {params}" if params else "x"
        arguments = rng.choice(bodies.world.modules)
    prelude = [*routes.prelude, Block(f"def {fn}({params}):", tuple(body))]
    prelude.append(Line(f"{made} = {wrap.format(fn)}"))
    kind = rng.choice(["jit({})", "jit({})", "jit({})", "jit(remat({}))", "jit(jit({}))"])
    prelude.append(Line(f"{compiled} = {kind.format(made)}", (f"{compiled} = {made}",)))
    steps: list[Node] = []
    call = f"y = {compiled}({arguments})"
    steps.append(Line(call))
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
            if way < 0.25:
                return [Line(f'object.__setattr__({name}, "{place}", {setting})')]
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
    steps: list[Node] = [Line(f"{compiled} = jit({fn}{options})", (f"{compiled} = {fn}",))]
    for i in range(rng.randint(1, 3)):
        steps.append(Line(f"y = {compiled}({arguments})"))
        steps += put(rng.choice(group), i + 1)
    steps.append(Line(f"y = {compiled}({arguments})"))
    return prelude, steps


def between(bodies: Bodies, scope: Scope) -> list[Node]:
    """Something between the calls of a program of law 3 or 4."""
    if bodies.calls and bodies.rng.random() < 0.6:
        return [Line(bodies.rng.choice(bodies.calls))]
    return eager(bodies, scope)
