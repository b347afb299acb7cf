"""Ways from a function to a module that is not an argument, and the changes of each."""

from __future__ import annotations

from tests.laws.bodies import Bodies
from tests.laws.program import Block, Line, Node
from tests.laws.world import number


class Routes:
    """A function that reaches a module through some steps, and the ways to change each step."""

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
        """A way to a module: the function's parameters, the expression for the module, and a wrapper."""
        return self.rng.choice(_ROUTES)(self)

    def holder(self) -> tuple[str, str, str]:
        """An attribute of a plain object, of its class or of a base class; it may be missing at first."""
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
        """A default of a keyword-only parameter."""
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

    def function_attribute(self) -> tuple[str, str, str]:
        """An attribute of a function that the function calls."""
        name = self.bodies.name("h")
        self.prelude.append(Block(f"def {name}():", (Line(f"return {name}.net"),)))
        self.prelude.append(Line(f"{name}.net = {self.anything()}"))
        self.changes += [f"{name}.net = {self.anything()}" for _ in range(2)]
        self.changes.append(f'vars({name})["net"] = {self.anything()}')
        return "", self.rng.choice([f"{name}()", f"{name}.net"]), "{}"

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
    Routes.function_attribute,
    Routes.attribute,
)
