"""`nnx.Optimizer`: an optax transformation, with its state in Refs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import refx
from nnx.fields import ref
from nnx.module import Module
from nnx.show._format import bytes_text, count_text, short
from nnx.show._walk import Walk
from nnx.show.text import collection_sizes, number_text
from nnx.training._cells import (
    fresh,
    nest,
    nothing_selected,
    paths_differ,
    selected,
    strong,
    values_differ,
    values_of,
    widens,
)
from nnx.training._layout import Layout, facts_of_state, shapes_of, state_path
from nnx.training._state import (
    Hyperparams,
    OptimizerError,
    guard,
    unguard,
)
from nnx.training._text import transformation_text
from nnx.training.masks import by_filter
from nnx.transforms.boundary import write_back
from refx import Filter, Node, Partition, Ref
from refx.node import attributes
from refx.partition import Path, dotted
from refx.text import a_kind

__all__ = ["Optimizer"]


class Optimizer(Module):
    """An optax transformation for the parameters of a model, with its state in Refs.

    It does not hold the model; pass it to `optimizer.update(model, grads)`. So a training step
    takes both as arguments, and you can save, shard or replicate each by itself.

    Each array of the state has its own Ref. The Ref's path is the array's path in optax's state,
    followed by the path of the parameter: `state.0.mu.block1.linear.kernel`. So you can filter,
    shard, save and update the state by path, like a model, and files hold only arrays, no optax
    classes. If the array has the parameter's shape, its Ref also has the parameter's metadata, such
    as a sharding.

    Args:
      model: a module, or any tree that holds Refs.
      tx: an optax transformation, or a dict from filter to transformation. Each parameter goes to
        the first filter that selects it; a last filter `...` takes the rest. To accumulate
        gradients, use `optax.MultiSteps(tx, every_k_schedule=k)`. To leave parameters unchanged,
        use `optax.set_to_zero()`.
      wrt: a filter that selects the Refs to train. The others cost nothing.

    Attributes: `step`, the number of updates, int32; `state`, the Refs of the state; `opt_state`,
    the values of the state in optax's form; `learning_rate`; `wrt`, as it was given, for
    `nnx.grad(loss, wrt=optimizer.wrt)`. All Refs are in the collection `"opt_state"`.

    Raises:
      OptimizerError: `wrt` selects nothing; two parameters have the same dotted path; a mask is not
        a Partition.
      UnmatchedPathError: there is a parameter that no filter of `tx` selects.

    >>> import jax, jax.numpy as jnp, nnx, optax
    >>> model = nnx.Linear.init(jax.random.key(0))(2, 1)
    >>> optimizer = nnx.Optimizer(model, optax.adam(0.1))
    >>> @nnx.jit
    ... def train_step(model, optimizer, x, y):
    ...     loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
    ...     optimizer.update(model, grads)
    ...     return loss
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> losses = [train_step(model, optimizer, x, x[:, :1]) for _ in range(50)]
    >>> bool(losses[-1] < losses[0]), int(optimizer.step)
    (True, 50)
    >>> list(nnx.refs(optimizer))[2]
    ('state', '0', 'mu', 'kernel')
    """

    step: jax.Array = ref("opt_state")

    def __init__(self, model: Any, tx: Any, wrt: Filter = "params"):
        if isinstance(tx, Node) or isinstance(model, optax.GradientTransformation):
            raise TypeError(
                "Optimizer takes the model first, then the transformation, as in "
                f"nnx.Optimizer(model, optax.adam(1e-3)), but got {a_kind(type(model))} and "
                f"{a_kind(type(tx))}."
            )
        cells = selected(model, wrt)
        if not cells:
            raise OptimizerError(nothing_selected("Optimizer has nothing to train", model, wrt))
        params = values_of(model, cells)
        names = {dotted(path): path for path in params}
        if same := [path for path in params if names[dotted(path)] != path]:
            raise OptimizerError(
                f"Two parameters have the same dotted path {dotted(same[0])!r}, because a key "
                f"contains a dot: {same[0]} and {names[dotted(same[0])]}. Optax tells parameters "
                "apart by this path, so rename one of the keys."
            )
        if isinstance(tx, Mapping):
            tx = by_filter(tx, cells)
        if not callable(getattr(tx, "init", None)) or not callable(getattr(tx, "update", None)):
            raise TypeError(
                f"Optimizer takes an optax transformation, such as optax.adam(1e-3), or a dict "
                f"from filter to one, but got {a_kind(type(tx))}: {tx!r:.80}."
            )
        try:
            initial = tx.init(params)
        except (TypeError, ValueError) as error:
            # JAX's messages for two trees that differ; the second is from before 0.10.2.
            says = ("different type", "Expected")
            if "Partition" not in str(error) or not any(text in str(error) for text in says):
                raise
            raise OptimizerError(
                "optax got a mask, labels or similar whose structure does not match the "
                "parameters, which are a Partition here. Make a mask with "
                "nnx.training.mask(model, filter); give Optimizer a dict from filter to "
                "transformation for optax.multi_transform; or build it from what optax passes: "
                "mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)."
            ) from error
        flat, treedef = jax.tree_util.tree_flatten_with_path(initial)
        facts = {path: (shapes_of(x), cells[path].metadata) for path, x in params.items()}
        state: dict[Path, Ref[Any]] = {}
        for keys, x in flat:
            path, param = state_path(keys, names)
            shapes, metadata = facts[param] if param is not None else ((), {})
            facts_here = facts_of_state(path, jnp.shape(x), shapes, metadata)
            state[path] = Ref(fresh(x), "opt_state", **facts_here)
        self.step = jnp.zeros((), jnp.int32)
        self.state = nest(state)
        self.tx = tx
        self.wrt = wrt
        self.layout = Layout(treedef, tuple(state), tuple((p, s) for p, (s, _) in facts.items()))

    def __repr__(self) -> str:
        lines = self.__nnx_summary__()
        return "\n  ".join(["Optimizer(", *lines]) + "\n)" if lines else super().__repr__()

    def __nnx_summary__(self) -> list[str] | None:
        """A summary to print, because the state of each parameter would be long."""
        if not {"step", "state", "tx", "layout"} <= attributes(self).keys():
            return None
        walk = Walk(self)
        n, size = collection_sizes(walk).get("opt_state", (0, 0))
        lines = [f"tx = {transformation_text(self.tx)}", f"wrt = {short(self.wrt)}"]
        if (now := number_text(self.step)) is not None:
            lines.append(f"step = {now}")
        lines.append(f"state = {self.layout!r}  # opt_state: {count_text(n)} ({bytes_text(size)})")
        return lines

    def update(self, model: Any, grads: Mapping[Path, Any], **extra: Any) -> None:
        """Apply gradients: write the model's parameters, the optimizer's state and `step`.

        If there is an error, nothing is written.

        Args:
          model: the model that the constructor was given, or another of the same structure.
          grads: the gradients: `nnx.grad(loss, wrt=wrt)(model)`. They may be wider than their
            parameters, such as float32 sums of bfloat16 gradients. Moments that become wider
            because of that stay so. Gradients may have a leading axis of examples if the
            transformation takes that, as `optax.contrib.dpsgd` does.
          **extra: extra arguments for transformations that need them: `value=loss` for
            `optax.contrib.reduce_on_plateau`; `value`, `grad` and `value_fn` for `optax.lbfgs`.

        Raises:
          OptimizerError: the gradients lack a path, or have one that `wrt` does not select, or
            differ in shape or dtype; or the model's parameters have other paths or shapes than when
            the optimizer was made.
        """
        if isinstance(model, Mapping) and isinstance(grads, Node):
            raise TypeError(
                "optimizer.update takes the model first, then the gradients, as in "
                f"optimizer.update(model, grads), but got {a_kind(type(model))} and "
                f"{a_kind(type(grads))}."
            )
        cells = selected(model, self.wrt)
        params = values_of(model, cells)
        grads = self._matching(grads, params)
        self._check_model(params)
        old = self._cells()
        was = self._values()
        state = jax.tree.unflatten(self.layout.treedef, list(was.values()))
        try:
            if isinstance(self.tx, optax.GradientTransformation):
                tx: Any = optax.with_extra_args_support(self.tx)
            else:
                tx = self.tx
            updates, state = tx.update(grads, state, params, **extra)
        except (TypeError, ValueError) as error:
            if (problem := self._reshaped(params) or _per_example(grads, params)) is not None:
                raise OptimizerError(problem) from error
            raise
        self._check_updates(updates, grads, params)
        new_params: Any = optax.apply_updates(params, updates)
        flat, treedef = jax.tree.flatten(state)
        if treedef != self.layout.treedef:
            raise OptimizerError(
                f"{self._name()} changed the structure of its state: it returned {treedef}, not "
                f"{self.layout.treedef}. A transformation must keep the structure of its state."
            )
        now = Partition(zip(old, map(strong, flat), strict=True))
        # As in optax, gradients wider than their parameters make wider moments.
        problem = values_differ("The new state", now, was, dtypes_fit=widens)
        if problem is not None:
            raise OptimizerError(self._reshaped(params) or f"{self._name()}: {problem}.")
        targets = [*cells.values(), *old.values(), refx.get_ref(self, "step")]
        step = optax.safe_increment(self.step)
        names = [*map(dotted, cells), *(f"state.{dotted(path)}" for path in old), "step"]
        write_back(targets, [*(new_params[path] for path in cells), *now.values(), step], names)

    @property
    def opt_state(self) -> Any:
        """The state in optax's form: its tuples, with a Partition where optax keeps a value per parameter.

        It is a copy. Assigning a state writes its values into the Refs; structure, shapes and
        dtypes must match. The copy's dicts and lists are read-only, so that no write is lost. The
        exception is `opt_state.hyperparams[name] = value`, which writes to `hyperparams`.
        `jax.tree.map` gives a state that you can change and assign.
        """
        state = jax.tree.unflatten(self.layout.treedef, list(self._values().values()))
        return guard(state, self._write_injected)

    @property
    def hyperparams(self) -> Hyperparams:
        """The hyperparameters that `optax.inject_hyperparams` keeps in the state: a mapping to read
        and write.

        Assigning a number or an array writes it into the state, cast to the dtype there. The next
        update uses it without compiling again. This also works inside transformations. The optax
        transformation may be anywhere: in `optax.chain`, `masked`, `multi_transform`, or in a dict
        from filter to transformation. If several have a hyperparameter of the same name, a prefix
        tells them apart, as in `"0.learning_rate"`.

        Raises:
          HyperparameterError: the name is unknown; the message lists the known ones. When writing,
            also if the hyperparameter follows a schedule, has another shape, or is an integer and
            the value is a fraction.

        >>> import jax, nnx, optax
        >>> model = nnx.Linear.init(jax.random.key(0))(2, 1)
        >>> tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.01)
        >>> optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), tx))
        >>> optimizer.hyperparams["weight_decay"] = 0.0
        >>> float(optimizer.hyperparams["weight_decay"]), "b1" in optimizer.hyperparams
        (0.0, True)
        """
        return Hyperparams(self.layout.hyperparams(), self._values, self._cells)

    @property
    def learning_rate(self) -> jax.Array:
        """The learning rate: `hyperparams["learning_rate"]`, to read and to assign.

        Raises:
          HyperparameterError: as for `hyperparams`.

        >>> import jax, nnx, optax
        >>> model = nnx.Linear.init(jax.random.key(0))(2, 1)
        >>> optimizer = nnx.Optimizer(model, optax.inject_hyperparams(optax.adam)(learning_rate=0.1))
        >>> optimizer.learning_rate = optimizer.learning_rate / 2
        >>> round(float(optimizer.learning_rate), 4)
        0.05
        """
        return self.hyperparams["learning_rate"]

    def __setattr__(self, name: str, value: Any) -> None:
        # These write Refs, not attributes, so they work wherever a Ref may be written.
        if name == "learning_rate":
            self.hyperparams["learning_rate"] = value
        elif name == "hyperparams":
            self.hyperparams.update(value)
        elif name == "opt_state":
            self._set_state(value)
        else:
            super().__setattr__(name, value)

    def _write_injected(self, path: Path, new: dict[str, Any]) -> Mapping[str, Any]:
        """Write to some hyperparameters and return their new values."""
        names = {p.path: name for name, p in self.layout.hyperparams().items()}
        chosen = {name: names.get((*path, name), name) for name in new}
        self.hyperparams.update({chosen[name]: value for name, value in new.items()})
        return {name: self.hyperparams[chosen[name]] for name in new}

    def _set_state(self, state: Any) -> None:
        old = self._cells()
        flat, treedef = jax.tree.flatten(unguard(state))
        if treedef != self.layout.treedef:
            raise OptimizerError(
                f"The state of {self._name()} has the structure {self.layout.treedef}, but the "
                f"assigned one has {treedef}."
            )
        now = Partition(zip(old, map(fresh, flat), strict=True))
        problem = values_differ("The assigned state", now, self._values())
        if problem is not None:
            raise OptimizerError(f"{problem}. Cast or reshape it first.")
        write_back(list(old.values()), list(now.values()))

    def _cells(self) -> dict[Path, Ref[Any]]:
        found = refx.refs(self.state) if self.layout.paths else {}
        return {path: found[path] for path in self.layout.paths}

    def _values(self) -> Partition:
        # Read through the optimizer, so that a closure over it finds all of its Refs at once.
        found = refx.get_partition(self, "opt_state")
        return Partition({path: found["state", *path] for path in self.layout.paths})

    def _name(self) -> str:
        return f"The optimizer (wrt={self.wrt!r})"

    def _matching(self, grads: Any, params: Partition) -> Partition:
        """The gradients in the order of the parameters."""
        if isinstance(grads, Node | Ref):
            # jax.grad returns a module that holds gradients instead of values.
            grads = values_of(grads, selected(grads, self.wrt))
        if not isinstance(grads, Mapping):
            hint = " Take one of them: nnx.grad gives a tuple for a sequence of argnums."
            raise OptimizerError(
                f"The gradients must be a Partition, as nnx.grad gives it, but got "
                f"{a_kind(type(grads))}.{hint if isinstance(grads, tuple) else ''}"
            )
        grads = Partition(grads)
        problem = paths_differ("The gradients", grads, params, "which wrt does not select")
        if problem is not None:
            raise OptimizerError(
                f"{problem}. The optimizer was made for wrt={self.wrt!r}, so take the gradients "
                f"with that filter and of the same model: nnx.grad(loss, wrt={self.wrt!r})(model)."
            )
        grads = Partition({path: grads[path] for path in params})
        # Gradients per example, for differentially private transformations, have one more axis.
        problem = values_differ(
            "The gradient",
            grads,
            params,
            shapes_fit=lambda new, old: new[len(new) - len(old) :] == old,
            dtypes_fit=widens,
        )
        if problem is not None:
            raise OptimizerError(
                f"{problem} as the parameter has. Cast or reshape the gradients, or take them "
                f"again: nnx.grad(loss, wrt={self.wrt!r})(model)."
            )
        return grads

    def _check_updates(self, updates: Any, grads: Partition, params: Partition) -> None:
        problem: str | None = f"it is {a_kind(type(updates))}, not a Partition"
        if isinstance(updates, Partition):
            problem = paths_differ(
                "its paths", updates, params, "which do not exist"
            ) or values_differ("it", updates, params, dtypes_fit=lambda new, old: True)
        if problem is not None:
            raise OptimizerError(
                self._reshaped(params)
                or _per_example(grads, params)
                or f"{self._name()} made an update that does not fit the parameters: {problem}."
            )

    def _check_model(self, params: Partition) -> None:
        problem = paths_differ(
            "The parameters of the model", params, dict(self.layout.targets), "which are new"
        )
        if problem is not None:
            raise OptimizerError(
                f"{problem}. {self._name()} was made for other parameters. Did the model change "
                "since, or is it a different model? Make a new Optimizer for it."
            )

    def _reshaped(self, params: Partition) -> str | None:
        for path, shapes in self.layout.targets:
            now = shapes_of(params[path])
            if now != shapes:
                new, old = ("".join(map(str, x)) for x in (now, shapes))
                return (
                    f"The parameter {dotted(path)!r} has shape {new}, but had {old} when the "
                    "optimizer was made, and the state still has that shape. Make a new Optimizer "
                    "for the changed model."
                )
        return None


def _per_example(grads: Partition, params: Partition) -> str | None:
    """The error for gradients with more axes than their parameters, if the update failed."""
    problem = values_differ("The gradient", grads, params, dtypes_fit=lambda new, old: True)
    if problem is None:
        return None
    return (
        f"{problem} as the parameter has, and the transformation cannot use it. Reduce gradients "
        "per example first, for example with jax.tree.map(lambda g: g.mean(0), grads). "
        "optax.contrib.dpsgd takes them as they are."
    )
