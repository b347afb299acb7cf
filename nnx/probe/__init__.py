"""Look at what happens inside of a model, and change it: `capture`, `patch`, `output_grad`, `sow`.

A call goes to a stand-in of the model (`stand_in`) in which the modules that are selected
(`selecting`) are marked. What marks do is in `probing`, what comes out in `records`, how each
transformation carries both in `lifts` and `lift_loops`. `nnx.debug.find_nonfinite` is another use of
the same (`nonfinite`). It stands on the core; the core calls it by `ambient.probe` where it is active.
"""

from nnx.probe.outputs import ProbeError, capture, output_grad, patch, sow

__all__ = ["ProbeError", "capture", "output_grad", "patch", "sow"]
