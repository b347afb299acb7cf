import copy
import functools
import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import pytest

import nnx
from tests.models import Dense, Net, sgd


def test_a_step_returns_nothing_and_the_model_has_learned(net, data):
    x, y = data
    params = net["params"]

    def pure(params):
        model = nnx.clone(net)
        model["params"] = params
        return jnp.mean((model(x) - y) ** 2)

    expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, jax.grad(pure)(params))
    step = nnx.jit(sgd)
    assert step(net, x, y) is None
    for path, value in net["params"].items():
        assert jnp.allclose(value, expected[path], atol=1e-6)
    assert net.blocks[0].calls == 2


def test_no_tracer_leaks_over_steps(net, data):
    net.me = net
    net.table = jnp.ones(2)
    step = nnx.jit(sgd)
    with jax.check_tracer_leaks():
        for _ in range(2):
            step(net, *data)
        step(Dense(), *data)


def test_refs_anywhere_in_arguments_with_sharing_kept():
    @nnx.jit
    def f(a, pair, *, options):
        a.value += 1
        pair[1]["x"].value *= 2
        options["r"].value = a.value
        return pair[0] is a, options["r"] is a

    a, b = nnx.Ref(jnp.array(1.0)), nnx.Ref(jnp.array(5.0))
    assert f(a, (a, {"x": b}), options={"r": b}) == (True, False)
    assert (a.value, b.value) == (2.0, 2.0)
    assert f(a, (a, {"x": a}), options={"r": a}) == (True, True)
    assert a.value == 6.0


def test_what_comes_in_goes_out_as_the_callers_own(net):
    f = nnx.jit(lambda m: (m, m.blocks, {"r": nnx.get_ref(m.blocks[1], "w")}, m.blocks[0].w))
    out = f(net)
    assert out[0] is net and out[1] is net.blocks
    assert out[2]["r"] is nnx.get_ref(net.blocks[1], "w")


def test_new_modules_and_refs_come_out(dense):
    @nnx.jit
    def make(m):
        other = Dense(seed=4)
        other.w = nnx.get_ref(m, "w")
        return {"pair": [other, other], "ref": nnx.Ref(m.b + 1, "new"), "m": nnx.clone(m)}

    out = make(dense)
    first, second = out["pair"]
    assert first is second and nnx.get_ref(first, "w") is nnx.get_ref(dense, "w")
    assert out["ref"].collection == "new" and (out["ref"].value == 1).all()
    assert out["m"] is not dense and (out["m"].w == dense.w).all()
    out["m"].w = jnp.zeros((2, 2))


def test_only_written_refs_are_outputs(net, data):
    x, _ = data
    lowered = nnx.jit(lambda m, x: m(x)).lower(net, x)
    # The output, and one counter for each of the two layers.
    assert len(jax.tree.leaves(lowered.out_info)) == 3
    assert len(jax.tree.leaves(nnx.jit(lambda m, x: x @ m.blocks[0].w).lower(net, x).out_info)) == 1


def test_a_value_changed_in_place_is_written_back():
    ref = nnx.Ref({"m": jnp.zeros(2), "n": [jnp.array(0)]}, "opt_state")

    @nnx.jit
    def f(r):
        r.value["n"][0] = r.value["n"][0] + 1

    f(ref)
    f(ref)
    assert ref.value["n"][0] == 2


def test_structure_changed_inside_propagates(net):
    @nnx.jit
    def grow(m):
        m.blocks.append(Dense(seed=3))
        m.extra = nnx.Ref(m.blocks[0].w.sum(), "new")
        m.scale = 3.0
        del m.blocks[1]
        m.blocks[0].b = None
        m.table = m.blocks[0].w * 2

    shared, blocks = net.blocks[0], net.blocks
    grow(net)
    assert net.blocks is blocks and net.blocks[0] is shared and net.blocks[1] is shared
    assert len(blocks) == 3 and net.scale == 3.0 and shared.b is None
    assert (net.table == shared.w * 2).all() and net.extra.value == shared.w.sum()
    net.blocks[2](jnp.ones((1, 2)))
    assert net.blocks[2].calls == 1


