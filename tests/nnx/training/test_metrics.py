"""Metrics against scikit-learn, NumPy in float64, and flax."""

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix

import nnx
from nnx.training import metrics

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 7, 4)).astype(np.float32)
LABELS = RNG.integers(0, 4, (3, 7))
VALUES = (RNG.normal(size=(3, 7)) * 2 + 5).astype(np.float32)
MASK = RNG.random((3, 7)) < 0.6


def feed(metric, how="eager", mask=True):
    """Three batches, with every way to run a step."""
    kept = MASK if mask else np.ones_like(MASK)
    batches = {"logits": LOGITS, "labels": LABELS, "values": VALUES, "mask": kept}

    def step(metric, batch):
        metric.update(**batch)

    if how == "scan":
        nnx.scan(lambda _, batch: (None, step(metric, batch)), None, batches)
    else:
        step = nnx.jit(step) if how == "jit" else step
        for i in range(3):
            step(metric, {name: x[i] for name, x in batches.items()})
    return metric.compute()


@pytest.mark.parametrize(
    "how, mask", [("eager", True), ("jit", True), ("jit", False), ("scan", True)]
)
def test_values_are_those_of_everything_at_once(how, mask):
    kept = MASK if mask else np.ones_like(MASK)
    values = VALUES[kept].astype(np.float64)
    found = feed(
        metrics.MultiMetric(
            average=metrics.Average(),
            spread=metrics.Welford(),
            accuracy=metrics.Accuracy(),
            confusion=metrics.ConfusionMatrix(4),
            perplexity=metrics.Perplexity(),
        ),
        how,
        mask,
    )
    np.testing.assert_allclose(found["average"], values.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["perplexity"], np.exp(values.mean()), rtol=1e-5)
    spread = found["spread"]
    np.testing.assert_allclose(spread.mean, values.mean(), rtol=1e-6)
    np.testing.assert_allclose(spread.standard_deviation, values.std(), rtol=1e-5)
    np.testing.assert_allclose(
        spread.standard_error_of_mean, values.std() / np.sqrt(values.size), rtol=1e-5
    )
    predicted = LOGITS.argmax(-1)
    np.testing.assert_allclose(
        found["accuracy"], accuracy_score(LABELS[kept], predicted[kept]), rtol=1e-6
    )
    np.testing.assert_array_equal(
        found["confusion"], confusion_matrix(LABELS[kept], predicted[kept], labels=range(4))
    )


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_names_and_values_are_those_of_flax(threshold):
    logits = LOGITS if threshold is None else LOGITS[..., 0]
    labels = LABELS if threshold is None else LABELS % 2
    ours = metrics.MultiMetric(
        accuracy=metrics.Accuracy(threshold),
        loss=metrics.Average("loss"),
        w=metrics.Welford("loss"),
    )
    theirs = fnx.MultiMetric(
        accuracy=fnx.metrics.Accuracy(threshold),
        loss=fnx.metrics.Average("loss"),
        w=fnx.metrics.Welford("loss"),
    )
    for i in range(3):
        for metric in (ours, theirs):
            metric.update(logits=jnp.asarray(logits[i]), labels=labels[i], loss=VALUES[i])
    a, b = ours.compute(), theirs.compute()
    np.testing.assert_allclose([a["accuracy"], a["loss"]], [b["accuracy"], b["loss"]], rtol=1e-6)
    for name in metrics.Statistics._fields:
        np.testing.assert_allclose(getattr(a["w"], name), getattr(b["w"], name), rtol=1e-5)


def test_state_and_reset():
    every = metrics.MultiMetric(
        a=metrics.Average(), c=metrics.Accuracy(), w=metrics.Welford(), m=metrics.ConfusionMatrix(4)
    )
    assert {ref.collection for ref in nnx.refs(every).values()} == {"metrics"}
    first = every["metrics"]
    feed(every)
    nnx.jit(lambda m: m.reset())(every)
    for path, value in every["metrics"].items():
        np.testing.assert_array_equal(value, first[path])
        assert value.dtype == first[path].dtype


def test_without_values_a_metric_is_nan():
    nothing = {"values": jnp.zeros((0,)), "logits": jnp.zeros((0, 2)), "labels": jnp.zeros(0, int)}
    masked = {"values": jnp.ones(3), "logits": jnp.ones((3, 2)), "labels": jnp.zeros(3, int),
              "mask": jnp.zeros(3, bool)}  # fmt: skip
    for updates in ([], [nothing], [masked]):
        for metric in (metrics.Average(), metrics.Accuracy(), metrics.Welford()):
            for batch in updates:
                metric.update(**batch)
            assert all(np.isnan(x) for x in jax.tree.leaves(metric.compute()))
    # An empty batch among others changes nothing.
    w = metrics.Welford()
    for batch in ({"values": VALUES}, nothing, masked):
        w.update(**batch)
    np.testing.assert_allclose(w.compute().standard_deviation, VALUES.std(), rtol=1e-5)


def test_precision():
    # The naive formula, mean of squares less square of the mean, gives nothing here.
    values = (1e4 + RNG.normal(size=(100, 50))).astype(np.float32)
    w, average = metrics.Welford(), metrics.Average()
    nnx.scan(lambda _, x: (None, (w.update(values=x), average.update(values=x))), None, values)
    exact = values.astype(np.float64)
    np.testing.assert_allclose(w.compute().standard_deviation, exact.std(), rtol=1e-3)
    np.testing.assert_allclose(average.compute(), exact.mean(), rtol=1e-6)
    half = metrics.Average()
    half.update(values=jnp.ones(5000, jnp.bfloat16))
    assert float(half.total) == 5000 and half.total.dtype == jnp.float32
    # Masked values may be anything.
    average.reset()
    average.update(values=jnp.array([1.0, jnp.nan]), mask=jnp.array([True, False]))
    assert float(average.compute()) == 1


def test_a_confusion_matrix_ignores_labels_out_of_range():
    matrix = metrics.ConfusionMatrix(2)
    logits = jnp.array([[1.0, 0.0]] * 3)
    matrix.update(logits=logits, labels=jnp.array([-1, 2, 1]))
    assert matrix.compute().tolist() == [[0, 0], [1, 0]]