def test_a_swap_of_two_equal_layers_propagates(net):
    @nnx.jit
    def swap(m):
        m.blocks[0], m.blocks[1] = m.blocks[1], m.blocks[0]

    a, b = net.blocks[:2]
    swap(net)
    assert net.blocks[0] is b and net.blocks[1] is a and net.blocks[2] is a


def test_a_static_counter_retraces(dense):
    traces = []

    @nnx.jit
    def f(m):
        traces.append(1)
        m.n = getattr(m, "n", 0) + 1

    for _ in range(3):
        f(dense)
    assert dense.n == 3 and len(traces) == 3


def test_equal_structures_share_a_program(data):
    traces = []

    @nnx.jit
    def f(m, x):
        traces.append(1)
        return m(x)

    for seed in range(3):
        f(Dense(seed=seed), data[0])
    assert len(traces) == 1


def test_an_exception_changes_nothing(net, data):
    before = {p: v.copy() for p, v in nnx.split(net)[1].items()}
    blocks = list(net.blocks)

    @nnx.jit
    def bad(m, x):
        sgd(m, x, x)
        m.blocks.append(Dense())
        raise ZeroDivisionError("in the middle")

    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="in the middle"):
            bad(net, data[0])
    assert net.blocks == blocks
    for path, value in nnx.split(net)[1].items():
        assert (value == before[path]).all()


def test_an_exception_at_run_time_changes_nothing(dense):
    def fail(x):
        raise ValueError("from the callback")

    @nnx.jit
    def bad(m):
        m.b = jax.pure_callback(fail, jax.ShapeDtypeStruct((2,), jnp.float32), m.b)
        return m.b

    with pytest.raises(Exception, match="from the callback"):
        jax.block_until_ready(bad(dense))
        jax.block_until_ready(dense.b)


def test_methods_and_modules_are_functions(data):
    class Trainer(nnx.Module):
        def __init__(self):
            self.model = Dense()
            self.steps = nnx.Ref(jnp.array(0), "counters")

        @nnx.jit
        def step(self, x, *, n=1):
            self.steps.value += n
            return self.model(x)

        def __call__(self, x):
            return self.step(x, n=2)

    trainer = Trainer()
    x, _ = data
    trainer.step(x)
    trainer(x)
    nnx.jit(trainer)(x)
    nnx.jit(trainer.step, static_argnames="n")(x, n=3)
    assert trainer.steps.value == 1 + 2 + 2 + 3 and trainer.model.calls == 4


def test_static_arguments():
    traces = []

    @nnx.jit(static_argnums=1, static_argnames=("mode",))
    def f(r, n, x=1.0, mode="a"):
        traces.append((n, mode))
        r.value += n
        return x

    r = nnx.Ref(jnp.array(0))
    f(r, 2)
    f(r, n=3, mode="b")
    f(r, 2, 2.0)
    assert r.value == 7 and traces == [(2, "a"), (3, "b"), (2, "a")]
    kind = nnx.jit(lambda n: jnp.asarray(n), static_argnums=0)
    assert [str(kind(n).dtype) for n in (2, 2.0, True, 1)] == ["int32", "float32", "bool", "int32"]
    with pytest.raises(nnx.UnhashableStaticError, match=r"argument 1 of nnx\.jit is a list"):
        f(r, [1])
    with pytest.raises(nnx.StructureError, match=r"argument 1 of nnx\.jit holds a module"):
        f(r, Dense())


def test_nested_jits_and_something_that_is_not_a_function():
    inner = nnx.jit(lambda r: setattr(r, "value", r.value * 2))

    @nnx.jit
    def outer(r):
        inner(r)
        inner(r)

    r = nnx.Ref(jnp.array(1.0))
    outer(r)
    inner(r)
    assert r.value == 8.0
    with pytest.raises(TypeError, match="takes a function, a module or a method, but got 3"):
        nnx.jit(3)
    name = "nnx.jit(test_nested_jits_and_something_that_is_not_a_function.<locals>.<lambda>)"
    assert repr(inner) == f"<{name}, traced for 1 structure>"