def test_masks_broadcast():
    average = metrics.Average()
    average.update(values=jnp.arange(6.0).reshape(2, 3), mask=jnp.array([[True], [False]]))
    assert float(average.compute()) == 1 and float(average.count) == 3


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: metrics.Average("loss").update(values=1.0), TypeError, "'loss', but got 'values'"),
        (lambda: metrics.Welford().update(), TypeError, "Welford.*'values', but got nothing"),
        (
            lambda: metrics.Average().update(values=jnp.ones(3), mask=jnp.ones(2)),
            ValueError,
            r"of shape \(3,\), but has the shape \(2,\)",
        ),
        (
            lambda: metrics.Accuracy().update(logits=jnp.ones((3, 2)), labels=jnp.ones(2, int)),
            ValueError,
            r"Accuracy expects logits .* but got \(3, 2\) and \(2,\)",
        ),
        (
            lambda: metrics.Accuracy().update(logits=jnp.ones((3, 2)), labels=jnp.ones(3)),
            TypeError,
            "integer labels, but got float32",
        ),
        (
            lambda: metrics.Accuracy(0.5).update(logits=jnp.ones((3, 2)), labels=jnp.ones(3, int)),
            ValueError,
            r"shape of the labels, \(3,\), but got \(3, 2\)",
        ),
        (lambda: metrics.Accuracy("0.5"), TypeError, "a number or None, but got a str"),
        (
            lambda: metrics.ConfusionMatrix(3).update(logits=jnp.ones((3, 2)), labels=jnp.ones(3, int)),
            ValueError,
            r"\(..., 3\), but got \(3, 2\)",
        ),
        (lambda: metrics.MultiMetric(loss=1.0), TypeError, "'loss' is a float"),
        (lambda: metrics.MultiMetric(update=metrics.Average()), ValueError, "method 'update'"),
        (lambda: metrics.Metric().compute(), NotImplementedError, r"Metric has no compute\(\)"),
        (lambda: metrics.Metric().update(), NotImplementedError, r"Metric has no update\(\)"),
        (lambda: metrics.Metric().reset(), NotImplementedError, r"Metric has no reset\(\)"),
    ],
)  # fmt: skip
def test_mistakes(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_labels_of_a_small_dtype_do_not_wrap():
    accuracy = nnx.metrics.Accuracy()
    accuracy.update(logits=jax.nn.one_hot(jnp.array([300]), 400), labels=jnp.array([44], jnp.uint8))
    assert accuracy.compute() == 0


def test_counts_and_totals_do_not_stop():
    """At 2²⁴ float32 stops, at 2³¹ int32."""
    for start in (2**24, 2**31 - 2, 5 * 10**10):
        average, spread = metrics.Average(), metrics.Welford()
        average.count, average.count_high = jnp.int32(start % 2**30), jnp.int32(start >> 30)
        average.total = jnp.float32(start)
        average.rest = jnp.float32(start - int(average.total))
        spread.count, spread.count_high = average.count, average.count_high
        nnx.fori_loop(
            0, 5, lambda i, c: (average.update(values=1.0), spread.update(values=0.0), c)[2], 0
        )
        average.update(values=jnp.ones(3))
        count = int(average.count_high) * 2**30 + int(average.count)
        assert count == start + 8
        assert int(average.total) + int(average.rest) == start + 8
        assert float(average.compute()) == 1
        assert int(spread.count_high) * 2**30 + int(spread.count) == start + 5


def test_a_right_answer_counts_after_very_many():
    accuracy = metrics.Accuracy()
    accuracy.total, accuracy.count = jnp.float32(2**24), jnp.int32(2**24)
    batch = {"logits": jnp.array([[0.0, 1.0]]), "labels": jnp.array([1])}
    nnx.scan(
        lambda _, x: (None, accuracy.update(**x)),
        None,
        jax.tree.map(lambda a: jnp.stack([a] * 100), batch),
    )
    assert float(accuracy.compute()) == 1 and int(accuracy.count) == 2**24 + 100


def test_infinities_stay():
    average = metrics.Average()
    average.update(values=jnp.array([jnp.inf, 1.0]))
    average.update(values=1.0)
    assert float(average.compute()) == np.inf


def test_values_near_1e8_keep_their_digits():
    values = (RNG.integers(-500, 500, size=(50, 8)) * 8 + 1e8).astype(np.float32)
    exact = values.astype(np.float64)
    for kept in (np.ones_like(values, bool), RNG.random(values.shape) < 0.5):
        w = metrics.Welford()
        nnx.scan(lambda _, x: (None, w.update(values=x[0], mask=x[1])), None, (values, kept))
        found = w.compute()
        np.testing.assert_allclose(found.standard_deviation, exact[kept].std(), rtol=1e-6)
        mean = float(w.mean) + float(w.mean_rest)
        np.testing.assert_allclose(mean - 1e8, exact[kept].mean() - 1e8, rtol=1e-6)


def test_with_float64_nothing_is_rounded():
    values = RNG.normal(size=(3, 7)) + 1e9
    with jax.enable_x64(True):
        average, w = metrics.Average(), metrics.Welford()
        for batch in values:
            average.update(values=batch)
            w.update(values=batch)
        assert abs(float(average.compute()) - values.mean()) < 1e-6
        np.testing.assert_allclose(w.compute().standard_deviation, values.std(), rtol=1e-6)


def test_top_k_is_that_of_scikit_learn():
    from sklearn.metrics import top_k_accuracy_score

    logits, labels = LOGITS.reshape(-1, 4), LABELS.ravel()
    for k in (1, 2, 3):
        accuracy = metrics.Accuracy(top_k=k)
        nnx.jit(lambda m, x, y: m.update(logits=x, labels=y))(accuracy, logits, labels)
        expected = top_k_accuracy_score(labels, logits, k=k, labels=range(4))
        np.testing.assert_allclose(accuracy.compute(), expected, rtol=1e-6)


def test_labels_out_of_range_are_not_counted():
    logits = jnp.array([[2.0, 0.0, 1.0]] * 4)
    for k, expected in ((1, 0.5), (2, 0.5), (3, 1.0)):
        accuracy = metrics.Accuracy(top_k=k)
        accuracy.update(logits=logits, labels=jnp.array([-1, 0, 1, 3]))
        assert float(accuracy.compute()) == expected and int(accuracy.count) == 2
    binary = metrics.Accuracy(0.5)
    binary.update(logits=jnp.array([1.0, 1.0, 0.0]), labels=jnp.array([1, -1, 1]))
    assert float(binary.compute()) == 0.5
    masked = metrics.Accuracy()
    masked.update(logits=logits, labels=jnp.array([-1, 0, 1, 0]), mask=jnp.array([1, 1, 1, 0]))
    assert float(masked.compute()) == 0.5


def made(**options):
    return metrics.MultiMetric(
        a=metrics.Average(**options),
        c=metrics.Accuracy(**options),
        p=metrics.Perplexity(**options),
        w=metrics.Welford(**options),
        m=metrics.ConfusionMatrix(4, **options),
    )


BATCHES = {"logits": LOGITS, "labels": LABELS, "values": VALUES, "mask": MASK}


def at_once():
    every = made()
    every.update(**BATCHES)
    return every.compute()


def agree(found):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(at_once()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_metrics_merge():
    parts = [made() for _ in range(3)]
    for i, part in enumerate(parts):
        part.update(**{name: x[i] for name, x in BATCHES.items()})
    before = parts[1].compute()
    parts[0].merge(*parts[1:], made())
    agree(parts[0].compute())
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, parts[1].compute()))
    fresh = made()
    nnx.jit(lambda a, b: a.merge(b))(fresh, parts[0])
    agree(fresh.compute())


def test_the_lanes_of_a_metric_merge():
    @nnx.vmap
    def one(batch):
        metric = made()
        metric.update(**batch)
        return metric

    whole = made()
    whole.merge(one(BATCHES))
    agree(whole.compute())


def test_an_update_over_the_lanes_of_an_axis():
    every = made(axis_name="lanes")
    update = nnx.vmap(lambda m, batch: m.update(**batch), in_axes=(None, 0), axis_name="lanes")
    update(every, BATCHES)
    agree(every.compute())
    mesh = jax.make_mesh((3,), ("lanes",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:3])
    spread = made(axis_name="lanes")
    split = jax.sharding.PartitionSpec("lanes")
    step = nnx.shard_map(
        lambda m, batch: m.update(**batch),
        mesh=mesh,
        in_specs=(jax.sharding.PartitionSpec(), split),
        out_specs=jax.sharding.PartitionSpec(),
    )
    nnx.jit(step)(spread, BATCHES)
    agree(spread.compute())


@pytest.mark.parametrize(
    "call, error, match",
    [
        (
            lambda: metrics.Average().merge(metrics.Welford()),
            TypeError,
            "Average merges .* Welford",
        ),
        (
            lambda: made().merge(metrics.Average()),
            TypeError,
            "MultiMetric merges only other MultiMetrics",
        ),
        (
            lambda: metrics.MultiMetric(a=metrics.Average()).merge(made()),
            ValueError,
            "MultiMetric of a cannot be merged with one of a, c",
        ),
        (
            lambda: metrics.ConfusionMatrix(2).merge(metrics.ConfusionMatrix(3)),
            ValueError,
            r"shape \(2, 2\) cannot be merged with one of shape \(3, 3\)",
        ),
        (lambda: metrics.Metric().merge(), NotImplementedError, r"Metric has no merge\(\)"),
        (lambda: metrics.Accuracy(top_k=0), ValueError, "top_k of Accuracy must be at least 1"),
        (lambda: metrics.Accuracy(0.5, top_k=2), ValueError, "but got 2 and the threshold 0.5"),
        (
            lambda: metrics.Accuracy(top_k=3).update(
                logits=jnp.ones((3, 2)), labels=jnp.ones(3, int)
            ),
            ValueError,
            "top_k=3, but the logits.* have only 2 classes",
        ),
    ],
)
def test_mistakes_with_merging_and_top_k(call, error, match):
    with pytest.raises(error, match=match):
        call()