def test_repr_counts_structures():
    double = nnx.jit(lambda r: setattr(r, "value", r.value * 2))
    assert repr(double).endswith(".<lambda>), traced for 0 structures>")
    for tree in (nnx.Ref(jnp.ones(())), nnx.Ref(jnp.ones(())), nnx.Ref(jnp.ones(()), "params")):
        double(tree)
    assert repr(double).endswith(", traced for 2 structures>")


def test_mutable_holds_for_programs_in_cache(dense, data):
    step = nnx.jit(lambda m, x: m(x))
    step(dense, data[0])
    with nnx.mutable("params"), pytest.raises(nnx.NotMutableError, match="'counters'"):
        step(dense, data[0])
    assert dense.calls == 1


def test_under_plain_transformations_values_go_in_and_writes_are_errors(dense, data):
    x, _ = data
    read = nnx.jit(lambda m, x: x @ m.w)
    assert jax.vmap(lambda row: read(dense, row))(x).shape == (4, 2)
    assert jax.jit(lambda m, x: read(m, x))(dense, x).shape == (4, 2)
    write = nnx.jit(lambda m, x: m(x))
    with pytest.raises(nnx.TraceLevelError, match="plain jax.vmap"):
        jax.vmap(lambda row: write(dense, row))(x)
    with pytest.raises(nnx.ReadOnlyError):
        jax.jit(lambda m, x: write(m, x))(dense, x)
    assert dense.calls == 0
    with pytest.raises(
        nnx.TraceLevelError, match="The structure of a Dense was set inside a plain"
    ):
        jax.vmap(lambda row: nnx.jit(lambda m, r: setattr(m, "extra", r))(dense, row))(x)
    with pytest.raises(
        nnx.TraceLevelError, match="The structure of a Dense was set inside nnx.jit"
    ):
        nnx.jit(lambda: nnx.jit(lambda m: setattr(m, "extra", 1))(dense))()
    assert not hasattr(dense, "extra")


def test_donated_buffers_are_reused_and_the_model_is_right(data):
    x, y = data
    a, b = Dense(), Dense()
    kept = b.w
    step, donating = nnx.jit(sgd), nnx.jit(sgd, donate=True)
    for _ in range(3):
        step(a, x, y)
        donating(b, x, y)
    assert kept.is_deleted() and jnp.allclose(a.w, b.w) and int(b.calls) == 3
    c = Dense()
    counters = nnx.get_ref(c, "calls").value
    nnx.jit(sgd, donate="params")(c, x, y)
    assert not counters.is_deleted()
    memory = donating.lower(b, x, y).compile().memory_analysis()
    assert memory.alias_size_in_bytes > 0


def test_donation_says_what_is_shared_and_what_is_gone(data):
    x, y = data
    step = nnx.jit(sgd, donate="params")
    model = Dense()
    other = nnx.clone(model)
    step(model, x, y)
    with pytest.raises(nnx.DonationError, match=r"Ref 'w', whose buffer is gone.*jnp\.copy"):
        step(other, x, y)

    @nnx.jit(donate=True)
    def both(a, b):
        a.b, b.b = a.b + 1, b.b + 1

    left, right = Dense(), Dense()
    right.b = left.b
    with pytest.raises(nnx.DonationError, match=r"Ref 'b' of the Dense number 1.*number 2.*same"):
        both(left, right)
    assert (left.b == 0).all() and (right.b == 0).all()


def test_shardings_by_filter():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    class Wide(nnx.Module):
        def __init__(self):
            self.w = nnx.Ref(jnp.ones((8, 4)), "params")
            self.n = nnx.Ref(jnp.array(0), "counters")

    @nnx.jit(in_shardings=({"params": rows, ...: whole}, whole), out_shardings=rows)
    def step(m, x):
        m.w.value = m.w.value + x
        m.n.value += 1
        return m.w.value * 2

    model = Wide()
    for _ in range(2):
        out = step(model, jnp.ones(4))
    assert out.sharding == rows and model.w.value.sharding == rows and model.n.value == 2
    assert len(model.w.value.sharding.device_set) == 4 and (out == 6).all()


def test_ahead_of_time(dense, data):
    x, y = data
    step = nnx.jit(sgd)
    assert "dot_general" in str(step.trace(dense, x, y).jaxpr)
    lowered = step.lower(dense, x, y)
    assert "stablehlo" in lowered.as_text()
    compiled = lowered.compile()
    assert compiled.cost_analysis()["flops"] > 0
    before = dense.w
    compiled(dense, x, y)
    assert not jnp.allclose(before, dense.w) and dense.calls == 1
    dense.note = 1
    with pytest.raises(nnx.StructureError, match="another structure than it was compiled for"):
        compiled(dense, x, y)
    assert nnx.jit(lambda m, x: m(x)).eval_shape(dense, x).shape == (4, 2)
    assert dense.calls == 1


def test_threads_share_a_function(data):
    step = nnx.jit(sgd)
    models = [Dense(seed=i) for i in range(4)]
    expected = [nnx.clone(m) for m in models]
    threads = [threading.Thread(target=step, args=(m, *data)) for m in models]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(models, expected, strict=True):
        sgd(b, *data)
        assert jnp.allclose(a.w, b.w, atol=1e-6) and a.calls == 1


def test_tied_weights_learn_together(data):
    class Tied(nnx.Module):
        def __init__(self):
            self.enc, self.dec = Dense(seed=1), Dense(seed=2)
            self.dec.w = nnx.get_ref(self.enc, "w")

        def __call__(self, x):
            return self.dec(self.enc(x))

    model = Tied()
    nnx.jit(sgd)(model, *data)
    assert nnx.get_ref(model.dec, "w") is nnx.get_ref(model.enc, "w")
    assert (model.enc.w == model.dec.w).all() and Net is not None


@pytest.mark.parametrize("bad", [{nnx.Ref(1.0)}, (r for r in ()), "train", object(), len])
def test_what_cannot_be_traced_is_named(dense, bad):
    for call in (
        lambda: nnx.jit(lambda m, options: None)(dense, {"mode": [bad]}),
        lambda: nnx.remat(lambda m, options: None)(dense, {"mode": [bad]}),
        lambda: nnx.vmap(lambda m, options: None, axis_size=2)(dense, {"mode": [bad]}),
    ):
        with pytest.raises(
            nnx.ArgumentError, match=rf"\[1\]\['mode'\]\[0\] is a {type(bad).__name__}.*static"
        ):
            call()


def test_a_static_that_becomes_unhashable_inside_is_named(dense):
    model = nnx.Sequential()
    model.inner = dense
    with pytest.raises(nnx.UnhashableStaticError, match=r"Attribute 'inner\.f' is a set"):
        nnx.jit(lambda m: setattr(m.inner, "f", {1}))(model)


def test_a_container_argument_that_is_changed_inside_is_an_error(dense):
    models = [dense]
    with pytest.raises(
        nnx.StructureError, match=r"argument of nnx\.jit.*changed inside.*return it"
    ):
        nnx.jit(lambda ms: ms.append(Dense()))(models)
    with pytest.raises(nnx.StructureError, match="changed inside"):
        nnx.jit(lambda d: d.update(a=nnx.Ref(1.0)))({"a": nnx.Ref(2.0)})
    assert models == [dense]
    batch = {"x": jnp.ones(2)}
    assert nnx.jit(lambda b: b.update(x=b["x"] * 2) or b["x"])(batch).tolist() == [2, 2]


@pytest.mark.parametrize("donate", [True, "opt_state"])
def test_donation_where_nothing_selected_is_written(dense, data, donate):
    evaluate = nnx.jit(lambda m, x: x @ m.w, donate=donate)
    assert jnp.array_equal(evaluate(dense, data[0]), evaluate(dense, data[0]))
    evaluate.lower(dense, data[0]).compile()
    bias = nnx.jit(lambda m: setattr(m, "b", m.b + 1), donate="opt_state")
    bias(dense)
    assert (dense.b == 1).all()


@pytest.mark.parametrize("options", [{}, {"donate": True}, {"out_shardings": None}])
def test_a_dropped_function_is_collected(options):
    class Trainer:
        def __init__(self):
            self.model = Dense()
            self.step = nnx.jit(self.update, **options)

        def update(self, x):
            self.model.w = self.model.w + x

    trainer = Trainer()
    trainer.step(1.0)
    kept = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert kept() is None


def test_more_calls_that_look_different_than_are_remembered_do_not_compile_again(dense):
    traces = []

    @nnx.jit
    def step(model, x):
        traces.append(nnx.get_flag("deterministic"))
        return model.b * x

    lowered = nnx.jit(lambda m, x: m.b * x)
    compiled = lowered.lower(dense, 1.0).compile()
    for epoch in range(2):
        for i in range(300):
            # New Refs in each call: the scope's, and one of an argument.
            with nnx.scope(i, deterministic=False):
                step(dense, 1.0)
            with nnx.scope(i):
                lowered(dense, 1.0)
        with nnx.scope(epoch, deterministic=True):
            step(dense, 1.0)
    assert traces == [False, True]
    compiled(dense, 1.0)


def test_many_other_forms_of_arguments_do_not_compile_a_function_again(dense):
    traces = []
    step = nnx.jit(lambda m, x: traces.append(1))
    step(dense, {"x": 1.0})
    other = nnx.jit(lambda *args: None)
    for i in range(520):
        other.eval_shape({str(i): 1.0}, dense)
    step(dense, {"x": 1.0})
    assert traces == [1]


def test_roots_that_share_are_told_from_those_that_do_not(dense):
    step = nnx.jit(lambda a, b: setattr(a, "b", a.b + 1) or b.b)
    for _ in range(3):
        assert step(dense, Dense(seed=1)).tolist() == [0, 0]
        before = dense.b
        assert jnp.array_equal(step(dense, dense), before + 1)
    tied = Dense(seed=2)
    tied.b = nnx.get_ref(dense, "b")
    assert jnp.array_equal(step(dense, tied), dense.b)


def test_a_bound_method_that_was_jitted_is_an_attribute_like_any_other():
    class Scaled(nnx.Module):
        def __init__(self):
            self.w = nnx.Ref(jnp.array(2.0), "params")
            self.fast = nnx.jit(self.slow, donate="counters")

        def slow(self, x):
            return x * self.w.value

        def __call__(self, x):
            return self.fast(x)

    model = Scaled()
    assert model(3.0) == 6
    for copied in (nnx.clone(model), copy.deepcopy(model)):
        copied.w.value = jnp.array(5.0)
        assert (model(3.0), copied(3.0)) == (6, 15)
        assert nnx.grad(lambda m: m(3.0))(copied)["w"] == 3
        assert jax.grad(lambda m: m(3.0))(copied).w.value == 3
        assert nnx.jit(lambda m, x: m(x))(copied, 3.0) == 15
        assert copied.fast.eval_shape(3.0).shape == ()


def test_a_static_function_that_hides_a_module_is_an_error():
    class Cached(nnx.Module):
        def __init__(self, wrap):
            self.w = nnx.Ref(jnp.array(2.0), "params")
            self.fast = wrap(self.slow)

        def slow(self, x):
            return x * self.w.value

    for wrap in (functools.lru_cache, jax.jit, nnx.vmap):
        with pytest.raises(nnx.StructureError, match=r"Attribute 'fast' .* holds Refs or modules"):
            nnx.clone(Cached(wrap))


def test_shardings_may_be_given_as_a_partition(net):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = net["params"]
    shardings = jax.tree.map(lambda _: whole, params)
    doubled = nnx.jit(
        lambda p: jax.tree.map(lambda x: 2 * x, p),
        in_shardings=(shardings,),
        out_shardings=shardings,
    )(params)
    assert all(x.sharding == whole for x in doubled.values())
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(2 * a, b), params, doubled))


def test_a_module_in_a_scope_is_not_an_argument(dense):
    with pytest.raises(
        nnx.ArgumentError, match=r"result of model\.apply\(\.\.\.\).* nnx\.jit\(model"
    ):
        nnx.jit(lambda m: m)(dense.apply(training=True))
    with nnx.scope(0):
        linear = nnx.Linear(2, 2)
    with pytest.raises(nnx.ArgumentError, match="pass the model and put the call in"):
        nnx.jit(lambda m, x: m(x))(linear.apply(training=True), jnp.ones(2))
